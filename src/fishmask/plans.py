"""Plans: the cheapest way to the masked entries of a weight gradient, chosen once per layer when the mask is set.

Shapes: T tokens (batch times positions), R and C used rows and columns of the weight, K masked entries of it.

Every plan is a pure tensor computation on detached tensors. Its result is float32 of shape [K], in the order of the
mask's sorted flat indices.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask.costs import Costs, costs_for
from fishmask.kernels import TILE, Tiles, count_tiles, masked_gradient, masked_gradient_twin, tiles_of
from fishmask.parts import (
    Block,
    Sampled,
    best_split,
    block_cost,
    compact,
    count,
    sampled_cost,
    silence_csr_warning,
    taken,
    transposed,
    used,
)

Kind = Literal["block", "sampled", "split", "tiles"]

_WORTH = 0.9  # a split must save a tenth: it takes more calls, and the costs are known no better
# So small a share of an operand's columns is copied in any case: the copy is what is kept for the backward, and memory
# is worth more than the few nanoseconds that a small product may lose by it.
_KEEP_COMPACT = 0.25


class ProductPlan:
    """Masked entries of ``dW = Aᵀ B`` for a weight [rows, columns], operands A [T, rows] and B [T, columns].

    Four kinds, of which the cheapest is taken unless ``kind`` says which:

    - "block" multiplies only the used columns of A and B (all of them when the mask is scattered) and gathers, in
      pieces of bounded size;
    - "sampled" computes each entry's inner product by itself, which wins on a CPU when the block is nearly empty;
    - "split" takes the rows or columns that hold most entries as one block, and the others as another part;
    - "tiles" is a Triton kernel that writes the k entries alone; only where it was measured (`fishmask.calibrate`).

    Attributes:
        kind: The way that is taken.
        costs: What each way is thought to cost, in nanoseconds per token.
        rows: Used columns of A, int32, or None for all; ``columns``: those of B.
    """

    def __init__(
        self,
        indices: Tensor,
        shape: Sequence[int],
        *,
        device: torch.device,
        kind: Kind | None = None,
        costs: Costs | None = None,
    ) -> None:
        costs = costs_for(device) if costs is None else costs
        size = (int(shape[0]), int(shape[1]))
        row, column = indices // size[1], indices % size[1]
        n_rows, n_columns = count(row, size[0]), count(column, size[1])
        split = best_split(row, column, size, costs)
        self.costs: dict[Kind, float] = {
            "block": float(block_cost(costs, n_rows, n_columns, size)),
            "sampled": float(sampled_cost(costs, len(row), n_rows, n_columns, size)),
            "split": math.inf if split is None else split.cost,
            "tiles": math.inf,
        }
        if costs.tile is not None:
            self.costs["tiles"] = _tiles_cost(costs, costs.tile, row, column, _few(n_rows, n_columns, size), size)
        self.kind: Kind = _cheapest(self.costs) if kind is None else kind
        if self.kind == "split" and split is None:
            self.kind = "block"  # of a single row and column nothing can be split off
        self.order: Tensor | None = None
        self.tiles: Tiles | None = None
        self.parts: list[Block | Sampled] = []
        n_rows, n_columns = self._taken(n_rows, n_columns, size, costs)
        rows, row, n_rows = used(row, size[0], n_rows)
        columns, column, n_columns = used(column, size[1], n_columns)
        self.rows, self.columns, size = compact(rows, device), compact(columns, device), (n_rows, n_columns)
        if self.kind == "tiles":
            self.tiles = tiles_of(row, column, size, device)
        elif self.kind == "block":
            self.parts = [Block(row, column, size, device, costs)]
        elif self.kind == "sampled":
            self.parts = [Sampled(row, column, size, device, costs)]
        else:
            assert split is not None
            first, rest = split.heavy.nonzero().squeeze(1), (~split.heavy).nonzero().squeeze(1)
            self.parts = [Block(row[first], column[first], size, device, costs)]
            self.parts.append(_cheaper(row[rest], column[rest], size, device, costs))
            self.order = compact(torch.argsort(torch.cat([first, rest])), device)

    def _taken(self, rows: int, columns: int, size: tuple[int, int], costs: Costs) -> tuple[int, int]:
        """Return how many columns of each operand the parts are given: the used ones, or all."""
        n_rows, n_columns = _few(rows, columns, size)
        if self.kind == "block":
            n_columns = min(n_columns, int(taken(costs, columns, size[1], rows)))
            n_rows = min(n_rows, int(taken(costs, rows, size[0], n_columns)))
        elif self.kind == "sampled":
            n_rows = min(n_rows, int(transposed(costs, rows, size[0])))
            n_columns = min(n_columns, int(transposed(costs, columns, size[1])))
        return n_rows, n_columns

    @property
    def nbytes(self) -> int:
        """Bytes of the indices that the plan holds."""
        return sum(_held(thing) for thing in (self, self.tiles, *self.parts))

    def rows_of(self, a: Tensor) -> Tensor:
        """Return the used columns of A [T, rows] as [T, R]."""
        return a if self.rows is None else a.index_select(1, self.rows)

    def columns_of(self, b: Tensor) -> Tensor:
        """Return the used columns of B [T, columns] as [T, C]."""
        return b if self.columns is None else b.index_select(1, self.columns)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the masked entries of the product of the compact operands a [T, R] and b [T, C], float32 [K]."""
        if self.tiles is not None:
            function = masked_gradient_twin if torch.compiler.is_compiling() else masked_gradient
            return function(a, b, self.tiles)
        found = [part.product(a, b) for part in self.parts]
        return found[0] if self.order is None else torch.cat(found).index_select(0, self.order)


def _few(rows: int, columns: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return how many columns of each operand every plan takes: the used ones if they are few, or all."""
    few_rows, few_columns = rows <= _KEEP_COMPACT * size[0], columns <= _KEEP_COMPACT * size[1]
    return rows if few_rows else size[0], columns if few_columns else size[1]


def _tiles_cost(
    costs: Costs, tile: float, row: Tensor, column: Tensor, few: tuple[int, int], size: tuple[int, int]
) -> float:
    _, row, n_rows = used(row, size[0], few[0])
    _, column, n_columns = used(column, size[1], few[1])
    copies = sum(costs.copy(n, whole) for n, whole in zip(few, size, strict=True) if n < whole)
    return float(tile * TILE[0] * TILE[1] * count_tiles(row, column, (n_rows, n_columns)) + copies + costs.part)


def _cheapest(ways: dict[Kind, float]) -> Kind:
    best = min((way for way in ways if way != "split"), key=ways.__getitem__)
    return "split" if ways["split"] < _WORTH * ways[best] else best


def _cheaper(row: Tensor, column: Tensor, size: tuple[int, int], device: torch.device, costs: Costs) -> Block | Sampled:
    n_rows, n_columns = count(row, size[0]), count(column, size[1])
    sampled = sampled_cost(costs, len(row), n_rows, n_columns, size) < block_cost(costs, n_rows, n_columns, size)
    return (Sampled if sampled else Block)(row, column, size, device, costs)


def _held(thing: Any) -> int:
    """Return the bytes of the tensors that are attributes of a thing."""
    return sum(value.nbytes for value in vars(thing).values() if isinstance(value, Tensor)) if thing else 0


class ConvolutionPlan:
    """Masked entries of a convolution's weight gradient; weight [O, I / groups, *kernel]."""

    def __init__(self, indices: Tensor, shape: Sequence[int], groups: int, *, device: torch.device) -> None:
        kernel = math.prod(shape[2:])
        per_output = shape[1] * kernel
        outputs, inputs, rest = indices // per_output, indices % per_output // kernel, indices % kernel
        # With groups an output channel is tied to its own inputs, so the layer is taken whole.
        self.outputs, output_at, n_outputs = None, outputs, shape[0]
        self.inputs, input_at, n_inputs = None, inputs, shape[1]
        if groups == 1:
            costs = costs_for(device)
            n = int(taken(costs, count(outputs, shape[0]), shape[0], per_output))
            self.outputs, output_at, n_outputs = used(outputs, shape[0], n)
            n = int(taken(costs, count(inputs, shape[1]), shape[1], n_outputs * kernel))
            self.inputs, input_at, n_inputs = used(inputs, shape[1], n)
        self.shape = (n_outputs, n_inputs, *shape[2:])
        self.position = compact((output_at * n_inputs + input_at) * kernel + rest, device)
        self.outputs, self.inputs = compact(self.outputs, device), compact(self.inputs, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the indices that the plan holds."""
        return _held(self)

    def outputs_of(self, grad: Tensor) -> Tensor:
        """Return the used channels of the output gradient [B, O, ...]."""
        return grad if self.outputs is None else grad.index_select(1, self.outputs)

    def inputs_of(self, x: Tensor) -> Tensor:
        """Return the used channels of the input [B, I, ...]."""
        return x if self.inputs is None else x.index_select(1, self.inputs)

    def product(
        self,
        grad: Tensor,
        x: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """Return the masked entries of the weight gradient for compact operands, float32 [K]."""
        like = grad.new_empty(self.shape)
        none = [0] * len(stride)
        _, weight, _ = torch.ops.aten.convolution_backward(
            grad, x, like, None, stride, padding, dilation, False, none, groups, [False, True, False]
        )
        return torch.as_tensor(weight).flatten().index_select(0, self.position).float()


class LookupPlan:
    """Masked entries of an embedding's weight gradient; weight [V, H]. Only tokens of masked rows are touched."""

    def __init__(self, indices: Tensor, shape: Sequence[int], *, padding_idx: int | None, device: torch.device) -> None:
        vocabulary, self.width = shape
        rows, row_at = torch.unique(indices // self.width, return_inverse=True)
        self.n_rows = len(rows)
        # Row of the vocabulary -> row of the compact table; the last row of the table takes all unmasked tokens.
        table = torch.full((vocabulary,), self.n_rows, dtype=torch.int32)
        table[rows] = torch.arange(self.n_rows, dtype=torch.int32)
        if padding_idx is not None:
            table[padding_idx] = self.n_rows  # PyTorch gives the padding row no gradient
        self.table = table.to(device)
        self.entry_starts = compact(_starts(row_at, self.n_rows), device)
        self.column = compact(indices % self.width, device)
        self.row_at = compact(row_at, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the indices that the plan holds."""
        return _held(self)

    def product(self, grad: Tensor, ids: Tensor) -> Tensor:
        """Return the masked entries of the gradient for output gradients [T, H] and ids [T], float32 [K]."""
        rows = self.table.index_select(0, ids)
        if torch.compiler.is_compiling() or grad.is_meta:  # shapes must not depend on data
            # Where there are no data it is about memory: as below, no more rows than there are tokens.
            most = len(rows) if grad.is_meta else self.n_rows + 1
            dense = torch.zeros(min(most, self.n_rows + 1), self.width, device=grad.device)
            dense.index_add_(0, rows, grad.float())
            return dense[self.row_at, self.column]
        tokens = (rows < self.n_rows).nonzero().squeeze(1)
        present, slot = torch.unique(rows[tokens], return_inverse=True)
        sums = torch.zeros(len(present), self.width, device=grad.device)
        sums.index_add_(0, slot, grad.index_select(0, tokens).float())
        # The entries of the rows that are present: ranges [start, start + count) laid end to end.
        start = self.entry_starts[present]
        count = self.entry_starts[present + 1] - start
        owner = torch.repeat_interleave(torch.arange(len(present), device=grad.device), count)
        offset = torch.arange(len(owner), device=grad.device) - (count.cumsum(0) - count)[owner]
        entry = start[owner] + offset
        result = torch.zeros(len(self.column), device=grad.device)
        result[entry] = sums[owner, self.column[entry]]
        return result


Sparse = tuple[Tensor, ...]  # S as its plan wants it: the block [R, C], or CSR of S and of its transpose


class SidePlan:
    """``out + x Sᵀ`` and ``dY S`` for a sparse S [rows, columns], x [T, columns], out and dY [T, rows].

    Two kinds: "block" multiplies only the used columns of x by S's used rows and columns, a small dense matrix where
    the entries cluster; "CSR" multiplies entry by entry. The cheaper one is taken unless ``block`` says which, so no
    dense matrix of the layer's size is ever made for scattered entries.
    """

    def __init__(
        self, indices: Tensor, shape: Sequence[int], *, device: torch.device, block: bool | None = None
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        row, column = indices // self.shape[1], indices % self.shape[1]
        rows, row_at = torch.unique(row, return_inverse=True)
        columns, column_at = torch.unique(column, return_inverse=True)
        costs = costs_for(device)
        dense = costs.product(len(rows), len(columns)) + costs.copy(len(columns), self.shape[1])
        csr = costs.spread * sum(self.shape) + costs.nonzero * len(indices)
        self.block = dense + costs.scatter * len(rows) <= csr if block is None else block
        if self.block:
            self.rows, self.columns = compact(rows, device), compact(columns, device)
            self.position = compact(row_at * len(columns) + column_at, device)
            return
        silence_csr_warning()
        by_column = torch.argsort(column, stable=True)
        self.by_row = (compact(_starts(row, self.shape[0]), device), compact(column, device))
        self.by_column = (compact(_starts(column, self.shape[1]), device), compact(row[by_column], device))
        self.order = compact(by_column, device)

    def sparse(self, values: Tensor, dtype: torch.dtype) -> Sparse:
        """Return S for its values [K] in the order of the indices."""
        if self.block:
            block = torch.zeros(len(self.rows) * len(self.columns), device=values.device)
            block[self.position] = values
            return (block.view(len(self.rows), len(self.columns)).to(dtype),)
        if values.device.type == "cpu":
            dtype = torch.float32  # half precision is slow there
        values, (rows, columns) = values.to(dtype), self.shape
        by_row = torch.sparse_csr_tensor(*self.by_row, values, size=(rows, columns), check_invariants=False)
        transposed = torch.sparse_csr_tensor(
            *self.by_column, values[self.order], size=(columns, rows), check_invariants=False
        )
        return by_row, transposed

    def added(self, out: Tensor, x: Tensor, sparse: Sparse) -> Tensor:
        """Return ``out + x Sᵀ`` [T, rows], in the dtype of both."""
        if self.block:
            return out.index_add(1, self.rows, x.index_select(1, self.columns) @ sparse[0].t())
        return out + (sparse[0] @ x.t().to(sparse[0].dtype)).t().to(out.dtype)

    def transposed(self, dY: Tensor, sparse: Sparse) -> Tensor:
        """Return ``dY S`` [T, columns]."""
        if self.block:
            dX = dY.new_zeros(len(dY), self.shape[1])
            return dX.index_add_(1, self.columns, dY.index_select(1, self.rows) @ sparse[0])
        return (sparse[1] @ dY.t().to(sparse[1].dtype)).t().to(dY.dtype)


def _starts(places: Tensor, size: int) -> Tensor:
    """Return where the run of each place begins once entries are sorted by it, and the end: CSR's row pointers."""
    return F.pad(torch.bincount(places, minlength=size).cumsum(0), (1, 0))
