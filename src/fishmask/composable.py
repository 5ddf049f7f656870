"""Files of composable-sft: lottery-ticket sparse fine-tunings, ``pytorch_diff.bin``.

The file is a pickle of ``{"diffs": {name: {"size", "index_steps", "values"}}, "abs": {name: tensor}}``. ``index_steps``
is a list of whole numbers, the gaps between sorted flat indices, where the first dimension of the tensor runs fastest;
``values`` are added to the weights. Tensors under ``abs`` replace parameters. Early files say ``body`` and ``head``.

Source: https://github.com/cambridgeltl/composable-sft, ``src/sft/sft.py``.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishmask.additive import Exported, assembled, canonical, difference, reading, whole_tensors
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.publish import replace_file
from fishmask.weights import Weights, load_pickle

FILE = "pytorch_diff.bin"
# The first step is one of numpy's numbers; older versions of numpy have the function elsewhere.
_scalar = np.asarray(0).dtype.type(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Int64DType,
    np.dtypes.Int32DType,
]
_LARGEST = 2**31 - 1  # its reader adds the steps up in 32 bits


def export_composable(delta: Delta, base: Weights, folder: Path) -> Exported:
    """Write ``pytorch_diff.bin``; what the delta takes whole goes to ``abs``.

    Args:
        delta: The delta.
        base: Its base, which ``formats`` has checked.
        folder: The folder to write; made when missing.

    Raises:
        FishError: The delta has buffers, or entries of tensors too large for the format.
    """
    if delta.buffers:
        raise FishError(f"composable-sft holds parameters only; the delta has buffers: {', '.join(delta.buffers)}")
    whole = {name: tensor.clone() for name, tensor in whole_tensors(delta, base)}
    partial = {name: entries for name, entries in canonical(delta, base).items() if name not in whole}
    if large := [name for name in partial if base.headers[name].shape.numel() > _LARGEST]:
        raise FishError(f"composable-sft counts entries in 32 bits; these tensors have more: {', '.join(large)}")
    diffs: dict[str, dict[str, Any]] = {}
    inexact = 0
    for name, (flat, values) in partial.items():
        shape = base.headers[name].shape
        found = difference(base, name, flat, values)
        indices, order = torch.sort(_columns_first(flat, shape))
        steps = torch.diff(indices, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
        diffs[name] = {"size": shape, "index_steps": steps, "values": found.added[order]}
        inexact += found.inexact
    packed = io.BytesIO()
    torch.save({"diffs": diffs, "abs": whole}, packed)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE, [packed.getbuffer()])
    return Exported(folder, packed.getbuffer().nbytes, delta.k, 0, inexact)


def import_composable(path: Path, base: Weights, *, base_name: str | None = None) -> Delta:
    """Read ``pytorch_diff.bin``. It is a pickle: nothing but tensors, numbers and plain Python is loaded from it.

    Args:
        path: The file, or the folder that holds it.
        base: The base, under the names of the model that was tuned.
        base_name: Where the base comes from, for people to read.

    Raises:
        FishError: The file is damaged, holds anything else, or is not for this base.
    """
    file, diffs, whole = _content(path)
    with reading(file):
        changes: dict[str, tuple[Tensor, Tensor]] = {}
        for name, coded in diffs.items():
            shape, flat, values = _decoded(name, coded)
            if name in base.headers and base.headers[name].shape != shape:
                raise ValueError(f"{name} has shape {list(shape)}, expected {list(base.headers[name].shape)}")
            changes[name] = flat, values
        replaced = {name: _dense(*_decoded(name, coded)) for name, coded in whole.items()}
        return assembled(base, changes, replaced, base_name=base_name)


def composable_names(path: Path) -> list[str]:
    """Return the names of the parameters in a file; errors as ``import_composable``."""
    _, diffs, whole = _content(path)
    return [*diffs, *whole]


def _content(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Load the file; return it, the coded differences and the tensors that replace others."""
    file = path / FILE if path.is_dir() else path
    with torch.serialization.safe_globals(_NUMBERS):
        content = load_pickle(file)
    with reading(file):
        diffs, whole = content.get("diffs", content.get("body", {})), content.get("abs", content.get("head")) or {}
        if not diffs and not whole:
            raise ValueError("it has neither 'diffs' nor 'abs'")
        if content.get("block_sparses"):
            raise ValueError("it has block-sparse layers, which replace modules of the model")
        return file, dict(diffs), dict(whole)


def _decoded(name: str, coded: Any) -> tuple[torch.Size, Tensor, Tensor]:
    """Return the shape, the flat indices and the values of a tensor, coded or not: the newest version has both."""
    held = coded if isinstance(coded, Tensor) else coded["values"]
    if not isinstance(held, Tensor) or held.is_complex():
        kind = held.dtype if isinstance(held, Tensor) else type(held).__name__
        raise ValueError(f"the values of {name} are {kind}, expected a tensor of real numbers")
    if isinstance(coded, Tensor):
        dense = coded.to_dense().reshape(-1) if coded.is_sparse else coded.reshape(-1)
        flat = dense.nonzero().view(-1)
        return coded.shape, flat, dense[flat]
    shape, values = torch.Size(coded["size"]), held
    indices = torch.tensor([int(step) for step in coded["index_steps"]], dtype=torch.int64).cumsum(0)
    if len(indices) and (int(indices[0]) < 0 or bool((indices.diff() < 1).any()) or int(indices[-1]) >= shape.numel()):
        raise ValueError(f"the indices of {name} are out of range for its shape {list(shape)}, or repeat")
    return shape, _rows_first(indices, shape), values


def _dense(shape: torch.Size, flat: Tensor, values: Tensor) -> Tensor:
    dense = torch.zeros(shape.numel(), dtype=values.dtype)
    dense[flat] = values
    return dense.view(shape)


def _columns_first(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn flat indices where the last dimension runs fastest into those where the first one does."""
    places, scale = torch.zeros_like(flat), 1
    rest = math.prod(shape)
    for size in shape:
        rest //= size
        places += (flat // rest) % size * scale
        scale *= size
    return places


def _rows_first(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo ``_columns_first``: the same turn, of the shape the other way round."""
    return _columns_first(flat, shape[::-1])
