"""What the steps of a plan cost on a device: built-in figures, or those that the user has measured and stored.

Plans are chosen by these figures, and two ways to one product round differently. So the figures change only by an
explicit act: nothing is measured, and no file written, unless `fishmask costs --calibrate` or `store` is called.
"""

import json
import math
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fishmask.measure import environment
from fishmask.publish import make_folder, replace_file

_FORMAT = "fishmask costs"
_VERSION = 1
# Which device's figures serve where nothing is computed at all.
_planned_for: ContextVar[str] = ContextVar("planned_for", default="cpu")


@dataclass(frozen=True)
class Costs:
    """The cost of each step in nanoseconds per token. Only the ratios between them matter.

    Attributes:
        multiply: One multiply-add of a dense product.
        read: Reading one column of an operand of a dense product.
        gather: Copying one used column.
        skip: Passing one column while copying, used or not.
        part: Starting one part of a plan; shared by the 1,024 tokens of a middling batch.
        transpose: Bringing one column into the row-major layout of a sampled product. None: no sampled products here.
        sampled: One multiply-add of a sampled product. None: no sampled products here.
        scatter: Adding one used column to its place.
        spread: Bringing one column into the layout of a CSR product, and back.
        nonzero: One multiply-add of a CSR product.
        tile: One multiply-add of the Triton kernel for masked gradients. None: never measured here, so not used.
        square: One multiply-add of a per-example product that is squared and added by PyTorch. None: never measured.
        grouped: The same by the Triton kernel. None: never measured here, so not used.
    """

    multiply: float
    read: float
    gather: float
    skip: float
    part: float
    scatter: float
    spread: float
    nonzero: float
    transpose: float | None = None
    sampled: float | None = None
    tile: float | None = None
    square: float | None = None
    grouped: float | None = None

    def product(self, rows: Any, columns: Any) -> Any:
        """Return the cost of a dense product of so many rows and columns; numbers or arrays."""
        return self.read * (rows + columns) + self.multiply * rows * columns

    def copy(self, used: Any, size: Any) -> Any:
        """Return the cost of copying the used columns of an operand of so many; numbers or arrays."""
        return self.gather * used + self.skip * size


# Measured on one core with AVX-512 (Xeon, 2.5 GHz), 256 to 2,048 tokens, float32.
CPU = Costs(
    multiply=0.0115, read=0.14, gather=0.35, skip=0.05, part=20.0, transpose=0.65, sampled=0.15,
    scatter=4.0, spread=3.0, nonzero=0.05,
)  # fmt: skip
# Reckoned, not measured: 60 % of an H100's 989 TFLOP/s in bfloat16, 80 % of its 3.35 TB/s. A column that is copied
# alone costs a sector of 32 bytes, and a part five launches of 5 µs.
GPU = Costs(
    multiply=3.4e-6, read=7.5e-4, gather=0.0127, skip=0.0, part=24.0, scatter=0.025, spread=0.003, nonzero=0.002
)

_OPTIONAL = {field.name for field in fields(Costs) if field.default is None}


def built_in(device: torch.device) -> Costs:
    """Return the built-in figures for a kind of device: those of a CPU, or for all others those of a GPU."""
    return CPU if device.type == "cpu" else GPU


def costs_for(device: torch.device | str) -> Costs:
    """Return the figures by which plans on a device are chosen.

    Args:
        device: The device. For "meta", where nothing is computed, the figures are those of the device that
            `planned_for` names, by default the CPU's.

    Returns:
        What the user has stored for this very device, version of PyTorch and number of threads; else what is built in.
    """
    device = stood_for(torch.device(device))
    if device.type == "cuda" and not torch.cuda.is_available():  # a plan for a machine that is elsewhere
        return GPU
    try:
        path = path_for(device)
    except FileNotFoundError:  # a user without a home has stored nothing
        return built_in(device)
    return _stored(path, *_key(device).items()) or built_in(device)


def stood_for(device: torch.device) -> torch.device:
    """Return the device itself, or for "meta" the one that it stands for."""
    return torch.device(_planned_for.get()) if device.type == "meta" else device


@contextmanager
def planned_for(device: torch.device | str) -> Iterator[None]:
    """Choose plans of weights on the meta device as they would be chosen on another device.

    Args:
        device: The device that a model on "meta" stands for; it need not be there.
    """
    token = _planned_for.set(str(device))
    try:
        yield
    finally:
        _planned_for.reset(token)


def store(costs: Costs, device: torch.device | str) -> Path:
    """Have plans on this device be chosen by these figures from now on, in every process of this user.

    Args:
        costs: The figures, as `fishmask.calibrate.calibrate` measures them.
        device: The device that they were measured on.

    Returns:
        The file that was written, in the user's cache folder.

    Raises:
        OSError: The file cannot be written.
    """
    device = torch.device(device)
    path = path_for(device)
    make_folder(path.parent)
    record = {"format": _FORMAT, "version": _VERSION, **_key(device), "costs": asdict(costs)}
    replace_file(path, [json.dumps(record, indent=1).encode()])
    _stored.cache_clear()
    return path


def forget(device: torch.device | str) -> bool:
    """Remove what is stored for a device, so that the built-in figures count again.

    Returns:
        Whether there was anything.

    Raises:
        OSError: The file cannot be removed.
    """
    path = path_for(torch.device(device))
    _stored.cache_clear()
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def path_for(device: torch.device) -> Path:
    """Return the file for a device: ``$XDG_CACHE_HOME/fishmask/costs/DEVICE.json``, by default in ``~/.cache``.

    Raises:
        FileNotFoundError: The user has no home folder, and the variable names no other.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:  # no HOME, and no such user, as in some containers
        raise FileNotFoundError("there is no home folder: set XDG_CACHE_HOME to a folder to keep costs in") from error
    name = "-".join(str(part) for part in _key(device).values())
    return folder / "fishmask" / "costs" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def _key(device: torch.device) -> dict[str, Any]:
    """Return what figures are true for: the device by its name, the version of PyTorch, the number of threads."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return {"device": _name(device.type, device.index), "torch": torch.__version__, "threads": threads}


@cache
def _name(kind: str, index: int | None) -> str:
    if kind == "cpu":
        return str(environment()["processor"])
    return torch.cuda.get_device_name(index) if kind == "cuda" else f"{kind} {platform.machine()}"


@cache
def _stored(path: Path, *key: tuple[str, Any]) -> Costs | None:
    """Read a file of costs; one that is damaged or measured on something else is ignored with one warning."""
    try:
        return _read(path, {"format": _FORMAT, "version": _VERSION, **dict(key)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the costs stored in {path} are ignored: {error}. Measure again with `fishmask costs --calibrate`, or "
            "remove them with `fishmask costs --forget`",
            UserWarning,
            stacklevel=3,
        )
        return None


def _read(path: Path, wanted: dict[str, Any]) -> Costs:
    record = json.loads(path.read_text(encoding="utf-8"))
    found = {name: record.get(name) for name in wanted} if isinstance(record, dict) else record
    if found != wanted:
        raise ValueError(f"expected {wanted}, but it says {found}")
    names = [field.name for field in fields(Costs)]
    costs = record.get("costs")
    if not isinstance(costs, dict) or not all(_valid(costs, name) for name in names):
        raise ValueError(f"expected a number of at least 0 for each of {', '.join(names)}, but it says {costs}")
    return Costs(**{name: costs[name] for name in names})


def _valid(costs: dict[str, Any], name: str) -> bool:
    value = costs.get(name, math.nan)
    if value is None:
        return name in _OPTIONAL
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
