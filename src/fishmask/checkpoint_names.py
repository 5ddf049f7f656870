"""Under which names a checkpoint on disk holds the parameters of a model in memory."""

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from fishmask.errors import FishError
from fishmask.params import aliases
from fishmask.quantized import weights

_FILE = "model.safetensors"


def checkpoint_names(model: nn.Module, checkpoint: str | PathLike[str] | Iterable[str] | None = None) -> dict[str, str]:
    """Map the canonical names of a model's parameters to their names in a checkpoint.

    A tied parameter has one name there. A checkpoint of the base alone lacks its prefix (``embeddings.weight`` for
    ``bert.embeddings.weight``), which is seen to.

    Args:
        model: The model; its floating-point parameters count.
        checkpoint: A safetensors file, a folder with one or with an index of several, or the names themselves. Without
            it, what ``save_pretrained`` would write for a model of transformers; for any other the canonical names.

    Returns:
        The names. Parameters that the checkpoint does not hold as they are, which some mixtures of experts are, are
        left out.

    Raises:
        FishError: There is no such checkpoint in that place, or it has none of the model's parameters.
        OSError: A file cannot be read.
    """
    canonical = weights(model)
    if checkpoint is None:
        return _as_saved(model)
    held = set(_names_in(Path(checkpoint)) if isinstance(checkpoint, str | PathLike) else checkpoint)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name, owner in aliases(model).items():
        there = next((known for known in (name, name.removeprefix(prefix)) if known in held), None)
        if there is not None and owner in canonical:
            found.setdefault(owner, there)
    if not found:
        raise FishError(
            f"the checkpoint has none of the model's parameters: it has {', '.join(sorted(held)[:3])}, the model has "
            f"{', '.join(list(canonical)[:3])}"
        )
    return found


def _as_saved(model: nn.Module) -> dict[str, str]:
    """Ask transformers what it would save, with tensors that have no memory."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:
        return {name: name for name in weights(model)}
    from transformers.core_model_loading import revert_weight_conversion

    stand_ins: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, owner in aliases(model).items():
        if owner in weights(model) and name not in tied and owner not in owners.values():
            stand_ins[name] = torch.empty(model.get_parameter(owner).shape, device="meta")
            owners[id(stand_ins[name])] = owner
    saved = revert_weight_conversion(model, dict(stand_ins))
    return {owners[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in owners}


def _names_in(place: Path) -> Iterable[str]:
    """Read the names of all tensors from a file's header or a folder's index."""
    index = place / f"{_FILE}.index.json"
    if index.is_file():
        names: Iterable[str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return names
    file = place / _FILE if place.is_dir() else place
    if not file.is_file():
        raise FishError(f"{place} is neither a safetensors file nor a folder with {_FILE} or {_FILE}.index.json")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise FishError(f"{file} is not a safetensors file: {error}") from error
