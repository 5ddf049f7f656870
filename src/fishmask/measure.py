"""How good predictions are, and how much memory a process has taken."""

import math
import os
import platform
import sys
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishmask.errors import FishError


def quality(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Compare the outputs of a model with the targets, by the metrics of scikit-learn and SciPy.

    Args:
        outputs: ``[examples, classes]`` logits, or ``[examples, 1]`` for regression.
        targets: ``[examples]``; whole numbers mean classes, floats mean regression.

    Returns:
        ``accuracy``, ``f1`` (of class 1 when there are two classes, else the mean over the classes) and ``mcc``
        (Matthews correlation); or ``pearson`` and ``spearman`` and ``mse``. What is not defined, such as a correlation
        with constant predictions, is 0.

    Raises:
        FishError: scikit-learn is not installed.
    """
    try:
        # Not at the top of the file: a second to load, and only training and prediction with labels need it.
        from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError as error:
        raise FishError("metrics need scikit-learn: pip install 'fishmask[hf]'") from error
    wanted = targets.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # one side is constant
        warnings.filterwarnings("ignore", "A single label was found")  # one class only, and nothing else predicted
        if targets.is_floating_point():
            predicted = outputs.detach().reshape(-1).to("cpu", torch.float64).numpy()
            return {
                "pearson": _defined(pearsonr(predicted, wanted).statistic) if len(wanted) > 1 else 0.0,
                "spearman": _defined(spearmanr(predicted, wanted).statistic) if len(wanted) > 1 else 0.0,
                "mse": float(((predicted - wanted) ** 2).mean()),
            }
        classes, chosen = outputs.shape[1], outputs.argmax(dim=1).cpu().numpy()
        counted = [1] if classes == 2 else list(range(classes))
        return {
            "accuracy": float(accuracy_score(wanted, chosen)),
            "f1": float(f1_score(wanted, chosen, labels=counted, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(wanted, chosen)),
        }


def _defined(correlation: float) -> float:
    return float(correlation) if math.isfinite(correlation) else 0.0


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


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Return the most memory that this process has had resident so far, or its tensors on a GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the parent's peak too: Linux carries it over when a process is started.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # absent on Windows, where the peak is not measured

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
