"""Choose the demo's learning rates on the validation part of the rated words; the test part is never read.

    python -m experiments.demo_search [METHOD ...]

For every method the grid of half-decades is walked from the recipe's own rate until the best learning rate has a worse
neighbour on both sides. One seed, the demo's own recipe otherwise. Appends one JSON line per run to
results/demo_search.jsonl and skips the runs that are there already; prints the best rate of every method, to be written
into `fishmask.demo.RECIPES`.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fishmask.console import bars, print_table
from fishmask.data import encode, rated_words
from fishmask.demo import RECIPES, model_folder
from fishmask.hub import load_for_training
from fishmask.measure import environment
from fishmask.recipe import Recipe, recipe_from
from fishmask.train import evaluate, fit

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RESULTS = Path("results/demo_search.jsonl")


def measure(recipe: Recipe, progress: Any) -> dict[str, Any]:
    """Train by one recipe and return the record of the run, measured on the validation part."""
    loaded = load_for_training(model_folder(), seed=recipe.seed)
    train, validation = (
        encode(rated_words(part), loaded.tokenizer, recipe.max_length) for part in ("train", "validation")
    )
    outcome = fit(loaded.model, train, recipe, head=loaded.head, progress=progress)
    quality = evaluate(loaded.model, validation)
    return {"part": "validation", **quality, "entries": outcome.entries, "recipe": asdict(recipe), **environment()}


def known() -> list[dict[str, Any]]:
    """Return the records there are."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def result(recipe: Recipe) -> float:
    """Return the validation Pearson of a recipe, from the records or from a new run."""
    for record in known():
        if recipe_from(record["recipe"]) == recipe:
            return float(record["pearson"])
    with bars() as progress:
        record = measure(recipe, progress)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        print(json.dumps(record), file=file)
    print(f"{recipe.method:>8} {recipe.learning_rate:g}: Pearson {record['pearson']:.4f}", flush=True)
    return float(record["pearson"])


def walk(recipe: Recipe) -> dict[float, float]:
    """Return validation Pearson by learning rate, the best of them in the interior where the grid allows."""
    found: dict[float, float] = {}
    best = recipe.learning_rate
    while True:
        place = GRID.index(best)
        for rate in GRID[max(0, place - 1) : place + 2]:
            found[rate] = result(replace(recipe, learning_rate=rate))
        previous, best = best, max(found, key=found.__getitem__)
        if best == previous:
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    rows = []
    for method in parser.parse_args().methods:
        found = walk(RECIPES[method])
        best = max(found, key=found.__getitem__)
        rows.append([method, f"{best:g}", f"{found[best]:.4f}", len(found)])
    print_table("Learning rates, chosen on the validation part", ["method", "best", "Pearson", "tried"], rows)


if __name__ == "__main__":
    main()
