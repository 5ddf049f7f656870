"""Files that are written whole or not at all and that survive a crash or a loss of power; one writer per folder."""

import contextlib
import errno
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from weakref import WeakSet

from fishmask.errors import FishError

if sys.platform == "win32":
    import msvcrt

    fcntl = None
else:
    import fcntl

_SUFFIX = ".tmp"
# What systems answer where there are no hard links: FAT, network and user-space file systems.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK}

Parts = Iterable[bytes | memoryview]


def publish(path: Path, parts: Parts) -> None:
    """Write a new file; on return its bytes and its name are durable.

    The bytes go to a temporary file in the same folder and are synced before the name appears, so whoever finds the
    name, after whatever crash, finds the whole file.

    Raises:
        FileExistsError: The name is taken; the file there is untouched.
        OSError: The file cannot be written; nothing of it is left where the system allows to clean up.
    """
    temporary = _write_temporary(path, parts)
    try:
        _link(temporary, path)
    except BaseException:
        _discard(temporary)
        raise
    try:
        with contextlib.suppress(FileNotFoundError):  # renamed
            temporary.unlink()
        sync_directory(path.parent)
    except BaseException:
        _discard(path)
        raise


def replace_file(path: Path, parts: Parts) -> None:
    """Write a file so that after a crash at any point the path holds the new bytes or what it held before.

    Raises:
        OSError: The file cannot be written; the path holds what it held before, or the new bytes where only the folder
            could not be made durable.
    """
    temporary = _write_temporary(path, parts)
    try:
        temporary.replace(path)
    except BaseException:
        _discard(temporary)
        raise
    sync_directory(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and the missing ones above it, durably.

    One that is there already is made durable too: whoever made it may have died before it was.
    """
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    for folder in (missing[-1].parent if missing else path, *reversed(missing)):
        if folder in missing:
            folder.mkdir(exist_ok=True)
        with contextlib.suppress(PermissionError):  # a folder above that this user may not list
            sync_directory(folder.parent)


def remove(path: Path) -> None:
    """Delete a file if it is there; what another program still holds open (Windows) stays for a later time."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        path.unlink()


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files in a folder; where no writer is at work, a crash has left them."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(_SUFFIX))


def sync_directory(folder: Path) -> None:
    """Make the names in a folder durable, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    """Have the disk itself take what was written: on macOS ``fsync`` leaves it in the cache of the drive."""
    if (whole := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with contextlib.suppress(OSError):  # a file system that has no such thing
            fcntl.fcntl(handle, whole)
            return
    os.fsync(handle)


def _write_temporary(path: Path, parts: Parts) -> Path:
    """Write and sync a temporary file beside ``path``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            for part in parts:
                view = memoryview(part)
                while view:  # the system may take less than it is given
                    view = view[os.write(handle, view) :]
            _sync(handle)
        finally:
            os.close(handle)
    except BaseException as error:
        _discard(temporary)
        if isinstance(error, OSError) and error.filename is None:  # "No space left on device" does not say where
            error.filename = str(path)
        raise
    return temporary


def _link(temporary: Path, path: Path) -> None:
    """Give the temporary file its name, which must be free."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():  # a rename would replace it
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.rename(path)


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here matters more
        temporary.unlink()


class Lock:
    """A lock file that one writer at a time can hold; the system lets go of it when the process dies.

    A process that is forked off, such as a worker of a data loader, does not inherit it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self.exclusive = False  # whether it is held and the system has locks: else others may write as well

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if self._handle is not None:
            close(self._handle)

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._handle is not None

    def acquire(self) -> None:
        """Take the lock, at once or not at all.

        Raises:
            FishError: Another writer holds it.
        """
        if self.held:
            return
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            self.exclusive = True
        except (BlockingIOError, PermissionError) as error:
            os.close(handle)
            raise FishError(
                f"{self._path.parent} is being written by another process, or by this one and not closed yet; wait, "
                "close it, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks: names are taken only once there too, which `publish` sees to
        self._handle = handle
        _HELD.add(self)

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            self.exclusive = False
        _HELD.discard(self)


_HELD: "WeakSet[Lock]" = WeakSet()


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _forget() -> None:
    """Close a child's copies of the locks: they would outlive the parent that holds them."""
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
