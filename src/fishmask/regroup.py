"""What a group of workers hands over to a group of another size: masks, optimizer states, what coding still owes.

The values need no rule: after a round they are the same on all workers. These three are different on each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fishmask.mask import Mask
from fishmask.merge import Own, union_of
from fishmask.moments import Moments
from fishmask.params import find
from fishmask.protocol import Protocol

Policy = Literal["keep", "mean", "reset"]
Deal = Callable[[Mask, int], list[Mask]]
States = dict[str, dict[str, Any]]  # an optimizer's state by the name of the parameter


def deal_anew(before: Sequence[Mask], workers: int, protocol: Protocol) -> list[Mask]:
    """Deal the entries that a group trained to a group of another size.

    Entries that all workers had all get; the others are dealt out by ``Mask.split``, so that one worker has each.

    Args:
        before: The masks of the old workers.
        workers: How many there are now.
        protocol: The rules; with a shared mask all get it.

    Raises:
        ValueError: One worker had all entries, and ``head`` says that some belong to everybody, but not which; or there
            are fewer entries than workers.
    """
    if protocol.masks == "shared":
        return [before[0]] * workers
    common = before[0] - before[0]
    if len(before) > 1:
        common = before[0]
        for mask in before[1:]:
            common = common & mask
    elif protocol.head is not None:
        raise ValueError(
            "one worker had all entries, so which of them all workers shall hold (head=) is not known: pass "
            "deal=, a function of the union and the number of workers that returns the mask of each"
        )
    dealt = [part | common for part in (union_of(list(before)) - common).split(workers)]
    if not all(mask.k for mask in dealt):
        raise ValueError(f"{union_of(list(before)).k} entries cannot be dealt to {workers} workers: start fewer")
    return dealt


def check_dealt(dealt: Sequence[Mask], union: Mask, workers: int) -> None:
    """Raise ValueError unless masks are one for each worker and have the entries of the union together."""
    if len(dealt) != workers:
        raise ValueError(f"deal= returned {len(dealt)} masks for {workers} workers")
    if (together := union_of(list(dealt))) != union:
        raise ValueError(
            f"the masks that deal= returned have {together.k} entries together, {(union - together).k} of the "
            f"{union.k} that were trained are missing and {(together - union).k} are new: deal exactly those that "
            "were trained, and call set_mask on LocalRounds afterwards"
        )


def states_of(mask: Mask, moments: Moments) -> States:
    """Return the state that an optimizer has gathered for the values of a mask, by the name of the parameter."""
    sizes = [len(indices) for indices in mask.indices.values()]
    states: States = {name: dict(moments.rest["other"].get(i, {})) for i, name in enumerate(mask.indices)}
    for key, vector in moments.vectors.items():
        for state, part in zip(states.values(), vector.split(sizes), strict=True):
            state[key] = part
    for key, stacked in moments.rest["scalars"].items():
        for state, item in zip(states.values(), stacked, strict=True):
            state[key] = item
    return states


def mean_states(masks: Sequence[Mask], states: Sequence[States], wanted: Mask) -> States:
    """Average the states of several optimizers, for the entries of another mask.

    A number of an entry becomes the mean over those that hold the entry and have a state for it. Of a count, such as
    Adam's of its steps, the largest stays.

    Args:
        masks: What each optimizer trained.
        states: Their states.
        wanted: The entries to return a state for.

    Raises:
        ValueError: There is state that is neither one number per value nor a single number.
    """
    mean: States = {}
    for name, indices in wanted.indices.items():
        held = [(m.indices[name], s[name]) for m, s in zip(masks, states, strict=True) if s.get(name)]
        keys = dict.fromkeys(key for _, state in held for key in state)
        mean[name] = {
            key: _mean(key, [(i, state[key]) for i, state in held if state.get(key) is not None], indices)
            for key in keys
        }
    return mean


def with_states(fresh: Moments, old: Moments, states: States, mask: Mask) -> Moments:
    """Return moments for the present values: present groups with the old groups' options, and other states.

    Args:
        fresh: Gathered from the optimizer as it is.
        old: Those of the old worker 0, whose options (the learning rate) count.
        states: By the name of the parameter.
        mask: The present mask.
    """
    groups = [
        {"members": new["members"], "options": was["options"]}
        for new, was in zip(fresh.rest["groups"], old.rest["groups"], strict=True)
    ]
    other = {i: states[name] for i, name in enumerate(mask.indices) if states.get(name)}
    rest = {**old.rest, "groups": groups, "scalars": {}, "other": other, "own": {}}
    return Moments({}, rest)


def spread_owed(
    protocol: Protocol, before: Sequence[Mask], owed: Sequence[Mapping[str, Tensor]], after: Sequence[Mask], rank: int
) -> dict[str, Tensor]:
    """Divide what coding has not sent yet among new workers, so that the next round adds as much as it would have.

    Args:
        protocol: The rules.
        before: The masks of the old workers.
        owed: Their residuals: "own" [own values], "merged" [union].
        after: The masks of the new workers; of the same union.
        rank: Which of them asks.

    Returns:
        Its residual.
    """
    old, new = _rules(protocol, before, 0), _rules(protocol, after, rank)
    everyone_before, everyone = [True] * len(before), [True] * len(after)
    total = torch.zeros(old.union, dtype=torch.float64)
    divisor = old.divisor(everyone_before)
    for residual, place in zip(owed, old.places, strict=True):
        total[place] += residual["own"].double() / divisor[place]
        total += residual["merged"].double()
    # A round divides the sum over the holders by the divisor, so each holder brings as much.
    each = total * new.divisor(everyone) / new.holders(everyone)
    return {"own": each[new.places[rank]].float(), "merged": torch.zeros(new.union)}


def _rules(protocol: Protocol, masks: Sequence[Mask], rank: int) -> Own:
    """Return the rules of a merge; a shared mask is one that all hold, with the same reduction for all its entries."""
    head = protocol.reduction if protocol.masks == "shared" else protocol.head
    return Own(list(masks), rank, protocol.reduction, protocol.denominator, head, protocol.payload, torch.device("cpu"))


def _mean(key: str, parts: Sequence[tuple[Tensor, Any]], wanted: Tensor) -> Any:
    """Average one kind of state over the optimizers that have it."""
    items = [item for _, item in parts]
    if not items:
        return None
    if all(isinstance(item, Tensor) and item.shape == indices.shape for indices, item in parts):
        total = torch.zeros(len(wanted), dtype=torch.float64)
        count = torch.zeros(len(wanted), dtype=torch.float64)
        for indices, item in parts:
            place, held = find(wanted, indices)
            total += torch.where(held, item[place].double(), 0.0)
            count += held
        return (total / count.clamp_min(1)).to(items[0].dtype)
    if all(isinstance(item, Tensor) and item.dim() == 0 for item in items):
        return torch.stack(items).amax()
    if all(isinstance(item, int | float) for item in items):
        return max(items)
    raise ValueError(
        f"the optimizer keeps state {key!r} that is not one number per value, so it cannot be averaged: restore with "
        "policy='reset'"
    )
