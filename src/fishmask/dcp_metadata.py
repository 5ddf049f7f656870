"""The metadata of a ``torch.distributed.checkpoint`` folder as JSON: what lies where, and the digest of each piece.

DCP pickles it; here nothing is ever unpickled. ``docs/dcp.md`` describes the file.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fishmask.container import refusing
from fishmask.errors import FishError

METADATA = "metadata.json"
RANK_FILE = re.compile(r"rank-\d{5,}-[0-9a-f]{16}\.data")
VERSION = 1

# The digest comes first, so it stands at a fixed place that a reader finds without parsing anything.
_DIGEST_AT = len(b'{"digest":"')
_DIGEST_END = _DIGEST_AT + 64

# Every dtype whose elements are whole bytes. A view as one of the quantized dtypes crashes the process.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
        *(torch.float4_e2m1fn_x2, torch.complex32, torch.complex64, torch.complex128),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}


class RankFile(NamedTuple):
    """A file that one rank wrote: its name in the folder and its size. Items cover every byte of it."""

    name: str
    bytes: int


class Place(NamedTuple):
    """Where one item lies, with the SHA-256 (hex) of its bytes; ``dtype`` and ``sizes`` are None for an object."""

    file: RankFile
    start: int
    bytes: int
    digest: str
    dtype: torch.dtype | None
    sizes: torch.Size | None


def by_file(places: Iterable[Place]) -> dict[RankFile, list[Place]]:
    """Sort places into the files that they are in."""
    files: dict[RankFile, list[Place]] = {}
    for place in places:
        files.setdefault(place.file, []).append(place)
    return files


def encode(metadata: Metadata, places: Mapping[MetadataIndex, Place]) -> bytes:
    """Write metadata as JSON.

    Args:
        metadata: What the planner of a save made of all ranks' plans.
        places: Where the ranks have written its items.

    Returns:
        The bytes of ``metadata.json``.

    Raises:
        ValueError: The items written are not those of the metadata, or only a part of a tensor was planned, or the
            planner's own data is not what JSON can hold.
    """
    files = list(by_file(places.values()))
    numbers = {file: i for i, file in enumerate(files)}

    def described(index: MetadataIndex) -> dict[str, Any]:
        if index not in places:
            raise ValueError(f"no rank wrote {index}, which the planner had planned")
        place = places[index]
        return {"file": numbers[place.file], "start": place.start, "bytes": place.bytes, "digest": place.digest}

    tensors: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for name, saved in metadata.state_dict_metadata.items():
        if isinstance(saved, BytesStorageMetadata):
            objects[name] = described(MetadataIndex(name))
            continue
        if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
            raise ValueError(
                f"the ranks of this save hold only a part of {name} {list(saved.size)}: save with the process group of "
                f"all ranks that hold it"
            )
        tensors[name] = {
            "dtype": str(saved.properties.dtype).removeprefix("torch."),  # DCP calls the other properties deprecated
            "size": list(saved.size),
            "chunks": [
                {"offsets": list(c.offsets), "sizes": list(c.sizes), **described(MetadataIndex(name, c.offsets))}
                for c in saved.chunks
            ],
        }
    known = len(objects) + sum(len(tensor["chunks"]) for tensor in tensors.values())
    if known != len(places):
        raise ValueError(f"the ranks wrote {len(places)} items where the planner's metadata has {known}")
    content = {
        "digest": "0" * 64,
        "format": "fishmask-dcp",
        "version": VERSION,
        "byteorder": sys.byteorder,
        "files": [file._asdict() for file in files],
        "tensors": tensors,
        "objects": objects,
        "planner": _paths(metadata.planner_data),
    }
    data = json.dumps(content, separators=(",", ":")).encode()
    return data[:_DIGEST_AT] + _digest(data).encode() + data[_DIGEST_END:]


def decode(path: Path) -> tuple[Metadata, str]:
    """Read a ``metadata.json`` back, after verifying its digest.

    Returns:
        The metadata, with the ``Place`` of each item as ``storage_data``; the digest (hex).

    Raises:
        FishError: The file is missing or damaged, from a newer fishmask, or from a machine of other byte order.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FishError(
            f"{path.parent} holds no checkpoint: {path.name}, the last file of a save, is not there; give the folder "
            f"of a save that finished"
        ) from error
    digest = _digest(data)
    if data[_DIGEST_AT:_DIGEST_END] != digest.encode():
        raise FishError(f"{path} is damaged: its content does not match its digest; load another checkpoint")
    with refusing(path):
        return _metadata(path, json.loads(data)), digest


def _digest(data: bytes) -> str:
    """Return the digest of a metadata file, with the place of the digest itself read as zeros."""
    return hashlib.sha256(data[:_DIGEST_AT] + b"0" * 64 + data[_DIGEST_END:]).hexdigest()


def _paths(planner_data: Any) -> dict[str, list[str | int]] | None:
    """Return the default planner's data, for each name the path in the nested state dict, as JSON can hold it."""
    if planner_data is None:
        return None
    if not isinstance(planner_data, Mapping) or not all(map(_is_path, planner_data, planner_data.values())):
        raise ValueError(
            "the planner's own data is not a path of strings and numbers by name, as that of DefaultSavePlanner, and "
            "cannot be kept without pickle: leave planner_data None"
        )
    return {name: list(path) for name, path in planner_data.items()}


def _is_path(name: Any, path: Any) -> bool:
    if not isinstance(name, str) or not isinstance(path, tuple | list):
        return False
    return len(path) > 0 and all(isinstance(part, str | int) for part in path)


def _metadata(path: Path, content: dict[str, Any]) -> Metadata:
    if content["format"] != "fishmask-dcp":
        raise ValueError(f"format {content['format']!r}")
    if content["version"] > VERSION:
        raise FishError(
            f"{path} has format version {content['version']}, newer than this fishmask reads ({VERSION}); upgrade "
            f"fishmask"
        )
    if content["byteorder"] != sys.byteorder:
        raise FishError(
            f"{path} was written on a {content['byteorder']}-endian machine; this one is {sys.byteorder}-endian"
        )
    files = [RankFile(**file) for file in content["files"]]
    if any(not RANK_FILE.fullmatch(file.name) for file in files):
        raise ValueError(f"files {[file.name for file in files]}")
    places: dict[MetadataIndex, Place] = {}
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, item in content["tensors"].items():
        dtype = DTYPES[item["dtype"]]
        chunks = []
        for chunk in item["chunks"]:
            offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            places[MetadataIndex(name, offsets)] = _place(chunk, files, dtype, sizes)
        state[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(item["size"]), chunks)
    for name, item in content["objects"].items():
        state[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _place(item, files, None, None)
    items = by_file(places.values())
    for file in files:
        _check_cover(file, items.get(file, ()))
    paths = content["planner"]
    planner_data = None if paths is None else {name: tuple(parts) for name, parts in paths.items()}
    return Metadata(state, planner_data, places)


def _place(
    item: Mapping[str, Any], files: Sequence[RankFile], dtype: torch.dtype | None, sizes: torch.Size | None
) -> Place:
    place = Place(files[item["file"]], item["start"], item["bytes"], item["digest"], dtype, sizes)
    if dtype is not None and sizes is not None and sizes.numel() * dtype.itemsize != place.bytes:
        raise ValueError(f"{place.bytes} bytes for {dtype} {list(sizes)}")
    return place


def _check_cover(file: RankFile, places: Iterable[Place]) -> None:
    """Raise ValueError unless items lie end to end in a file: a byte between them would have no digest."""
    end = 0
    for place in sorted(places, key=lambda place: (place.start, place.bytes)):
        if place.start != end:
            raise ValueError(f"an item of {file.name} starts at byte {place.start}, the one before it ends at {end}")
        end += place.bytes
    if end != file.bytes:
        raise ValueError(f"the items of {file.name} end at byte {end} of {file.bytes}")
