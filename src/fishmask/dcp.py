"""A storage for ``torch.distributed.checkpoint`` (DCP) that never hands out a torn, mixed or damaged checkpoint.

DCP's planners, resharding and staging stay as they are; :class:`Writer` and :class:`Reader` replace what lies below
them. A checkpoint is a folder. Each rank writes one immutable file, its items end to end; when all of them are durable,
the coordinator publishes ``metadata.json``, which has the size of every file, the SHA-256 of every item, and one over
itself. Without it there is no checkpoint; with it, nothing else in the folder can be taken for a part of it.

DCP raises what goes wrong in here as its own ``CheckpointException``, a ``BaseException`` that passes by
``except Exception``. :func:`plain_errors` makes it a ``FishError``.
"""

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fishmask.dcp_metadata import DTYPES, METADATA, RANK_FILE, Place, RankFile, by_file, decode, encode
from fishmask.errors import FishError
from fishmask.fingerprint import element_bytes
from fishmask.publish import leftovers, make_folder, publish, remove


class Writer(StorageWriter):
    """Save with ``dcp.save(state_dict, storage_writer=Writer(path))``, or ``dcp.async_save``, into a fresh folder.

    Each save needs a folder of its own on storage that all ranks see. A folder that an earlier save left unfinished
    may be used again; once the new checkpoint is published, what the earlier one left is deleted. Use one Writer for
    one save at a time.

    Tensors are stored as they are, bit for bit. Everything else in the state dict is an object: DCP's default planner
    passes it through ``torch.save``, that is pickle, and the bytes it makes are stored as they are. See :class:`Reader`
    for what that means when they are loaded.

    Args:
        path: The folder of the checkpoint; missing folders are made. ``dcp.save(checkpoint_id=...)`` replaces it.

    Raises:
        CheckpointException: From ``dcp.save`` on every rank, where one of them failed: the folder holds a checkpoint
            already (FishError), a tensor is sparse or quantized (ValueError), a file cannot be written (OSError). No
            checkpoint is published then, and no earlier one is touched.
        ValueError: With ``use_collectives=False``, which makes no whole checkpoint.

    Example:
        >>> import tempfile, torch, warnings
        >>> import torch.distributed.checkpoint as dcp
        >>> warnings.simplefilter("ignore")  # DCP warns where there is no process group
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"w": torch.arange(3)}, storage_writer=Writer(folder))
        >>> state = {"w": torch.zeros(3, dtype=torch.int64)}
        >>> dcp.load(state, storage_reader=Reader(folder))
        >>> state["w"].tolist()
        [0, 1, 2]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take another folder, where DCP was given one."""
        self.path = self.path if checkpoint_id is None else Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn the rank; refuse a save whose ranks do not meet."""
        if not kwargs.get("use_collectives", True):
            raise ValueError("use_collectives=False would leave each rank's part alone: save with use_collectives=True")
        self._rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse, before anything is written, a folder that is taken and tensors that are no plain arrays."""
        self._refuse_taken()
        if faults := [fault for item in plan.items for fault in _fault(item)]:
            raise ValueError("cannot save " + "; ".join(faults))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items into one file; it is durable when the future is done, which it is on return."""
        results: list[WriteResult] = []
        if plan.items:
            make_folder(self.path)
            name = f"rank-{self._rank:05}-{secrets.token_hex(8)}.data"  # unlike that of any earlier attempt
            spans: list[tuple[int, int, str]] = []
            try:
                publish(self.path / name, _parts(plan, planner, spans))
            except FileNotFoundError:  # taken for a leftover by a faster save
                self._refuse_taken()
                raise
            file = RankFile(name, sum(length for _, length, _ in spans))
            for item, span in zip(plan.items, spans, strict=True):
                tensor = item.tensor_data
                kind = (None, None) if tensor is None else (tensor.properties.dtype, tensor.chunk.sizes)
                results.append(WriteResult(item.index, span[1], Place(file, *span, *kind)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the metadata, as the coordinator, after every rank's file is durable."""
        self._refuse_taken()
        written = [result for of_rank in results for result in of_rank]
        places = {result.index: result.storage_data for result in written}
        if len(places) != len(written):
            raise ValueError("an item was written twice: the planner must leave each to one rank")
        files = by_file(places.values())
        for file in files:
            _check_size(self.path, file, "the folder of a checkpoint must be on storage that all ranks share")
        text = encode(metadata, places)
        make_folder(self.path)
        try:
            publish(self.path / METADATA, [text])
        except FileExistsError:
            self._refuse_taken()
            raise
        metadata.storage_data = places
        # The checkpoint stands; what earlier attempts left behind cannot become one any more.
        kept = {file.name for file in files}
        with contextlib.suppress(OSError):
            stray = [path for path in self.path.iterdir() if RANK_FILE.fullmatch(path.name) and path.name not in kept]
            stray += [path for path in leftovers(self.path) if path.name.startswith((".rank-", f".{METADATA}."))]
            for path in stray:
                remove(path)

    def _refuse_taken(self) -> None:
        if (self.path / METADATA).exists():
            raise FishError(
                f"{self.path} holds a checkpoint, and a checkpoint is never overwritten: name a new folder, or delete "
                f"this one first"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is the path of a folder, not the address of something else."""
        return "://" not in os.fspath(checkpoint_id)


class Reader(StorageReader):
    """Load with ``dcp.load(state_dict, storage_reader=Reader(path))``, at any number of ranks.

    Only what the plan asks for is read, whole items at a time, and no item reaches the planner before its digest is
    verified. DCP loads in place: when a later item is refused, earlier ones have been loaded, so load again from
    another checkpoint.

    The digests guard against damage, not against malice. Tensors and metadata are never unpickled, but DCP's default
    planner passes each object (what is no tensor) to ``torch.load(weights_only=False)``, which runs what code it
    contains. Load objects only from where you would run a program from, or with a planner that overrides
    ``load_bytes``; ``docs/dcp.md`` shows one.

    Args:
        path: The folder of the checkpoint. ``dcp.load(checkpoint_id=...)`` replaces it.

    Raises:
        CheckpointException: From ``dcp.load`` on every rank, where one of them failed: there is no checkpoint, a file
            is missing, cut short or damaged, the ranks read different checkpoints (FishError; DCP rewords those of the
            metadata as an AssertionError with the same message).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._places: Mapping[MetadataIndex, Place] = {}
        self._digest = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take another folder, where DCP was given one."""
        self.path = self.path if checkpoint_id is None else Path(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """Read and verify ``metadata.json``.

        Returns:
            What DCP knows of the checkpoint; ``storage_data`` maps each item to its ``Place``.

        Raises:
            FishError: There is no checkpoint, or its metadata is damaged, or from a newer fishmask.
        """
        metadata, self._digest = decode(self.path / METADATA)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Take the places of the items from the metadata."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Tell the coordinator which checkpoint this rank reads."""
        return replace(plan, storage_data=self._digest)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse ranks that read different checkpoints: what they load would fit nowhere."""
        first = plans[0].storage_data
        if other := [rank for rank, plan in enumerate(plans) if plan.storage_data != first]:
            raise FishError(f"ranks {other} read another checkpoint than rank 0: give all ranks the same folder")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and verify what the plan asks for, and hand it to the planner."""
        wanted: dict[RankFile, dict[Place, list[ReadItem]]] = {}
        for request in plan.items:
            place = self._places[request.storage_index]
            wanted.setdefault(place.file, {}).setdefault(place, []).append(request)
        for file, requests in wanted.items():
            for place, data in _verified(self.path, file, requests):
                for request in requests[place]:
                    _hand_over(data, place, request, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def blank(self) -> dict[str, Any]:
        """Return the saved state dict, unfilled, for ``dcp.load`` to fill: a load needs to be told what to load.

        Returns:
            Nested as it was saved (DCP makes every key a string and leaves out empty containers), with uninitialised
            CPU tensors of the saved dtypes and whole shapes, and None for each object.

        Raises:
            FishError: As for ``read_metadata``.
        """
        metadata = self.read_metadata()
        state: dict[str, Any] = {}
        for name, saved in metadata.state_dict_metadata.items():
            unfilled = None
            if isinstance(saved, TensorStorageMetadata):
                unfilled = torch.empty(saved.size, dtype=saved.properties.dtype)
            _put(state, (metadata.planner_data or {}).get(name, (name,)), unfilled)
        return state

    def verify(self) -> None:
        """Read every byte of the checkpoint and compare it with the digests.

        Raises:
            FishError: As for ``read_metadata``; or files are missing or damaged: the message names all of them.
        """
        problems = []
        for file, places in by_file(self.read_metadata().storage_data.values()).items():
            try:
                for _ in _verified(self.path, file, places):
                    pass
            except FishError as error:
                problems.append(str(error))
        if problems:
            raise FishError("; ".join(problems))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is the path of a folder, not the address of something else."""
        return Writer.validate_checkpoint_id(checkpoint_id)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise DCP's ``CheckpointException`` as a ``FishError`` that says what went wrong on which rank.

    ``CheckpointException`` is a ``BaseException``, so ``except Exception`` does not see it. Put this around
    ``dcp.save``, ``dcp.load`` and the ``result()`` of ``dcp.async_save``. An interrupt on a rank stays as it is.

    Raises:
        FishError: DCP failed; the message has those of all failed ranks.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> with plain_errors():
        ...     dcp.load({"w": torch.zeros(3)}, storage_reader=Reader(tempfile.mkdtemp()))
        Traceback (most recent call last):
        ...
        fishmask.errors.FishError: rank 0: ... holds no checkpoint: ...
    """
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        if not all(isinstance(cause, Exception) for cause in causes.values()):
            raise
        raise FishError("; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())) from error


# --- items and bytes --------------------------------------------------------------------------------------------------


def _fault(item: WriteItem) -> Iterator[str]:
    """Say why an item cannot be saved, if so."""
    if item.tensor_data is None:
        return
    properties = item.tensor_data.properties
    if properties.layout != torch.strided:
        yield f"{item.index.fqn}: {properties.layout} is no plain array; make it one with to_dense()"
    elif properties.dtype not in DTYPES.values():
        yield f"{item.index.fqn}: {properties.dtype} has no plain bytes; known are {', '.join(DTYPES)}"


def _parts(plan: SavePlan, planner: SavePlanner, spans: list[tuple[int, int, str]]) -> Iterator[memoryview]:
    """Yield the bytes of a plan's items one by one, noting the start, length and digest of each."""
    start = 0
    for item in plan.items:
        part = _bytes_of(item, planner.resolve_data(item))
        spans.append((start, len(part), hashlib.sha256(part).hexdigest()))
        start += len(part)
        yield part


def _bytes_of(item: WriteItem, data: Tensor | io.BytesIO) -> memoryview:
    if isinstance(data, io.BytesIO):
        return data.getbuffer()
    planned = item.tensor_data
    if planned is None or data.dtype != planned.properties.dtype or data.shape != planned.chunk.sizes:
        raise ValueError(
            f"the planner gave {data.dtype} {list(data.shape)} for {item.index}, but had planned {planned}"
        )
    return element_bytes(data)


def _check_size(folder: Path, file: RankFile, advice: str) -> None:
    try:
        size = (folder / file.name).stat().st_size
    except FileNotFoundError as error:
        raise FishError(f"{folder / file.name} is missing: {advice}") from error
    if size != file.bytes:
        raise FishError(
            f"{folder / file.name} is damaged: it has {size} bytes where {file.bytes} were written; {advice}"
        )


def _verified(folder: Path, file: RankFile, places: Iterable[Place]) -> Iterator[tuple[Place, Tensor]]:
    """Yield places of a file, in the order of the file, with their verified bytes."""
    _check_size(folder, file, "load another checkpoint")
    with (folder / file.name).open("rb") as stream:
        for place in sorted(places, key=lambda place: place.start):
            yield place, _read(folder, stream, place)


def _read(folder: Path, stream: io.BufferedReader, place: Place) -> Tensor:
    """Return an item's bytes [bytes] (uint8), verified."""
    data = torch.empty(place.bytes, dtype=torch.uint8)
    stream.seek(place.start)
    view = data.numpy().data
    if stream.readinto(view) != place.bytes or hashlib.sha256(view).hexdigest() != place.digest:
        raise FishError(
            f"{folder / place.file.name} is damaged: the item at byte {place.start} does not match its digest; load "
            f"another checkpoint"
        )
    return data


def _hand_over(data: Tensor, place: Place, request: ReadItem, planner: LoadPlanner) -> None:
    """Give the planner an object, or copy the part of a tensor that it asks for."""
    if request.type == LoadItemType.BYTE_IO:
        planner.load_bytes(request, io.BytesIO(data.numpy().tobytes()))
        return
    if place.dtype is None or place.sizes is None:
        raise ValueError(f"a tensor is to be loaded from the object {request.storage_index.fqn!r}")
    part = data.view(place.dtype).view(place.sizes)
    for dim, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
        part = part.narrow(dim, start, length)
    target = planner.resolve_tensor(request).detach()
    if target.shape != part.shape:  # copy_ would broadcast
        raise ValueError(f"{request.dest_index} has {list(target.shape)} places for {list(part.shape)} saved entries")
    target.copy_(part)
    planner.commit_tensor(request, target)


def _put(root: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    """Put a value into nested dicts (keys are strings) and lists (keys are numbers), making those that are missing."""
    node: Any = root
    for key, following in zip(path, (*path[1:], None), strict=True):
        if isinstance(node, list):
            node.extend([None] * (int(key) + 1 - len(node)))
        elif key not in node:
            node[key] = None
        if following is None:
            node[key] = value
        elif node[key] is None:
            node[key] = [] if isinstance(following, int) else {}
        node = node[key]
