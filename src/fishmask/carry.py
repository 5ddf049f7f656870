"""Carry an optimizer over a change of mask."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishmask.errors import FishError
from fishmask.params import find
from fishmask.sites import Entry

_RETIRED = "_fishmask_retired"


def carried(old: Tensor, old_indices: Tensor, new_indices: Tensor) -> Tensor:
    """Move one number per entry to another choice of entries; new entries get zero.

    Args:
        old: Numbers [k_old] for the entries ``old_indices``.
        old_indices: Sorted flat indices [k_old].
        new_indices: Sorted flat indices [k_new].

    Returns:
        Numbers [k_new] in the dtype of ``old``.
    """
    place, survives = find(new_indices, old_indices)
    return torch.where(survives, old[place], torch.zeros((), dtype=old.dtype, device=old.device))


def check_carriable(optimizer: Optimizer, values: Iterable[nn.Parameter]) -> None:
    """Raise ValueError unless ``optimizer`` holds all of ``values`` with one number per value of state each."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    values = list(values)
    if missing := sum(id(p) not in held for p in values):
        raise ValueError(
            f"the optimizer lacks {missing} of this Tuning's {len(values)} parameters: pass the optimizer that was "
            "built from tuning.parameters()"
        )
    for p in values:
        for key, state in optimizer.state.get(p, {}).items():
            scalar = state is None or isinstance(state, int | float | bool)
            # In 8 bits a number means nothing without the scale of its block, also where its shape is that of p.
            number = type(state) in (Tensor, nn.Parameter) and state.dtype != torch.uint8
            if not (scalar or (number and (state.shape == p.shape or state.numel() == 1))):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps state {key!r} that is not one number per value, so it cannot "
                    "follow a change of mask: call set_mask(mask) without the optimizer and build a new one"
                )


def carry_optimizer(optimizer: Optimizer, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> None:
    """Replace the values of ``before`` by those of ``after`` in groups and state; both are by parameter name."""
    names = {id(entry.values): name for name, entry in before.items()}
    home = next(group for group in optimizer.param_groups if any(id(p) in names for p in group["params"]))
    for group in optimizer.param_groups:
        kept: list[nn.Parameter] = []
        for p in group["params"]:
            name = names.get(id(p))
            if name is None:
                kept.append(p)
            elif name in after:
                kept.append(after[name].values)
        group["params"][:] = kept  # in place: L-BFGS holds this list
    added = {name: entry.values for name, entry in after.items() if name not in before}
    home["params"] += added.values()
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None  # L-BFGS counts its values once
    values = {id(entry.values): name for name, entry in after.items()}
    for group in optimizer.param_groups:
        if "param_names" in group:  # built from named_parameters()
            group["param_names"] = [values.get(id(p), "") for p in group["params"]]
    for name, old in before.items():
        state = optimizer.state.pop(old.values, None)
        if state and name in after:
            new = after[name]
            optimizer.state[new.values] = {key: _carried_state(item, old, new) for key, item in state.items()}
    if any(set(state) == {"momentum_buffer"} for state in optimizer.state.values()):
        for p in added.values():  # fused SGD wants all of a group's buffers or none
            optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


def _carried_state(item: Any, old: Entry, new: Entry) -> Any:
    # A step counter is a tensor of one element and no dimension; the state of one value has one dimension.
    if isinstance(item, Tensor) and item.shape == old.values.shape:
        return carried(item, old.indices, new.indices)
    return item


def retire(values: Iterable[nn.Parameter]) -> None:
    """Mark values that are no longer attached, so that an optimizer that still holds them is told."""
    for p in values:
        setattr(p, _RETIRED, True)


def refuse_retired(optimizer: Optimizer) -> None:
    """Raise FishError when ``optimizer`` is about to update values that lead nowhere."""
    if any(getattr(p, _RETIRED, False) for group in optimizer.param_groups for p in group["params"]):
        raise FishError(
            "the optimizer holds values of a mask that is no longer attached, so its step would change nothing: pass "
            "it to set_mask(mask, optimizer), or build a new optimizer from tuning.parameters()"
        )
