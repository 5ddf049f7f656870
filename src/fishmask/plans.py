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
