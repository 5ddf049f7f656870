"""The slow reference of training in place: dense gradients multiplied by a dense mask."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask.mask import Mask
from fishmask.params import canonical_parameters


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss of a batch of `tests/cases.py`."""
    if isinstance(batch, dict):
        return model(**batch).loss
    inputs, targets = batch
    outputs = model(inputs)
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def dense_mask(mask: Mask, model: nn.Module) -> dict[str, Tensor]:
    """Return one boolean tensor per parameter."""
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in canonical_parameters(model).items()}
    for name, indices in mask.indices.items():
        dense[name].view(-1)[indices] = True
    return dense


class DenseTraining:
    """Adam or SGD over all parameters, each gradient multiplied by the mask; no weight decay, which would leak."""

    def __init__(self, model: nn.Module, mask: Mask, make: Any) -> None:
        self.model, self.parameters = model, canonical_parameters(model)
        self.mask = dense_mask(mask, model)
        for p in self.parameters.values():
            p.requires_grad_(True)
        self.optimizer = make(list(self.parameters.values()))

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, p in self.parameters.items():
            if p.grad is not None:
                p.grad.mul_(self.mask[name])

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def assert_only_masked_moved(base: dict[str, Tensor], model: nn.Module, mask: Mask) -> None:
    """Every unmasked entry is bit-equal to the base, and something masked has moved."""
    moved = False
    for name, dense in dense_mask(mask, model).items():
        now, then = canonical_parameters(model)[name].detach(), base[name]
        assert torch.equal(now[~dense], then[~dense]), name
        moved |= not torch.equal(now[dense], then[dense])
    assert moved


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in canonical_parameters(model).items()}


def distance(a: nn.Module, b: nn.Module, base: dict[str, Tensor]) -> float:
    """Return how far the two models are apart, relative to how far the first has moved from the base."""
    one, other = base_of(a), base_of(b)
    apart = sum(float((one[n].double() - other[n].double()).square().sum()) for n in base)
    moved = sum(float((one[n].double() - base[n].double()).square().sum()) for n in base)
    return (apart / moved) ** 0.5
