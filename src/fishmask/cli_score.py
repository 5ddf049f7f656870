"""The command ``fishmask score``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fishmask.cli_mask import Device, Json, Label, MaxLength, Model, Pair, Text, TrainingData, device_named
from fishmask.console import bars, note, print_json, report

if TYPE_CHECKING:
    from fishmask.hub import Loaded
    from fishmask.scoring import Scoring

Method = Literal["fisher", "absolute", "gradient", "snip", "magnitude", "random"]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Batches = list[dict[str, Any]]


def score(
    model: Model,
    data: TrainingData,
    text: Text = "text",
    label: Label = "label",
    pair: Pair = None,
    task: Annotated[
        Literal["auto", "classification", "regression", "lm"],
        typer.Option(help="What the labels are; lm: none, the model predicts the next token of the texts."),
    ] = "auto",
    method: Annotated[Method, typer.Option(help="What to score by.")] = "fisher",
    labels: Annotated[
        Literal["given", "expected", "sampled"],
        typer.Option(help="Labels of the Fisher score: the data's (empirical), or the model's own."),
    ] = "given",
    examples: Annotated[int, typer.Option(help="How many examples to score.")] = 1024,
    engine: Annotated[
        Literal["auto", "batched", "loop"], typer.Option(help="Batched is fast; loop takes one example at a time.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 16,
    max_length: MaxLength = 128,
    seed: Annotated[int, typer.Option(help="Seed of the new head and of the examples drawn.")] = 0,
    device: Device = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Most that the running sums may take, such as 8GB; more passes if need be.")
    ] = None,
    sums: Annotated[Literal["device", "cpu"], typer.Option(help="Where the running sums are.")] = "device",
    work: Annotated[
        Path | None, typer.Option(help="Folder from which the same command goes on if it was interrupted.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it will take.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="The scores file.")] = Path("scores.safetensors"),
    json: Json = False,
) -> None:
    """Score every entry of a model: how much does it matter for these examples?

    Example: fishmask score bert-base-uncased train.csv --text sentence --label label -o scores.safetensors
    """
    from fishmask.fisher import prepared, scores
    from fishmask.scorefile import write_scores

    room = None if memory is None else bytes_named(memory, "--memory")
    place = device_named(device)
    whole = method in ("fisher", "absolute")
    if not whole and (dry_run or (room, sums, work) != (None, "device", None)):
        raise ValueError(f"--memory, --sums, --work and --dry-run are for fisher and absolute, not for {method}")
    for option, number in (("--batch-size", batch_size), ("--max-length", max_length)):
        if number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    if work is not None and output.resolve().is_relative_to(work.resolve()):
        raise ValueError(
            f"--output {output} is in the work folder {work}, which is deleted at the end; name another place"
        )
    loaded, batches, examples = _loaded(model, data, text, label, pair, task, examples, batch_size, max_length, seed)
    loaded.model.to(place)
    about = {"method": method, "labels": labels, "examples": examples, "seed": seed, "model": model}
    options: dict[str, Any] = {"labels": labels, "examples": examples, "engine": engine, "seed": seed}
    if method == "fisher" or method == "absolute":
        with prepared(loaded.model, batches, method=method, memory=room, sums=sums, folder=work, **options) as scoring:
            plan = scoring.plan()
            if dry_run:
                if json:
                    print_json(plan.facts())
                else:
                    typer.echo(plan)
                return
            note(str(plan))
            found = _run(scoring)
            write_scores(output, found, head=loaded.head, about=about)
            scoring.clear()  # in here nobody else has the folder
    else:
        found = scores(loaded.model, batches, method=method, **options)
        write_scores(output, found, head=loaded.head, about=about)
    report({"scores": output, **about, "parameters": len(found)}, json, "Scores")


def _run(scoring: "Scoring") -> Any:
    """Score with a progress bar over all passes."""
    with bars() as progress:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("scoring", done, scoring.steps)

        return scoring.run(advance)


def _loaded(
    model: str,
    data: Path,
    text: str,
    label: str,
    pair: str | None,
    task: Literal["auto", "classification", "regression", "lm"],
    examples: int,
    batch_size: int,
    max_length: int,
    seed: int,
) -> tuple["Loaded", Batches, int]:
    """Return the model for a task, the batches to score, and how many examples they hold."""
    from fishmask.data import encode, read_examples
    from fishmask.hub import load_for_training, load_language_model

    if task == "lm":
        if pair is not None:
            raise ValueError("--pair is for labelled texts; with --task lm put each example into one column")
        table = read_examples(data, text)
        loaded = load_language_model(model)
    else:
        table = read_examples(data, text, label, pair=pair, task=task)
        loaded = load_for_training(model, table.classes, seed=seed)
    encoded = encode(table, loaded.tokenizer, max_length)
    examples = min(examples, len(encoded))
    batches = encoded.sample(examples, batch_size, seed)
    return loaded, list(_next_tokens(batches) if task == "lm" else batches), examples


def _next_tokens(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Label each token with itself, which a language model shifts by one; padding counts for nothing."""
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def bytes_named(size: str, option: str) -> int:
    """Read an option's size such as ``8GB``, ``500MB`` or a plain number of bytes."""
    number, unit = size.strip().upper(), 1
    for suffix, factor in _UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{option} {size}: expected a size such as 8GB, 500MB or a number of bytes") from error
