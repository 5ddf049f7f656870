"""The delta: a mask and the trained values of its entries, as a small file that knows the base it belongs to."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishmask import applied, container
from fishmask.errors import FishError
from fishmask.fingerprint import SHORT, Base, State, fingerprint, takes_whole
from fishmask.mask import Mask
from fishmask.params import aliases
from fishmask.quantized import weights

_SAVED = (torch.float32, torch.bfloat16, torch.float16)


class Delta:
    """The k trained values of a mask, absolute and not differences, and the fingerprint of their base.

    Args:
        mask: The mask; it knows the model's shapes.
        values: For each name in ``mask.indices`` a 1-D floating-point tensor, aligned with the indices.
        base: What ``fingerprint`` returned for the base weights, or the same read from a file.
        buffers: Small dense tensors that training changed besides (BatchNorm statistics); applied and reverted whole.
        base_name: Where the base comes from, for people to read.
        base_revision: Which version of it.

    Raises:
        ValueError: The parts do not fit each other.
        TypeError: Values are not floating-point.

    Example:
        >>> base, tuned = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> delta = Delta.between(base, tuned)
        >>> delta.apply(base)
        >>> torch.equal(base.weight, tuned.weight)
        True
    """

    def __init__(
        self,
        mask: Mask,
        values: Mapping[str, Tensor],
        *,
        base: Mapping[str, str] | Base,
        buffers: Mapping[str, Tensor] | None = None,
        base_name: str | None = None,
        base_revision: str | None = None,
    ) -> None:
        self.mask = mask
        self.values = {name: _held(values[name]) for name in mask.indices if name in values}
        self.base = base if isinstance(base, Base) else Base.of(base)
        self.buffers = {name: buffer.detach().cpu().clone() for name, buffer in (buffers or {}).items()}
        self.base_name, self.base_revision = base_name, base_revision
        self._validate(values)

    def _validate(self, values: Mapping[str, Tensor]) -> None:
        if not self.mask.shapes and self.k:
            raise ValueError("a delta needs a mask that knows the model's shapes; use mask.with_shapes(model)")
        if wrong := sorted(set(values) ^ set(self.mask.indices)):
            raise ValueError(f"values and mask must name the same parameters; one of them lacks: {', '.join(wrong)}")
        for name, held in self.values.items():
            if not held.is_floating_point():
                raise TypeError(f"values of {name} must be floating-point, got {held.dtype}")
            if held.shape != self.mask.indices[name].shape:
                raise ValueError(
                    f"values of {name} must have shape {tuple(self.mask.indices[name].shape)}, got {tuple(held.shape)}"
                )
        partial = {n for n, shape in self.mask.shapes.items() if not takes_whole(self.mask, n, shape.numel())}
        if wrong := sorted(partial ^ set(self.base.short)):
            raise ValueError(
                f"base must fingerprint every parameter that the mask does not take whole, and no other; "
                f"wrong or missing: {', '.join(wrong)}"
            )

    @classmethod
    def between(
        cls,
        base_state: State,
        tuned_state: State,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
    ) -> "Delta":
        """Make the delta that turns one model or state dict into another, bit for bit.

        Parameters are compared entry by entry. So are all floating-point tensors of a state dict, where parameters and
        buffers look alike; other tensors, and all buffers of a model, are kept whole where they differ.
        ``fishmask.between`` does the same with models on disk, and can leave the smallest changes out.

        Raises:
            ValueError: Names, shapes or dtypes disagree; the message lists all disagreements.
        """
        from fishmask.between import compare
        from fishmask.weights import Held

        compared = compare(Held(base_state, "the first"), Held(tuned_state, "the second"))
        return compared.delta(base_name=base_name, base_revision=base_revision)

    @property
    def k(self) -> int:
        """Number of entries."""
        return self.mask.k

    @property
    def dtypes(self) -> list[str]:
        """Names of the dtypes that the values have ("float32"), sorted."""
        return sorted({_short(values.dtype) for values in self.values.values()})

    def summary(self) -> str:
        """Describe the delta in a few lines: its base, its values and its mask."""
        source = self.base_name or "unnamed"
        revision = f" at {self.base_revision}" if self.base_revision else ""
        value_bytes = sum(values.numel() * values.element_size() for values in self.values.values())
        buffers = f", {len(self.buffers)} whole buffers" if self.buffers else ""
        return "\n".join(
            [
                f"base {source}{revision}, fingerprint {self.base.digest[:12]}",
                f"values {'+'.join(self.dtypes) or 'none'}, {value_bytes:,} bytes{buffers}",
                self.mask.summary(),
            ]
        )

    def __repr__(self) -> str:
        return f"Delta(k={self.k}, dtypes={'+'.join(self.dtypes)}, base={self.base_name!r}, mask={self.mask!r})"

    def save(
        self,
        path: str | PathLike[str],
        values_dtype: torch.dtype | None = None,
        indices: Literal["coded", "raw"] = "coded",
    ) -> None:
        """Write the delta to a file, atomically; ``docs/format.md`` describes it.

        Args:
            path: The file; an existing one is replaced.
            values_dtype: float32, bfloat16 or float16 to convert the values; by default they stay as they are.
            indices: ``"coded"`` is small; ``"raw"`` can be read with safetensors alone.

        Raises:
            ValueError: An argument is unknown, or values would overflow; the message names their parameters.
            OSError: The file cannot be written.
        """
        if values_dtype is not None and values_dtype not in _SAVED:
            raise ValueError(f"values_dtype must be one of {', '.join(map(_short, _SAVED))}; got {values_dtype}")
        if indices not in ("coded", "raw"):
            raise ValueError(f"indices must be 'coded' or 'raw', got {indices!r}")
        values = self.values
        if values_dtype is not None:
            if large := _overflowing(values, dict.fromkeys(values, values_dtype)):
                raise ValueError(f"values beyond the range of {_short(values_dtype)} in: {', '.join(large)}")
            values = {name: held.to(values_dtype) for name, held in values.items()}
        metadata = {"mask": self.mask.digest, "base": self.base.digest}
        metadata |= {"base_name": self.base_name} if self.base_name is not None else {}
        metadata |= {"base_revision": self.base_revision} if self.base_revision is not None else {}
        tensors, description = self._packed(values, coded=indices == "coded")
        container.write(path, "delta", container.Content(metadata, description, tensors))

    def _packed(self, values: Mapping[str, Tensor], coded: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, description = container.pack_mask(self.mask.indices, self.mask.shapes)
        # One string: far smaller once compressed than a list of strings.
        description["fingerprints"] = "".join(self.base.short.get(name, "-" * SHORT) for name in self.mask.shapes)
        if coded:
            held, description["dtypes"] = container.pack_values(values, self.mask.shapes)
            tensors |= held
        else:
            tensors = {f"indices/{name}": container.narrow(flat) for name, flat in self.mask.indices.items()}
            tensors |= {f"values/{name}": held for name, held in values.items()}
            del description["planes"]
        return tensors | {f"buffers/{name}": buffer for name, buffer in self.buffers.items()}, description

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Delta":
        """Read a delta back from a file.

        Raises:
            FishError: The file is damaged, is not a delta, or comes from a newer fishmask.
            OSError: The file cannot be read.
        """
        content = container.read(path, "delta")
        with container.refusing(path):
            mask, description = Mask.unpack(content), content.description
            digits, names = description["fingerprints"], description["names"]
            if len(digits) != SHORT * len(names):
                raise ValueError(f"{len(digits)} digits of fingerprints for {len(names)} parameters")
            short = {name: digits[i * SHORT : (i + 1) * SHORT] for i, name in enumerate(names)}
            return cls(
                mask,
                _unpack_values(content, mask),
                base=Base({n: text for n, text in short.items() if "-" not in text}, content.metadata["base"]),
                buffers=container.under(content.tensors, "buffers/"),
                base_name=content.metadata.get("base_name"),
                base_revision=content.metadata.get("base_revision"),
            )

    def apply(self, model: nn.Module, check_base: bool = True) -> None:
        """Write the values into the model's weights, in place, in the dtype of the weights.

        Deltas may be stacked; where they overlap, the later one counts. Nothing is written unless all checks pass.

        Args:
            model: The base model, or one with other deltas applied.
            check_base: Refuse other weights than those that the delta was made on.

        Raises:
            FishError: The delta does not fit the model; one message lists all that is wrong. Or it is applied already.
        """
        if applied.is_applied(model, self):
            raise FishError("this delta is applied to this model already; revert it first")
        self.check(model, check_base)
        applied.write(model, self, self.entries(model))

    def check(self, model: nn.Module, check_base: bool = True) -> None:
        """Raise the FishError that ``apply`` would raise if the delta does not fit ``model``; costs a hash of it."""
        names, targets = aliases(model), applied.targets(model)
        problems = self._misfits(targets, names)
        others = self._other_base(model, targets, names) if check_base else []
        if problems or others:
            hint = "" if problems else ";\ncheck_base=False applies the delta to this model anyway"
            listed = ";\n  ".join((*problems, *others))
            raise FishError(f"the delta does not fit this model:\n  {listed}{hint}")

    def entries(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what ``apply`` writes: indices and values (CPU, in the dtypes of ``model``) by its canonical names."""
        names, targets = aliases(model), applied.targets(model)
        entries: dict[str, tuple[Tensor, Tensor]] = {}
        for name, values in self.values.items():
            target = names.get(name, name)
            entries[target] = (self.mask.indices[name], values.to(targets[target].dtype))
        for name, buffer in self.buffers.items():
            entries[name] = (torch.arange(buffer.numel()), buffer.reshape(-1).to(targets[name].dtype))
        return entries

    def revert(self, model: nn.Module) -> None:
        """Take the values back out of the model: its weights are, bit for bit, what they were without this delta.

        Deltas that were stacked on one model can be reverted in any order.

        Raises:
            FishError: This delta is not applied to this model, or the weights it wrote were changed since.
        """
        applied.revert(model, self)

    def _misfits(self, targets: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
        """List what makes writing impossible."""
        shapes = {
            **{name: self.mask.shapes[name] for name in self.values},
            **{n: b.shape for n, b in self.buffers.items()},
        }
        problems = _compare_shapes(shapes, targets, names)
        owners: dict[str, list[str]] = {}
        for name in shapes:
            owners.setdefault(names.get(name, name), []).append(name)
        problems += [f"one tied parameter in this model: {', '.join(own)}" for own in owners.values() if len(own) > 1]
        present = {name: targets[names.get(name, name)] for name in shapes if names.get(name, name) in targets}
        if meta := [name for name, tensor in present.items() if tensor.is_meta]:
            problems.append(f"without memory (on the meta device): {', '.join(meta)}")
        dtypes = {name: tensor.dtype for name, tensor in present.items() if name in self.values}
        problems += [f"values beyond the range of its dtype: {n}" for n in _overflowing(self.values, dtypes)]
        return problems

    def _other_base(self, model: nn.Module, targets: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
        """List what differs from the base that the delta was made on."""
        untouched = {name: shape for name, shape in self.mask.shapes.items() if name not in self.values}
        problems = _compare_shapes(untouched, targets, names)
        known = {names.get(name, name) for name in self.mask.shapes}
        if unknown := [name for name in weights(model) if name not in known]:
            problems.append(f"unknown to the delta: {', '.join(unknown)}")
        here = {name: names.get(name, name) for name in self.base.short if _fits(self.mask, name, targets, names)}
        differing = self._differing((name, targets[target]) for name, target in here.items())
        if differing:
            # A delta may be made on a model with others applied, or on the base below them.
            below = ((name, applied.restored(model, target, targets[target])) for name, target in here.items())
            differing = self._differing(below)
        if differing and len(differing) == len(here):
            problems.append("other weights in every parameter: another base, or the same in another dtype")
        elif differing:
            problems.append(f"other weights: {', '.join(differing)}")
        return problems

    def _differing(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        hashes = fingerprint(named, self.mask)
        if len(hashes) == len(self.base.short):
            return self.base.differing(Base.of(hashes))
        # Parameters that are missing or misshapen are reported as such: compare the others by what is known of each.
        return [name for name, text in hashes.items() if self.base.short[name] != text[:SHORT]]


def load(model: nn.Module, path: str | PathLike[str], *, revision: str | None = None) -> Delta:
    """Read a delta and apply it to its base model.

    Args:
        model: The base.
        path: A file; a folder that ``fishmask train``, a Trainer or ``save_pretrained`` wrote; or a name on the hub.
        revision: Which version on the hub.

    Returns:
        The delta, for a later ``revert``.

    Raises:
        FishError: The file is damaged or the delta does not fit the model; or there is no delta at that place.
        OSError: The file cannot be read.
    """
    from fishmask.hub import adapter_folder, delta_in

    file = Path(path)
    # A name on the hub is "somebody/something-1.0"; whatever else is missing is a missing file.
    named = len(file.parts) == 2 and not file.is_absolute() and file.suffix != ".safetensors"
    if file.is_dir() or (named and not file.exists()):
        file = delta_in(adapter_folder(path, **({} if revision is None else {"revision": revision})))
    delta = Delta.load(file)
    delta.apply(model)
    return delta


def _held(values: Tensor) -> Tensor:
    return values.detach().cpu().clone(memory_format=torch.contiguous_format)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _overflowing(values: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    # By way of float64, because 8-bit floats have no arithmetic of their own.
    return [
        name
        for name, dtype in dtypes.items()
        if bool((values[name].double().isfinite() & ~values[name].to(dtype).double().isfinite()).any())
    ]


def _fits(mask: Mask, name: str, targets: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
    target = targets.get(names.get(name, name))
    return target is not None and target.shape == mask.shapes[name] and not target.is_meta


def _compare_shapes(
    shapes: Mapping[str, torch.Size], targets: Mapping[str, Tensor], names: Mapping[str, str]
) -> list[str]:
    problems = []
    if missing := [name for name in shapes if names.get(name, name) not in targets]:
        problems.append(f"missing from the model: {', '.join(missing)}")
    for name, shape in shapes.items():
        target = targets.get(names.get(name, name))
        if target is not None and target.shape != shape:
            problems.append(f"other shape: {name} is {list(target.shape)}, the delta expects {list(shape)}")
    return problems


def _unpack_values(content: container.Content, mask: Mask) -> dict[str, Tensor]:
    tensors, description = content.tensors, content.description
    if "indices" not in tensors:
        return {name: tensors[f"values/{name}"] for name in mask.indices}
    dtypes = dict(zip(description["names"], description["dtypes"], strict=True))
    counts = {name: len(indices) for name, indices in mask.indices.items()}
    return container.unpack_values(tensors, dtypes, counts)
