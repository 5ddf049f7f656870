"""What the base was: the bits of every entry that training has touched, and the buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.params import among, put, take
from fishmask.quantized import QuantizedWeight, weights
from fishmask.sharded import is_sharded, local_rows, total


@dataclass
class _Original:
    indices: Tensor  # int64, sorted flat indices, CPU
    bits: Tensor  # in the weight's dtype and on its device

    def write(self, weight: Tensor) -> None:
        put(weight, self.indices.to(self.bits.device), self.bits)

    def is_in(self, weight: Tensor | None) -> bool:
        if weight is None or (weight.dtype, weight.device) != (self.bits.dtype, self.bits.device):
            return False
        return _equal(raw_bits(take(weight, self.indices)), raw_bits(self.bits))


@dataclass
class Present:
    """What a model was, at remembered entries and in changed buffers, while it is its base."""

    entries: dict[str, _Original]
    buffers: dict[str, Tensor]

    def write(self, model: nn.Module) -> None:
        """Make ``model`` that again, in place."""
        parameters, buffers = weights(model), persistent_buffers(model)
        with torch.no_grad():
            for name, entries in self.entries.items():
                entries.write(parameters[name])
            for name, buffer in self.buffers.items():
                buffers[name].copy_(buffer)

    def like(self, model: nn.Module) -> "Present":
        """Return the same in the dtypes and on the devices that ``model`` has now."""
        parameters = weights(model)
        moved = {
            name: _Original(o.indices, o.bits.to(parameters[name].device, parameters[name].dtype))
            for name, o in self.entries.items()
        }
        return Present(moved, self.buffers)


class Originals:
    """The base's bits at every entry masked since attaching, k numbers for one mask, and copies of the buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._entries: dict[str, _Original] = {}
        self._sums = {name: (p.dtype, _sum(p)) for name, p in weights(model).items()}
        self._buffers = {name: buffer.detach().clone() for name, buffer in persistent_buffers(model).items()}

    @property
    def indices(self) -> dict[str, Tensor]:
        """Sorted flat indices (CPU) of all remembered entries, by parameter."""
        return {name: original.indices for name, original in self._entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the remembered bits and of the copies of buffers."""
        bits = sum(original.bits.nbytes for original in self._entries.values())
        return bits + sum(buffer.nbytes for buffer in self._buffers.values())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the parameter had."""
        return self._entries[name].bits.dtype

    def remember(self, name: str, weight: Tensor, indices: Tensor) -> None:
        """Keep the bits of those of the sorted ``indices`` (CPU) that are not remembered yet."""
        if name not in self._entries:
            self._entries[name] = _Original(indices, take(weight, indices))
            return
        known = self._entries[name]
        if torch.equal(known.indices, indices):
            return
        new = indices[~among(indices, known.indices)]
        merged, order = torch.cat([known.indices, new]).sort()
        bits = torch.cat([known.bits, take(weight, new)])
        self._entries[name] = _Original(merged, bits[order.to(bits.device)])

    def check(self, model: nn.Module) -> None:
        """Raise FishError if anything but the remembered entries changed, told by a sum over each parameter's bits."""
        parameters, buffers = weights(model), persistent_buffers(model)
        changed = []
        for name, (dtype, known) in self._sums.items():
            p = parameters.get(name)
            if p is None or p.dtype != dtype:
                changed.append(name)
                continue
            now = _sum(p)
            if name in self._entries:
                original = self._entries[name]
                now += _sum(original.bits) - _sum(take(p, original.indices))
            if now != known:
                changed.append(name)
        for name, buffer in self._buffers.items():
            if name not in buffers or (buffers[name].shape, buffers[name].dtype) != (buffer.shape, buffer.dtype):
                changed.append(f"buffer {name}")
        if changed:
            shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise FishError(
                "the base is gone: what is listed was changed outside the mask, converted or removed since attach(): "
                f"{shown}. Load other weights or convert the model before attach(), or after detach()"
            )

    def restore(self, model: nn.Module) -> None:
        """Give ``model`` its base back, in place, bit for bit."""
        parameters = weights(model)
        for name, original in self._entries.items():
            original.write(parameters[name])
        self.restore_buffers(model)

    def restore_buffers(self, model: nn.Module) -> None:
        """Give ``model`` the base's buffers back."""
        buffers = persistent_buffers(model)
        for name in self.changed_buffers(model).keys() & self._buffers.keys():
            buffers[name].copy_(self._buffers[name])

    def base(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's parameters, a restored copy of one touched parameter at a time."""
        for name, p in weights(model).items():
            weight = p.detach()
            if name in self._entries:
                weight = weight.clone()
                self._entries[name].write(weight)
            yield name, weight

    @contextmanager
    def put_back(self, model: nn.Module) -> Iterator[None]:
        """Have ``model`` hold its base for a while, without a copy of it.

        A forward from before goes on to its backward afterwards: the weights are the same bits again, and so are the
        versions by which autograd tells that.
        """
        present, parameters = self.present(model), weights(model)
        changed = [parameters[name] for name in self._entries]
        with _unsafe_preserve_version_counter(tuple(p for p in changed if type(p) in (Tensor, nn.Parameter))):
            try:
                with torch.no_grad():
                    self.restore(model)
                yield
            finally:
                with torch.no_grad():
                    self.restore_buffers(model)  # those that a forward of the base has moved
                present.write(model)

    def present(self, model: nn.Module) -> Present:
        """Return what ``model`` is now, where it may differ from its base."""
        parameters = weights(model)
        entries = {name: _Original(o.indices, take(parameters[name], o.indices)) for name, o in self._entries.items()}
        return Present(entries, self.changed_buffers(model))

    def differing(self, model: nn.Module) -> list[str]:
        """Name the parameters whose remembered entries are not the base's; costs k, where ``check`` costs n."""
        parameters = weights(model)
        return [name for name, original in self._entries.items() if not original.is_in(parameters.get(name))]

    def bits(self, name: str, indices: Tensor) -> Tensor:
        """Return the base's bits (CPU) at remembered entries, as integers; ``indices`` are sorted and on the CPU."""
        known = self._entries[name]
        return raw_bits(known.bits).cpu()[torch.searchsorted(known.indices, indices)]

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Return copies of the model's buffers whose bits are not the base's, such as BatchNorm's statistics."""
        return {
            name: buffer.detach().clone()
            for name, buffer in persistent_buffers(model).items()
            if name not in self._buffers or not _equal(_bytes(buffer), _bytes(self._buffers[name]))
        }


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the state of ``model``."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _sum(tensor: Tensor | QuantizedWeight) -> int:
    if isinstance(tensor, QuantizedWeight):
        return tensor.checksum()
    if is_sharded(tensor):
        return total(tensor, _sum(local_rows(tensor)))
    if tensor.is_meta:
        return 0  # it has no bits
    bits = raw_bits(tensor.detach())
    # On the CPU numpy adds narrow integers eight times quicker than PyTorch, and `attach` waits for this.
    return int(bits.numpy().sum(dtype="int64") if bits.device.type == "cpu" else bits.sum(dtype=torch.int64))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or torch.equal(one, other)  # without data nothing has changed


def _bytes(tensor: Tensor) -> Tensor:
    # A strided tensor of one element counts as contiguous and yet has no view of its bytes.
    flat = tensor.detach().reshape(-1)
    return (flat.clone(memory_format=torch.contiguous_format) if flat.numel() == 1 else flat).view(torch.uint8)
