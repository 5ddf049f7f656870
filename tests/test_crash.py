"""What is left of a checkpoint log after a loss of power, a full disk, a killed process, a second writer."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, tzinfo
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fishmask.folder
import fishmask.log
import fishmask.publish
from fishmask import CheckpointLog, FishError, container, history
from fishmask.folder import Commit, LogFolder
from fishmask.moments import gather
from fishmask.publish import leftovers, remove, replace_file, sync_directory
from tests.kill import Training, digest_of, references
from tests.trace import Disk, Killed, Operation, State, crash_states, write_state

KEEP = {"keep_last": 3, "keep_every": 4}
REFERENCES = references(16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without waiting for the disk where durability is not what is tested."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# --- loss of power ----------------------------------------------------------------------------------------------------


def follow(disk: Disk, log: CheckpointLog, training: Training, plan: str) -> None:
    """Train and commit: c is a step and a commit, b one that is written behind the training, f folds the log."""
    for word in plan:
        if word != "f":
            training.advance()
        disk.mark("begin", training.digest())
        if word == "f":
            commit = log.compact()
        elif word == "c":
            commit = training.commit(log)
        else:
            future = training.commit(log, behind=True)
            log.wait()  # so that an error comes out once
            commit = future.result()
        disk.mark("done", commit.number)


class Standing(datetime):
    """A clock that stands."""

    @classmethod
    def now(cls, zone: tzinfo | None = None) -> datetime:
        return datetime(2000, 1, 1, tzinfo=zone)


def record(
    plan: str,
    root: Path,
    stop: int | None = None,
    error: type[BaseException] = Killed,
    mutant: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> list[Operation]:
    """Write down what a training does to the disk.

    One that is killed before an operation is resumed by another process; one that an error of the disk stops goes on.
    """
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root).install(patch)
        operations, names = count(), count()

        def halt(kind: str, path: str) -> None:
            if stop is not None and next(operations) >= stop:
                if error is not Killed:  # which comes once, while the dead stay dead
                    disk.before = lambda kind, path: None
                raise error(errno.EIO, os.strerror(errno.EIO))

        disk.before = halt
        # Without what differs between runs, states that are equal are known to be.
        patch.setattr("fishmask.log.datetime", Standing)
        patch.setattr("fishmask.publish.secrets.token_hex", lambda size: f"{next(names):0{2 * size}x}")
        if mutant is not None:
            mutant(patch)
        log, training = CheckpointLog(root / "log", **KEEP), Training()
        try:
            follow(disk, log, training, plan)
        except OSError:
            disk.mark("stopped")
            follow(disk, log, training, "cc")
        except Killed:
            disk.before = lambda kind, path: None
            disk.mark("stopped")
            log.close()
            names = count(1000)
            with CheckpointLog(root / "log", **KEEP) as log:
                follow(disk, log, Training().resume(log) if log.numbers else Training(), "cc")
        log.close()
    return disk.trace


class Recovered:
    """What new processes make of a state: the digest of the training, the commits, what is wrong."""

    def __init__(self, state: State, root: Path, process: Training, other: Training) -> None:
        self.digest: str | None = None
        self.numbers: set[int] = set()
        self.problem = ""
        write_state(state, root)
        try:
            with CheckpointLog(root / "log", **KEEP) as log:
                self.numbers = set(log.numbers)
                if self.numbers:
                    self.digest = process.resume(log).digest()
                process.advance()
                process.commit(log)
                if (wrong := log.verify()) or (wrong := leftovers(log.path)):
                    self.problem = f"after another commit: {wrong}"
            if other.resume(CheckpointLog(root / "log")).digest() != process.digest():
                self.problem = "another commit is not what comes back"
        except Exception as error:
            self.problem = repr(error)
        shutil.rmtree(root)


class Enumeration:
    """Checks every state that a loss of power may leave; states of equal content are recovered once.

    A temporary file counts as one whatever it holds, unless ``exact``.
    """

    def __init__(self, folder: Path, exact: bool = False) -> None:
        self._exact = exact
        self.checked = 0
        self.recovered: dict[frozenset[tuple[str, bytes | None]], Recovered] = {}
        self._folder = folder
        self._processes = Training(1), Training(2)

    def violations(self, trace: list[Operation], start: int = 0) -> Iterator[str]:
        """Yield what goes wrong when power is lost after ``start`` operations or later."""
        promised = list(_promised(trace))
        for position, state in crash_states(trace, seed=0, start=start):
            self.checked += 1
            key = frozenset(
                ("", b"") if item[0].endswith(".tmp") and not self._exact else item for item in state.items()
            )
            if key not in self.recovered:
                self.recovered[key] = Recovered(state, self._folder / "state", *self._processes)
            found, (allowed, numbers) = self.recovered[key], promised[position]
            where = f"power lost after operation {position} {trace[position - 1][:2]}, leaving {sorted(state)}"
            if found.problem:
                yield f"{where}: {found.problem}"
            elif found.digest not in allowed:
                yield f"{where}: what came back is neither the last acknowledged commit nor the one under way"
            elif numbers - found.numbers:
                yield f"{where}: commits {numbers - found.numbers} are missing"


def _promised(trace: list[Operation]) -> Iterator[tuple[set[str | None], set[int]]]:
    """Yield what may come back after each operation (None: nothing), and which commits must be there."""
    begun: str | None = None
    allowed: set[str | None] = {None}
    numbers: set[int] = set()
    yield allowed, numbers
    for kind, path, _, data in trace:
        if kind == "begin":
            begun, allowed = data, allowed | {data}
        elif kind == "done":
            allowed, numbers = {begun}, numbers | {data}
        elif kind == "unlink" and (match := re.fullmatch(r"log/commit-(\d+)\.safetensors", path)):
            numbers = numbers - {int(match[1])}
        yield allowed, numbers


@pytest.mark.parametrize(
    ("plan", "exact", "states", "contents"),
    [("cb", True, 200, 100), ("ccbccbcccc", False, 1000, 50), ("cccccfcfbccfc", False, 1000, 50)],
)
def test_no_loss_of_power_loses_an_acknowledged_commit(tmp_path, unsynced, plan, exact, states, contents):
    trace = record(plan, tmp_path / "run")
    begun = [operation.data for operation in trace if operation.kind == "begin"]
    assert begun[-1] == REFERENCES[len(plan.replace("f", ""))]
    enumeration = Enumeration(tmp_path, exact)
    assert list(enumeration.violations(trace)) == []
    assert enumeration.checked > states and len(enumeration.recovered) > contents, "too few to mean anything"
    print(f"{enumeration.checked} states, {len(enumeration.recovered)} of different content")


@pytest.mark.slow
@pytest.mark.parametrize("error", [Killed, OSError])
def test_no_loss_of_power_after_a_kill_or_an_error_loses_an_acknowledged_commit(tmp_path, unsynced, error):
    """What a killed process had written is there for the next one, but not durable yet."""
    enumeration = Enumeration(tmp_path)
    stops = 0
    for stop in count():
        trace = record("cccfcb", tmp_path / f"run{stop}", stop, error)
        kinds = [operation.kind for operation in trace]
        if "stopped" not in kinds:
            break
        if kinds[kinds.index("stopped") - 1] != "write":  # the bytes of temporary files, which are cleared away
            stops += 1
            assert list(enumeration.violations(trace, start=kinds.index("stopped"))) == []
        shutil.rmtree(tmp_path / f"run{stop}")
    assert stops > 60 and enumeration.checked > 10000, "too few to mean anything"
    print(f"{stops} stops, {enumeration.checked} states, {len(enumeration.recovered)} of different content")


# --- errors of the disk -----------------------------------------------------------------------------------------------


class Failing:
    """Fails the operation of a number and, when the disk is full, all later ones that need room."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number
        self.hit = ""
        self._seen = count()

    def __call__(self, kind: str, path: str) -> None:
        if kind != "unlink" and (
            next(self._seen) == self.at or (self.hit and self.number == errno.ENOSPC and kind in ("create", "write"))
        ):
            self.hit = self.hit or f"{kind} {path}"
            raise OSError(self.number, os.strerror(self.number))


def begun(folder: Path, steps: int) -> None:
    with CheckpointLog(folder) as log:
        training = Training()
        for _ in range(steps):
            training.advance()
            training.commit(log)


def check_commits(folder: Path, numbers: list[int]) -> None:
    """Whether commits are what they were; the n-th was made after n steps."""
    for number in numbers:
        assert digest_of(folder, at=number) == REFERENCES[number]


def check_errors(root: Path, steps: int, act: str, number: int) -> None:
    """Fail each operation of a commit or a folding after that many steps; the mask changes with the fifth."""
    begun(root / "begun", steps)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root / "run").install(patch)
        at = 0
        while fails_well(disk, root / "begun", steps, act, Failing(at, number)):
            at += 1
    assert at > {"commit": 8, "behind": 8, "compact": 30}[act]


def fails_well(disk: Disk, source: Path, steps: int, act: str, failing: Failing) -> bool:
    """Check one failure; return whether there was one."""
    shutil.rmtree(disk.root, ignore_errors=True)
    if steps:
        shutil.copytree(source, disk.root)
    with CheckpointLog(disk.root) as log:
        training = Training()
        if steps:
            training.resume(log)
        if act != "compact":
            training.advance()
        disk.before = failing
        try:
            if act == "compact":
                log.compact()
            elif act == "commit":
                training.commit(log)
            else:
                training.commit(log, behind=True)
                log.wait()
        except OSError as error:
            assert failing.hit and error.errno == failing.number
        else:
            assert not failing.hit, f"no error came out of {failing.hit}"
            return False
        finally:
            disk.before = lambda kind, path: None
        assert not disk.root.exists() or leftovers(disk.root) == []
        folded = act == "compact" and log.numbers[-1] > steps  # it failed while it deleted what is old
        if not folded:
            check_commits(disk.root, list(range(1, steps + 1)))
        if act == "compact":
            assert digest_of(disk.root) == REFERENCES[steps]
            assert folded or len(history.numbered(disk.root, "base")) == 1, "what was half made is in the way"
            log.compact()
            assert len(log.numbers) == 1
        else:
            training.commit(log)
            check_commits(disk.root, list(range(1, steps + 1)))
        assert digest_of(disk.root) == training.digest() and log.verify() == []
        training.advance()
        training.commit(log)
    with CheckpointLog(disk.root) as log:  # clears away what is not needed
        again = Training(seed=1).resume(log)
        assert again.digest() == training.digest()
        again.commit(log)
        assert log.verify() == [] and len(history.numbered(disk.root, "base")) == 1
    return True


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("steps", "act"), [(0, "commit"), (2, "commit"), (4, "commit"), (2, "behind"), (5, "compact")])
def test_an_error_of_the_disk_comes_out_and_costs_nothing_else(tmp_path, unsynced, steps, act, number):
    check_errors(tmp_path, steps, act, number)


@pytest.mark.parametrize("surface", ["wait", "close", "commit", "commit_async", "restore", "compact"])
def test_an_error_behind_the_training_surfaces_once(tmp_path, monkeypatch, unsynced, surface):
    begun(tmp_path, 2)
    disk = Disk(tmp_path).install(monkeypatch)
    log = CheckpointLog(tmp_path)
    training = Training().resume(log)
    training.advance()
    disk.before = Failing(2, errno.ENOSPC)
    training.commit(log, behind=True).exception()  # waits, and raises nothing
    disk.before = lambda kind, path: None
    with pytest.raises(OSError, match="No space left"):
        if surface.startswith("commit"):
            training.commit(log, behind=surface == "commit_async")
        elif surface == "restore":
            training.resume(log)
        else:
            getattr(log, surface)()
    assert log.numbers == [1, 2]
    log.wait()
    training.commit(log)
    log.close()
    check_commits(tmp_path, [1, 2, 3])


@pytest.mark.parametrize("which", ["commit", ".commit"])
def test_files_that_cannot_be_deleted_do_not_harm_the_log(tmp_path, monkeypatch, unsynced, which):
    disk = Disk(tmp_path / "run").install(monkeypatch)
    training = Training()
    with CheckpointLog(disk.root, keep_last=1) as log:
        training.advance()
        training.commit(log)

        def refuse(kind: str, path: str) -> None:
            if kind == "unlink" and path.startswith(which):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.before = refuse
        for steps in (2, 3):
            training.advance()
            with pytest.raises(OSError, match="Input/output error"):
                training.commit(log)
            assert digest_of(disk.root) == REFERENCES[steps if which == "commit" else 1]
        with pytest.raises(OSError, match="Input/output error"):
            log.compact()
        assert digest_of(disk.root) == REFERENCES[3 if which == "commit" else 1]
        disk.before = lambda kind, path: None
        training.advance()
        training.commit(log)
        assert log.verify() == []
    with CheckpointLog(disk.root, keep_last=1) as log:
        training = Training(seed=1).resume(log)
        assert training.digest() == REFERENCES[4]
        training.advance()
        training.commit(log)
        assert leftovers(disk.root) == [] and log.verify() == [] and len(log.numbers) == 1


def lie(patch: pytest.MonkeyPatch, disk: Disk, name: str) -> None:
    """Have the disk change a byte of what is written to a file of that name, and say that all is well."""
    honest = os.write

    def write(handle: int, data: memoryview) -> int:
        damaged = bytearray(data)
        if name in disk.path_of(handle):
            damaged[len(damaged) // 2] ^= 1
        return honest(handle, damaged)

    patch.setattr(os, "write", write)


def check_lies(folder: Path, name: str) -> None:
    """Fold a log on a disk that damages what it writes: the folding must fail, and cost nothing."""
    begun(folder / "log", 3)
    log = CheckpointLog(folder / "log")
    with pytest.MonkeyPatch.context() as patch:
        lie(patch, Disk(folder).install(patch), name)
        with pytest.raises(FishError, match=r"damaged|first bytes"):
            log.compact()
    assert log.verify() == []
    check_commits(folder / "log", [1, 2, 3])
    assert digest_of(log.path) == REFERENCES[3]


@pytest.mark.parametrize("name", ["base", "segment", "commit"])
def test_the_old_files_are_deleted_after_the_new_ones_were_read_back(tmp_path, unsynced, name):
    check_lies(tmp_path, name)


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 4])  # nothing yet; a mask has ended
def test_a_commit_that_failed_can_be_made_after_closing(tmp_path, monkeypatch, unsynced, steps):
    """Taking the lock again clears away what no commit builds on; what the next one will build on must stay."""
    log, training = CheckpointLog(tmp_path), Training()
    for _ in range(steps):
        training.advance()
        training.commit(log)
    training.advance()
    publish = fishmask.folder.publish

    def full(path: Path, parts: object) -> None:
        if path.name.startswith("commit"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(path, parts)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("fishmask.folder.publish", full)
        training.commit(log)
    log.close()
    training.commit(log)
    assert log.verify() == []
    assert digest_of(tmp_path) == REFERENCES[steps + 1]


def test_folding_after_a_commit_of_another_mask_failed(tmp_path, monkeypatch, unsynced):
    log, training = CheckpointLog(tmp_path), Training()
    for step in range(5):  # the mask changes with the last
        training.advance()
        if step < 4:
            training.commit(log)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("fishmask.log.history.commit_content", fail)
        training.commit(log)
    log.compact()
    assert digest_of(tmp_path) == REFERENCES[4]
    training.commit(log)
    assert log.verify() == []
    assert digest_of(tmp_path) == REFERENCES[5]


def fail(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("other", ["compact", "commit", "reinstate", "clear"])
def test_a_log_that_another_process_has_written_to_must_be_restored_first(tmp_path, unsynced, other):
    log, training = CheckpointLog(tmp_path), Training()
    training.advance()
    training.commit(log)
    if other == "clear":  # the segment of a commit that did not come
        for _ in range(4):
            training.advance()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr("fishmask.log.history.commit_content", fail)
            training.commit(log)
    log.close()
    with CheckpointLog(tmp_path) as second:
        another = Training(seed=1).resume(second)
        if other == "commit":
            another.advance()
            another.commit(second)
        elif other == "reinstate":
            second.reinstate(1)
        else:
            second.compact()
    files = sorted(tmp_path.iterdir())
    with pytest.raises(FishError, match="restore one first"):
        training.commit(log)
    assert sorted(tmp_path.iterdir()) == files and log.verify() == []
    training.resume(log)
    training.advance()
    training.commit(log)
    assert log.verify() == []
    assert digest_of(tmp_path) == training.digest()


def test_the_first_commit_of_another_process_may_come_in_between(tmp_path, monkeypatch, unsynced):
    """Between the look at an empty folder and the taking of its lock."""
    log, training = CheckpointLog(tmp_path), Training()
    training.advance()
    make_folder = fishmask.folder.make_folder

    def late(path: Path) -> None:
        patch.undo()
        begun(tmp_path, 2)
        make_folder(path)

    with monkeypatch.context() as patch:
        patch.setattr("fishmask.folder.make_folder", late)
        with pytest.raises(FishError, match="restore one first"):
            training.commit(log)
    log.close()
    assert log.numbers == [1, 2]
    check_commits(tmp_path, [1, 2])


def ask(*arguments: object) -> object:
    command = [sys.executable, "-m", "tests.kill", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    return json.loads(done.stdout)


def test_one_of_several_processes_may_write(tmp_path):
    told = ask("writers", tmp_path / "log", 4)
    winners = [lines for lines in told if lines[0][0] == "done"]
    assert len(winners) == 1 and len(winners[0]) == 10
    for lines in told:
        if lines not in winners:
            assert len(lines) == 1 and " ".join(lines[0]).startswith("error FishError"), lines
    log = CheckpointLog(tmp_path / "log")
    assert log.verify() == [] and log.numbers == list(range(1, 11))
    for _, step, digest in winners[0]:
        assert digest_of(log.path, at=int(step)) == digest


def check_second_writer(folder: Path) -> None:
    """Where the system has no locks, the first name is the first come's; the other one is told."""
    begun(folder, 2)
    first, second = CheckpointLog(folder), CheckpointLog(folder)
    training, other = Training().resume(first), Training().resume(second)
    training.advance()
    other.tuning.values.mul_(2)  # so that it can be seen whose commit is there
    publish = fishmask.folder.publish
    expected = training.digest()

    def late(path: Path, parts: object) -> None:
        patch.undo()
        training.commit(first)
        publish(path, parts)

    with pytest.MonkeyPatch.context() as locks, pytest.MonkeyPatch.context() as patch:
        locks.setattr("fcntl.flock", without_locks)
        patch.setattr("fishmask.folder.publish", late)
        with pytest.raises(FishError, match="appeared meanwhile: another process writes to this log"):
            other.commit(second)
    first.close()
    second.close()
    assert first.verify() == [] and digest_of(folder, at=3) == expected
    check_commits(folder, [1, 2])


def without_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_a_second_writer_overwrites_nothing(tmp_path, unsynced):
    check_second_writer(tmp_path)


def test_without_locks_a_second_writer_clears_nothing_away(tmp_path, unsynced):
    """What no commit builds on may be of one that the other writer is making."""
    first, second = CheckpointLog(tmp_path), CheckpointLog(tmp_path)
    training, other = Training(), Training(seed=5)
    training.advance()
    expected = training.digest()
    publish = fishmask.folder.publish

    def late(path: Path, parts: object) -> None:
        if path.name.startswith("commit"):
            patch.undo()
            with pytest.MonkeyPatch.context() as full, pytest.raises(OSError, match="No space left"):
                full.setattr("fishmask.log.history.commit_content", fail)
                other.commit(second)
        publish(path, parts)

    with pytest.MonkeyPatch.context() as locks, pytest.MonkeyPatch.context() as patch:
        locks.setattr("fcntl.flock", without_locks)
        patch.setattr("fishmask.folder.publish", late)
        training.commit(first)
        first.close()
        second.close()
    assert first.verify() == [] and digest_of(tmp_path) == expected


@pytest.mark.slow
def test_no_kill_loses_an_acknowledged_commit(tmp_path):
    seen = ask("kills", tmp_path, 0, 205)
    print(seen)
    assert seen["killed"] >= 200
    assert {name: seen[name] for name in ("lost", "wrong")} == {"lost": 0, "wrong": 0}
    assert "errors" not in seen
    assert seen["finished"] >= 3 and seen["killed after commit"] >= 50 and seen["killed after compact"] >= 20
    assert seen["later than promised"] >= 1, "no kill came between the durable commit and its acknowledgement"


# --- the checks can fail ----------------------------------------------------------------------------------------------


def check_damage(folder: Path) -> None:
    """Flip bits all over a log; each flip must be found, and none may be loaded."""
    begun(folder, 2)
    log = CheckpointLog(folder)
    for path in (history.path_of(folder, kind, 1) for kind in history.KINDS):
        data = path.read_bytes()
        for place in range(0, len(data), len(data) // 60):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert [problem.path for problem in log.verify()][:1] == [path]
            with pytest.raises(FishError):
                Training(seed=1).resume(log, at=1)
        path.write_bytes(data)
    assert digest_of(folder, at=1) == REFERENCES[1]


def test_damage_is_found(tmp_path, unsynced):
    check_damage(tmp_path)


def no_sync_of(folders: bool) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        fsync = os.fsync

        def some(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode) != folders:
                fsync(handle)

        patch.setattr(os, "fsync", some)

    return mutate


def named_before_synced(patch: pytest.MonkeyPatch) -> None:
    def publish(path: Path, parts: list[bytes]) -> None:
        handle = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT)
        for part in parts:
            os.write(handle, part)
        Path(f"{path}.new").rename(path)
        os.fsync(handle)
        os.close(handle)
        sync_directory(path.parent)

    patch.setattr("fishmask.folder.publish", publish)


def synced_before_named(patch: pytest.MonkeyPatch) -> None:
    link = fishmask.publish._link

    def swapped(temporary: Path, path: Path) -> None:
        sync_directory(path.parent)
        link(temporary, path)

    patch.setattr("fishmask.publish._link", swapped)
    patch.setattr("fishmask.publish.sync_directory", lambda folder: None)


def old_base_deleted_first(patch: pytest.MonkeyPatch) -> None:
    add = LogFolder.add

    def deleting(folder: LogFolder, kind: str, number: int, content: container.Content) -> history.Reference:
        if kind == "base":
            remove(folder.path_of("base", number - 1))
        return add(folder, kind, number, content)

    patch.setattr(LogFolder, "add", deleting)


def deleted_without_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fishmask.folder.sync_directory", lambda folder: None)


def folder_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fishmask.folder.make_folder", lambda folder: folder.mkdir(exist_ok=True))


def acknowledged_early(patch: pytest.MonkeyPatch) -> None:
    commit = CheckpointLog.commit_async
    numbers = count(1)

    def early(*arguments: Any, **options: Any) -> Any:
        commit(*arguments, **options)
        return SimpleNamespace(number=next(numbers))

    patch.setattr(CheckpointLog, "commit", early)


def differences(patch: pytest.MonkeyPatch) -> None:
    written = history.commit_content
    values: list[torch.Tensor] = []

    def changed(metadata: dict[str, str], snapshot: history.Snapshot) -> container.Content:
        values.append(snapshot.values)
        return written(metadata, replace(snapshot, values=values[-1] - values[0]))

    patch.setattr("fishmask.log.history.commit_content", changed)


def no_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fishmask.log.gather", lambda values, optimizer: gather(values, optimizer)._replace(vectors={}))


def no_generators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fishmask.log.generators.capture", dict)


def no_buffers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fishmask.originals.Originals.changed_buffers", lambda originals, model: {})


def pruned_too_much(patch: pytest.MonkeyPatch) -> None:
    finish = CheckpointLog._finish

    def early(log: CheckpointLog, number: int, *rest: Any) -> Commit:
        remove(history.path_of(log.path, "commit", number - 1))
        return finish(log, number, *rest)

    patch.setattr(CheckpointLog, "_finish", early)


@pytest.mark.parametrize(
    ("plan", "mutant"),
    [
        ("ccc", None),
        ("ccf", None),
        ("ccc", no_sync_of(folders=False)),
        ("ccc", no_sync_of(folders=True)),
        ("ccc", named_before_synced),
        ("ccc", synced_before_named),
        ("ccc", acknowledged_early),
        ("ccc", differences),
        ("ccc", no_moments),
        ("ccc", no_generators),
        ("ccc", no_buffers),
        ("ccc", pruned_too_much),
        ("ccf", old_base_deleted_first),
        ("ccf", deleted_without_order),
    ],
)
def test_a_fault_in_the_log_would_be_seen_after_a_loss_of_power(tmp_path, unsynced, plan, mutant):
    faulty = record(plan, tmp_path / "run", mutant=mutant)
    last = max(i for i, operation in enumerate(faulty) if operation.kind == "begin")
    assert (next(Enumeration(tmp_path).violations(faulty, start=last), None) is None) == (mutant is None)


def test_a_folder_that_is_not_durable_would_be_seen(tmp_path, unsynced):
    faulty = record("c", tmp_path / "run", stop=1, mutant=folder_not_synced)
    assert faulty[-1].kind == "done"
    assert "neither the last" in next(Enumeration(tmp_path).violations(faulty, start=len(faulty) - 1))


FAILED = (AssertionError, pytest.fail.Exception)


def test_a_digest_that_is_not_checked_would_be_seen(tmp_path, monkeypatch, unsynced):
    def read(path: Path, kind: str) -> container.Content:
        with container.refusing(path):
            return container._parse(path, container._bytes_of(path), kind)

    with monkeypatch.context() as patch, pytest.raises(FAILED):
        patch.setattr(container, "read", read)
        check_damage(tmp_path)


def test_a_base_that_is_not_read_back_would_be_seen(tmp_path, monkeypatch, unsynced):
    read_base = cache(history.read_base)  # what was read once
    with monkeypatch.context() as patch, pytest.raises(FAILED):
        patch.setattr(history, "read_base", lambda folder, number, digest=None: read_base(folder, 1, None))
        patch.setattr(history, "same_bits", lambda a, b: True)
        check_lies(tmp_path, "base")


def test_files_that_are_written_in_place_would_be_seen_after_a_kill(tmp_path):
    seen = ask("kills", tmp_path, 0, 100, 1)
    assert seen["killed"] < 100 and seen["errors"]


def test_what_is_left_after_an_error_would_be_seen(tmp_path, monkeypatch, unsynced):
    with monkeypatch.context() as patch, pytest.raises(FAILED):
        patch.setattr("fishmask.publish._discard", lambda path: None)
        check_errors(tmp_path, 2, "commit", errno.ENOSPC)


def test_an_overwriting_second_writer_would_be_seen(tmp_path, monkeypatch, unsynced):
    with monkeypatch.context() as patch, pytest.raises(FAILED):
        patch.setattr("fishmask.folder.publish", replace_file)
        check_second_writer(tmp_path)
