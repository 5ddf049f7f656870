"""The outer optimizer: it takes the difference that the workers merged as its gradient."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishmask.carry import carry_optimizer
from fishmask.mask import Mask
from fishmask.sites import Entry

MakeOuter = Callable[[list[nn.Parameter]], Optimizer]


class Outer:
    """An optimizer over the values of the union, the same on every worker.

    Args:
        make: Makes it from parameters, one for each parameter of the model with entries in the union.
        mask: The union.
        values: Its values, float32 [k].

    Attributes:
        optimizer: The optimizer.

    Source:
        Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023.
    """

    def __init__(self, make: MakeOuter, mask: Mask, values: Tensor) -> None:
        self._entries = _entries(mask, values)
        self.optimizer = make([entry.values for entry in self._entries.values()])

    def step(self, anchor: Tensor, merged: Tensor) -> Tensor:
        """Return where a step from ``anchor`` leads whose gradient is ``anchor - merged``; all are float32 [k]."""
        entries = list(self._entries.values())
        sizes = [len(entry.flat) for entry in entries]
        starts, gradients = anchor.split(sizes), (anchor - merged).split(sizes)
        with torch.no_grad():
            for entry, start, gradient in zip(entries, starts, gradients, strict=True):
                entry.values.copy_(start)
                entry.values.grad = gradient.clone()
        self.optimizer.step()
        return torch.cat([entry.values.detach() for entry in entries])

    def carry(self, mask: Mask, values: Tensor) -> None:
        """Follow a change of mask: entries that stay keep their state, new ones have none."""
        before, self._entries = self._entries, _entries(mask, values)
        carry_optimizer(self.optimizer, before, self._entries)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state."""
        return deepcopy(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state)


def _entries(mask: Mask, values: Tensor) -> dict[str, Entry]:
    parts = values.split([len(flat) for flat in mask.indices.values()])
    return {
        name: Entry(held := nn.Parameter(part.clone()), flat, flat.to(values.device), held)
        for (name, flat), part in zip(mask.indices.items(), parts, strict=True)
    }
