"""The log of a distributed training: a JSON line when it begins, and one for every round."""

import json
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fishmask.errors import FishError

# What the line of a start says that a summary is made of.
_START = {"workers": int, "entries": int, "of": int, "dense_bytes": int, "every": int, "masks": str}


@dataclass(frozen=True)
class Round:
    """What one round did, as seen by one worker.

    Attributes:
        number: Of the round; the first is 1.
        step: Steps of this worker since training began.
        steps: Steps of this worker in this round.
        participants: How many workers have trained in it.
        payload_bytes: Bytes of values (and buffers) that this worker sent.
        other_bytes: Bytes of everything else that it sent since the last round: proposals, votes, a new mask.
        wait_seconds: Time until all workers had come to the round.
        wire_seconds: Time in the exchange after that.
        digest: SHA-256 (hex) over the merged values as little-endian float32; equal on all workers.
    """

    number: int
    step: int
    steps: int
    participants: int
    payload_bytes: int
    other_bytes: int
    wait_seconds: float
    wire_seconds: float
    digest: str


def write_start(path: Path, facts: dict[str, Any]) -> None:
    """Add the line that says what is trained and by which rules; a log may have several, one for every start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, {"rounds": facts})


def write_round(path: Path, done: Round) -> None:
    """Add the line of a round."""
    _append(path, {**asdict(done), "time": datetime.now(UTC).isoformat(timespec="milliseconds")})


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(record), file=file)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log of rounds.

    Raises:
        FishError: The file is none.
        OSError: It cannot be read.
    """
    try:
        records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise FishError(f"{path} is no log of rounds: {error}") from error
    if not records or not _is_start(records[0]):
        raise FishError(f"{path} is no log of rounds: LocalRounds(log=...) writes one")
    for number, record in enumerate(records, start=1):
        if not _is_start(record) and not _is_round(record):
            raise FishError(f"{path} is no log of rounds: line {number} is neither a start nor a round")
    return records


def _is_start(record: Any) -> bool:
    facts = record.get("rounds") if isinstance(record, dict) else None
    return isinstance(facts, dict) and all(isinstance(facts.get(name), kind) for name, kind in _START.items())


def _is_round(record: Any) -> bool:
    kinds = {item.name: (int, float) if item.type is float else item.type for item in fields(Round)}
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())  # type: ignore[arg-type]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up a log of rounds; bytes are those that the first worker sent.

    Per-step DDP and dense local SGD are what ring all-reduces of all gradients, after each step, or of all weights,
    after each round, send: 2 (W - 1)/W of their bytes. A round that was done again after a restart counts again, in
    all of them.
    """
    start: dict[str, Any] = {}
    per_step = per_round = 0.0
    done = []
    for record in records:
        if "rounds" in record:
            start = record["rounds"]
            continue
        done.append(record)
        dense = 2 * (start["workers"] - 1) / start["workers"] * start["dense_bytes"]
        per_step += dense * record["steps"]
        per_round += dense
    payload, other = (sum(record[name] for record in done) for name in ("payload_bytes", "other_bytes"))
    sent = payload + other
    return {
        "workers": start["workers"],
        "entries": start["entries"],
        "of": start["of"],
        "every": start["every"],
        "masks": start["masks"],
        "rounds": len({record["number"] for record in done}),
        "steps": max((record["step"] for record in done), default=0),
        "fewest_participants": min((record["participants"] for record in done), default=0),
        "payload_bytes": payload,
        "other_bytes": other,
        "ddp_bytes": round(per_step),
        "dense_local_sgd_bytes": round(per_round),
        "less_than_ddp": round(per_step / sent, 1) if sent else None,
        "less_than_dense_local_sgd": round(per_round / sent, 1) if sent else None,
        "wire_seconds": round(sum(record["wire_seconds"] for record in done), 4),
        "wait_seconds": round(sum(record["wait_seconds"] for record in done), 4),
        "digest": done[-1]["digest"] if done else None,
    }
