"""The folder of a checkpoint log: which files there are, those that belong together, adding and clearing away."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fishmask import container, history
from fishmask.container import Content
from fishmask.errors import FishError
from fishmask.history import CommitFile, Problem, Reference, Segment
from fishmask.publish import Lock, leftovers, make_folder, publish, remove, sync_directory


@dataclass(frozen=True)
class Commit:
    """One commit.

    Attributes:
        number: Its number; numbers grow, and the largest is the newest.
        step: The training step that the caller named.
        path: Its file.
        bytes: The size of the file.
        time: When it was made (UTC, ISO 8601).
        mask: Digest of its mask.
        segment: Number of the segment that holds the mask.
        seconds: From the call until the bytes were durable; 0 for a commit that was not made by this object.
    """

    number: int
    step: int
    path: Path
    bytes: int
    time: str
    mask: str
    segment: int
    seconds: float = field(default=0.0, compare=False)


class LogFolder:
    """The files of one log. To add one, hold the lock: ``claim`` before, ``release`` after."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock(path / "lock")
        self._last: dict[str, int] = {}  # the largest number of each kind, while this object alone may write

    @property
    def numbers(self) -> list[int]:
        """The numbers of all commits, ascending; no file is opened."""
        return list(history.numbered(self.path, "commit"))

    def commits(self) -> list[Commit]:
        """Return all commits whose header can be read, oldest first."""
        found = []
        for path in history.numbered(self.path, "commit").values():
            with contextlib.suppress(FishError, FileNotFoundError):  # whoever writes may delete it meanwhile
                found.append(commit_of(path, container.peek(path, "commit"), path.stat().st_size))
        return found

    def path_of(self, kind: str, number: int) -> Path:
        """Return the path of a file."""
        return history.path_of(self.path, kind, number)

    def holds(self, kind: str, file: Reference) -> bool:
        """Whether a file is there and is the one that is meant, as its header says."""
        try:
            return container.peek(self.path_of(kind, file.number), kind)["digest"] == file.digest
        except (FishError, OSError):
            return False

    # --- reading ------------------------------------------------------------------------------------------------------

    def existing(self, at: int | None) -> list[int]:
        """Return the numbers of all commits; ``FishError`` when there are none, or not the one that is asked for."""
        numbers = self.numbers
        if not numbers:
            raise FishError(
                f"{self.path} holds no commits" + ("" if self.path.is_dir() else ": there is no such folder")
            )
        if at is not None and at not in numbers:
            raise FishError(f"{self.path} holds no commit {at}; it holds {_listed(numbers)}")
        return numbers

    def newest_intact(self, at: int | None, allow_older: bool) -> tuple[CommitFile, list[Segment], list[Problem]]:
        """Read a commit and its segments.

        Args:
            at: Number of the commit; by default the newest.
            allow_older: Pass over newer commits that are damaged.

        Returns:
            The commit, its segments (oldest first), and what was passed over.

        Raises:
            FishError: There is no such commit, or a file is damaged.
        """
        numbers = self.existing(at)
        skipped: list[Problem] = []
        for number in [at] if at is not None else reversed(numbers):
            try:
                return *history.read_all(self.path, number), skipped
            except (FishError, OSError) as error:
                if at is None and self.numbers and number not in self.numbers:
                    return self.newest_intact(at, allow_older)  # deleted meanwhile: there is a newer one
                older = [n for n in numbers if n < number]
                if at is not None or not older:
                    raise
                if not allow_older:
                    raise FishError(
                        f"{error}; an older commit can be used instead: at={older[-1]} takes the one before, "
                        "allow_older=True the newest that is intact"
                    ) from error
                skipped.append(Problem(self.path_of("commit", number), str(error)))
        raise AssertionError("the loop returns or raises")

    def verify(self) -> list[Problem]:
        """Read every byte of every file and follow every reference.

        Returns:
            The files that are damaged, or that need one that is; none when the log is sound.
        """
        problems: list[Problem] = []
        sound: dict[str, dict[int, str]] = {kind: {} for kind in history.KINDS}
        counts: dict[int, int] = {}
        for kind in history.KINDS:
            for number, path in history.numbered(self.path, kind).items():
                try:
                    needed: dict[str, Reference | None]
                    if kind == "base":
                        file, needed = history.read_base(self.path, number).file, {}
                    elif kind == "segment":
                        segment = history.read_segment(self.path, number)
                        file, needed = segment.file, {"base": segment.base, "segment": segment.parent}
                        counts[number] = segment.mask.k
                    else:
                        commit = history.read_commit(self.path, number)
                        file, needed = commit.file, {"segment": commit.segment}
                        if len(commit.snapshot.values) != counts.get(commit.segment.number, -1):
                            needed = {"segment": Reference(commit.segment.number, "of another size")}
                    for other, wanted in needed.items():
                        if wanted is not None and sound[other].get(wanted.number) != wanted.digest:
                            name = self.path_of(other, wanted.number).name
                            raise FishError(f"{path} needs {name}, which is missing, damaged or another file")
                    sound[kind][number] = file.digest
                except (FishError, OSError) as error:
                    problems.append(Problem(path, str(error)))
        return [problem for problem in problems if problem.path.exists()]  # whoever writes may delete some meanwhile

    # --- writing ------------------------------------------------------------------------------------------------------

    @property
    def claimed(self) -> bool:
        """Whether the lock is held."""
        return self._lock.held

    def claim(self) -> None:
        """Take the lock; the folder is made when missing. Raises ``FishError`` when another process holds it."""
        make_folder(self.path)
        self._lock.acquire()

    def release(self) -> None:
        """Let go of the lock."""
        self._lock.release()
        self._last.clear()

    def tidy(self, needed: Reference | None) -> None:
        """Clear away what a crash may have left.

        Args:
            needed: A segment that is needed although no commit may belong to it yet.
        """
        if self._lock.exclusive:  # else they may be of a commit that another process is making
            ours = tuple(f".{kind}-" for kind in history.KINDS)  # the folder may hold what others write, too
            for path in leftovers(self.path):
                if path.name.startswith(ours):
                    remove(path)
        self.remove_unused(needed)

    def remove_unused(self, needed: Reference | None) -> None:
        """Remove segments and bases that no commit builds on: of a commit that never came, of a halted ``compact``."""
        if not self._lock.exclusive:
            return
        sync_directory(self.path)  # a deleted commit that a loss of power brings back would need them
        bases, segments = history.numbered(self.path, "base"), history.numbered(self.path, "segment")
        try:
            parents = {number: container.peek(path, "segment") for number, path in segments.items()}
            commits = [container.peek(path, "commit") for path in history.numbered(self.path, "commit").values()]
        except (FishError, OSError):
            return  # what cannot be read may need anything
        if needed is not None:
            commits.append(needed.written("segment"))
        used: set[int] = set()
        for metadata in commits:
            number: int | None = int(metadata["segment"])
            while number is not None and number not in used:
                if number not in parents:
                    return  # what is missing may come back, and may need anything
                used.add(number)
                number = int(parents[number]["segment"]) if "segment" in parents[number] else None
        held = {int(parents[n]["base"]) for n in used}
        for path in (
            *(p for n, p in segments.items() if n not in used),
            *(p for n, p in bases.items() if n not in held),
        ):
            remove(path)

    def files(self) -> list[list[Path]]:
        """Return all commits, all segments and all bases."""
        return [list(history.numbered(self.path, kind).values()) for kind in reversed(history.KINDS)]

    def discard(self, files: list[list[Path]]) -> None:
        """Delete what ``files`` returned, commits first: whenever this stops, those left have all they need."""
        for paths in files:
            for path in paths:
                remove(path)
            sync_directory(self.path)

    def prune(self, keep_last: int | None, keep_every: int | None) -> None:
        """Delete all commits but so many of the newest, and those whose number the other divides."""
        if keep_last is None and keep_every is None:
            return
        files = history.numbered(self.path, "commit")
        for number in list(files)[: -(keep_last or 1)]:
            if keep_every is None or number % keep_every:
                remove(files[number])

    def free(self, kind: str) -> int:
        """Return the next number of a kind; the folder is read once, as it may hold very many commits."""
        if kind not in self._last:
            self._last[kind] = max(history.numbered(self.path, kind), default=0)
        return self._last[kind] + 1

    def add_segment(self, segment: Segment) -> Segment:
        """Write a segment and return it with the reference to its file."""
        number = self.free("segment")
        segment = replace(segment, file=Reference(number, ""))
        return replace(segment, file=self.add("segment", number, history.segment_content(segment)))

    def add(self, kind: str, number: int, content: Content) -> Reference:
        """Write a file; on return it is durable.

        Raises:
            FishError: Another process has written one of this name.
            OSError: It cannot be written.
        """
        digest, parts = container.serialise(kind, content)
        path = self.path_of(kind, number)
        try:
            publish(path, parts)
        except BaseException as error:
            self._last.clear()  # the name may be there all the same
            if isinstance(error, FileExistsError):
                raise FishError(f"{path} appeared meanwhile: another process writes to this log") from error
            raise
        self._last[kind] = number
        return Reference(number, digest)

    def copy_commit(self, found: CommitFile, segment: Reference) -> Commit:
        """Write a copy of a commit as the newest one."""
        number = self.free("commit")
        metadata = {
            **found.metadata,
            "number": str(number),
            **segment.written("segment"),
            **found.file.written("parent"),
        }
        self.add("commit", number, history.commit_content(metadata, found.snapshot))
        path = self.path_of("commit", number)
        return commit_of(path, metadata, path.stat().st_size)


def commit_of(path: Path, metadata: Mapping[str, str], size: int, seconds: float = 0.0) -> Commit:
    """Return what the metadata in a commit's file say of it."""
    with container.refusing(path):
        return Commit(
            int(metadata["number"]),
            int(metadata["step"]),
            path,
            size,
            metadata["time"],
            metadata["mask"],
            int(metadata["segment"]),
            seconds,
        )


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers if len(numbers) <= 6 else numbers[:5]))
    return shown if len(numbers) <= 6 else f"{shown}, ... {numbers[-1]}"
