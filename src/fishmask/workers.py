"""Work in fresh processes, with its progress reported to the one that started them.

A process of its own keeps the peak memory of a run its own, and takes nothing else down when it dies. It does not
outlive the one that started it: its standard input is a pipe from there, and :func:`end_with_starter` watches that.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryFile
from threading import Thread
from typing import Any

from fishmask.errors import FishError
from fishmask.loop import Progress

_RUNNING: set[subprocess.Popen[str]] = set()


def run_worker(module: str, arguments: Sequence[str], *, title: str, threads: int, progress: Progress) -> Any:
    """Run ``python -m module`` and return the result that it tells.

    Args:
        module: A module whose main part tells its progress by :func:`tell` and its result by :func:`tell_result`.
        arguments: Its command-line arguments.
        title: What errors call it.
        threads: Threads it may compute with.
        progress: Called with its progress.

    Raises:
        FishError: It failed; the message ends with the signal that killed it or the last line of its stderr.
    """
    # Threads that spin while they wait make a machine with other work on it many times slower.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", module, *arguments]
    found: list[Any] = []
    pipe = subprocess.PIPE
    with TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment) as process:
            _RUNNING.add(process)
            try:
                for line in process.stdout or ():
                    # One that is killed may leave half a line.
                    whole = line.startswith('{"fishmask": ') and line.endswith("\n")
                    message = json.loads(line) if whole else {}
                    if message.get("fishmask") == "progress":
                        progress(message["phase"], message["done"], message["total"])
                    elif message.get("fishmask") == "result":
                        found.append(message["result"])
            except BaseException:  # an interrupt here must not leave the worker computing for nobody
                process.terminate()
                raise
            finally:
                process.wait()
                _RUNNING.discard(process)
        errors.seek(0)
        reason = _reason(process.returncode, errors.read())
    if process.returncode or not found:
        raise FishError(f"the process for {title!r} failed: {reason}")
    return found[-1]


def _reason(code: int, errors: str) -> str:
    """Say why a process ended: by which signal, or the last line of its stderr."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"it was ended by {name}" + (", perhaps because the memory ran out" if name == "SIGKILL" else "")
    return (errors.strip().splitlines() or [f"exit code {code}"])[-1]


def stop_workers() -> None:
    """End all workers of this process; :func:`run_worker` then fails where it waits for one."""
    for process in list(_RUNNING):
        process.terminate()


def end_with_starter() -> None:
    """End this worker as soon as the process that started it is gone, however that ended."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def tell(phase: str, done: int, total: int) -> None:
    """Report progress, as a worker."""
    print(json.dumps({"fishmask": "progress", "phase": phase, "done": done, "total": total}), flush=True)


def tell_result(result: Any) -> None:
    """Report the result, as a worker; anything that JSON can write."""
    print(json.dumps({"fishmask": "result", "result": result}), flush=True)
