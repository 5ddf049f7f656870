"""The mask: which entries of which parameters are trained."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fishmask import container
from fishmask.batches import Batch
from fishmask.blocks import Block, random_blocks, top_blocks
from fishmask.compute import step_costs
from fishmask.errors import FishError
from fishmask.fingerprint import State, common_tensors, raw_bits
from fishmask.params import matching
from fishmask.quantized import weights
from fishmask.select import budget, random_k, top_k

Patterns = str | Sequence[str]
Tensors = nn.Module | Mapping[str, Tensor]
Shapes = nn.Module | Mapping[str, Tensor] | Mapping[str, Sequence[int]]


class Mask:
    """An immutable choice of k of a model's n entries: sorted flat indices for every parameter by canonical name.

    Two masks are equal, and hash alike, when they choose the same entries of the same names. Shapes play no part in
    this: a mask built from indices alone equals the same mask built from scores. Make one with a ``from_...`` method,
    ``random``, ``magnitude``, ``biases`` or ``between``; combine them with ``|``, ``&`` and ``-``.

    Example:
        >>> mask = Mask.from_scores({"w": torch.tensor([[1.0, 9.0], [8.0, 2.0]])}, density=0.5)
        >>> mask.indices["w"].tolist(), mask.k, mask.n
        ([1, 2], 2, 4)
    """

    __slots__ = ("__weakref__", "_digest", "_indices", "_shapes")

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        # For the constructors below: indices are sorted, unique, int64, on the CPU and in range already.
        order = [name for name in shapes if name in indices] if shapes else list(indices)
        self._indices = MappingProxyType({name: indices[name] for name in order if len(indices[name])})
        self._shapes = MappingProxyType({name: torch.Size(shape) for name, shape in shapes.items()})
        self._digest: str | None = None

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        density: float,
        keep: Patterns = (),
        exclude: Patterns = (),
        *,
        block: Block | None = None,
        step_budget: float | None = None,
        model: nn.Module | None = None,
        batch: Batch | None = None,
        cached: bool = False,
    ) -> "Mask":
        """Choose the entries with the largest scores over the whole model; ties go to the lowest index.

        Args:
            scores: One floating-point tensor per parameter, as from ``fishmask.fisher``.
            density: Share of all scored entries to choose, in (0, 1]: k is ``int(density × n)``, where n counts kept
                and excluded parameters too, as in the paper.
            keep: Names or patterns (see ``fishmask.params.matching``) of parameters chosen whole, inside the budget.
            exclude: Names or patterns of parameters never chosen from.
            block: Choose whole blocks by their summed score per entry instead: height and width as a pair or as text
                such as ``"16x16"``, or ``"rows"`` or ``"columns"`` (see ``fishmask.blocks``).
            step_budget: The most that a training step may cost, as a share in (0, 1] of one with entries in every
                block: the mask keeps to the last blocks then. Needs ``model`` (see ``fishmask.compute``).
            model: The model that was scored, to count what its layers cost.
            batch: A batch as it will be trained on, to count on; by default the model's ``dummy_inputs``.
            cached: Whether the blocks below the mask will come from a ``PrefixCache``.

        Returns:
            The mask, with exactly k entries; of blocks at most k, as many as fit.

        Raises:
            ValueError: Non-finite scores, a density outside (0, 1], patterns that match nothing or contradict each
                other, a budget that the kept parameters exceed, or none that has room for a block; a step budget
                without a model, or one that no mask of it meets.
            FishError: A step budget for a model that is no chain of blocks.
        """
        sizes = {name: score.numel() for name, score in scores.items()}
        if step_budget is not None:
            if model is None:
                raise ValueError("step_budget needs model=, to count what its layers cost")
            below = step_costs(model, batch).excluded(step_budget, cached)
            given = [exclude] if isinstance(exclude, str) else exclude
            exclude = (*given, *(name for name in below if name in sizes))
        kept, free, k = budget(sizes, density, keep, exclude)
        among = {name: scores[name] for name in free}
        return cls._chosen(scores, kept, top_k(among, k) if block is None else top_blocks(among, k, block))

    @classmethod
    def magnitude(
        cls,
        model: Tensors,
        density: float,
        keep: Patterns = (),
        exclude: Patterns = (),
        *,
        block: Block | None = None,
    ) -> "Mask":
        """Choose the entries with the largest absolute weight; arguments as for ``from_scores``."""
        tensors = _tensors(model)
        kept, free, k = budget({name: tensor.numel() for name, tensor in tensors.items()}, density, keep, exclude)
        among = {name: tensors[name] for name in free}
        if block is not None:
            return cls._chosen(tensors, kept, top_blocks(among, k, block, magnitude=True))
        return cls._chosen(tensors, kept, top_k(among, k, magnitude=True))

    @classmethod
    def random(
        cls,
        model: Tensors,
        density: float,
        seed: int,
        keep: Patterns = (),
        exclude: Patterns = (),
        *,
        block: Block | None = None,
    ) -> "Mask":
        """Choose entries at random, every subset equally likely; the other arguments are as for ``from_scores``.

        With ``block`` every order of the blocks is equally likely, and those that fit are taken in that order.
        """
        tensors = _tensors(model)
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        kept, free, k = budget(sizes, density, keep, exclude)
        if block is not None:
            shapes = {name: tensors[name].shape for name in free}
            return cls._chosen(tensors, kept, random_blocks(shapes, k, block, seed))
        return cls._chosen(tensors, kept, random_k({name: sizes[name] for name in free}, k, seed))

    @classmethod
    def biases(cls, model: Tensors, keep: Patterns = ()) -> "Mask":
        """Choose every bias whole, and the parameters that ``keep`` matches.

        A bias is told by the last part of its name: ``bias``, ``in_proj_bias``, ``bias_ih_l0``.

        Raises:
            ValueError: There is nothing to choose.
        """
        tensors = _tensors(model)
        chosen = {*matching(tensors, keep, "keep"), *(name for name in tensors if _is_bias(name))}
        if not chosen:
            raise ValueError("the model has no bias parameters; choose another kind of mask")
        return cls._chosen(tensors, chosen, {})

    @classmethod
    def from_indices(
        cls, indices: Mapping[str, Tensor | np.ndarray[Any, Any] | Sequence[int]], shapes: Shapes | None = None
    ) -> "Mask":
        """Choose the given entries.

        Args:
            indices: Flat (row-major) indices by parameter name, in any order, without duplicates.
            shapes: The model, or the shapes of all its parameters by name, or the parameters themselves. Without them
                ``n`` and ``density`` are unknown and indices beyond the end are found only by a model.

        Returns:
            The mask; it may be empty.

        Raises:
            TypeError: Indices are not whole numbers.
            ValueError: Indices are negative, repeated, out of range or not flat, or a name is not in ``shapes``.
        """
        known = _shapes(shapes)
        chosen = {name: _flat_indices(name, values) for name, values in indices.items()}
        if shapes is not None:
            _check_range(chosen, known)
        return cls(chosen, known)

    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor]) -> "Mask":
        """Choose the entries that are true in boolean tensors of the parameters' shapes.

        Raises:
            TypeError: A tensor is not boolean.
        """
        if wrong := [f"{name} ({tensor.dtype})" for name, tensor in dense.items() if tensor.dtype != torch.bool]:
            raise TypeError(f"a dense mask has boolean tensors; these are not: {', '.join(wrong)}")
        indices = {name: tensor.reshape(-1).nonzero().view(-1).cpu() for name, tensor in dense.items()}
        return cls(indices, {name: tensor.shape for name, tensor in dense.items()})

    @classmethod
    def between(cls, state_a: State, state_b: State) -> "Mask":
        """Choose the entries whose bits differ between two models or state dicts (``0.0`` and ``-0.0`` do differ).

        Only floating-point tensors count: the parameters of a model, or all of a state dict, where a tensor under
        several names counts once.

        Raises:
            ValueError: Names, shapes or dtypes disagree; the message lists all disagreements.
        """
        pairs = common_tensors(state_a, state_b)
        indices = {
            name: (raw_bits(a).cpu() != raw_bits(b).cpu()).reshape(-1).nonzero().view(-1)
            for name, (a, b) in pairs.items()
        }
        return cls(indices, {name: a.shape for name, (a, _) in pairs.items()})

    @classmethod
    def _chosen(cls, tensors: Mapping[str, Tensor], whole: Iterable[str], indices: dict[str, Tensor]) -> "Mask":
        complete = {name: torch.arange(tensors[name].numel()) for name in whole}
        return cls(indices | complete, {name: tensor.shape for name, tensor in tensors.items()})

    @property
    def indices(self) -> Mapping[str, Tensor]:
        """Sorted flat indices (int64, CPU) by name, for parameters with at least one entry; do not modify them."""
        return self._indices

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes of all the model's parameters by name; empty when the mask was built without them."""
        return self._shapes

    @property
    def k(self) -> int:
        """Number of chosen entries."""
        return sum(len(indices) for indices in self._indices.values())

    @property
    def n(self) -> int:
        """Number of entries in all.

        Raises:
            FishError: The mask was built without shapes.
        """
        if not self._shapes:
            raise FishError("this mask does not know the model's shapes; pass shapes= to Mask.from_indices")
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def density(self) -> float:
        """k/n, a fraction; 0 for a mask over nothing. Raises ``FishError`` as ``n`` does."""
        return self.k / n if (n := self.n) else 0.0

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the sorted names with entries: length and UTF-8 of the name, count, indices.

        All numbers are little-endian 64-bit integers. Shapes are not part of it.
        """
        if self._digest is None:
            sha = hashlib.sha256()
            for name in sorted(self._indices):
                text, indices = name.encode(), self._indices[name].numpy()
                sha.update(len(text).to_bytes(8, "little") + text + len(indices).to_bytes(8, "little"))
                sha.update(indices.astype("<i8", copy=False).data)
            self._digest = sha.hexdigest()
        return self._digest

    def with_shapes(self, shapes: Shapes) -> "Mask":
        """Return the same mask, checked against and knowing the shapes of a model or of a mapping of shapes.

        Raises:
            ValueError: A name or an index does not exist there.
        """
        return Mask.from_indices(self._indices, shapes)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __or__(self, other: "Mask") -> "Mask":
        return self._combine(other, np.union1d)

    def __and__(self, other: "Mask") -> "Mask":
        return self._combine(other, lambda a, b: np.intersect1d(a, b, assume_unique=True))

    def __sub__(self, other: "Mask") -> "Mask":
        return self._combine(other, lambda a, b: np.setdiff1d(a, b, assume_unique=True))

    def _combine(self, other: "Mask", operate: Callable[[Any, Any], Any]) -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        shapes = {**self._shapes, **other._shapes}
        if wrong := [f"{n} {tuple(self._shapes[n])} and {tuple(s)}" for n, s in shapes.items() if self._differs(n, s)]:
            raise ValueError(f"masks of different models cannot be combined; shapes differ: {'; '.join(wrong)}")
        none = torch.empty(0, dtype=torch.int64)
        names = dict.fromkeys((*self._indices, *other._indices))
        pairs = {name: (self._indices.get(name, none), other._indices.get(name, none)) for name in names}
        combined = {name: torch.from_numpy(operate(a.numpy(), b.numpy())) for name, (a, b) in pairs.items()}
        if shapes:
            _check_range(combined, shapes)
        return Mask(combined, shapes)

    def _differs(self, name: str, shape: torch.Size) -> bool:
        return self._shapes.get(name, shape) != shape

    def overlap(self, other: "Mask") -> float:
        """Return the share of this mask's entries that the other has too: |A∩B| / |A|, 0 when this mask is empty."""
        return (self & other).k / self.k if self.k else 0.0

    def split(self, parts: int, how: Literal["interleaved", "contiguous"] = "interleaved") -> list["Mask"]:
        """Split into disjoint masks whose union is this mask and whose sizes differ by one at most.

        Equal masks split alike: entries count in the order of their parameters' names, then of their indices.

        Args:
            parts: How many masks to make; those beyond k are empty.
            how: ``"interleaved"`` deals the entries out in turn, ``"contiguous"`` cuts them into runs.

        Returns:
            The parts, in order.

        Raises:
            ValueError: ``parts`` is below 1 or ``how`` is unknown.
        """
        if parts < 1:
            raise ValueError(f"parts must be at least 1, got {parts}")
        if how not in ("interleaved", "contiguous"):
            raise ValueError(f"how must be 'interleaved' or 'contiguous', got {how!r}")
        k, start = self.k, 0
        chosen: list[dict[str, Tensor]] = [{} for _ in range(parts)]
        for name in sorted(self._indices):
            place = torch.arange(start, start + len(self._indices[name]))
            owner = place % parts if how == "interleaved" else place * parts // k
            for part in range(parts):
                chosen[part][name] = self._indices[name][owner == part]
            start += len(place)
        return [Mask(indices, self._shapes) for indices in chosen]

    def groups(self) -> list[tuple[str, int, int]]:
        """Count entries by layer, in the order of the model: (layer, chosen entries, all entries).

        A layer is the part of the name up to its first number ("encoder.layer.3"), else the module. All entries count
        as 0 when the mask does not know the shapes.
        """
        counts: dict[str, list[int]] = {}
        for name in self._shapes or self._indices:
            row = counts.setdefault(_layer(name), [0, 0])
            row[0] += len(self._indices.get(name, ()))
            row[1] += self._shapes[name].numel() if self._shapes else 0
        return [(layer, chosen, size) for layer, (chosen, size) in counts.items()]

    def summary(self) -> str:
        """Describe the mask in a few lines: totals, then a row for every layer with entries."""
        rows = [(layer, chosen, size) for layer, chosen, size in self.groups() if chosen]
        width = max((len(layer) for layer, _, _ in rows), default=0)
        total = f"{self.k:,} of {self.n:,} entries ({self.density:.4%})" if self._shapes else f"{self.k:,} entries"
        lines = [f"{total} in {len(self._indices)} parameters, digest {self.digest[:12]}"]
        for layer, chosen, size in rows:
            share = f"{layer:<{width}}  {chosen:>12,}  {chosen / self.k:>7.2%} of the mask"
            lines.append(share + (f"  {chosen / size:>8.3%} of the layer" if size else ""))
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mask to a file, atomically; ``docs/format.md`` describes it.

        Raises:
            OSError: The file cannot be written.
        """
        tensors, described = container.pack_mask(self._indices, self._shapes)
        container.write(path, "mask", container.Content({"mask": self.digest}, described, tensors))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Mask":
        """Read a mask back from a file.

        Raises:
            FishError: The file is damaged, is not a mask, or comes from a newer fishmask.
            OSError: The file cannot be read.
        """
        content = container.read(path, "mask")
        with container.refusing(path):
            return cls.unpack(content)

    @classmethod
    def unpack(cls, content: container.Content) -> "Mask":
        """Build the mask of a file's content; ``ValueError`` when it is not the one that the content names."""
        mask = cls.from_indices(*container.unpack_mask(content))
        if mask.digest != content.metadata["mask"]:
            raise ValueError(f"digest {mask.digest} of the mask, {content.metadata['mask']} in the header")
        return mask

    def __repr__(self) -> str:
        of = f", n={self.n}, density={self.density:.6g}" if self._shapes else ""
        return f"Mask(k={self.k}{of}, parameters={len(self._indices)}, digest={self.digest[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Mask, (dict(self._indices), dict(self._shapes))


def _tensors(model: Tensors) -> Mapping[str, Tensor]:
    return weights(model) if isinstance(model, nn.Module) else model


def _shapes(source: Shapes | None) -> dict[str, torch.Size]:
    if source is None:
        return {}
    if isinstance(source, nn.Module):
        return {name: p.shape for name, p in weights(source).items()}
    return {n: shape.shape if isinstance(shape, Tensor) else torch.Size(shape) for n, shape in source.items()}


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1]) or name


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.startswith("bias_") or last.endswith("_bias")


def _flat_indices(name: str, values: Any) -> Tensor:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"indices of {name} must be whole numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"indices of {name} must be flat (one dimension), got shape {array.shape}")
    flat = np.sort(array).astype(np.int64)
    if len(flat) and flat[0] < 0:
        raise ValueError(f"indices of {name} must not be negative, got {flat[0]}")
    if (repeated := flat[1:][flat[1:] == flat[:-1]]).size:
        raise ValueError(f"indices of {name} must not repeat; {repeated[0]} does")
    return torch.from_numpy(flat)


def _check_range(indices: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    if unknown := [name for name in indices if name not in shapes]:
        raise ValueError(f"indices name parameters that are not in shapes: {', '.join(unknown)}")
    for name, flat in indices.items():
        if len(flat) and int(flat[-1]) >= shapes[name].numel():
            raise ValueError(f"index {flat[-1]} is beyond the entries of {name}, whose shape is {list(shapes[name])}")
