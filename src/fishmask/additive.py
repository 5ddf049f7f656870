"""Deltas from and to other programs' adapters, which hold differences from the base and nothing that tells it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fingerprint import Base, raw_bits, takes_whole
from fishmask.mask import Mask
from fishmask.weights import Weights

Add = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: The file or the folder.
        bytes: The size of the files with tensors.
        entries: How many entries of the delta they hold.
        padded: How many entries without a change they hold besides.
        inexact: How many entries the other program gives another value, by rounding, than the delta does.
    """

    path: Path
    bytes: int
    entries: int
    padded: int = 0
    inexact: int = 0


class Difference(NamedTuple):
    """Some entries of a parameter: their sorted flat indices, and what is added to the base's values there."""

    indices: Tensor
    added: Tensor
    inexact: int


def add_wide(base: Tensor, added: Tensor) -> Tensor:
    """Add in the wider of both dtypes and round to the base's, as ``base += added`` does."""
    wide = torch.promote_types(base.dtype, added.dtype)
    return (base.to(wide) + added.to(wide)).to(base.dtype)


def check_fits(delta: Delta, base: Weights, *, fingerprint: bool = True, new: bool = True) -> None:
    """Refuse a base that a delta does not fit.

    Args:
        delta: The delta.
        base: The base.
        fingerprint: Refuse other weights than those that the delta was made on, too. This reads all of them.
        new: Tensors that the delta takes whole may be missing, or have another shape.

    Raises:
        FishError: They do not fit; one message lists all that is wrong.
    """
    whole = {name for name, _ in whole_tensors(delta, base)} if new else set()
    problems: list[str] = []
    for name, shape in delta.mask.shapes.items():
        own = base.aliases.get(name, name)
        if own in whole or (not fingerprint and name not in delta.values):
            continue
        if own not in base.headers:
            problems.append(f"missing from {base.label}: {name}")
        elif base.headers[own].shape != shape:
            problems.append(f"other shape: {name} is {list(base.headers[own].shape)}, the delta expects {list(shape)}")
    for name, (_, values) in canonical(delta, base).items():
        if name in base.headers and _overflows(values, base.headers[name].dtype):
            problems.append(f"values beyond the range of its dtype: {name}")
    if fingerprint and not problems:
        found = Base.of({name: base.hash(base.aliases.get(name, name)) for name in delta.base.short})
        if found.digest != delta.base.digest:
            names = ", ".join(delta.base.differing(found))
            problems = [f"other weights, or the same in another dtype: {names}"]
    if problems:
        raise FishError("the delta does not fit this base:\n  " + ";\n  ".join(problems))


def _overflows(values: Tensor, dtype: torch.dtype) -> bool:
    return bool((values.double().isfinite() & ~values.to(dtype).double().isfinite()).any())


def canonical(delta: Delta, base: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a delta's indices and values by the canonical names of its base."""
    return {base.aliases.get(name, name): (flat, delta.values[name]) for name, flat in delta.mask.indices.items()}


def shapes_of(delta: Delta, base: Weights) -> dict[str, torch.Size]:
    """Return the shapes of a delta's parameters and buffers by the canonical names of its base."""
    shapes = {base.aliases.get(name, name): shape for name, shape in delta.mask.shapes.items()}
    return shapes | {name: buffer.shape for name, buffer in delta.buffers.items()}


def difference(base: Weights, name: str, indices: Tensor, values: Tensor, add: Add = add_wide) -> Difference:
    """Return what has to be added to the base to get a delta's values.

    Args:
        base: The base.
        name: A parameter of it.
        indices: Sorted flat indices.
        values: The delta's values there.
        add: How the other program adds.

    Returns:
        The difference in float32, in float64 where the base is; and how many entries come back rounded.
    """
    before = base.take(name, indices)
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    after = values.to(before.dtype)
    added = after.to(wide) - before.to(wide)
    return Difference(indices, added, int((raw_bits(add(before, added)) != raw_bits(after)).sum()))


def assembled(
    base: Weights,
    changes: Mapping[str, tuple[Tensor, Tensor]],
    whole: Mapping[str, Tensor],
    *,
    base_name: str | None = None,
    add: Add = add_wide,
) -> Delta:
    """Make a delta of what another program adds to a base, and of the tensors that it replaces.

    Args:
        base: The base.
        changes: Flat indices (int64, any order, no duplicates) and what is added there, by name.
        whole: Tensors that are replaced, by name; the base may lack them or have them in another shape.
        base_name: Where the base comes from, for people to read.
        add: How the other program adds.

    Raises:
        ValueError: Names or shapes are not the base's, or indices are out of range or repeat.
    """
    changes = {base.aliases.get(name, name): change for name, change in changes.items()}
    whole = {base.aliases.get(name, name): tensor for name, tensor in whole.items()}
    if unknown := [name for name in changes if name not in base.headers or name in base.buffers]:
        raise ValueError(f"{base.label} has no parameters of these names: {', '.join(unknown)}")
    if both := sorted(changes.keys() & whole.keys()):
        raise ValueError(f"these parameters are both changed and replaced: {', '.join(both)}")
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, (flat, added) in changes.items():
        if len(flat) != len(added):
            raise ValueError(f"{name} has {len(flat)} indices and {len(added)} values; expected as many")
        indices[name], order = torch.sort(flat)
        outside = (indices[name] < 0) | (indices[name] >= base.headers[name].shape.numel())
        if outside.any():
            raise ValueError(f"index {int(indices[name][outside][0])} is out of range for {name}, {base.headers[name]}")
        values[name] = add(base.take(name, indices[name]), added[order])
    buffers = {name: tensor for name, tensor in whole.items() if name in base.buffers}
    heads = {name: tensor for name, tensor in whole.items() if name not in buffers}
    shapes = {n: header.shape for n, header in base.headers.items() if n not in base.buffers}
    shapes |= {name: tensor.shape for name, tensor in heads.items()}
    indices |= {name: torch.arange(tensor.numel()) for name, tensor in heads.items()}
    values |= {name: tensor.reshape(-1) for name, tensor in heads.items()}
    # Two names of one tensor in a file of a model are one parameter of it.
    shapes = {name: shape for name, shape in shapes.items() if name not in base.aliases}
    mask = Mask.from_indices(indices, shapes)
    hashes = {n: base.hash(n) for n, shape in shapes.items() if not takes_whole(mask, n, shape.numel())}
    held = {name: flat for name, flat in values.items() if name in mask.indices}
    return Delta(mask, held, base=hashes, buffers=buffers, base_name=base_name)


def whole_tensors(delta: Delta, base: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a delta replaces: those it takes whole, and its buffers."""
    shapes = shapes_of(delta, base)
    for name, (flat, values) in canonical(delta, base).items():
        if len(flat) == shapes[name].numel():
            yield name, values.view(shapes[name])
    yield from delta.buffers.items()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what is wrong with the content of another program's file into a FishError that names it."""
    try:
        yield
    except FishError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FishError(f"{path} is damaged, or not for this base: {error}") from error
