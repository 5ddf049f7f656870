"""How differences travel, for any values: errors bounded, rows apart, and what is not finite is not lost on the way."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishmask.payload import BLOCK, decode, encode

PAYLOADS = ("float32", "bfloat16", "int8")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = st.one_of(FINITE, st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4e38]))


def travel(values: Tensor, payload: str) -> Tensor:
    return decode(encode(values, payload), payload, values.shape[-1])


@given(st.lists(NUMBERS, min_size=0, max_size=40))
@settings(max_examples=150, deadline=None)
def test_float32_keeps_every_bit(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(travel(values, "float32").view(torch.int32), values.view(torch.int32))


@given(st.lists(NUMBERS, min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_bfloat16_rounds_to_its_eight_digits(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    got = travel(values, "bfloat16").double()
    inside = values.abs() < torch.finfo(torch.bfloat16).max
    error = (got - values.double()).abs()[inside]
    # Half a unit in the eighth binary digit; below the smallest normal number half of the smallest step.
    assert bool((error <= (values.double().abs() * 2**-8)[inside].clamp_min(2.0**-134)).all())


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.integers(0, 3 * BLOCK), st.integers(0, 2**32 - 1))
@example(numbers=[torch.finfo(torch.float32).max], more=0, seed=0)
@settings(max_examples=150, deadline=None)
def test_int8_errs_by_half_a_step_of_its_block(numbers: list[float], more: int, seed: int) -> None:
    filling = torch.randn(more, generator=torch.Generator().manual_seed(seed))
    values = torch.cat([filling, torch.tensor(numbers, dtype=torch.float32)])
    got = travel(values, "int8")
    assert bool(got.isfinite().all())
    for start in range(0, len(values), BLOCK):
        block, back = values[start : start + BLOCK].double(), got[start : start + BLOCK].double()
        step = float(block.abs().max()) / 127
        # Where the step itself is below the smallest normal float32, all of it may be lost, which is next to nothing.
        bound = step / 2 * (1 + 1e-5) if step > 2.0**-126 else 128 * 2.0**-126
        assert float((back - block).abs().max()) <= bound
        assert bool((back[block == 0] == 0).all())


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_travel_apart_and_in_so_many_bytes(payload: str, count: int, rows: int) -> None:
    values = torch.randn(rows, count, generator=torch.Generator().manual_seed(count)) * torch.tensor([[1e-3]])
    coded = encode(values, payload)
    wanted = {"float32": 4 * count, "bfloat16": 2 * count, "int8": count + 4 * math.ceil(count / BLOCK)}
    assert coded.dtype == torch.uint8
    assert coded.shape == (rows, wanted[payload])
    back = decode(coded, payload, count)
    assert back.shape == values.shape
    for row, alone in zip(back, values, strict=True):
        assert torch.equal(row, travel(alone, payload))


@pytest.mark.parametrize("payload", ["bfloat16", "int8"])
def test_what_came_travels_on_unchanged(payload: str) -> None:
    values = torch.randn(700, generator=torch.Generator().manual_seed(1))
    once = travel(values, payload)
    torch.testing.assert_close(travel(once, payload), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_and_strided_values_travel_too(payload: str) -> None:
    assert travel(torch.empty(0), payload).shape == (0,)
    values = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))[::2, ::3]
    assert torch.equal(travel(values, payload), travel(values.contiguous(), payload))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_seen_at_the_other_end(payload: str, bad: float) -> None:
    values = torch.randn(600, generator=torch.Generator().manual_seed(3))
    values[300] = bad
    assert not bool(travel(values, payload).isfinite().all())
