"""The files of a checkpoint log and what they say: a base, segments (one mask each), and the commits of each segment.

Every file is immutable and names, by number and digest, the one it builds on, so no file is ever read as part of
another history. A commit holds all k values: the state of the model is the base, then what each segment sealed of the
masks before it, oldest first, then the values of the commit.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishmask import container, tree
from fishmask.container import Content
from fishmask.errors import FishError
from fishmask.fingerprint import SHORT, describe, raw_bits, takes_whole, tensor_hash
from fishmask.fingerprint import Base as Fingerprint
from fishmask.mask import Mask
from fishmask.moments import Moments
from fishmask.originals import persistent_buffers
from fishmask.params import aliases, put

KINDS = ("base", "segment", "commit")

Entries = dict[str, tuple[Tensor, Tensor]]  # name -> sorted flat indices, values in the weight's dtype; on the CPU


class Problem(NamedTuple):
    """A file that cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Reference:
    """Another file of the log: its number and its digest."""

    number: int
    digest: str

    @classmethod
    def read(cls, metadata: Mapping[str, str], kind: str) -> "Reference | None":
        """Read the reference to a file of a kind from another file's metadata."""
        return cls(int(metadata[kind]), metadata[f"{kind}_digest"]) if kind in metadata else None

    def written(self, kind: str) -> dict[str, str]:
        """Return the metadata that ``read`` reads."""
        return {kind: str(self.number), f"{kind}_digest": self.digest}


@dataclass(frozen=True)
class Base:
    """The weights that everything builds on.

    Attributes:
        file: Where they are.
        structure: For each parameter its dtype and shape, as in ``float32 [2, 3]``, in the order of the model.
        weights: Parameters; without a stored base only those that the first mask takes whole, such as a new head.
        buffers: Buffers that belong to the model's state.
        fingerprint: Of the parameters that are not stored; None when all are.
        aliases: Other names of tied parameters, and their canonical ones.
        config: The configuration of a transformers model, as JSON text.
        name: Where the weights come from, for people; None where that is not known.
    """

    file: Reference
    structure: dict[str, str]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    fingerprint: Fingerprint | None
    aliases: dict[str, str]
    config: str | None
    name: str | None

    def misfits(self, model: nn.Module) -> list[str]:
        """List how a model differs in names, shapes and dtypes."""
        here = structure(model)
        problems = [f"missing from the model: {name}" for name in self.structure if name not in here]
        problems += [f"not in the log: {name}" for name in here if name not in self.structure]
        problems += [
            f"{name}: {kind} in the log, {here[name]} in the model"
            for name, kind in self.structure.items()
            if here.get(name, kind) != kind
        ]
        buffers = {name: describe(buffer) for name, buffer in persistent_buffers(model).items()}
        wanted = {name: describe(buffer) for name, buffer in self.buffers.items()}
        names = dict.fromkeys((*wanted, *buffers))
        return problems + [
            f"buffer {name}: {wanted.get(name, 'none')} in the log, {buffers.get(name, 'none')} in the model"
            for name in names
            if wanted.get(name) != buffers.get(name)
        ]

    def other_weights(self, model: nn.Module) -> list[str]:
        """Name the parameters that are not stored and whose weights in the model are not the base's."""
        if self.fingerprint is None:
            return []
        parameters = dict(model.named_parameters())
        hashes = {name: tensor_hash(parameters[name]) for name in self.fingerprint.short}
        return self.fingerprint.differing(Fingerprint.of(hashes))


@dataclass(frozen=True)
class Segment:
    """The stretch of a training that has one mask.

    Attributes:
        file: Where it is.
        base: What it builds on.
        parent: The segment before it; None for the first on a base.
        mask: Its mask.
        sealed: Entries that earlier masks have trained and that this one does not: they move no more.
        rng: States of the random number generators at its start.
    """

    file: Reference
    base: Reference
    parent: Reference | None
    mask: Mask
    sealed: Entries
    rng: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What a commit holds: the trained state of a moment.

    Attributes:
        values: [k] float32, in the order of the segment's mask.
        moments: State of the optimizer; None when there was none.
        buffers: Buffers that differ from the base's.
        rng: States of those random number generators that differ from the segment's.
        state: What else the caller gave, by name.
    """

    values: Tensor
    moments: Moments | None
    buffers: dict[str, Tensor]
    rng: dict[str, Any]
    state: dict[str, Any]


class CommitFile(NamedTuple):
    """A commit as it was read."""

    file: Reference
    segment: Reference
    metadata: dict[str, str]
    snapshot: Snapshot
    size: int  # in bytes


def structure(model: nn.Module) -> dict[str, str]:
    """Return dtype and shape of every parameter of a model by canonical name."""
    return {name: describe(p) for name, p in model.named_parameters()}


# --- names ------------------------------------------------------------------------------------------------------------


def path_of(folder: Path, kind: str, number: int) -> Path:
    """Return the path of a file of the log."""
    return folder / f"{kind}-{number:08d}.safetensors"


def numbered(folder: Path, kind: str) -> dict[int, Path]:
    """Return the files of a kind by number, ascending."""
    pattern = re.compile(rf"{kind}-(\d{{8,}})\.safetensors")
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return dict(sorted((int(match[1]), path) for match, path in found if match))


# --- writing ----------------------------------------------------------------------------------------------------------


def base_of(model: nn.Module, mask: Mask, store: bool) -> Base:
    """Return the base that ``model`` holds, for a new file; without ``store`` mostly by its fingerprint.

    Args:
        model: The model, with its base in place.
        mask: The first mask: what it takes whole need not be part of a base that is found elsewhere.
        store: Whether to hold all the weights.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    held = {name: p for name, p in parameters.items() if store or takes_whole(mask, name, p.numel())}
    known = Fingerprint.of({name: tensor_hash(p) for name, p in parameters.items() if name not in held})
    config = getattr(model, "config", None)
    text = None
    if config is not None and hasattr(config, "to_json_string"):
        text = json.dumps({**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}, indent=2)
    buffers = {name: buffer.detach() for name, buffer in persistent_buffers(model).items()}
    others = {name: canonical for name, canonical in aliases(model).items() if name != canonical}
    name = getattr(config, "_name_or_path", None) or None
    return Base(Reference(0, ""), structure(model), held, buffers, known if known.short else None, others, text, name)


def base_content(number: int, base: Base) -> Content:
    """Describe a base as the file of a number; the reference to its own file does not matter."""
    known = base.fingerprint
    description = {
        "names": list(base.structure),
        "kinds": list(base.structure.values()),
        "aliases": base.aliases,
        "fingerprints": "".join(known.short.values()) if known else "",
        "config": base.config,
    }
    metadata = {"number": str(number), "fingerprint": known.digest if known else ""}
    metadata |= {"base_name": base.name} if base.name is not None else {}
    tensors = {f"weights/{name}": weight for name, weight in base.weights.items()}
    tensors |= {f"buffers/{name}": buffer for name, buffer in base.buffers.items()}
    return Content(metadata, description, tensors)


def segment_content(segment: Segment) -> Content:
    """Describe a segment; the digest in its own reference does not matter."""
    tensors, description = container.pack_mask(segment.mask.indices, segment.mask.shapes)
    shapes = segment.mask.shapes
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    indices = {name: index for name, (index, _) in segment.sealed.items()}
    planes, lengths = container.encode_indices(indices, sizes)
    held = {name: segment.sealed[name][1] for name in shapes if name in segment.sealed}
    values, dtypes = container.pack_values(held, shapes)
    k = sum(len(index) for index in indices.values())
    description["sealed"] = {"k": k, "planes": lengths, "dtypes": dtypes if k else []}
    description["rng"], state = tree.pack(segment.rng)
    description["state_bytes"] = len(state)
    tensors |= {"sealed": planes, **values, "state": container.bytes_tensor(container.compress(state, 3))}
    metadata = {"number": str(segment.file.number), "mask": segment.mask.digest, **segment.base.written("base")}
    metadata |= segment.parent.written("segment") if segment.parent else {}
    return Content(metadata, description, tensors)


def commit_content(metadata: Mapping[str, str], snapshot: Snapshot) -> Content:
    """Describe a commit. All but ``snapshot.values`` is copied: what training does afterwards does not reach it."""
    tensors = {"values": snapshot.values.detach().cpu()}
    held: dict[str, Any] = {"buffers": snapshot.buffers, "rng": snapshot.rng, "state": snapshot.state}
    if snapshot.moments is not None:
        tensors |= {f"optimizer/{key}": vector for key, vector in snapshot.moments.vectors.items()}
        held["optimizer"] = snapshot.moments.rest
    packed, state = tree.pack(held, "")
    tensors["state"] = container.bytes_tensor(container.compress(state, 3))
    return Content(dict(metadata), {"state": packed, "state_bytes": len(state)}, tensors)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(folder: Path, kind: str, number: int, digest: str | None) -> tuple[Path, Content]:
    path = path_of(folder, kind, number)
    try:
        content = container.read(path, kind)
    except FileNotFoundError:
        raise FishError(f"{path} is missing, and commits of this log need it") from None
    if content.metadata.get("number") != str(number):
        raise FishError(f"{path} is another file under this name: its number is {content.metadata.get('number')}")
    if digest is not None and content.digest != digest:
        raise FishError(f"{path} is not the file that its commits were made with: its digest is another one")
    return path, content


def read_base(folder: Path, number: int, digest: str | None = None) -> Base:
    """Read a base; with ``digest``, only that one.

    Raises:
        FishError: It is missing, damaged, or not the one meant.
        OSError: It cannot be read.
    """
    path, content = _read(folder, "base", number, digest)
    with container.refusing(path):
        about = content.description
        kinds = dict(zip(about["names"], about["kinds"], strict=True))
        weights, buffers = container.under(content.tensors, "weights/"), container.under(content.tensors, "buffers/")
        if wrong := [name for name, weight in weights.items() if kinds[name] != describe(weight)]:
            raise ValueError(f"weights of another kind than described: {', '.join(wrong)}")
        elsewhere = [name for name in kinds if name not in weights]
        digits = about["fingerprints"]
        if len(digits) != SHORT * len(elsewhere):
            raise ValueError(f"{len(digits)} digits of fingerprints for {len(elsewhere)} parameters")
        short = {name: digits[i * SHORT : (i + 1) * SHORT] for i, name in enumerate(elsewhere)}
        known = Fingerprint(short, content.metadata["fingerprint"]) if short else None
        file, name = Reference(number, content.digest), content.metadata.get("base_name")
        return Base(file, kinds, weights, buffers, known, about["aliases"], about["config"], name)


def read_segment(folder: Path, number: int, digest: str | None = None) -> Segment:
    """Read a segment; errors as for ``read_base``."""
    path, content = _read(folder, "segment", number, digest)
    with container.refusing(path):
        about, tensors = content.description, content.tensors
        mask = Mask.unpack(content)
        sizes = {name: shape.numel() for name, shape in mask.shapes.items()}
        sealed = about["sealed"]
        indices = container.decode_indices(tensors["sealed"], sealed["planes"], sealed["k"], sizes)
        dtypes = dict(zip(mask.shapes, sealed["dtypes"], strict=True)) if sealed["k"] else {}
        counts = {name: len(index) for name, index in indices.items()}
        values = container.unpack_values(tensors, dtypes, counts)
        base = Reference.read(content.metadata, "base")
        if base is None:
            raise ValueError("no base is named")
        return Segment(
            Reference(number, content.digest),
            base,
            Reference.read(content.metadata, "segment"),
            mask,
            {name: (index, values[name]) for name, index in indices.items()},
            tree.unpack(about["rng"], _state_of(content)),
        )


def read_chain(folder: Path, last: Reference) -> list[Segment]:
    """Read a segment and all before it, oldest first; errors as for ``read_base``."""
    chain = [read_segment(folder, last.number, last.digest)]
    while (parent := chain[-1].parent) is not None:
        if parent.number >= chain[-1].file.number:
            raise FishError(f"{path_of(folder, 'segment', chain[-1].file.number)} names a later segment as its parent")
        chain.append(read_segment(folder, parent.number, parent.digest))
        if chain[-1].base != chain[0].base:
            raise FishError(f"{path_of(folder, 'segment', parent.number)} builds on another base than its successors")
    return chain[::-1]


def read_commit(folder: Path, number: int) -> "CommitFile":
    """Read a commit; errors as for ``read_base``."""
    path, content = _read(folder, "commit", number, None)
    with container.refusing(path):
        held = tree.unpack(content.description["state"], _state_of(content))
        moments = None
        if "optimizer" in held:
            moments = Moments(container.under(content.tensors, "optimizer/"), held["optimizer"])
        values = content.tensors["values"]
        vectors = moments.vectors.values() if moments else ()
        if values.dtype != torch.float32 or any(vector.shape != values.shape for vector in (values.view(-1), *vectors)):
            raise ValueError("values or moments of another shape or dtype")
        segment = Reference.read(content.metadata, "segment")
        if segment is None:
            raise ValueError("no segment is named")
        snapshot = Snapshot(values, moments, held["buffers"], held["rng"], held["state"])
        size = path.stat().st_size
        return CommitFile(Reference(number, content.digest), segment, content.metadata, snapshot, size)


def read_all(folder: Path, number: int) -> "tuple[CommitFile, list[Segment]]":
    """Read a commit and its segments, oldest first; errors as for ``read_base``."""
    commit = read_commit(folder, number)
    chain = read_chain(folder, commit.segment)
    if len(commit.snapshot.values) != chain[-1].mask.k:
        raise FishError(
            f"{path_of(folder, 'commit', number)} was written by a faulty program: {len(commit.snapshot.values)} "
            f"values for a mask of {chain[-1].mask.k}"
        )
    return commit, chain


def _state_of(content: Content) -> bytes:
    data = content.tensors["state"].numpy().tobytes()
    return container.decompress(data, int(content.description["state_bytes"]))


# --- the state of a moment --------------------------------------------------------------------------------------------


def by_name(mask: Mask, values: Tensor) -> Entries:
    """Return flat values [k] by parameter, with their indices."""
    parts = values.split([len(index) for index in mask.indices.values()])
    return {name: (index, part) for (name, index), part in zip(mask.indices.items(), parts, strict=True)}


def changes(chain: Sequence[Segment], snapshot: Snapshot) -> list[Entries]:
    """Return what to write onto the base, in order."""
    return [*(segment.sealed for segment in chain), by_name(chain[-1].mask, snapshot.values)]


def write_entries(weights: Mapping[str, Tensor], changes: Iterable[Entries]) -> None:
    """Write entries into weights, in place and in the weights' dtype, one change after the other."""
    with torch.no_grad():
        for entries in changes:
            for name, (index, values) in entries.items():
                weight = weights[name]
                put(weight, index.to(weight.device), values.to(weight.device, weight.dtype))


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(
        describe(a[name]) == describe(b[name]) and torch.equal(raw_bits(a[name].cpu()), raw_bits(b[name].cpu()))
        for name in a
    )
