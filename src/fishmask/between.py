"""The delta between two models wherever they are: on disk, on the hub or in memory, never two of them at once."""

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fishmask.fingerprint import bytes_hash, raw_bits, raw_bytes, takes_whole
from fishmask.mask import Mask, Patterns
from fishmask.params import matching
from fishmask.select import Keys, budget, collect, threshold
from fishmask.weights import PIECE, Source, View, Weights, is_twin, open_weights

if TYPE_CHECKING:
    from fishmask.delta import Delta

Progress = Callable[[str, int, int], None]


def between(
    base: Source,
    tuned: Source,
    *,
    density: float | None = None,
    k: int | None = None,
    heads: Patterns = (),
    ignore: Patterns = (),
    rename: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    base_name: str | None = None,
    base_revision: str | None = None,
    progress: Progress | None = None,
) -> "Delta":
    """Make the delta that turns one model into another: all entries that differ, or the k that differ most.

    Files are read in pieces of a million entries; besides two pieces only the delta itself is held.

    Args:
        base: A model, a state dict, a file, a folder or a name on the hub (see ``fishmask.weights.open_weights``).
        tuned: The same, of the fine-tuned model.
        density: Keep only so many entries, as a share of all: those with the largest absolute difference, exactly.
            The delta is then an approximation, unless no more than these differ.
        k: The same as a number.
        heads: Names or patterns of tensors of ``tuned`` that are kept whole, whether the base has them or not: a new
            head. They count in ``density`` and ``k``.
        ignore: Names or patterns of tensors that are left out.
        rename: New beginnings of the base's names by old ones: ``{"": "bert."}`` where the tuned model holds the base
            under ``bert``. The delta has the names of ``tuned``.
        dtype: Convert both to this dtype first; the delta is then one for the base in that dtype.
        base_name: Where the base comes from, for people to read; by default the name on the hub.
        base_revision: Which version of it; on the hub that version is compared.
        progress: Called with a phase and how many of its tensors are finished.

    Returns:
        The delta. Without ``density`` and ``k`` it gives ``tuned`` bit for bit.

    Raises:
        ValueError: Names, shapes or dtypes disagree (the message lists all disagreements), or arguments do not fit.
        FishError: A file is damaged, or there is none at that place.
    """
    if base_name is None and isinstance(base, str | PathLike) and not Path(base).exists():
        base_name = str(base)
    compared = compare(
        open_weights(base, base_revision),
        open_weights(tuned),
        heads=heads,
        ignore=ignore,
        rename=rename,
        dtype=dtype,
        progress=progress,
    )
    return compared.delta(density=density, k=k, base_name=base_name, base_revision=base_revision)


class Comparison:
    """Two models compared; ``compare`` makes it.

    Attributes:
        shapes: Shape of everything that is compared entry by entry or kept whole, by name.
        heads: Names of what is kept whole.
        changed: How many entries differ, by name; all of a head.
    """

    def __init__(self, base: Weights, tuned: Weights, pairs: "_Pairs", progress: Progress | None) -> None:
        self._base, self._tuned, self._names = base, tuned, pairs.entries
        self.shapes = {name: tuned.headers[theirs].shape for name, (_, theirs) in pairs.entries.items()}
        self.heads = [name for name, (own, _) in pairs.entries.items() if own is None]
        self.changed = dict.fromkeys(pairs.entries, 0)
        self._hashes: dict[str, str] = {}
        for number, (name, (own, _)) in enumerate(pairs.entries.items()):
            if own is None:
                self.changed[name] = self.shapes[name].numel()
            else:
                self._hashes[name] = bytes_hash(str(base.headers[own]), self._base_bytes(name))
            if progress:
                progress("comparing", number + 1, len(pairs.entries))
        self._buffers = {
            name: tuned.read(theirs)
            for name, (own, theirs) in pairs.buffers.items()
            if own is None or base.hash(own) != tuned.hash(theirs)
        }

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield where a piece begins, and the piece of the base and of the tuned model."""
        for start in range(0, self.shapes[name].numel(), PIECE):
            yield start, *self.piece(name, start)

    def piece(self, name: str, start: int) -> tuple[Tensor, Tensor]:
        """Return a piece of the base and of the tuned model."""
        own, theirs = self._names[name]
        stop = min(start + PIECE, self.shapes[name].numel())
        return self._base.piece(str(own), start, stop), self._tuned.piece(theirs, start, stop)

    def _base_bytes(self, name: str) -> Iterator[memoryview]:
        """Count the entries that differ on the way."""
        for _, base, tuned in self.pieces(name):
            self.changed[name] += int((raw_bits(base) != raw_bits(tuned)).sum())
            yield raw_bytes(base)

    def delta(
        self,
        *,
        density: float | None = None,
        k: int | None = None,
        base_name: str | None = None,
        base_revision: str | None = None,
    ) -> "Delta":
        """Make the delta; the arguments are those of ``between``.

        Raises:
            ValueError: ``density`` or ``k`` is out of range, below what the heads take, or both are given.
        """
        from fishmask.delta import Delta

        free = self._free(density, k)
        indices = {name: torch.arange(self.shapes[name].numel()) for name in self.heads}
        if free is None or free >= sum(self.changed.values()) - sum(map(len, indices.values())):
            indices |= {name: self._differing(name) for name in self._hashes if self.changed[name]}
        elif free:
            indices |= self._largest(free)
        mask = Mask.from_indices(indices, self.shapes)
        return Delta(
            mask,
            {name: self._tuned.take(self._names[name][1], flat) for name, flat in mask.indices.items()},
            base={n: text for n, text in self._hashes.items() if not takes_whole(mask, n, self.shapes[n].numel())},
            buffers=self._buffers,
            base_name=base_name,
            base_revision=base_revision,
        )

    def _free(self, density: float | None, k: int | None) -> int | None:
        """Return how many entries may be chosen besides the heads; None for all."""
        if density is not None and k is not None:
            raise ValueError("density and k are two ways to say the same; give one of them")
        sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        if density is not None:
            return budget(sizes, density, self.heads)[2]
        held = sum(sizes[name] for name in self.heads)
        if k is not None and not held <= k <= sum(sizes.values()):
            raise ValueError(f"k must be between {held:,} (what the heads take) and {sum(sizes.values()):,}; got {k:,}")
        return None if k is None else k - held

    def _differing(self, name: str) -> Tensor:
        """Return the sorted indices of the entries that differ."""
        # One tensor for all: small ones that stay, made between large ones that go, would leave holes in memory.
        found, count = torch.empty(self.changed[name], dtype=torch.int64), 0
        for start, base, tuned in self.pieces(name):
            here = (raw_bits(base) != raw_bits(tuned)).nonzero().view(-1)
            torch.add(here, start, out=found[count : count + len(here)])
            count += len(here)
        return found

    def _largest(self, k: int) -> dict[str, Tensor]:
        """Choose the k entries that differ most; ties go to the first."""
        changes = _Changes(self, [name for name in self._hashes if self.changed[name]])
        double = any(self._tuned.headers[theirs].dtype == torch.float64 for _, theirs in self._names.values())
        source = Keys(changes, torch.float64 if double else torch.float32)
        chosen: dict[str, list[Tensor]] = {}
        for key, flat in collect(source, *threshold(source, k)).items():
            name, start = changes.places[key]
            chosen.setdefault(name, []).append(flat + start)
        return {name: torch.cat(parts) for name, parts in chosen.items()}


class _Changes(Mapping[str, Tensor]):
    """The absolute differences of pieces, computed when asked for; -1 where the bits are the same."""

    def __init__(self, compared: Comparison, names: list[str]) -> None:
        self._compared = compared
        self.places = {
            f"{name}:{start}": (name, start)
            for name in names
            for start in range(0, compared.shapes[name].numel(), PIECE)
        }

    def __getitem__(self, key: str) -> Tensor:
        base, tuned = self._compared.piece(*self.places[key])
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        # What becomes infinite or NaN has changed more than anything else.
        size = (tuned.to(wide) - base.to(wide)).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        return size.where(raw_bits(base) != raw_bits(tuned), -1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def compare(
    base: Weights,
    tuned: Weights,
    *,
    heads: Patterns = (),
    ignore: Patterns = (),
    rename: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models tensor by tensor; the arguments and errors are those of ``between``."""
    base, tuned = View(base, rename, dtype), View(tuned, None, dtype)
    names = dict.fromkeys((*tuned.headers, *base.headers))
    left_out = set(matching(names, ignore, "ignore"))
    return Comparison(
        base, tuned, _paired(base, tuned, set(matching(tuned.headers, heads, "heads")), left_out), progress
    )


class _Pairs(NamedTuple):
    """What is compared: the base's name (None for what is kept whole) and the tuned model's, by the delta's name."""

    entries: dict[str, tuple[str | None, str]]
    buffers: dict[str, tuple[str | None, str]]


def _paired(base: Weights, tuned: Weights, heads: set[str], left_out: set[str]) -> _Pairs:
    pairs: dict[str, tuple[str | None, str]] = {}
    mine = {name: None for name in tuned.headers if name not in left_out}
    theirs = {name: None for name in base.headers if name not in left_out | heads}
    problems: list[str] = []
    for name in mine:
        tied = tuned.aliases.get(name)
        if name in heads:
            pairs[name] = None, name
        elif name in theirs:
            # Two names of one tensor in both are one; in one only, the other may hold different values under them.
            if tied is None or base.aliases.get(name) != tied:
                pairs[name] = name, name
        elif (canonical := base.aliases.get(name)) in theirs and canonical not in mine:
            pairs[str(canonical)] = canonical, name
        elif not is_twin(tuned, name, mine):
            problems.append(f"{name} is only in the second")
    used = {own for own, _ in pairs.values()}
    for name in theirs.keys() - mine.keys() - used:
        canonical = tuned.aliases.get(name)
        if canonical in mine and canonical not in theirs:
            pairs[canonical] = name, canonical
            problems.remove(f"{canonical} is only in the second")
        # Whole numbers that only the base has are buffers that are computed anew, such as BERT's positions.
        elif base.headers[name].dtype.is_floating_point and not is_twin(base, name, theirs):
            problems.append(f"{name} is only in the first")
    problems += [
        f"{name} is {base.headers[own]} in the first, {tuned.headers[second]} in the second"
        for name, (own, second) in pairs.items()
        if own is not None and base.headers[own] != tuned.headers[second]
    ]
    if problems:
        raise ValueError("the two states are not of one model: " + "; ".join(problems) + _advice(base, tuned))
    whole = {name for name, (own, second) in pairs.items() if own in base.buffers or second in tuned.buffers}
    return _Pairs(
        {name: pair for name, pair in pairs.items() if name not in whole},
        {name: pair for name, pair in pairs.items() if name in whole},
    )


class Fit(NamedTuple):
    """How the names of two models fit: arguments of ``between``."""

    rename: dict[str, str]
    heads: list[str]
    ignore: list[str]


def fit(base: Weights, tuned: Weights) -> Fit:
    """Guess how the names of two models fit: a beginning that one of them lacks, new tensors, and lost ones.

    Args:
        base: The base.
        tuned: The fine-tuned model.

    Returns:
        The renaming that gives the most tensors of one name and shape, and what then remains on either side.
    """
    rename = guessed(base, {name: header.shape for name, header in tuned.headers.items()})
    names = View(base, rename).headers
    return Fit(
        rename,
        [name for name, header in tuned.headers.items() if names.get(name) != header],
        [name for name, header in names.items() if name not in tuned.headers and header.dtype.is_floating_point],
    )


def guessed(base: Weights, shapes: Mapping[str, torch.Size | None]) -> dict[str, str]:
    """Guess which beginning names of the base lack or have too much; ``{}`` where they fit best as they are.

    Args:
        base: The base.
        shapes: Names under which its tensors are wanted, and their shapes where they are known.
    """

    def common(rename: Mapping[str, str]) -> int:
        renamed = View(base, rename).headers
        return sum(name in renamed and shape in (None, renamed[name].shape) for name, shape in shapes.items())

    trials = [{"": _first(name)} for name in shapes] + [{_first(name): ""} for name in base.headers]
    unique = [dict(pair) for pair in dict.fromkeys(tuple(trial.items()) for trial in [{}, *trials])]
    return max((trial for trial in unique if not _collides(base, trial)), key=common)


def _first(name: str) -> str:
    return name.partition(".")[0] + "."


def _collides(base: Weights, rename: Mapping[str, str]) -> bool:
    try:
        View(base, rename)
    except ValueError:
        return True
    return False


def _advice(base: Weights, tuned: Weights) -> str:
    """Say which arguments would make two models fit, where most of their tensors do."""
    rename, heads, ignore = fit(base, tuned)
    if 2 * len(heads) > len(tuned.headers):
        return ""
    parts = [f"rename={rename}"] if rename else []
    parts += [f"heads={heads}"] if heads else []
    parts += [f"ignore={ignore}"] if ignore else []
    return f"; fishmask.between compares them with {', '.join(parts)}"
