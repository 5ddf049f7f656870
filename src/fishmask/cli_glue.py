"""The commands ``fishmask glue ...`` and ``fishmask report``."""

import os
import sys
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fishmask.cli_mask import Density, Device, Json, MaxLength, device_named
from fishmask.console import bars, note, print_json, print_table, report

Data = Annotated[
    str, typer.Argument(help="A folder in GLUE's own layout, or nyu-mll/glue or a copy of it for the hub's.")
]
Runs = Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs; what is finished in it is kept.")]
Task = Annotated[list[str] | None, typer.Option(help="A task, such as RTE (repeatable); all that the folder has.")]
Base = Annotated[str, typer.Option("--model", help="A local model folder, or a name on the Hugging Face hub.")]
Method = Annotated[
    list[str] | None, typer.Option(help="A method (repeatable): `fishmask glue methods` lists them; all by default.")
]
Rates = Annotated[
    list[str] | None,
    typer.Option(help="Learning rates to try: 1e-3,3e-3, or for one method biases=1e-3,1e-2 (repeatable)."),
]
BatchSizes = Annotated[str, typer.Option("--batch-size", help="Batch sizes to try, such as 8,16.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of the best setting; the first one searches.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training data.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no clipping.")]
Examples = Annotated[int, typer.Option(help="How many training examples to score.")]
Padding = Annotated[
    Literal["longest", "max"],
    typer.Option(help="Batches of like length padded to their longest; or, as in the paper, to the full length."),
]
Precision = Annotated[Literal["float32", "bfloat16"], typer.Option(help="bfloat16 runs the forward in autocast.")]
Rows = Annotated[int | None, typer.Option(help="Use only so many training rows of a task, those held out included.")]
HeldOut = Annotated[float, typer.Option(help="Share of the training rows to choose learning rates on.")]
SearchRows = Annotated[int | None, typer.Option(help="Search with only so many of the rows to train on.")]
SearchEpochs = Annotated[int | None, typer.Option(help="Search with only so many epochs.")]
Workers = Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")]

app = typer.Typer(no_args_is_help=True, help="The GLUE benchmark: compare methods, search, ablate, submit.")


@app.command(no_args_is_help=True)
def run(
    data: Data,
    task: Task = None,
    model: Base = "bert-large-cased-whole-word-masking",
    output: Runs = Path("runs/glue"),
    method: Method = None,
    rates: Rates = None,
    batch_size: BatchSizes = "8,16",
    seeds: Seeds = 3,
    density: Density = 0.005,
    epochs: Epochs = 7,
    max_length: MaxLength = 128,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    examples: Examples = 1024,
    padding: Padding = "longest",
    precision: Precision = "float32",
    rows: Rows = None,
    held_out: HeldOut = 0.1,
    search_rows: SearchRows = None,
    search_epochs: SearchEpochs = None,
    workers: Workers = 1,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare methods on GLUE tasks: search each one's rate and batch size, then run the best with several seeds.

    The defaults are the paper's settings. Choices are made on rows held out of train; the dev set is the test set.
    Run the same command again after a kill, or with more seeds, methods or tasks: finished runs are kept.

    Example: fishmask glue run glue --task RTE --task MRPC --method full --method fish-paper -o runs/glue
    """
    from fishmask.methods import variants

    common = _recipe(density, epochs, max_length, weight_decay, clip, examples, padding, precision)
    found = variants(method, common, _rates(rates), _sizes(batch_size))
    _sweep(data, task, model, output, found, seeds, rows, held_out, search_rows, search_epochs, workers, device, json)


@app.command(no_args_is_help=True)
def ablate(
    setting: Annotated[
        Literal["density", "examples", "labels", "score"],
        typer.Argument(help="What to vary: density, number of examples scored, label convention, g² against |g|."),
    ],
    data: Data,
    task: Task = None,
    values: Annotated[str | None, typer.Option(help="The values, such as 0.001,0.005; the paper's by default.")] = None,
    model: Base = "bert-large-cased-whole-word-masking",
    output: Runs = Path("runs/glue"),
    method: Method = None,
    rates: Rates = None,
    batch_size: BatchSizes = "16",
    seeds: Seeds = 3,
    density: Density = 0.005,
    epochs: Epochs = 7,
    max_length: MaxLength = 128,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    examples: Examples = 1024,
    padding: Padding = "longest",
    precision: Precision = "float32",
    rows: Rows = None,
    held_out: HeldOut = 0.1,
    search_rows: SearchRows = None,
    search_epochs: SearchEpochs = None,
    workers: Workers = 1,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Vary one setting, as in Figure 2 of the paper, all else as in `fishmask glue run`.

    By default the paper's FISH mask, and for the density a random mask beside it.

    Example: fishmask glue ablate density glue --task RTE -o runs/glue
    """
    from fishmask.methods import ablation, variants

    names = method or (["fish-paper", "random"] if setting == "density" else ["fish-paper"])
    common = _recipe(density, epochs, max_length, weight_decay, clip, examples, padding, precision)
    base = variants(names, common, _rates(rates), _sizes(batch_size))
    found = ablation(base, setting, None if values is None else values.split(","))
    _sweep(
        data, task, model, output, found, seeds, rows, held_out, search_rows, search_epochs, workers, device, json,
        varied=(setting,),
    )  # fmt: skip


@app.command()
def methods(json: Json = False) -> None:
    """List the methods and the learning rates that are tried for each.

    Example: fishmask glue methods
    """
    from fishmask.methods import METHODS

    if json:
        print_json({name: {"rates": method.rates, "about": method.about} for name, method in METHODS.items()})
        return
    lines = [(name, ", ".join(f"{rate:g}" for rate in method.rates), method.about) for name, method in METHODS.items()]
    print_table("Methods", ("method", "learning rates", "what trains"), lines)


@app.command(no_args_is_help=True)
def submit(
    runs: Annotated[Path, typer.Argument(help="The folder of the runs.")],
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("submission"),
    task: Task = None,
    method: Annotated[str | None, typer.Option(help="Take runs of this method only.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model; by default the one trained from.")] = None,
    fill: Annotated[
        bool, typer.Option(help="Put meaningless predictions into the files of tasks that have no run.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write the benchmark's submission: predictions of each task's best run for its test set, zipped.

    The best run is the one with the best score on the rows held out of train.

    Example: fishmask glue submit runs/glue glue -o submission
    """
    from fishmask.methods import METHODS
    from fishmask.submission import submit as write

    # In records a method of `fishmask glue run` has the name that tables show.
    variant = method.replace("-", " ") if method in METHODS else method

    with bars() as progress:
        result = write(
            runs, data, output, tasks=task or (), variant=variant, base=model, fill=fill, device=device_named(device),
            progress=progress,
        )  # fmt: skip
    report(result, json, "Submission")


def report_runs(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or .jsonl files of their records.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("report"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "fishmask report",
    json: Json = False,
) -> None:
    """Write tables (report.md), plots (.png, .svg) and one self-contained page (report.html) about runs.

    Example: fishmask report runs/glue -o report
    """
    from fishmask.report import report as write

    report(write(runs, output, title), json, "Report")


def _recipe(
    density: float, epochs: int, max_length: int, weight_decay: float, clip: float, examples: int, padding: Any,
    precision: Any,
) -> Any:  # fmt: skip
    from fishmask.recipe import Recipe

    return Recipe(
        density=density, epochs=epochs, max_length=max_length, weight_decay=weight_decay, clip=clip, examples=examples,
        padding=padding, precision=precision,
    )  # fmt: skip


def _rates(options: list[str] | None) -> dict[str, tuple[float, ...]]:
    """Read the learning rates: under the name of a method, or under "" for those of all others."""
    found: dict[str, tuple[float, ...]] = {}
    for option in options or ():
        name, _, values = option.rpartition("=")
        found[name] = (*found.get(name, ()), *_numbers(values, float, "--rates"))
    return found


def _sizes(option: str) -> tuple[int, ...]:
    return _numbers(option, int, "--batch-size")


def _numbers(text: str, kind: Any, option: str) -> tuple[Any, ...]:
    try:
        numbers = tuple(kind(value) for value in text.split(","))
        if not all(map(isfinite, numbers)):
            raise ValueError("not finite")
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from error
    return numbers


def _sweep(
    data: str, task: list[str] | None, model: str, output: Path, found: Any, seeds: int, rows: int | None,
    held_out: float, search_rows: int | None, search_epochs: int | None, workers: int, device: str, json: bool,
    varied: tuple[str, ...] = (),
) -> None:  # fmt: skip
    from fishmask.glue import glue_task, tasks_in
    from fishmask.sweep import Sweep, run_sweep

    asked = dict.fromkeys(glue_task(name).name for name in task or ())
    names = list(asked) or [known.name for known in tasks_in(data)]
    if not names:
        raise ValueError(f"{data} has no task in GLUE's layout, such as RTE/train.tsv; or name tasks with --task")
    if workers > (os.cpu_count() or 1):
        note(f"{workers} workers share {os.cpu_count()} cores")
    sweep = Sweep(
        data, model, tuple(names), found, tuple(range(seeds)), rows, held_out, search_rows, search_epochs,
        device_named(device),
    )  # fmt: skip
    with bars() as progress:
        records = run_sweep(sweep, output, workers=workers, progress=progress, told=_tell)
    if json:
        print_json(records)
        return
    columns = (*varied, "learning_rate", "batch_size", "seed")
    lines = [
        (
            record["task"],
            record["variant"],
            *(record["recipe"][setting] for setting in columns),
            *(_percent(record.get(part)) for part in ("validation", "test")),
        )
        for record in records
    ]
    headings = (*varied, "rate", "batch", "seed")
    print_table("Runs", ("task", "method", *headings, "validation", "test"), lines)
    note(f"`fishmask report {output}` sums them up")


def _tell(record: dict[str, Any]) -> None:
    """Say that a run is done, where there are no bars: a log should tell that something goes on."""
    if not sys.stderr.isatty():
        recipe, score = record["recipe"], _percent(record.get("validation"))
        setting = f"rate {recipe['learning_rate']:g}, batch {recipe['batch_size']}, seed {recipe['seed']}"
        note(f"{record['task']} {record['variant']}, {setting}: validation {score}")


def _percent(scores: dict[str, float] | None) -> str:
    return "diverged" if scores is None else f"{scores['score']:.2%}"
