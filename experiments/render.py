"""Write the tables of README.md and docs/ from results/*.jsonl, between their markers.

    python -m experiments.render [--check]

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, where NAME is demo, search, scoring or step. With
--check nothing is written, and the exit code is 1 when a block is out of date.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fishmask.demo import COLUMNS, RECIPES, TITLES, caption, row
from fishmask.recipe import recipe_from

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
Record = dict[str, Any]


def records(name: str) -> list[Record]:
    """Read a results file; a missing one is empty."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(lines: Iterable[Record], key: Callable[[Record], Any]) -> list[Record]:
    """Keep the last record of each key, in the order in which the keys first came."""
    return list({key(line): line for line in lines}.values())


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table whose columns but the first are right-aligned."""
    columns = list(columns)
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *map(list, rows)))


def machine(line: Record) -> str:
    """Say where and when a record was taken."""
    return f"{line['processor']}, {line['threads']} thread(s), torch {line['torch']}, {line['date']}."


def demo() -> str:
    """Return the demo's table: one row per method, mean ± standard deviation over the seeds."""
    lines = latest(records("demo"), lambda line: (line["name"], line["recipe"]["seed"]))
    rows = []
    for method in RECIPES:
        runs = [line for line in lines if line["name"] == method]
        cells = row(runs[-1])
        if len(runs) > 1:
            for place, name in ((2, "pearson"), (3, "spearman")):
                values = [run[name] for run in runs]
                cells[place] = f"{mean(values):.3f} ± {stdev(values):.3f}"
        rows.append(cells)
    seeds = sorted({line["recipe"]["seed"] for line in lines})
    count = f"Mean ± standard deviation of {len(seeds)} seeds. " if len(seeds) > 1 else ""
    last = [next(line for line in reversed(lines) if line["name"] == method) for method in RECIPES]
    identical = all(line["reload_identical"] for line in lines if line["name"] == "robust")
    reload = "identical, bit for bit" if identical else "NOT identical"
    told = caption(last).replace(f"seed {last[0]['recipe']['seed']}.", f"seeds {', '.join(map(str, seeds))}.")
    return (
        f"{table(COLUMNS, rows)}\n\n{count}{told} {machine(last[-1])} "
        f"The FISH delta loaded into a fresh MiniLM: predictions {reload}."
    )


def search() -> str:
    """Return validation Pearson by method and learning rate, the chosen one in bold."""
    lines = [(name, line) for line in records("demo_search") if (name := demo_name(line["recipe"]))]
    rates = sorted({line["recipe"]["learning_rate"] for _, line in lines})
    found = {(name, line["recipe"]["learning_rate"]): line["pearson"] for name, line in lines}
    rows = []
    for name, recipe in RECIPES.items():
        cells = [f"{found[name, rate]:.3f}" if (name, rate) in found else "" for rate in rates]
        chosen = rates.index(recipe.learning_rate)
        cells[chosen] = f"**{cells[chosen]}**"
        rows.append([TITLES[name], *cells])
    return f"{table(['learning rate', *(f'{rate:g}' for rate in rates)], rows)}\n\n{machine(lines[-1][1])}"


def demo_name(settings: Record) -> str | None:
    """Name the recipe of the demo that a search was made with, the learning rate apart; None for any other."""
    found = recipe_from(settings)
    return next(
        (name for name, ours in RECIPES.items() if replace(ours, learning_rate=found.learning_rate) == found), None
    )


def scoring() -> str:
    """Return the scoring benchmark: one row per sequence length."""
    lines = latest(records("scoring"), lambda line: line["tokens"])
    rows = []
    for line in lines:
        times, peaks = line["cpu_seconds_per_example"], line["peak_rise_bytes"]
        loop, ours = (min(times[name]) * 1e3 for name in times)
        memory = " / ".join(f"{peaks[name] / 1e6:.0f}" for name in peaks)
        rows.append(
            [str(line["tokens"]), f"{loop:.1f}", f"{ours:.1f}", f"{line['times_faster']:.2f} ×", f"{memory} MB"]
        )
    columns = ["tokens", "loop, ms per example", "fishmask, ms per example", "faster", "peak memory, loop / fishmask"]
    return f"{table(columns, rows)}\n\n{machine(lines[-1])}"


def step() -> str:
    """Return the step benchmark: one row per shape and method."""
    lines = latest(records("step"), lambda line: (line["shape"], line["method"]))
    rows = []
    for line in lines:
        beside = {other["method"]: other for other in lines if other["shape"] == line["shape"]}
        full, lora, floor = (beside[name] for name in ("full fine-tuning", "LoRA r=8", "floor"))
        ratios = (f"{line['seconds'] / other['seconds']:.2f}" for other in (floor, lora, full))
        kept = (f"{line[name] / full[name]:.2f}" for name in ("bytes_kept", "bytes_kept_bf16"))
        rows.append(
            [f"{line['shape']} {line['method']}", f"{line['entries']:,}", f"{line['seconds']:.3f}", *ratios, *kept]
        )
    columns = ["one step", "entries", "seconds", "÷ floor", "÷ LoRA", "÷ full", "kept ÷ full", "kept ÷ full, bf16"]
    return f"{table(columns, rows)}\n\n{machine(lines[-1])}"


# Name of the block: the results file it needs, and what writes it.
BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "demo": ("demo", demo),
    "search": ("demo_search", search),
    "scoring": ("scoring", scoring),
    "step": ("step", step),
}


def render(text: str) -> str:
    """Return a document with its blocks filled in; a block without results stays as it is."""
    for name, (source, block) in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin in text and records(source):
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{block()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a block is out of date")
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date; run python -m experiments.render' if check else 'written'}")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
