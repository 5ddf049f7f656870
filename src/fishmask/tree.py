"""Nested Python values as JSON and bytes: what a scheduler, a scaler or a data loader says of its state.

Nothing is pickled, so nothing that is read can run code. JSON holds what it can hold exactly; everything else is an
object of one key that starts with "!", and the elements of all tensors stand end to end in one string of bytes, in the
order in which the JSON names them.
"""

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishmask.fingerprint import element_bytes

_PLAIN = (type(None), bool, int, str)
_LONG = 10_000  # bits; Python refuses to write or read decimal numbers of more than 4,300 digits


def pack(value: Any, where: str = "state") -> tuple[Any, bytes]:
    """Turn a value into JSON and bytes.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict, Counter, tensor, numpy array or scalar, nested at
            will. A tensor may be on any device; a subclass of dict or tuple comes back as a dict or tuple.
        where: What to call the value in an error.

    Returns:
        What ``json.dumps`` takes, and the elements of the tensors.

    Raises:
        TypeError: A value of another type; the message says where it stands.
    """
    parts: list[bytes] = []
    return _packed(value, where, parts), b"".join(parts)


def unpack(packed: Any, data: bytes) -> Any:
    """Undo ``pack``; tensors are on the CPU.

    Raises:
        ValueError: The JSON and the bytes do not belong together.
    """
    start = 0

    def take(count: int) -> bytearray:
        nonlocal start
        if not 0 <= count <= len(data) - start:
            raise ValueError(f"{count} bytes after {start} of {len(data)}")
        start += count
        return bytearray(data[start - count : start])

    try:
        value = _unpacked(packed, take)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, struct.error) as error:
        raise ValueError(f"not what pack makes: {error}") from error
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes belong to nothing")
    return value


def _packed(value: Any, where: str, parts: list[bytes]) -> Any:
    if type(value) is int and value.bit_length() > _LONG:
        return {"!int": hex(value)}
    if type(value) in _PLAIN:
        return value
    if type(value) is float:  # JSON has no NaN and no infinity
        return value if np.isfinite(value) else {"!float": struct.pack("<d", value).hex()}
    if isinstance(value, Counter):
        return {"!counter": _pairs(value, where, parts)}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("!") for key in value):
            return {key: _packed(item, f"{where}[{key!r}]", parts) for key, item in value.items()}
        return {"!dict": _pairs(value, where, parts)}
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{where}[{i}]", parts) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"!tuple": items}
    if isinstance(value, bytes):
        parts.append(value)
        return {"!bytes": len(value)}
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        parts.append(bytes(element_bytes(value)))
        return {"!tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    numbers = isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc"
    if numbers and not isinstance(value, np.ma.MaskedArray):
        kind = "!array" if isinstance(value, np.ndarray) else "!scalar"
        parts.append(value.tobytes())
        return {kind: [value.dtype.str, list(value.shape)]}
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which cannot be kept; give numbers, text, bytes, tensors, arrays, "
        "and lists and dicts of them"
    )


def _pairs(value: dict[Any, Any], where: str, parts: list[bytes]) -> list[list[Any]]:
    return [
        [_packed(key, f"a key of {where}", parts), _packed(item, f"{where}[{key!r}]", parts)]
        for key, item in value.items()
    ]


def _unpacked(packed: Any, take: Callable[[int], bytearray]) -> Any:
    if isinstance(packed, list):
        return [_unpacked(item, take) for item in packed]
    if not isinstance(packed, dict):
        return packed
    tag = next(iter(packed), "")
    if not tag.startswith("!"):
        return {key: _unpacked(item, take) for key, item in packed.items()}
    (content,) = packed.values()
    match tag:
        case "!int":
            return int(content, 16)
        case "!float":
            return struct.unpack("<d", bytes.fromhex(content))[0]
        case "!dict" | "!counter":
            pairs = {_unpacked(key, take): _unpacked(item, take) for key, item in content}
            return Counter(pairs) if tag == "!counter" else pairs
        case "!tuple":
            return tuple(_unpacked(item, take) for item in content)
        case "!bytes":
            return bytes(take(content))
        case "!tensor":
            dtype, shape = getattr(torch, content[0], None), torch.Size(content[1])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"no dtype {content[0]!r}")
            data = take(shape.numel() * dtype.itemsize)
            return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        case "!array" | "!scalar":
            kind, sizes = np.dtype(content[0]), tuple(content[1])
            array = np.frombuffer(take(int(np.prod(sizes)) * kind.itemsize), dtype=kind).reshape(sizes)
            return array if tag == "!array" else array[()]
        case _:
            raise ValueError(f"{tag!r} is not known")
