"""Work in fresh processes, with its progress reported to the one that started them.

A process of its own keeps the peak memory of a run its own, and takes nothing else down when it dies.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import Any

from fishmask.errors import FishError
from fishmask.loop import Progress


def run_worker(module: str, arguments: Sequence[str], *, title: str, threads: int, progress: Progress) -> Any:
    """Run ``python -m module`` and return the result that it tells.

    Args:
        module: A module whose main part tells its progress by :func:`tell` and its result by :func:`tell_result`.
        arguments: Its command-line arguments.
        title: What errors call it.
        threads: Threads it may compute with.
        progress: Called with its progress.

    Raises:
        FishError: It failed; the message ends with the last line of its stderr.
    """
    # Threads that spin while they wait make a machine with other work on it many times slower.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", module, *arguments]
    found: list[Any] = []
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            try:
                for line in process.stdout or ():
                    message = json.loads(line) if line.startswith('{"fishmask": ') else {}
                    if message.get("fishmask") == "progress":
                        progress(message["phase"], message["done"], message["total"])
                    elif message.get("fishmask") == "result":
                        found.append(message["result"])
            except BaseException:  # an interrupt here must not leave the worker computing for nobody
                process.terminate()
                raise
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    if process.returncode or not found:
        raise FishError(f"the process for {title!r} failed: {last}")
    return found[-1]


def tell(phase: str, done: int, total: int) -> None:
    """Report progress, as a worker."""
    print(json.dumps({"fishmask": "progress", "phase": phase, "done": done, "total": total}), flush=True)


def tell_result(result: Any) -> None:
    """Report the result, as a worker; anything that JSON can write."""
    print(json.dumps({"fishmask": "result", "result": result}), flush=True)
