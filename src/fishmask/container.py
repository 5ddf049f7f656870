"""The file that holds a mask or a delta: safetensors bytes with a digest of their own, written whole or not at all.

``docs/format.md`` describes every byte. Nothing in a file is interpreted before its digest is verified.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from fishmask.errors import FishError
from fishmask.fingerprint import raw_bytes
from fishmask.publish import replace_file
from fishmask.select import divide

VERSION = 1

# The digest comes first in the header, so it stands at a fixed place that a reader finds without parsing anything.
_START = b'{"__metadata__":{"digest":"'
_DIGEST_AT = 8 + len(_START)
_DIGEST_END = _DIGEST_AT + 64

# Level 15, measured on masks of 22.7 million entries: within 4 % of the entropy of random masks (level 3: 8 %), 3 %
# smaller than level 3 on clustered ones, and 0.1 s for a million entries. Level 19 gains 1 % for three times the time.
_LEVEL = 15
_SHORT_DESCRIPTION = 1 << 16  # bytes
_LARGEST_DESCRIPTION = 1 << 28

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(tensor: Tensor) -> str:
    """Return the format's name of a tensor's dtype, "F32" for float32.

    Raises:
        ValueError: The format does not know the dtype.
    """
    if tensor.dtype not in _DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPE_NAMES)
        raise ValueError(f"{tensor.dtype} cannot be saved; the file format knows {known}")
    return _DTYPE_NAMES[tensor.dtype]


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that the format calls so; ``ValueError`` where it knows none."""
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is unknown here; known are {', '.join(_DTYPES)}")
    return _DTYPES[name]


class Content(NamedTuple):
    """What a file holds: strings for anyone, a description (JSON), tensors by name; its digest once it was read."""

    metadata: dict[str, str]
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    digest: str = ""


def write(path: str | os.PathLike[str], kind: str, content: Content) -> None:
    """Write a file atomically: afterwards the path holds all of it or what it held before.

    Raises:
        ValueError: A tensor has a dtype that the format does not know.
        OSError: The file cannot be written.
    """
    replace_file(Path(path), serialise(kind, content)[1])


def serialise(kind: str, content: Content) -> tuple[str, Iterator[bytes | memoryview]]:
    """Return the digest of a file and its bytes in parts; the tensors are read now, and again as the parts are taken.

    Raises:
        ValueError: A tensor has a dtype that the format does not know.
    """
    described = json.dumps(content.description, separators=(",", ":")).encode()
    # A commit may hold a long log of its training, which at the highest level would take a second for two megabytes.
    packed = compress(described, level=19 if len(described) <= _SHORT_DESCRIPTION else 3)
    tensors = {**content.tensors, "parameters": bytes_tensor(packed)}
    # Wide elements first, so that each tensor is aligned for readers that map the file.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    head: dict[str, Any] = {
        "__metadata__": {
            "digest": "0" * 64,
            "format": "fishmask",
            "version": str(VERSION),
            "kind": kind,
            **content.metadata,
        }
    }
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        head[name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    sha = hashlib.sha256(header)
    for name in order:
        sha.update(raw_bytes(tensors[name]))
    digest = sha.hexdigest()
    header = header[:_DIGEST_AT] + digest.encode() + header[_DIGEST_END:]
    return digest, itertools.chain([header], (raw_bytes(tensors[name]) for name in order))


def read(path: str | os.PathLike[str], kind: str) -> Content:
    """Read a file back, after verifying its digest.

    Args:
        path: The file.
        kind: What it must be, such as ``"mask"`` or ``"delta"``.

    Returns:
        Its content; the tensors are on the CPU.

    Raises:
        FishError: The file is damaged, of another kind or format, or from a newer fishmask.
        OSError: The file cannot be read.
    """
    data = _bytes_of(path)
    if data[8:_DIGEST_AT] != _START or len(data) < _DIGEST_END:
        raise FishError(f"{path} is not a fishmask file, or its first bytes are damaged")
    sha = hashlib.sha256(data[:_DIGEST_AT])
    sha.update(b"0" * 64)
    sha.update(data[_DIGEST_END:])
    if data[_DIGEST_AT:_DIGEST_END] != sha.hexdigest().encode():
        raise FishError(f"{path} is damaged: its content does not match its digest; get the file again")
    with refusing(path):
        return _parse(path, data, kind)


def _bytes_of(path: str | os.PathLike[str]) -> memoryview:
    """Read a file into memory that tensors can share: a base is as large as its model.

    It is not mapped: what is verified would not be what is used, should the file change in between.
    """
    with Path(path).open("rb") as file:
        data, size = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8).data, 0
        while read := file.readinto(data[size:]):
            size += read
    return data[:size]


def _parse(path: str | os.PathLike[str], data: memoryview, kind: str) -> Content:
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    head = json.loads(bytes(data[8 : 8 + length]))
    metadata = head.pop("__metadata__")
    if metadata["format"] != "fishmask":
        raise ValueError(f"format {metadata['format']!r}")
    if int(metadata["version"]) > VERSION:
        raise FishError(
            f"{path} has format version {metadata['version']}, newer than this fishmask reads ({VERSION}); "
            f"upgrade fishmask"
        )
    if metadata["kind"] != kind:
        raise FishError(f"{path} holds a {metadata['kind']}, not a {kind}; load it as what it is")
    tensors = {name: _tensor(data, 8 + length, entry) for name, entry in head.items()}
    packed = tensors.pop("parameters").numpy().tobytes()
    description = json.loads(decompress(packed, _LARGEST_DESCRIPTION))
    own = ("digest", "format", "version", "kind")
    kept = {key: text for key, text in metadata.items() if key not in own}
    return Content(kept, description, tensors, metadata["digest"])


def _tensor(data: memoryview, body: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], torch.Size(entry["shape"]), entry["data_offsets"]
    if not 0 <= start <= end <= len(data) - body or shape.numel() * dtype.itemsize != end - start:
        raise ValueError(f"a tensor of shape {list(shape)} between bytes {start} and {end} of {len(data) - body}")
    if start == end:  # frombuffer takes no empty buffer
        return torch.empty(shape, dtype=dtype)
    if (body + start) % dtype.itemsize:  # another writer's order of tensors
        return torch.frombuffer(bytearray(data[body + start : body + end]), dtype=dtype).view(shape)
    return torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=body + start).view(shape)


def peek(path: str | os.PathLike[str], kind: str) -> dict[str, str]:
    """Return what a file's header says of it, without verifying anything: to list files, not to trust them.

    Raises:
        FishError: There is no such header, or it is that of another kind of file.
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file, refusing(path):
        start = file.read(_DIGEST_END)
        if start[8:_DIGEST_AT] != _START:
            raise FishError(f"{path} is not a fishmask file, or its first bytes are damaged")
        (length,) = struct.unpack_from("<Q", start)
        if length > os.fstat(file.fileno()).st_size:
            raise FishError(f"{path} is damaged: it is shorter than its header")
        metadata: dict[str, str] = json.loads(start[8:] + file.read(8 + length - _DIGEST_END))["__metadata__"]
    if metadata.get("kind") != kind:
        raise FishError(f"{path} holds a {metadata.get('kind')}, not a {kind}")
    return metadata


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error in interpreting a file whose digest is right into a FishError: a faulty program wrote it."""
    try:
        yield
    except FishError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FishError(f"{path} was written by a faulty program: its parts disagree ({error})") from error


def narrow(indices: Tensor) -> Tensor:
    """Return sorted indices as int32 where they fit, as raw files hold them."""
    return indices.to(torch.int32) if not len(indices) or indices[-1] < 1 << 31 else indices


def bytes_tensor(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def encode_indices(indices: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, list[int]]:
    """Code sorted flat indices compactly.

    Parameters are laid end to end in the order of ``sizes``; the gaps between chosen places, less one, are written as
    little-endian integers, and all their lowest bytes, all their second bytes and so on are compressed apart. The runs
    of a mask of blocks are gaps of 0 and all but vanish, so that blocks need no code of their own.

    Args:
        indices: Sorted unique flat indices by name.
        sizes: Number of entries of every parameter.

    Returns:
        The compressed planes, lowest first, end to end (uint8), and the length of each: 0 where all bytes are zero.
    """
    places, start = [np.empty(0, dtype=np.int64)], 0
    for name, size in sizes.items():
        if name in indices:
            places.append(indices[name].numpy() + start)
        start += size
    gaps = np.diff(np.concatenate(places), prepend=-1) - 1
    width = (int(gaps.max(initial=0)).bit_length() + 7) // 8
    digits = gaps.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
    planes = [compress(digits[:, i].tobytes()) if digits[:, i].any() else b"" for i in range(width)]
    return bytes_tensor(b"".join(planes)), [len(plane) for plane in planes]


def decode_indices(packed: Tensor, lengths: Sequence[int], k: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Undo ``encode_indices``.

    Raises:
        ValueError: The planes do not hold k increasing places within the sizes.
    """
    if len(lengths) > 8 or sum(lengths) != len(packed) or min(lengths, default=0) < 0:
        raise ValueError(f"index planes of {list(lengths)} bytes in {len(packed)}")
    if not 0 <= k <= sum(sizes.values()):
        raise ValueError(f"{k} indices in {sum(sizes.values())} entries")
    digits = np.zeros((k, 8), dtype=np.uint8)
    data, start = packed.numpy().tobytes(), 0
    for i, length in enumerate(lengths):
        if length:
            digits[:, i] = np.frombuffer(decompress(data[start : start + length], k), dtype=np.uint8)
        start += length
    places = np.cumsum(digits.view("<i8").reshape(-1) + 1) - 1
    if k and (places[0] < 0 or places[-1] >= sum(sizes.values()) or bool((np.diff(places) <= 0).any())):
        raise ValueError("indices out of range")
    return divide(torch.from_numpy(places), sizes)


def pack_mask(
    indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a mask as tensors and description of a file, with coded indices."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    described: dict[str, Any] = {"names": list(shapes), "shapes": [list(shape) for shape in shapes.values()]}
    if not shapes:  # without shapes a parameter reaches as far as its last index
        sizes = {name: int(flat[-1]) + 1 for name, flat in indices.items()}
        described = {"names": list(sizes), "sizes": list(sizes.values())}
    packed, lengths = encode_indices(indices, sizes)
    k = sum(len(flat) for flat in indices.values())
    return {"indices": packed}, {**described, "k": k, "planes": lengths}


def unpack_mask(content: Content) -> tuple[dict[str, Tensor], dict[str, Sequence[int]] | None]:
    """Return the indices and, where known, the shapes of a file's mask, coded or raw."""
    described, tensors = content.description, content.tensors
    names = described["names"]
    shapes = dict(zip(names, described["shapes"], strict=True)) if "shapes" in described else None
    if "indices" not in tensors:
        return under(tensors, "indices/"), shapes
    extents = described["sizes"] if shapes is None else map(math.prod, shapes.values())
    sizes = dict(zip(names, extents, strict=True))
    return decode_indices(tensors["indices"], described["planes"], described["k"], sizes), shapes


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pack_values(values: Mapping[str, Tensor], names: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Lay values end to end, those of one dtype in one tensor ``values/DTYPE``.

    Args:
        values: Values by name, in the order of ``names``.
        names: All names.

    Returns:
        The tensors, and for each of the names the dtype of its values (any, where it has none).
    """
    dtypes = {name: dtype_name(held) for name, held in values.items()}
    common = next(iter(dtypes.values()), "F32")
    tensors = {
        f"values/{dtype}": torch.cat([values[name] for name in values if dtypes[name] == dtype])
        for dtype in sorted(set(dtypes.values()))
    }
    return tensors, [dtypes.get(name, common) for name in names]


def unpack_values(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Undo ``pack_values``.

    Args:
        tensors: Tensors of a file.
        dtypes: The dtype by name.
        counts: The number of values of each name that has some, in order.
    """
    used = dict.fromkeys(tensors, 0)
    values: dict[str, Tensor] = {}
    for name, count in counts.items():
        source = f"values/{dtypes[name]}"
        start = used[source]
        used[source] += count
        values[name] = tensors[source][start : used[source]]
    return values


def compress(data: bytes, level: int = _LEVEL) -> bytes:
    """Return one zstd frame with a checksum."""
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(data)


def decompress(data: bytes, largest: int) -> bytes:
    """Undo ``compress``; ``ValueError`` where the frame is damaged or holds more than ``largest`` bytes."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= largest:  # the frame says what it needs: refuse before allocating
            raise ValueError(f"{size} bytes where at most {largest} were expected")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
