"""Several deltas made one: the sum in float64, rounded once; overlaps; buffers; what is refused."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fishmask
from fishmask import Delta, FishError, Mask, combine
from fishmask.combine import rounded
from fishmask.fingerprint import fingerprint, raw_bits
from tests.cases import case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


class Vector(nn.Module):
    """One parameter, so that entries can be told in a line."""

    def __init__(self, *numbers: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(numbers, dtype=torch.float64).to(dtype))


def delta_of(model: nn.Module, values: dict[int, float], dtype: torch.dtype | None = None) -> Delta:
    """A delta of a `Vector`: values by index."""
    mask = Mask.from_indices({"w": list(values)} if values else {}, model)
    numbers = torch.tensor([values[i] for i in sorted(values)], dtype=torch.float64).to(dtype or model.w.dtype)
    return Delta(mask, {"w": numbers} if values else {}, base=fingerprint(model.named_parameters(), mask))


def applied_to(model: nn.Module, delta: Delta) -> Tensor:
    """The weights with the delta in them."""
    tuned = copy.deepcopy(model)
    delta.apply(tuned)
    return tuned.w.detach()


def changed(model: nn.Module, density: float, seed: int) -> nn.Module:
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, indices in Mask.random(tuned, density, seed).indices.items():
            p = tuned.get_parameter(name)
            p.view(-1)[indices] = torch.randn(len(indices), generator=g).to(p.dtype)
    return tuned


def bits(model: nn.Module) -> dict[str, list[int]]:
    return {name: raw_bits(tensor).reshape(-1).tolist() for name, tensor in model.state_dict().items()}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "shared"),
    [("sum", 1 + 2 * 1 + 0.5 * 4), ("mean", 1 + (2 * 1 + 0.5 * 4) / 2), ("last", 1 + 0.5 * 4)],
)
def test_entries_of_one_are_weighted_and_shared_ones_as_asked(overlap: str, shared: float) -> None:
    model = Vector(1, 1, 1, 1)
    first, second = delta_of(model, {0: 2, 1: 2}), delta_of(model, {1: 5, 2: 9})
    found = combine(model, [first, second], [2, 0.5], overlap=overlap)
    assert found.mask.indices["w"].tolist() == [0, 1, 2]
    assert applied_to(model, found).tolist() == [1 + 2 * 1, shared, 1 + 0.5 * 8, 1]


def test_a_mean_counts_only_the_deltas_that_have_the_entry() -> None:
    model = Vector(0, 0)
    deltas = [delta_of(model, {0: 3, 1: 6}), delta_of(model, {1: 8}), delta_of(model, {1: 10})]
    assert applied_to(model, combine(model, deltas, [1, 1, 1], overlap="mean")).tolist() == [3, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_delta_with_weight_one_keeps_its_bits(dtype: torch.dtype) -> None:
    # A tiny value beside a large base, both zeros, a NaN with a payload of its own, infinities.
    numbers = [2.0**-6, -0.0, 0.0, 3.0, math.nan, -math.inf, math.inf]
    model = Vector(*[200.0] * len(numbers), 1.0, dtype=dtype)
    values = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    if dtype is torch.float32:
        values.view(torch.int32)[4] = 0x7FC12345
        values[0] = 1e-30
    mask = Mask.from_indices({"w": range(len(numbers))}, model)
    delta = Delta(mask, {"w": values}, base=fingerprint(model.named_parameters(), mask))
    for overlap in ("refuse", "sum", "mean", "last"):
        found = combine(model, [delta], [1.0], overlap=overlap)
        assert torch.equal(raw_bits(found.values["w"]), raw_bits(values))
        assert found.mask == delta.mask
        assert found.base == delta.base
    other = delta_of(model, {7: 2.0})  # elsewhere
    found = combine(model, [delta, other], [1.0, 0.5])
    assert torch.equal(raw_bits(found.values["w"])[:-1], raw_bits(values))


def test_float32_values_of_a_bfloat16_model_are_rounded_after_the_sum() -> None:
    model = Vector(1.0, dtype=torch.bfloat16)
    third = 1.0 + 2**-9  # half a step of bfloat16 above 1: alone it would be rounded away
    delta = delta_of(model, {0: third}, dtype=torch.float32)
    assert applied_to(model, delta).tolist() == [1]
    for found in (combine(model, [delta], [4.0]), combine(model, [delta] * 4, [1, 1, 1, 1], overlap="sum")):
        assert found.values["w"].dtype == torch.bfloat16
        assert found.values["w"].tolist() == [1 + 2**-7]


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


@settings(max_examples=300, deadline=None)
@given(number=FINITE | st.floats(-500, 500) | st.floats(-1e-6, 1e-6), data=st.data())
def test_rounding_is_to_the_nearest(number: float, data: st.DataObject) -> None:
    """Compared with exact fractions, also just beside the middle of two neighbours, where two roundings go wrong."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    start = torch.tensor(number, dtype=torch.float64).to(dtype)
    if start.isfinite() and data.draw(st.booleans()):
        upper = (start.view(torch.int16) + 1).view(dtype)
        if upper.isfinite():
            middle = (start.double() + upper.double()) / 2
            step = data.draw(st.sampled_from([-1, 0, 1]))
            number = (middle.view(torch.int64) + step).view(torch.float64).item() if middle else 0.0
    found = rounded(torch.tensor([number], dtype=torch.float64), dtype)
    around = (found.view(torch.int16) + torch.tensor([-1, 0, 1], dtype=torch.int16)).view(dtype).double()
    if not found.isfinite() or not around.isfinite().all() or found == 0:
        assert torch.equal(found, torch.tensor([number], dtype=torch.float64).to(dtype))
        return
    distances = [abs(Fraction(n) - Fraction(number)) for n in around.tolist()]
    assert distances[1] == min(distances)
    if distances.count(min(distances)) == 2:
        assert found.view(torch.int16).item() % 2 == 0


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    overlap=st.sampled_from(["sum", "mean", "last"]),
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_it_is_the_dense_formula(dtype: torch.dtype, overlap: str, weights: list[float], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(12, generator=g).to(dtype)
    model = Vector(*base.tolist(), dtype=dtype)
    chosen = [torch.randperm(12, generator=g)[:5].sort().values for _ in weights]
    values = [torch.randn(5, generator=g).to(dtype) for _ in weights]
    pairs = zip(chosen, values, strict=True)
    deltas = [delta_of(model, dict(zip(i.tolist(), v.tolist(), strict=True))) for i, v in pairs]
    expected = base.double()
    for entry in range(12):
        terms = [
            (w, w * (v[i == entry].double().item() - base[entry].double().item()), v[i == entry])
            for i, v, w in zip(chosen, values, weights, strict=True)
            if entry in i
        ]
        terms = terms[-1:] if overlap == "last" else terms
        if not terms:
            continue
        total = 0.0
        for _, term, _ in terms:
            total += term
        total = total / len(terms) if overlap == "mean" else total
        only = len(terms) == 1 and terms[0][0] == 1
        expected[entry] = terms[0][2].double().item() if only else base[entry].double().item() + total
    assert torch.equal(applied_to(model, combine(model, deltas, weights, overlap=overlap)), rounded(expected, dtype))


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv"])
def test_a_combination_is_a_delta_like_others(name: str, tmp_path: object) -> None:
    model = case(name).make()
    before = bits(model)
    tuned = [changed(model, 0.05, seed) for seed in (1, 2)]
    deltas = [Delta.between(model, t, base_name="tiny") for t in tuned]
    found = combine(model, deltas, [1, 1], overlap="last")
    assert found.base_name == "tiny"
    assert found.mask == deltas[0].mask | deltas[1].mask
    assert bits(model) == before
    path = f"{tmp_path}/both"
    found.save(path)
    Delta.load(path).apply(model)
    with_both = bits(model)
    other = case(name).make()
    for delta in deltas:
        delta.apply(other)
    assert with_both == bits(other)  # the last counts, as where deltas are stacked


def test_tied_weights_go_by_any_of_their_names() -> None:
    model = case("gpt2").make()
    first, second = (Delta.between(model, changed(model, 0.05, seed)) for seed in (1, 2))
    tied = next(name for name in first.mask.shapes if "wte" in name)

    def renamed(names: dict[str, object]) -> dict[str, object]:
        return {"lm_head.weight" if name == tied else name: part for name, part in names.items()}

    mask = Mask.from_indices(renamed(dict(second.mask.indices)), renamed(dict(second.mask.shapes)))
    tensors = renamed(dict(model.named_parameters()))
    alias = Delta(mask, renamed(second.values), base=fingerprint(tensors.items(), mask))
    weights = [0.5, 0.25]
    expected = combine(model, [first, second], weights, overlap="sum")
    found = combine(model, [first, alias], weights, overlap="sum")
    assert found.mask == expected.mask
    assert found.base == expected.base
    assert all(torch.equal(found.values[name], values) for name, values in expected.values.items())


def test_a_head_that_all_replace_whole() -> None:
    model = case("bert").make()
    mask = Mask.random(model, 0.1, seed=0, keep="classifier")
    deltas = []
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        values = {name: torch.randn(len(i), generator=g) for name, i in mask.indices.items()}
        deltas.append(Delta(mask, values, base=fingerprint(model.named_parameters(), mask)))
    found = combine(model, deltas, [0.5, 0.5], overlap="sum")
    assert "classifier.weight" not in found.base.short
    mean = (deltas[0].values["classifier.weight"] + deltas[1].values["classifier.weight"]) / 2
    torch.testing.assert_close(found.values["classifier.weight"], mean)


def test_buffers_are_united_and_others_refused() -> None:
    model = case("conv").make()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    first.norm.running_mean += 1
    second.norm.running_var *= 2
    one, two = Delta.between(model, first), Delta.between(model, second)
    found = combine(model, [one, two], [0.5, 0.5])
    found.apply(model)
    assert torch.equal(model.norm.running_mean, first.norm.running_mean)
    assert torch.equal(model.norm.running_var, second.norm.running_var)
    found.revert(model)
    second.norm.running_mean += 2
    three = Delta.between(model, second)
    with pytest.raises(FishError, match=r"other contents of the same buffer: norm\.running_mean;"):
        combine(model, [one, three], [0.5, 0.5], overlap="sum")
    last = combine(model, [one, three], [1, 1], overlap="last")
    assert torch.equal(last.buffers["norm.running_mean"], second.norm.running_mean)
    same = combine(model, [three, three], [0.5, 0.5])
    assert torch.equal(same.buffers["norm.running_mean"], second.norm.running_mean)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_overlaps_are_refused_with_their_counts() -> None:
    model = Vector(1, 1, 1, 1)
    deltas = [delta_of(model, {0: 2, 1: 2, 3: 4}), delta_of(model, {1: 5, 2: 9}), delta_of(model, {0: 5, 1: 9})]
    with pytest.raises(FishError, match=r"the same 3 entries: 3 of w. Say what becomes of them: overlap='sum'"):
        combine(model, deltas, [1, 1, 1])


def test_misuse_is_named() -> None:
    model = Vector(1, 1)
    delta = delta_of(model, {0: 2})
    with pytest.raises(ValueError, match="got 1 deltas, 2 weights"):
        combine(model, [delta], [1, 1])
    with pytest.raises(ValueError, match="got 0 deltas, 0 weights"):
        combine(model, [], [])
    with pytest.raises(ValueError, match=r"finite numbers, got \[nan\]"):
        combine(model, [delta], [math.nan])
    with pytest.raises(ValueError, match="one of 'refuse', 'sum', 'mean', 'last', got 'add'"):
        combine(model, [delta], [1], overlap="add")


def test_another_base_is_refused_unless_told() -> None:
    model, other = Vector(1, 1), Vector(1, 2)
    mine, theirs = delta_of(model, {0: 2}), delta_of(other, {0: 3})
    with pytest.raises(FishError, match="the delta does not fit this model:\n  other weights"):
        combine(model, [mine, theirs], [1, 1], overlap="sum")
    found = combine(model, [mine, theirs], [1, 1], overlap="sum", check_base=False)
    assert found.base == mine.base
    assert applied_to(model, found).tolist() == [1 + 1 + 2, 1]


def test_a_model_with_deltas_applied_is_not_the_base() -> None:
    model = Vector(1, 1)
    first, second = delta_of(model, {0: 2}), delta_of(model, {1: 2})
    first.apply(model)
    with pytest.raises(FishError, match=r"reads the base from the model, and deltas are applied to it: revert\(\)"):
        combine(model, [first, second], [1, 1])
    first.revert(model)
    assert applied_to(model, combine(model, [first, second], [1, 1])).tolist() == [2, 2]


def test_a_combination_beyond_the_range_is_refused() -> None:
    model = Vector(0, 0, dtype=torch.float16)
    delta = delta_of(model, {0: 60000.0, 1: 1.0})
    with pytest.raises(FishError, match="beyond the range of its dtype in: w; use smaller weights"):
        combine(model, [delta], [2.0])
    assert combine(model, [delta], [0.5]).values["w"].tolist() == [30000.0, 0.5]


def test_it_is_exported() -> None:
    assert fishmask.combine is combine
