"""Plans: the cheapest way to the masked entries of a weight gradient, chosen once per layer when the mask is set.

Shapes: T tokens (batch times positions), R and C used rows and columns of the weight, K masked entries of it.

Every plan is a pure tensor computation on detached tensors. Its result is float32 of shape [K], in the order of the
mask's sorted flat indices.
"""

import math
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

# Cost per token in nanoseconds, measured on one AVX-512 core with 2,048 tokens. Only the ratios matter.
_GEMM = 0.0125  # one multiply-add of a dense product
_SAMPLED = 0.16  # one multiply-add of a sampled product
_TRANSPOSE = 0.8  # bringing one column into the row-major layout that the sampled product needs
_READ = 0.27  # reading one column of an operand for a dense product, however small the product
_GATHER = 1.0  # copying one used column
_SKIP = 0.05  # passing one unused column while copying
_SCATTER = 4.0  # adding one used column to its place
_SPREAD = 3.0  # bringing one column into the layout of a CSR product, and back
_NONZERO = 0.05  # one multiply-add of a CSR product

# Tokens per sampled product: transposed copies of this size stay in the cache, twice as quick as whole ones.
_CHUNK = 128


class ProductPlan:
    """Masked entries of ``dW = Aᵀ B`` for a weight [rows, columns], operands A [T, rows] and B [T, columns].

    Two kinds: "block" multiplies only the used columns of A and B (all of them when the mask is scattered) and
    gathers; "sampled" computes each entry's inner product by itself, which wins when the block is nearly empty. The
    cheaper one is taken unless ``sampled`` says which.
    """

    def __init__(
        self, indices: Tensor, shape: Sequence[int], *, device: torch.device, sampled: bool | None = None
    ) -> None:
        rows, columns = shape
        used_rows = len(torch.unique(indices // columns))
        self.columns, column_at, n_columns = _used(indices % columns, columns, other=used_rows)
        self.rows, row_at, n_rows = _used(indices // columns, rows, other=n_columns)
        block_cost = _product_cost(n_rows, n_columns)
        sampled_cost = _SAMPLED * len(indices) + _TRANSPOSE * (n_rows + n_columns)
        # On a GPU a dense product is nearly free beside the memory traffic of a sampled one.
        self.sampled = device.type == "cpu" and sampled_cost < block_cost if sampled is None else sampled
        self.narrow_left = n_rows <= n_columns  # the narrower operand goes left: 2-3 times quicker when very narrow
        position = row_at * n_columns + column_at if self.narrow_left else column_at * n_rows + row_at
        self.position = position.to(device)
        if self.sampled:
            self.row_starts = F.pad(torch.bincount(row_at, minlength=n_rows).cumsum(0), (1, 0))
            self.column_at = column_at
            _silence_csr_warning()
        self.rows = None if self.rows is None else self.rows.to(device)
        self.columns = None if self.columns is None else self.columns.to(device)

    def rows_of(self, a: Tensor) -> Tensor:
        """Return the used columns of A [T, rows] as [T, R]."""
        return a if self.rows is None else a.index_select(1, self.rows)

    def columns_of(self, b: Tensor) -> Tensor:
        """Return the used columns of B [T, columns] as [T, C]."""
        return b if self.columns is None else b.index_select(1, self.columns)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the masked entries of the product of the compact operands a [T, R] and b [T, C], float32 [K]."""
        if self.sampled and not torch.compiler.is_compiling():
            return self._sampled_product(a.float(), b.float())
        block = a.t() @ b if self.narrow_left else b.t() @ a
        return block.flatten().index_select(0, self.position).float()

    def _sampled_product(self, a: Tensor, b: Tensor) -> Tensor:
        values, size = torch.zeros(len(self.column_at), dtype=a.dtype), (a.shape[1], b.shape[1])
        for rows, columns in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
            sums = torch.sparse_csr_tensor(self.row_starts, self.column_at, values, size=size, check_invariants=False)
            # Both operands row-major by entry: any other layout makes the product itself several times slower.
            values = torch.sparse.sampled_addmm(sums, rows.t().contiguous(), columns.t().contiguous().t()).values()
        return values.float()


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
            self.outputs, output_at, n_outputs = _used(outputs, shape[0], other=per_output)
            self.inputs, input_at, n_inputs = _used(inputs, shape[1], other=n_outputs * kernel)
        self.shape = (n_outputs, n_inputs, *shape[2:])
        self.position = ((output_at * n_inputs + input_at) * kernel + rest).to(device)
        self.outputs = None if self.outputs is None else self.outputs.to(device)
        self.inputs = None if self.inputs is None else self.inputs.to(device)

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
        table = torch.full((vocabulary,), self.n_rows, dtype=torch.int64)
        table[rows] = torch.arange(self.n_rows)
        if padding_idx is not None:
            table[padding_idx] = self.n_rows  # PyTorch gives the padding row no gradient
        self.table = table.to(device)
        self.entry_starts = F.pad(torch.bincount(row_at, minlength=self.n_rows).cumsum(0), (1, 0)).to(device)
        self.column = (indices % self.width).to(device)
        self.row_at = row_at.to(device)

    def product(self, grad: Tensor, ids: Tensor) -> Tensor:
        """Return the masked entries of the gradient for output gradients [T, H] and ids [T], float32 [K]."""
        rows = self.table.index_select(0, ids)
        if torch.compiler.is_compiling():  # shapes must not depend on data
            dense = torch.zeros(self.n_rows + 1, self.width, device=grad.device)
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
        block_cost = _product_cost(len(rows), len(columns)) + _GATHER * len(columns) + _SCATTER * len(rows)
        csr_cost = _SPREAD * sum(self.shape) + _NONZERO * len(indices)
        self.block = block_cost <= csr_cost if block is None else block
        if self.block:
            self.rows, self.columns = rows.to(device), columns.to(device)
            self.position = (row_at * len(columns) + column_at).to(device)
            return
        _silence_csr_warning()
        by_column = torch.argsort(column, stable=True)
        self.by_row = (_starts(row, self.shape[0]).to(device), column.to(device))
        self.by_column = (_starts(column, self.shape[1]).to(device), row[by_column].to(device))
        self.order = by_column.to(device)

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


def _used(positions: Tensor, size: int, other: int) -> tuple[Tensor | None, Tensor, int]:
    """Return (used positions or None for all, place of each entry among them, how many).

    Compacting costs a copy, so all positions are taken unless the product with ``other`` columns gains more by it.
    """
    used, place = torch.unique(positions, return_inverse=True)
    copy = _GATHER * len(used) + _SKIP * size
    if copy + _product_cost(len(used), other) < _product_cost(size, other):
        return used, place, len(used)
    return None, positions, size


def _product_cost(columns: int, other: int) -> float:
    return max(_GEMM * columns * other, _READ * max(columns, other))


@cache
def _silence_csr_warning() -> None:
    """Use up PyTorch's once-per-process notice that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
