"""How much of a forecast's memory a training process really has resident on the CPU, and what glibc adds to it.

    python -m benchmarks.resident [--models minilm gpt2 llama] [--output results/resident.jsonl]

The forecast counts what PyTorch's allocator gives out. glibc, which that takes its memory from, keeps much of what is
freed for later; with `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` fixed it gives larger blocks back at once.
Each model trains a random mask for some steps in two processes of its own, one with glibc's defaults and one with these
variables: the peak of the resident set from the first step on, above the process before the model was made and after a
tiny one has brought the libraries in; and the least CPU time of a step.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, GPT2Config

import fishmask
from benchmarks.models import DENSITY, LARGE, SHAPES, Shape, bert, llama, load, make_batch, resident, settle
from benchmarks.record import quiet, report, verdict
from fishmask.forecast import forecast, size_text
from fishmask.measure import environment, peak_memory_bytes

FIXED = {"MALLOC_MMAP_THRESHOLD_": str(LARGE), "MALLOC_TRIM_THRESHOLD_": str(LARGE)}
STEPS = 4
MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
GPT2 = GPT2Config(n_embd=256, n_layer=4, n_head=4, architectures=["GPT2LMHeadModel"])
LLAMA = llama(512, 6, 8, 4, 1408, 8000, tied=False)
CASES = {
    "tiny": SHAPES["tiny"],
    "minilm": Shape(MINILM, torch.float32, (16, 128), (0, 0)),
    "gpt2": Shape(GPT2, torch.float32, (8, 128), (0, 0)),
    "llama": Shape(LLAMA, torch.bfloat16, (8, 128), (0, 0)),
}


def train(shape: Shape, steps: int) -> list[float]:
    """Train a random mask for some steps; the peak of the resident set counts from the first. Return CPU seconds."""
    model = load(shape, "cpu")
    tuning = fishmask.attach(model, fishmask.Mask.random(model, DENSITY, seed=0))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-4, fused=True)
    batch = make_batch(model, *shape.batch)
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds


def measured(name: str) -> dict[str, Any]:
    """Measure one model in this process."""
    shape = CASES[name]
    told = forecast(shape.config, batch=shape.batch, density=DENSITY, dtype=shape.dtype)
    train(replace(shape, config=bert(128, 2, 2000), batch=(2, 32)), 2)  # libraries take their memory now
    settle()
    before = resident()
    seconds = train(shape, STEPS)
    return {
        "benchmark": "resident",
        "model": name,
        "n": told.n,
        "shape": f"{shape.batch[0]}x{shape.batch[1]}",
        "dtype": told.dtype,
        "density": DENSITY,
        "seed": 0,
        "steps": STEPS,
        "fixed": {name: os.environ.get(name) for name in FIXED},
        **environment(),
        "predicted_bytes": told.peak,
        "resident_bytes": peak_memory_bytes() - before,
        "seconds": min(seconds),
        "load": os.getloadavg()[0],
    }


def in_a_process(name: str, fixed: bool, threads: int) -> dict[str, Any]:
    """Measure one model in a process of its own, with glibc's thresholds fixed or with its defaults."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-m", "benchmarks.resident", "--here", name, "--threads", str(threads)]
    run = subprocess.run(command, env=outside | (FIXED if fixed else {}), stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(run.stdout))


def show(lines: list[dict[str, Any]]) -> Table:
    """Lay the lines out as a table."""
    table = Table(title="Resident set of a training process, beside its forecast")
    for column in ("model", "forecast", "glibc", "resident", "/ forecast", "s / step"):
        table.add_column(column, justify="left" if column in ("model", "glibc") else "right")
    for line in lines:
        table.add_row(
            f"{line['model']}, {line['shape']}, {line['dtype']}",
            size_text(line["predicted_bytes"]),
            "fixed" if any(line["fixed"].values()) else "default",
            size_text(line["resident_bytes"]),
            f"{line['resident_bytes'] / line['predicted_bytes']:.2f}",
            f"{line['seconds']:.3f}",
        )
    return table


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Compare with the target: a forecast within a tenth of the resident set."""
    told = []
    for line in lines:
        off = line["predicted_bytes"] / line["resident_bytes"] - 1
        about = f"{line['model']}, glibc {'fixed' if any(line['fixed'].values()) else 'default'}"
        told.append(f"{verdict(abs(off) <= 0.1)}  {about}: the forecast is {off:+.1%} off, at most 10 %")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=CASES, default=[name for name in CASES if name != "tiny"], help="tiny is a check"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", choices=CASES, help="measure this one in this process and print its line")
    parser.add_argument("--output", type=Path, help="append a JSON line per model and setting to this file")
    args = parser.parse_args()
    quiet(args.threads)
    if args.here:
        print(json.dumps(measured(args.here)))
        return
    lines = [in_a_process(name, fixed, args.threads) for name in args.models for fixed in (False, True)]
    report(Console(width=120), show(lines), verdicts(lines), lines, args.output)


if __name__ == "__main__":
    main()
