"""What do structured masks cost in accuracy? Entries, blocks, rows and columns at an equal budget, on MiniLM.

    python -m experiments.structured                             # the rated words, which install with the demo
    python -m experiments.structured --glue DATA --task MRPC     # DATA is a folder in GLUE's own layout

Density 0.5 %, the new head whole and inside the budget. Masks by Fisher scores, and masks drawn at random in the weight
matrices of the layers (the library's recipe). Where there are several learning rates, each mask takes the one that is
best on the validation part with the first seed. MRPC takes the rates of its tables in docs/glue.md, and its rows.

Appends one JSON line per run to results/structured.jsonl and skips the runs that are there already.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fishmask.choose import outside_of_layers
from fishmask.data import Encoded, Examples, encode, rated_words
from fishmask.demo import model_folder
from fishmask.fisher import scores
from fishmask.glue import glue_task, hold_out, read_glue
from fishmask.hub import Loaded, load_for_training
from fishmask.mask import Mask
from fishmask.measure import environment
from fishmask.recipe import Recipe, recipe_from
from fishmask.train import evaluate, fit

RESULTS = Path("results/structured.jsonl")
BLOCKS = ("", "1x16", "16x16", "rows", "columns")
NAMES = {"": "single entries", "1x16": "1 x 16", "16x16": "16 x 16", "rows": "rows", "columns": "columns"}
_WORDS = Recipe(epochs=3, batch_size=32, max_length=16)
_MRPC = Recipe(epochs=4, batch_size=32, max_length=128, precision="bfloat16")
RECIPES = {"words": _WORDS, "MRPC": _MRPC}
METHODS: dict[str, dict[str, Any]] = {"fish": {"method": "fish"}, "random": {"method": "random", "among": "layers"}}
RATES = {
    ("words", "fish"): (1e-3, 3e-3),
    ("words", "random"): (1e-2,),
    ("MRPC", "fish"): (1e-3,),
    ("MRPC", "random"): (1e-2,),
}
MRPC_ROWS, MRPC_HELD_OUT = 2000, 0.2
TITLES = {"fish": "Fisher scores, all parameters", "random": "at random, matrices of the layers"}
METRICS = {"words": "pearson", "MRPC": "accuracy"}
Record = dict[str, Any]


# --- the runs ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def examples(task: str, source: str | None) -> dict[str, Examples]:
    """Return the parts of a task: to train on, to choose on ("validation"), and to report ("test")."""
    if task == "words":
        return {part: rated_words(part) for part in ("train", "validation", "test")}
    if source is None:
        raise SystemExit(f"{task} needs its data: --glue FOLDER")
    glue = glue_task(task)
    train, validation = hold_out(read_glue(source, glue, "train")[""], MRPC_HELD_OUT, MRPC_ROWS)
    return {"train": train, "validation": validation, "test": read_glue(source, glue, "dev")[""]}


@lru_cache(maxsize=1)
def begin(task: str, source: str | None, seed: int, max_length: int) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
    """Return the encoded parts, and the Fisher scores, which are the same for all masks of a seed."""
    parts = examples(task, source)
    loaded = _load(parts, seed)
    encoded = {name: encode(part, loaded.tokenizer, max_length) for name, part in parts.items()}
    count = min(Recipe().examples, len(encoded["train"]))
    batches = encoded["train"].sample(count, RECIPES[task].batch_size, seed)
    return encoded, scores(loaded.model, batches, examples=count)


def run(task: str, recipe: Recipe, source: str | None = None) -> Record:
    """Train by one recipe and return its record: quality on both parts, entries, and the bytes of the delta."""
    data, found = begin(task, source, recipe.seed, recipe.max_length)
    loaded, block = _load(examples(task, source), recipe.seed), recipe.block or None
    if recipe.method == "fish":
        mask = Mask.from_scores(found, recipe.density, keep=loaded.head, block=block)
    else:
        rest = outside_of_layers(loaded.model, loaded.head)
        mask = Mask.random(loaded.model, recipe.density, recipe.seed, keep=loaded.head, exclude=rest, block=block)
    outcome = fit(loaded.model, data["train"], replace(recipe, block=""), head=loaded.head, mask=mask)  # chosen above
    quality = {part: evaluate(loaded.model, data[part], recipe.precision) for part in ("validation", "test")}
    assert outcome.tuning is not None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "delta"
        outcome.tuning.delta().save(file)
        size = file.stat().st_size
    layers = {layer: chosen for layer, chosen, _ in mask.groups()}
    about = {"entries": mask.k, "layers": layers, "file_bytes": size, "rows": len(data["train"])}
    return {"task": task, **quality, **about, "recipe": asdict(recipe), **environment()}


def _load(parts: Mapping[str, Examples], seed: int) -> Loaded:
    return load_for_training(model_folder(), parts["train"].classes, seed=seed)


def records() -> list[Record]:
    """Return the records there are."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def result(task: str, recipe: Recipe, source: str | None) -> float:
    """Return the validation quality of a recipe, from the records or from a new run."""
    for record in records():
        if record["task"] == task and recipe_from(record["recipe"]) == recipe:
            return float(record["validation"][METRICS[task]])
    record = run(task, recipe, source)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        print(json.dumps(record), file=file)
    found = [record[part][METRICS[task]] for part in ("validation", "test")]
    print(
        f"{task} {recipe.method} {NAMES[recipe.block]} {recipe.learning_rate:g} seed {recipe.seed}: "
        f"{METRICS[task]} {found[0]:.4f} validation, {found[1]:.4f} test",
        flush=True,
    )
    return float(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", help="a folder in GLUE's own layout, for MRPC")
    parser.add_argument("--task", choices=("words", "MRPC"), default="words")
    parser.add_argument("--method", nargs="+", choices=("fish", "random"), default=["fish", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    task, first = options.task, options.seeds[0]
    for method in options.method:
        recipe = replace(RECIPES[task], **METHODS[method])
        best = dict.fromkeys(BLOCKS, RATES[task, method][0])
        if len(RATES[task, method]) > 1:
            for block in BLOCKS:
                tried = {
                    rate: result(task, replace(recipe, block=block, learning_rate=rate, seed=first), options.glue)
                    for rate in RATES[task, method]
                }
                best[block] = max(tried, key=tried.__getitem__)
        for seed in options.seeds:  # seed by seed, which share their scores
            for block in BLOCKS:
                one = replace(recipe, block=block, learning_rate=best[block], seed=seed)
                result(task, one, options.glue)


# --- the table --------------------------------------------------------------------------------------------------------


def table(lines: Sequence[Record]) -> str:
    """Return the Markdown table of the runs: a row for each kind of mask, a column for each task.

    Words are reported at the rate that is best on validation with seed 0; the rates stand beside.
    """
    rows = []
    for method, title in TITLES.items():
        for block in BLOCKS:
            cells = [f"{title}: {NAMES[block]}"]
            known: list[Record] = []
            for task in METRICS:
                runs = list(_of(lines, task, method, block))
                known += runs
                cells += _cells(task, runs)
            if known:
                entries = mean(record["entries"] for record in known)
                size = mean(record["file_bytes"] / record["entries"] for record in known)
                cells += [f"{round(entries):,}", f"{size:.3f}"]
                rows.append(cells)
    columns = ["mask", "words, Pearson", "rate", "MRPC, accuracy", "rate", "entries", "bytes per entry"]
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def _of(lines: Sequence[Record], task: str, method: str, block: str) -> Iterator[Record]:
    for line in lines:
        if line["task"] == task and (line["recipe"]["method"], line["recipe"]["block"]) == (method, block):
            yield line


def _cells(task: str, runs: Sequence[Record]) -> list[str]:
    """Return mean, spread and number of seeds at the rate that did best on validation with seed 0, and that rate."""
    first = [record for record in runs if record["recipe"]["seed"] == 0]
    if not first:
        return ["", ""]
    rate = max(first, key=lambda record: record["validation"][METRICS[task]])["recipe"]["learning_rate"]
    values = [record["test"][METRICS[task]] for record in runs if record["recipe"]["learning_rate"] == rate]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return [f"{mean(values):.3f}{spread} ({len(values)})", f"{rate:g}"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
