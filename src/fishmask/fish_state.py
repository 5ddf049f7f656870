"""The state of a ``FishModel``: values and the base's buffers, without the base's weights; and what DDP reduces."""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fishmask.attach import Tuning
from fishmask.data_parallel import agree_on, refuse_unseen
from fishmask.errors import FishError

if TYPE_CHECKING:
    from fishmask.fish_model import FishModel

_BASE = "base_model.model."  # where a FishModel has its base
_ACTIVE = "values.active_adapter"
_WAITING = "waiting."


def hook_state(model: "FishModel") -> None:
    """Keep the base's weights out of the model's state, and out of what a load misses.

    The hooks are functions that know no model, so a copy of the model takes them along and they serve the copy.
    """
    model.register_state_dict_pre_hook(_bring_up_to_date)
    model.register_state_dict_post_hook(_leave_out_weights)
    model.register_load_state_dict_pre_hook(_refuse_weights)
    model.register_load_state_dict_post_hook(_forgive_weights)


def _bring_up_to_date(model: Any, prefix: str, keep_vars: bool) -> None:
    model.mirror()


def _leave_out_weights(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in _weights_in(model, state, prefix):
        del state[key]
    if model.active_adapter is not None:
        state[prefix + _ACTIVE] = torch.tensor(list(model.active_adapter.encode()), dtype=torch.uint8)
    for adapter, buffers in _waiting(model).items():
        state |= {f"{prefix}{_WAITING}{adapter}.{name}": buffer.clone() for name, buffer in buffers.items()}


def _refuse_weights(model: Any, state: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        raise FishError("assign=True would part the adapters from their values: load a FishModel's state without it")
    model.mirror()
    model.check_free()
    if found := _weights_in(model, state, prefix):
        raise FishError(
            f"this state holds weights of the base ({found[0]} and {len(found) - 1} more), which that of a FishModel "
            "does not: load them into the base before it becomes a FishModel"
        )
    model.loading_prefix = prefix
    active = state.pop(prefix + _ACTIVE, None)
    name = None if active is None else bytes(active.tolist()).decode()
    if name is not None and name != model.active_adapter:
        raise FishError(
            f"this state was taken while adapter {name!r} was active, whose buffers it holds: set_adapter({name!r}) "
            "before it is loaded"
        )
    for adapter, buffers in _waiting(model).items():
        start = f"{prefix}{_WAITING}{adapter}."
        taken = {key.removeprefix(start): state.pop(key) for key in list(state) if key.startswith(start)}
        buffers.clear()
        buffers |= {name: buffer.clone() for name, buffer in taken.items()}


def _forgive_weights(model: Any, incompatible: Any) -> None:
    own = {f"{model.loading_prefix}{_BASE}{name}" for name in _names(model)}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in own]
    if model.tuning is not None and not model.tuning.suspended:
        model.tuning.write_back()


def _waiting(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the buffers of trainable adapters that are not in the model, by adapter."""
    tunings = {name: model._adapters.tuning(name) for name in model._adapters}
    return {name: t.waiting_buffers for name, t in tunings.items() if t is not None and t.suspended}


def _weights_in(model: Any, state: dict[str, Any], prefix: str) -> list[str]:
    """Name the keys that belong to weights of the base: all but its buffers'; quantized weights have several."""
    kept, start = {name for name, _ in model.get_base_model().named_buffers(remove_duplicate=False)}, prefix + _BASE
    own = {key: key.removeprefix(start) for key in state if key.startswith(start)}
    return [key for key, name in own.items() if name not in kept and not name.endswith("_extra_state")]


def _names(model: Any) -> set[str]:
    return {name for name, _ in model.get_base_model().named_parameters(remove_duplicate=False)}


class ReplicaCheck:
    """What ``DistributedDataParallel`` around a FishModel is asked in a forward: does it know the values that train?"""

    def __init__(self) -> None:
        self._known: tuple[int, set[int]] | None = None  # a DDP and the values it was first seen with

    def __call__(self, tuning: Tuning) -> None:
        """Compare masks and weights of the workers in a DDP's first forward; refuse other values in later ones.

        Raises:
            HandshakeError: The workers' masks or weights differ.
            FishError: The active adapter or its mask is another one since, or the values cannot be seen to be used.
        """
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None or not torch.is_grad_enabled():
            return
        values = {id(p) for p in tuning.parameters()}
        if self._known is None or self._known[0] != id(ddp):
            agree_on(tuning)
            self._known = id(ddp), values
        elif self._known[1] != values:
            raise FishError(
                "another adapter or mask is active since this DistributedDataParallel was made, so it would not reduce "
                "these values: make a new one after set_adapter() or set_mask()"
            )
        tuning.reduced = True  # also after it was suspended for another adapter's sake
        refuse_unseen(tuning)

    def __deepcopy__(self, memo: Any) -> "ReplicaCheck":
        return ReplicaCheck()

    def __reduce__(self) -> Any:
        return ReplicaCheck, ()
