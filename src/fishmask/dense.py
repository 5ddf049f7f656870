"""Whole tensors on disk: differences, changed tensors and merged models, written one piece at a time."""

import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishmask.additive import Exported, add_wide, canonical, check_fits, difference, shapes_of
from fishmask.between import compare
from fishmask.container import dtype_name
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fingerprint import raw_bytes
from fishmask.publish import replace_file
from fishmask.weights import INDEX, SINGLE, Header, OnDisk, View, Weights, is_twin, locate, open_weights

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.index.json")
_NOT_COPIED = (*_WEIGHTS, "README*", ".*", "onnx", "openvino")
KEY = "fishmask_tensors"  # the metadata of a file of whole tensors: "difference" or "tensors"


class Merged(Weights):
    """A base with a delta applied, computed as it is read.

    Args:
        base: The base.
        delta: The delta. Tensors that it takes whole may be missing from the base.
    """

    def __init__(self, base: Weights, delta: Delta) -> None:
        self.label, self._base = f"{base.label} with a delta", base
        self._entries = canonical(delta, base)
        self._entries |= {n: (torch.arange(b.numel()), b.reshape(-1)) for n, b in delta.buffers.items()}
        self.headers, self.buffers, self.aliases = dict(base.headers), base.buffers, base.aliases
        self.new = [name for name in self._entries if name not in base.headers]
        shapes = shapes_of(delta, base)
        for name, (flat, values) in self._entries.items():
            shape = shapes[name]
            own = self.headers.get(name)
            if (own is None or own.shape != shape) and len(flat) == shape.numel():  # another head
                self.headers[name] = Header(own.dtype if own else values.dtype, shape)
        self._copies = {
            name: twin
            for name in base.headers
            if name not in shapes
            for twin in self._entries
            if twin in base.headers and is_twin(base, name, [twin])
        }

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return some entries of a tensor."""
        name = self._copies.get(name, name)
        flat, values = self._entries.get(name, (torch.empty(0, dtype=torch.int64), torch.empty(0)))
        dtype = self.headers[name].dtype
        if len(flat) == self.headers[name].shape.numel():
            return values[start:stop].to(dtype)
        piece = self._base.piece(name, start, stop).clone()
        first, last = torch.searchsorted(flat, torch.tensor([start, stop])).tolist()
        piece[flat[first:last] - start] = values[first:last].to(dtype)
        return piece


def export_merged(
    delta: Delta,
    base: str | PathLike[str],
    folder: Path,
    *,
    check: bool = True,
    like: str | PathLike[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Exported:
    """Write the whole fine-tuned model: the base's folder with a delta applied, shard by shard.

    No model is loaded. Configuration and tokenizer are copied, and there are as many shards, of the same names.

    Args:
        delta: The delta.
        base: The base: a folder, a file or a name on the hub.
        folder: The folder to write. It must not hold a model already; in the base's folder it is no part of the model.
        check: Refuse another base than the delta's; this reads it once more.
        like: A folder whose ``config.json`` replaces that of the base: of a model with another head.
        rename: New beginnings of the base's names by old ones, as in ``fishmask.between``.

    Returns:
        What was written.

    Raises:
        FishError: The delta does not fit the base, a file is damaged, there is a model at ``folder``, or no
            configuration at ``like``.
        OSError: A file cannot be written.
    """
    place = locate(base)
    source = open_weights(place)
    if like is not None and not (Path(like) / "config.json").is_file():
        raise FishError(f"like={str(like)!r} has no config.json; expected the folder of a model with the delta's head")
    if any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*")):
        raise FishError(f"{folder} holds a model or an adapter already; choose another folder, or empty it")
    weights = View(source, rename)
    check_fits(delta, weights, fingerprint=check)
    merged = Merged(weights, delta)
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: _shard(source, weights.source_name(name)) for name in weights.headers}
    last = max(places.values(), default=SINGLE)
    places |= dict.fromkeys(merged.new, last)
    metadata = {"format": "pt"} | (source.metadata if isinstance(source, OnDisk) else {})
    size = 0
    for shard in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == shard]
        replace_file(folder / shard, _file(merged, names, metadata))
        size += (folder / shard).stat().st_size
    if len(set(places.values())) > 1:
        total = sum(header.dtype.itemsize * header.shape.numel() for header in merged.headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        replace_file(folder / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
    if place.is_dir():
        _copy_rest(place, folder)
    if like is not None:
        shutil.copyfile(Path(like) / "config.json", folder / "config.json")
    return Exported(folder, size, delta.k)


def export_tensors(delta: Delta, base: Weights, path: Path, *, difference_: bool) -> Exported:
    """Write the tensors that a delta changes, whole: as they become, or what is added to the base's.

    Args:
        delta: The delta.
        base: Its base, which ``formats`` has checked.
        path: The file.
        difference_: Write differences, 0 where nothing changes.

    Raises:
        FishError: Differences are asked for, but the base lacks a tensor, or has it in another shape.
    """
    merged: Weights = Merged(base, delta)
    names = [*canonical(delta, base), *delta.buffers]
    inexact = 0
    if difference_:
        lost = [name for name in names if base.headers.get(name) != merged.headers[name] or name in delta.buffers]
        if lost:
            raise FishError(f"only parameters of the base have differences, these have none: {', '.join(lost)}")
        found = [difference(base, name, *entries) for name, entries in canonical(delta, base).items()]
        inexact = sum(part.inexact for part in found)
        merged = _Subtracted(merged, base)
    padded = sum(merged.headers[name].shape.numel() for name in names) - delta.k
    metadata = {"format": "pt", KEY: "difference" if difference_ else "tensors"}
    replace_file(path, _file(merged, names, metadata))
    return Exported(path, path.stat().st_size, delta.k, padded, inexact)


def import_tensors(path: Path, base: Weights, *, difference_: bool, base_name: str | None = None) -> Delta:
    """Make a delta of a safetensors file of whole tensors: all entries that they change.

    Args:
        path: The file.
        base: The base.
        difference_: The tensors are added to the base's; else they replace them, also where the base has none.
        base_name: Where the base comes from, for people to read.

    Raises:
        FishError: The file is damaged, or names tensors that the base lacks.
    """
    held = open_weights(path)
    headers = {base.aliases.get(name, name): header for name, header in held.headers.items()}
    lost = [name for name, header in headers.items() if name not in base.headers or name in base.buffers]
    wrong = [n for n, header in headers.items() if n in base.headers and base.headers[n].shape != header.shape]
    if difference_ and (lost or wrong):
        raise FishError(
            f"{path} has tensors that {base.label} lacks or has in another shape: {', '.join(lost + wrong)}"
        )
    tuned = (_Added if difference_ else _Replaced)(base, held)
    return compare(base, tuned, heads=[] if difference_ else lost + wrong).delta(base_name=base_name)


class _Combined(Weights):
    """A base and tensors of a file that concern some of it."""

    def __init__(self, base: Weights, held: Weights) -> None:
        self.label, self._base, self._held = held.label, base, held
        self._own = {base.aliases.get(name, name): name for name in held.headers}
        self.headers, self.buffers, self.aliases = dict(base.headers), base.buffers, base.aliases
        for name, own in self._own.items():
            header, known = held.headers[own], base.headers.get(name)
            self.headers[name] = Header(known.dtype if known else header.dtype, header.shape)


class _Added(_Combined):
    """The sum of both."""

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        piece = self._base.piece(name, start, stop)
        return add_wide(piece, self._held.piece(self._own[name], start, stop)) if name in self._own else piece


class _Replaced(_Combined):
    """The file's tensors where it has them."""

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._own:
            return self._held.piece(self._own[name], start, stop).to(self.headers[name].dtype)
        return self._base.piece(name, start, stop)


class _Subtracted(Weights):
    """Merged weights less the base's, in float32, in float64 where they are."""

    def __init__(self, merged: Weights, base: Weights) -> None:
        self.label, self._merged, self._base = merged.label, merged, base
        self.headers = {n: Header(_wide(header.dtype), header.shape) for n, header in merged.headers.items()}

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        wide = self.headers[name].dtype
        return self._merged.piece(name, start, stop).to(wide) - self._base.piece(name, start, stop).to(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _file(weights: Weights, names: Iterable[str], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; a tensor is read when its turn comes."""
    # Wide elements first, so that each tensor is aligned for readers that map the file.
    order = sorted(names, key=lambda name: -weights.headers[name].dtype.itemsize)
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = weights.headers[name]
        end = offset + dtype.itemsize * shape.numel()
        known = dtype_name(torch.empty(0, dtype=dtype))
        head[name] = {"dtype": known, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield from (raw_bytes(piece) for _, piece in weights.pieces(name))


def _shard(source: Weights, name: str) -> str:
    """Return the name of the file that a tensor goes to: that of its shard, where there are several."""
    if not isinstance(source, OnDisk) or len(set(source.files.values())) == 1:
        return SINGLE
    return source.files[name].name


def _copy_rest(folder: Path, output: Path) -> None:
    """Copy what a model's folder holds besides weights and its description."""
    matched, own = shutil.ignore_patterns(*_NOT_COPIED), output.resolve()

    def skipped(place: str, names: list[str]) -> set[str]:
        return matched(place, names) | {name for name in names if (Path(place) / name).resolve() == own}

    left = skipped(str(folder), [path.name for path in folder.iterdir()])
    for path in sorted(folder.iterdir()):
        if path.name in left:
            continue
        if path.is_dir():
            shutil.copytree(path, output / path.name, ignore=skipped, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, output / path.name)
