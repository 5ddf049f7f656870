"""Masks of whole blocks against a slow reference in exact fractions."""

import math
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishmask import Mask, select
from fishmask.blocks import Block, Grid, block_means, block_size, random_blocks, top_blocks
from tests.cases import case

SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (0, 3),
    (5,),
    (16,),
    (7, 11),
    (3, 2),
    (16, 16),
    (17, 33),
    (4, 3, 3, 2),
    (1, 9),
]
BLOCKS: list[Block] = [(1, 1), (1, 4), "1x16", (3, 2), "2x5", (16, 16), "rows", "columns"]


def cut(shape: tuple[int, ...], block: Block) -> list[list[int]]:
    """Return the flat indices of every block, one entry at a time."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape) // rows if rows else 0
    fixed = {"rows": (1, columns), "columns": (rows, 1), "1x16": (1, 16), "2x5": (2, 5)}
    height, width = fixed[block] if isinstance(block, str) else block
    blocks = []
    for top in range(0, rows, max(height, 1)):
        for left in range(0, columns, max(width, 1)):
            inside = [
                i * columns + j
                for i in range(top, min(top + height, rows))
                for j in range(left, min(left + width, columns))
            ]
            blocks.append(inside)
    return blocks


def reference(scores: dict[str, Tensor], k: int, block: Block, magnitude: bool = False) -> dict[str, list[int]]:
    """Sort the blocks by their mean, then place; take each that still fits."""
    ranked = []
    for name, score in scores.items():
        numbers = [Fraction(x) for x in score.reshape(-1).tolist()]
        for inside in cut(tuple(score.shape), block):
            total = sum((abs(numbers[i]) if magnitude else numbers[i]) for i in inside)
            ranked.append((-total / len(inside), len(ranked), name, inside))
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for _, _, name, inside in sorted(ranked):
        if len(inside) <= k:
            chosen[name] += inside
            k -= len(inside)
    return {name: sorted(flat) for name, flat in chosen.items() if flat}


def as_lists(chosen: dict[str, Tensor]) -> dict[str, list[int]]:
    assert all(i.dtype == torch.int64 and i.device.type == "cpu" for i in chosen.values())
    return {name: flat.tolist() for name, flat in chosen.items()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], int, Block]:
    """Tensors of few different numbers, so that many blocks tie; sums of them are exact."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    seed, span = draw(st.integers(0, 2**32)), draw(st.sampled_from([1, 3, 50]))
    generator = torch.Generator().manual_seed(seed)
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    scores = {
        f"p{i}": (torch.randint(-span, span + 1, shape, generator=generator) / 4).to(dtype)
        for i, shape in enumerate(shapes)
    }
    n = sum(score.numel() for score in scores.values())
    return scores, draw(st.integers(0, n)), draw(st.sampled_from(BLOCKS))


@pytest.mark.filterwarnings("ignore:.*ties at zero")
@pytest.mark.parametrize("chunk", [1 << 22, 40, 3])
@pytest.mark.parametrize("magnitude", [False, True])
@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_top_blocks_equals_the_reference(
    chunk: int, magnitude: bool, problem: tuple[dict[str, Tensor], int, Block]
) -> None:
    scores, k, block = problem
    expected = reference(scores, k, block, magnitude)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "CHUNK", chunk)
        if k and not expected:
            with pytest.raises(ValueError, match="the smallest block has"):
                top_blocks(scores, k, block, magnitude=magnitude)
        else:
            assert as_lists(top_blocks(scores, k, block, magnitude=magnitude)) == expected


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_blocks_of_one_entry_are_the_unstructured_mask(problem: tuple[dict[str, Tensor], int, Block]) -> None:
    scores, k, _ = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert as_lists(top_blocks(scores, k, (1, 1))) == as_lists(select.top_k(scores, k))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_grid_holds_every_entry_once(shape: tuple[int, ...], block: Block) -> None:
    grid, blocks = Grid.of(shape, block), cut(shape, block)
    assert [grid.entries(torch.tensor([i])).tolist() for i in range(len(blocks))] == blocks
    assert grid.sizes().tolist() == [len(inside) for inside in blocks]
    assert grid.smallest == min((len(inside) for inside in blocks), default=0)
    assert grid.entries(torch.arange(len(blocks))).tolist() == list(range(math.prod(shape)))


def test_large_blocks_do_not_win_by_their_size() -> None:
    # The wide rows have the larger sums, 3 and 4; the narrow ones have more for each entry.
    scores = {"wide": torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]]), "narrow": torch.tensor([[0.7, 0.8], [2, 0.5]])}
    assert as_lists(top_blocks(scores, 6, "rows")) == {"wide": [4, 5, 6, 7], "narrow": [2, 3]}
    ragged = {"w": torch.tensor([[1.0, 1, 1, 0, 2.9]])}
    assert as_lists(top_blocks(ragged, 1, (1, 4))) == {"w": [4]}


def test_a_block_that_does_not_fit_is_passed_over() -> None:
    scores = {"a": torch.tensor([9.0, 9, 9, 9]), "b": torch.tensor([8.0, 8]), "c": torch.tensor([[1.0], [7.0]])}
    assert as_lists(top_blocks(scores, 3, "rows")) == {"b": [0, 1], "c": [1]}
    assert as_lists(top_blocks(scores, 5, "rows")) == {"a": [0, 1, 2, 3], "c": [1]}


def test_the_sums_keep_what_float32_would_lose_and_do_not_depend_on_threads() -> None:
    large = torch.tensor([[2.0**24, 1.0, 1.0], [2.0**24, 1.0, 0.0]])
    assert block_means(large, Grid.of(large.shape, "rows")).mul(3).tolist() == [2**24 + 2, 2**24 + 1]
    score = torch.randn(1537, 1301, generator=torch.Generator().manual_seed(0)).exp()
    threads, means = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            means.append([block_means(score, Grid.of(score.shape, block)) for block in ((16, 16), "rows", "columns")])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*means, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(means[0][1], score.double().mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(means[0][2], score.double().mean(0), rtol=1e-14, atol=0)


def test_a_transposed_tensor_counts_in_row_major_order() -> None:
    score = torch.tensor([[1.0, 5.0, 3.0], [9.0, 7.0, 2.0]]).t()
    assert as_lists(top_blocks({"w": score}, 2, "rows")) == {"w": [2, 3]}


@pytest.mark.parametrize(
    "block", ["16", "0x4", "4x-1", "x", "cells", (0, 1), (1,), (1, 2, 3), (1.0, 2), 16, None, (True, 1)]
)
def test_other_blocks_are_refused(block: object) -> None:
    with pytest.raises(ValueError, match="block must be 'rows', 'columns', or height and width"):
        block_size(block)  # type: ignore[arg-type]


def test_text_and_pairs_mean_the_same() -> None:
    assert block_size("3x16") == block_size((3, 16)) == (3, 16)
    assert block_size("rows") == (1, sys.maxsize)


def test_scores_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="finite; NaN or infinity in: w"):
        top_blocks({"w": torch.tensor([1.0, math.nan])}, 1, (1, 1))
    large = torch.full((2, 4), 1e308, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"add up to infinity within a block: .* in: w$"):
        top_blocks({"v": torch.ones(4), "w": large}, 4, "rows")
    with pytest.raises(TypeError, match="must be floating-point tensors"):
        top_blocks({"w": torch.tensor([1, 2])}, 1, (1, 1))


def test_a_budget_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1x16': the smallest block has 4 entries, .* room for 3;"):
        Mask.from_scores({"w": torch.rand(5, 20)}, 0.03, block="1x16")
    kept = Mask.from_scores({"w": torch.rand(5, 20), "h": torch.rand(3)}, 3 / 103, keep="h", block="1x16")
    assert kept.k == 3


def test_blocks_without_scores_are_reported() -> None:
    scores = {"w": torch.zeros(4, 4)}
    scores["w"][2, 1] = 1.0
    with pytest.warns(UserWarning, match="8 entries are chosen, but only 4 are in blocks whose summed") as caught:
        assert Mask.from_scores(scores, 0.5, block="rows").indices["w"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert caught[0].filename == __file__


def test_masks_of_blocks_keep_the_budget_and_whole_parameters() -> None:
    model = case("bert").make()
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    n = sum(p.numel() for p in model.parameters())
    for block in ("1x16", (3, 2), "rows", "columns"):
        for mask in (
            Mask.from_scores(scores, 0.3, keep="classifier", exclude="embeddings", block=block),
            Mask.magnitude(model, 0.3, keep="classifier", exclude="embeddings", block=block),
            Mask.random(model, 0.3, 3, keep="classifier", exclude="embeddings", block=block),
        ):
            assert 0.95 * 0.3 * n < mask.k <= 0.3 * n
            assert not any("embeddings" in name for name in mask.indices)
            for name, flat in mask.indices.items():
                if name.startswith("classifier"):
                    assert len(flat) == model.get_parameter(name).numel()
                    continue
                chosen = set(flat.tolist())
                assert all(len(chosen & set(b)) in (0, len(b)) for b in cut(tuple(mask.shapes[name]), block))
        assert Mask.magnitude(model, 0.3, block=block) == Mask.from_scores(scores, 0.3, block=block)


def test_random_blocks_depend_on_the_seed_alone_and_come_alike_often() -> None:
    model = case("mlp").make()
    one, again, other = (Mask.random(model, 0.2, seed, block=(2, 2)) for seed in (1, 1, 2))
    assert one == again != other
    # Six blocks of two entries, two taken: each is expected 100 times with a standard deviation of 8.
    shapes = {"a": (2, 4), "b": (4,)}
    counts = np.zeros(6, dtype=int)
    for seed in range(300):
        chosen = random_blocks(shapes, 4, (1, 2), seed)
        flat = torch.cat([chosen.get("a", torch.empty(0)), chosen.get("b", torch.empty(0)) + 8])
        assert len(flat) == 4
        counts[(flat[::2] // 2).long()] += 1
    assert abs(counts - 100).max() < 40
