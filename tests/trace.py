"""A folder whose every change is written down, can be made to fail, and is rebuilt as a loss of power may leave it.

The model is that of ALICE (Pillai et al., OSDI 2014) at its least kind: bytes that no fsync of their file covers may be
missing, torn or zero; changes of names that no fsync of their folder covers may have happened or not, each by itself.
"""

import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BLOCK = 512  # bytes that a disk writes whole or not at all
NAMING = ("create", "link", "rename", "unlink", "mkdir")
KINDS = (*NAMING, "write", "fsync", "sync")  # sync is the fsync of a folder

State = dict[str, bytes | None]  # path -> content; None is a folder


class Killed(BaseException):
    """The process is gone: nothing that it still does has an effect."""


class Operation(NamedTuple):
    """One of KINDS, or a mark."""

    kind: str
    path: str = ""
    inode: int = 0
    data: Any = None  # the bytes of a write, the old path of a rename, what a mark says


class Disk:
    """Writes down what is done below a folder through ``os``; nothing is really synced.

    ``before`` is called with kind and path before each operation; what it raises comes in the operation's place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trace: list[Operation] = []
        self.before: Callable[[str, str], None] = lambda kind, path: None
        self._inodes: dict[str, int] = {}
        self._handles: dict[int, tuple[str, int]] = {}
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()

    def install(self, patch: pytest.MonkeyPatch) -> "Disk":
        """Watch from now on."""
        for name in ("open", "write", "fsync", "close", "link", "rename", "replace", "unlink", "mkdir"):
            patch.setattr(os, name, partial(getattr(self, f"on_{name}"), getattr(os, name)))
        return self

    def mark(self, kind: str, data: Any = None) -> None:
        self.trace.append(Operation(kind, data=data))

    def path_of(self, handle: int) -> str:
        return self._handles.get(handle, ("", 0))[0]

    def _below(self, path: Any) -> str | None:
        """Return the path relative to the root, None when it is elsewhere."""
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if text == str(self.root):
            return "."
        return text.removeprefix(f"{self.root}/") if text.startswith(f"{self.root}/") else None

    def _do(self, kind: str, path: str, act: Callable[[], Any], inode: int = 0, data: Any = None) -> Any:
        with self._turn:
            self.before(kind, path)
            result = act()
            self.trace.append(Operation(kind, path, inode, data[:result] if kind == "write" else data))
            return result

    def on_open(self, real: Callable[..., int], path: Any, flags: int, *rest: Any, **options: Any) -> int:
        below = self._below(path)
        if below is None:
            handle = real(path, flags, *rest, **options)
            self._handles.pop(handle, None)  # of a file that was closed unseen
            return handle
        if flags & os.O_CREAT and not os.path.lexists(path):
            self._inodes[below] = next(self._numbers)
            handle = self._do("create", below, partial(real, path, flags, *rest, **options), self._inodes[below])
        else:
            handle = real(path, flags, *rest, **options)
        self._handles[handle] = (below, self._inodes.get(below, 0))
        return handle

    def on_write(self, real: Callable[..., int], handle: int, data: Any) -> int:
        if handle not in self._handles:
            return real(handle, data)
        path, inode = self._handles[handle]
        return self._do("write", path, partial(real, handle, data), inode, bytes(data))

    def on_fsync(self, real: Callable[..., None], handle: int) -> None:
        if handle not in self._handles:
            return real(handle)
        path, inode = self._handles[handle]
        kind = "sync" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync"
        return self._do(kind, path, lambda: None, inode)

    def on_close(self, real: Callable[..., None], handle: int) -> None:
        self._handles.pop(handle, None)
        real(handle)

    def on_link(self, real: Callable[..., None], source: Any, path: Any, **options: Any) -> None:
        old, new = self._below(source), self._below(path)
        if old is None or new is None:
            return real(source, path, **options)
        self._do("link", new, partial(real, source, path, **options), self._inodes[old])
        self._inodes[new] = self._inodes[old]
        return None

    def on_rename(self, real: Callable[..., None], source: Any, path: Any, **options: Any) -> None:
        old, new = self._below(source), self._below(path)
        if old is None or new is None:
            return real(source, path, **options)
        self._do("rename", new, partial(real, source, path, **options), self._inodes[old], old)
        self._inodes[new] = self._inodes.pop(old)
        return None

    on_replace = on_rename

    def on_unlink(self, real: Callable[..., None], path: Any, **options: Any) -> None:
        below = self._below(path)
        act = partial(real, path, **options)
        return act() if below is None else self._do("unlink", below, act)

    def on_mkdir(self, real: Callable[..., None], path: Any, *rest: Any, **options: Any) -> None:
        below = self._below(path)
        act = partial(real, path, *rest, **options)
        return act() if below is None else self._do("mkdir", below, act)


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] or "."


def crash_states(
    trace: Sequence[Operation], seed: int, start: int = 0, exhaustive: int = 64, sample: int = 24
) -> Iterator[tuple[int, State]]:
    """Yield the states that a loss of power after each operation may leave.

    Args:
        trace: Operations from an empty root on.
        seed: Of the choices where there are too many to yield all.
        start: Lose power only after this many operations.
        exhaustive: All combinations of changed names are yielded where there are no more than this.
        sample: How many otherwise, besides those where a single change is missing or the only one.

    Yields:
        How many operations there were, and what the root holds.
    """
    chance = random.Random(seed)
    names: dict[str, int] = {}  # durable; an inode of 0 is a folder
    pending: list[Operation] = []  # changes of names that are not durable
    written: dict[int, list[bytes]] = {}
    synced: dict[int, int] = {}  # how many of the writes are
    for position, operation in enumerate([Operation("start"), *trace]):
        kind, path, inode, data = operation
        if kind in NAMING:
            pending.append(operation)
        elif kind == "write":
            written.setdefault(inode, []).append(data)
        elif kind == "fsync":
            synced[inode] = len(written.get(inode, []))
        elif kind == "sync":
            for change in pending:
                if folder_of(change.path) == path:
                    _apply(names, change)
            pending = [change for change in pending if folder_of(change.path) != path]
        if position < start or kind not in (*KINDS, "start"):
            continue
        contents = {number: _contents(parts, synced.get(number, 0), chance) for number, parts in written.items()}
        for kept in _subsets(len(pending), exhaustive, sample, chance):
            found = dict(names)
            for change in itertools.compress(pending, kept):
                _apply(found, change)
            reachable = {path: inode for path, inode in found.items() if _reached(path, found)}
            for state in _filled(reachable, contents, chance):
                yield position, state


def _apply(names: dict[str, int], change: Operation) -> None:
    if change.kind == "unlink":
        names.pop(change.path, None)
        return
    if change.kind == "rename":
        names.pop(change.data, None)
    names[change.path] = change.inode


def _reached(path: str, names: dict[str, int]) -> bool:
    """Whether the folders above a path are there."""
    above = folder_of(path)
    return above == "." or (above in names and _reached(above, names))


def _subsets(count: int, exhaustive: int, sample: int, chance: random.Random) -> Iterator[tuple[bool, ...]]:
    if 2**count <= exhaustive:
        yield from itertools.product((False, True), repeat=count)
        return
    yield (False,) * count
    yield (True,) * count
    for i in range(count):
        yield tuple(j == i for j in range(count))
        yield tuple(j != i for j in range(count))
    for i in range(2, count - 1):  # in order, as most systems have it
        yield tuple(j < i for j in range(count))
    for _ in range(sample):
        yield tuple(chance.random() < 0.5 for _ in range(count))


def _contents(parts: list[bytes], synced: int, chance: random.Random) -> list[bytes]:
    """Return what a file may hold, all that was written first."""
    whole, safe = b"".join(parts), len(b"".join(parts[:synced]))
    if synced == len(parts):
        return [whole]
    blocks = range(safe // BLOCK * BLOCK, len(whole), BLOCK)
    end = chance.choice(blocks) or safe  # a torn write
    lost = chance.choice(blocks)  # a block that came later than the length of the file
    zeros = whole[:safe] + bytes(len(whole) - safe)
    hole = whole[: max(lost, safe)] + bytes(len(whole[max(lost, safe) : lost + BLOCK])) + whole[lost + BLOCK :]
    return [whole, whole[:safe], whole[: max(end, safe)], zeros, hole]


def _filled(names: dict[str, int], contents: dict[int, list[bytes]], chance: random.Random) -> Iterator[State]:
    """Yield the names with all that their files may hold; where several are not synced, with one of them torn."""
    state: State = {path: contents.get(inode, [b""])[0] if inode else None for path, inode in names.items()}
    yield state
    torn = sorted({inode for inode in names.values() if len(contents.get(inode, ())) > 1})
    for inode in torn:
        choices = contents[inode][1:]
        for content in choices if len(torn) == 1 else [chance.choice(choices)]:
            yield {**state, **{path: content for path, other in names.items() if other == inode}}


def write_state(state: State, root: Path) -> None:
    """Write a state into a folder that does not exist yet."""
    root.mkdir()
    for path, content in sorted(state.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
