"""How good predictions are, and how much memory a process has taken."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def quality(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Compare the outputs of a model with the targets.

    Args:
        outputs: ``[examples, classes]`` logits, or ``[examples, 1]`` for regression.
        targets: ``[examples]``; whole numbers mean classes, floats mean regression.

    Returns:
        ``accuracy``, ``f1`` (of class 1 when there are two classes, else the mean over the classes) and ``mcc``
        (Matthews correlation); or ``pearson`` and ``spearman`` (0 when one side is constant) and ``mse``.
    """
    if targets.is_floating_point():
        predicted, wanted = _numpy(outputs).reshape(-1), _numpy(targets)
        return {
            "pearson": _correlation(predicted, wanted),
            "spearman": _correlation(_ranks(predicted), _ranks(wanted)),
            "mse": float(np.mean((predicted - wanted) ** 2)),
        }
    classes = outputs.shape[1]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (targets.numpy(), outputs.argmax(dim=1).cpu().numpy()), 1)
    return {
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "f1": _f1(confusion),
        "mcc": _matthews(confusion),
    }


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().to("cpu", torch.float64).numpy()


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    """Return the rank of each value, equal values sharing the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: Floats = (last - (counts - 1) / 2)[group]
    return shared


def _f1(confusion: Floats) -> float:
    hits = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return float(f1[1] if len(f1) == 2 else f1.mean())


def _matthews(confusion: Floats) -> float:
    true, predicted, count = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = float(np.trace(confusion) * count - true @ predicted)
    norm = float(np.sqrt((count**2 - predicted @ predicted) * (count**2 - true @ true)))
    return covariance / norm if norm > 0 else 0.0


def environment() -> dict[str, Any]:
    """Return when, with what versions and on what kind of machine a measurement was taken."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "fishmask") if find_spec(name)},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the parent's peak too: Linux carries it over when a process is started.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # absent on Windows, where the peak is not measured

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
