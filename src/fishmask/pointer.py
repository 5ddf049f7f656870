"""A small file that stands where a trainer looks for a checkpoint, and names a commit of a log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fishmask import container
from fishmask.errors import FishError
from fishmask.folder import Commit
from fishmask.history import path_of
from fishmask.log import CheckpointLog
from fishmask.publish import replace_file

_START = b'{"fishmask": "commit", '
_LARGEST = 65536  # bytes; what is larger is read as no pointer


class Pointer(NamedTuple):
    """What the file says.

    Attributes:
        commit: Number of the commit.
        step: Its training step.
        time: When it was made.
        log: The folder of its log, for people; the file may have been moved with the log.
    """

    commit: int
    step: int
    time: str
    log: str

    @classmethod
    def to(cls, commit: Commit, log: CheckpointLog) -> "Pointer":
        """Return a pointer to a commit of a log."""
        return cls(commit.number, commit.step, commit.time, str(log.path))

    @classmethod
    def read(cls, path: Path) -> "Pointer | None":
        """Read a pointer; None where there is no file, or one of another kind.

        Raises:
            FishError: The file is damaged.
        """
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
        if not content.startswith(_START):
            return None
        try:
            said = json.loads(content)
            return cls(int(said["commit"]), int(said["step"]), str(said["time"]), str(said["log"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FishError(f"{path} is damaged; the commit that it named can still be had from its log") from error

    def write(self, path: Path) -> None:
        """Write the file, durably; one that is there is replaced."""
        replace_file(path, [_START + json.dumps(self._asdict()).encode()[1:] + b"\n"])

    def find(self, log: CheckpointLog) -> int | None:
        """Return the number that the commit has in a log now (``compact`` gives it another), or None."""
        here = path_of(log.path, "commit", self.commit)
        if here.exists() and self._is(container.peek(here, "commit")):
            return self.commit
        copies = [commit for commit in log.commits if commit.number > self.commit]
        moved = [commit.number for commit in copies if (commit.step, commit.time) == (self.step, self.time)]
        return moved[-1] if moved else None

    def found(self, log: CheckpointLog, path: Path) -> int:
        """Return what ``find`` does, or raise FishError where the file at ``path`` names no commit of this log."""
        number = self.find(log)
        if number is None:
            raise FishError(f"{path} names commit {self.commit} of {self.log}, and {log.path} has no such commit")
        return number

    def same(self, other: "Pointer | None") -> bool:
        """Whether another pointer names the same commit."""
        return other is not None and self[:3] == other[:3]

    def _is(self, metadata: Mapping[str, str]) -> bool:
        return (metadata["step"], metadata["time"]) == (str(self.step), self.time)
