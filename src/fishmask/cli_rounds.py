"""The command ``fishmask rounds``."""

from pathlib import Path
from typing import Annotated

import typer

from fishmask.cli_mask import Json
from fishmask.console import report


def rounds(
    log: Annotated[Path, typer.Argument(help="The file that LocalRounds(log=...) has written.")], json: Json = False
) -> None:
    """Summarise the exchanges of a distributed training, beside what DDP and dense local SGD would have sent.

    Example: fishmask rounds run/rounds.jsonl
    """
    from fishmask.round_log import read_log, summary

    report(summary(read_log(log)), json, str(log))
