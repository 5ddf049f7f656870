"""Rounding of values to the precision of the weights."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fishmask
from fishmask.errors import FishError
from fishmask.log import CheckpointLog
from fishmask.mask import Mask
from fishmask.rounding import rounded, salt_of
from tests.cases import CASES
from tests.dense import loss_of

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def numbers(dtype: torch.dtype) -> Tensor:
    """Values of all sizes that a dtype tells apart, and some below its smallest normal number."""
    generator = torch.Generator().manual_seed(0)
    tiny = torch.finfo(dtype).smallest_normal
    scales = torch.tensor([100.0, 1.0, 1e-3, tiny, tiny / 16])
    return (torch.randn(5, 400, generator=generator) * scales[:, None]).flatten()


def draw(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    return rounded(values, dtype, torch.arange(len(values)), salt_of("stochastic", seed, "weight"))


@HALF
def test_the_mean_over_seeds_is_the_value_and_only_its_neighbours_are_drawn(dtype: torch.dtype) -> None:
    values, n = numbers(dtype), 500
    drawn = torch.stack([draw(values, dtype, seed).float() for seed in range(n)])
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].unique()  # all numbers that the dtype has
    low, high = every[torch.bucketize(values, every, right=True) - 1], every[torch.bucketize(values, every)]
    spacing = (high - low).double()
    assert ((drawn == low) | (drawn == high)).all()
    # A mean of n draws is off by at most half a spacing over the root of n, standard deviations; 2,000 values.
    off = (drawn.double().mean(0) - values.double()).abs()
    assert (off <= 5 * 0.5 * spacing / n**0.5).all()
    share = ((drawn.double().mean(0) - values.double()) / spacing)[spacing > 0]
    assert abs(float(share.mean())) < 5 * 0.5 / (n * len(share)) ** 0.5
    assert abs(float((share * values[spacing > 0].sign()).mean())) < 5 * 0.5 / (n * len(share)) ** 0.5


@HALF
def test_what_the_dtype_holds_stays_and_signs_mirror(dtype: torch.dtype) -> None:
    values = numbers(dtype)
    assert torch.equal(draw(values.to(dtype).float(), dtype, 1), values.to(dtype))
    assert torch.equal(draw(-values, dtype, 1), -draw(values, dtype, 1))
    limits = torch.finfo(dtype)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, limits.max, limits.min, 3.4e38, -3.4e38])
    for seed in range(20):
        drawn = draw(odd, dtype, seed)
        assert torch.equal(drawn.view(torch.int16), odd.to(dtype).view(torch.int16))
        assert draw(torch.tensor([limits.max * (1 + limits.eps / 8)]), dtype, seed).isfinite().all()


def test_draws_differ_by_seed_place_name_and_value() -> None:
    values = torch.full((4000,), 1.001)
    ups = {seed: draw(values, torch.bfloat16, seed) > 1.001 for seed in (0, 1)}
    other = rounded(values, torch.bfloat16, torch.arange(4000), salt_of("stochastic", 0, "other")) > 1.001
    moved = draw(values + 2.0**-22, torch.bfloat16, 0) > 1.001
    for draws in (ups[1], other, moved, ups[0].roll(1)):
        joint = (ups[0] & draws).float().mean()
        expected = ups[0].float().mean() * draws.float().mean()
        assert abs(joint - expected) < 0.03  # independent, as two coins are
    assert torch.equal(draw(values, torch.bfloat16, 0) > 1.001, ups[0])


def test_float32_and_unknown_kinds() -> None:
    values = torch.randn(50)
    assert torch.equal(draw(values, torch.float32, 0), values)
    model = nn.Linear(2, 2)
    for wrong, said in (({"rounding": "up"}, "'nearest' or 'stochastic'"), ({"rounding_seed": -1}, "from 0 to")):
        with pytest.raises(ValueError, match=said):
            fishmask.attach(model, Mask.from_indices({"weight": [0]}), **wrong)
    assert all(p.requires_grad for p in model.parameters())


# --- in training ------------------------------------------------------------------------------------------------------


def half_bert() -> nn.Module:
    model = next(c for c in CASES if c.name == "bert-padded").make()
    return model.to(torch.bfloat16).train()


def batch(seed: int) -> dict[str, Tensor]:
    made: dict[str, Tensor] = next(c for c in CASES if c.name == "bert-padded").batch(4, seed)
    return made


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    loss_of(model, batch(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(tuning: fishmask.Tuning) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuning.parameters(), lr=1e-3)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().view(torch.int16).clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_are_a_function_of_the_values() -> None:
    model = half_bert()
    mask = Mask.random(model, 0.2, seed=0)
    tuning = fishmask.attach(model, mask, rounding="stochastic", rounding_seed=3)
    base, optimizer = bits(model), adam(tuning)
    for seed in range(3):
        step(model, optimizer, seed)
    weights = bits(model)
    for name, values in tuning.named_parameters():
        salt = salt_of("stochastic", 3, name)
        drawn = rounded(values.detach(), torch.bfloat16, mask.indices[name], salt)
        assert torch.equal(model.get_parameter(name).detach().take(mask.indices[name]), drawn)
    nearest = torch.cat([v.detach().bfloat16() for v in tuning.parameters()])
    held = torch.cat([model.get_parameter(n).detach().take(i) for n, i in mask.indices.items()])
    assert (nearest != held).float().mean() > 0.1
    # Neither writing again, reading back, lending the base, going away nor a copy draws anew.
    tuning.write_back()
    before = tuning.values.clone()
    tuning.read_back()
    assert torch.equal(tuning.values, before)
    with tuning.disabled():
        assert equal(bits(model), base)
    tuning.suspend()
    assert equal(bits(model), base)
    tuning.resume()
    twin = copy.deepcopy(tuning)
    twin.write_back()
    assert (twin.rounding, twin.rounding_seed) == ("stochastic", 3)
    assert equal(bits(model), weights)
    assert equal(bits(twin.model), weights)
    tuning.set_mask(mask & Mask.random(model, 0.5, seed=1), optimizer)
    assert equal(bits(model), weights)
    tuning.revert()
    assert equal(bits(model), base)


def test_deltas_have_the_weights_or_the_values() -> None:
    model = half_bert()
    base = copy.deepcopy(model)
    tuning = fishmask.attach(model, Mask.random(model, 0.2, seed=0), rounding="stochastic")
    optimizer = adam(tuning)
    for seed in range(2):
        step(model, optimizer, seed)
    other = copy.deepcopy(base)
    tuning.delta().apply(other)
    assert equal(bits(other), bits(model))
    for name, values in tuning.named_parameters():
        assert torch.equal(tuning.delta("values").values[name], values.detach())


def test_a_mask_change_keeps_the_digits_that_weights_lack() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [1, 5, 9]}))
    with torch.no_grad():
        tuning.values.copy_(torch.tensor([0.1, 0.2, 0.3]))
    tuning.set_mask(Mask.from_indices({"weight": [2, 5, 9]}))
    assert tuning.values[1:].tolist() == torch.tensor([0.2, 0.3]).tolist()
    assert float(tuning.values[0]) == float(model.weight.view(-1)[2])


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def begin() -> tuple[fishmask.Tuning, torch.optim.Optimizer]:
        model = half_bert()
        tuning = fishmask.attach(model, Mask.random(model, 0.2, seed=0), rounding="stochastic", rounding_seed=7)
        return tuning, adam(tuning)

    later = Mask.random(half_bert(), 0.2, seed=5)
    tuning, optimizer = begin()
    log = CheckpointLog(tmp_path / "log")
    for seed in range(2):
        step(tuning.model, optimizer, seed)
    log.commit(tuning, optimizer, step=2)
    tuning.set_mask(later, optimizer)
    step(tuning.model, optimizer, 2)
    log.commit(tuning, optimizer, step=3)
    at_commit = bits(tuning.model)
    for seed in (3, 4):
        step(tuning.model, optimizer, seed)
    again, other = begin()
    log = CheckpointLog(tmp_path / "log")
    log.restore(again, other)
    assert equal(bits(again.model), at_commit)
    for seed in (3, 4):
        step(again.model, other, seed)
    assert equal(bits(again.model), bits(tuning.model))
    assert torch.equal(again.values, tuning.values)
    for changes in ({}, {"rounding": "stochastic", "rounding_seed": 8}):
        bare = half_bert()
        attached = fishmask.attach(bare, later, **changes)
        before = bits(bare)
        with pytest.raises(FishError, match="written with rounding stochastic 7, the model is attached with"):
            log.restore(attached)
        assert equal(bits(bare), before)


def test_updates_too_small_for_the_weight_count_on_average() -> None:
    """The forward sees what the values have become, where rounding to the nearest shows it nothing."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        model = nn.Linear(50, 50, bias=False).to(torch.bfloat16)
        with torch.no_grad():
            model.weight.fill_(1.0)
        tuning = fishmask.attach(model, Mask.random(model, 1.0, seed=0), rounding=rounding)
        optimizer = torch.optim.SGD(tuning.parameters(), lr=1.0)
        for p in tuning.parameters():
            p.grad = torch.full_like(p, -(2.0**-10))
        optimizer.step()
        moved[rounding] = float(model.weight.detach().float().mean() - 1)
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(2.0**-10, rel=0.2)


def test_entries_that_others_train_become_the_weights_that_those_have() -> None:
    base, weights = half_bert(), []
    everything = Mask.random(base, 0.3, seed=0)
    mine, theirs = everything.split(2)
    numbers = {name: torch.randn(len(flat)) for name, flat in everything.indices.items()}
    for own, other in ((mine, theirs), (theirs, mine)):
        model = copy.deepcopy(base)
        tuning = fishmask.attach(model, own, rounding="stochastic", rounding_seed=5)
        held = [
            {name: numbers[name][torch.isin(everything.indices[name], flat)] for name, flat in mask.indices.items()}
            for mask in (tuning.mask, other.with_shapes(model))
        ]
        with torch.no_grad():
            tuning.values.copy_(torch.cat(list(held[0].values())))
        tuning.adopt(other)
        tuning.write_back()
        tuning.write_adopted(torch.cat(list(held[1].values())))
        weights.append(bits(model))
    assert equal(*weights)
