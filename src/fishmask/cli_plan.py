"""The command ``fishmask plan``."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fishmask.cli_mask import Json, Model
from fishmask.console import note, print_json, print_table, working
from fishmask.errors import FishError

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_BESIDE = ("lora:16", "full")
_NAMES = {"fish": "mask", "lora:16": "LoRA r=16", "full": "full"}


def plan(
    model: Model,
    batch: Annotated[str, typer.Option(help="Examples and tokens of each: 16x128.")] = "16x128",
    density: Annotated[
        float | None, typer.Option(help="Share of all entries to train, drawn at random; 0.005 where nothing is said.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="The mask itself: a mask file, a delta file, or the folder of a training run.")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="That of the weights; the model's own by default.")
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "sgd"], typer.Option(help="Whose state to reckon with.")
    ] = "adamw",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in the backward.")
    ] = False,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Whose kernels to reckon with; it need not be there.")
    ] = "cpu",
    compare: Annotated[bool, typer.Option("--compare", help="Set LoRA and full fine-tuning beside it.")] = False,
    json: Json = False,
) -> None:
    """Tell how much memory a training step takes, by parts, without loading the weights.

    Example: fishmask plan bert-base-uncased --density 0.005 --batch 16x128 --compare
    """
    import torch

    from fishmask.forecast import PARTS, forecast, size_text
    from fishmask.run import read_mask

    shape = re.fullmatch(r"(\d+)x(\d+)", batch)
    if shape is None:
        raise ValueError(f"--batch is examples x tokens, such as 16x128; got {batch!r}")
    common: dict[str, Any] = {
        "batch": (int(shape[1]), int(shape[2])),
        "optimizer": optimizer,
        "dtype": None if dtype is None else getattr(torch, _DTYPES[dtype]),
        "device": device,
        "checkpointing": gradient_checkpointing,
    }
    with working("running a step without data"):
        told = [forecast(model, density=density, mask=None if mask is None else read_mask(mask), **common)]
        for method in _BESIDE if compare else ():
            try:
                told.append(forecast(model, method=method, **common))
            except FishError as error:
                note(f"{_NAMES[method]} is left out: {error}")
    if json:
        print_json([one.record() for one in told] if compare else told[0].record())
        return
    columns = [_NAMES[one.method] for one in told]
    rows = [[label, *(size_text(one.parts[part]) for one in told)] for part, label in PARTS.items()]
    rows.append(["at the peak", *(size_text(one.peak) for one in told)])
    rows.append(["trained entries", *(f"{one.trained:,}" for one in told)])
    first = told[0]
    title = f"Memory of a training step: {first.n:,} entries, {batch} tokens, {first.dtype}, {optimizer}, {device}"
    print_table(title, ["", *columns], rows)
    if device == "cuda":
        note(f"In the host's memory: {size_text(first.host)} for the mask.")
    kept = ", what glibc keeps of freed memory" if device == "cpu" else ""
    note(f"Besides: what the process and its libraries take{kept}, and what the allocator rounds up.")
