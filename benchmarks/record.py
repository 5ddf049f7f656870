"""What all benchmarks do with their results."""

import argparse
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that measures models of several sizes in a folder of its own."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--models", nargs="+", choices=("tiny", "minilm", "large"), default=["minilm", "large"], help="tiny is a check"
    )
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's folder of temporary files")
    parser.add_argument("--output", type=Path, help="append a JSON line per model and method to this file")


def quiet(threads: int) -> None:
    """Compute with so many threads, and have the libraries say nothing."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def report(
    console: Console, table: Any, verdicts: Iterable[str], lines: Iterable[Mapping[str, Any]], path: Path | None
) -> None:
    """Print a table and what it comes to, and append its lines to a file, if there is one."""
    console.print(table)
    for told in verdicts:
        console.print(told, highlight=False, soft_wrap=True)
    append(path, lines)


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
