"""Adapter folders of PEFT's two sparse methods: SHiRA and Supertuning.

Both add k values to the weights of ``nn.Linear`` layers, and both fix how many: SHiRA r × (rows + columns) in every
layer, with one r; Supertuning one share of every layer. Other modules can only be replaced whole.

Source: peft 0.21.2, ``tuners/shira`` and ``tuners/supertuning``.
"""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fishmask.additive import Exported, add_wide, assembled, canonical, difference, reading
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.hub import ADAPTER_FILE, CONFIG_FILE
from fishmask.params import aliases
from fishmask.publish import replace_file
from fishmask.weights import Held, Weights, open_weights

_PREFIX = "base_model.model."
_LEGACY = "adapter_model.bin"
Level = float


class Kind(ABC):
    """One of the two methods: how many entries a layer has, and under which names they are stored."""

    name: str
    peft_type: str
    values: str
    indices: str
    entry_bytes: int

    @abstractmethod
    def level(self, rows: int, columns: int, count: int) -> Level:
        """Return the lowest setting that has room for so many entries in a layer."""

    @abstractmethod
    def room(self, rows: int, columns: int, level: Level) -> int:
        """Return how many entries a layer has at a setting."""

    @abstractmethod
    def common(self, layers: Mapping[str, "Layer"]) -> Level | None:
        """Return the setting at which every layer has the entries that it needs, and no more."""

    @abstractmethod
    def config(self, level: Level, **common: Any) -> Any:
        """Return PEFT's configuration."""

    @abstractmethod
    def stored(self, flat: Tensor, columns: int) -> Tensor:
        """Return flat indices as the file has them."""

    @abstractmethod
    def flat(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """Undo ``stored``; ``ValueError`` where they are out of range."""

    @staticmethod
    @abstractmethod
    def add(base: Tensor, added: Tensor) -> Tensor:
        """Add as the method's layer does."""


class Shira(Kind):
    """r × (rows + columns) entries; two int32 indices and a float32 each."""

    name, peft_type, values, indices, entry_bytes = "SHiRA", "SHIRA", "shira_weight", "shira_indices", 12

    def level(self, rows: int, columns: int, count: int) -> Level:
        """Return the lowest rank."""
        return -(-count // (rows + columns))

    def room(self, rows: int, columns: int, level: Level) -> int:
        """Return r × (rows + columns); 0 where that is more than the layer has, which PEFT refuses."""
        room = int(level) * (rows + columns)
        return room if room <= rows * columns else 0

    def common(self, layers: Mapping[str, "Layer"]) -> Level | None:
        """Return the rank that all layers have."""
        levels = {self.level(layer.rows, layer.columns, len(layer.flat)) for layer in layers.values()}
        exact = all(self.room(x.rows, x.columns, max(levels)) == len(x.flat) for x in layers.values())
        return max(levels) if exact else None

    def config(self, level: Level, **common: Any) -> Any:
        """Return a ShiraConfig; its random mask is replaced by the indices of the file."""
        return _peft().ShiraConfig(r=int(level), **common)

    def stored(self, flat: Tensor, columns: int) -> Tensor:
        """Return rows and columns."""
        return torch.stack([flat // columns, flat % columns]).int()

    def flat(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """Return flat indices."""
        if stored.ndim != 2 or len(stored) != 2:
            raise ValueError(f"indices have shape {list(stored.shape)}, expected [2, entries]")
        # On Windows PEFT saves them as floats.
        row, column = stored.long()
        if not torch.equal(stored.double(), stored.double().round()):
            raise ValueError("indices are not whole numbers")
        if ((row < 0) | (row >= rows) | (column < 0) | (column >= columns)).any():
            raise ValueError(f"indices are out of range for a weight of shape {[rows, columns]}")
        flat: Tensor = row * columns + column
        return flat

    @staticmethod
    def add(base: Tensor, added: Tensor) -> Tensor:
        """Add in float32, or wider."""
        return add_wide(base, added.float())


class Supertuning(Kind):
    """One share of every layer; an int32 index and a float32 each."""

    name, peft_type, entry_bytes = "Supertuning", "SUPERTUNING", 8
    values, indices = "supertuning_values", "supertuning_indices"

    def level(self, rows: int, columns: int, count: int) -> Level:
        """Return a share that rounds down to the count."""
        return min((count + 0.5) / (rows * columns), 1.0)

    def room(self, rows: int, columns: int, level: Level) -> int:
        """Return the share of the layer, rounded as PEFT does."""
        return int(rows * columns * (1 - (1 - level)))

    def common(self, layers: Mapping[str, "Layer"]) -> Level | None:
        """Return a share that rounds down to the count of every layer."""
        low = max(len(layer.flat) / layer.size for layer in layers.values())
        high = min((len(layer.flat) + 1) / layer.size for layer in layers.values())
        share = min((low + high) / 2, 1.0)
        exact = all(self.room(x.rows, x.columns, share) == len(x.flat) for x in layers.values())
        return share if exact else None

    def config(self, level: Level, **common: Any) -> Any:
        """Return a SupertuningConfig."""
        return _peft().SupertuningConfig(sparsity=1 - level, **common)

    def stored(self, flat: Tensor, columns: int) -> Tensor:
        """Return flat indices."""
        return flat.int()

    def flat(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """Return flat indices; their range is checked with the others'."""
        if stored.ndim != 1 or stored.is_floating_point():
            raise ValueError(f"indices are {stored.dtype} {list(stored.shape)}, expected whole numbers in a row")
        return stored.long()

    @staticmethod
    def add(base: Tensor, added: Tensor) -> Tensor:
        """Add in the base's dtype."""
        total: Tensor = base + added.to(base.dtype)
        return total


KINDS: dict[str, Kind] = {"shira": Shira(), "supertuning": Supertuning()}


@dataclass(frozen=True)
class Layer:
    """The entries of a linear layer's weight that a delta changes."""

    rows: int
    columns: int
    flat: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """Number of all its entries."""
        return self.rows * self.columns


def export_peft(delta: Delta, model: nn.Module, folder: Path, kind: Kind, *, pad: bool = False) -> Exported:
    """Write a delta as an adapter folder that ``peft.PeftModel.from_pretrained`` reads.

    Modules that the delta takes whole are stored as ``modules_to_save``.

    Args:
        delta: The delta.
        model: Its base, which ``formats`` has checked.
        folder: The folder to write; made when missing.
        kind: The method.
        pad: Where the counts do not fit, add entries that change nothing, at the setting that makes the smallest file;
            store layers whole where that is smaller, and modules whole where only some of their entries change.

    Raises:
        FishError: The delta does not fit the method; the message lists all that does not. Or peft is missing.
    """
    base = Held(model, f"the {type(model).__name__}")
    layers, whole = _sorted(delta, model, base, kind, pad)
    level, dense = _planned(layers, kind, pad) if layers else (0.0, [])
    whole = _with_namesakes(model, [*whole, *dense], pad)
    layers = {path: layer for path, layer in layers.items() if path not in whole}
    if not layers:
        raise FishError(f"{kind.name} needs at least one nn.Linear layer of which the delta has a part of the weight")
    tensors: dict[str, Tensor] = {}
    padded = inexact = 0
    for path, layer in layers.items():
        room = kind.room(layer.rows, layer.columns, level)
        found = difference(base, f"{path}.weight", layer.flat, layer.values, kind.add)
        free = torch.ones(layer.size, dtype=torch.bool)
        free[layer.flat] = False
        flat, order = torch.sort(torch.cat([layer.flat, free.nonzero().view(-1)[: room - len(layer.flat)]]))
        added = torch.zeros(room, dtype=torch.float32)
        added[: len(found.added)] = found.added
        tensors[f"{_PREFIX}{path}.{kind.values}"] = added[order]
        tensors[f"{_PREFIX}{path}.{kind.indices}"] = kind.stored(flat, layer.columns)
        padded, inexact = padded + room - len(layer.flat), inexact + found.inexact
    held = canonical(delta, base)
    for path in whole:
        for name, tensor in model.get_submodule(path).state_dict().items():
            full = f"{path}.{name}"
            copy = delta.buffers.get(full, tensor.detach().cpu()).clone().contiguous()
            if full in held:
                copy.view(-1)[held[full][0]] = held[full][1].to(copy.dtype)
            tensors[_PREFIX + full] = copy
            padded += 0 if full in delta.buffers else copy.numel() - len(held.get(full, ((),))[0])
    config = kind.config(
        level,
        target_modules="|".join(map(re.escape, layers)),
        modules_to_save=whole or None,
        base_model_name_or_path=delta.base_name,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    data = save(tensors, metadata={"format": "pt"})
    replace_file(folder / ADAPTER_FILE, [data])
    config.save_pretrained(folder)
    return Exported(folder, len(data), delta.k, padded, inexact)


def _sorted(delta: Delta, model: nn.Module, base: Weights, kind: Kind, pad: bool) -> tuple[dict[str, Layer], list[str]]:
    """Tell the layers that entries are added to from the modules that are stored whole."""
    names = aliases(model)
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    groups: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, entries in canonical(delta, base).items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = entries
    for name, buffer in delta.buffers.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = torch.arange(buffer.numel()), buffer.reshape(-1)
    layers: dict[str, Layer] = {}
    whole: list[str] = []
    problems: list[str] = []
    for path, held in groups.items():
        module = model.get_submodule(path)
        sizes = {f"{path}.{name}": p.numel() for name, p in module.named_parameters(recurse=False)}
        complete = all(name in held and len(held[name][0]) == size for name, size in sizes.items())
        apart = bool(path) and not any(True for _ in module.children()) and not shared & held.keys()
        partial = isinstance(module, nn.Linear) and held.keys() == {f"{path}.weight"} and not complete
        if apart and isinstance(module, nn.Linear) and partial:
            layers[path] = Layer(module.out_features, module.in_features, *held[f"{path}.weight"])
        elif apart and (complete or pad):
            whole.append(path)
        else:
            why = f"{type(module).__name__}, not whole" if apart else "tied, or not of a module without parts"
            problems += [f"{name} ({len(flat):,} of its entries; {why})" for name, (flat, _) in held.items()]
    if problems:
        listed = ";\n  ".join(problems)
        raise FishError(
            f"{kind.name} holds some entries of the weights of nn.Linear layers, and modules whole; these do not fit:"
            f"\n  {listed}" + ("" if pad else ";\npad=True stores modules whole of which the delta has a part")
        )
    return layers, whole


def _planned(layers: Mapping[str, Layer], kind: Kind, pad: bool) -> tuple[Level, list[str]]:
    """Return the setting, and which layers are better stored whole."""
    if (level := kind.common(layers)) is not None:
        return level, []
    needed = {path: kind.level(layer.rows, layer.columns, len(layer.flat)) for path, layer in layers.items()}

    def left(level: Level) -> list[str]:
        return [p for p, x in layers.items() if kind.room(x.rows, x.columns, level) < len(x.flat)]

    if not pad:
        enough = min((level for level in needed.values() if not left(level)), default=max(needed.values()))
        listed = ";\n  ".join(
            f"{path}.weight has {len(layer.flat):,} entries, needs {kind.room(layer.rows, layer.columns, enough):,}"
            for path, layer in layers.items()
        )
        raise FishError(
            f"{kind.name} has one setting for all layers; at the lowest that holds them ({enough:.6g}), these counts "
            f"would be needed:\n  {listed};\npad=True adds entries that change nothing"
        )

    def cost(level: Level) -> int:
        dense = left(level)
        rooms = (kind.room(x.rows, x.columns, level) for p, x in layers.items() if p not in dense)
        return kind.entry_bytes * sum(rooms) + 4 * sum(layers[path].size for path in dense)

    possible = [level for level in set(needed.values()) if len(left(level)) < len(layers)]
    if not possible:
        raise FishError(f"{kind.name} has no setting at which any of these layers fits: {', '.join(layers)}")
    best = min(sorted(possible), key=cost)
    return best, left(best)


def _with_namesakes(model: nn.Module, whole: list[str], pad: bool) -> list[str]:
    """Add the modules that PEFT takes for those to be stored whole, because their names end alike."""
    more = {
        path: next(other for other in whole if path.endswith(other))
        for path, _ in model.named_modules()
        if path not in whole and path.endswith(tuple(whole))
    }
    if more and not (pad and all(not any(True for _ in model.get_submodule(path).children()) for path in more)):
        listed = "; ".join(f"{path} for {other}" for path, other in more.items())
        raise FishError(f"PEFT would take modules for others, whose names end alike, and store them too: {listed}")
    return [*whole, *more]


def import_peft(folder: Path, base: Weights, *, base_name: str | None = None) -> tuple[str, Delta]:
    """Read an adapter folder of one of the two methods.

    Args:
        folder: The folder, with ``adapter_config.json`` and ``adapter_model.safetensors`` (or a legacy ``.bin``, of
            which only tensors are loaded).
        base: The base, under the names of the model that the adapter was trained on.
        base_name: Where the base comes from; by default what the configuration says.

    Returns:
        The method's name, and the delta.

    Raises:
        FishError: The folder holds another kind of adapter, a file is damaged, or it is not for this base.
    """
    settings = folder / CONFIG_FILE
    with reading(settings):
        config = json.loads(settings.read_text(encoding="utf-8"))
        kinds = {kind.peft_type: name for name, kind in KINDS.items()}
        if (found := config["peft_type"]) not in kinds:
            raise FishError(f"{settings} describes a {found} adapter; expected {' or '.join(kinds)}")
        base_name = base_name or config.get("base_model_name_or_path") or None
    kind = KINDS[kinds[found]]
    file = _tensor_file(folder)
    with reading(file):
        stored = open_weights(file)
        names = {name.removeprefix(_PREFIX): name for name in stored.headers}
        if low_rank := [name for name in names if ".supertuning_lora_" in name]:
            raise FishError(f"{file} has a low-rank part besides ({low_rank[0]}), which changes every entry of a layer")
        layers = [name.removesuffix(f".{kind.values}") for name in names if name.endswith(f".{kind.values}")]
        changes: dict[str, tuple[Tensor, Tensor]] = {}
        for path in layers:
            if (indices := names.get(f"{path}.{kind.indices}")) is None:
                raise FishError(f"{file} has no indices for {path}: it was saved without them; save it with them")
            weight = base.aliases.get(f"{path}.weight", f"{path}.weight")
            if weight not in base.headers or len(base.headers[weight].shape) != 2:
                raise ValueError(f"{base.label} has no matrix {path}.weight")
            rows, columns = base.headers[weight].shape
            flat = kind.flat(stored.read(indices), rows, columns)
            changes[weight] = flat, stored.read(names[f"{path}.{kind.values}"])
        ends = (f".{kind.values}", f".{kind.indices}")
        whole = {name: stored.read(full) for name, full in names.items() if not name.endswith(ends)}
        return kinds[found], assembled(base, changes, whole, base_name=base_name, add=kind.add)


def peft_names(folder: Path) -> list[str]:
    """Return the names of the parameters that an adapter changes; errors as ``import_peft``."""
    ends = tuple(f".{part}" for kind in KINDS.values() for part in (kind.values, kind.indices))
    names = [name.removeprefix(_PREFIX) for name in open_weights(_tensor_file(folder)).headers]
    return list(dict.fromkeys(n.rpartition(".")[0] + ".weight" if n.endswith(ends) else n for n in names))


def _tensor_file(folder: Path) -> Path:
    for name in (ADAPTER_FILE, _LEGACY):
        if (folder / name).is_file():
            return folder / name
    raise FishError(f"{folder} holds neither {ADAPTER_FILE} nor {_LEGACY}; expected the folder of an adapter")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise FishError("writing PEFT's configuration needs peft: pip install 'fishmask[peft]'") from error
    return peft
