"""Entries written into a model's weights in place, remembered so that they can be taken back bit for bit.

A model keeps a list of what was applied to it, oldest first. An entry's weight is the value of the latest application
that covers it; each application remembers the bits that it found. So an older application is reverted by handing its
own memory to the next later one that covers the same entry, and only the entries that none covers are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.live import is_attached
from fishmask.params import put
from fishmask.quantized import settle, weights

Entries = Mapping[str, tuple[Tensor, Tensor]]  # name -> sorted flat indices (int64, CPU), values in the weight's dtype


@dataclass(eq=False)
class _Application:
    owner: object
    entries: Entries
    found: Mapping[str, Tensor]  # the bits before, as integers, on the weight's device of that time


_history: "WeakKeyDictionary[nn.Module, list[_Application]]" = WeakKeyDictionary()


def targets(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that a delta may write to: floating-point parameters, quantized ones, and buffers."""
    return {**dict(model.named_buffers()), **weights(model)}


def is_applied(model: nn.Module, owner: object) -> bool:
    """Whether ``owner`` has written to this model and not reverted."""
    return any(application.owner is owner for application in _history.get(model, ()))


def is_changed(model: nn.Module, but_by: object = None) -> bool:
    """Whether anything is applied to this model, by others than the owner ``but_by``."""
    return any(application.owner is not but_by for application in _history.get(model, ()))


def record(model: nn.Module, owner: object, entries: Entries, found: Mapping[str, Tensor]) -> None:
    """Count what ``owner`` has written itself, on top of nothing, as applied; it calls ``forget`` once that is undone.

    Args:
        model: The model.
        owner: Whoever wrote; must not refer to the model, which lives as long otherwise.
        entries: What was written; indices and values may be on the weight's device.
        found: The bits before, as integers.
    """
    _history[model] = [_Application(owner, entries, found)]


def forget(model: nn.Module, owner: object) -> None:
    """Take what ``owner`` wrote for the model's own from now on, or for undone; nothing is written."""
    if model in _history:
        _history[model] = [application for application in _history[model] if application.owner is not owner]


def write(model: nn.Module, owner: object, entries: Entries) -> None:
    """Write entries into the weights and remember what was there. Everything else must have been checked before.

    Raises:
        FishError: The model is attached: the values of its tuning would overwrite the entries again.
    """
    _refuse_attached(model)
    settle(model)
    tensors = targets(model)
    found = {name: read(tensors[name], indices) for name, (indices, _) in entries.items()}
    for name, (indices, values) in entries.items():
        write_bits(tensors[name], indices, raw_bits(values))
    _history.setdefault(model, []).append(_Application(owner, entries, found))


def revert(model: nn.Module, owner: object) -> None:
    """Take back what ``owner`` wrote, whatever was applied before or after it.

    Raises:
        FishError: ``owner`` is not applied to this model, somebody else has changed the weights since, or the model
            is attached.
    """
    _refuse_attached(model)
    applications = _history.get(model, [])
    place = next((i for i, application in enumerate(applications) if application.owner is owner), None)
    if place is None:
        raise FishError("this delta is not applied to this model (a copy of the model counts as another one)")
    mine, later = applications[place], applications[place + 1 :]
    tensors = targets(model)
    visible = {name: _uncovered(name, indices, later) for name, (indices, _) in mine.entries.items()}
    changed = [name for name in mine.entries if not _unchanged(tensors.get(name), mine.entries[name], visible[name])]
    if changed:
        raise FishError(
            f"cannot revert: these weights were changed after the delta was applied: {', '.join(changed)}; "
            f"undo that change, or load the base again"
        )
    for name, (indices, _) in mine.entries.items():
        _hand_over(name, mine, later)
        seen = visible[name]
        write_bits(tensors[name], indices[seen], mine.found[name][seen.to(mine.found[name].device)])
    del applications[place]


def _refuse_attached(model: nn.Module) -> None:
    if is_attached(model):
        raise FishError("this model is being trained in place; call detach() or revert() on its Tuning first")


def restored(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a parameter as it was before anything was applied: the tensor itself, or a changed copy."""
    applications = [application for application in _history.get(model, ()) if name in application.entries]
    if not applications:
        return tensor
    copy = tensor.detach().clone()
    for application in reversed(applications):
        write_bits(copy, application.entries[name][0], application.found[name])
    return copy


def _uncovered(name: str, indices: Tensor, later: list[_Application]) -> Tensor:
    """Mark the entries that no later application covers (bool, CPU)."""
    seen = torch.ones(len(indices), dtype=torch.bool)
    for application in later:
        if name in application.entries:
            seen &= ~torch.isin(indices, application.entries[name][0], assume_unique=True)
    return seen


def _unchanged(tensor: Tensor | None, entry: tuple[Tensor, Tensor], seen: Tensor) -> bool:
    indices, values = entry
    if tensor is None or tensor.dtype != values.dtype or bool((indices >= tensor.numel()).any()):
        return False
    return torch.equal(read(tensor, indices[seen]).cpu(), raw_bits(values)[seen])


def _hand_over(name: str, mine: _Application, later: list[_Application]) -> None:
    """Give each entry's found bits to the first later application that covers it."""
    indices, pending = mine.entries[name][0], torch.ones(len(mine.entries[name][0]), dtype=torch.bool)
    for application in later:
        if name in application.entries:
            theirs = application.entries[name][0]
            shared = torch.isin(indices, theirs, assume_unique=True) & pending
            places = torch.searchsorted(theirs, indices[shared])
            found = application.found[name]
            found[places.to(found.device)] = mine.found[name][shared.to(mine.found[name].device)].to(found.device)
            pending &= ~shared


def read(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the bits at flat indices, as integers, on the tensor's device."""
    if not isinstance(tensor, Tensor):  # a QuantizedWeight
        return raw_bits(tensor.take(indices))
    return raw_bits(tensor).take(indices.to(tensor.device))


def write_bits(tensor: Tensor, indices: Tensor, bits: Tensor) -> None:
    """Write bits, as integers, to flat indices of a tensor."""
    if not isinstance(tensor, Tensor):  # a QuantizedWeight
        put(tensor, indices, bits.view(tensor.dtype))
        return
    put(raw_bits(tensor), indices.to(tensor.device), bits.to(tensor.device))
