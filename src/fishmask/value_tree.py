"""The values of a tuning as parameters of a module, under the names of the parameters they are entries of."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fishmask.attach import Tuning
from fishmask.errors import FishError

_DIGEST = "mask_digest"


class ValueTree(nn.Module):
    """Modules nested like the model's own, with the values as their parameters.

    So the filters of trainers that look at names ("bias", "LayerNorm") see what they look for, and an optimizer of the
    tree's parameters trains the tuning. Its state names the mask, and another mask's state is refused.
    """

    def __init__(self, tuning: Tuning) -> None:
        super().__init__()
        for name, values in tuning.named_parameters():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                # Not add_module(): a model may have parts with names such as "type", which nn.Module has as well.
                below = place._modules.setdefault(part, nn.Module())
                assert below is not None
                place = below
            place._parameters[last] = values
        self._digest = tuning.mask.digest
        self.register_state_dict_post_hook(_with_own_memory)

    def has(self, name: str, values: nn.Parameter) -> bool:
        """Whether these are the values of the parameter of that name."""
        *path, last = name.split(".")
        place: nn.Module | None = self
        for part in path:
            place = None if place is None else place._modules.get(part)
        return place is not None and place._parameters.get(last) is values

    def serves(self, tuning: Tuning) -> bool:
        """Whether these are the values that the tuning trains."""
        return [id(p) for p in self.parameters()] == [id(p) for p in ValueTree(tuning).parameters()]

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> "ValueTree":
        """Stay float32, and where the tuning keeps it."""
        return self

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _DIGEST] = _bytes(self._digest)

    @override
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found: Tensor | None = state_dict.pop(prefix + _DIGEST, None)
        if found is None and strict:
            missing_keys.append(prefix + _DIGEST)
        elif found is not None and not torch.equal(found.cpu(), _bytes(self._digest)):
            raise FishError(
                f"this state is of mask {bytes(found.tolist()).hex()[:12]}, but the adapter trains mask "
                f"{self._digest[:12]}: choose the same mask, or read the adapter with load_adapter()"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _bytes(digest: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _with_own_memory(tree: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Copy the values: parts of one vector look like shared tensors, of which safetensors' helpers keep only one."""
    for key, values in state.items():
        if key.startswith(prefix) and not isinstance(values, nn.Parameter):  # those are wanted with keep_vars
            state[key] = values.clone()
