"""Ways to the masked entries of a weight gradient, layer by layer, against what the plan takes and thinks of each.

    python -m benchmarks.kernels [--repeats 5] [--threads 1] [--device cpu] [--output results/kernels.jsonl]

Shapes are those of MiniLM's, BERT-base's and a 2,048-wide model's layers. "scattered" entries are drawn at random;
"clustered" ones are the largest of an outer product of log-normal numbers, as the Fisher scores of a linear layer
nearly are: there a few rows and columns hold most. All ways are timed in turn, on a CPU of one thread by process time,
and the least time of each counts. "dense" is what every other library does: the whole gradient, then its entries. On a
GPU the Triton kernels are timed too, in bfloat16.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import append, quiet
from fishmask import kernels, parts
from fishmask.costs import built_in
from fishmask.measure import environment
from fishmask.parts import Sampled
from fishmask.plans import ProductPlan

SHAPES = ((384, 384), (1536, 384), (768, 768), (3072, 768), (2048, 2048))
TOKENS = (256, 2048)
DENSITIES = (0.0005, 0.005, 0.05)
PATTERNS = ("scattered", "clustered")
EXAMPLE = 32  # tokens of an example that is scored
WAYS = (
    "dense", "dense, in 4 pieces", "block", "split", "sampled", "sampled, one chunk",
    "sampled, input transposed before", "tiles",
)  # fmt: skip


def entries(shape: tuple[int, int], density: float, pattern: str) -> Tensor:
    """Return sorted flat indices of the entries that are masked."""
    generator = torch.Generator().manual_seed(0)
    if pattern == "scattered":
        scores = torch.rand(shape, generator=generator)
    else:
        rows, columns = (torch.randn(n, generator=generator).mul(1.5).exp() for n in shape)
        scores = rows[:, None] * columns * torch.rand(shape, generator=generator)
    k = max(1, round(density * scores.numel()))
    return scores.flatten().topk(k).indices.sort().values


def ways(indices: Tensor, a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the ways by name; each includes the copies of used columns that it needs."""
    costs, device = built_in(a.device), a.device
    shape = (a.shape[1], b.shape[1])
    row, column = indices // shape[1], indices % shape[1]
    here = indices.to(device, torch.int32)

    def of(plan: ProductPlan) -> Callable[[], Tensor]:
        return lambda: plan.product(plan.rows_of(a), plan.columns_of(b))

    found: dict[str, Callable[[], Tensor]] = {"dense": lambda: (a.t() @ b).flatten().index_select(0, here).float()}
    bound, parts.BLOCK_BYTES = parts.BLOCK_BYTES, shape[0] * shape[1]  # a quarter of the float32 gradient
    pieces = parts.Block(row, column, shape, device, costs)
    parts.BLOCK_BYTES = bound
    found["dense, in 4 pieces"] = lambda: pieces.product(a, b)
    for kind in ("block", "split", *(("sampled",) if device.type == "cpu" else ())):
        found[kind] = of(ProductPlan(indices, shape, device=device, kind=kind, costs=costs))
    if device.type == "cpu":
        whole, before = (Sampled(row, column, shape, device, costs) for _ in range(2))
        whole.chunk = len(a)
        found["sampled, one chunk"] = lambda: whole.product(a, b)
        # A view of memory that is already row-major by column: its transposition is free.
        used = b if before.columns is None else b.index_select(1, before.columns)
        chunks = [part.t().contiguous() for part in used.split(before.chunk)]
        found["sampled, input transposed before"] = lambda: _sampled(before, a, chunks)
    if kernels.available(device):
        found["tiles"] = of(ProductPlan(indices, shape, device=device, kind="tiles", costs=costs))
    return found


def _sampled(part: Sampled, a: Tensor, chunks: list[Tensor]) -> Tensor:
    """Do what the part does with an operand that was kept transposed, in chunks."""
    a = a if part.rows is None else a.index_select(1, part.rows)
    values = torch.zeros(len(part.column_at))
    for left, right in zip(a.split(part.chunk), chunks, strict=True):
        sums = torch.sparse_csr_tensor(
            part.row_starts, part.column_at, values, size=(part.n_rows, part.n_columns), check_invariants=False
        )
        values = torch.sparse.sampled_addmm(sums, left.t().contiguous(), right.t()).values()
    return values


def check(every: dict[str, Callable[[], Tensor]]) -> None:
    """Refuse to time a way whose result is not that of the dense product."""
    dense = every["dense"]()
    far = {name: float((way() - dense).norm() / dense.norm()) for name, way in every.items()}
    if wrong := [name for name, distance in far.items() if distance > 5e-3]:  # bfloat16 rounds the dense one
        raise SystemExit(f"these ways give another gradient than the dense product: {', '.join(wrong)} ({far})")


def least(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the least seconds of each function, all called in turn."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            wait()
            start = clock()
            function()
            wait()
            times[name].append(clock() - start)
    return {name: min(taken[1:]) for name, taken in times.items()}


def products(shape: tuple[int, int], tokens: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Time all ways for one shape and number of tokens."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(tokens, n, generator=generator).to(device, dtype) for n in shape)
    lines = []
    for pattern in PATTERNS:
        for density in DENSITIES:
            indices = entries(shape, density, pattern)
            plan = ProductPlan(indices, shape, device=device)
            every = ways(indices, a, b)
            check(every)
            seconds = least(every, repeats, device)
            lines.append(
                {
                    "benchmark": "kernels", "what": "product", "shape": list(shape), "tokens": tokens,
                    "pattern": pattern, "density": density, "entries": len(indices),
                    "dtype": str(dtype).removeprefix("torch."), "seconds": seconds, "chosen": plan.kind,
                    "thought": {way: cost * tokens * 1e-9 for way, cost in plan.costs.items() if cost < float("inf")},
                }
            )  # fmt: skip
    return lines


def scorings(shape: tuple[int, int], tokens: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Time the sum of per-example squares by PyTorch and by the kernel; only on a GPU."""
    if device.type != "cuda":
        return []
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(tokens, n, generator=generator).to(device, torch.bfloat16) for n in shape)
    offsets = torch.arange(0, tokens + 1, EXAMPLE, dtype=torch.int32, device=device)
    scores = torch.zeros(shape, device=device)
    seconds = least(
        {
            "one product per example": lambda: kernels.add_powers_twin_(a, b, offsets, scores),
            "grouped": lambda: kernels.add_powers_(a, b, offsets, scores),
        },
        repeats,
        device,
    )
    return [
        {
            "benchmark": "kernels", "what": "scoring", "shape": list(shape), "tokens": tokens, "example": EXAMPLE,
            "dtype": "bfloat16", "seconds": seconds,
        }
    ]  # fmt: skip


def show(lines: list[dict[str, Any]]) -> Table:
    """Lay products out as a table of nanoseconds per token."""
    table = Table(title="Nanoseconds per token; * is what the plan takes")
    for column in ("layer", "tokens", "entries", "density", *WAYS):
        table.add_column(column, justify="right")
    for line in lines:
        cells = []
        for way in WAYS:
            seconds = line["seconds"].get(way)
            star = "*" if way == line["chosen"] else ""
            cells.append("" if seconds is None else f"{seconds / line['tokens'] * 1e9:,.0f}{star}")
        shape = " × ".join(map(str, line["shape"]))
        table.add_row(
            f"{shape} {line['pattern']}",
            f"{line['tokens']:,}",
            f"{line['entries']:,}",
            f"{line['density']:.2%}",
            *cells,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    parser.add_argument("--output", type=Path, help="append a JSON line per case to this file")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    device = torch.device(arguments.device)
    name = {"device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)}
    lines = []
    for shape in SHAPES[: arguments.shapes]:
        for tokens in TOKENS:
            for measure in (products, scorings):
                lines += [line | name | environment() for line in measure(shape, tokens, arguments.repeats, device)]
    console = Console(width=200)
    console.print(show([line for line in lines if line["what"] == "product"]))
    append(arguments.output, lines)


if __name__ == "__main__":
    main()
