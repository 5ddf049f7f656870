"""Workers for tests: processes with a gloo group that stay, and do what they are told together.

``Team(3).run(function, *arguments)`` calls ``function(rank, size, *arguments)`` on all workers and returns what they
return. Functions are module-level ones of test modules. An error in a worker is raised here.

``in_threads(3, function, *arguments)`` calls ``function(wire, *arguments)`` on threads whose wires go through memory:
quicker, and enough for what needs no processes.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fishmask.wire import Wire

_CONTEXT = multiprocessing.get_context("forkserver")
# torch.optim imports torch._dynamo with its first optimizer, for seconds: once here and not in every worker.
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "fishmask", "tests.team"])
PATIENCE = 60.0  # seconds; more than any job takes


class WorkerFailed(Exception):
    """A worker raised something; its traceback is the text."""


class Team:
    """Worker processes with a process group.

    Args:
        size: Number of workers.
        timeout: Seconds after which a collective gives up.
    """

    def __init__(self, size: int, timeout: float = PATIENCE) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        self._pipes, self.processes = [], []
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_work, args=(rank, size, str(store), timeout, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, size, *arguments)`` on all workers."""
        self.start(function, *arguments)
        results = self.results()
        if failed := [f"worker {rank}: {error}" for rank, (error, _) in enumerate(results) if error]:
            raise WorkerFailed("\n".join(failed))
        return [value for _, value in results]

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call on all workers."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def results(self) -> list[tuple[str, Any]]:
        """Return (traceback or "", result) of every worker; a worker that has died has the traceback "died"."""
        return [self._result(pipe) for pipe in self._pipes]

    def _result(self, pipe: Connection) -> tuple[str, Any]:
        if not pipe.poll(PATIENCE):
            raise TimeoutError("a worker does not answer")
        try:
            return pipe.recv()  # type: ignore[no-any-return]
        except EOFError:
            return "died", None

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a worker."""
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        """End all workers."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def teams_of(sizes: Iterable[int]) -> Iterator[dict[int, Team]]:
    """Yield a team of each size, for a fixture, and close them."""
    made = {size: Team(size) for size in sizes}
    yield made
    for team in made.values():
        team.close()


def _work(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = "", function(rank, size, *arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)


class MemoryWire(Wire):
    """A worker's wire to other threads; what would end a process of a real group is an AssertionError."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.group, self.rank, self.size, self.device = None, rank, len(slots), torch.device("cpu")
        self.bytes, self.seconds = 0, 0.0
        self._slots, self._barrier = slots, barrier

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._meet("gather", tensor))

    def swap(self, tensor: Tensor) -> Tensor:
        assert len(tensor) == self.size
        return torch.stack([rows[self.rank] for rows in self._meet("swap", tensor)])

    def add(self, tensor: Tensor) -> Tensor:
        # In an order that no rank-ordered sum has.
        return torch.stack(self._meet("add", tensor)[::-1]).sum(0)

    def _meet(self, what: str, tensor: Tensor) -> list[Tensor]:
        self._slots[self.rank] = what, tensor.clone()
        self._barrier.wait(PATIENCE / 4)
        met = list(self._slots)
        self._barrier.wait(PATIENCE / 4)
        kinds = {(name, other.shape, other.dtype) for name, other in met}
        assert len(kinds) == 1, f"workers that do different things: {kinds}"
        return [other for _, other in met]


def in_threads(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(wire, *arguments)`` on threads; return what they return, or the error where one is raised."""
    slots: list[Any] = [None] * size
    barrier, outcomes = threading.Barrier(size), list(slots)

    def work(rank: int) -> None:
        try:
            outcomes[rank] = function(MemoryWire(rank, slots, barrier), *arguments)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
