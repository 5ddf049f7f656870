"""One training step at every size, and what leads to it: time, memory, scoring and files, beside what is possible.

    python -m benchmarks.models [--models bert-base bert-large llama-1b llama-7b] [--output results/models.jsonl]
    python -m benchmarks.models --models tiny        # a check of a few seconds

The models have the shapes of BERT-base, BERT-large, Llama 3.2 1B and Llama 2 7B and random weights, which do for speed
and memory. All methods train with AdamW on the same random tokens without padding. "floor" is the forward and the
gradients of all inputs, without any weight gradient. SHiRA, Supertuning and the smaller LoRA get about the mask's count
of entries, in linear layers alone.

- Time: the least of several steps of all methods in turns, in one process that holds the frozen weights once; CPU time
  where the model is on the CPU. Where they do not fit together each method has a process of its own.
- Memory: in a process of its own for each method, from the second step. On the CPU the peak of the resident set above
  the process before the model was made, and the peak of what PyTorch's allocator gave out; on a GPU only the latter.
  glibc is told to give freed blocks back at once; what it adds without that is measured by `benchmarks.resident`.
- Predicted: `fishmask.forecast` for the same step. What is not run because of it gets a line that says so.
- Scoring: seconds per example of 32 tokens, with the Fisher information of `fishmask.fisher`, beside the loop that does
  one backward for each example and squares each gradient. The "FISH mask" is made of those scores; without memory for
  them there is only the random one.
- File: what is saved of the result. For full fine-tuning these are all weights, counted and not written.
"""

import argparse
import copy
import ctypes
import gc
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import fishmask
from benchmarks.record import append, quiet, verdict
from fishmask.empty import prepared, tokens
from fishmask.forecast import Forecast, forecast, size_text
from fishmask.measure import environment, peak_memory_bytes

DENSITY, RANK = 0.005, 16
FLOOR, FULL, LORA, OURS, RANDOM = "floor", "full fine-tuning", f"LoRA r={RANK}", "FISH mask", "random mask"
EQUAL, SHIRA, SUPER = "LoRA, equal count", "SHiRA", "Supertuning"
METHODS = (FLOOR, FULL, LORA, EQUAL, SHIRA, SUPER, RANDOM, OURS)
FREE = 0.9  # of the memory that is free: how much of it a run may be predicted to take
# Options of glibc's mallopt: blocks from this size on are given back to the system at once when they are free, so that
# the resident set tells the truth.
TRIM_THRESHOLD, MMAP_THRESHOLD, LARGE = -1, -3, 65536


@dataclass(frozen=True)
class Shape:
    """A model's configuration, the dtype of its weights, and examples x tokens of a step and of scoring."""

    config: Any
    dtype: torch.dtype
    batch: tuple[int, int]
    scored: tuple[int, int]


def llama(hidden: int, layers: int, heads: int, groups: int, inner: int, vocabulary: int, *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], use_cache=False,
    )  # fmt: skip


def bert(hidden: int, layers: int, vocabulary: int = 30522) -> BertConfig:
    return BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
        vocab_size=vocabulary,
    )  # fmt: skip


SHAPES = {
    "tiny": Shape(bert(128, 2, 2000), torch.float32, (2, 32), (4, 32)),
    "bert-base": Shape(bert(768, 12), torch.float32, (8, 128), (8, 32)),
    "bert-large": Shape(bert(1024, 24), torch.float32, (4, 128), (8, 32)),
    "llama-1b": Shape(llama(2048, 16, 32, 8, 8192, 128256, tied=True), torch.bfloat16, (1, 64), (4, 32)),
    "llama-7b": Shape(llama(4096, 32, 32, 32, 11008, 32000, tied=False), torch.bfloat16, (1, 64), (4, 32)),
}


def load(shape: Shape, device: str) -> Any:
    """Make the model with random weights."""
    torch.manual_seed(0)
    causal = (shape.config.architectures or [""])[0].endswith(("ForCausalLM", "LMHeadModel"))
    family = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with torch.device(device):
        return family.from_config(shape.config, dtype=shape.dtype).train()


def make_batch(model: Any, examples: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random tokens: how many different ones there are counts for the embeddings."""
    g = torch.Generator().manual_seed(seed)
    made = tokens(model, examples, length)
    ids = torch.randint(1, model.config.vocab_size, (examples, length), generator=g).to(made["input_ids"].device)
    return made | {"input_ids": ids} | ({"labels": ids} if made["labels"].dim() == 2 else {})


class Method:
    """A model, what of it is trained, and how the result is saved."""

    def __init__(self, model: Any, name: str, mask: fishmask.Mask | None, count: int) -> None:
        self.tuning: fishmask.Tuning | None = None
        if mask is not None:
            self.tuning = fishmask.attach(model, mask)
            self.model, trained = model, list(self.tuning.parameters())
        else:
            self.model = adapted(model, name, count)
            trained = [p for p in self.model.parameters() if p.requires_grad]
        self.entries = 0 if name == FLOOR else sum(p.numel() for p in trained)
        self.optimizer = None if name == FLOOR else torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Do one training step."""
        self.model(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def file_bytes(self, name: str, folder: Path) -> int | None:
        """Save the result and return its size; that of all weights for full fine-tuning."""
        if name == FLOOR:
            return None
        if name == FULL:
            return sum(p.nbytes for p in self.model.parameters())
        if self.tuning is None:
            self.model.save_pretrained(folder, save_embedding_layers=False)
        else:
            folder.mkdir()
            self.tuning.delta().save(folder / "delta.safetensors")
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def mask_of(masks: Path, name: str) -> fishmask.Mask | None:
    """Read a method's mask; None for a method without one."""
    return fishmask.Mask.load(masks / f"{name}.safetensors") if name in (OURS, RANDOM) else None


def adapted(model: Any, name: str, count: int) -> Any:
    """Prepare a model for a method that is not ours, those without a fixed size with about so many entries."""
    if name in (FLOOR, FULL, LORA):
        return prepared(model, {FLOOR: "floor", FULL: "full", LORA: f"lora:{RANK}"}[name])
    rank = equal_rank(model, count)
    if name == EQUAL:
        return prepared(model, f"lora:{rank}")
    from peft import ShiraConfig, SupertuningConfig, get_peft_model

    kind = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else None
    options: dict[str, Any] = {"target_modules": "all-linear", "task_type": kind}
    if name == SHIRA:
        return get_peft_model(model, ShiraConfig(r=rank, random_seed=0, **options))
    inside = sum(layer.weight.numel() for layer in body(model))
    return get_peft_model(model, SupertuningConfig(sparsity=1 - count / inside, **options))


def body(model: Any) -> list[nn.Linear]:
    """Return the linear layers that adapters go into: all but the head."""
    head = {id(m) for m in (model.get_output_embeddings(), *(getattr(model, n, None) for n in ("classifier", "score")))}
    return [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in head]


def equal_rank(model: Any, count: int) -> int:
    """Return the rank of LoRA with about so many entries."""
    return max(1, round(count / sum(sum(layer.weight.shape) for layer in body(model))))


# --- parts that run in a process of their own -------------------------------------------------------------------------


def clock(device: str) -> float:
    """Return seconds: of the processor, or on the clock once the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def loop(shape: Shape, device: str) -> list[float]:
    """Time the loop of one backward for each example, which squares all gradients; the first is to warm up."""
    model = load(shape, device).eval()
    batch = make_batch(model, *shape.scored)
    squares = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    taken: list[float] = []
    for n in range(len(batch["input_ids"])):
        start = clock(device)
        model.zero_grad()
        model(**{name: t[n : n + 1] for name, t in batch.items()}).loss.backward()
        for p, square in zip(model.parameters(), squares, strict=True):
            square += p.grad.float().square()
        taken.append(clock(device) - start)
    return taken


def score(shape: Shape, device: str, masks: Path) -> list[float]:
    """Time scoring by this library, seconds for an example, and write the mask; the first time is to warm up."""
    model = load(shape, device)
    taken: list[float] = []
    for _ in range(2):
        scores = None  # not two at a time
        start = clock(device)
        scores = fishmask.fisher(model, [make_batch(model, *shape.scored)], examples=shape.scored[0])
        taken.append((clock(device) - start) / shape.scored[0])
    fishmask.Mask.from_scores(scores, DENSITY, keep=heads(scores)).save(masks / f"{OURS}.safetensors")
    return taken


def draw(shape: Shape, masks: Path) -> None:
    """Write the random mask."""
    model = load(shape, "meta")
    names = heads(dict(model.named_parameters()))
    fishmask.Mask.random(model, DENSITY, seed=0, keep=names).save(masks / f"{RANDOM}.safetensors")


def heads(parameters: dict[str, Tensor]) -> list[str]:
    """Return the names of a classifier's head, which is trained whole."""
    return [name for name in parameters if name.partition(".")[0] == "classifier"]


def timed(shape: Shape, device: str, masks: Path, names: list[str], repeats: int, count: int) -> dict[str, list[float]]:
    """Time steps of several methods in turns; the frozen weights are in memory once."""
    base = load(shape, device)
    methods: dict[str, Method] = {}
    for name in names:
        # Parameters of its own, since each wants other gradients, on the same memory.
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
        methods[name] = Method(twin(base, shared), name, mask_of(masks, name), count)
    batch = make_batch(base, *shape.batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, method in methods.items():
            start = clock(device)
            method.step(batch)
            if turn:
                seconds[name].append(clock(device) - start)
    return seconds


def twin(model: nn.Module, parameters: dict[int, nn.Parameter]) -> nn.Module:
    """Copy a model with these in the place of its parameters, by their id."""
    return copy.deepcopy(model, dict(parameters))


def memory(shape: Shape, device: str, masks: Path, name: str, count: int) -> dict[str, Any]:
    """Measure the memory of a step, and the file of the result."""
    small, mask = SHAPES["tiny"], mask_of(masks, name)
    for option in (TRIM_THRESHOLD, MMAP_THRESHOLD) if device == "cpu" else ():
        ctypes.CDLL(None).mallopt(option, LARGE)

    def warm_up() -> None:  # libraries, threads and the profiler take their memory now
        model = load(small, device)
        method = Method(model, name, mask and fishmask.Mask.random(model, DENSITY, seed=0), int(DENSITY * 1e6))
        batch = make_batch(method.model, *small.batch)
        method.step(batch)
        rise(lambda: method.step(batch))

    warm_up()
    settle()
    before, others = resident(), standing()
    method = Method(load(shape, device), name, mask, count)
    batch = make_batch(method.model, *shape.batch)
    method.step(batch)
    settle()
    result: dict[str, Any] = {"entries": method.entries}
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        result["allocated_bytes"] = standing() - others + rise(lambda: method.step(batch))
        result["resident_bytes"] = peak_memory_bytes() - before
    else:
        torch.cuda.reset_peak_memory_stats()
        method.step(batch)
        result["allocated_bytes"] = torch.cuda.max_memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        result["file_bytes"] = method.file_bytes(name, Path(folder) / "result")
    return result


def settle() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Return the bytes that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def standing() -> int:
    """Count the bytes of all tensors there are."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    found = [part for t in found for part in ([t._indices(), t._values()] if t.is_sparse else [t])]
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.layout is torch.strided}
    return sum(blocks.values())


def rise(work: Callable[[], None]) -> int:
    """Return the most bytes that PyTorch's allocator on the CPU has given out during some work."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# --- the whole --------------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace, work: Callable[..., Any], *options: Any) -> Any:
    """Do some work in a process of its own: one that has imported everything, save where a GPU forbids that."""
    context = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")
    with context.Pool(1, initializer=quiet, initargs=(args.threads,)) as pool:
        return pool.apply(work, options)


def predicted(shape: Shape, device: str, name: str, count: int, mask: fishmask.Mask | None) -> Forecast | None:
    """Return the forecast of a method; None for PEFT's sparse methods, whose layers it cannot run."""
    common: dict[str, Any] = {"batch": shape.batch, "dtype": shape.dtype, "device": device}
    if name in (OURS, RANDOM):
        return forecast(shape.config, mask=mask, **({} if mask else {"density": DENSITY}), **common)
    if name in (SHIRA, SUPER):
        return None
    if name == EQUAL:
        with torch.device("meta"):
            rank = equal_rank(load(shape, "meta"), count)
        return forecast(shape.config, method=f"lora:{rank}", **common)
    return forecast(shape.config, method={FLOOR: "floor", FULL: "full", LORA: f"lora:{RANK}"}[name], **common)


def available(device: str) -> int:
    """Return the bytes that are free for a run."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    found = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024


def measure(args: argparse.Namespace, name: str, shape: Shape, masks: Path, console: Console) -> list[dict[str, Any]]:
    """Measure one model with all methods; what does not fit gets a line that says so."""
    about = {
        "benchmark": "models",
        "model": name,
        "shape": f"{shape.batch[0]}x{shape.batch[1]}",
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": args.device,
        "device_name": torch.cuda.get_device_name() if args.device == "cuda" else "",
        "density": DENSITY,
        "seed": 0,
        **environment(),
    }
    sizes = [p.numel() for p in load(shape, "meta").parameters()]
    n, own, sums = sum(sizes), shape.dtype.itemsize, torch.float32.itemsize
    about["n"], count = n, int(DENSITY * n)
    told = {method: child(args, predicted, shape, args.device, method, count, None) for method in METHODS}
    worst = max(one.peak for one in told.values() if one)
    # PEFT's sparse methods have no forecast: they are taken to need as much as the largest of the others.
    peaks = {method: one.peak if one else worst for method, one in told.items()}
    child(args, draw, shape, masks)

    def fits(needs: int) -> bool:  # now, since others may use this machine
        return needs <= min(FREE * available(args.device), args.most * 2**30)

    lines: list[dict[str, Any]] = []
    times = {
        "loop_all": child(args, loop, shape, args.device) if fits(n * (2 * own + sums) + 2 * max(sizes) * sums) else [],
        "seconds_all": child(args, score, shape, args.device, masks) if fits(n * (own + sums)) else [],
    }
    if times["seconds_all"]:
        ours, theirs = min(times["seconds_all"][1:]), min(times["loop_all"][1:], default=None)
        ratio = {} if theirs is None else {"loop_seconds": theirs, "times_faster": theirs / ours}
        lines.append(
            {**about, "method": "scoring", "fits": True, "scored": shape.scored, "seconds": ours, **ratio, **times}
        )
    fitting = [m for m in METHODS if fits(peaks[m]) and (m != OURS or times["seconds_all"])]
    seconds = step_times(args, shape, fitting, told, fits, masks, count) if fitting else {}
    for method in METHODS:
        line = {**about, "method": method, "fits": method in fitting, **forecast_line(told[method])}
        if method in fitting:
            if method in (OURS, RANDOM):
                exact = child(args, predicted, shape, args.device, method, count, mask_of(masks, method))
                line |= forecast_line(exact)
            line |= child(args, memory, shape, args.device, masks, method, count)
            line |= {"seconds": min(seconds[method]), "seconds_all": seconds[method], "load": os.getloadavg()[0]}
            console.print(f"{name}: {method}: {line['seconds']:.3f} s", highlight=False)
        lines.append(line)
    return lines


def forecast_line(told: Forecast | None) -> dict[str, Any]:
    """Return what a record keeps of a forecast."""
    return (
        {} if told is None else {"predicted_bytes": told.peak, "predicted_parts": told.parts, "host_bytes": told.host}
    )


def step_times(
    args: argparse.Namespace,
    shape: Shape,
    fitting: list[str],
    told: dict[str, Forecast | None],
    fits: Callable[[int], bool],
    masks: Path,
    count: int,
) -> dict[str, list[float]]:
    """Time steps of all methods together where they fit, else of each alone."""
    options = (args.repeats, count)
    known = [one for method in fitting if (one := told[method]) is not None]
    between = sum(one.most["values"] + one.most["masks"] + one.most["optimizer"] for one in known)
    if fits(between + max(one.peak for one in known)):
        return dict(child(args, timed, shape, args.device, masks, fitting, *options))
    return {method: child(args, timed, shape, args.device, masks, [method], *options)[method] for method in fitting}


def show(lines: list[dict[str, Any]]) -> Table:
    """Lay the lines of one model out as a table."""
    first = lines[0]
    table = Table(
        title=f"{first['model']}: {first['n']:,} entries, {first['shape']}, {first['dtype']}, {first['device']}"
    )
    columns = ("method", "entries", "s / step", "/ floor", "/ LoRA", "peak", "/ floor", "predicted", "resident", "file")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    steps = {line["method"]: line for line in lines if line["method"] in METHODS}
    for method, line in steps.items():
        if not line["fits"]:
            needs = line.get("predicted_bytes")
            table.add_row(method, *[""] * 4, f"does not fit: {size_text(needs) if needs else 'as full'}")
            continue
        others = [steps.get(other, {}) for other in (FLOOR, LORA)]
        predicted_bytes, file_bytes = line.get("predicted_bytes"), line["file_bytes"]
        table.add_row(
            method,
            f"{line['entries']:,}",
            f"{line['seconds']:.3f}",
            *(f"{line['seconds'] / other['seconds']:.2f}" if "seconds" in other else "" for other in others),
            size_text(line["allocated_bytes"]),
            f"{line['allocated_bytes'] / others[0]['allocated_bytes']:.2f}" if others[0].get("fits") else "",
            "" if predicted_bytes is None else f"{predicted_bytes / line['allocated_bytes'] - 1:+.1%}",
            f"{line['resident_bytes'] / line['allocated_bytes'] - 1:+.1%}" if "resident_bytes" in line else "",
            "" if file_bytes is None else f"{file_bytes / 1e6:,.1f} MB",
        )
    return table


def goals(lines: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """Compare one model's lines with the goals: whether each is reached, and by what; without those not measured."""
    by = {line["method"]: line for line in lines if line["fits"]}
    gpu, told = lines[0]["device"] == "cuda", []
    if {OURS, FLOOR} <= set(by):
        slower, most = by[OURS]["seconds"] / by[FLOOR]["seconds"], 1.10 if gpu else 1.05
        told.append((slower <= most, f"step {slower:.2f} × the floor (at most {most:.2f})"))
    if gpu and {OURS, LORA} <= set(by):
        beside = by[OURS]["seconds"] / by[LORA]["seconds"]
        told.append((beside <= 1, f"step {beside:.2f} × that of LoRA r={RANK} (at most 1)"))
    if {OURS, EQUAL} <= set(by):
        beside = by[OURS]["allocated_bytes"] / by[EQUAL]["allocated_bytes"]
        told.append((beside < 1, f"peak {beside:.2f} × that of LoRA of equal count (below 1)"))
    if "times_faster" in by.get("scoring", {}):
        faster, least = by["scoring"]["times_faster"], 10 if gpu else 4
        told.append((faster >= least, f"scoring {faster:.1f} × as quick as the loop (at least {least})"))
    known = [line for line in by.values() if "predicted_bytes" in line]
    if known:
        wrong = max(abs(line["predicted_bytes"] / line["allocated_bytes"] - 1) for line in known)
        told.append((wrong <= 0.1, f"forecasts at most {wrong:.1%} off the peak (at most 10 %)"))
    return told


def shaped(args: argparse.Namespace, name: str) -> Shape:
    """Return a shape with the batch that was asked for."""
    shape = SHAPES[name]
    if not args.batch:
        return shape
    examples, length = map(int, args.batch.split("x"))
    return Shape(shape.config, shape.dtype, (examples, length), shape.scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", help="examples x tokens, for all models; each has its own by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="steps timed for each method")
    parser.add_argument("--most", type=float, default=math.inf, help="GiB that a run may be predicted to take")
    parser.add_argument("--output", type=Path, help="append a JSON line per model and method to this file")
    args = parser.parse_args()
    quiet(args.threads)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(width=150)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            lines = measure(args, name, shaped(args, name), Path(folder), console)
        console.print(show(lines))
        for reached, told in goals(lines):
            console.print(f"{verdict(reached)}  {told}", highlight=False)
        append(args.output, lines)


if __name__ == "__main__":
    main()
