"""Where a prefix cache keeps what it has computed: a bounded store of bytes by key, in memory or in a folder.

A folder holds ``prefix.json`` (what the states belong to), ``states.bin`` (the bytes, one entry after another) and
``index.bin`` (for each entry its key, place, length and checksums). An entry's bytes are written before its line in the
index, and both are checked, so an entry that a crash has torn is never served.
"""

import json
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fishmask.errors import FishError
from fishmask.publish import Lock, make_folder, replace_file

KEY_BYTES = 16
_LINE = struct.Struct("<16sQQI")  # key, offset, length, CRC-32 of the bytes; behind it the CRC-32 of the line itself
_CHECK = struct.Struct("<I")
_IDENTITY, _STATES, _INDEX, _LOCK = "prefix.json", "states.bin", "index.bin", ".lock"
LINE_BYTES = _LINE.size + _CHECK.size


class MemoryStates:
    """States in memory, ``limit_bytes`` at most; the first come stay."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._states: dict[bytes, bytes] = {}
        self.nbytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._states

    def __len__(self) -> int:
        return len(self._states)

    def read(self, key: bytes, into: memoryview) -> bool:
        """Copy an entry, and tell whether it is there and of that length."""
        state = self._states.get(key)
        if state is None or len(state) != len(into):
            return False
        into[:] = state
        return True

    def add(self, key: bytes, state: memoryview) -> bool:
        """Keep an entry, and tell whether there was room for it."""
        size = len(state) + LINE_BYTES
        if self.nbytes + size > self._limit:
            return False
        self._states[key] = bytes(state)
        self.nbytes += size
        return True

    def close(self) -> None:
        """Keep what is there: it lives as long as this object."""


class FolderStates:
    """States in a folder, ``limit_bytes`` at most; one process at a time has it.

    Args:
        folder: The folder, made when missing.
        limit_bytes: The most bytes of states and index together.
        identity: What the states belong to, as JSON.

    Raises:
        FishError: The folder is in use, holds something else, or more than the limit.
    """

    def __init__(self, folder: Path, limit_bytes: int, identity: dict[str, Any]) -> None:
        self._folder, self._limit, self._broken = folder, limit_bytes, False
        make_folder(folder)
        self._lock = Lock(folder / _LOCK)
        self._lock.acquire()
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._sound: set[bytes] = set()  # those whose bytes were checked, or written, by this process
        self._open: list[BinaryIO] = []
        try:
            _check_identity(folder, identity)
            self._states, self._index = (self._opened(folder / name) for name in (_STATES, _INDEX))
            self._read_index()
            if self.nbytes > limit_bytes:
                raise FishError(
                    f"{folder} holds {self.nbytes:,} bytes of states, more than limit_bytes={limit_bytes:,}: allow as "
                    "much, delete it, or name another folder"
                )
        except BaseException:
            self.close()
            raise

    def _opened(self, path: Path) -> BinaryIO:
        path.touch()
        file: BinaryIO = path.open("r+b", buffering=0)
        self._open.append(file)
        return file

    def _read_index(self) -> None:
        size, lines = self._states.seek(0, 2), self._index.read()
        self._end = whole = 0
        for start in range(0, len(lines) - LINE_BYTES + 1, LINE_BYTES):
            line = lines[start : start + _LINE.size]
            (check,) = _CHECK.unpack_from(lines, start + _LINE.size)
            key, offset, length, checksum = _LINE.unpack(line)
            if check != zlib.crc32(line) or offset + length > size:
                break  # torn, and so is all that follows
            self._places[key] = (offset, length, checksum)
            self._end, whole = max(self._end, offset + length), start + LINE_BYTES
        self._index.truncate(whole)
        self._states.truncate(self._end)
        self._lines = whole

    @property
    def nbytes(self) -> int:
        """Bytes of states and index."""
        return self._end + self._lines

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: bytes, into: memoryview) -> bool:
        """Copy an entry, and tell whether it is there, of that length and undamaged; a damaged one is forgotten."""
        offset, length, checksum = self._places.get(key, (0, -1, 0))
        if length != len(into):
            return False
        self._states.seek(offset)
        whole = _read_whole(self._states, into)
        if key not in self._sound:
            if not whole or zlib.crc32(into) != checksum:
                del self._places[key]
                return False
            self._sound.add(key)
        return whole

    def add(self, key: bytes, state: memoryview) -> bool:
        """Keep an entry, and tell whether there was room for it; warn where the system has none, and keep no more."""
        if self._broken or self.nbytes + len(state) + LINE_BYTES > self._limit:
            return False
        checksum = zlib.crc32(state)
        line = _LINE.pack(key, self._end, len(state), checksum)
        try:
            _write_whole(self._states, self._end, state)
            _write_whole(self._index, self._lines, memoryview(line + _CHECK.pack(zlib.crc32(line))))
        except OSError as error:
            self._broken = True
            with suppress(OSError):
                self._states.truncate(self._end)
                self._index.truncate(self._lines)
            warnings.warn(
                f"{self._folder} takes no more states ({error}): other examples are computed in every forward",
                stacklevel=2,
            )
            return False
        self._places[key] = (self._end, len(state), checksum)
        self._sound.add(key)
        self._end += len(state)
        self._lines += LINE_BYTES
        return True

    def close(self) -> None:
        """Let go of the folder."""
        for file in self._open:
            file.close()
        self._lock.release()


def delete_states(folder: Path) -> None:
    """Delete the files of a folder of states, and the folder if nothing else is in it; any other is left alone.

    Args:
        folder: The folder; it need not be there.

    Raises:
        FishError: The folder is in use.
        OSError: A file cannot be deleted.
    """
    if not (folder / _IDENTITY).exists():
        return
    lock = Lock(folder / _LOCK)
    lock.acquire()
    try:
        for name in (_STATES, _INDEX, _IDENTITY):  # that by which it is known goes last
            (folder / name).unlink(missing_ok=True)
    finally:
        lock.release()
    (folder / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's files
        folder.rmdir()


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder whose states belong to something else; name an empty one's."""
    path = folder / _IDENTITY
    if not path.exists():
        if (folder / _INDEX).exists():
            raise FishError(f"{folder} has states but no prefix.json to tell whose: delete it, or name another folder")
        replace_file(path, [json.dumps(identity, indent=2).encode(), b"\n"])
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in identity if found.get(name) != identity[name]]
    except (ValueError, AttributeError) as error:
        raise FishError(f"{path} is damaged ({error!r}): delete the folder, or name another") from error
    if differing:
        raise FishError(
            f"{folder} holds the states of another prefix (other {', '.join(differing)}): delete it, or name another "
            "folder"
        )


def _read_whole(file: BinaryIO, into: memoryview) -> bool:
    """Fill a buffer; False at the end of the file."""
    while into:
        count = file.readinto(into)  # type: ignore[attr-defined]
        if not count:
            return False
        into = into[count:]
    return True


def _write_whole(file: BinaryIO, offset: int, data: memoryview) -> None:
    file.seek(offset)
    while data:  # the system may take less than it is given
        data = data[file.write(data) :]
