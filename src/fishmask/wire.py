"""The collectives of one process group, dense ones only, with the bytes and seconds they took counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from fishmask.errors import RoundError


class Wire:
    """The workers of a process group as seen by one of them; without a group there is one worker and no traffic.

    Tensors go in and come out on any device; they travel on the CPU, or on the current GPU where the group is NCCL's.

    Args:
        group: The group; by default that of all workers, if ``torch.distributed`` is initialized.

    Attributes:
        rank: Number of this worker in the group.
        size: Number of workers.
        device: Where tensors travel.
        bytes: Payload that this worker has sent since the counters were last read.
        seconds: Time it has spent in collectives since then.

    Raises:
        ValueError: This process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        self.bytes, self.seconds = 0, 0.0
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("this process is not in the group: only its members exchange")
            backend = dist.get_backend(group)  # "nccl", or "cpu:gloo,cuda:nccl", which moves both
            if "nccl" in backend and "gloo" not in backend:
                self.device = torch.device("cuda", torch.cuda.current_device())

    def apart(self) -> "Wire":
        """Return a wire of the same workers with a group of its own, to exchange while others use this one.

        All workers must call it. Collectives that two threads begin on one group would mix.
        """
        if self.size == 1:
            return self
        present = self.group or dist.group.WORLD
        assert present is not None
        timeout = present._get_backend(self.device).options._timeout  # a new group would wait for half an hour
        ranks = dist.get_process_group_ranks(present)
        return Wire(dist.new_group(ranks, timeout=timeout, use_local_synchronization=True))

    def read_counters(self) -> tuple[int, float]:
        """Return (bytes, seconds) since the last call, and start again from zero."""
        counted = self.bytes, self.seconds
        self.bytes, self.seconds = 0, 0.0
        return counted

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all workers, of one shape and dtype, stacked in the order of their ranks."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        sent = tensor.to(self.device).contiguous()
        received = torch.empty(self.size * sent.numel(), dtype=sent.dtype, device=self.device)
        with self._counted((self.size - 1) * sent.nbytes):
            _wait(dist.all_gather_single(received, sent.view(-1), group=self.group, async_op=True))
        return received.view(self.size, *tensor.shape).to(tensor.device)

    def swap(self, tensor: Tensor) -> Tensor:
        """Send row w of ``tensor`` [workers, ...] to worker w; return the rows that came, in the order of the ranks."""
        if self.size == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        received = torch.empty_like(sent)
        with self._counted((self.size - 1) * sent.nbytes // self.size):
            _wait(dist.all_to_all_single(received.view(-1), sent.view(-1), group=self.group, async_op=True))
        return received.to(tensor.device)

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over all workers, in an order of the backend's choice; equal bits on all of them."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True).contiguous()
        with self._counted(2 * (self.size - 1) * total.nbytes // self.size):
            _wait(dist.all_reduce(total, group=self.group, async_op=True))
        return total.to(tensor.device)

    def spread(self, tensor: Tensor, rank: int) -> None:
        """Fill ``tensor``, which lies where tensors travel, with that of one worker."""
        if self.size > 1:
            with self._counted((self.size - 1) * tensor.nbytes if self.rank == rank else 0):
                _wait(dist.broadcast(tensor, group_src=rank, group=self.group, async_op=True))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes of all workers, of any lengths, in the order of their ranks."""
        if self.size == 1:
            return [data]
        lengths = self.gather(torch.tensor([len(data)], dtype=torch.int64)).view(-1).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.gather(padded)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    @contextmanager
    def _counted(self, sent: int) -> Iterator[None]:
        begin = perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's own errors have no other type
            raise RoundError(
                f"the connection between the workers broke off: {error}. The process group cannot be used any more: "
                "start the workers again (torchrun --max-restarts does) and go on from the checkpoint log"
            ) from error
        self.bytes += sent
        self.seconds += perf_counter() - begin


_last: list[dist.Work] = []


def _wait(work: dist.Work) -> None:
    """Wait for a collective, and keep its last reference in a thread of Python's until the next one.

    Otherwise a thread of gloo may be the one that frees the tensors, and if the interpreter is being shut down by then,
    PyTorch aborts the process: a script that has done all its work ends with SIGABRT.
    """
    work.wait()
    _last[:] = [work]
