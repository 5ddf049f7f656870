"""The folder in which workers keep their rounds together: which generations there are, and which round all have.

A generation is one start of a group of workers, and holds one checkpoint log for each of them. Commits that were made
together have the same turn.
"""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from fishmask import history
from fishmask.errors import FishError
from fishmask.history import Base, Problem, Segment, Snapshot
from fishmask.log import CheckpointLog
from fishmask.mask import Mask

ROUNDS = "rounds"  # under which a commit's state holds that of the rounds, and the turn


class Found(NamedTuple):
    """A round that all workers of a generation have kept.

    Attributes:
        generation: Its number.
        commits: The number of each worker's commit, in the order of their ranks.
    """

    generation: int
    commits: list[int]


class Held(NamedTuple):
    """What one worker has kept of a round.

    Attributes:
        path: Its commit.
        chain: The segments that the commit builds on, oldest first.
        snapshot: What the commit holds.
    """

    path: Path
    chain: list[Segment]
    snapshot: Snapshot

    @property
    def mask(self) -> Mask:
        """Its mask."""
        return self.chain[-1].mask

    @property
    def rounds(self) -> dict[str, Any]:
        """The state of its rounds."""
        return self.snapshot.state[ROUNDS]["state"]  # type: ignore[no-any-return]

    @property
    def turn(self) -> int:
        """The number of the commit among those that the workers have begun together."""
        return int(self.snapshot.state[ROUNDS]["turn"])

    def base(self) -> Base:
        """Read the base that it builds on; errors as for ``history.read_base``."""
        return history.read_base(self.path.parent, self.chain[-1].base.number, self.chain[-1].base.digest)


class Generations:
    """The generations in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def numbers(self) -> list[int]:
        """The numbers of all generations, ascending."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        matches = (re.fullmatch(r"generation-(\d{8,})", path.name) for path in found)
        return sorted(int(match[1]) for match in matches if match)

    def worker(self, generation: int, rank: int) -> Path:
        """Return the folder of a worker's checkpoint log."""
        return self._folder(generation) / f"worker-{rank:05d}"

    def read(self, generation: int, rank: int, number: int) -> Held:
        """Read a worker's commit.

        Raises:
            FishError: It is missing or damaged.
        """
        commit, chain, snapshot = CheckpointLog(self.worker(generation, rank)).read(number)
        return Held(commit.path, chain, snapshot)

    def newest(self) -> tuple[Found | None, list[Problem]]:
        """Find the newest round that all workers of one generation have, intact.

        Returns:
            The round, or None when there is none yet, and what is damaged of newer ones.

        Raises:
            FishError: There is none, and some are damaged.
        """
        skipped: list[Problem] = []
        for generation in reversed(self.numbers):
            for number in reversed(CheckpointLog(self.worker(generation, 0)).numbers):
                commits, problem = self._complete(generation, number)
                if problem is not None:
                    skipped.append(problem)
                elif commits:
                    return Found(generation, commits), skipped
        if skipped:
            told = ";\n  ".join(problem.reason for problem in skipped)
            raise FishError(f"{self.path} holds no round that all workers have kept and that is not damaged:\n  {told}")
        return None, []

    def forget(self, before: int) -> None:
        """Delete all generations before one, as far as possible; what is left is tried again next time."""
        for generation in self.numbers:
            if generation < before:
                shutil.rmtree(self._folder(generation), ignore_errors=True)

    def _folder(self, generation: int) -> Path:
        return self.path / f"generation-{generation:08d}"

    def _complete(self, generation: int, number: int) -> tuple[list[int], Problem | None]:
        """Return the commits of all workers that were made together with one of worker 0, or what is wrong.

        Without a problem none are returned where a worker has not come to make its own.
        """
        commits, problem = [number], None
        try:
            first = self.read(generation, 0, number)
            first.base()
        except (FishError, OSError) as error:
            return [], Problem(history.path_of(self.worker(generation, 0), "commit", number), str(error))
        for rank in range(1, first.rounds["workers"]):
            log = self.worker(generation, rank)
            for other in reversed(CheckpointLog(log).numbers):
                try:
                    turn = self.read(generation, rank, other).turn
                except (FishError, OSError) as error:
                    problem = problem or Problem(history.path_of(log, "commit", other), str(error))
                    continue
                if turn == first.turn:
                    commits.append(other)
                if turn <= first.turn:
                    break
            if len(commits) == rank:
                return [], problem
        return commits, None
