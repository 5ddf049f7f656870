"""What weights a mask was chosen on: raw bits of tensors, their hashes, and two states compared name by name."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fishmask.quantized import weights
from fishmask.sharded import is_sharded
from fishmask.sharded import pieces as sharded_pieces

if TYPE_CHECKING:
    from fishmask.mask import Mask

State = nn.Module | Mapping[str, Any]

SHORT = 6  # hexadecimal digits kept of each hash: they only name what differs, the digest of all decides

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def raw_bits(tensor: Tensor) -> Tensor:
    """View a tensor's elements as integers of the same width, so that NaN payloads and ``-0.0`` compare as they are."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements in row-major order as little-endian bytes, without a copy where it can."""
    array = raw_bits(tensor.contiguous()).cpu().contiguous().reshape(-1).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view("u1").data


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes as ``raw_bytes`` does; a sharded one's in pieces, to all of its ranks together."""
    if is_sharded(tensor):
        yield from map(raw_bytes, sharded_pieces(tensor))
    else:
        yield raw_bytes(tensor if isinstance(tensor, Tensor) else tensor.detach())  # a QuantizedWeight's numbers


def element_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of any dense tensor, complex ones too, in row-major order as they lie in memory."""
    # Conjugation and negation may be pending on a view.
    array = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # A tensor of one element counts as contiguous whatever its stride, which the view does not take.
    return array.as_strided((array.numel(),), (1,)).view(torch.uint8).numpy().data


def fingerprint(named: Iterable[tuple[str, Tensor]], mask: "Mask") -> dict[str, str]:
    """Hash the base weights that a mask's training builds on.

    A parameter that the mask takes whole (a new head) is left out: all of its values are replaced, so what was there
    before does not matter.

    Args:
        named: The parameters by canonical name; read one at a time, so it may be a generator of temporaries.
        mask: The mask.

    Returns:
        For every other parameter SHA-256 (hex) over its dtype, shape and raw row-major little-endian bytes.
    """
    return {name: tensor_hash(tensor) for name, tensor in named if not takes_whole(mask, name, tensor.numel())}


def takes_whole(mask: "Mask", name: str, size: int) -> bool:
    """Whether the mask holds every entry of a parameter."""
    return name in mask.indices and len(mask.indices[name]) == size


def values_digest(values: Tensor) -> str:
    """Return SHA-256 (hex) over the raw bytes of values, whose dtype and number are known otherwise."""
    return hashlib.sha256(raw_bytes(values)).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Return SHA-256 (hex) over a line such as ``float32 [2, 3]`` (dtype, shape, newline) and the raw bytes."""
    return bytes_hash(describe(tensor), pieces(tensor))


def bytes_hash(description: str, parts: Iterable[memoryview]) -> str:
    """Return what ``tensor_hash`` does, of a tensor that comes as its description and its bytes in parts."""
    sha = hashlib.sha256(f"{description}\n".encode())
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


class Base(NamedTuple):
    """What a delta keeps of its base's fingerprint: enough to name the parameters that differ, and to be sure.

    ``short`` has the first six digits of every parameter's hash; ``digest`` is SHA-256 (hex) over the lines
    "name, tab, whole hash, newline", sorted by name.
    """

    short: dict[str, str]
    digest: str

    @classmethod
    def of(cls, hashes: Mapping[str, str]) -> "Base":
        """Keep the essence of what ``fingerprint`` returned."""
        lines = "".join(f"{name}\t{hashes[name]}\n" for name in sorted(hashes))
        return cls({name: text[:SHORT] for name, text in hashes.items()}, hashlib.sha256(lines.encode()).hexdigest())

    def differing(self, other: "Base") -> list[str]:
        """Name the parameters with other weights; all of them in the rare case that only the digests tell."""
        names = [name for name, text in self.short.items() if other.short.get(name) != text]
        return names if names or self.digest == other.digest else list(self.short)


def common_tensors(state_a: State, state_b: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair the floating-point tensors of two models or state dicts by name, tied ones once.

    Raises:
        ValueError: Names, shapes or dtypes disagree; the message lists all disagreements.
    """
    a, b = floating_tensors(state_a), floating_tensors(state_b)
    problems = [f"{name} is only in the first" for name in a if name not in b]
    problems += [f"{name} is only in the second" for name in b if name not in a]
    problems += [
        f"{name} is {describe(a[name])} in the first, {describe(b[name])} in the second"
        for name in a
        if name in b and describe(a[name]) != describe(b[name])
    ]
    if problems:
        raise ValueError("the two states are not of one model: " + "; ".join(problems))
    first: dict[Any, str] = {}
    # Tied means tied in both: two names that share memory in one state only may hold different values in the other.
    return {n: (a[n], b[n]) for n in a if first.setdefault((place(a[n], n), place(b[n], n)), n) == n}


def floating_tensors(state: State) -> dict[str, Tensor]:
    """Return a model's floating-point parameters, and quantized ones dequantized, or a state dict's, by name."""
    if isinstance(state, nn.Module):
        return {name: p if isinstance(p, Tensor) else p.detach() for name, p in weights(state).items()}
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}


def describe(tensor: Tensor) -> str:
    """Return dtype and shape, as in ``float32 [2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def place(tensor: Tensor, name: str) -> Any:
    """Return where a tensor lies in memory; its name where it has none (empty tensors)."""
    if not tensor.numel():
        return name
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
