"""A ledger of memory: the bytes behind every tensor that code makes, from their birth to their end."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override


class Ledger(TorchDispatchMode):
    """While it is entered, notes the birth and the end of every block of memory behind tensors.

    It works for tensors with data and for tensors on the meta device, which have sizes and no data. What a kernel takes
    and gives back before it returns is not seen, nor what an allocator rounds up beyond ``granule``.

    Args:
        granule: The size of a block counts as a multiple of so many bytes.
        host: Whether meta tensors stand for tensors in the host's memory: then tensors on the CPU count too, and a copy
            from there to the meta device is none. Without it only meta tensors count.
    """

    def __init__(self, *, granule: int = 1, host: bool = True) -> None:
        super().__init__()
        self._granule, self._host = granule, host
        self._phase = ""
        self._starts: dict[str, int] = {}  # phase -> how many events were before it
        self._sizes: list[int] = []  # of blocks, by number
        self._born: list[str] = []  # the phase each was born in
        self._roles: dict[int, str] = {}  # what each is for
        self._holders: dict[int, int] = {}  # number of a block -> how many storages stand for it
        self._storages: dict[int, tuple[int, weakref.ref[Any]]] = {}  # id -> the block
        self._events: list[tuple[int, int]] = []  # number of a block; 1 for its birth, -1 for its end

    def begin(self, phase: str) -> None:
        """Begin a phase: blocks are known by the one that they were born in."""
        self._phase = phase
        self._starts[phase] = len(self._events)

    def hold(self, tensors: Iterable[Tensor], role: str) -> None:
        """Say what these tensors are for, noting those that were there before."""
        for part in (part for tensor in tensors for part in _dense_parts(tensor)):
            if self._host or part.is_meta:
                self._roles[self._note(part)] = role

    def keep(self, role: str) -> None:
        """Say what all blocks are for that were born in this phase, are alive and have no role yet."""
        for number in self._holders:
            if self._born[number] == self._phase:
                self._roles.setdefault(number, role)

    def parts(self, rest: str, since: str = "") -> tuple[dict[str, int], dict[str, int]]:
        """Replay what was noted, and sum it up by role.

        Args:
            rest: The role of blocks without one.
            since: The phase that the replay looks at first.

        Returns:
            The most bytes that each role had, and the bytes that each had when the sum of all was largest.
        """
        now: dict[str, int] = {}
        most: dict[str, int] = {}
        at_peak: dict[str, int] = {}
        total = peak = 0
        for place, (number, sign) in enumerate(self._events):
            role, size = self._roles.get(number, rest), sign * self._sizes[number]
            now[role] = now.get(role, 0) + size
            total += size
            if place < self._starts.get(since, 0):
                most = dict(now)
                peak, at_peak = total, dict(now)
                continue
            most[role] = max(most.get(role, 0), now[role])
            if total > peak:
                peak, at_peak = total, dict(now)
        return most, at_peak

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._host and func is torch.ops.aten._to_copy.default and _to_meta(args[0], result):
            self._note(result, as_block=self._note(args[0]))
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (self._host or leaf.is_meta):
                for part in _dense_parts(leaf):
                    self._note(part)
        return result

    def _note(self, tensor: Tensor, as_block: int | None = None) -> int:
        """Return the number of the block behind a tensor, a new one where it is not noted yet."""
        storage = tensor.untyped_storage()
        place = id(storage)
        if place in self._storages:
            return self._storages[place][0]
        number = len(self._sizes) if as_block is None else as_block
        if as_block is None:
            self._sizes.append(-(-storage.nbytes() // self._granule) * self._granule)
            self._born.append(self._phase)
            self._holders[number] = 0
            self._events.append((number, 1))

        def end(_: Any) -> None:
            del self._storages[place]
            self._holders[number] -= 1
            if not self._holders[number]:
                del self._holders[number]
                self._events.append((number, -1))

        self._holders[number] += 1
        self._storages[place] = number, weakref.ref(storage, end)
        return number


def _to_meta(source: Tensor, result: Tensor) -> bool:
    """Whether one tensor is the other on the meta device."""
    return result.is_meta and not source.is_meta and source.dtype == result.dtype


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a sparse one consists of, or the tensor itself."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]
