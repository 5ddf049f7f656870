"""Passes of a scoring: groups of parameters whose sums fit in memory together, and what all of them will take."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SUM_BYTES = 4  # of the float32 sum of one entry


def groups(sizes: Mapping[str, int], memory: int | None, first: Sequence[str] = ()) -> list[list[str]]:
    """Divide parameters into as few passes as their sums allow; each takes whole parameters that follow each other.

    Args:
        sizes: Number of entries by name, in the order of the parameters.
        memory: Bytes that the sums of one pass may take; None for one pass.
        first: What to take in the first pass if it fits: an interrupted one goes on with the parameters it had.

    Returns:
        The names of each pass.

    Raises:
        ValueError: A parameter alone has larger sums.
    """
    if memory is None:
        return [list(sizes)] if sizes else []
    most = max(sizes, key=sizes.__getitem__, default=None)
    if most is not None and SUM_BYTES * sizes[most] > memory:
        raise ValueError(
            f"memory={memory:,} bytes is too little: the sums of {most} alone take {SUM_BYTES * sizes[most]:,}; "
            "allow at least that"
        )
    names = list(sizes)
    begun = list(first) == names[: len(first)] and SUM_BYTES * sum(sizes[name] for name in first) <= memory
    result: list[list[str]] = [list(first)] if first and begun else []
    room = 0
    for name in names[len(first) if result else 0 :]:
        needed = SUM_BYTES * sizes[name]
        if needed > room:
            result.append([])
            room = memory
        result[-1].append(name)
        room -= needed
    return result


@dataclass(frozen=True)
class ScoringPlan:
    """What a scoring will take.

    Attributes:
        model: The model's class.
        device: Where the model is.
        dtype: The dtype of most of its weights.
        entries: How many entries are scored.
        done: How many of them are scored already, in the folder of an interrupted scoring.
        examples: How many examples each pass takes.
        batches: In how many batches.
        passes: For each pass the number of parameters.
        weights_bytes: Parameters and buffers. Those of a checkpoint on disk are mapped where nothing has moved them.
        sums_bytes: The sums of the largest pass.
        sums_place: Where these are: the model's device, or "cpu".
        working_bytes: Activations of the largest batch, what is computed from them, and scratch for one layer.
        scores_bytes: All scores, where they are kept: in memory, or on disk where there is a folder.
        on_disk: Whether there is a folder.
        free_bytes: What is free on the device now; None where that is not known.
        seconds: How long the passes will take.
    """

    model: str
    device: str
    dtype: str
    entries: int
    done: int
    examples: int
    batches: int
    passes: tuple[int, ...]
    weights_bytes: int
    sums_bytes: int
    sums_place: str
    working_bytes: int
    scores_bytes: int
    on_disk: bool
    free_bytes: int | None
    seconds: float

    @property
    def device_bytes(self) -> int:
        """What the model's device needs in all: weights, working memory, and sums and scores if there."""
        here = self.device == "cpu"
        sums = self.sums_bytes if here or self.sums_place == "device" else 0
        # One pass on the device leaves its sums as the scores; after several they are in the CPU's memory.
        kept = self.scores_bytes if here and len(self.passes) > 1 and not self.on_disk else 0
        return self.weights_bytes + sums + kept + self.working_bytes

    def facts(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {**asdict(self), "device_bytes": self.device_bytes}

    def __str__(self) -> str:
        place = "the CPU's memory" if "cpu" in (self.device, self.sums_place) else f"memory of {self.device}"
        kept = "on disk" if self.on_disk else "in memory"
        lines = {
            "model": f"{self.model}, {self.entries:,} entries, {self.dtype}, on {self.device}",
            "done already": f"{self.done:,} entries" if self.done else "",
            "passes": f"{len(self.passes)}, each over {self.examples:,} examples in {self.batches:,} batches",
            "weights": f"{_size(self.weights_bytes)} (mapped where they come from a file)"
            if self.device == "cpu"
            else _size(self.weights_bytes),
            "sums": f"{_size(self.sums_bytes)} at once, float32, in {place}",
            "working memory": f"{_size(self.working_bytes)} (the largest batch and its scratch)",
            "in all": _size(self.device_bytes)
            + (f" on {self.device}; {_size(self.free_bytes)} are free" if self.free_bytes is not None else ""),
            "scores": f"{_size(self.scores_bytes)} {kept}",
            "time": duration(self.seconds),
        }
        return "\n".join(f"{name:<16}{text}" for name, text in lines.items() if text)


def duration(seconds: float) -> str:
    """Write a time for people: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    available = next((line for line in info.read_text().splitlines() if line.startswith("MemAvailable")), None)
    return None if available is None else int(available.split()[1]) * 1024


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared memory once."""
    return sum({_key(t): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}.values())


class Footprint(TorchDispatchMode):
    """Counts the bytes of all tensors made within it, on every device, and keeps the most at one time.

    Attributes:
        peak: The most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call, and count the memory that it takes."""
        result = func(*args, **(kwargs or {}))
        given = {_key(t) for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if (key := _key(tensor)) not in given and key not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._now -= count


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    """Return what tells one storage from another while both are there."""
    return int(tensor.untyped_storage()._cdata)
