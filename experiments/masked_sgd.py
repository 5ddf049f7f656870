"""Nesterov SGD on the masked entries of a model, in two forms, and what a form of weight decay leaves of the others.

`Attached` trains with fishmask: entries outside the mask keep their bits. `Whole` trains every parameter with its
gradient multiplied by a dense 0/1 mask, the authors' form; there weight decay and momentum reach all entries, so that
frozen weights shrink by the same factor, the *multiplier*.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fishmask import CheckpointLog, Mask, attach
from fishmask.params import canonical_parameters

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


class Saved(NamedTuple):
    """What one save cost."""

    bytes: int
    seconds: float


class Training(Protocol):
    """What a training loop needs of either form."""

    optimizer: torch.optim.SGD
    restored: dict[str, Any] | None

    @property
    def masked(self) -> int:
        """Number of entries that are trained."""

    def set_mask(self, mask: Mask) -> None:
        """Train other entries from now on."""

    def mask_gradients(self) -> None:
        """Make ready for the optimizer's step, after the backward."""

    def save(self, step: int, state: Mapping[str, Any]) -> Saved:
        """Make model, optimizer and state durable."""

    def multiplier(self) -> float | None:
        """Return what has become of never-masked entries, as a factor; None where there are none, or all are intact."""

    def close(self) -> None:
        """Let go of files."""


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Return the optimizer of all runs; its learning rate is set before every step."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def decay_multiplier(rates: Iterable[float]) -> float:
    """Return the factor by which SGD changes a weight whose gradient is always zero.

    Args:
        rates: The learning rate of each step.

    Source:
        The recursion of ``torch.optim.SGD``: g = d w; v = m v + g; w = w - rate (g + m v), with momentum m and weight
        decay d. The authors' optimizer keeps the rate inside v instead, which differs only while the rate changes.
    """
    weight, velocity = 1.0, 0.0
    for rate in rates:
        gradient = WEIGHT_DECAY * weight
        velocity = MOMENTUM * velocity + gradient
        weight -= rate * (gradient + MOMENTUM * velocity)
    return weight


class Attached:
    """Training of the k values alone, saved as commits of a log.

    Args:
        model: A model that is not attached.
        folder: Of the log; when it has commits, training goes on from the last.
        first_mask: Makes the mask of a training that begins.

    Attributes:
        restored: The state that was saved with the last commit, or None when training begins.
    """

    def __init__(self, model: nn.Module, folder: Path, first_mask: Callable[[], Mask]) -> None:
        self._folder, self._log = folder, CheckpointLog(folder)
        continues = bool(self._log.commits)
        self.tuning = attach(model, self._log.mask() if continues else first_mask())
        self.optimizer = sgd(self.tuning.parameters())
        self.restored = self._log.restore(self.tuning, self.optimizer).state if continues else None

    def set_mask(self, mask: Mask) -> None:
        """Train other entries; those in both masks keep their momentum, new ones have none."""
        self.tuning.set_mask(mask, self.optimizer)

    def mask_gradients(self) -> None:
        """Do nothing: there are no other gradients."""

    def save(self, step: int, state: Mapping[str, Any]) -> Saved:
        """Commit; the bytes are those of all files that are new."""
        known, begun = set(self._folder.iterdir()), time.perf_counter()
        self._log.commit(self.tuning, self.optimizer, step=step, state=state)
        seconds = time.perf_counter() - begun
        return Saved(sum(path.stat().st_size for path in set(self._folder.iterdir()) - known), seconds)

    def multiplier(self) -> float | None:
        """Return None: other entries are not touched."""
        return None

    @property
    def masked(self) -> int:
        """Number of entries that are trained."""
        return self.tuning.mask.k

    def close(self) -> None:
        """Let the log go."""
        self._log.close()


class Whole:
    """Training of every parameter, its gradient masked or not, saved as a full checkpoint with the optimizer's state.

    It cannot be continued: ``restored`` is always None.

    Args:
        model: The model.
        folder: Where its one checkpoint is, replaced by each save.
        mask: Entries whose gradient is kept; all without one.
    """

    restored: dict[str, Any] | None = None

    def __init__(self, model: nn.Module, folder: Path, mask: Mask | None) -> None:
        self._model, self._path = model, folder / "full.pt"
        self._parameters = canonical_parameters(model)
        self.optimizer = sgd(self._parameters.values())
        self._kept: dict[str, Tensor] = {}
        self._masked = sum(p.numel() for p in self._parameters.values())
        self._started = {name: p.detach().clone() for name, p in self._parameters.items()}
        frozen = mask is not None
        self._frozen = {name: torch.full_like(p, frozen, dtype=torch.bool) for name, p in self._parameters.items()}
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Mask) -> None:
        """Keep the gradient of other entries. The momentum of all stays, as the authors have it: stale ones move on."""
        self._masked = mask.k
        for name, p in self._parameters.items():
            kept = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            if name in mask.indices:
                kept[mask.indices[name].to(p.device)] = 1
            self._kept[name] = kept.view(p.shape)
            self._frozen[name] &= self._kept[name] == 0

    def mask_gradients(self) -> None:
        """Multiply every gradient by its 0/1 mask."""
        for name, kept in self._kept.items():
            gradient = self._parameters[name].grad
            assert gradient is not None
            gradient.mul_(kept)

    def save(self, step: int, state: Mapping[str, Any]) -> Saved:
        """Write model, optimizer and state durably, and then over the last checkpoint."""
        begun = time.perf_counter()
        written = self._path.with_suffix(".new")
        with written.open("wb") as file:
            parts = {"model": self._model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
            torch.save({**parts, "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        written.replace(self._path)
        return Saved(self._path.stat().st_size, time.perf_counter() - begun)

    def multiplier(self) -> float | None:
        """Return the norm of all never-masked entries now, divided by what it was at first."""
        now, then = (
            sum(float(tensors[name].detach()[frozen].double().square().sum()) for name, frozen in self._frozen.items())
            for tensors in (self._parameters, self._started)
        )
        return (now / then) ** 0.5 if then else None

    @property
    def masked(self) -> int:
        """Number of entries whose gradient is kept."""
        return self._masked

    def close(self) -> None:
        """Do nothing: no file is open."""
