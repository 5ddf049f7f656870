"""Whether all workers train the same thing: asked before anything else is exchanged.

A sum over workers whose masks differ is silently wrong, and with some backends a difference in size ends the process.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fishmask.errors import HandshakeError
from fishmask.fingerprint import describe, pieces
from fishmask.wire import Wire

Facts = dict[str, str | dict[str, str]]

# What a worker has come for: the first of the eight int64 with which it comes to anything that all do together, so that
# workers that have come for different things find that out, and do not take each other's bytes for their own.
FACTS, ROUND = 1, 2

_SHOWN = 5  # names of a long list
_ADVICE = {
    "mask": "choose the mask from scores of all workers (fishmask.exchange.choose), or from one seed, or load one file",
    "weights": "load the same model everywhere, and make a new head with the same seed before it is attached",
    "buffers": "load the same model everywhere",
    "values": "restore all workers from the same commit",
    "round": "restore all workers from the same commit",
}


def agree(wire: Wire, facts: Facts) -> None:
    """Compare facts with those of all other workers; a worker sends 64 bytes while they agree.

    Args:
        wire: The workers.
        facts: What must be equal, by a short name: a text, or texts by name.

    Raises:
        HandshakeError: They differ, or another worker has come to a round; on every worker, with the same text.
    """
    packed = json.dumps(facts).encode()  # as ordered: tensors laid end to end in another order do not add up
    digest = torch.frombuffer(bytearray(hashlib.sha256(packed).digest()), dtype=torch.int64)
    record = torch.cat([torch.tensor([FACTS]), digest, torch.zeros(3, dtype=torch.int64)])
    records = wire.gather(record)
    if bool((records == record).all()):
        # All that one worker sees equal, all see equal.
        return
    received = wire.gather_bytes(packed)
    elsewhere = [rank for rank, kind in enumerate(records[:, 0].tolist()) if kind == ROUND]
    if elsewhere:
        told = {rank: received[rank].decode() or "has come to a round instead" for rank in elsewhere}
        lines = [f"rank {rank}: {text}" for rank, text in told.items()]
        raise HandshakeError(
            "the workers could not compare what they train:\n  " + "\n  ".join(lines),
            {"failure": {text: [rank for rank, other in told.items() if other == text] for text in told.values()}},
        )
    everyone: list[Facts] = [json.loads(data) for data in received]
    names = dict.fromkeys(name for one in everyone for name in one)
    disagreements = {name: ranks for name in names if len(ranks := _ranks([one.get(name) for one in everyone])) > 1}
    lines = [_line(name, ranks, [one.get(name) for one in everyone]) for name, ranks in disagreements.items()]
    raise HandshakeError("the workers do not train the same thing:\n  " + "\n  ".join(lines), disagreements)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for every tensor its dtype, shape and CRC-32 of its raw bytes: to tell accidental differences apart."""
    return {name: f"{describe(tensor)} {_crc(tensor):08x}" for name, tensor in tensors.items()}


def _crc(tensor: Tensor) -> int:
    return reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces(tensor), 0)


def _ranks(held: list[Any]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(held):
        text = value if isinstance(value, str) else hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
        ranks.setdefault(text, []).append(rank)
    return ranks


def _line(fact: str, ranks: dict[str, list[int]], held: list[Any]) -> str:
    shown = "; ".join(
        f"{text} on rank{'s' if len(on) > 1 else ''} {', '.join(map(str, on))}" for text, on in ranks.items()
    )
    if all(isinstance(value, dict) for value in held):
        every = dict.fromkeys(name for value in held for name in value)
        differ = [name for name in sorted(every) if len({value.get(name) for value in held}) > 1]
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        shown = f"{', '.join(differ[:_SHOWN]) or 'in another order'}{more} (digest {shown})"
    advice = f": {_ADVICE[fact]}" if fact in _ADVICE else ""
    return f"{fact}: {shown}{advice}"
