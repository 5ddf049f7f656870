"""The commands ``fishmask train`` and ``fishmask predict``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fishmask.cli_mask import (
    Block,
    Density,
    Device,
    Exclude,
    Json,
    Keep,
    Label,
    MaxLength,
    Model,
    Pair,
    Task,
    Text,
    TrainingData,
    device_named,
)
from fishmask.cli_score import bytes_named
from fishmask.console import bars, report

RunFolder = Annotated[Path, typer.Argument(help="The folder of a training run.")]


def train(
    model: Model,
    data: TrainingData,
    text: Text = "text",
    label: Label = "label",
    pair: Pair = None,
    task: Task = "auto",
    validation: Annotated[Path | None, typer.Option(help="Examples to evaluate on after every epoch.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the delta, metrics and log.")] = Path(
        "run"
    ),
    recipe: Annotated[
        Literal["robust", "paper"] | None,
        typer.Option(
            help="Settings to start from, which every option given here overrules: robust, the default without "
            "--method and --mask, or paper."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How to choose the entries: fish, gradient, snip, magnitude, random, biases, movement, narrowing, "
            "diff; or lora, shira; or full, which trains everything and leaves a whole model. By default the recipe's."
        ),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Train the entries of this mask file instead.")] = None,
    density: Density = 0.005,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate, falling linearly to zero; by default the recipe's, else 5e-4, for full 5e-5."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; by default 3, in the paper 7")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    max_length: MaxLength = 128,
    seed: Annotated[int, typer.Option(help="Seed of everything random; the same seed gives the same delta.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no clipping.")] = 1.0,
    warm_up_head: Annotated[int, typer.Option(help="Steps that train the head alone, before scoring.")] = 0,
    keep: Keep = None,
    exclude: Exclude = None,
    among: Annotated[
        Literal["all", "layers"] | None,
        typer.Option(help="Choose among all entries, or among the weight matrices of the layers."),
    ] = None,
    block: Block = None,
    labels: Annotated[
        Literal["given", "expected", "sampled"], typer.Option(help="Labels of the Fisher score.")
    ] = "given",
    examples: Annotated[int, typer.Option(help="How many training examples to score.")] = 1024,
    engine: Annotated[Literal["auto", "batched", "loop"], typer.Option(help="How to score.")] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="bfloat16 runs the forward in autocast.")
    ] = "float32",
    step_budget: Annotated[
        float | None,
        typer.Option(
            help="Keep the mask to the last layers, so that a step costs at most this share of one with entries in all."
        ),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(help="Run the frozen layers below the mask once per example, and keep so much of them: 2GB."),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Commit every so many steps; the same command then goes on where it was interrupted."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Fine-tune a sequence-classification or regression model on your own table.

    Leaves delta.safetensors (the trained entries), config.json, run.json, metrics.json and log.jsonl in a folder.

    Example: fishmask train bert-base-uncased train.tsv --text sentence --label label --validation dev.tsv -o run
    """
    from fishmask.recipe import Recipe, preset
    from fishmask.run import train_table

    given: dict[str, Any] = {"method": method, "learning_rate": learning_rate, "epochs": epochs, "among": among}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {
        "density": density, "batch_size": batch_size, "max_length": max_length, "seed": seed, "clip": clip,
        "weight_decay": weight_decay, "warm_up_head": warm_up_head, "keep": tuple(keep or ()),
        "exclude": tuple(exclude or ()), "labels": labels, "examples": examples, "engine": engine,
        "precision": precision, "block": block or "", "step_budget": step_budget,
        "prefix_cache_bytes": 0 if prefix_cache is None else bytes_named(prefix_cache, "--prefix-cache"),
    }  # fmt: skip
    if recipe is not None or (method is None and mask is None):
        settings = preset(recipe or "robust", **given)
    else:  # what was not chosen by a recipe seldom bears its learning rate
        settings = Recipe(**{"learning_rate": 5e-5 if method == "full" else 5e-4, **given})
    columns = {"text": text, "label": label, "pair": pair, "task": task}
    with bars() as progress:
        metrics = train_table(
            model, data, settings, output, columns, validation=validation, mask=mask,
            checkpoint_every=checkpoint_every, device=device_named(device), progress=progress,
        )  # fmt: skip
    report(metrics, json, "Training")


def predict(
    run: RunFolder,
    data: Annotated[Path, typer.Argument(help="Examples: .csv, .tsv or .jsonl.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The predictions.")] = Path("predictions.jsonl"),
    base: Annotated[str | None, typer.Option(help="The base model; by default the one trained from.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts; by default as in training.")] = None,
    pair: Annotated[str | None, typer.Option(help="Column of the second texts; by default as in training.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of the labels; when given, the quality is reported.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Predict with a base model and the delta of a training run.

    Writes one JSON object per line and row of the table: the prediction, and for classes the probabilities.

    Example: fishmask predict run test.tsv --label label -o predictions.jsonl
    """
    from fishmask.run import predict_table

    with bars() as progress:
        result = predict_table(
            run, data, output, base=base, text=text, pair=pair, label=label, device=device_named(device),
            progress=progress,
        )  # fmt: skip
    report(result, json, "Predictions")
