"""Training in place against dense training with masked gradients."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import CASES, Case
from tests.dense import DenseTraining, assert_only_masked_moved, base_of, distance, loss_of
from torch import Tensor, nn

import fishmask
from fishmask.mask import Mask

STEPS = 4


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    # A large eps: Adam divides by the gradient's size, so rounding in tiny gradients would dominate the comparison.
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, eps=1e-2)


def clustered(model: nn.Module, seed: int = 0) -> Mask:
    """A mask as Fisher scores give it: outer products, so that a few rows and columns hold most entries."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, p in model.named_parameters():
        score = torch.rand(p.shape, generator=generator) + 0.01
        for dim in range(p.dim()):
            shape = [-1 if d == dim else 1 for d in range(p.dim())]
            score = score * torch.rand(p.shape[dim], generator=generator).pow(6).view(shape)
        scores[name] = score
    return Mask.from_scores(scores, 0.1)


MASKS: dict[str, Callable[[nn.Module], Mask]] = {
    "random": lambda model: Mask.random(model, 0.2, seed=1),
    "sparse": lambda model: Mask.random(model, 0.01, seed=2),
    "clustered": clustered,
    "biases": Mask.biases,
    "all": lambda model: Mask.random(model, 1.0, seed=0),
}


def train(
    case: Case, mask_of: Callable[[nn.Module], Mask], make: Any = sgd, steps: int = STEPS
) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Mask]:
    model, reference = case.make().train(), case.make().train()
    mask, base = mask_of(model), base_of(model)
    dense = DenseTraining(reference, mask, make)
    tuning = fishmask.attach(model, mask)
    optimizer = make(tuning.parameters())
    for step in range(steps):
        batch = case.batch(4, step)
        torch.manual_seed(step)  # the same dropout for both
        dense.backward(loss_of(reference, batch))
        dense.step()
        torch.manual_seed(step)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, reference, base, mask


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory_equals_dense_training_with_masked_gradients(case: Case, kind: str) -> None:
    model, reference, base, mask = train(case, MASKS[kind])
    assert distance(reference, model, base) < 1e-4
    assert_only_masked_moved(base, model, mask)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adam_trajectory_equals_dense_training(case: Case) -> None:
    model, reference, base, mask = train(case, clustered, adam)
    assert distance(reference, model, base) < 1e-3
    assert_only_masked_moved(base, model, mask)
