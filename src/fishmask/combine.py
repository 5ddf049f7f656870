"""One delta of several: the base plus a weighted sum of what each changes."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fishmask import applied
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fingerprint import Base, fingerprint, raw_bits, takes_whole
from fishmask.mask import Mask
from fishmask.params import aliases, find

Overlap = Literal["refuse", "sum", "mean", "last"]
OVERLAPS: tuple[Overlap, ...] = ("refuse", "sum", "mean", "last")


class Change(NamedTuple):
    """What one delta does to one parameter."""

    indices: Tensor  # int64 [K], sorted flat indices
    values: Tensor  # [K], in any floating-point dtype
    base: Tensor  # [K], in the weight's dtype


def combine(
    model: nn.Module,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    overlap: Overlap = "refuse",
    check_base: bool = True,
) -> Delta:
    """Make one delta of several on the same base: the base plus the sum of weight × (value − base).

    It is computed in float64 and rounded once, to the dtype of the model's weights. An entry that one delta alone
    determines, with weight 1, keeps the bits that ``apply`` would write.

    Args:
        model: The base, which is read and not changed.
        deltas: The deltas, one or more.
        weights: One finite number for each delta, of any sign and sum.
        overlap: What becomes of an entry that several deltas have. ``"refuse"`` raises; ``"sum"`` adds all
            weight × (value − base); ``"mean"`` divides that sum by the number of deltas that have the entry;
            ``"last"`` takes the last of these deltas alone, with its weight.
        check_base: Refuse deltas that were made on other weights than the model's.

    Returns:
        The delta, with the entries of all and with their buffers. A buffer is taken whole, whatever the weight.

    Raises:
        ValueError: Not one weight for each delta, a weight that is not finite, or an unknown ``overlap``.
        FishError: A delta does not fit the model or overlaps where that is refused; several have the same buffer with
            other contents (unless the last counts); the result is beyond the range of the weights' dtype; or the model
            is not its base now, because deltas are applied to it.

    Source:
        Ilharco et al., "Editing Models with Task Arithmetic", 2023, for the sum; the mean over those that have an
        entry is the disjoint merge of Yadav et al., "TIES-Merging", 2023.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> tuned = [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> both = combine(model, [Delta.between(model, t) for t in tuned], [0.5, 0.5], overlap="sum")
        >>> both.apply(model)
        >>> torch.allclose(model.weight, (tuned[0].weight + tuned[1].weight) / 2)
        True
    """
    check_combination(weights, overlap, len(deltas))
    if applied.is_changed(model):
        raise FishError(
            "combine() reads the base from the model, and deltas are applied to it: revert() them, or use(None) on "
            "its Switch, and combine then"
        )
    checked: set[str] = set()  # deltas of one base need its hash once
    for delta in deltas:
        delta.check(model, check_base and delta.base.digest not in checked)
        checked.add(delta.base.digest)
    names, tensors = aliases(model), applied.targets(model)
    changes = [_changes(delta, names, tensors) for delta in deltas]
    buffers = combined_buffers([delta.buffers for delta in deltas], changes, overlap)
    combined = combined_changes(changes, weights, overlap)
    shapes = {names.get(name, name): shape for delta in deltas for name, shape in delta.mask.shapes.items()}
    mask = Mask.from_indices({name: change.indices for name, change in combined.items()}, shapes)
    return Delta(
        mask,
        {name: change.values for name, change in combined.items()},
        base=_base(deltas, mask, tensors, check_base),
        buffers=buffers,
        base_name=_shared([delta.base_name for delta in deltas]),
        base_revision=_shared([delta.base_revision for delta in deltas]),
    )


def check_combination(weights: Sequence[float], overlap: str, count: int) -> None:
    """Raise ValueError unless there are deltas, one finite weight for each, and a known way to treat overlaps."""
    if not count or len(weights) != count:
        raise ValueError(f"combine one or more deltas with one weight each, got {count} deltas, {len(weights)} weights")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise ValueError(f"weights must be finite numbers, got {wrong}")
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(map(repr, OVERLAPS))}, got {overlap!r}")


def combined_buffers(
    buffers: Sequence[Mapping[str, Tensor]], changes: Sequence[Mapping[str, Change]], overlap: Overlap
) -> dict[str, Tensor]:
    """Unite the buffers of several deltas, whose other changes are ``changes``, by name.

    Raises:
        FishError: Several differ in one of them, unless the last counts; or one has it as entries.
    """
    united: dict[str, Tensor] = {}
    differing = set()
    for own in buffers:
        for name, buffer in own.items():
            known = united.setdefault(name, buffer)
            if not torch.equal(raw_bits(known), raw_bits(buffer)):
                differing.add(name)
        united |= own
    if differing and overlap != "last":
        raise FishError(
            f"several of these deltas have other contents of the same buffer: {', '.join(sorted(differing))}; buffers "
            "are not added up. overlap='last' takes the last one's"
        )
    if both := sorted(united.keys() & {name for change in changes for name in change}):
        raise FishError(f"entries of one delta are a whole buffer of another: {', '.join(both)}")
    return united


@torch.no_grad()
def combined_changes(
    changes: Sequence[Mapping[str, Change]], weights: Sequence[float], overlap: Overlap
) -> dict[str, Change]:
    """Combine what several deltas do, parameter by parameter; the values are in the dtypes of the weights.

    Raises:
        FishError: They overlap where that is refused, or the result is beyond the range of a dtype.
    """
    names = list(dict.fromkeys(name for change in changes for name in change))
    parts = {name: [(c[name], w) for c, w in zip(changes, weights, strict=True) if name in c] for name in names}
    if overlap == "refuse":
        _refuse_overlap(parts)
    combined = {name: _combined(own, overlap) for name, own in parts.items()}
    if large := [name for name, (_, beyond) in combined.items() if beyond]:
        raise FishError(f"the combination is beyond the range of its dtype in: {', '.join(large)}; use smaller weights")
    return {name: change for name, (change, _) in combined.items()}


def _changes(delta: Delta, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Return what a delta does, by the model's canonical names, in the precision that its values have."""
    found = {}
    for name, values in delta.values.items():
        target = names.get(name, name)
        indices = delta.mask.indices[name]
        base = applied.read(tensors[target], indices).cpu().view(tensors[target].dtype)
        found[target] = Change(indices, values, base)
    return found


def _refuse_overlap(parts: Mapping[str, Sequence[tuple[Change, float]]]) -> None:
    counts = {}
    for name, own in parts.items():
        indices = torch.cat([change.indices for change, _ in own])
        counts[name] = len(indices) - len(indices.unique())
    if shared := {name: count for name, count in counts.items() if count}:
        listed = "; ".join(f"{count:,} of {name}" for name, count in list(shared.items())[:10])
        more = f"; and in {len(shared) - 10} more parameters" if len(shared) > 10 else ""
        raise FishError(
            f"several of these deltas have the same {sum(shared.values()):,} entries: {listed}{more}. Say what becomes "
            "of them: overlap='sum', 'mean' or 'last'"
        )


def _combined(own: Sequence[tuple[Change, float]], overlap: Overlap) -> tuple[Change, bool]:
    """Combine the changes of one parameter; tell also whether a value has become infinite."""
    dtype, device = own[0][0].base.dtype, own[0][0].indices.device
    union = own[0][0].indices
    if len(own) > 1:
        union = torch.cat([change.indices for change, _ in own]).unique()
    base = torch.empty(len(union), dtype=dtype, device=device)
    exact = torch.empty(len(union), dtype=dtype, device=device)  # what the last delta would write alone
    total = torch.zeros(len(union), dtype=torch.float64, device=device)
    count = torch.zeros(len(union), dtype=torch.int64, device=device)
    alone = torch.zeros(len(union), dtype=torch.bool, device=device)  # determined by one delta with weight 1
    for change, weight in own:
        places, _ = find(change.indices, union)
        base[places], exact[places] = change.base, change.values.to(dtype)
        difference = weight * (change.values.double() - change.base.double())
        first = (count[places] == 0) | (overlap == "last")
        total[places] = torch.where(first, difference, total[places] + difference)
        alone[places] = first & (weight == 1)
        count[places] += 1
    if overlap == "mean":
        total /= count
    total += base.double()
    values = torch.where(alone, raw_bits(exact), raw_bits(rounded(total, dtype))).view(dtype)
    # By way of float64, because 8-bit floats have no arithmetic of their own.
    beyond = total.isfinite() & ~values.double().isfinite()
    return Change(union, values, base), bool(beyond.any())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to the nearest number of a dtype once; a plain conversion to a narrow dtype rounds to float32 too.

    Source:
        Boldo and Melquiond, "Emulation of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd",
        2008: a first rounding to odd makes the second one right.
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    single = values.float()
    back = single.double()
    inexact = values.isfinite() & (back != values)
    bits = raw_bits(single)
    # The magnitude is one less where it was rounded up; then the last bit says that something is missing.
    odd = (bits - (inexact & (back.abs() > values.abs())).int()) | 1
    return torch.where(inexact, odd, bits).view(torch.float32).to(dtype)


def _base(deltas: Sequence[Delta], mask: Mask, tensors: Mapping[str, Tensor], checked: bool) -> Base:
    """Return what identifies the base; the deltas' own knowledge of it where that is the same, else a new hash."""
    first = deltas[0].base
    partial = {name for name, shape in mask.shapes.items() if not takes_whole(mask, name, shape.numel())}
    if checked and all(delta.base == first for delta in deltas) and partial == set(first.short):
        return first
    return Base.of(fingerprint(((name, tensors[name]) for name in mask.shapes), mask))


def _shared(texts: Sequence[str | None]) -> str | None:
    """Return the text that all have, or None."""
    return texts[0] if len(set(texts)) == 1 else None
