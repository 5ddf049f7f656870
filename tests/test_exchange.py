"""Masks that workers choose together are those that one process would choose from the sum of their scores."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishmask import exchange
from fishmask.errors import HandshakeError
from fishmask.exchange import choose, deal, gather_masks
from fishmask.mask import Mask
from fishmask.wire import Wire
from tests.team import in_threads

SHAPES = {"body.weight": (4, 5), "body.bias": (3,), "scale": (), "head.weight": (2, 3), "none": (0, 4)}
COUNT = 20 + 3 + 1 + 6
Scores = dict[str, Tensor]
ZEROS = "ignore:.*scores are not zero:UserWarning"


def draw(generator: np.random.Generator, kind: str, dtype: torch.dtype) -> Scores:
    def numbers(shape: tuple[int, ...]) -> Any:
        if kind == "ties":
            return generator.integers(0, 3, shape)
        if kind == "negative":
            return generator.integers(-3, 2, shape)
        if kind == "sparse":
            return generator.random(shape) * (generator.random(shape) < 0.2)
        if kind == "zeros":
            return np.zeros(shape) * -1.0
        return generator.random(shape) * 10.0 ** generator.integers(-12, 5, shape)

    return {name: torch.as_tensor(np.asarray(numbers(shape), dtype="f8")).to(dtype) for name, shape in SHAPES.items()}


def total(scores: list[Scores]) -> Scores:
    """The sum in float64 in the order of the ranks, as one process would take it."""
    double = scores[0]["scale"].dtype == torch.float64
    sums = {}
    for name in SHAPES:
        added = torch.zeros(SHAPES[name], dtype=torch.float64)
        for one in scores:
            added += one[name].double()
        sums[name] = added if double else added.float()
    return sums


def agreed(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


KINDS = st.sampled_from(["any", "ties", "negative", "sparse", "zeros"])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
PATTERNS = st.sampled_from([((), ()), ("head", ()), ((), "body.weight"), (["head", "scale"], ("body.bias",))])


@pytest.mark.filterwarnings(ZEROS)
@given(st.integers(1, 4), KINDS, DTYPES, PATTERNS, st.integers(1, COUNT), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_workers_choose_what_one_process_would(
    size: int, kind: str, dtype: torch.dtype, patterns: Any, k: int, block: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    scores = [draw(generator, kind, dtype) for _ in range(size)]
    keep, exclude = patterns
    try:
        wanted: Any = Mask.from_scores(total(scores), k / COUNT, keep, exclude)
    except ValueError as error:
        wanted = error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_BLOCK", block)
        outcomes = in_threads(size, lambda wire: choose(scores[wire.rank], k / COUNT, keep, exclude, group=wire))
    for outcome in outcomes:
        if isinstance(wanted, ValueError):
            assert isinstance(outcome, ValueError)
            assert str(outcome) == str(wanted)
        else:
            assert outcome == wanted
            assert outcome.shapes == wanted.shapes


@pytest.mark.filterwarnings(ZEROS)
@given(st.integers(1, 4), KINDS, DTYPES, PATTERNS, st.integers(1, COUNT), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_masks_are_dealt_in_the_order_of_the_scores(
    size: int, kind: str, dtype: torch.dtype, patterns: Any, k: int, block: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    scores = [draw(generator, kind, dtype) for _ in range(size)]
    keep, exclude = patterns
    sums = total(scores)
    kept = {name for name in SHAPES if keep and name.split(".")[0] in (keep if isinstance(keep, list) else [keep])}
    free = [name for name in SHAPES if name not in kept and name not in (exclude if exclude else ())]
    each = k - sum(sums[name].numel() for name in kept)
    ranked = sorted(
        ((-float(value), place, name, index)
         for place, name in enumerate(free) for index, value in enumerate(sums[name].reshape(-1).tolist()))
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_BLOCK", block)
        outcomes = in_threads(size, lambda wire: deal(scores[wire.rank], k / COUNT, keep, exclude, group=wire))
    if each < 0 or size * each > len(ranked):
        assert all(isinstance(outcome, ValueError) for outcome in outcomes)
        assert len({str(outcome) for outcome in outcomes}) == 1
        return
    for rank, mask in enumerate(agreed(outcomes)):
        wanted = {(name, index) for _, _, name, index in ranked[: size * each][rank::size]}
        whole = {(name, index) for name in kept for index in range(sums[name].numel())}
        got = [(name, int(index)) for name, indices in mask.indices.items() for index in indices]
        assert set(got) == wanted | whole
        assert len(got) == k


def test_float64_scores_are_told_apart_where_float32_would_not() -> None:
    scores = {"w": torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12, 1.0], dtype=torch.float64)}
    for mask in agreed(in_threads(2, lambda wire: choose(scores, 0.5, group=wire))):
        assert mask.indices["w"].tolist() == [1, 2]
    first, second = agreed(in_threads(2, lambda wire: deal(scores, 0.25, group=wire)))
    assert (first.indices["w"].tolist(), second.indices["w"].tolist()) == ([2], [1])


@pytest.mark.parametrize("function", [choose, deal])
def test_too_few_scores_that_are_not_zero_are_warned_of(function: Any) -> None:
    scores = {"w": torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])}
    for outcome in in_threads(2, lambda wire: function(scores, 0.5, group=wire)):
        assert isinstance(outcome, UserWarning)  # an error in these tests
        assert "only 1 scores are not zero" in str(outcome)


# --- refusals ---------------------------------------------------------------------------------------------------------


def scores_of(rank: int, change: str) -> tuple[Any, ...]:
    scores: Scores = {"a": torch.rand(3, 4), "b": torch.rand(5)}
    request: list[Any] = [0.5, (), ()]
    if rank == 1:
        if change == "nan":
            scores["b"][2] = torch.nan
        if change == "shape":
            scores["b"] = torch.rand(6)
        if change == "dtype":
            scores["b"] = scores["b"].double()
        if change == "name":
            scores["c"] = scores.pop("b")
        if change == "order":
            scores = dict(reversed(scores.items()))
        if change == "density":
            request[0] = 0.4
        if change == "keep":
            request[1] = "b"
        if change == "pattern":
            request[2] = "d"
        if change == "whole":
            scores["b"] = torch.ones(5, dtype=torch.int64)
    return scores, *request


@pytest.mark.parametrize("function", [choose, deal])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("nan", "scores must be finite; NaN or infinity in: b on rank 1"),
        ("shape", "shapes of the scores: b"),
        ("dtype", "shapes of the scores: b"),
        ("name", "shapes of the scores: b, c"),
        ("order", "shapes of the scores: in another order"),
        ("density", "density, keep, exclude: [0.5, [], []] on ranks 0, 2; [0.4, [], []] on rank 1"),
        ("keep", "density, keep, exclude"),
        ("pattern", "usable on ranks 0, 2"),
        ("whole", "these are not: b (torch.int64) on rank 1"),
    ],
)
def test_scores_of_one_worker_that_differ_are_told_on_all(function: Any, change: str, told: str) -> None:
    def work(wire: Wire) -> Any:
        scores, density, keep, exclude = scores_of(wire.rank, change)
        try:
            return function(scores, density, keep, exclude, group=wire)
        except HandshakeError as error:
            # The wire is as it was: all have read the same messages.
            assert wire.gather(torch.tensor([wire.rank])).view(-1).tolist() == [0, 1, 2]
            return str(error)

    errors = agreed(in_threads(3, work))
    assert told in errors[0]
    assert len(set(errors)) == 1


@pytest.mark.parametrize("function", [choose, deal])
def test_what_is_wrong_everywhere_is_a_value_error(function: Any) -> None:
    for outcome in in_threads(2, lambda wire: function({"w": torch.rand(4)}, 1.5, group=wire)):
        assert isinstance(outcome, ValueError)
        assert "density is a fraction" in str(outcome)


@pytest.mark.parametrize("function", [choose, deal])
def test_scores_that_add_up_to_infinity_are_refused_on_all(function: Any) -> None:
    scores = {"w": torch.tensor([1.0, 2.0, 3.0, 3e38])}
    for outcome in in_threads(3, lambda wire: function(scores, 0.25, group=wire)):
        assert isinstance(outcome, ValueError)
        assert "add up to infinity" in str(outcome)


@given(st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_masks_come_as_they_were_sent(size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    masks = [
        Mask.from_dense({n: torch.from_numpy(np.asarray(generator.random(s) < 0.3)) for n, s in SHAPES.items()})
        for _ in range(size)
    ]
    for got in agreed(in_threads(size, lambda wire: gather_masks(wire, masks[wire.rank]))):
        assert got == masks
        assert all(mask.shapes == masks[0].shapes for mask in got)
