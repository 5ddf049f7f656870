"""Put what a checkpoint log holds into a model, and into what trains it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishmask.attach import Tuning
from fishmask.errors import FishError
from fishmask.fingerprint import describe
from fishmask.folder import Commit
from fishmask.history import Base, Entries, Problem, Segment, Snapshot, by_name, changes, write_entries
from fishmask.moments import check_groups, give_back
from fishmask.originals import Originals, persistent_buffers


@dataclass(frozen=True)
class Restored:
    """What a restore found.

    Attributes:
        commit: The commit that the model now holds.
        step: Its training step.
        state: What was given as ``state`` to the commit, by name; objects as their ``state_dict()``.
        skipped: Newer commits that could not be used, with the reason.
        tuning: The attached model's tuning; None when the model is not attached.
    """

    commit: Commit
    step: int
    state: dict[str, Any]
    skipped: list[Problem]
    tuning: Tuning | None


def check_request(snapshot: Snapshot, optimizer: Optimizer | None, state: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless a commit has what an optimizer and the objects in ``state`` need."""
    if optimizer is not None:
        if snapshot.moments is None:
            raise ValueError(f"{path} holds no optimizer state: none was passed to that commit; restore without one")
        check_groups(optimizer, snapshot.moments)
    if unable := [name for name, held in state.items() if not hasattr(held, "load_state_dict")]:
        raise ValueError(
            f"state= of a restore takes objects with load_state_dict; {', '.join(unable)} has none: read plain values "
            "from the state of what restore returns"
        )
    if missing := [name for name in state if name not in snapshot.state]:
        known = ", ".join(snapshot.state) or "nothing"
        raise ValueError(f"{path} holds no state of {', '.join(missing)}; it holds: {known}")


def check_buffers(snapshot: Snapshot, model: nn.Module, path: Path) -> None:
    """Raise FishError unless ``model`` has the buffers that a commit holds, some of which the base may lack."""
    here = {name: describe(buffer) for name, buffer in persistent_buffers(model).items()}
    wrong = [
        f"buffer {name}: {describe(buffer)} in the commit, {here.get(name, 'none')} in the model"
        for name, buffer in snapshot.buffers.items()
        if here.get(name) != describe(buffer)
    ]
    if wrong:
        listed = ";\n  ".join(wrong)
        raise FishError(f"the model is not the one of {path}:\n  {listed}")


def check_base(base: Base, model: nn.Module, tuning: Tuning | None) -> None:
    """Raise FishError unless ``model`` has the structure of a log's base and the weights that are not stored there."""
    problems = base.misfits(model)
    if not problems:
        if tuning is None:
            problems = [f"other weights: {name}" for name in base.other_weights(model)]
        elif base.fingerprint is not None:
            tuning.originals.check(model)
            with tuning.originals.put_back(model):
                problems = [f"other weights: {name}" for name in base.other_weights(model)]
    if problems:
        listed = ";\n  ".join(problems)
        raise FishError(
            f"the model is not the one of this log; build and load it as it was before the first commit:\n  {listed}"
        )


def whole_state(
    base: Base, changed: Sequence[Entries], snapshot: Snapshot, model: nn.Module | None
) -> dict[str, Tensor]:
    """Return all weights and buffers of a moment; ``base`` may be changed.

    Args:
        base: The base.
        changed: What to write onto it.
        snapshot: What the commit holds.
        model: The model that holds the weights that are not stored in ``base``; it is not changed.

    Raises:
        FishError: It is another model.
    """
    weights = dict(base.weights)
    if base.fingerprint is not None and model is not None:
        check_base(base, model, None)
        weights = {n: weights[n] if n in weights else p.detach().cpu() for n, p in model.named_parameters()}
        touched = {name for entries in changed for name in entries}
        weights |= {name: weights[name].clone() for name in touched}
    write_entries(weights, changed)
    tensors = {**weights, **base.buffers, **snapshot.buffers}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def fill(model: nn.Module, base: Base, chain: Sequence[Segment], snapshot: Snapshot) -> None:
    """Write the weights and buffers of a moment into a model that is not attached, in place."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    _write_base(model, base)
    write_entries(parameters, changes(chain, snapshot))
    _write_buffers(model, snapshot.buffers)


def resume(
    tuning: Tuning, optimizer: Optimizer | None, base: Base | None, chain: Sequence[Segment], snapshot: Snapshot
) -> None:
    """Bring an attached model and its optimizer to the state of a moment.

    Args:
        tuning: The attached model's tuning.
        optimizer: Its optimizer.
        base: The base, when it is not the one that the tuning remembers.
        chain: The segments, oldest first.
        snapshot: What the commit holds.
    """
    model = tuning.model
    for p in tuning.parameters():
        p.grad = None  # of the training that is given up
    if tuning.mask != chain[-1].mask:  # first of all, because it writes values into the weights
        if optimizer is not None:
            optimizer.state.clear()  # all of it is about to be replaced; not every kind could be carried over
        tuning.set_mask(chain[-1].mask, optimizer)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        tuning.originals.restore(model)
    if base is not None:
        _write_base(model, base)
        tuning.originals = Originals(model)
    for segment in chain:  # before anything is sealed: these are the base's bits
        sealed = {name: indices for name, (indices, _) in segment.sealed.items()}  # of masks that no segment has too
        for name, indices in (*segment.mask.indices.items(), *sealed.items()):
            tuning.originals.remember(name, parameters[name], indices)
    write_entries(parameters, [segment.sealed for segment in chain])
    named, saved = dict(tuning.named_parameters()), by_name(chain[-1].mask, snapshot.values)
    with torch.no_grad():
        for name, (_, values) in saved.items():
            named[name].copy_(values)
    tuning.write_back()
    _write_buffers(model, snapshot.buffers)
    if optimizer is not None and snapshot.moments is not None:
        give_back({name: named[name] for name in saved}, optimizer, snapshot.moments)


@torch.no_grad()
def _write_base(model: nn.Module, base: Base) -> None:
    parameters = dict(model.named_parameters())
    for name, weight in base.weights.items():
        parameters[name].copy_(weight)
    _write_buffers(model, base.buffers)


@torch.no_grad()
def _write_buffers(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    buffers = persistent_buffers(model)
    for name, buffer in held.items():
        buffers[name].copy_(buffer)
