"""The command line: ``fishmask COMMAND``. Every command is a thin call of the library."""

from pathlib import Path
from typing import Annotated

import typer

from fishmask import (
    __version__,
    cli_checkpoints,
    cli_costs,
    cli_delta,
    cli_glue,
    cli_mask,
    cli_plan,
    cli_rounds,
    cli_score,
    cli_train,
)
from fishmask.console import Group, bars, print_json, report

EPILOG = "Exit codes: 0 done, 1 cannot be done (one line on stderr says why), 2 not understood."
app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=EPILOG,
    help="Train a small, fixed share of a model's numbers, those with the largest Fisher information, "
    "and keep the result as a small file.\n\nStart with [bold]fishmask demo[/].",
)
app.command("score", no_args_is_help=True)(cli_score.score)
app.add_typer(cli_mask.app, name="mask")
app.command("plan", no_args_is_help=True)(cli_plan.plan)
app.command("costs")(cli_costs.costs)
app.command("train", no_args_is_help=True)(cli_train.train)
app.command("predict", no_args_is_help=True)(cli_train.predict)
app.add_typer(cli_delta.app, name="delta")
app.add_typer(cli_checkpoints.app, name="checkpoints")
app.command("rounds", no_args_is_help=True)(cli_rounds.rounds)
app.add_typer(cli_glue.app, name="glue")
app.command("report", no_args_is_help=True)(cli_glue.report_runs)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fishmask {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Print the Python traceback of an error too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command; :class:`Group` reads ``traceback``."""


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A mask file, a delta file, or the folder of a training run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture: .png, .svg or .pdf.")] = Path("mask.png"),
    json: cli_mask.Json = False,
) -> None:
    """Draw which layers a mask chose, and what kinds of parameters.

    Example: fishmask plot run -o mask.png
    """
    from fishmask.plot import plot_mask
    from fishmask.run import read_mask

    mask = read_mask(file)
    plot_mask(mask, output)
    report({"picture": output, "entries": mask.k, "density": mask.density}, json, "Mask")


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=2, help="Passes over the words, the same for all.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the heads, the batches and the random mask.")] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the files it leaves.")] = Path("runs/demo"),
    record: Annotated[bool, typer.Option(help="Also append the results to results/demo.jsonl.")] = False,
    json: cli_mask.Json = False,
) -> None:
    """Fine-tune MiniLM on rated words five ways, then reload the file that the robust recipe leaves.

    Takes about three minutes on two cores and needs no network. Fails if the reloaded predictions differ by a bit.

    Example: fishmask demo
    """
    from fishmask.demo import append, check_reload, run, show

    with bars() as progress:
        results = run(output, epochs=epochs, seed=seed, progress=progress)
    if record:
        append(Path("results/demo.jsonl"), results)
    if json:
        print_json(results)
    else:
        show(results)
    check_reload(results)


def main() -> None:
    """Run the command line."""
    app()
