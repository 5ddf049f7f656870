"""Checkpoints, side by side: this log, `torch.save`, safetensors, and `torch.distributed.checkpoint`.

    python -m benchmarks.checkpoints [--repeats 5] [--models minilm large] [--output results/checkpoints.jsonl]

The models are MiniLM and a BERT of the size of BERT-large (350M entries, random weights); the mask chooses 0.5 %. All
methods take turns in one process and one folder, after a round that measures how far the resident memory rises, and
each begins with nothing left to write by anyone (`sync`). Seconds to save end when file and name are durable (fsync of
file and folder). Seconds to restore are into a model whose weights are zero and whose optimizer is empty, as in a new
process; nothing is dropped from the page cache, so files come from memory. Every restore is compared with what was
saved.

"Weights + AdamW" is what resuming a full fine-tuning takes: the weights and two moments for each. "Unsafe" saves what
one who trains the same mask may save today, the k values and their moments, without the mask, the generators of random
numbers, a digest, or a name that appears only once the file is whole: what the log's guarantees cost is the difference
to it.

Then MiniLM trains with AdamW, a linear schedule and dropout, in blocks of ten steps with a commit in the middle of each
or none, in random order within each round of blocks. The slowdown is by the clock, and beside it by the processor's
time, which the load of a busy machine reaches less but which leaves the waiting for the disk out.
"""

import argparse
import ctypes
import gc
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from transformers import BertConfig, BertForSequenceClassification

import fishmask
from benchmarks.record import add_options, quiet, report, verdict
from benchmarks.step import fisher_scores, load, make_batch
from fishmask.measure import environment, peak_memory_bytes
from fishmask.publish import sync_directory

DENSITY = 0.005
SEED = 0
EVERY = 10  # steps from one commit to the next
COMMITS = 3  # of each kind in every round: they are quick
SHAPES = {  # of the models that are made here
    "tiny": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 45_000,
    },
}
COMMIT, ASYNC = "CheckpointLog.commit", "CheckpointLog.commit_async"
WEIGHTS, FULL = "torch.save, weights", "torch.save, weights + AdamW"
UNSAFE = "torch.save, k values + AdamW, unsafe"
GOALS = {"overhead": 4096, "times quicker": 50.0, "slowdown": 0.01}  # what is to be reached


def make_model(name: str) -> BertForSequenceClassification:
    if name == "minilm":
        return load()
    torch.manual_seed(SEED)
    return BertForSequenceClassification(BertConfig(num_labels=2, **SHAPES[name])).train()


def make_mask(name: str, model: nn.Module) -> fishmask.Mask:
    """Choose as the paper does where the model was pretrained, else at random."""
    if name == "minilm":
        return fishmask.Mask.from_scores(fisher_scores(), DENSITY, keep="classifier")
    return fishmask.Mask.random(model, DENSITY, seed=SEED, keep="classifier")


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What one method took, in every round: seconds, or bytes of memory."""

    bytes: int = 0
    saved: list[float] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)


class Meter:
    """Measures calls: how long they take, or how far the resident memory rises. By name of the method."""

    def __init__(self, *, memory: bool) -> None:
        self.memory = memory
        self.measured: defaultdict[str, Measured] = defaultdict(Measured)

    def take(self, call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
        """Call once nothing waits to be written or collected; return the seconds (or bytes), and the result."""
        gc.collect()
        os.sync()
        if self.memory:
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed would hide what is taken
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = peak_memory_bytes()
            result = call(*arguments)
            return peak_memory_bytes() - before, result
        start = time.perf_counter()
        result = call(*arguments)
        return time.perf_counter() - start, result


def size_of(path: Path) -> int:
    """Count the bytes of a file, or of all in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


def some_of(*groups: list[Tensor]) -> Tensor:
    """Copy the first and last elements of all tensors: enough to tell that something else was restored."""
    flat = [tensor.detach().reshape(-1) for tensors in groups for tensor in tensors]
    return torch.cat([part for tensor in flat for part in (tensor[:64].clone(), tensor[-64:].clone())])


def must_equal(name: str, found: Tensor, wanted: Tensor) -> None:
    if not torch.equal(found, wanted):
        raise SystemExit(f"{name}: what was restored is not what was saved")


# --- the ways of today ------------------------------------------------------------------------------------------------


class Dense:
    """A model with the AdamW state of training all of it; the moments are random, as no size depends on them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimizer = model, AdamW(model.parameters(), fused=True)
        for p in model.parameters():
            moments = {"exp_avg": torch.rand_like(p.detach()), "exp_avg_sq": torch.rand_like(p.detach())}
            self.optimizer.state[p] = {"step": torch.tensor(1.0), **moments}

    def probe(self) -> Tensor:
        """Copy some of the weights and of both moments of each."""
        states = list(self.optimizer.state.values())
        return some_of(list(self.model.parameters()), *([s["exp_avg"], s["exp_avg_sq"]] for s in states))

    @torch.no_grad()
    def blank(self, moments: bool) -> None:
        """Forget everything that a restore is to bring back."""
        for p in self.model.parameters():
            p.zero_()
        if moments:
            self.optimizer.state.clear()

    def all(self) -> dict[str, Any]:
        """Return what resuming takes."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


class Way(NamedTuple):
    """A way to keep a dense state."""

    save: Callable[[Dense, Path], None]
    restore: Callable[[Dense, Path], None]
    moments: bool


def torch_save(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def torch_load(path: Path) -> Any:
    return torch.load(path, mmap=False, weights_only=True)


def restore_full(dense: Dense, path: Path) -> None:
    state = torch_load(path)
    dense.model.load_state_dict(state["model"])
    dense.optimizer.load_state_dict(state["optimizer"])


def save_safetensors(dense: Dense, path: Path) -> None:
    save_file(dense.model.state_dict(), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_directory(path.parent)


def sharded(dense: Dense) -> dict[str, Any]:
    model, optimizer = get_state_dict(dense.model, dense.optimizer)
    return {"model": model, "optimizer": optimizer}


def save_sharded(dense: Dense, path: Path) -> None:
    dcp.save(sharded(dense), storage_writer=dcp.FileSystemWriter(path, sync_files=True))
    sync_directory(path)
    sync_directory(path.parent)


def restore_sharded(dense: Dense, path: Path) -> None:
    state = sharded(dense)
    dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    set_state_dict(dense.model, dense.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


WAYS = {
    WEIGHTS: Way(
        lambda dense, path: torch_save(dense.model.state_dict(), path),
        lambda dense, path: dense.model.load_state_dict(torch_load(path)),
        moments=False,
    ),
    "safetensors, weights": Way(
        save_safetensors, lambda dense, path: dense.model.load_state_dict(load_file(path)), moments=False
    ),
    FULL: Way(lambda dense, path: torch_save(dense.all(), path), restore_full, moments=True),
    "torch.distributed.checkpoint, weights + AdamW": Way(save_sharded, restore_sharded, moments=True),
}


def measure_dense(dense: Dense, folder: Path, meter: Meter) -> None:
    for name, way in WAYS.items():
        path, line = folder / "checkpoint", meter.measured[name]
        line.saved.append(meter.take(way.save, dense, path)[0])
        line.bytes = size_of(path)
        wanted = dense.probe()
        dense.blank(way.moments)
        line.restored.append(meter.take(way.restore, dense, path)[0])
        must_equal(name, dense.probe(), wanted)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- this log ---------------------------------------------------------------------------------------------------------


class Sparse:
    """A model in training by a mask."""

    def __init__(self, model: nn.Module, mask: fishmask.Mask) -> None:
        self.model, self.tuning = model, fishmask.attach(model, mask)
        self.optimizer = AdamW(self.tuning.parameters(), lr=1e-5, fused=True)
        self.scheduler = LinearLR(self.optimizer, total_iters=1_000_000)
        self.state = {"scheduler": self.scheduler}

    def step(self, batch: dict[str, Tensor] | None = None) -> None:
        """Do one step; without a batch along a random gradient, which like dropout draws from torch's generator."""
        if batch is None:
            for p in self.tuning.parameters():
                p.grad = torch.randn_like(p)
        else:
            self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def probe(self) -> Tensor:
        """Copy some of the weights, of the values and of their moments."""
        moments = [state[key] for state in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return some_of(list(self.model.parameters()), [*self.tuning.parameters()], moments)


def save_unsafe(sparse: Sparse, path: Path) -> None:
    torch_save({"values": sparse.tuning.values, "optimizer": sparse.optimizer.state_dict()}, path)


def restore_unsafe(sparse: Sparse, path: Path) -> None:
    state = torch_load(path)
    with torch.no_grad():
        sparse.tuning.values.copy_(state["values"])
    sparse.tuning.write_back()
    sparse.optimizer.load_state_dict(state["optimizer"])


def resume(model: nn.Module, path: Path) -> Sparse:
    """Do what a new process does that goes on with the training of a log."""
    log = fishmask.CheckpointLog(path)
    sparse = Sparse(model, log.mask())
    log.restore(sparse.tuning, sparse.optimizer, state=sparse.state)
    return sparse


def measure_sparse(model: nn.Module, mask: fishmask.Mask, folder: Path, meter: Meter) -> None:
    """Measure the log and what is below it, on a plain model, which gets its weights back."""
    ours, behind, unsafe = (meter.measured[name] for name in (COMMIT, ASYNC, UNSAFE))
    base = some_of(list(model.parameters()))
    sparse = Sparse(model, mask)
    log = fishmask.CheckpointLog(folder / "log")
    sparse.step()
    commit = partial(log.commit, sparse.tuning, sparse.optimizer, state=sparse.state)
    first, _ = meter.take(commit)
    ours.others.setdefault("first_seconds", []).append(first)
    ours.others["first_bytes"] = [size_of(log.path)]
    for _ in range(COMMITS):
        sparse.step()
        taken, done = meter.take(commit)
        ours.saved.append(taken)
        ours.bytes = max(ours.bytes, done.bytes)

        sparse.step()
        taken, coming = meter.take(partial(log.commit_async, sparse.tuning, sparse.optimizer, state=sparse.state))
        done = coming.result()
        behind.saved.append(taken if meter.memory else done.seconds)
        behind.bytes = max(behind.bytes, done.bytes)
        behind.others.setdefault("call_seconds", []).append(taken)

        sparse.step()
        path = folder / "unsafe"
        unsafe.saved.append(meter.take(save_unsafe, sparse, path)[0])
        unsafe.bytes = size_of(path)
        wanted = sparse.probe()
        sparse.step()
        unsafe.restored.append(meter.take(restore_unsafe, sparse, path)[0])
        must_equal(UNSAFE, sparse.probe(), wanted)
        path.unlink()
    commit()
    wanted = sparse.probe()
    sparse.step()
    back, _ = meter.take(partial(log.restore, sparse.tuning, sparse.optimizer, state=sparse.state))
    ours.others.setdefault("rollback_seconds", []).append(back)
    must_equal("rollback", sparse.probe(), wanted)
    random.random(), np.random.rand()  # each generator that has moved since the first commit is 2.5 KB more
    ours.others["bytes_all_generators"] = [commit().bytes]
    log.close()
    sparse.tuning.detach()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    taken, resumed = meter.take(resume, model, log.path)
    ours.restored.append(taken)
    must_equal(COMMIT, resumed.probe(), wanted)
    resumed.tuning.revert()
    must_equal("revert", some_of(list(model.parameters())), base)
    shutil.rmtree(log.path)


# --- training ---------------------------------------------------------------------------------------------------------


def measure_training(sparse: Sparse, folder: Path, blocks: int) -> dict[str, Any]:
    """Train in blocks with a commit in the middle, or none; what is written behind ends within the same block."""
    batches = [make_batch(32, 32, seed) for seed in range(8)]
    seconds: dict[str, list[float]] = {name: [] for name in ("none", COMMIT, ASYNC)}
    busy: dict[str, list[float]] = {name: [] for name in seconds}
    inside: dict[str, list[float]] = {name: [] for name in seconds}
    order = random.Random(SEED)
    with fishmask.CheckpointLog(folder / "training") as log:
        keep = {COMMIT: log.commit, ASYNC: log.commit_async}
        log.commit(sparse.tuning, sparse.optimizer, state=sparse.state)
        for turn in range(blocks + 1):
            for name in order.sample(list(seconds), len(seconds)):
                begin, processor, within = time.perf_counter(), time.process_time(), 0.0
                for i in range(EVERY):
                    sparse.step(batches[i % len(batches)])
                    if i == EVERY // 2 and name != "none":
                        start = time.perf_counter()
                        keep[name](sparse.tuning, sparse.optimizer, state=sparse.state)
                        within = time.perf_counter() - start
                log.wait()
                if turn:  # the first is to warm up
                    seconds[name].append(time.perf_counter() - begin)
                    busy[name].append(time.process_time() - processor)
                    inside[name].append(within)
    shutil.rmtree(folder / "training")
    found: dict[str, Any] = {"every": EVERY, "blocks": blocks, "block_seconds": seconds, "block_cpu_seconds": busy}
    for name in (COMMIT, ASYNC):
        found[name] = {
            "by_the_clock": slowdown(seconds[name], seconds["none"]),
            "by_processor_time": slowdown(busy[name], busy["none"]),
            "in_the_call": statistics.mean(inside[name]) / statistics.mean(seconds["none"]),
        }
    return found


def slowdown(slower: list[float], usual: list[float]) -> tuple[float, float]:
    """Return by what part of the usual time the others take longer, and the standard error of that."""
    parts = [(a - b) / statistics.mean(usual) for a, b in zip(slower, usual, strict=True)]
    return statistics.mean(parts), statistics.stdev(parts) / len(parts) ** 0.5


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(name: str, repeats: int, blocks: int, folder: Path) -> list[dict[str, Any]]:
    """Measure all methods on one model; return one record for each, and one for the training."""
    model = make_model(name)
    mask = make_mask(name, model)
    about = {"benchmark": "checkpoints", "model": name, "n": mask.n, "k": mask.k, "density": DENSITY, "seed": SEED}
    loads = [os.getloadavg()[0]]
    memory, clock = Meter(memory=True), Meter(memory=False)
    dense = Dense(model)
    for meter in [memory, *[clock] * repeats]:  # the round that measures the memory is to warm up
        measure_sparse(model, mask, folder, meter)
        measure_dense(dense, folder, meter)
        loads.append(os.getloadavg()[0])
    lines: list[dict[str, Any]] = []
    for method, took in clock.measured.items():
        rose = memory.measured[method]
        record: dict[str, Any] = {**about, "method": method, "bytes": took.bytes}
        for part, seconds, rises in (("save", took.saved, rose.saved), ("restore", took.restored, rose.restored)):
            record |= {f"{part}_seconds": statistics.median(seconds) if seconds else None}
            record |= {f"{part}_seconds_all": seconds, f"{part}_peak_rise_bytes": max(rises, default=None)}
        lines.append({**record, **took.others, "load": loads, **environment()})
    if name != "large":  # a step takes seconds there, and a commit is a smaller part of it
        del dense
        found = measure_training(Sparse(model, mask), folder, blocks)
        loads.append(os.getloadavg()[0])
        lines.append({**about, "method": "training", **found, "load": loads[-2:], **environment()})
    return lines


def show(lines: list[dict[str, Any]]) -> Table:
    """Lay the methods of one model out as a table."""
    methods = {line["method"]: line for line in lines if line["method"] != "training"}
    ours = methods[COMMIT]
    title = f"{ours['model']}: {ours['n']:,} entries, {ours['k']:,} masked; medians; files in the page cache"
    table = Table(title=title)
    for column in (
        "method",
        "bytes",
        "÷ commit",
        "s durable",
        "÷ commit",
        "MB rise",
        "s restore",
        "÷ commit",
        "MB rise",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, line in methods.items():
        cells = [f"{line['bytes']:,}", f"{line['bytes'] / ours['bytes']:.1f}"]
        for part, digits in (("save", 4), ("restore", 3)):
            seconds, rise = line[f"{part}_seconds"], line[f"{part}_peak_rise_bytes"]
            ratio = None if seconds is None else seconds / ours[f"{part}_seconds"]
            cells += ["", "", ""] if ratio is None else [f"{seconds:.{digits}f}", f"{ratio:.2f}", f"{rise / 1e6:.1f}"]
        table.add_row(name, *cells)
    return table


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Compare what was measured on one model with what is to be reached."""
    by_name = {line["method"]: line for line in lines}
    ours, model = by_name[COMMIT], by_name[COMMIT]["model"]
    call = statistics.median(by_name[ASYNC]["call_seconds"])
    over = ours["bytes"] - 3 * 4 * ours["k"]  # float32: a value and two moments
    every = ours["bytes_all_generators"][0] - 3 * 4 * ours["k"]
    told = [
        f"{model}: the first commit: {statistics.median(ours['first_seconds']):.3f} s, {ours['first_bytes'][0]:,} "
        f"bytes with base and mask; roll back {statistics.median(ours['rollback_seconds']):.4f} s; commit_async "
        f"holds the training up for {call:.4f} s",
        f"{verdict(over <= GOALS['overhead'])}: {model}: {over:,} bytes over k values and two moments (at most "
        f"{GOALS['overhead']:,}; with the generators of Python and numpy in use too: {every:,})",
    ]
    for name in (FULL, WEIGHTS) if model == "large" else ():
        times = by_name[name]["save_seconds_all"], ours["save_seconds_all"]
        ratio, least = (middle(times[0]) / middle(times[1]) for middle in (statistics.median, min))
        told.append(
            f"{verdict(ratio >= GOALS['times quicker'])}: {model}: durable {ratio:.1f} x quicker than {name} (at "
            f"least {GOALS['times quicker']:g} x; by the least times {least:.1f} x)"
        )
    for name in (COMMIT, ASYNC) if "training" in by_name else ():
        found = by_name["training"][name]
        (slower, error), (processor, its_error) = found["by_the_clock"], found["by_processor_time"]
        decided = abs(slower - GOALS["slowdown"]) > 2 * error
        reached = verdict(slower < GOALS["slowdown"]) if decided else "NOT DECIDED"
        told.append(
            f"{reached}: {model}: {name} every {EVERY} steps slows training by {slower:.2%} ± {error:.2%} (standard "
            f"error; less than {GOALS['slowdown']:.0%}); by processor time {processor:.2%} ± {its_error:.2%}; the "
            f"calls themselves take {found['in_the_call']:.2%}"
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up")
    parser.add_argument("--blocks", type=int, help="blocks of training of each kind; by default 8 for each round")
    add_options(parser)
    args = parser.parse_args()
    quiet(args.threads)
    console = Console(width=130)
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            lines = measure(name, args.repeats, args.blocks or 8 * args.repeats, Path(folder))
        report(console, show(lines), verdicts(lines), lines, args.output)


if __name__ == "__main__":
    main()
