"""Plans against the dense weight gradient in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask.costs import CPU as CPU_COSTS
from fishmask.plans import ConvolutionPlan, Kind, LookupPlan, ProductPlan

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
