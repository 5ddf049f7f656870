"""Exact top-k against a sort, the budget, and uniform random subsets."""

import warnings
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishmask import select
from fishmask.select import budget, divide, histogram, random_k, top_k

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reference(scores: dict[str, Tensor], k: int, magnitude: bool = False) -> dict[str, list[int]]:
    """Sort by (-score, position) in Python numbers."""
    flat = [(name, i, float(x)) for name, s in scores.items() for i, x in enumerate(s.reshape(-1).tolist())]
    places = sorted(range(len(flat)), key=lambda p: (-abs(flat[p][2]) if magnitude else -flat[p][2], p))[:k]
    chosen: dict[str, list[int]] = {}
    for place in sorted(places):
        chosen.setdefault(flat[place][0], []).append(flat[place][1])
    return chosen


def as_lists(chosen: dict[str, Tensor]) -> dict[str, list[int]]:
    assert all(i.dtype == torch.int64 and i.device.type == "cpu" for i in chosen.values())
    return {name: indices.tolist() for name, indices in chosen.items()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], int]:
    """A few tensors full of ties, zeros of both signs, subnormals and neighbours; any shape, empty and 0-d included."""
    dtype = draw(st.sampled_from(DTYPES))
    few = [0.0, -0.0, 1.0, -1.0, 1.0000001, 2.0, -2.5, 1e-40, -1e-40, 6e-8, 3e4]
    number = st.one_of(st.sampled_from(few), st.floats(-6e4, 6e4, width=32))
    scores = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(), (0,), (3,), (2, 3), (7, 2), (1, 1, 5)]))
        size = int(np.prod(shape))
        values = draw(st.lists(number, min_size=size, max_size=size))
        scores[f"p{i}"] = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    return scores, draw(st.integers(0, sum(s.numel() for s in scores.values())))


@pytest.mark.filterwarnings("ignore:.*ties at zero")
@pytest.mark.parametrize("chunk", [1 << 22, 3])
@pytest.mark.parametrize("magnitude", [False, True])
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_top_k_equals_a_sort(chunk: int, magnitude: bool, problem: tuple[dict[str, Tensor], int]) -> None:
    scores, k = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "CHUNK", chunk)
        assert as_lists(top_k(scores, k, magnitude=magnitude)) == reference(scores, k, magnitude)


@pytest.mark.filterwarnings("ignore:.*ties at zero")
@settings(max_examples=100, deadline=None)
@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), data=st.data())
def test_top_k_orders_float64_by_all_four_digits(bits: list[int], data: st.DataObject) -> None:
    numbers = np.array(bits, dtype=np.uint64).view(np.float64)
    scores = {"p": torch.from_numpy(np.where(np.isfinite(numbers), numbers, 0.0))}
    k = data.draw(st.integers(0, len(bits)))
    assert as_lists(top_k(scores, k)) == reference(scores, k)


def test_top_k_of_mixed_dtypes_compares_in_the_widest() -> None:
    scores = {"a": torch.tensor([1.0], dtype=torch.bfloat16), "b": torch.tensor([1 + 2.0**-40], dtype=torch.float64)}
    assert as_lists(top_k(scores, 1)) == {"b": [0]}


def test_top_k_over_chunk_borders_of_a_large_tensor() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.randn(select.CHUNK + 5), "b": torch.randn(1000, 7)}
    k = 12_345
    flat = torch.cat([scores["a"], scores["b"].reshape(-1)])
    expected = divide(flat.topk(k).indices.sort().values, {"a": scores["a"].numel(), "b": 7000})
    chosen = top_k(scores, k)
    assert all(torch.equal(chosen[name], expected[name]) for name in ("a", "b"))


def test_top_k_takes_non_contiguous_scores_in_row_major_order() -> None:
    score = torch.tensor([[1.0, 5.0], [9.0, 7.0], [3.0, 2.0]]).t()  # [[1, 9, 3], [5, 7, 2]]
    assert as_lists(top_k({"w": score}, 3)) == {"w": [1, 3, 4]}


def test_histograms_of_parts_add_up() -> None:
    scores = {"a": torch.randn(100), "b": torch.randn(50)}
    keys = [select.Keys(part, torch.float32, False) for part in (scores, {"a": scores["a"]}, {"b": scores["b"]})]
    whole, first, second = (histogram(k, 0, 16) for k in keys)
    assert whole.sum() == 150
    assert torch.equal(whole, first + second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores_are_refused_by_every_name(bad: float) -> None:
    scores = {"fine": torch.ones(2), "one": torch.tensor([0.0, bad]), "two": torch.full((2, 2), bad)}
    with pytest.raises(ValueError, match=r"finite.*in: one, two$"):
        top_k(scores, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_scores_that_are_not_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"must be floating-point tensors; these are not: w \("):
        top_k({"w": torch.ones(2).to(dtype)}, 1)


def test_k_out_of_range_is_refused() -> None:
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"number of scores, 2; got {k}"):
            top_k({"w": torch.ones(2)}, k)


def test_a_budget_beyond_the_nonzero_scores_is_reported_with_both_numbers() -> None:
    scores = {"a": torch.tensor([0.0, 0.0, 4.0]), "b": torch.tensor([0.0, 3.0])}
    with pytest.warns(UserWarning, match="3 entries are asked for, but only 2 scores are not zero"):
        assert as_lists(top_k(scores, 3)) == {"a": [0, 2], "b": [1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_k(scores, 2)
        top_k({"w": torch.tensor([1.0, -1.0])}, 2)  # negative, but not zero


def test_budget_counts_all_entries_and_spends_keep_first() -> None:
    sizes = {"body": 800, "frozen": 190, "head": 10}
    assert budget(sizes, 0.05, keep="head", exclude="frozen") == (["head"], ["body"], 40)
    assert budget(sizes, 1.0) == ([], ["body", "frozen", "head"], 1000)


def test_budget_gives_k_back_from_k_over_n() -> None:
    n = 22_713_216
    for k in (1, 7, 113_566, 333_333, n - 1, n):
        assert budget({"w": n}, k / n)[2] == k
    assert 0.29 * 100 < 29
    assert budget({"w": 100}, 0.29)[2] == 29


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_budget_refuses_densities_outside_its_range(density: float) -> None:
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\]"):
        budget({"w": 10}, density)


def test_budget_says_which_density_would_do() -> None:
    sizes = {"body": 997, "head": 3}
    with pytest.raises(ValueError, match=r"keep takes 3 entries.*allows 2; use a density of at least 0.003") as caught:
        budget(sizes, 0.002, keep="head")
    assert budget(sizes, float(str(caught.value).split("at least ")[1].split(",")[0]), keep="head")[2] == 0
    with pytest.raises(ValueError, match=r"less than one entry; use at least 0.001"):
        budget(sizes, 0.0001)


def test_budget_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match=r"both kept and excluded: a\.bias"):
        budget({"a.weight": 4, "a.bias": 2}, 0.9, keep="a.bias", exclude="a")
    with pytest.raises(ValueError, match="asks for 5 of 6 entries, but only 4 are not excluded"):
        budget({"a.weight": 4, "a.bias": 2}, 0.9, exclude="bias")
    with pytest.raises(ValueError, match="keep='claser' matches no parameter"):
        budget({"classer": 4}, 0.9, keep="claser")


@pytest.mark.parametrize("k", [0, 1, 50, 5_000, 30_000])
def test_random_k_is_exact_sorted_and_repeatable(k: int) -> None:
    sizes = {"a": 20_000, "none": 0, "b": 10_000}
    chosen = random_k(sizes, k, seed=3)
    assert sum(len(i) for i in chosen.values()) == k
    for name, indices in chosen.items():
        assert (indices.diff() > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < sizes[name]
    again = random_k(sizes, k, seed=3)
    assert all(torch.equal(chosen[name], again[name]) for name in chosen)
    if k == 50:
        assert as_lists(random_k(sizes, k, seed=4)) != as_lists(chosen)


def test_random_k_gives_every_subset_alike() -> None:
    # 20 subsets, 4,000 draws: each is expected 200 times with a standard deviation of 13.8.
    draws = Counter(
        tuple(as_lists(random_k({"a": 4, "b": 2}, 3, seed)).get("a", []))
        + tuple(i + 4 for i in as_lists(random_k({"a": 4, "b": 2}, 3, seed)).get("b", []))
        for seed in range(4000)
    )
    assert set(draws) == set(combinations(range(6), 3))
    assert max(abs(count - 200) for count in draws.values()) < 70
