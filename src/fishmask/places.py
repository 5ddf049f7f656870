"""Tensors of a model as flat memory, found once, so that entries are written without a walk through the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.sharded import is_sharded


@dataclass(eq=False)
class Place:
    """One parameter or buffer, and where it lies.

    Attributes:
        owner: The module's mapping that holds it.
        key: Its key there.
        tensor: The tensor.
        kind: Its dtype and shape.
        flat: All its memory as integers, in the order of the memory.
        pointer: The address of its first element.
        version: How often PyTorch had seen it change when it was last looked at.
    """

    owner: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor
    kind: tuple[torch.dtype, torch.Size] = field(init=False)
    flat: Tensor = field(init=False)
    pointer: int = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        raw = raw_bits(self.tensor)
        # Not only dense tensors: a weight may be a slice of another tensor.
        strides = zip(raw.shape, raw.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides) if raw.numel() else 0
        self.flat = raw.as_strided((span,), (1,))
        self.kind, self.pointer = (self.tensor.dtype, self.tensor.shape), self.tensor.data_ptr()
        self.look()

    @property
    def is_there(self) -> bool:
        """Whether the model has this tensor still, in the same memory."""
        return self.owner.get(self.key) is self.tensor and self.tensor.data_ptr() == self.pointer

    @property
    def is_seen(self) -> bool:
        """Whether PyTorch has seen no change since ``look``; a change through ``.data`` it does not see."""
        return self.version == _version(self.tensor)

    def look(self) -> None:
        """Take the tensor for seen."""
        self.version = _version(self.tensor)

    def positions(self, indices: Tensor) -> Tensor:
        """Return where in ``flat`` the entries at flat (row-major) indices are, on the tensor's device."""
        if self.tensor.is_contiguous():
            return indices.to(self.flat.device)
        places = torch.zeros_like(indices)
        for axis, stride in zip(torch.unravel_index(indices, self.tensor.shape), self.tensor.stride(), strict=True):
            places += axis * stride
        return places.to(self.flat.device)


@dataclass(eq=False)
class Write:
    """Entries of one place, and what is written there.

    Attributes:
        place: The place.
        positions: Where in its memory; shared by those who write the same entries.
        bits: What is written, as integers.
        base: The base's bits there.
    """

    place: Place
    positions: Tensor
    bits: Tensor
    base: Tensor


def exchange(old: Mapping[str, Write], new: Mapping[str, Write]) -> None:
    """Write the base over old entries, and new ones over the base; both by the names of their tensors."""
    for name, write in old.items():
        after = new.get(name)
        # Tensor by tensor, while its memory is near; and not twice where both have the same entries.
        if after is None or after.positions is not write.positions:
            write.place.flat.index_copy_(0, write.positions, write.base)
        if after is not None:
            after.place.flat.index_copy_(0, after.positions, after.bits)
    for name, write in new.items():
        if name not in old:
            write.place.flat.index_copy_(0, write.positions, write.bits)


def place_of(model: nn.Module, name: str) -> Place:
    """Find a parameter or buffer of a model.

    Raises:
        FishError: It is sharded.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    owner: Mapping[str, Tensor | None] = module._parameters if key in module._parameters else module._buffers
    tensor = owner[key]
    assert tensor is not None
    if is_sharded(tensor):
        raise FishError(f"{name} is sharded by FSDP2: a Switch needs whole weights. Delta.apply() takes sharded ones")
    return Place(owner, key, tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
