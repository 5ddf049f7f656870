"""Messages of weight sync: a few contiguous tensors and a small dict, in pieces of bounded size."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fishmask.container import bytes_tensor
from fishmask.errors import FishError
from fishmask.fingerprint import element_bytes
from fishmask.wire import Wire

VERSION = 1
_KEY = "fishmask_sync"


@dataclass(frozen=True)
class Message:
    """One part of an update: plain tensors and a dict that goes through JSON. Send it by any means.

    Attributes:
        facts: ``stream`` (which sender), ``update`` (its number), ``part`` of ``parts``, ``start`` (whether the update
            begins at the base), ``digest``; the first part of an update with another mask has the ``layout``, too.
        tensors: Contiguous 1-D tensors: pieces of the index ("indices", int32), of the values ("values/bfloat16"), of
            entries that are trained no more ("settled_indices", "settled/bfloat16"), of buffers ("buffers/<name>").
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check(self) -> None:
        """Raise FishError unless the message is whole, and says all that it must."""
        if not isinstance(self.facts, dict):
            raise FishError(f"the facts of a message are a dict, got a {type(self.facts).__name__}")
        facts = {name: fact for name, fact in self.facts.items() if name != "digest"}
        if facts.get("version") != VERSION:
            raise FishError(f"this message is of version {facts.get('version')}; this fishmask reads {VERSION}")
        if wrong := [name for name, tensor in self.tensors.items() if tensor.ndim != 1]:
            raise FishError(f"the tensors of a message have one dimension, and these have not: {', '.join(wrong)}")
        if self.facts.get("digest") != _digest(facts, self.tensors):
            raise FishError("this message was damaged on its way: have it sent again")
        if faults := _faults(facts):
            raise FishError(f"this message was made by a faulty program: {'; '.join(faults)}")

    def to_bytes(self) -> bytes:
        """Return the message as a safetensors file in memory."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, {_KEY: json.dumps(self.facts)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Message":
        """Return the message that ``to_bytes`` wrote.

        Raises:
            FishError: The bytes are no such message, or not all of one.
        """
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return cls(json.loads(header["__metadata__"][_KEY]), tensors)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FishError(f"these {len(data)} bytes are not a message of fishmask.sync: {error}") from error


def cut(facts: dict[str, Any], layout: dict[str, Any] | None, vectors: dict[str, Tensor], size: int) -> list[Message]:
    """Cut vectors into messages of at most ``size`` bytes of tensors each.

    Args:
        facts: What all parts say.
        layout: What the first one says besides.
        vectors: 1-D tensors, in the order in which they are sent.
        size: At least one element.
    """
    parts: list[dict[str, Tensor]] = [{}]
    room = size
    for name, vector in vectors.items():
        begin, width = 0, vector.element_size()
        while begin < len(vector):
            if room < width:
                parts.append({})
                room = size
            piece = vector[begin : begin + room // width]
            parts[-1][name] = piece
            begin, room = begin + len(piece), room - piece.nbytes
    messages = []
    for number, tensors in enumerate(parts):
        own = {**facts, "version": VERSION, "part": number, "parts": len(parts)}
        if number == 0 and layout is not None:
            own["layout"] = layout
        messages.append(Message({**own, "digest": _digest(own, tensors)}, tensors))
    return messages


def broadcast(
    messages: Sequence[Message] = (), *, src: int = 0, group: dist.ProcessGroup | None = None
) -> list[Message]:
    """Send messages from one worker of a process group to all others; all of them call it.

    Args:
        messages: What rank ``src`` sends; the others leave it out.
        src: Rank of the sender in the group.
        group: The process group, of gloo or NCCL; by default that of all workers.

    Returns:
        The messages, on all workers. With NCCL their tensors are on the current GPU.

    Raises:
        RoundError: The connection broke off.
    """
    wire = Wire(group)
    if wire.rank == src:
        about = [[m.facts, [[n, str(t.dtype)[6:], len(t)] for n, t in m.tensors.items()]] for m in messages]
        text = bytes_tensor(json.dumps(about).encode()).to(wire.device)
        wire.spread(torch.tensor([len(text)], device=wire.device), src)
        wire.spread(text, src)
        for message in messages:
            for tensor in message.tensors.values():
                wire.spread(tensor.detach().to(wire.device).contiguous().view(torch.uint8), src)
        return list(messages)
    length = torch.zeros(1, dtype=torch.int64, device=wire.device)
    wire.spread(length, src)
    text = torch.empty(int(length), dtype=torch.uint8, device=wire.device)
    wire.spread(text, src)
    received = []
    for facts, described in json.loads(text.cpu().numpy().tobytes()):
        tensors = {n: torch.empty(size, dtype=getattr(torch, dt), device=wire.device) for n, dt, size in described}
        for tensor in tensors.values():
            wire.spread(tensor.view(torch.uint8), src)
        received.append(Message(facts, tensors))
    return received


def joined(messages: Iterable[Message]) -> dict[str, Tensor]:
    """Return the whole vectors that were cut into these messages."""
    pieces: dict[str, list[Tensor]] = {}
    for message in messages:
        for name, piece in message.tensors.items():
            pieces.setdefault(name, []).append(piece)
    return {name: torch.cat(own) for name, own in pieces.items()}


def _faults(facts: dict[str, Any]) -> list[str]:
    """List what is not as every sender says it."""
    kinds = {"stream": str, "update": int, "part": int, "parts": int, "start": bool}
    faults = [
        f"{name} is {facts.get(name)!r}, expected {kind.__name__}"
        for name, kind in kinds.items()
        if type(facts.get(name)) is not kind  # True is no number
    ]
    if faults:
        return faults
    if not 0 <= facts["part"] < facts["parts"] or facts["update"] < 0:
        return [f"it is part {facts['part']} of {facts['parts']} of update {facts['update']}"]
    layout = facts.get("layout")
    if layout is None:
        return ["it starts at the base, and has no layout"] if facts["start"] and facts["part"] == 0 else []
    if not isinstance(layout, dict):
        return [f"its layout is a {type(layout).__name__}, expected a dict"]
    if not isinstance(layout.get("mask"), str):
        faults.append("its layout has no digest of the mask")
    for name in ("entries", "settled", "shapes", "dtypes", *(["base"] if facts["start"] else [])):
        if not isinstance(layout.get(name), dict):
            faults.append(f"its layout has no {name}")
    return faults or _layout_faults(layout)


def _layout_faults(layout: dict[str, Any]) -> list[str]:
    """List what the parts of a layout say that does not fit each other."""
    faults = []
    for kind in ("entries", "settled"):
        faults += [
            f"{name} has {count!r} {kind}"
            for name, count in layout[kind].items()
            if type(count) is not int or count < 0
        ]
    described = layout["entries"].keys() | layout["settled"].keys()
    if not described == layout["shapes"].keys() == layout["dtypes"].keys():
        faults.append("its layout does not give each parameter a shape and a dtype")
    for name, shape in layout["shapes"].items():
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            faults.append(f"{name} has the shape {shape!r}")
    return faults


def _digest(facts: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\n{name} {tensor.dtype} {len(tensor)}\n".encode())
        sha.update(element_bytes(tensor))
    return sha.hexdigest()
