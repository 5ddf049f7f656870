"""Other programs' formats: deltas out to them and in from them. ``docs/formats.md`` compares them."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from fishmask.additive import Exported, check_fits
from fishmask.composable import FILE, composable_names, export_composable, import_composable
from fishmask.delta import Delta
from fishmask.dense import KEY, export_merged, export_tensors, import_tensors
from fishmask.errors import FishError
from fishmask.hub import CONFIG_FILE
from fishmask.peft_files import KINDS, export_peft, import_peft, peft_names
from fishmask.weights import OnDisk, Source, View, open_weights

Target = Literal["shira", "supertuning", "composable", "dense", "tensors", "merged"]
Origin = Literal["auto", "shira", "supertuning", "composable", "dense", "tensors"]


def export_delta(
    delta: Delta,
    to: Target,
    output: str | PathLike[str],
    *,
    base: Source,
    pad: bool = False,
    check_base: bool = True,
    rename: Mapping[str, str] | None = None,
    like: str | PathLike[str] | None = None,
) -> Exported:
    """Write a delta in another program's format.

    Args:
        delta: The delta.
        to: ``"shira"`` or ``"supertuning"``: an adapter folder for PEFT; ``"composable"``: a folder for
            composable-sft; ``"dense"``: a safetensors file of the differences from the base, whole tensors;
            ``"tensors"``: one of the changed tensors as they become; ``"merged"``: the folder of the whole model,
            shard by shard, with the base's configuration and tokenizer.
        output: The file or folder to write.
        base: The delta's base without any delta applied: a model, a state dict, a file, a folder or a name on the hub.
            PEFT's formats depend on the kinds of its layers: they need the model. A merged model needs files.
        pad: For PEFT's formats: add entries that change nothing where the counts do not fit.
        check_base: Refuse other weights than those that the delta was made on.
        rename: New beginnings of the base's names by old ones, as in ``fishmask.between``.
        like: For a merged model: a folder whose ``config.json`` replaces the base's: of a model with another head.

    Returns:
        What was written, and how many entries come back rounded.

    Raises:
        FishError: The delta does not fit the base or the format; the message lists all that does not.
        TypeError: This format needs another kind of base.
        ValueError: The format is unknown, or an option is not for it.
        OSError: A file cannot be written.
    """
    if to not in get_args(Target):
        raise ValueError(f"to must be one of {', '.join(get_args(Target))}; got {to!r}")
    if pad and to not in KINDS:
        raise ValueError(f"pad is for shira and supertuning, whose layers share one setting; it does not apply to {to}")
    if like is not None and to != "merged":
        raise ValueError(f"like is for merged models, which have a config.json; it does not apply to {to}")
    if to == "merged":
        if not isinstance(base, str | PathLike):
            raise TypeError("a merged model is written from the base's files: pass a folder or a name on the hub")
        return export_merged(delta, base, Path(output), check=check_base, rename=rename, like=like)
    path = Path(output)
    if to in KINDS and not isinstance(base, nn.Module):
        raise TypeError(f"{KINDS[to].name} depends on the kinds of layers: pass the model itself as the base")
    if to in KINDS and rename:
        raise ValueError(f"{KINDS[to].name} has the names of the model; rename does not apply")
    weights = View(open_weights(base), rename)
    check_fits(delta, weights, fingerprint=check_base, new=to not in KINDS)
    if isinstance(base, nn.Module) and to in KINDS:
        return export_peft(delta, base, path, KINDS[to], pad=pad)
    if to == "composable":
        return export_composable(delta, weights, path)
    return export_tensors(delta, weights, path, difference_=to == "dense")


def import_delta(
    source: str | PathLike[str],
    *,
    base: Source,
    origin: Origin = "auto",
    rename: Mapping[str, str] | None = None,
    base_name: str | None = None,
) -> Delta:
    """Make a delta of another program's file or folder.

    Args:
        source: A folder of a PEFT adapter; ``pytorch_diff.bin`` or its folder; or a safetensors file of whole tensors.
        base: The base: a model, a state dict, a file, a folder or a name on the hub.
        origin: What it is; ``"auto"`` looks. A file of whole tensors that ``export_delta`` has not written does not
            say whether they are differences (``"dense"``) or replace the base's (``"tensors"``).
        rename: New beginnings of the base's names by old ones, as in ``fishmask.between``.
        base_name: Where the base comes from, for people to read.

    Returns:
        The delta.

    Raises:
        FishError: The source is damaged, of another kind, or not for this base.
        ValueError: ``origin`` is unknown, or has to be given.
        OSError: A file cannot be read.
    """
    if origin not in get_args(Origin):
        raise ValueError(f"origin must be one of {', '.join(get_args(Origin))}; got {origin!r}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file or a folder")
    found = _looked_at(path) if origin == "auto" else origin
    weights = View(open_weights(base), rename)
    if found == "composable":
        return import_composable(path, weights, base_name=base_name)
    if found in ("dense", "tensors"):
        return import_tensors(path, weights, difference_=found == "dense", base_name=base_name)
    kind, delta = import_peft(path, weights, base_name=base_name)
    if found not in ("peft", kind):
        raise FishError(f"{path} holds a {kind} adapter, not a {found} one")
    return delta


def names_in(source: Path, origin: Origin = "auto") -> list[str]:
    """Return the names of the parameters that another program's file or folder changes; errors as ``import_delta``."""
    found = _looked_at(source) if origin == "auto" else origin
    if found == "composable":
        return composable_names(source)
    return list(open_weights(source).headers) if found in ("dense", "tensors") else peft_names(source)


def _looked_at(path: Path) -> str:
    """Tell what a file or a folder holds."""
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return "peft"
    if path.name == FILE or (path / FILE).is_file():
        return "composable"
    if path.suffix == ".safetensors":
        weights = open_weights(path)
        kind = weights.metadata.get(KEY) if isinstance(weights, OnDisk) else None
        if kind is None:
            raise ValueError(
                f"{path} does not say what its tensors are; origin must be 'dense' (differences) or 'tensors'"
            )
        return "dense" if kind == "difference" else "tensors"
    raise FishError(f"{path} is nothing known; expected {CONFIG_FILE} or {FILE} in a folder, or a safetensors file")
