"""Tensors of a model as flat memory, found once, so that entries are written without a walk through the model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.params import is_quantized
from fishmask.quantized import QuantizedWeight, quantized_weights
from fishmask.sharded import is_sharded


class Place(ABC):
    """One parameter or buffer, and where it lies.

    Args:
        owner: The module's mapping that holds it.
        key: Its key there.

    Attributes:
        tensor: What is at that key.
        is_buffer: Whether it is a buffer.
        kind: Its dtype and shape.
        device: The device of its entries.
    """

    tensor: Tensor
    kind: tuple[torch.dtype, torch.Size]

    def __init__(self, owner: Mapping[str, Tensor | None], key: str) -> None:
        tensor = owner[key]
        assert tensor is not None
        self.tensor, self.is_buffer = tensor, not isinstance(tensor, nn.Parameter)
        self._owner, self._key, self.device = owner, key, tensor.device
        self._address = self.address()
        self.look()

    @property
    def is_there(self) -> bool:
        """Whether the model has this tensor still, in the same memory."""
        return self._owner.get(self._key) is self.tensor and self.address() == self._address

    def address(self) -> int:
        """Return where in memory the tensor begins."""
        return self.tensor.data_ptr()

    @property
    def is_seen(self) -> bool:
        """Whether PyTorch has counted no change since ``look``; one through ``.data`` is not counted."""
        return self._version == _version(self.tensor)

    def look(self) -> None:
        """Take the tensor for seen."""
        self._version = _version(self.tensor)

    @abstractmethod
    def positions(self, indices: Tensor) -> Tensor:
        """Return what ``read`` and ``write`` want for the entries at flat (row-major) indices, on the device."""

    @abstractmethod
    def read(self, positions: Tensor) -> Tensor:
        """Return the bits at some positions, as integers."""

    @abstractmethod
    def write(self, positions: Tensor, bits: Tensor) -> None:
        """Write bits to some positions."""


class _Memory(Place):
    """A tensor whose memory is written to."""

    def __init__(self, owner: Mapping[str, Tensor | None], key: str) -> None:
        super().__init__(owner, key)
        self.kind = self.tensor.dtype, self.tensor.shape
        raw = raw_bits(self.tensor)
        # Not only dense tensors: a weight may be a slice of another tensor.
        strides = zip(raw.shape, raw.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides) if raw.numel() else 0
        self._flat = raw.as_strided((span,), (1,))

    @override
    def positions(self, indices: Tensor) -> Tensor:
        if self.tensor.is_contiguous():
            return indices.to(self.device)
        places = torch.zeros_like(indices)
        for axis, stride in zip(torch.unravel_index(indices, self.tensor.shape), self.tensor.stride(), strict=True):
            places += axis * stride
        return places.to(self.device)

    @override
    def read(self, positions: Tensor) -> Tensor:
        return self._flat.index_select(0, positions)

    @override
    def write(self, positions: Tensor, bits: Tensor) -> None:
        self._flat.index_copy_(0, positions, bits)


class _Beside(Place):
    """A quantized weight, whose entries act beside it."""

    def __init__(self, owner: Mapping[str, Tensor | None], key: str, weight: QuantizedWeight) -> None:
        self._weight = weight
        super().__init__(owner, key)
        self.kind = weight.dtype, weight.shape

    @override
    def address(self) -> int:
        return self._weight.stored()[0].data_ptr()

    @override
    def positions(self, indices: Tensor) -> Tensor:
        return indices.to(self.device)

    @override
    def read(self, positions: Tensor) -> Tensor:
        return raw_bits(self._weight.take(positions))

    @override
    def write(self, positions: Tensor, bits: Tensor) -> None:
        self._weight.put(positions, bits.view(self._weight.dtype))


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
            write.place.write(write.positions, write.base)
        if after is not None:
            after.place.write(after.positions, after.bits)
    for name, write in new.items():
        if name not in old:
            write.place.write(write.positions, write.bits)


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
    if is_quantized(tensor):
        return _Beside(owner, key, quantized_weights(model)[id(tensor)])
    if is_sharded(tensor):
        raise FishError(f"{name} is sharded by FSDP2: a Switch needs whole weights. Delta.apply() takes sharded ones")
    return _Memory(owner, key)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
