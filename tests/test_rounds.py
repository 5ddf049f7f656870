"""Local rounds on real processes, against a reference in one process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishmask
from fishmask import LocalRounds, Mask
from tests.team import Team

SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, Team]]:
    made = {size: Team(size) for size in SIZES}
    yield made
    for team in made.values():
        team.close()


# --- what the workers do ----------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x, y = batch(rank, step)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def own_mask(model: nn.Module, rank: int, size: int) -> Mask:
    """Disjoint parts of a random choice, and the head for all."""
    head = Mask.from_dense({name: torch.full(p.shape, name.startswith("4.")) for name, p in model.named_parameters()})
    return (Mask.random(model, 0.3, seed=1, exclude="4.*").split(size)[rank]) | head


def train(rank: int, size: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = settings.get("masks", "shared")
    mask = Mask.random(model, 0.3, seed=1) if masks == "shared" else own_mask(model, rank, size)
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    with LocalRounds(tuning, **settings) as rounds:
        for step in range(steps):
            descend(model, optimizer, rank, step)
    union = mask if masks == "shared" else fishmask.merge.union_of([own_mask(model, r, size) for r in range(size)])
    after = {name: p.detach() for name, p in model.named_parameters()}
    changed = Mask.between(before, after)
    return {
        "weights": {name: p.numpy().copy() for name, p in after.items()},
        "outside": (changed - union).k,
        "number": rounds.number,
        "delta": tuning.delta().mask.k,
        "union": union.k,
    }


def reference(size: int, steps: int, every: int, masks: str = "shared", reduction: str = "mean", **rest: Any) -> Any:
    """The same in one process, with full models and float64 sums over dense differences."""
    models = [network() for _ in range(size)]
    anchor = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    tunings, optimizers, held = [], [], []
    for rank, model in enumerate(models):
        mask = Mask.random(model, 0.3, seed=1) if masks == "shared" else own_mask(model, rank, size)
        held.append({n: torch.zeros(p.numel()) for n, p in model.named_parameters()})
        for name, indices in mask.indices.items():
            held[-1][name][indices] = 1
        tunings.append(fishmask.attach(model, mask))
        optimizers.append(torch.optim.AdamW(tunings[-1].parameters(), lr=0.05))
    for step in range(steps):
        for rank in range(size):
            descend(models[rank], optimizers[rank], rank, step)
        if (step + 1) % every and step + 1 < steps:
            continue
        for name in anchor:
            start = anchor[name].double()
            total = torch.zeros_like(start)
            holders = sum(h[name] for h in held).view(start.shape)
            for model in models:
                total += model.get_parameter(name).detach().double() - start
            divisor = torch.full_like(start, float(size)) if reduction == "mean" else torch.ones_like(start)
            if masks == "own":
                if reduction == "mean" and rest["denominator"] == "holders":
                    divisor = holders.clamp_min(1).double()
                divisor[holders == size] = size if rest["head"] == "mean" else 1
            anchor[name] = (start + total / divisor).float()
        for model, tuning in zip(models, tunings, strict=True):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(anchor[name])
            tuning.read_back()
    return {name: p.numpy() for name, p in anchor.items()}


RULES = [
    {"every": 4},
    {"every": 4, "reduction": "sum"},
    {"every": 3, "masks": "own", "reduction": "sum", "head": "sum"},
    {"every": 3, "masks": "own", "reduction": "sum", "head": "mean"},
    {"every": 3, "masks": "own", "denominator": "participants", "head": "mean"},
    {"every": 3, "masks": "own", "denominator": "holders", "head": "sum"},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", RULES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_workers_equal_the_reference_bit_for_bit(teams: dict[int, Team], size: int, settings: dict[str, Any]) -> None:
    results = teams[size].run(train, 10, settings)
    wanted = reference(size, 10, **settings)
    for result in results:
        assert result["outside"] == 0
        assert result["delta"] == result["union"]
        for name, weight in wanted.items():
            np.testing.assert_array_equal(result["weights"][name].view("i4"), weight.view("i4"))
