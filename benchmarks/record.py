"""What all benchmarks do with their results."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: Path | None, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append results as JSON lines to a file, made with its folder when missing; None for nowhere."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def verdict(reached: bool) -> str:
    """Return how a target is reported."""
    return "PASS" if reached else "FAIL"
