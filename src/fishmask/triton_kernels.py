"""The Triton kernels themselves; imported only by `kernels`, which knows whether Triton is there.

Products of float32 operands are those of IEEE float32, never TF32; all sums are float32. Operands are row-major by
token, and offsets into them 64-bit: tokens times features may exceed 31. WIDEN multiplies bfloat16 as float32, which
is the same numbers: Triton's interpreter knows no product of bfloat16.
"""
# Triton's decorator is untyped, and reads annotations of its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def masked_gradient(
    a, b, out, tile_rows, tile_columns, starts, places, order,
    tokens, rows, columns,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write the entries of one tile of ``Aᵀ B`` to their places; one program per tile that holds an entry."""
    tile = tl.program_id(0)
    row = tl.load(tile_rows + tile) * ROWS + tl.arange(0, ROWS)
    column = tl.load(tile_columns + tile) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (token[None, :] < tokens) & (row[:, None] < rows)
        left = tl.load(a + token[None, :] * rows + row[:, None], mask=inside, other=0.0)
        inside = (token[:, None] < tokens) & (column[None, :] < columns)
        right = tl.load(b + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    # The tile goes through shared memory once, from where each entry is picked: no copy of it leaves the chip, and a
    # few entries cost as little as a few loads.
    flat = tl.reshape(total, (ROWS * COLUMNS,))
    last = tl.load(starts + tile + 1)
    for first in range(tl.load(starts + tile), last, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < last
        value = tl.gather(flat, tl.load(places + entry, mask=inside, other=0), 0)
        tl.store(out + tl.load(order + entry, mask=inside, other=0), value, mask=inside)


@triton.jit
def add_powers(
    left_operand, right_operand, offsets, scores,
    examples, rows, columns, scores_row, scores_column,
    ABSOLUTE: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Add one tile of the sum over examples of (Lₙᵀ Rₙ)², or of its absolute value, to the scores."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for example in range(examples):
        last = tl.load(offsets + example + 1)
        gradient = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(tl.load(offsets + example), last, TOKENS):
            token = (start + tl.arange(0, TOKENS)).to(tl.int64)
            inside = (token[None, :] < last) & (row[:, None] < rows)
            left = tl.load(left_operand + token[None, :] * rows + row[:, None], mask=inside, other=0.0)
            inside = (token[:, None] < last) & (column[None, :] < columns)
            right = tl.load(right_operand + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            gradient = tl.dot(left, right, gradient, input_precision="ieee")
        total += tl.abs(gradient) if ABSOLUTE else gradient * gradient
    at = scores + row[:, None].to(tl.int64) * scores_row + column[None, :].to(tl.int64) * scores_column
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
