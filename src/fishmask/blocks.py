"""Structured masks: entries chosen in whole blocks of a matrix, by the summed score of a block per entry.

A tensor is seen as a matrix: a vector is one row, a convolution's kernel ``[O, I, ...]`` has a row per output. Blocks
lie side by side from its first entry on; where its size is no multiple of theirs, the last ones are smaller.
"""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask import select
from fishmask.select import Keys, check_scores, threshold

Block = str | tuple[int, int]


def block_size(block: Block) -> tuple[int, int]:
    """Return the height and width of blocks; a whole row or column is as long as any tensor's.

    Args:
        block: Height and width as a pair, or as text such as ``"16x16"``; or ``"rows"`` or ``"columns"``.

    Raises:
        ValueError: It is none of these.
    """
    if block in ("rows", "columns"):
        return (1, sys.maxsize) if block == "rows" else (sys.maxsize, 1)
    if isinstance(block, str):
        found = re.fullmatch(r"([0-9]+)x([0-9]+)", block)
        size = tuple(map(int, found.groups())) if found else ()
    else:
        size = tuple(block) if isinstance(block, tuple | list) else ()
    if len(size) != 2 or not all(type(length) is int and length >= 1 for length in size):
        raise ValueError(
            f"block must be 'rows', 'columns', or height and width of at least 1, such as '1x16' or (16, 16); "
            f"got {block!r}"
        )
    return size[0], size[1]


@dataclass(frozen=True)
class Grid:
    """A tensor cut into blocks, which are numbered row by row.

    Attributes:
        rows: Of the matrix that the tensor is seen as.
        columns: Of that matrix.
        height: Of a block.
        width: Of a block.
    """

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: Sequence[int], block: Block) -> "Grid":
        """Cut a tensor of this shape; blocks larger than it are as large as it."""
        size = torch.Size(shape)
        rows = size[0] if len(size) > 1 else 1
        columns = size[1:].numel() if len(size) > 1 else size.numel()
        height, width = block_size(block)
        return cls(rows, columns, max(1, min(height, rows)), max(1, min(width, columns)))

    @property
    def down(self) -> int:
        """How many blocks lie one below the other."""
        return -(-self.rows // self.height)

    @property
    def across(self) -> int:
        """How many blocks lie side by side."""
        return -(-self.columns // self.width)

    def sizes(self) -> Tensor:
        """Return the number of entries of every block, float64 [blocks]: all are exact."""
        heights = torch.full((self.down,), self.height, dtype=torch.float64)
        widths = torch.full((self.across,), self.width, dtype=torch.float64)
        if self.down:
            heights[-1] = self.rows - (self.down - 1) * self.height
        if self.across:
            widths[-1] = self.columns - (self.across - 1) * self.width
        return torch.outer(heights, widths).view(-1)

    @cached_property
    def smallest(self) -> int:
        """Number of entries of the smallest block; 0 where there is none."""
        lowest = (self.rows - 1) % self.height + 1
        return lowest * ((self.columns - 1) % self.width + 1) if self.rows * self.columns else 0

    def entries(self, blocks: Tensor) -> Tensor:
        """Return the sorted flat indices (int64) of all entries of the numbered blocks (int64)."""
        row = (blocks // self.across * self.height)[:, None, None] + torch.arange(self.height)[:, None]
        column = (blocks % self.across * self.width)[:, None, None] + torch.arange(self.width)
        inside = (row < self.rows) & (column < self.columns)
        return (row * self.columns + column)[inside].sort().values


def block_means(score: Tensor, grid: Grid, *, magnitude: bool = False) -> Tensor:
    """Return the summed score of every block, divided by its number of entries.

    The sums are taken in float64 and in an order that depends on the grid alone, so their bits do not depend on the
    device or the number of threads. Memory is bounded by a chunk of about four million entries, or one block.

    Args:
        score: A floating-point tensor that the grid was made for, on any device.
        grid: How it is cut.
        magnitude: Add absolute values up.

    Returns:
        float64 [blocks], CPU.
    """
    matrix = score.detach().reshape(grid.rows, grid.columns)
    sums = torch.empty(grid.down, grid.across, dtype=torch.float64)
    high = max(1, select.CHUNK // max(1, grid.height * grid.columns))
    wide = max(1, select.CHUNK // (grid.height * grid.width)) if high == 1 else grid.across
    for top in range(0, grid.down, high):
        band = matrix[top * grid.height : (top + high) * grid.height]
        for left in range(0, grid.across, max(1, wide)):
            part = band[:, left * grid.width : (left + wide) * grid.width]
            # MPS has no float64.
            values = (part.cpu() if part.device.type == "mps" else part).to(torch.float64)
            sums[top : top + high, left : left + wide] = _sums(values.abs() if magnitude else values, grid)
    return sums.view(-1) / grid.sizes()


def _sums(values: Tensor, grid: Grid) -> Tensor:
    """Return the sums of the blocks of a part of the matrix, [down, across]."""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % grid.width, 0, -rows % grid.height))
    blocks = padded.view(-(-rows // grid.height), grid.height, -(-columns // grid.width), grid.width)
    return _halved(_halved(blocks).transpose(1, 2))


def _halved(values: Tensor) -> Tensor:
    """Add the last dimension up by halves, entry by entry: unlike a reduction, the same bits everywhere."""
    while (count := values.shape[-1]) > 1:
        half = count // 2
        sums = values[..., :half] + values[..., half : 2 * half]
        if count % 2:
            sums[..., 0] += values[..., -1]
        values = sums
    return values[..., 0]


def top_blocks(scores: Mapping[str, Tensor], k: int, block: Block, *, magnitude: bool = False) -> dict[str, Tensor]:
    """Choose whole blocks with the largest summed score per entry, at most k entries, over all tensors together.

    Blocks of one size are ranked by their sum. Between sizes, the sum per entry decides: ranked by the sum alone, the
    widest matrix would win by its width. Blocks that tie are ranked in the order of the mapping, then of the matrix.
    They are taken in the order of their rank; one that does not fit into what is left of k is passed over, and smaller
    ones of lower rank may still be taken.

    Besides the result, memory is 9 bytes per block, and a few times 8 bytes per block of the largest tensor.

    Args:
        scores: Floating-point tensors of any shape, on any device.
        k: How many entries may be chosen.
        block: The blocks (see ``block_size``).
        magnitude: Rank by absolute value.

    Returns:
        Sorted flat indices (int64, CPU) by name, for the names with at least one entry.

    Raises:
        TypeError: A score tensor is not floating-point.
        ValueError: Scores are NaN or infinite, or add up to infinity, or no block fits into k.
    """
    check_scores(scores)
    grids = {name: Grid.of(score.shape, block) for name, score in scores.items()}
    _check_fit(grids, k, block)
    ranks = {name: block_means(score, grids[name], magnitude=magnitude) for name, score in scores.items()}
    if large := [name for name, rank in ranks.items() if not bool(rank.isfinite().all())]:
        raise ValueError(
            f"scores add up to infinity within a block: make them all smaller alike; in: {', '.join(large)}"
        )
    taken = _in_order(ranks, grids, k)
    spent = sum(int(grids[name].sizes()[hit].sum()) for name, hit in taken.items())
    nonzero = sum(int(grids[name].sizes()[rank != 0].sum()) for name, rank in ranks.items())
    if spent > nonzero:
        warnings.warn(
            f"{spent:,} entries are chosen, but only {nonzero:,} are in blocks whose summed score is not zero: the "
            f"rest are ties at zero, chosen by lowest index; score more examples or lower the density",
            UserWarning,
            stacklevel=3,
        )
    return _entries(taken, grids)


def random_blocks(shapes: Mapping[str, Sequence[int]], k: int, block: Block, seed: int) -> dict[str, Tensor]:
    """Choose whole blocks in a random order, every order equally likely, as ``top_blocks`` does in that of scores.

    The same seed gives the same blocks wherever numpy's generator does (see ``fishmask.select.random_k``).

    Args:
        shapes: The shape of every parameter.
        k: How many entries may be chosen.
        block: The blocks (see ``block_size``).
        seed: Any non-negative integer.

    Returns:
        Sorted flat indices (int64, CPU) by name, for the names with at least one entry.

    Raises:
        ValueError: No block fits into k.
    """
    grids = {name: Grid.of(shape, block) for name, shape in shapes.items()}
    _check_fit(grids, k, block)
    generator = np.random.default_rng(seed)
    ranks = {name: torch.from_numpy(generator.random(grid.down * grid.across)) for name, grid in grids.items()}
    return _entries(_in_order(ranks, grids, k), grids)


def _check_fit(grids: Mapping[str, Grid], k: int, block: Block) -> None:
    """Refuse a budget that is there but has no room for any block."""
    smallest = min((grid.smallest for grid in grids.values() if grid.smallest), default=0)
    if 0 < k < smallest:
        raise ValueError(
            f"block={block!r}: the smallest block has {smallest:,} entries, but the density leaves room for {k:,}; "
            f"raise the density, or take smaller blocks"
        )


class _Open(Keys):
    """The blocks that are still to be had: not taken, and no larger than the room that is left."""

    def __init__(
        self, ranks: Mapping[str, Tensor], grids: Mapping[str, Grid], taken: Mapping[str, Tensor], room: int
    ) -> None:
        super().__init__(ranks, torch.float64)
        self.grids, self.taken, self.room = grids, taken, room

    def weighted(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys of one tensor's blocks and what each of them counts: its entries, 0 where it is not to be had.

        One piece for each tensor: there are far fewer blocks than entries.
        """
        sizes = self.grids[name].sizes()
        sizes[self.taken[name] | (sizes > self.room)] = 0
        yield self.keys(self.scores[name]), sizes


def _in_order(ranks: Mapping[str, Tensor], grids: Mapping[str, Grid], k: int) -> dict[str, Tensor]:
    """Say for every block whether it is taken, by falling rank while it fits whole into what is left of k.

    Each turn takes the run of blocks up to the first that does not fit. After it only smaller ones come into question,
    so there are no more turns than sizes of blocks.
    """
    taken = {name: torch.zeros(len(rank), dtype=torch.bool) for name, rank in ranks.items()}
    room = k
    while room:
        source = _Open(ranks, grids, taken, room)
        if sum(int(sizes.sum()) for name in ranks for _, sizes in source.weighted(name)) <= room:
            for name in ranks:
                for _, sizes in source.weighted(name):
                    taken[name] |= sizes > 0
            break
        limit, room = threshold(source, room)
        full = False
        for name in ranks:
            for keys, sizes in source.weighted(name):
                taken[name] |= (keys > limit) & (sizes > 0)
                if full:
                    continue
                ties = ((keys == limit) & (sizes > 0)).nonzero().view(-1)
                spent = sizes[ties].cumsum(0)
                fitting = int((spent <= room).sum())
                full = fitting < len(ties)
                if fitting:
                    taken[name][ties[:fitting]] = True
                    room -= int(spent[fitting - 1])
    return taken


def _entries(taken: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    chosen = {name: hit.nonzero().view(-1) for name, hit in taken.items()}
    return {name: grids[name].entries(blocks) for name, blocks in chosen.items() if len(blocks)}
