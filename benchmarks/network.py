"""Workers that each have a network namespace of their own, joined by a bridge with cables of a chosen rate.

What a worker sends is counted by its own interface, and only the exchange is on it: commands come through pipes, and
the store of the process group is a file. Namespaces need root (`unshare -rn` gives it to anyone, for one command)
and Linux with bridges; without them the workers share the loopback interface as it is, whose counters count for all
of them together.
"""

import ctypes
import multiprocessing
import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_BRIDGE, _NETWORK, _OWN, _LOOPBACK = "bridge0", "10.77.0", "eth0", "lo"
_PATIENCE = timedelta(minutes=30)  # of a collective: some take minutes at a low rate
_QUIET = 0.1  # seconds after which acknowledgements have been sent: Linux holds them back for 0.04


class Link(NamedTuple):
    """What each worker's cable is like, in both directions.

    Attributes:
        rate: Mbit/s, or None for as fast as the machine is.
        mtu: Largest packet in bytes: 1500 on Ethernet, 65,535 about that of a loopback interface.
    """

    rate: int | None
    mtu: int


class Sent(NamedTuple):
    """What an interface has sent, headers of Ethernet, IP and TCP and the acknowledgements included."""

    bytes: float
    packets: float

    def since(self, other: "Sent") -> "Sent":
        """Return what was sent after ``other`` was read."""
        return Sent(self.bytes - other.bytes, self.packets - other.packets)


@dataclass
class Worker:
    """One worker process as it sees itself.

    Attributes:
        rank: Number of it.
        size: Number of workers.
        apart: Whether it has an interface of its own.
        kept: What functions leave for the next one.
    """

    rank: int
    size: int
    apart: bool
    kept: Any = None

    def sent(self) -> Sent:
        """Read the counters of the interface."""
        name = _OWN if self.apart else _LOOPBACK
        line = next(s for s in Path("/proc/self/net/dev").read_text().splitlines() if s.strip().startswith(f"{name}:"))
        counters = line.partition(":")[2].split()
        return Sent(int(counters[8]), int(counters[9]))


def able() -> bool:
    """Tell whether this machine lets this user make namespaces, a bridge, and cables with a rate."""
    trial = (
        f"ip link add {_BRIDGE} type bridge && ip link add w0 type veth peer name w1 && ip link set w0 master {_BRIDGE}"
        " && tc qdisc add dev w0 root tbf rate 10mbit burst 16kb latency 400ms"
    )
    try:
        return subprocess.run(["unshare", "--net", "sh", "-c", trial], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def isolate() -> None:
    """Move this thread, and what it starts, into a network namespace of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise OSError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    for scope in ("all", "default"):  # its neighbour discovery would be counted
        path = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        if path.exists():
            path.write_text("1")


def command(text: str, *, may_fail: bool = False) -> None:
    """Run a command of iproute2."""
    done = subprocess.run(text.split(), capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise OSError(f"{text}: {done.stderr.strip()}")


class Workers:
    """Processes with a gloo group, which do together what they are told.

    Args:
        size: Number of workers.
        apart: Give each a network namespace and a cable; this process must be in one too (``isolate``).
        preload: Modules to import once for all of them.
    """

    def __init__(self, size: int, *, apart: bool, preload: list[str]) -> None:
        self.size, self.apart = size, apart
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, self.apart, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self.all(_begin)
        if self.apart:
            self._connect()
        self.all(_join, str(Path(self._folder.name) / "store"))

    def all(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(worker, *arguments)`` on all workers; return what they return, in the order of the ranks."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.size:  # not in their order: when one fails, the others wait for it
            for pipe in wait([p for rank, p in enumerate(self._pipes) if rank not in answers]):
                rank = self._pipes.index(pipe)
                try:
                    error, answers[rank] = pipe.recv()
                except EOFError:
                    error = "died"
                if error:
                    raise SystemExit(f"worker {rank}: {error}")
        return [answers[rank] for rank in range(self.size)]

    def sent(self) -> list[Sent]:
        """Read what each worker has sent, once all is quiet; on a shared interface, its equal share of the sum."""
        time.sleep(_QUIET)
        counters = self.all(Worker.sent)
        if self.apart:
            return counters
        return [Sent(counters[0].bytes / self.size, counters[0].packets / self.size)] * self.size

    def connect(self, link: Link) -> None:
        """Give all cables a rate and packets a size."""
        for rank in range(self.size):
            _shape(f"w{rank}", link)
        self.all(_shape_own, link)

    def _connect(self) -> None:
        command(f"ip link add {_BRIDGE} type bridge")
        command(f"ip link set {_BRIDGE} up")
        for rank, process in enumerate(self._processes):
            command(f"ip link add w{rank} type veth peer name {_OWN} netns {process.pid}")
            command(f"ip link set w{rank} master {_BRIDGE} up mtu 65535 gso_max_segs 1")
        self.all(_address)

    def close(self) -> None:
        """End all workers; their namespaces and cables go with them."""
        for process in self._processes:
            process.kill()  # nothing of theirs is kept, and one that waits for another would never end
            process.join()
        if self.apart:
            command(f"ip link del {_BRIDGE}")
        self._folder.cleanup()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --- in a worker ------------------------------------------------------------------------------------------------------


def _work(rank: int, size: int, apart: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    worker = Worker(rank, size, apart)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = "", function(worker, *arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)


def _begin(worker: Worker) -> None:
    if worker.apart:
        isolate()


def _address(worker: Worker) -> None:
    command(f"ip addr add {_NETWORK}.{worker.rank + 1}/24 dev {_OWN}")
    # One packet is one segment: with offloading, the counters would count the headers of many as one.
    command(f"ip link set {_OWN} up mtu 65535 gso_max_segs 1")


def _join(worker: Worker, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = _OWN if worker.apart else _LOOPBACK
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=worker.rank, world_size=worker.size, timeout=_PATIENCE
    )
    dist.barrier()


def _shape_own(worker: Worker, link: Link) -> None:
    _shape(_OWN, link)


def _shape(device: str, link: Link) -> None:
    command(f"ip link set {device} mtu {link.mtu}")
    command(f"tc qdisc del dev {device} root", may_fail=True)  # there is none at first
    if link.rate is not None:
        # A burst of ten packets, so that short exchanges are held to the rate too.
        command(f"tc qdisc add dev {device} root tbf rate {link.rate}mbit burst 16kb latency 400ms")
