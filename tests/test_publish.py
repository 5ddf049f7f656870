"""Writing files whole or not at all, and one writer per folder."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fishmask import FishError, publish
from fishmask.publish import Lock, leftovers, make_folder, remove, replace_file, sync_directory
from tests.trace import Disk

PARTS = [b"one", memoryview(b"two"), b""]
WRITERS = pytest.mark.parametrize("write", [publish.publish, replace_file])


def failing(number: int) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files ------------------------------------------------------------------------------------------------------------


@WRITERS
def test_a_file_is_its_parts_and_nothing_else_is_left(tmp_path, write):
    write(tmp_path / "file", iter(PARTS))
    assert (tmp_path / "file").read_bytes() == b"onetwo" and names(tmp_path) == ["file"]


@WRITERS
def test_bytes_are_durable_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch, write):
    disk = Disk(tmp_path).install(monkeypatch)
    write(tmp_path / "file", PARTS)
    kinds = [operation.kind for operation in disk.trace if operation.kind != "write"]
    named = ["link", "unlink"] if write is publish.publish else ["rename"]
    assert kinds == ["create", "fsync", *named, "sync"]


def test_a_name_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "file").write_bytes(b"first")
    with pytest.raises(FileExistsError, match="file"):
        publish.publish(tmp_path / "file", PARTS)
    assert (tmp_path / "file").read_bytes() == b"first" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["EPERM", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "EMLINK"])
def test_where_there_are_no_hard_links_a_rename_does_and_replaces_nothing_either(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "link", failing(getattr(errno, name)))
    publish.publish(tmp_path / "file", [b"first"])
    with pytest.raises(FileExistsError, match="file"):
        publish.publish(tmp_path / "file", PARTS)
    assert (tmp_path / "file").read_bytes() == b"first" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"])
def test_other_errors_of_a_link_come_out(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "link", failing(getattr(errno, name)))
    with pytest.raises(OSError) as caught:
        publish.publish(tmp_path / "file", PARTS)
    assert caught.value.errno == getattr(errno, name) and names(tmp_path) == []


@WRITERS
def test_a_system_that_takes_little_at_a_time_gets_all(tmp_path, monkeypatch, write):
    real, sizes = os.write, []

    def little(handle: int, data: memoryview) -> int:
        sizes.append(len(data))
        return real(handle, data[:3])

    monkeypatch.setattr(os, "write", little)
    write(tmp_path / "file", [b"0123456789", b"abc"])
    assert (tmp_path / "file").read_bytes() == b"0123456789abc" and sizes == [10, 7, 4, 1, 3]


@WRITERS
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, write, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "file", PARTS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@WRITERS
@pytest.mark.parametrize("operation", ["create", "write", "fsync", "link", "rename", "sync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_an_error_comes_out_and_leaves_nothing_new(tmp_path, monkeypatch, write, operation, number):
    disk = Disk(tmp_path).install(monkeypatch)
    hit = []

    def before(kind: str, path: str) -> None:
        if kind == operation:
            hit.append(path)
            raise OSError(number, os.strerror(number))

    if write is replace_file:
        (tmp_path / "file").write_bytes(b"before")
    disk.before = before
    if operation == ("rename" if write is publish.publish else "link"):
        write(tmp_path / "file", PARTS)
        assert hit == []
        return
    with pytest.raises(OSError) as caught:
        write(tmp_path / "file", PARTS)
    assert caught.value.errno == number and hit
    if write is publish.publish:
        assert names(tmp_path) == []
    else:  # once renamed, it stays: what was there before is gone
        assert names(tmp_path) == ["file"]
        assert (tmp_path / "file").read_bytes() == (b"onetwo" if operation == "sync" else b"before")
    disk.before = lambda kind, path: None
    write(tmp_path / "file", PARTS)
    assert (tmp_path / "file").read_bytes() == b"onetwo" and names(tmp_path) == ["file"]


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", failing(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: .*file"):
        publish.publish(tmp_path / "file", PARTS)


@WRITERS
def test_an_interrupt_leaves_nothing(tmp_path, write):
    def parts() -> Iterator[bytes]:
        yield b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", parts())
    assert names(tmp_path) == []


@pytest.mark.parametrize("works", [True, False])
def test_where_a_sync_has_a_fuller_form_it_is_used(tmp_path, monkeypatch, works):
    synced = []

    def control(handle: int, command: int) -> None:
        synced.append((command, stat.S_ISDIR(os.fstat(handle).st_mode)))
        if not works:
            raise OSError(errno.ENOTSUP, "not on this file system")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append("plain"))
    publish.publish(tmp_path / "file", PARTS)
    plain = [] if works else ["plain"]
    assert synced == [(51, False), *plain, (51, True), *plain]


def test_leftovers_are_the_temporary_files_only(tmp_path, monkeypatch):
    publish.publish(tmp_path / "file", PARTS)
    (tmp_path / "other.tmp").touch()
    (tmp_path / ".hidden").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "_link", interrupt)
        patch.setattr(publish, "_discard", lambda path: None)  # a kill leaves no time
        publish.publish(tmp_path / "next", PARTS)
    (left,) = leftovers(tmp_path)
    assert left.name.startswith(".next.") and left.read_bytes() == b"onetwo"
    remove(left)
    remove(left)  # is gone already
    assert leftovers(tmp_path) == [] and names(tmp_path) == [".hidden", "file", "other.tmp"]


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP"])
def test_a_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch, name):
    fsync, seen = os.fsync, []

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            seen.append(handle)
            raise OSError(getattr(errno, name), name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    publish.publish(tmp_path / "file", PARTS)
    assert seen and (tmp_path / "file").read_bytes() == b"onetwo"


def test_an_error_in_syncing_a_folder_comes_out(tmp_path, monkeypatch):
    open_files = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)
    if open_files:
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_folders_are_made_durable_from_the_top_whoever_made_them(tmp_path, monkeypatch):
    disk = Disk(tmp_path).install(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    trace = [(operation.kind, operation.path) for operation in disk.trace]
    assert trace == [("mkdir", "a"), ("sync", "."), ("mkdir", "a/b"), ("sync", "a")]
    make_folder(tmp_path / "a" / "b")
    assert [(operation.kind, operation.path) for operation in disk.trace[4:]] == [("sync", "a")]
    (tmp_path / "a" / "c").mkdir()
    make_folder(tmp_path / "a" / "c" / "d")
    assert [(operation.kind, operation.path) for operation in disk.trace[6:]] == [
        ("sync", "a"), ("mkdir", "a/c/d"), ("sync", "a/c"),
    ]  # fmt: skip


def test_a_folder_below_one_that_may_not_be_listed_will_do(tmp_path, monkeypatch):
    """Whoever runs this may be root, who may list anything."""
    real = os.open

    def refusing(path: Path, flags: int, *rest: int) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(PermissionError):
        sync_directory(tmp_path)
    make_folder(tmp_path / "log")
    assert (tmp_path / "log").is_dir()


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_one_object_of_a_process_holds_a_lock(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.acquire()
    first.acquire()  # has it already
    assert first.held and not second.held
    with pytest.raises(FishError, match="is being written by another process, or by this one and not closed yet"):
        second.acquire()
    assert first.held and not second.held
    first.release()
    first.release()
    second.acquire()
    assert second.held and not first.held
    del second  # lets go of it
    first.acquire()
    first.release()


def test_a_lock_is_not_taken_in_a_read_only_folder(tmp_path, monkeypatch):
    lock = Lock(tmp_path / "lock")
    for number in (errno.EROFS, errno.EACCES):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(os, "open", failing(number))
            lock.acquire()
        assert caught.value.errno == number and not isinstance(caught.value, FishError) and not lock.held


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL"])
def test_a_system_without_locks_will_do(tmp_path, monkeypatch, name):
    monkeypatch.setattr("fcntl.flock", failing(getattr(errno, name)))
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    assert lock.held and not lock.exclusive
    monkeypatch.undo()
    lock.release()
    lock.acquire()
    assert lock.exclusive
    lock.release()
    assert not lock.exclusive


HOLDER = """
import os, signal, sys
from pathlib import Path
from fishmask import publish

lock = publish.Lock(Path(sys.argv[1]))
lock.acquire()
if sys.argv[2] == "forgetful":
    publish._HELD.clear()
child = os.fork()
if child == 0:
    try:
        if not lock.held:
            lock.acquire()  # a child does not get past its parent
    except publish.FishError:
        os.write(1, b"refused\\n")
    signal.pause()
os.write(1, f"{child}\\n".encode())
signal.pause()
"""


@contextmanager
def holder(path: Path, how: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Have a process hold a lock that forks a child; yield it and what both said."""
    command = [sys.executable, "-c", HOLDER, str(path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said: list[str] = []
        try:
            while len(said) < (1 if how == "forgetful" else 2):
                said += process.stdout.readline().split()
            yield process, said
        finally:
            process.kill()
            for word in said:
                if word.isdigit():
                    os.kill(int(word), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("how", ["sound", "forgetful"])
def test_a_lock_ends_with_its_process_and_not_with_what_that_forked_off(tmp_path, how):
    """A holder whose child keeps its copy open, which is the fault that this looks for, must be told apart."""
    lock = Lock(tmp_path / "lock")
    with holder(tmp_path / "lock", how) as (process, said):
        assert ("refused" in said) == (how == "sound")
        with pytest.raises(FishError, match="written by another process"):
            lock.acquire()
        process.kill()
        process.wait()
        (child,) = (int(word) for word in said if word.isdigit())
        os.kill(child, 0)  # is alive
        if how == "sound":
            lock.acquire()
            assert lock.held
        else:
            with pytest.raises(FishError, match="written by another process"):
                lock.acquire()


def test_nothing_is_said_when_python_ends_with_a_lock_held(tmp_path):
    program = (
        "import sys; from pathlib import Path; from fishmask import publish; "
        "publish.kept = publish.Lock(Path(sys.argv[1])); publish.kept.acquire(); "
        "cycle = [publish]; cycle.append(cycle)"  # so that the lock outlives what its module imported
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
