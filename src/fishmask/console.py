"""What the commands print: results on stdout, progress and errors on stderr, and the exit code of an error."""

import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fishmask.errors import FishError

UNMET, USAGE = 1, 2
_MOST_BARS = 12
ORDER = (
    "demo",
    "score",
    "mask",
    "plan",
    "costs",
    "train",
    "predict",
    "delta",
    "checkpoints",
    "rounds",
    "plot",
    "glue",
    "report",
)


class Group(typer.core.TyperGroup):
    """The group of all commands; it turns every error that a user can meet into one line and an exit code.

    1: the command was understood but cannot be done (a damaged file, other weights, no such file).
    2: the command was not understood (an unknown option, a column that the table does not have).
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order in which a user needs them."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (FishError, OSError) as error:
            _fail(ctx, error, UNMET)
        except (ValueError, TypeError) as error:
            _fail(ctx, error, USAGE)


def _fail(ctx: Any, error: Exception, code: int) -> None:
    if ctx.params.get("traceback"):
        traceback.print_exception(error)
    text = " ".join(str(error).split())
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] [red]{escape(text)}[/]", highlight=False)
    raise typer.Exit(code) from error


class Bars:
    """Progress bars on stderr, one per phase; pass it wherever a ``progress`` is wanted.

    Bars are drawn only on a terminal: a log file gets no control characters.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of a phase are finished."""
        if phase not in self._tasks:
            finished = {task.id for task in self._progress.tasks if task.finished}
            over = [name for name, task in self._tasks.items() if task in finished]
            for name in over[: max(0, len(self._tasks) - _MOST_BARS + 1)]:  # a sweep has more phases than lines
                self._progress.remove_task(self._tasks.pop(name))
            self._tasks[phase] = self._progress.add_task(phase, total=total)
        self._progress.update(self._tasks[phase], completed=done, total=total)


@contextmanager
def bars() -> Iterator[Bars]:
    """Open the progress bars of one command."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show on a terminal that something of unknown length goes on."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else nullcontext():
        yield


def note(text: str) -> None:
    """Say something on stderr that is no result."""
    Console(stderr=True, soft_wrap=True).print(text, style="dim", highlight=False)


def report(result: Mapping[str, Any], as_json: bool, title: str) -> None:
    """Print a result: one JSON object for programs, or a table of two columns."""
    if as_json:
        print_json(result)
        return
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), escape(text_of(value)))
    Console().print(table)


def print_json(result: Any) -> None:
    """Print pure JSON on stdout, without colours or wrapping."""
    json.dump(result, sys.stdout, indent=2, default=str)
    print()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
    """Print a table; all columns but the first are right-aligned."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=caption or None,
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(text_of(value)) for value in row))
    Console().print(table)


def text_of(value: Any) -> str:
    """Write a value for a person: thousands separated, four digits of a fraction, lists joined."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    return str(value)
