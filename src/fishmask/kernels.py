"""Kernels: masked weight gradients and sums of per-example powers, in Triton, each with a twin in plain PyTorch.

Neither writes a dense gradient to memory: the first writes the k entries alone, the second adds to the scores what
it has squared on the chip. Where Triton or a GPU is missing the twin serves, which computes the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows and columns of the weight, of the two kernels: compiled for sm_80 and sm_90 neither spills a register. The second
# holds two tiles at a time, that of an example and the sum.
TILE = (128, 128)
POWERS_TILE = (128, 64)
_TOKENS = 32  # of a step of the product
_ENTRIES = 256  # written at once
_LAUNCH = {"num_warps": 8, "num_stages": 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a weight that hold an entry, and the entries sorted by tile.

    Attributes:
        shape: Rows and columns of the weight.
        size: Rows and columns of a tile.
        rows: int32 [N], the tile's place among those of its column of tiles.
        columns: int32 [N], the tile's place among those of its row of tiles.
        starts: int32 [N + 1], where the entries of each tile begin.
        places: int32 [K], row-major places of the entries in their tiles.
        order: int32 [K], where each of them stands in the result.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    rows: Tensor
    columns: Tensor
    starts: Tensor
    places: Tensor
    order: Tensor


def count_tiles(row: Tensor, column: Tensor, shape: Sequence[int], size: tuple[int, int] = TILE) -> int:
    """Return how many tiles hold an entry.

    Args:
        row: int64 [K], rows of the entries.
        column: int64 [K], their columns.
        shape: Rows and columns of the weight.
        size: Rows and columns of a tile.
    """
    across = -(-shape[1] // size[1])
    held = torch.zeros(-(-shape[0] // size[0]) * across, dtype=torch.bool)
    held[row // size[0] * across + column // size[1]] = True
    return int(held.sum())


def tiles_of(
    row: Tensor, column: Tensor, shape: Sequence[int], device: torch.device, size: tuple[int, int] = TILE
) -> Tiles:
    """Sort entries by tile.

    Args:
        row: int64 [K] on the CPU, rows of the entries.
        column: int64 [K] on the CPU, their columns.
        shape: Rows and columns of the weight.
        device: Where the product will be computed.
        size: Rows and columns of a tile, powers of two.

    Returns:
        The tiles, in the order of the weight; their tensors are on the device.
    """
    across = -(-shape[1] // size[1])
    tile = row // size[0] * across + column // size[1]
    order = torch.argsort(tile, stable=True)
    held, counts = torch.unique_consecutive(tile[order], return_counts=True)
    places = (row % size[0] * size[1] + column % size[1])[order]
    found = (held // across, held % across, F.pad(counts.cumsum(0), (1, 0)), places, order)
    return Tiles((shape[0], shape[1]), size, *(part.to(torch.int32).to(device) for part in found))


def available(device: torch.device) -> bool:
    """Whether the Triton kernels can run on a device.

    They need Triton and an NVIDIA GPU since Ampere; with ``TRITON_INTERPRET=1`` in the environment they run on a CPU,
    slowly.
    """
    return _has_triton() and (_interpreted() if device.type == "cpu" else _is_ampere(device))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_ampere(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def masked_gradient(a: Tensor, b: Tensor, tiles: Tiles) -> Tensor:
    """Return the masked entries of ``Aᵀ B``; tiles of the weight that hold none are not computed.

    Args:
        a: [T, rows], of any strides.
        b: [T, columns], on the same device.
        tiles: The entries.

    Returns:
        float32 [K], summed in float32, in the order of the mask.
    """
    a, b = _alike(a, b)
    if not a.is_meta and (not available(a.device) or a.dtype not in _DTYPES):
        return masked_gradient_twin(a, b, tiles)
    out = torch.empty(len(tiles.places), device=a.device)
    if a.is_meta:  # what the kernel would take
        return out
    ROWS, COLUMNS = tiles.size
    sizes = (len(a), *tiles.shape)
    entries = (tiles.rows, tiles.columns, tiles.starts, tiles.places, tiles.order)
    blocks = {"WIDEN": _interpreted(), "ROWS": ROWS, "COLUMNS": COLUMNS, "TOKENS": _TOKENS, "ENTRIES": _ENTRIES}
    if len(tiles.rows):
        with torch.cuda.device_of(a):
            _triton().masked_gradient[(len(tiles.rows),)](
                a.contiguous(), b.contiguous(), out, *entries, *sizes, **blocks, **_LAUNCH
            )
    return out


def masked_gradient_twin(a: Tensor, b: Tensor, tiles: Tiles) -> Tensor:
    """Return what `masked_gradient` does, by a dense product.

    Args:
        a: [T, rows].
        b: [T, columns].
        tiles: The entries.

    Returns:
        float32 [K] in the order of the mask.
    """
    ROWS, COLUMNS = tiles.size
    tile = torch.bucketize(torch.arange(len(tiles.places), device=a.device), tiles.starts[1:], right=True)
    row = tiles.rows[tile] * ROWS + tiles.places // COLUMNS
    column = tiles.columns[tile] * COLUMNS + tiles.places % COLUMNS
    dense = a.float().t() @ b.float()
    return torch.empty(len(tile), device=a.device).index_copy(0, tiles.order.long(), dense[row, column])


def add_powers_(left: Tensor, right: Tensor, offsets: Tensor, scores: Tensor, *, absolute: bool = False) -> None:
    """Add the sum over examples of (Lₙᵀ Rₙ)² to the scores; no gradient of one example is written to memory.

    Args:
        left: [T, rows], the tokens of all examples one after the other.
        right: [T, columns], likewise.
        offsets: int32 [B + 1], where the tokens of each example begin, and the end.
        scores: float32 [rows, columns], of any strides; changed in place.
        absolute: Add absolute values instead of squares.
    """
    left, right = _alike(left, right)
    if not available(left.device) or left.dtype not in _DTYPES:
        add_powers_twin_(left, right, offsets, scores, absolute=absolute)
        return
    rows, columns = scores.shape
    sizes = (len(offsets) - 1, rows, columns, *scores.stride())
    blocks = {
        "ABSOLUTE": absolute,
        "WIDEN": _interpreted(),
        "ROWS": POWERS_TILE[0],
        "COLUMNS": POWERS_TILE[1],
        "TOKENS": _TOKENS,
    }
    grid = (-(-rows // POWERS_TILE[0]), -(-columns // POWERS_TILE[1]))
    with torch.cuda.device_of(scores):
        _triton().add_powers[grid](left.contiguous(), right.contiguous(), offsets, scores, *sizes, **blocks, **_LAUNCH)


def add_powers_twin_(left: Tensor, right: Tensor, offsets: Tensor, scores: Tensor, *, absolute: bool = False) -> None:
    """Do what `add_powers_` does, by one dense product per example.

    Args:
        left: [T, rows].
        right: [T, columns].
        offsets: int32 [B + 1].
        scores: float32 [rows, columns], changed in place.
        absolute: Add absolute values instead of squares.
    """
    bounds = offsets.tolist()
    for start, end in pairwise(bounds):
        gradient = left[start:end].float().t() @ right[start:end].float()
        if absolute:
            scores.add_(gradient.abs_())
        else:
            scores.addcmul_(gradient, gradient)


def _alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two operands of different dtypes to float32."""
    return (left, right) if left.dtype == right.dtype else (left.float(), right.float())


def _triton() -> Any:
    from fishmask import triton_kernels

    return triton_kernels
