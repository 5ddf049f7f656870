"""What a structured mask saves: one training step and the bytes of its indices, beside single entries at equal density.

    python -m benchmarks.structured [--repeats 7] [--threads 1] [--output results/structured_costs.jsonl]

MiniLM (22.7M entries), density 0.5 %, the head whole: masks by Fisher scores over all parameters, and masks at random
in the weight matrices of the layers. Steps as in `benchmarks.step`: AdamW, all masks interleaved, least process time;
"floor" is the forward and the gradients of the inputs alone. "by block" is what the indices would take if the numbers
of the blocks were coded instead of those of the entries, by the same code.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import append, quiet
from benchmarks.step import DENSITY, SHAPES, fish, fisher_scores, floor, least_seconds, load, make_batch
from experiments.structured import BLOCKS, NAMES, TITLES
from fishmask import Mask
from fishmask.blocks import Grid
from fishmask.choose import outside_of_layers
from fishmask.container import encode_indices
from fishmask.measure import environment


def masks() -> dict[tuple[str, str], Mask]:
    """Return the masks by method and block."""
    model, scores = load(), fisher_scores()
    rest = outside_of_layers(model, ("classifier.weight", "classifier.bias"))
    made = {}
    for block in BLOCKS:
        given = block or None
        made["fish", block] = Mask.from_scores(scores, DENSITY, keep="classifier", block=given)
        made["random", block] = Mask.random(model, DENSITY, 0, keep="classifier", exclude=rest, block=given)
    return made


def index_bytes(mask: Mask, block: str) -> tuple[int, int]:
    """Return the bytes of the coded indices as files hold them, and those of coded block numbers."""
    grids = {name: Grid.of(shape, block or (1, 1)) for name, shape in mask.shapes.items()}
    blocks = {name: _blocks(grids[name], indices) for name, indices in mask.indices.items()}
    coded, _ = encode_indices(mask.indices, {name: shape.numel() for name, shape in mask.shapes.items()})
    by_block, _ = encode_indices(blocks, {name: grid.down * grid.across for name, grid in grids.items()})
    return len(coded), len(by_block)


def _blocks(grid: Grid, indices: torch.Tensor) -> torch.Tensor:
    row, column = indices // grid.columns, indices % grid.columns
    return torch.unique(row // grid.height * grid.across + column // grid.width)


def show(lines: list[dict[str, Any]], threads: int) -> Table:
    """Lay the lines out as a table."""
    table = Table(title=f"Structured masks of MiniLM, {threads} thread(s), float32")
    columns = ("mask", "entries", *(f"step {shape} / floor" for shape in SHAPES), "index bytes / entry", "by block")
    for column in columns:
        table.add_column(column, justify="left" if column == "mask" else "right", no_wrap=True)
    for line in lines:
        table.add_row(
            f"{TITLES[line['method']]}: {NAMES[line['block']]}",
            f"{line['entries']:,}",
            *(f"{line['seconds'][shape] / line['floor_seconds'][shape]:.3f}" for shape in SHAPES),
            *(f"{line[name] / line['entries']:.4f}" for name in ("index_bytes", "index_bytes_by_block")),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps timed per mask and shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append a JSON line per mask to this file")
    options = parser.parse_args()
    quiet(options.threads)

    chosen = masks()
    ready = {("floor", ""): floor(load()), **{key: fish(mask)(load()) for key, mask in chosen.items()}}
    named = {" ".join(key): method for key, method in ready.items()}
    seconds = {shape: least_seconds(named, make_batch(*size), options.repeats) for shape, size in SHAPES.items()}
    lines = []
    for (method, block), mask in chosen.items():
        coded, by_block = index_bytes(mask, block)
        lines.append(
            {
                "benchmark": "structured",
                "method": method,
                "block": block,
                "density": DENSITY,
                "entries": mask.k,
                "index_bytes": coded,
                "index_bytes_by_block": by_block,
                "seconds": {shape: min(found[f"{method} {block}"]) for shape, found in seconds.items()},
                "floor_seconds": {shape: min(found["floor "]) for shape, found in seconds.items()},
                "repeats": options.repeats,
                "seed": 0,
                **environment(),
            }
        )
    Console(width=140).print(show(lines, options.threads))
    append(options.output, lines)


if __name__ == "__main__":
    main()
