"""What tests of data parallelism share: tiny models, parts of a batch, and references that know nothing of workers."""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishmask
from fishmask import Mask
from tests.cases import case

B = 4  # examples of a worker
MOST = 3  # workers


def prepared(name: str) -> tuple[nn.Module, Mask]:
    model = case(name).make()
    for module in model.modules():
        module.train(isinstance(module, nn.BatchNorm2d))  # statistics of the batch, but no dropout
    return model, Mask.random(model, 0.3, seed=1)


def share(name: str, step: int, rank: int) -> Any:
    """Return a worker's part of the batch of a step."""
    whole = case(name).batch(B * MOST, step)
    cut = slice(rank * B, rank * B + B)
    return {k: v[cut] for k, v in whole.items()} if isinstance(whole, dict) else tuple(v[cut] for v in whole)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return model(**batch).loss
    inputs = batch[0].to(next(model.parameters()).dtype) if batch[0].is_floating_point() else batch[0]
    return F.cross_entropy(model(inputs).flatten(0, -2), batch[1].flatten())


def gradients(tuning: fishmask.Tuning) -> dict[str, np.ndarray]:
    return {name: values.grad.numpy().copy() for name, values in tuning.named_parameters()}


def moved(events: Any) -> dict[str, list[int]]:
    """Return how many elements every collective of gloo took, from a profile."""
    found: dict[str, list[int]] = {}
    for event in events:
        if event.name.startswith("gloo:"):
            found.setdefault(event.name, []).append(sum(math.prod(shape) for shape in event.input_shapes))
    return found


def reference(name: str, size: int, step: int) -> dict[str, np.ndarray]:
    """Return the masked entries of dense gradients in float64, from PyTorch alone, in one process."""
    model, mask = prepared(name)
    model = copy.deepcopy(model).double()
    losses = [loss_of(model, share(name, step, rank)) for rank in range(size)]
    (sum(losses) / size).backward()
    return {n: model.get_parameter(n).grad.flatten()[i].numpy() for n, i in mask.indices.items()}


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(np.abs(g).max() for g in wanted.values())
    assert largest > 1e-3
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, rtol=2e-4, atol=2e-6 * largest, err_msg=name)


def trained_alone(name: str, size: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """The same in one process, over the parts of the batch one after the other."""
    model, mask = prepared(name)
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5, momentum=0.9)
    norms = []
    for step in range(3):
        for part in (2 * step, 2 * step + 1):
            for rank in range(size):
                (loss_of(model, share(name, part, rank)) / size).backward()
        norms.append(float(nn.utils.clip_grad_norm_(tuning.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, norms
