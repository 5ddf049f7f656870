"""Write the tables of README.md and docs/ from results/*.jsonl, between their markers.

    python -m experiments.render [--check]

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, where NAME is a key of `BLOCKS`. With
--check nothing is written, and the exit code is 1 when a block is out of date.
"""

import argparse
import json
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.models import goals
from experiments.cifar10 import table as cifar10_table
from experiments.distributed_cifar10 import table as distributed_cifar10_table
from experiments.distributed_glue import table as distributed_glue_table
from experiments.frontier import table as frontier_table
from experiments.structured import NAMES as STRUCTURES
from experiments.structured import TITLES as CHOICES
from experiments.structured import table as structured_table
from fishmask.demo import COLUMNS, RECIPES, TITLES, caption, row
from fishmask.recipe import recipe_from
from fishmask.tables import costs_table, differences_table, layers_table, methods_table, search_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PARTS = ("validation", "test")
TASKS = ("words", "sst2")  # of the search for a recipe
_COMMIT = "CheckpointLog.commit"
_ROUNDS = "LocalRounds, exact"
Record = dict[str, Any]


def records(name: str) -> list[Record]:
    """Read a results file; a missing one is empty."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(lines: Iterable[Record], key: Callable[[Record], Any]) -> list[Record]:
    """Keep the last record of each key, in the order in which the keys first came."""
    return list({json.dumps(key(line)): line for line in lines}.values())


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
        f"The delta of the robust recipe loaded into a fresh MiniLM: predictions {reload}."
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


def scoring_scale() -> str:
    """Return what scoring a large decoder took beside its plan, what bfloat16 costs, and a prediction."""
    lines = {line["part"]: line for line in records("scoring_scale")}
    run, exact, told = lines["run"], lines["precision"]["bfloat16"], lines["prediction"]
    gb = "{:.2f} GB".format
    plan, select, whole = run["plan"], run["select"], run["undisturbed"]
    reckoned = plan["sums_bytes"] + plan["working_bytes"]
    parts = [run["resumed"], whole, *run["killed"]]
    after = whole["seconds"] - plan["taken"]["seconds"]
    limit = f", in a memory cgroup of {gb(run['limit_bytes'] / 1e9)}" if run["limit_bytes"] else ""
    rows = [
        ["passes", str(len(plan["passes"])), str(len(plan["passes"]))],
        ["sums, batch and scratch", gb(reckoned / 1e9), ""],
        ["most anonymous memory, with Python and its libraries", "", gb(whole["peak_anonymous_bytes"] / 1e9)],
        ["weights, mapped", gb(plan["weights_bytes"] / 1e9), ""],
        ["most resident memory, with mapped pages", "", gb(max(p["peak_resident_bytes"] for p in parts) / 1e9)],
        ["scores, on disk", gb(plan["scores_bytes"] / 1e9), ""],
        ["time on the clock, without loading and the plan", f"{plan['seconds']:.0f} s", f"{after:.0f} s"],
        [f"`mask select` at {select['density']:.1%}: anonymous memory", "", gb(select["peak_anonymous_bytes"] / 1e9)],
        ["`mask select`: time on the clock", "", f"{select['seconds']:.0f} s"],
    ]
    per_example = run["cpu_seconds_per_example"]
    parts = [
        f"{run['model']}: {run['entries']:,} entries, {run['examples']} examples of {run['tokens']} tokens in batches "
        f"of {run['batch_size']}, `--memory {run['memory']}`{limit}:",
        table(["", "plan", "measured"], rows),
        f"It was killed twice by SIGKILL, in the midst of the first pass and after it; the scores of the command that "
        f"went on are {'the same, bit for bit,' if run['same_bits'] else 'NOT the same'} as those of an undisturbed "
        f"one. An example takes {per_example:.1f} s of CPU time over all passes, writing the files included, so 1,024 "
        f"take at most {1024 * per_example / 3600:.1f} hours of one core. The machine was shared, so times on the "
        f"clock are longer than they need be ({whole['cpu_seconds']:.0f} s of CPU time of {whole['seconds']:.0f} s). "
        f"{machine(run)}",
        f"bfloat16 weights against a loop in float64 on the same rounded weights ({lines['precision']['model']}, "
        f"{lines['precision']['examples']} examples): relative error of the scores {exact['relative_error']:.1e}, "
        f"{exact['overlap']:.2%} of the mask at {lines['precision']['density']:.1%} the same.",
        f"A prediction, which no GPU has confirmed: {told['model']}, in one pass on one device, batches of "
        f"{told['examples_per_batch']} examples of {told['tokens']} tokens: {gb(told['weights_bytes'] / 1e9)} of "
        f"weights, {gb(told['sums_bytes'] / 1e9)} of sums and {gb(told['working_bytes'] / 1e9)} for a batch, "
        f"{gb(told['device_bytes'] / 1e9)} in all.",
    ]
    return "\n\n".join(parts)


def step() -> str:
    """Return the step benchmark: one row per shape and method."""
    lines = latest(records("step"), lambda line: (line["shape"], line["method"]))
    rows = []
    for line in lines:
        beside = {other["method"]: other for other in lines if other["shape"] == line["shape"]}
        full, lora, floor = (beside[name] for name in ("full fine-tuning", "LoRA r=8", "floor"))
        ratios = (f"{line['seconds'] / other['seconds']:.2f}" for other in (floor, lora, full))
        kept = (f"{line[name] / full[name]:.2f}" for name in ("bytes_kept", "bytes_kept_bf16"))
        peak = [f"{line['peak_bytes'] / 2**20:.0f}"] if "peak_bytes" in lines[0] else []
        rows.append(
            [
                *(f"{line['shape']} {line['method']}", f"{line['entries']:,}", f"{line['seconds']:.3f}"),
                *(*ratios, *kept, *peak),
            ]
        )
    columns = ["one step", "entries", "seconds", "÷ floor", "÷ LoRA", "÷ full", "kept ÷ full", "kept ÷ full, bf16"]
    columns += ["MiB at the peak"] if "peak_bytes" in lines[0] else []
    return f"{table(columns, rows)}\n\n{machine(lines[-1])}"


def models() -> str:
    """Return the benchmark of all sizes: a table for each model, one row per method, and what scoring it takes."""
    lines = latest(records("models"), lambda line: (line["model"], line["device"], line["method"]))
    parts = []
    for key in dict.fromkeys((line["model"], line["device"]) for line in sorted(lines, key=lambda line: line["n"])):
        parts += _of_model([line for line in lines if (line["model"], line["device"]) == key])
    loads = [line["load"] for line in lines if "load" in line]
    parts.append(f"{machine(lines[-1])} Load average {min(loads):.1f} to {max(loads):.1f}.")
    return "\n\n".join(parts)


def _of_model(lines: list[Record]) -> list[str]:
    """Write one model of the benchmark of all sizes."""
    first, steps = lines[0], {line["method"]: line for line in lines if line["method"] != "scoring"}
    floor, lora = steps["floor"], steps["LoRA r=16"]
    rows = []
    for method, line in steps.items():
        if not line["fits"]:
            needs = line.get("predicted_bytes")
            rows.append(
                [method, *[""] * 4, f"does not fit: {needs / 2**30:.1f}" if needs else "does not fit", *[""] * 4]
            )
            continue
        ratios = [f"{line['seconds'] / other['seconds']:.2f}" if other["fits"] else "" for other in (floor, lora)]
        peak, told = line["allocated_bytes"], line.get("predicted_bytes")
        wrong = [f"{told / size - 1:+.1%}" if told else "" for size in (peak, line.get("resident_bytes", peak))]
        rows.append(
            [
                *(method, f"{line['entries']:,}", f"{line['seconds']:.2f}", *ratios, f"{peak / 2**30:.2f}"),
                f"{peak / lora['allocated_bytes']:.2f}" if lora["fits"] else "",
                *wrong,
                f"{line['file_bytes'] / 1e6:,.1f}" if line["file_bytes"] else "",
            ]
        )
    columns = ["one step", "entries", "seconds", "÷ floor", "÷ LoRA r=16", "GiB at the peak", "÷ LoRA r=16"]
    columns += ["forecast, of the peak", "of the resident set", "MB file"]
    where = first["device_name"] or first["device"]
    told = [f"**{first['model']}**: {first['n']:,} entries, {first['shape']} tokens, {first['dtype']}, {where}:"]
    told.append(table(columns, rows))
    for line in lines:
        if line["method"] == "scoring":
            took = f"Scoring an example of {line['scored'][1]} tokens takes {line['seconds']:.2f} s"
            loop = f", by the loop {line['loop_seconds']:.2f} s" if "loop_seconds" in line else "; the loop did not fit"
            ratio = f", {line['times_faster']:.1f} × as long" if "times_faster" in line else ""
            told.append(f"{took}{loop}{ratio}.")
    for title, kind in (("reached", True), ("missed", False)):
        if texts := [text for reached, text in goals(lines) if reached is kind]:
            told.append(f"Goals {title}: {'; '.join(texts)}.")
    if not any(line["fits"] for line in lines):
        told.append("Nothing of it was run.")
    return told


def resident() -> str:
    """Return what a process has resident beside its forecast: one row per model and setting of glibc."""
    lines = latest(records("resident"), lambda line: (line["model"], any(line["fixed"].values())))
    rows = [
        [
            f"{line['model']}, {line['shape']}, {line['dtype']}, glibc {'fixed' if fixed else 'default'}",
            *(f"{line[name] / 2**20:,.0f}" for name in ("predicted_bytes", "resident_bytes")),
            f"{line['resident_bytes'] / line['predicted_bytes']:.2f}",
            f"{line['seconds']:.2f}",
        ]
        for line in lines
        for fixed in [any(line["fixed"].values())]
    ]
    columns = ["process", "MiB forecast", "MiB resident", "resident ÷ forecast", "CPU seconds of a step"]
    loads = [line["load"] for line in lines]
    return f"{table(columns, rows)}\n\n{machine(lines[-1])} Load average {min(loads):.1f} to {max(loads):.1f}."


def kernels() -> str:
    """Return the benchmark of a layer's masked gradient on a CPU: nanoseconds per token, the plan's way in bold."""
    key = operator.itemgetter("shape", "tokens", "pattern", "density")
    lines = latest((line for line in records("kernels") if line["device"] == "cpu"), key)
    ways = {"dense": "dense", "block": "block", "sampled, one chunk": "sampled, whole", "sampled": "sampled"}
    ways["split"] = "split"
    rows, behind = [], []
    for line in lines:
        seconds = line["seconds"]
        behind.append(seconds[line["chosen"]] / min(seconds[way] for way in ways))
        cells = {way: f"{seconds[way] / line['tokens'] * 1e9:,.0f}" for way in ways}
        cells[line["chosen"]] = f"**{cells[line['chosen']]}**"
        shape = " × ".join(map(str, line["shape"]))
        if line["tokens"] == max(other["tokens"] for other in lines):
            rows.append(
                [f"{shape}, {line['pattern']}, {100 * line['density']:g} %", *(cells.get(way, "") for way in ways)]
            )
    quickest = sum(ratio <= 1.1 for ratio in behind)
    tokens = " and ".join(f"{count:,}" for count in sorted({line["tokens"] for line in lines}))
    return (
        f"{table(['weight, entries, density', *ways.values()], rows)}\n\n"
        f"With {tokens} tokens the plan's way is the quickest, or within a tenth of it, in {quickest} of {len(behind)} "
        f"cases; at worst it takes {max(behind):.1f} times as long. {machine(lines[-1])}"
    )


def checkpoints() -> str:
    """Return the checkpoint benchmark: one row per model and method, and what commits cost a training."""
    lines = latest(records("checkpoints"), lambda line: (line["model"], line["method"]))
    rows, notes = [], []
    for model in dict.fromkeys(line["model"] for line in lines):
        methods = {line["method"]: line for line in lines if line["model"] == model}
        training = methods.pop("training", None)
        ours, behind = methods[_COMMIT], methods[f"{_COMMIT}_async"]
        for name, line in methods.items():
            cells = [f"{line['bytes']:,}", f"{line['bytes'] / ours['bytes']:.1f}"]
            cells += [f"{line['save_seconds']:.4f}", f"{line['save_seconds'] / ours['save_seconds']:.1f}"]
            back = line["restore_seconds"]
            cells += ["", ""] if back is None else [f"{back:.3f}", f"{back / ours['restore_seconds']:.2f}"]
            rows.append([f"{model}: {name}", *cells])
        notes.append(
            f"{model}: {ours['n']:,} entries, {ours['k']:,} masked. The first commit, with base and mask: "
            f"{median(ours['first_seconds']):.2f} s, {ours['first_bytes'][0]:,} bytes. Rolling back in the process: "
            f"{median(ours['rollback_seconds']):.3f} s. `commit_async` returns after "
            f"{median(behind['call_seconds']):.4f} s."
        )
        for name in (_COMMIT, f"{_COMMIT}_async") if training else ():
            slower, error = training[name]["by_the_clock"]
            notes.append(
                f"{model}: `{name}` every {training['every']} steps slows training by {slower:.2%} ± {error:.2%} (mean "
                f"± standard error, {training['blocks']} blocks); the calls take {training[name]['in_the_call']:.2%}."
            )
    loads = [load for line in lines for load in line["load"]]
    notes.append(f"{machine(lines[-1])} Load average {min(loads):.1f} to {max(loads):.1f}.")
    columns = ["one checkpoint", "bytes", "÷ commit", "seconds, durable", "÷ commit", "seconds, restore", "÷ commit"]
    return "\n\n".join([table(columns, rows), *notes])


def commits() -> str:
    """Return the checkpoint benchmark in short: the largest model, what saving costs."""
    lines = latest(records("checkpoints"), lambda line: (line["model"], line["method"]))
    n = max(line["n"] for line in lines)
    lines = [line for line in lines if line["n"] == n and line["method"] != "training"]
    ours = next(line for line in lines if line["method"] == _COMMIT)
    rows = [
        [
            line["method"],
            f"{line['bytes'] / 1e6:,.1f}",
            f"{line['save_seconds']:.3f}",
            f"{line['save_seconds'] / ours['save_seconds']:.1f}",
        ]
        for line in lines
    ]
    columns = [f"one checkpoint, {n / 1e6:.0f}M entries", "MB", "seconds, durable", "÷ commit"]
    return f"{table(columns, rows)}\n\n{machine(lines[-1])}"


def switch() -> str:
    """Return the benchmark of switching: one row per model and method."""
    lines = latest(records("switch"), lambda line: (line["model"], line["method"]))
    rows, notes = [], []
    for model in dict.fromkeys(line["model"] for line in lines):
        methods = [line for line in lines if line["model"] == model]
        ours = methods[0]
        for line in methods:
            cells = [f"{line['file_bytes'] / 1e6:.2f}", f"{line['memory_bytes'] / 1e6:.2f}"]
            cells += [f"{1e3 * line['load_seconds']:,.0f}", f"{1e3 * line['switch_seconds']:,.2f}"]
            cells += [f"{line['switch_seconds'] / ours['switch_seconds']:.1f}", f"{1e3 * line['back_seconds']:,.2f}"]
            cells += [f"{line['forward_seconds'] / ours['base_forward_seconds']:.2f}"]
            rows.append([f"{model}: {line['method']}", *cells, f"{line['base_entries_changed']:,}"])
        notes.append(
            f"{model}: {ours['n']:,} entries, {ours['entries']:,} masked. Loading a delta without hashing the base: "
            f"{1e3 * ours['trusted_seconds']:.0f} ms. `using` with what is in use already: "
            f"{1e6 * ours['using_seconds']:.1f} µs. A forward of the base: {1e3 * ours['base_forward_seconds']:.0f} ms."
        )
    loads = [load for line in lines for load in line["load_average"]]
    notes.append(f"{machine(lines[-1])} Load average {min(loads):.1f} to {max(loads):.1f}.")
    columns = ["", "MB file", "MB memory", "first load, ms", "switch, ms", "÷ ours", "back, ms", "forward ÷ base"]
    return "\n\n".join([table([*columns, "entries of the base changed"], rows), *notes])


def cifar10() -> str:
    """Return the training from scratch in small: one row per setting."""
    return f"{cifar10_table('reduced')}\n\n{machine(records('cifar10')[-1])}"


def distributed_cifar10() -> str:
    """Return the training from scratch on two workers in small: one row per mask."""
    return f"{distributed_cifar10_table('reduced')}\n\n{machine(records('distributed_cifar10')[-1])}"


def distributed_glue() -> str:
    """Return the training of several workers on GLUE in small: a table for each task, number of workers and length."""
    return f"{distributed_glue_table(['reduced', 'long'])}\n\n{machine(records('distributed_glue')[-1])}"


def exchange() -> str:
    """Return the benchmark of exchanges: a table for each model and number of workers, one row per method."""
    lines = latest(
        records("exchange"), lambda line: tuple(line[name] for name in ("model", "workers", "method", "rate_mbit"))
    )
    parts = [
        _exchanges([line for line in lines if (line["model"], line["workers"]) == key])
        for key in dict.fromkeys((line["model"], line["workers"]) for line in lines)
    ]
    loads = [line["load"] for line in lines]
    notes = (
        "Bytes are those that a worker's network interface sends in 30 steps, all headers and acknowledgements "
        "included; the ring limit is 2(W − 1)/W of the entries that are merged, at the bytes of one. Packets are as "
        "large as the loopback interface takes them or, at a limited rate, of Ethernet's 1500 bytes. It is the "
        "exchange alone, without forward or backward pass. \\* is computed from the bytes and the rate, not run. "
        f"Methods that exchange in every step were measured for one, times 30. Load average {min(loads):.1f} to "
        f"{max(loads):.1f}."
    )
    return "\n\n".join([*parts, notes, machine(lines[-1])])


def _exchanges(lines: list[Record]) -> str:
    """Write one table of the benchmark of exchanges; rates that were not set are left out."""
    rates = sorted({line["rate_mbit"] for line in lines if line["rate_mbit"]}, reverse=True)
    by_key = {(line["method"], line["rate_mbit"]): line for line in lines}
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        free = by_key[method, None]
        count = free["every"] / free["steps"]
        cells = [method, f"{free['bytes'] * count / 1e6:,.2f}"]
        limits = [by_key[method, rate] for rate in (None, *rates[:1])]
        cells += [
            f"{line['bytes'] / line['ring_bytes']:.3f}" if line["ring_bytes"] and line["bytes"] else ""
            for line in limits
        ]
        for rate in rates:
            line, mark = by_key[method, rate], "\\*" if by_key[method, rate]["computed"] else ""
            ratio = line["seconds"] * count / by_key[_ROUNDS, rate]["seconds"]
            cells += [f"{line['seconds'] * count:,.2f}{mark}", f"{ratio:,.1f}{mark}"]
        rows.append(cells)
    first = lines[0]
    title = (
        f"**{first['model']}**: {first['n']:,} entries, {first['k']:,} masked, {first['workers']} workers, "
        f"{first['every']} steps:"
    )
    columns = ["", "MB sent by a worker", "÷ ring limit", *["÷ ring limit, Ethernet" for _ in rates[:1]]]
    return f"{title}\n\n{table([*columns, *(c for r in rates for c in (f's, {r} Mbit/s', '÷ ours'))], rows)}"


def recipe() -> str:
    """Return the search for a recipe: one row per mask, the validation quality at its best rate."""
    lines = latest(
        records("recipe"), lambda line: tuple(line[name] for name in ("name", "task", "part", "seed", "rate"))
    )
    words, sentences = (
        [line for line in lines if (line["task"], line["part"]) == (task, "validation")] for task in TASKS
    )
    names = list(dict.fromkeys(line["name"] for line in lines if line["part"] == "validation"))
    found = [(name, _best(words, name, "pearson"), _best(sentences, name, "accuracy")) for name in names]
    found.sort(key=lambda item: -item[1][0] if item[1] else 0.0)
    rows = [[name, *(cell for best in pair for cell in (best[1:] if best else ("", "")))] for name, *pair in found]
    columns = ["mask", "rated words, Pearson", "rate", "SST-2, accuracy", "rate"]
    return f"{table(columns, rows)}\n\nMean ± standard deviation (seeds). {machine(lines[-1])}"


def _best(lines: list[Record], name: str, metric: str) -> tuple[float, str, str] | None:
    """Return a mask's mean at its best rate, that mean with its spread, and the rates tried with the best in bold."""
    by_rate: dict[float, list[float]] = {}
    for line in lines:
        if line["name"] == name:
            by_rate.setdefault(line["rate"], []).append(line[metric])
    if not by_rate:
        return None
    best = max(by_rate, key=lambda rate: mean(by_rate[rate]))
    values = by_rate[best]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    rates = ", ".join(f"**{rate:g}**" if rate == best else f"{rate:g}" for rate in sorted(by_rate))
    return mean(values), f"{mean(values):.3f}{spread} ({len(values)})", rates


def ablation() -> str:
    """Return the ablations of the score: one row per run, in points."""
    lines = latest(records("glue_ablation"), lambda line: line["recipe"])
    settings = ("method", "labels", "examples", "score")
    rows = [
        [*(str(line["recipe"][name]) for name in settings), *(f"{line[part]['score']:.1%}" for part in PARTS)]
        for line in sorted(lines, key=lambda line: [str(line["recipe"][name]) for name in settings])
    ]
    recipe = lines[-1]["recipe"]
    note = f"{lines[-1]['task']}, seed {recipe['seed']}, learning rate {recipe['learning_rate']:g}."
    return f"{table(['mask by', *settings[1:], *PARTS], rows)}\n\n{note} {machine(lines[-1])}"


def frontier() -> str:
    """Return accuracy against training time of masks within a step budget: a table for each task."""
    lines = records("frontier")
    return f"{frontier_table(lines)}\n\nMean ± standard deviation (seeds). {machine(lines[-1])}"


def budgets() -> str:
    """Return the benchmark of step budgets: a row for each lowest block, what was counted and what was measured."""
    lines = latest(records("budgets"), lambda line: (line["lowest"], line["cached"]))
    by_point = {(line["lowest"], line["cached"]): line for line in lines}
    rows = []
    for lowest in range(lines[0]["blocks"] + 1):
        cells = [by_point.get((lowest, cached)) for cached in (False, True)]
        rows.append(
            [str(lowest), *(f"{line[key]:.2f}" if line else "" for line in cells for key in ("counted", "measured"))]
        )
    columns = ["lowest block", "counted", "measured", "counted, cache", "measured, cache"]
    load = f"Load average {lines[-1]['load_average']:.1f}."
    return f"{table(columns, rows)}\n\n{'x'.join(map(str, lines[0]['batch']))} tokens. {machine(lines[-1])} {load}"


def structured() -> str:
    """Return the accuracy of structured masks."""
    lines = records("structured")
    seeds = "Test part, mean ± standard deviation (seeds)"
    return f"{structured_table(lines)}\n\n{seeds}; bytes of the float32 delta. {machine(lines[-1])}"


def structured_costs() -> str:
    """Return what structured masks save: a step beside the floor, and bytes of indices."""
    lines = latest(records("structured_costs"), lambda line: (line["method"], line["block"]))
    shapes = list(lines[-1]["seconds"])
    rows = [
        [
            f"{CHOICES[line['method']]}: {STRUCTURES[line['block']]}",
            f"{line['entries']:,}",
            *(f"{line['seconds'][shape] / line['floor_seconds'][shape]:.2f}" for shape in shapes),
            *(f"{line[key] / line['entries']:.3f}" for key in ("index_bytes", "index_bytes_by_block")),
        ]
        for method in CHOICES
        for line in lines
        if line["method"] == method
    ]
    steps = [f"step / floor, {shape}" for shape in shapes]
    columns = ["mask", "entries", *steps, "index bytes per entry", "coded by block"]
    return f"{table(columns, rows)}\n\n{machine(lines[-1])}"


def glue(write: Callable[[Any], str]) -> Callable[[], str]:
    """Return what writes one of the report's tables from the committed records."""

    def block() -> str:
        lines = records("glue")
        return f"{write(lines).strip()}\n\n{machine(lines[-1])}"

    return block


# Name of the block: the results file it needs, and what writes it.
BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "demo": ("demo", demo),
    "search": ("demo_search", search),
    "scoring": ("scoring", scoring),
    "scoring-scale": ("scoring_scale", scoring_scale),
    "step": ("step", step),
    "models": ("models", models),
    "resident": ("resident", resident),
    "kernels": ("kernels", kernels),
    "checkpoints": ("checkpoints", checkpoints),
    "commits": ("checkpoints", commits),
    "switch": ("switch", switch),
    "cifar10": ("cifar10", cifar10),
    "distributed-cifar10": ("distributed_cifar10", distributed_cifar10),
    "exchange": ("exchange", exchange),
    "distributed-glue": ("distributed_glue", distributed_glue),
    "recipe": ("recipe", recipe),
    "frontier": ("frontier", frontier),
    "budgets": ("budgets", budgets),
    "structured": ("structured", structured),
    "structured-costs": ("structured_costs", structured_costs),
    "claims": ("glue_ablation", ablation),
    "glue": ("glue", glue(lambda lines: methods_table(lines, 0.005))),
    "gaps": ("glue", glue(lambda lines: differences_table(lines, 0.005))),
    "rates": ("glue", glue(search_table)),
    "layers": ("glue", glue(layers_table)),
    "costs": ("glue", glue(costs_table)),
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
