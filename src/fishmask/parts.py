"""Parts of a product: ways to masked entries of ``Aᵀ B``, and what each of them costs.

Shapes: A [T, rows], B [T, columns], K entries in the order of their flat indices. A part holds indices of 32 bits.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask.costs import Costs

BLOCK_BYTES = 64 << 20  # the most memory that a dense product takes at a time
# Tokens per sampled product: transposed copies of this size stay in the cache, twice as quick as whole ones. More
# than 512 gain nothing, and with fewer than 128 the product itself gets slow; half a megabyte for both leaves room for
# what else runs on the core.
_CHUNK_BYTES = 1 << 19
_CHUNK = (128, 512)


def taken(costs: Costs, used: Any, size: Any, other: Any) -> Any:
    """Return how many columns of an operand a dense product takes; numbers or arrays.

    Args:
        costs: What things cost.
        used: Columns that entries use.
        size: All columns.
        other: Columns of the other operand.

    Returns:
        ``used``, or ``size`` where copying the used ones costs more than it saves.
    """
    return np.where(costs.copy(used, size) + costs.product(used, other) < costs.product(size, other), used, size)


def transposed(costs: Costs, used: Any, size: Any) -> Any:
    """Return how many columns of an operand a sampled product takes; numbers or arrays.

    Args:
        costs: What things cost.
        used: Columns that entries use.
        size: All columns.

    Returns:
        ``used``, or ``size`` where copying the used ones costs more than it saves.
    """
    if costs.transpose is None:
        return used
    return np.where(costs.copy(used, size) + costs.transpose * used < costs.transpose * size, used, size)


def block_cost(costs: Costs, rows: Any, columns: Any, size: tuple[int, int]) -> Any:
    """Return the cost of a `Block` in nanoseconds per token; numbers or arrays.

    Args:
        costs: What things cost.
        rows: Rows that entries use.
        columns: Columns that entries use.
        size: All rows and columns.
    """
    n_columns = taken(costs, columns, size[1], rows)
    n_rows = taken(costs, rows, size[0], n_columns)
    copies = np.where(n_columns < size[1], costs.copy(columns, size[1]), 0.0)
    copies = copies + np.where(n_rows < size[0], costs.copy(rows, size[0]), 0.0)
    return copies + costs.product(n_rows, n_columns) + costs.part


def sampled_cost(costs: Costs, entries: Any, rows: Any, columns: Any, size: tuple[int, int]) -> Any:
    """Return the cost of a `Sampled` in nanoseconds per token, infinite where there is none; numbers or arrays.

    Args:
        costs: What things cost.
        entries: Number of entries.
        rows: Rows that they use.
        columns: Columns that they use.
        size: All rows and columns.
    """
    if costs.sampled is None or costs.transpose is None:
        return np.full(np.shape(entries), np.inf)
    total = costs.sampled * entries + costs.part
    for used, whole in ((rows, size[0]), (columns, size[1])):
        n = transposed(costs, used, whole)
        total = total + np.where(n < whole, costs.copy(used, whole), 0.0) + costs.transpose * n
    return total


def used(positions: Tensor, size: int, n: int) -> tuple[Tensor | None, Tensor, int]:
    """Find the columns that are copied, and where each entry is among them.

    Args:
        positions: int64 [K] in an operand of ``size`` columns.
        size: Columns of the operand.
        n: How many are taken: the used ones, or all.

    Returns:
        The columns, int64, or None for all; the place of each entry; how many there are.
    """
    if n >= size:
        return None, positions, size
    present = torch.zeros(size, dtype=torch.bool)
    present[positions] = True
    return present.nonzero().squeeze(1), (present.cumsum(0) - 1)[positions], int(present.sum())


def count(positions: Tensor, size: int) -> int:
    """Return how many of ``size`` columns int64 positions [K] use."""
    return int(torch.bincount(positions, minlength=size).count_nonzero())


class Block:
    """A dense product of used rows and columns, from which the entries are gathered.

    It is made in pieces of some rows each, so that it never takes more than ``BLOCK_BYTES``. Where the entries are
    all of the block nothing is gathered.
    """

    def __init__(self, row: Tensor, column: Tensor, size: Sequence[int], device: torch.device, costs: Costs) -> None:
        used_rows, used_columns = count(row, size[0]), count(column, size[1])
        n = int(taken(costs, used_columns, size[1], used_rows))
        columns, column_at, n_columns = used(column, size[1], n)
        rows, row_at, n_rows = used(row, size[0], int(taken(costs, used_rows, size[0], n_columns)))
        step = max(1, min(n_rows, BLOCK_BYTES // (4 * max(1, n_columns))))
        self.narrow_left = step <= n_columns  # the narrower operand goes left: 2-3 times quicker when very narrow
        self.whole = len(row) == n_rows * n_columns
        self.pieces: list[tuple[int, int, int, int]] = []  # first row and last, first entry and last
        position = torch.empty_like(row)
        for first in range(0, n_rows, step):
            last = min(n_rows, first + step)
            start, end = torch.searchsorted(row_at, torch.tensor([first, last])).tolist()
            within, across = row_at[start:end] - first, column_at[start:end]
            position[start:end] = within * n_columns + across if self.narrow_left else across * (last - first) + within
            if end > start:
                self.pieces.append((first, last, start, end))
        self.position = torch.empty(0) if self.whole else compact(position, device)
        self.rows, self.columns = compact(rows, device), compact(columns, device)
        self.n_rows, self.n_columns = n_rows, n_columns

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the entries for operands a [T, rows] and b [T, columns], float32 [K]."""
        a = a if self.rows is None else a.index_select(1, self.rows)
        b = b if self.columns is None else b.index_select(1, self.columns)
        found = []
        for first, last, start, end in self.pieces:
            left = a[:, first:last]
            if self.whole:
                block = left.t() @ b if self.narrow_left else (b.t() @ left).t()
                found.append(block.reshape(-1).float())
            else:
                block = left.t() @ b if self.narrow_left else b.t() @ left
                found.append(block.flatten().index_select(0, self.position[start:end]).float())
        return found[0] if len(found) == 1 else torch.cat([a.new_empty(0, dtype=torch.float32), *found])


class Sampled:
    """One inner product per entry, by a sampled product; on CPUs, for entries that are scattered."""

    def __init__(self, row: Tensor, column: Tensor, size: Sequence[int], device: torch.device, costs: Costs) -> None:
        rows, row_at, self.n_rows = used(row, size[0], int(transposed(costs, count(row, size[0]), size[0])))
        n = int(transposed(costs, count(column, size[1]), size[1]))
        columns, column_at, self.n_columns = used(column, size[1], n)
        fitting = _CHUNK_BYTES // (4 * (self.n_rows + self.n_columns))
        self.chunk = min(_CHUNK[1], max(_CHUNK[0], fitting // 16 * 16))
        starts = F.pad(torch.bincount(row_at, minlength=self.n_rows).cumsum(0), (1, 0))
        self.row_starts, self.column_at = compact(starts, device), compact(column_at, device)
        self.rows, self.columns = compact(rows, device), compact(columns, device)
        silence_csr_warning()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the entries for operands a [T, rows] and b [T, columns], float32 [K]."""
        a = a if self.rows is None else a.index_select(1, self.rows)
        b = b if self.columns is None else b.index_select(1, self.columns)
        if torch.compiler.is_compiling():  # which knows no sampled products
            entry = torch.arange(len(self.column_at), device=a.device)
            row_at = torch.bucketize(entry, self.row_starts[1:], right=True)
            return (a.t() @ b)[row_at, self.column_at].float()
        a, b = a.float(), b.float()
        values, size = torch.zeros(len(self.column_at), device=a.device), (self.n_rows, self.n_columns)
        for left, right in zip(a.split(self.chunk), b.split(self.chunk), strict=True):
            # Both operands row-major by entry: any other layout makes the product itself several times slower.
            left, right = left.t().contiguous(), right.t().contiguous()
            if a.is_meta:
                continue
            sums = torch.sparse_csr_tensor(self.row_starts, self.column_at, values, size=size, check_invariants=False)
            values = torch.sparse.sampled_addmm(sums, left, right.t()).values()
        return values


@dataclass(frozen=True)
class Split:
    """Entries in two parts: those in the lines (rows or columns) that hold most, and all others.

    Attributes:
        cost: Nanoseconds per token of both.
        heavy: bool [K], the entries of the first part.
    """

    cost: float
    heavy: Tensor


def best_split(row: Tensor, column: Tensor, size: tuple[int, int], costs: Costs) -> Split | None:
    """Find the split whose two parts cost least together.

    Fisher scores cluster: a few columns hold most entries of a layer, which use most rows, and the rest use few rows
    but many columns. One block would be nearly empty; two are small and full.

    Args:
        row: int64 [K], rows of the entries.
        column: int64 [K], their columns.
        size: All rows and columns.
        costs: What things cost.

    Returns:
        The best of all splits by the h heaviest rows or columns, for every h; None if there is none at all.
    """
    best: Split | None = None
    for lines, others, n, m in ((row, column, size[0], size[1]), (column, row, size[1], size[0])):
        held = torch.bincount(lines, minlength=n)
        order = torch.argsort(held, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(n))[lines]
        heavy = np.arange(1, int(held.count_nonzero()))  # lines in the first part
        if not len(heavy):
            continue
        # A line of the other direction has a share in the first part from its least rank on, and in the second up to
        # its greatest: with both counted, every h is priced at once.
        least = torch.full((m,), n).scatter_reduce(0, others, rank, "amin")
        greatest = torch.full((m,), -1).scatter_reduce(0, others, rank, "amax")
        beginning = torch.bincount(least[least < n], minlength=n).cumsum(0).numpy()
        ended = torch.bincount(greatest[greatest >= 0], minlength=n).cumsum(0).numpy()
        first, second = beginning[heavy - 1], ended[-1] - ended[heavy - 1]
        left = len(lines) - held[order].cumsum(0).numpy()[heavy - 1]
        rest = np.minimum(
            block_cost(costs, len(heavy) + 1 - heavy, second, (n, m)),
            sampled_cost(costs, left, len(heavy) + 1 - heavy, second, (n, m)),
        )
        total = block_cost(costs, heavy, first, (n, m)) + rest
        at = int(total.argmin())
        if best is None or total[at] < best.cost:
            best = Split(float(total[at]), rank <= at)
    return best


def compact(index: Tensor | None, device: torch.device) -> Any:
    """Move an index to a device as int32; None stays None."""
    return None if index is None else index.to(torch.int32).to(device)


@cache
def silence_csr_warning() -> None:
    """Use up PyTorch's once-per-process notice that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
