"""What every result line says about where it came from."""

import datetime
import platform
from pathlib import Path

import torch

import fishmask


def describe_machine() -> dict[str, object]:
    """Return processor, threads, versions and date, for a line of results."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fishmask": fishmask.__version__,
        "date": datetime.date.today().isoformat(),
    }
