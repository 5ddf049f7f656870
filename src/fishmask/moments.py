"""An optimizer's state over the k values, in the order of the mask: one vector of k numbers per kind of moment."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from fishmask.attach import Tuning

Named = Mapping[str, nn.Parameter]  # a tuning's values by the name of their parameter


class Moments(NamedTuple):
    """The state of an optimizer.

    Attributes:
        vectors: State with one number per value, such as ``exp_avg``: of all parameters end to end, [k] each.
        rest: Options and members of the groups, and all other state, as nested plain values and tensors.
    """

    vectors: dict[str, Tensor]
    rest: dict[str, Any]


def check_members(values: Named, optimizer: Optimizer) -> None:
    """Raise ValueError unless ``optimizer`` trains all of ``values`` and nothing else."""
    own = {id(p) for p in values.values()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if own - held:
        raise ValueError(
            f"the optimizer lacks {len(own - held)} of this Tuning's {len(own)} parameters: pass the optimizer that "
            "was built from tuning.parameters()"
        )
    if held - own:
        raise ValueError(
            f"the optimizer trains {len(held - own)} parameters outside the mask, which a commit does not hold; choose "
            "them whole with keep= when the mask is made"
        )


def leave_out_weights(optimizer: Optimizer, tuning: "Tuning") -> None:
    """Take the model's weights out of the groups of an optimizer of all that requires a gradient.

    Weights on the general path do, but their gradient never stays, so it holds them for nothing.

    Args:
        optimizer: The optimizer, changed in place.
        tuning: The tuning of the model.
    """
    parameters = tuning.settled_parameters()
    weights = {id(parameters[name]) for name in tuning.general}
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in weights]
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in kept]


def gather(values: Named, optimizer: Optimizer) -> Moments:
    """Copy the state of an optimizer to the CPU.

    Args:
        values: The values that it trains, all of them.
        optimizer: Any ``torch.optim`` optimizer.

    Raises:
        ValueError: It trains something else, or keeps its state in tensors of a packed kind.
    """
    check_members(values, optimizer)
    for state in optimizer.state.values():
        if kinds := [type(item).__name__ for item in state.values() if isinstance(item, Tensor) and _is_packed(item)]:
            raise ValueError(
                f"{type(optimizer).__name__} keeps its state as {kinds[0]}, which a commit cannot hold: train with "
                "bitsandbytes' 8-bit optimizers, or commit without the optimizer and begin its state anew"
            )
    places = {id(p): i for i, p in enumerate(values.values())}
    members = [p for group in optimizer.param_groups for p in group["params"]]
    packed = optimizer.state_dict()  # keyed by the order of the members
    states = {places[id(p)]: packed["state"].get(i, {}) for i, p in enumerate(members)}
    vectors: dict[str, Tensor] = {}
    scalars: dict[str, Tensor] = {}
    for key in _shared_keys(states.values()):
        items = [states[i][key] for i in range(len(values))]
        shapes = [tuple(item.shape) for item in items]
        if all(shape == tuple(p.shape) for shape, p in zip(shapes, values.values(), strict=True)):
            vectors[key] = torch.cat([item.detach() for item in items]).cpu()
        elif not any(shapes):
            scalars[key] = torch.stack([item.detach().cpu() for item in items])
    taken = vectors.keys() | scalars.keys()
    other = {i: {key: item for key, item in state.items() if key not in taken} for i, state in states.items()}
    groups = [
        {
            "members": _runs([places[id(p)] for p in group["params"]]),
            "options": {key: option for key, option in group.items() if key not in ("params", "param_names")},
        }
        for group in optimizer.param_groups
    ]
    rest: dict[str, Any] = {
        "kind": type(optimizer).__name__,
        "groups": groups,
        "scalars": scalars,
        "other": {i: state for i, state in other.items() if state},
    }
    # What some optimizers keep besides: under names of their own instead of parameters, or beside state and groups.
    rest["own"] = {key: item for key, item in packed["state"].items() if not isinstance(key, int)}
    rest["further"] = {key: item for key, item in packed.items() if key not in ("state", "param_groups")}
    return Moments(vectors, rest)


def _is_packed(item: Tensor) -> bool:
    """Whether a tensor only stands for its numbers, as torchao's 8-bit states do."""
    return hasattr(item, "__tensor_flatten__")


def _runs(places: list[int]) -> list[list[int]]:
    """Write ascending numbers as [first, count]: mostly one run, where a list would not compress."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([place, 1])
    return runs


def _shared_keys(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys under which every parameter has a tensor, all of one dtype."""
    states = list(states)
    return [
        key
        for key in (states[0] if states else {})
        if all(isinstance(state.get(key), Tensor) for state in states) and len({s[key].dtype for s in states}) == 1
    ]


def check_groups(optimizer: Optimizer, moments: Moments) -> None:
    """Raise ValueError unless ``optimizer`` is of the kind, and has the groups, of the one whose state was gathered."""
    if moments.rest["kind"] != (kind := type(optimizer).__name__):
        raise ValueError(
            f"the optimizer is {kind}, the commit's was {moments.rest['kind']}: build one of that kind, or restore "
            "without an optimizer and begin its state anew"
        )
    expected, found = len(moments.rest["groups"]), len(optimizer.param_groups)
    if expected != found:
        raise ValueError(
            f"the optimizer has {found} parameter groups, the commit's had {expected}: build it as it was built then"
        )


def give_back(values: Named, optimizer: Optimizer, moments: Moments) -> None:
    """Give an optimizer the gathered state, the options and the members of its groups.

    Args:
        values: The values that it trains, of the same mask as those gathered from.
        optimizer: An optimizer of the same kind, with as many groups.
        moments: What ``gather`` returned.
    """
    parameters, names = list(values.values()), list(values)
    sizes = [p.numel() for p in parameters]
    states: list[dict[str, Any]] = [dict(moments.rest["other"].get(i, {})) for i in range(len(parameters))]
    for key, vector in moments.vectors.items():
        for state, part in zip(states, vector.split(sizes), strict=True):
            state[key] = part.clone()
    for key, stacked in moments.rest["scalars"].items():
        for state, item in zip(states, stacked, strict=True):
            state[key] = item.clone()
    packed: dict[str, Any] = {**moments.rest["further"], "state": {}, "param_groups": []}
    for group, saved in zip(optimizer.param_groups, moments.rest["groups"], strict=True):
        members = [place for first, count in saved["members"] for place in range(first, first + count)]
        group["params"][:] = [parameters[i] for i in members]  # in place: L-BFGS holds this list
        if "param_names" in group:
            group["param_names"] = [names[i] for i in members]
        first = len(packed["state"])
        packed["state"] |= {first + i: states[place] for i, place in enumerate(members)}
        packed["param_groups"].append({**saved["options"], "params": list(range(first, first + len(members)))})
    packed["state"] = {i: state for i, state in packed["state"].items() if state} | moments.rest["own"]
    optimizer.load_state_dict(packed)
