"""The command ``fishmask rounds``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fishmask.cli_mask import Json
from fishmask.console import print_json, report
from fishmask.errors import FishError


def rounds(
    log: Annotated[Path, typer.Argument(help="The file that LocalRounds(log=...) has written.")], json: Json = False
) -> None:
    """Summarise the exchanges of a distributed training, and what others would have sent.

    Example: fishmask rounds run/rounds.jsonl
    """
    facts = summary(read(log))
    if json:
        print_json(facts)
    else:
        report(facts, False, str(log))


def read(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log of rounds.

    Raises:
        FishError: It is none, or has no round.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    try:
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        known = bool(records) and "rounds" in records[0] and all("rounds" in r or "digest" in r for r in records)
    except (ValueError, TypeError) as error:
        raise FishError(f"{log} is no log of rounds: {error}") from error
    if not known:
        raise FishError(f"{log} is no log of rounds: LocalRounds(log=...) writes one")
    return records


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up a log of rounds; bytes are those that rank 0 sent.

    Per-step DDP and dense local SGD are what ring all-reduces of all gradients, after each step, or of all weights,
    after each round, send: 2 (W - 1)/W of their bytes.
    """
    per_step = per_round = 0.0
    latest: dict[int, dict[str, Any]] = {}  # a round that was done again after a restart counts as often as it was sent
    start: dict[str, Any] = {}
    done = []
    for record in records:
        if "rounds" in record:
            start = record["rounds"]
            continue
        done.append(record)
        latest[record["number"]] = record
        dense = 2 * (start["workers"] - 1) / start["workers"] * start["dense_bytes"]
        per_step += dense * record["steps"]
        per_round += dense
    sent = sum(r["payload_bytes"] + r["other_bytes"] for r in done)
    return {
        "workers": start["workers"],
        "rounds": len(latest),
        "steps": max((r["step"] for r in done), default=0),
        "every": start["every"],
        "entries": start["k"],
        "of": start["n"],
        "masks": start["masks"],
        "payload_bytes": sum(r["payload_bytes"] for r in done),
        "other_bytes": sum(r["other_bytes"] for r in done),
        "ddp_bytes": round(per_step),
        "dense_rounds_bytes": round(per_round),
        "less_than_ddp": round(per_step / sent, 1) if sent else None,
        "less_than_dense_rounds": round(per_round / sent, 1) if sent else None,
        "wire_seconds": round(sum(r["wire_seconds"] for r in done), 4),
        "wait_seconds": round(sum(r["wait_seconds"] for r in done), 4),
        "fewest_participants": min((r["participants"] for r in done), default=0),
        "digest": done[-1]["digest"] if done else None,
    }
