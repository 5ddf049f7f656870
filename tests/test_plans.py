"""Plans against the dense weight gradient in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask import parts
from fishmask.costs import CPU as CPU_COSTS
from fishmask.costs import GPU as GPU_COSTS
from fishmask.costs import Costs, planned_for
from fishmask.parts import Block, best_split, block_cost, count, sampled_cost
from fishmask.plans import ConvolutionPlan, Kind, LookupPlan, ProductPlan, SidePlan

CPU = torch.device("cpu")


def chosen(shape: tuple[int, ...], kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    flat = torch.arange(torch.Size(shape).numel()).view(shape)
    if kind == "one":
        return flat.flatten()[[7]]
    if kind == "column":
        return flat[:, 1].flatten().sort().values
    if kind == "row":
        return flat[2].flatten()
    if kind == "all":
        return flat.flatten()
    share = {"scattered": 0.004, "half": 0.5}[kind]
    return (torch.rand(flat.numel(), generator=generator) < share).nonzero().squeeze(1)


def assert_close(got: Tensor, dense: Tensor, indices: Tensor) -> None:
    assert got.dtype == torch.float32
    want = dense.flatten()[indices]
    assert float((got.double() - want).norm() / dense.norm()) < 1e-6
    assert got.shape == want.shape


@pytest.mark.parametrize("kind", ["one", "column", "row", "all", "scattered", "half"])
@pytest.mark.parametrize("way", ["block", "sampled", "split", "tiles"])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(40, 30, 9), (12, 90, 300), (90, 12, 128)])
def test_product(kind: str, way: Kind, rows: int, columns: int, tokens: int) -> None:
    a, b = torch.randn(tokens, rows), torch.randn(tokens, columns)
    indices = chosen((rows, columns), kind)
    plan = ProductPlan(indices, (rows, columns), device=CPU, kind=way, costs=CPU_COSTS)
    assert plan.kind == way or (kind, way) == ("one", "split")
    assert_close(plan.product(plan.rows_of(a), plan.columns_of(b)), a.double().t() @ b.double(), indices)


def test_product_picks_the_cheaper_kind() -> None:
    shape = (384, 384)
    scattered = torch.randperm(384 * 384, generator=torch.Generator().manual_seed(0))[:700].sort().values
    for indices, kind in ((scattered, "sampled"), (chosen(shape, "column"), "block"), (chosen(shape, "half"), "block")):
        plan = ProductPlan(indices, shape, device=CPU, costs=CPU_COSTS)
        assert plan.kind == kind == min(plan.costs, key=plan.costs.__getitem__)


def clustered(shape: tuple[int, int], k: int) -> Tensor:
    """Return the k largest entries of an outer product, as the Fisher scores of a linear layer are nearly one."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, generator=generator).mul(2).exp() for n in shape)
    return (rows[:, None] * columns).flatten().topk(k).indices.sort().values


def test_entries_that_cluster_are_split() -> None:
    shape = (1536, 384)
    indices = clustered(shape, 3000)
    plan = ProductPlan(indices, shape, device=CPU, costs=CPU_COSTS)
    assert plan.kind == "split" and plan.costs["split"] < 0.9 * min(plan.costs["block"], plan.costs["sampled"])
    entries = [part.n_rows * part.n_columns for part in plan.parts]
    whole = count(indices // 384, 1536) * count(indices % 384, 384)
    assert sum(entries) < whole / 2  # what is multiplied
    a, b = torch.randn(64, 1536), torch.randn(64, 384)
    assert_close(plan.product(plan.rows_of(a), plan.columns_of(b)), a.double().t() @ b.double(), indices)


def test_the_best_split_is_the_best_of_all() -> None:
    shape = (24, 40)
    indices = clustered(shape, 90)
    row, column = indices // 40, indices % 40
    split = best_split(row, column, shape, CPU_COSTS)
    assert split is not None

    def cost(kept: Tensor) -> float:
        first = block_cost(CPU_COSTS, count(row[kept], 24), count(column[kept], 40), shape)
        n_rows, n_columns = count(row[~kept], 24), count(column[~kept], 40)
        rest = block_cost(CPU_COSTS, n_rows, n_columns, shape)
        return float(first + min(rest, sampled_cost(CPU_COSTS, int((~kept).sum()), n_rows, n_columns, shape)))

    found = []
    for lines in (row, column):
        order = torch.bincount(lines).argsort(descending=True, stable=True)
        for heavy in range(1, len(lines.unique())):
            found.append(cost(torch.isin(lines, order[:heavy])))
    assert split.cost == pytest.approx(min(found)) == pytest.approx(cost(split.heavy))


def test_a_dense_product_takes_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", 4 * 300)
    a, b = torch.randn(20, 40), torch.randn(20, 30)
    for kind in ("half", "all", "row"):
        indices = chosen((40, 30), kind)
        plan = ProductPlan(indices, (40, 30), device=CPU, kind="block", costs=CPU_COSTS)
        (block,) = plan.parts
        assert isinstance(block, Block)
        assert max((last - first) * block.n_columns for first, last, *_ in block.pieces) <= 300
        assert (len(block.pieces) > 1) == (kind != "row")
        assert_close(plan.product(plan.rows_of(a), plan.columns_of(b)), a.double().t() @ b.double(), indices)
    skipped = ProductPlan(torch.tensor([3, 39 * 30 + 2]), (40, 30), device=CPU, kind="block", costs=CPU_COSTS)
    want = (a.double().t() @ b.double()).flatten()[[3, 39 * 30 + 2]]
    assert torch.allclose(skipped.product(skipped.rows_of(a), skipped.columns_of(b)).double(), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["row", "column", "all"])
def test_entries_that_fill_their_block_need_no_gather(kind: str) -> None:
    plan = ProductPlan(chosen((400, 300), kind), (400, 300), device=CPU, kind="block", costs=CPU_COSTS)
    assert plan.nbytes <= 4 * 400  # at most the lines


@pytest.mark.parametrize("kind", ["block", "sampled", "split", "tiles"])
@pytest.mark.parametrize("figures", [CPU_COSTS, GPU_COSTS, replace(CPU_COSTS, gather=1e9)])
def test_few_columns_are_kept_alone_whatever_the_copy_costs(kind: Kind, figures: Costs) -> None:
    shape = (4096, 512)
    indices = (torch.arange(0, 4096, 64)[:, None] * 512 + torch.arange(0, 512, 5)).flatten()
    plan = ProductPlan(indices, shape, device=CPU, kind=kind, costs=figures)
    a, b = torch.randn(9, 4096), torch.randn(9, 512)
    assert plan.rows_of(a).shape == (9, 64) and plan.columns_of(b).shape == (9, 103)
    assert_close(plan.product(plan.rows_of(a), plan.columns_of(b)), a.double().t() @ b.double(), indices)


def test_indices_take_four_bytes() -> None:
    shape, indices = (64, 48), chosen((64, 48), "half")
    made = [ProductPlan(indices, shape, device=CPU, kind=kind) for kind in ("block", "sampled", "split", "tiles")]
    held = [made[0], *made[0].parts, *made[1].parts, made[2], *made[2].parts, made[3].tiles]
    held += [LookupPlan(indices, shape, padding_idx=None, device=CPU), SidePlan(indices, shape, device=CPU, block=True)]
    held += [ConvolutionPlan(chosen((8, 4, 3), "half"), (8, 4, 3), 1, device=CPU)]
    for thing in held:
        tensors = [value for value in vars(thing).values() if isinstance(value, Tensor) and len(value)]
        assert all(tensor.dtype == torch.int32 for tensor in tensors)
    for plan, words in zip(made, (1, 1, 2, 2), strict=True):  # per entry
        assert 4 * words * len(indices) <= plan.nbytes <= 4 * (words * len(indices) + 4 * sum(shape))


@pytest.mark.parametrize("kind", ["block", "sampled", "split"])
def test_half_precision_gives_float32(kind: Kind) -> None:
    a, b = torch.randn(50, 40).bfloat16(), torch.randn(50, 30).bfloat16()
    indices = chosen((40, 30), "half")
    plan = ProductPlan(indices, (40, 30), device=CPU, kind=kind, costs=CPU_COSTS)
    got = plan.product(plan.rows_of(a), plan.columns_of(b))
    want = (a.double().t() @ b.double()).flatten()[indices]
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 5e-3


def test_a_gpu_samples_nothing_and_has_tiles_only_once_measured() -> None:
    indices = chosen((512, 512), "scattered")
    plan = ProductPlan(indices, (512, 512), device=torch.device("cpu"), costs=GPU_COSTS)
    assert plan.costs["sampled"] == plan.costs["tiles"] == math.inf and plan.kind in ("block", "split")
    quick = replace(GPU_COSTS, tile=GPU_COSTS.multiply / 2)
    one = (torch.arange(128)[:, None] * 4096 + torch.arange(0, 4096, 3)).flatten()  # in 32 tiles of 1,024
    plan = ProductPlan(one, (4096, 4096), device=CPU, costs=replace(quick, gather=0.0))
    assert plan.kind == "tiles" and plan.tiles is not None and len(plan.tiles.rows) == 32
    assert plan.rows is not None and plan.columns is None  # few rows are kept alone
    a, b = torch.randn(5, 4096), torch.randn(5, 4096)
    want = (plan.rows_of(a).double().t() @ b.double()).flatten()[one]
    assert torch.allclose(plan.product(plan.rows_of(a), b).double(), want, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["block", "split", "tiles"])
@pytest.mark.parametrize("entries", ["one", "column", "row", "all", "scattered", "half"])
def test_product_on_a_gpu(kind: Kind, entries: str) -> None:
    a, b = torch.randn(200, 300), torch.randn(200, 150)
    indices = chosen((300, 150), entries)
    plan = ProductPlan(indices, (300, 150), device=torch.device("cuda"), kind=kind)
    got = plan.product(plan.rows_of(a.cuda()), plan.columns_of(b.cuda()))
    assert_close(got.cpu(), a.double().t() @ b.double(), indices)


@pytest.mark.parametrize("kind", ["block", "sampled", "split", "tiles"])
def test_without_data(kind: Kind) -> None:
    meta = torch.device("meta")
    indices = chosen((60, 90), "half")
    plan = ProductPlan(indices, (60, 90), device=meta, kind=kind)
    real = ProductPlan(indices, (60, 90), device=CPU, kind=kind)
    assert plan.nbytes == real.nbytes
    a, b = torch.empty(7, 60, device="meta"), torch.empty(7, 90, device="meta")
    found = plan.product(plan.rows_of(a), plan.columns_of(b))
    assert found.shape == indices.shape and found.dtype == torch.float32 and found.is_meta
    lookup = LookupPlan(indices, (60, 90), padding_idx=None, device=meta)
    found = lookup.product(torch.empty(7, 90, device="meta"), torch.empty(7, dtype=torch.int64, device="meta"))
    assert found.shape == indices.shape and found.is_meta
    with planned_for("cuda"):
        assert math.isinf(ProductPlan(indices, (60, 90), device=meta).costs["sampled"])
    assert math.isfinite(ProductPlan(indices, (60, 90), device=meta).costs["sampled"])


@pytest.mark.parametrize("kind", ["block", "sampled", "split", "tiles"])
def test_compiled_as_one_graph(kind: Kind) -> None:
    indices = chosen((40, 30), "half")
    plan = ProductPlan(indices, (40, 30), device=CPU, kind=kind, costs=CPU_COSTS)
    a, b = torch.randn(20, 40), torch.randn(20, 30)
    product = torch.compile(
        lambda a, b: plan.product(plan.rows_of(a), plan.columns_of(b)), backend="eager", fullgraph=True
    )
    assert_close(product(a, b), a.double().t() @ b.double(), indices)


@pytest.mark.parametrize("kind", ["one", "column", "row", "all", "half"])
@pytest.mark.parametrize(
    ("dims", "groups", "stride", "padding", "dilation"),
    [(1, 1, 1, 0, 1), (2, 1, 2, 1, 1), (2, 3, 1, 2, 2), (3, 1, 1, 1, 1)],
)
def test_convolution(kind: str, dims: int, groups: int, stride: int, padding: int, dilation: int) -> None:
    weight = torch.randn(6, 9 // groups, *[3] * dims, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 9, *[7] * dims)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    output = function(x.double(), weight, None, stride, padding, dilation, groups)
    grad = torch.randn(output.shape)
    (dense,) = torch.autograd.grad(output, weight, grad.double())
    indices = chosen(tuple(weight.shape), kind)
    plan = ConvolutionPlan(indices, tuple(weight.shape), groups, device=CPU)
    geometry = ([stride] * dims, [padding] * dims, [dilation] * dims, groups)
    assert_close(plan.product(plan.outputs_of(grad), plan.inputs_of(x), *geometry), dense, indices)


@pytest.mark.parametrize("kind", ["one", "column", "row", "all", "scattered", "half"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_lookup(kind: str, padding_idx: int | None) -> None:
    weight = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(0))  # some rows often, some never
    ids[:5] = 2
    grad = torch.randn(40, 6)
    (dense,) = torch.autograd.grad(F.embedding(ids, weight, padding_idx), weight, grad.double())
    indices = chosen((50, 6), kind)
    plan = LookupPlan(indices, (50, 6), padding_idx=padding_idx, device=CPU)
    assert_close(plan.product(grad, ids), dense, indices)


def test_lookup_without_any_masked_token() -> None:
    plan = LookupPlan(torch.tensor([3, 4]), (5, 4), padding_idx=None, device=CPU)
    assert torch.equal(plan.product(torch.randn(3, 4), torch.tensor([2, 3, 4])), torch.zeros(2))
