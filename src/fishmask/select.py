"""Which entries: the exact global top-k of scores, or a uniform random subset, within a budget.

Top-k is a radix select on the bits of the scores: histograms of 16-bit digits find the k-th largest score in two passes
over float32 (four over float64), chunk by chunk, so the scores are never concatenated or sorted.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fishmask.params import matching

CHUNK = 1 << 22  # entries handled at once: 16 MiB of float32 bits
_DIGIT = 16
_BINS = 1 << _DIGIT


def budget(
    sizes: Mapping[str, int], density: float, keep: str | Sequence[str] = (), exclude: str | Sequence[str] = ()
) -> tuple[list[str], list[str], int]:
    """Divide a budget of ``int(density × n)`` entries between kept parameters and free choice.

    Args:
        sizes: Number of entries of every parameter; n is their sum, kept and excluded ones included (as in the paper).
        density: Share of all entries to choose, in (0, 1].
        keep: Names or patterns of parameters chosen whole, counted inside the budget.
        exclude: Names or patterns of parameters never chosen from.

    Returns:
        Names of the kept parameters, names of the free ones, and how many entries to choose among the free ones.

    Raises:
        TypeError: The density is no number.
        ValueError: There are no entries, the density is out of range or below one entry, a name is both kept and
            excluded, or the kept parameters or the free entries do not fit the budget.
    """
    if not isinstance(density, int | float):
        raise TypeError(f"density is a number in (0, 1], got {type(density).__name__}")
    if not sizes or not any(sizes.values()):
        raise ValueError("there are no entries to choose from: the scores or the model have no parameters")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is a fraction in (0, 1], for instance 0.005 for 0.5 %; got {density}")
    kept, excluded = matching(sizes, keep, "keep"), set(matching(sizes, exclude, "exclude"))
    if both := sorted(excluded & set(kept)):
        raise ValueError(f"parameters cannot be both kept and excluded: {', '.join(both)}")
    n = sum(sizes.values())
    k = math.floor(density * n + 1e-6)  # 1e-6: a density computed as k/n gives k back
    if k == 0:
        raise ValueError(f"density={density} of {n:,} entries is less than one entry; use at least {_ceil(1, n)}")
    held = sum(sizes[name] for name in kept)
    if held > k:
        raise ValueError(
            f"keep takes {held:,} entries, but density={density} of {n:,} entries allows {k:,}; "
            f"use a density of at least {_ceil(held, n)}, or keep less"
        )
    free = [name for name in sizes if name not in excluded and name not in set(kept)]
    room = sum(sizes[name] for name in free)
    if k - held > room:
        raise ValueError(
            f"density={density} asks for {k:,} of {n:,} entries, but only {held + room:,} are not excluded; "
            f"lower the density or exclude less"
        )
    return kept, free, k - held


def _ceil(k: int, n: int) -> float:
    """Return the smallest density, rounded up to eight digits, that allows k of n entries."""
    return math.ceil(k / n * 1e8) / 1e8


def top_k(scores: Mapping[str, Tensor], k: int, *, magnitude: bool = False) -> dict[str, Tensor]:
    """Find the k largest scores over all tensors together, exactly.

    Scores that tie with the k-th largest are taken in the order of the mapping, then of the flat index. ``-0.0`` equals
    ``0.0``. Besides the result, memory is bounded by one chunk of about four million entries (and by one tensor where
    it is not contiguous).

    Args:
        scores: Floating-point tensors of any shape, on any device.
        k: How many entries to choose, from 0 to the number of scores.
        magnitude: Rank by absolute value, without a copy of the scores.

    Returns:
        Sorted flat indices (int64, CPU) by name, for the names with at least one entry.

    Raises:
        TypeError: A score tensor is not floating-point.
        ValueError: k is out of range, or scores are NaN or infinite; the message names every such tensor.
    """
    n = sum(score.numel() for score in scores.values())
    if not 0 <= k <= n:
        raise ValueError(f"k must be between 0 and the number of scores, {n:,}; got {k:,}")
    check_scores(scores)
    if k == 0:
        return {}
    double = any(score.dtype == torch.float64 for score in scores.values())
    source = Keys(scores, torch.float64 if double else torch.float32, magnitude)
    limit, ties = threshold(source, k)
    if limit <= 0:
        warn_of_zeros(k, sum(int(score.count_nonzero()) for score in scores.values()))
    return collect(source, limit, ties)


class Keys:
    """Scores as signed integers of the same order, chunk by chunk."""

    def __init__(self, scores: Mapping[str, Tensor], dtype: torch.dtype, magnitude: bool = False) -> None:
        self.scores, self.dtype, self.magnitude = scores, dtype, magnitude
        self.width = dtype.itemsize * 8

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield the keys of one tensor."""
        for part in _parts(self.scores[name]):
            yield self.keys(part)

    def weighted(self, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the keys of one tensor, and how much each of them counts; None where each is one entry."""
        for keys in self.chunks(name):
            yield keys, None

    def keys(self, part: Tensor) -> Tensor:
        """Return the keys of some scores."""
        integer = torch.int64 if self.width == 64 else torch.int32
        values = part.to(self.dtype)
        values = values.abs() if self.magnitude else values + 0.0  # either makes -0.0 a 0.0
        bits = values.view(integer)
        # The bits of negative floats grow towards minus infinity: turn all but the sign round.
        return bits ^ ((bits >> (self.width - 1)) & torch.iinfo(integer).max)


def histogram(source: Keys, prefix: int, shift: int) -> Tensor:
    """Count the digit at ``shift`` among the keys whose higher digits equal ``prefix``, each as often as it counts.

    Counts over parts of the scores add up to the counts over all of them, so workers that each hold a part can
    all-reduce this tensor and go on with the same threshold.

    Returns:
        Counts, int64 ``[65536]``, CPU.
    """
    counts = torch.zeros(_BINS, dtype=torch.int64)
    highest = shift == source.width - _DIGIT
    for name in source.scores:
        for keys, weights in source.weighted(name):
            if highest:
                digits = (keys >> shift) + _BINS // 2  # the signed digit, moved to start at 0
            else:
                within = (keys >> (shift + _DIGIT)) == prefix
                digits = (keys[within] >> shift) & (_BINS - 1)
                weights = None if weights is None else weights[within]
            counts += torch.bincount(digits, weights, minlength=_BINS).cpu().to(torch.int64)
    return counts


def threshold(source: Keys, k: int, add: Callable[[Tensor], Tensor] = lambda counts: counts) -> tuple[int, int]:
    """Return the key of the k-th largest score and how many entries with this very key belong to the top k.

    Args:
        source: The scores, or one worker's part of them.
        k: At least 1.
        add: Adds counts up over all workers.
    """
    prefix, wanted = 0, k
    for shift in range(source.width - _DIGIT, -1, -_DIGIT):
        counts = add(histogram(source, prefix, shift))
        at_least = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a higher one
        digit = int((at_least >= wanted).sum()) - 1
        wanted -= int(at_least[digit] - counts[digit])
        highest = shift == source.width - _DIGIT
        prefix = digit - _BINS // 2 if highest else (prefix << _DIGIT) | digit
    return prefix, wanted


def collect(source: Keys, limit: int, ties: int) -> dict[str, Tensor]:
    """Return the sorted flat indices (CPU) by name of all keys above a limit, and of the first ``ties`` equal to it."""
    chosen: dict[str, Tensor] = {}
    for name in source.scores:
        parts: list[Tensor] = []
        for number, keys in enumerate(source.chunks(name)):
            hit = keys > limit
            if ties:
                equal = (keys == limit).nonzero().view(-1)[:ties]
                hit[equal] = True
                ties -= len(equal)
            parts.append(hit.nonzero().view(-1).cpu() + number * CHUNK)
        if indices := [part for part in parts if len(part)]:
            chosen[name] = torch.cat(indices)
    return chosen


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise TypeError for scores that are no floating-point tensors, ValueError for NaN or infinity among them."""
    if wrong := [f"{name} ({score.dtype})" for name, score in scores.items() if not score.is_floating_point()]:
        raise TypeError(f"scores must be floating-point tensors; these are not: {', '.join(wrong)}")
    bad = [name for name, score in scores.items() if not all(bool(part.isfinite().all()) for part in _parts(score))]
    if bad:
        raise ValueError(f"scores must be finite; NaN or infinity in: {', '.join(bad)}")


def _parts(score: Tensor) -> list[Tensor]:
    flat = score.detach().reshape(-1)
    return [flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK)]


def warn_of_zeros(k: int, nonzero: int) -> None:
    """Warn if more entries are asked for than there are scores that are not zero."""
    if k > nonzero:
        warnings.warn(
            f"{k:,} entries are asked for, but only {nonzero:,} scores are not zero: the rest are ties at zero, "
            f"chosen by lowest index; score more examples or lower the density",
            UserWarning,
            stacklevel=4,
        )


def random_k(sizes: Mapping[str, int], k: int, seed: int) -> dict[str, Tensor]:
    """Choose k entries of all parameters together, every subset equally likely.

    Memory is O(k) while k is below a twentieth of all entries, and O(n) above. The same seed gives the same entries
    wherever numpy's generator does, which it does not promise across numpy releases; save the mask to be sure.

    Args:
        sizes: Number of entries of every parameter.
        k: How many entries to choose.
        seed: Any non-negative integer.

    Returns:
        Sorted flat indices (int64, CPU) by name, for the names with at least one entry.
    """
    total = sum(sizes.values())
    picks = np.random.default_rng(seed).choice(total, size=k, replace=False, shuffle=False)
    picks.sort()
    return divide(torch.from_numpy(picks), sizes)


def divide(coordinates: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Turn sorted coordinates over parameters laid end to end into sorted flat indices by name, empty ones left out."""
    ends = torch.tensor(list(sizes.values()), dtype=torch.int64).cumsum(0)
    cuts = torch.searchsorted(coordinates, ends).tolist()
    chosen: dict[str, Tensor] = {}
    first = start = 0
    for (name, size), last in zip(sizes.items(), cuts, strict=True):
        if last > first:
            chosen[name] = coordinates[first:last] - start
        first, start = last, start + size
    return chosen
