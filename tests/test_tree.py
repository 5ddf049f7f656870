"""Nested values as JSON and bytes, and back: every bit, every type, and nothing that is hostile."""

import json
import struct
from collections import Counter, OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishmask import tree

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
    torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip
ARRAYS = [
    "<f8", "<f4", "<f2", ">f8", ">f4", "<c8", "<c16", "<i8", "<i4", "<i2", "|i1", "<u8", "<u4", ">u4", "<u2", "|u1",
    "|b1",
]  # fmt: skip
# Quiet and signalling NaNs with a payload, both zeros, subnormals, infinities, the extremes.
WORDS = [
    0x7FF8000000000001, 0x7FF0000000000001, 0xFFF0DEADBEEF0001, 0x8000000000000000, 1, 0x800FFFFFFFFFFFFF,
    0x7FF0000000000000, 0xFFF0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FC000017F800001, 0xFFC12345FF812345,
]  # fmt: skip


def bits(tensor: Tensor) -> bytes:
    """The elements in row-major order, by way of numpy."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return copy.reshape(-1).view(torch.uint8).numpy().tobytes() if copy.numel() else b""


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are of the same types and equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(key, other) and same(a[key], b[other]) for key, other in zip(a, b, strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def there_and_back(value: Any) -> Any:
    packed, data = tree.pack(value)
    return tree.unpack(json.loads(json.dumps(packed, allow_nan=False)), data)


words = st.one_of(st.sampled_from(WORDS), st.integers(0, 2**64 - 1))
shapes = st.lists(st.integers(0, 3), max_size=3)


def raw(draw: st.DrawFn, size: int) -> bytearray:
    return bytearray(b"".join(struct.pack("<Q", draw(words)) for _ in range(-(-size // 8)))[:size])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype over raw bits; 0-d, empty, transposed, strided, conjugated."""
    dtype, shape = draw(st.sampled_from(DTYPES)), torch.Size(draw(shapes))
    data = raw(draw, shape.numel() * dtype.itemsize)
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    tensor = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
    how = draw(st.sampled_from(["plain", "transposed", "strided", "conjugated"]))
    if how == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if how == "strided" and tensor.dim():
        return tensor[..., ::2]
    if how == "conjugated" and dtype.is_complex:
        return tensor.conj()
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray | np.generic:
    dtype, shape = np.dtype(draw(st.sampled_from(ARRAYS))), tuple(draw(shapes))
    data = raw(draw, int(np.prod(shape)) * dtype.itemsize)
    if dtype.kind == "b":
        data = bytearray(byte & 1 for byte in data)
    array = np.frombuffer(bytes(data), dtype=dtype).reshape(shape)
    return draw(st.sampled_from([array, array.T, array[..., ::-1] if shape else array[()]]))


floats = words.map(lambda word: struct.unpack("<d", struct.pack("<Q", word))[0])
keys = st.one_of(
    st.text(max_size=4), st.sampled_from(["", "!", "!tensor", "!dict", "!float"]), st.integers(), st.booleans(),
    st.none(), st.binary(max_size=3), st.tuples(st.integers(), st.text(max_size=2)), st.floats(),
)  # fmt: skip
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**200), 2**200), floats, st.text(), st.binary(), tensors(), arrays()
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_everything_comes_back_as_it_was(value: Any) -> None:
    assert same(there_and_back(value), value)


@settings(max_examples=300, deadline=None)
@given(st.one_of(tensors(), arrays()))
def test_every_bit_of_tensors_and_arrays_comes_back(value: Any) -> None:
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("word", WORDS)
def test_floats_that_json_lacks_come_back(word: int) -> None:
    (value,) = struct.unpack("<d", struct.pack("<Q", word))
    assert same(there_and_back({"x": [value]}), {"x": [value]})


def test_same_tells_apart_what_is_nearly_equal() -> None:
    pairs = [(0.0, -0.0), (1, True), (1, 1.0), ([1], (1,)), ({"a": 1}, Counter(a=1)), (b"a", "a"), ({1: 2}, {"1": 2})]
    pairs += [(torch.zeros(1), -torch.zeros(1)), (np.float32(1), np.float64(1)), (np.ones(1), np.ones((1, 1)))]
    for a, b in pairs:
        assert not same(a, b)
        assert not same(there_and_back(a), b)


def test_integers_of_any_size_come_back() -> None:
    value = [10**5000, -(10**5000), 2**64]
    assert there_and_back(value) == value


def test_subclasses_come_back_as_what_they_extend() -> None:
    pair = namedtuple("pair", "a b")
    assert same(there_and_back(OrderedDict(b=1, a=pair(1, 2))), {"b": 1, "a": (1, 2)})
    assert same(there_and_back(torch.nn.Parameter(torch.ones(2))), torch.ones(2))
    assert same(there_and_back(torch.Size([1, 2])), (1, 2))


def test_what_is_packed_does_not_follow_its_source() -> None:
    tensor, array, inner = torch.ones(2), np.ones(2), [1]
    packed, data = tree.pack({"a": tensor, "b": array, "c": inner})
    tensor.zero_(), array.fill(0), inner.append(2)
    assert same(tree.unpack(packed, data), {"a": torch.ones(2), "b": np.ones(2), "c": [1]})


def test_what_is_unpacked_can_be_written_to() -> None:
    read = there_and_back({"a": torch.ones(2), "b": np.ones(2), "c": torch.ones(1)})
    read["a"].zero_(), read["b"].fill(0)
    assert same(read, {"a": torch.zeros(2), "b": np.zeros(2), "c": torch.ones(1)})


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        ({"a": [1, {2}]}, "state['a'][1] is", "set"),
        ({"a": {3: (1, print)}}, "state['a'][3][1] is", "builtin_function_or_method"),
        ({"a": {(1, frozenset()): 1}}, "a key of state['a'][1] is", "frozenset"),
        ({"a": Counter({"x": 1j})}, "state['a']['x'] is", "complex"),
        ({"g": torch.Generator()}, "state['g'] is", "Generator"),
        ({"s": torch.eye(2).to_sparse()}, "state['s'] is", "Tensor"),
        ({"o": np.array([object()])}, "state['o'] is", "ndarray"),
        ({"t": np.array(["text"])}, "state['t'] is", "ndarray"),
        ({"d": np.datetime64("2020-01-01")}, "state['d'] is", "datetime64"),
        ({"v": np.zeros(1, "i4,f4")}, "state['v'] is", "ndarray"),
        ({"m": np.ma.masked_array([1, 2], [True, False])}, "state['m'] is", "MaskedArray"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named(value: Any, place: str, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        tree.pack(value)
    assert f"{place} of type {kind}, which cannot be kept" in str(caught.value)


@pytest.mark.parametrize(
    "packed",
    [
        {"!unknown": 1}, {"!": 1}, {"!dict": [], "!tuple": []}, {"!float": "7ff0"}, {"!float": "zz" * 8}, {"!float": 1},
        {"!dict": 3}, {"!dict": [[1]]}, {"!dict": [[[1], 2]]}, {"!counter": [1]}, {"!tuple": 5}, {"!tuple": None},
        {"!bytes": -1}, {"!bytes": 9}, {"!bytes": "4"}, {"!bytes": None}, {"!bytes": 7},
        {"!tensor": 5}, {"!tensor": []},
        {"!tensor": ["float32"]}, {"!tensor": ["float32", 2]}, {"!tensor": ["float32", [3]]},
        {"!tensor": ["float32", [1]]}, {"!tensor": ["float32", [-2, -1]]}, {"!tensor": ["float32", [-2]]},
        {"!tensor": ["float32", [2**62, 4]]}, {"!tensor": ["float32", [2**63]]}, {"!tensor": ["float32", [0.5, 4]]},
        {"!tensor": ["Tensor", [2]]}, {"!tensor": ["nonsense", [2]]}, {"!tensor": [3, [2]]},
        {"!array": ["<f4", [3]]}, {"!array": ["<f4", [-1]]}, {"!array": ["<f4", [-1, -2]]}, {"!array": ["<f4", "2"]},
        {"!array": ["<f4", [2**62, 4]]}, {"!array": ["<f4", [2**62, 2**62]]}, {"!array": ["nonsense", [2]]},
        {"!array": ["O", [1]]}, {"!array": []}, {"!scalar": ["|V0", [2]]}, {"!int": "x"}, [], 1,
    ],
    ids=str,
)  # fmt: skip
def test_hostile_json_is_refused(packed: Any) -> None:
    with pytest.raises(ValueError):
        tree.unpack(packed, b"8 bytes.")


def test_every_byte_must_belong_to_something() -> None:
    packed, data = tree.pack([torch.ones(3), b"text"])
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match="bytes"):
            tree.unpack(packed, wrong)
