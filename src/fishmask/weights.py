"""A model's tensors by name, wherever they are: read in pieces, so that no whole model is ever held."""

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fishmask import applied, container
from fishmask.errors import FishError
from fishmask.fingerprint import State, bytes_hash, place, raw_bits, raw_bytes
from fishmask.hub import located, the_hub
from fishmask.params import aliases
from fishmask.quantized import weights

PIECE = 1 << 20  # entries read at once: 4 MiB of float32
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LEGACY, _LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model"]
_LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library itself allows


class Header(NamedTuple):
    """Dtype and shape of a tensor that is not read yet."""

    dtype: torch.dtype
    shape: torch.Size

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Weights(ABC):
    """A model's tensors by name, each read in pieces.

    Attributes:
        label: What to call them in messages.
        headers: Dtype and shape by name.
        buffers: Names of those that are no parameters: they are compared and kept whole.
        aliases: Other names of tied tensors, and the name in ``headers`` that each belongs to.
    """

    label: str
    headers: dict[str, Header]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = {}

    @abstractmethod
    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries ``start`` to ``stop`` of a tensor laid out in a row, on the CPU; do not modify them."""

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a tensor's entries in pieces of at most a million, each with the index of its first."""
        size = self.headers[name].shape.numel()
        for start in range(0, size, PIECE):
            yield start, self.piece(name, start, min(start + PIECE, size))

    def read(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU; do not modify it."""
        shape = self.headers[name].shape
        return self.piece(name, 0, shape.numel()).view(shape)

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return the entries at sorted flat indices, on the CPU."""
        taken = torch.empty(len(indices), dtype=self.headers[name].dtype)
        size = self.headers[name].shape.numel()
        # Only the pieces that hold one of the indices are read.
        for start in (torch.unique_consecutive(indices // PIECE) * PIECE).tolist():
            stop = min(start + PIECE, size)
            first, last = torch.searchsorted(indices, torch.tensor([start, stop])).tolist()
            taken[first:last] = self.piece(name, start, stop)[indices[first:last] - start]
        return taken

    def hash(self, name: str) -> str:
        """Return what ``fingerprint.tensor_hash`` does."""
        return bytes_hash(str(self.headers[name]), (raw_bytes(piece) for _, piece in self.pieces(name)))


class Held(Weights):
    """The tensors of a model or a state dict in memory."""

    def __init__(self, state: State, label: str) -> None:
        self.label = label
        if isinstance(state, nn.Module):
            kept = state.state_dict().keys()  # a buffer that is not saved is not part of what training made
            buffers = {name: buffer for name, buffer in state.named_buffers() if name in kept}
            self._tensors: dict[str, Tensor] = {**weights(state), **buffers}
            self.buffers = frozenset(buffers)
            names = aliases(state)
        else:
            self._tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
            self.buffers = frozenset(n for n, tensor in self._tensors.items() if not tensor.is_floating_point())
            places: dict[Any, str] = {}
            names = {name: places.setdefault(place(tensor, name), name) for name, tensor in self._tensors.items()}
        self.aliases = {name: canonical for name, canonical in names.items() if name != canonical}
        self.headers = {name: Header(tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return some entries of a tensor."""
        return self._tensors[name].detach().reshape(-1)[start:stop].cpu()

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return entries of a tensor."""
        return applied.read(self._tensors[name], indices).cpu().view(self.headers[name].dtype)


class OnDisk(Weights):
    """The tensors of safetensors files.

    Pieces are read, not mapped: the pages of a mapped file count as memory of the process that has touched them.

    Args:
        files: The files; together they are the model.
        label: What to call it in messages.

    Attributes:
        files: For each name its file.
        metadata: That of the first file.
    """

    def __init__(self, files: list[Path], label: str) -> None:
        self.label, self.headers = label, {}
        self.files: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        for number, file in enumerate(files):
            body, head = _header(file)
            metadata = head.pop("__metadata__", None) or {}  # null is none
            if metadata.get("format") == "fishmask":
                raise FishError(f"{file} holds a {metadata.get('kind')} of fishmask; expected a model's weights")
            self.metadata = metadata if number == 0 else self.metadata
            if twice := sorted(self.files.keys() & head):
                raise FishError(f"{file} and {self.files[twice[0]].name} both hold {twice[0]}; expected each name once")
            for name, entry in head.items():
                try:
                    dtype = container.dtype_named(entry["dtype"])
                except ValueError as error:
                    raise FishError(f"{file}: {name} cannot be read: {error}") from error
                self.headers[name] = Header(dtype, torch.Size(entry["shape"]))
                self.files[name], self._offsets[name] = file, body + entry["data_offsets"][0]
        self.buffers = frozenset(n for n, header in self.headers.items() if not header.dtype.is_floating_point)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return some entries of a tensor."""
        held = torch.empty(stop - start, dtype=self.headers[name].dtype)
        if start == stop:
            return held
        data = held.view(torch.uint8).numpy().data
        with self.files[name].open("rb") as file:
            file.seek(self._offsets[name] + start * held.element_size())
            if file.readinto(data) != len(data):
                raise FishError(f"{self.files[name]} became shorter while it was read")
        return held


class View(Weights):
    """Other weights under other names or in another dtype.

    Args:
        source: The weights.
        rename: New beginnings of names by old ones; ``""`` is the beginning of every name, the longest counts.
        dtype: A floating-point dtype that all floating-point tensors are converted to.

    Raises:
        ValueError: Two names become one, or a beginning is that of no name.
    """

    def __init__(
        self, source: Weights, rename: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        rename = rename or {}
        unused = [old for old in rename if not any(name.startswith(old) for name in source.headers)]
        if unused:
            raise ValueError(f"rename: no tensor of {source.label} has a name that begins with {', '.join(unused)}")
        self.label, self._source, self._dtype = source.label, source, dtype
        self._names: dict[str, str] = {}
        for name in source.headers:
            if (other := self._names.setdefault(_renamed(name, rename), name)) != name:
                raise ValueError(f"rename: {other} and {name} of {source.label} get the same name")
        self.buffers = frozenset(_renamed(name, rename) for name in source.buffers)
        self.aliases = {_renamed(a, rename): _renamed(name, rename) for a, name in source.aliases.items()}
        self.headers = {name: self._header(source.headers[own]) for name, own in self._names.items()}

    def _header(self, header: Header) -> Header:
        cast = self._dtype is not None and header.dtype.is_floating_point
        return Header(self._dtype if cast and self._dtype else header.dtype, header.shape)

    def source_name(self, name: str) -> str:
        """Return the name that the source knows a tensor by."""
        return self._names[name]

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return some entries of a tensor."""
        return self._source.piece(self._names[name], start, stop).to(self.headers[name].dtype)

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return entries of a tensor."""
        return self._source.take(self._names[name], indices).to(self.headers[name].dtype)


Source = State | str | PathLike[str] | Weights


def open_weights(source: Source, revision: str | None = None) -> Weights:
    """Find a model's weights and read their headers.

    Args:
        source: A model or a state dict; a file (``.safetensors``, an index of shards, or a legacy ``.bin``); a folder
            that holds one of them; or a name on the Hugging Face hub.
        revision: Which version on the hub.

    Returns:
        The weights. Legacy files are pickles: only their tensors are loaded (``weights_only``), and they are mapped.

    Raises:
        FishError: There are no weights at that place, or they are damaged.
        TypeError: The source is none of these.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module | Mapping):
        return Held(source, f"the {type(source).__name__}")
    if not isinstance(source, str | PathLike):
        raise TypeError(f"expected a model, a state dict, a path or a name on the hub, got {type(source).__name__}")
    path = locate(source, revision)
    return _in_folder(path) if path.is_dir() else _of_file(path)


def locate(source: str | PathLike[str], revision: str | None = None) -> Path:
    """Return where a model is: an existing path, or the folder of a model on the hub, cached or downloaded.

    Raises:
        FishError: There is no such model.
    """
    path, name = Path(located(str(source))), str(source)
    if path.exists():
        return path
    with the_hub(repr(name), "a file or a folder") as hub:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))


def is_twin(weights: Weights, name: str, names: Iterable[str]) -> bool:
    """Whether a matrix is a copy of another one of the same model: tied weights that were saved twice.

    Args:
        weights: The model.
        name: The matrix; vectors and constants are never twins, since they may be equal by chance.
        names: Those that it may be a copy of.
    """
    names = list(names)
    header = weights.headers[name]
    if weights.aliases.get(name) in names:
        return True
    if len(header.shape) < 2 or not _varies(weights, name):
        return False
    others = [other for other in names if other != name and weights.headers[other] == header]
    return any(weights.hash(other) == weights.hash(name) for other in others)


def _varies(weights: Weights, name: str) -> bool:
    """Whether a tensor is more than a constant, which two tensors may share by chance."""
    return any(bool((raw_bits(piece) != raw_bits(piece)[0]).any()) for _, piece in weights.pieces(name))


def _in_folder(folder: Path) -> Weights:
    for name in (INDEX, SINGLE, _LEGACY_INDEX, _LEGACY):
        if (folder / name).is_file():
            return _of_file(folder / name)
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1:
        return _of_file(alone[0])
    raise FishError(f"{folder} holds none of {INDEX}, {SINGLE}, {_LEGACY_INDEX} and {_LEGACY}; expected a model")


def _of_file(path: Path) -> Weights:
    files = _shards(path) if path.name.endswith(".index.json") else [path]
    if all(file.suffix == ".safetensors" for file in files):
        return OnDisk(files, str(path.parent if path.name in (SINGLE, INDEX) else path))
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= load_pickle(file)
    return Held(tensors, str(path))


def load_pickle(path: Path) -> dict[str, Any]:
    """Map a file that ``torch.save`` wrote and load nothing but tensors and plain Python from it.

    Raises:
        FishError: It holds anything else, or is damaged.
    """
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().splitlines()[0]
        raise FishError(
            f"{path} is damaged, or holds more than tensors, which is not loaded from a pickle: {reason}"
        ) from error
    if not isinstance(loaded, dict):
        raise FishError(f"{path} holds a {type(loaded).__name__}; expected tensors by name")
    return loaded


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of shards names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FishError(f"{index} is damaged: it has no map of names to files ({error})") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise FishError(f"{index} is damaged: it names no files, or files outside its folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FishError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")
    return [index.parent / name for name in names]


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begin, and its header; the library checks that they fit."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            head: dict[str, Any] = json.loads(opened.read(min(length, _LONGEST_HEADER)))
    except (SafetensorError, ValueError, struct.error) as error:
        raise FishError(f"{file} is damaged or no safetensors file: {error}") from error
    return 8 + length, head


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    old = max((old for old in rename if name.startswith(old)), key=len, default=None)
    return name if old is None else rename[old] + name[len(old) :]
