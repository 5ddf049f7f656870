"""Commits of all workers together, and going on from them after a restart: with as many workers, or with others.

A folder of generations; each is one start of a group of workers and holds one checkpoint log for every worker. A round
counts as kept once all workers have their commit of it, and a restore begins a new generation, so commits of different
groups never mix. ``docs/elastic.md`` is the guide.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from fishmask import history
from fishmask import rng as generators
from fishmask.errors import FishError
from fishmask.folder import Commit
from fishmask.handshake import agree
from fishmask.history import Problem, Segment, Snapshot
from fishmask.log import CheckpointLog
from fishmask.mask import Mask
from fishmask.merge import places_in, union_of
from fishmask.moments import Moments, check_members, gather, give_back
from fishmask.regroup import (
    Deal,
    Policy,
    check_dealt,
    deal_anew,
    mean_states,
    spread_owed,
    states_of,
    with_states,
)
from fishmask.resume import check_base, check_buffers, check_request, resume
from fishmask.rounds import LocalRounds
from fishmask.wire import Wire

_POLICIES = ("keep", "mean", "reset")
_ROUNDS = "rounds"  # under which a commit's state holds that of the rounds


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on.

    Attributes:
        number: The round.
        step: Steps of this worker, or of the one whose place it takes.
        workers: How many had trained until then.
        state: What was given as ``state`` to its commit, by name; objects as their ``state_dict()``.
        skipped: Newer commits that are damaged, with the reason.
    """

    number: int
    step: int
    workers: int
    state: dict[str, Any]
    skipped: list[Problem]


class _Found(NamedTuple):
    """A round that all workers of a generation have kept."""

    generation: int
    commits: list[int]  # the number of each worker's commit


class _Held(NamedTuple):
    """What one worker has kept."""

    path: Path
    chain: list[Segment]
    snapshot: Snapshot

    @property
    def mask(self) -> Mask:
        return self.chain[-1].mask

    @property
    def rounds(self) -> dict[str, Any]:
        return self.snapshot.state[_ROUNDS]["state"]  # type: ignore[no-any-return]

    @property
    def turn(self) -> int:
        return int(self.snapshot.state[_ROUNDS]["turn"])


class _Plan(NamedTuple):
    """What a worker is about to take over."""

    chain: list[Segment]
    snapshot: Snapshot  # with the values and moments for its mask
    states: dict[str, dict[str, Any]] | None  # the optimizer's, where another group's were averaged or left out
    rounds: dict[str, Any]
    rng: dict[str, Any]
    dealt: str  # the masks of all workers, where they were dealt anew


class WorkersLog:
    """A folder in which all workers keep every round, each its own part.

    Make one on every worker, restore, train, and commit right after rounds; all workers call each method together. All
    must see the folder.

    Args:
        path: The folder; made at the first commit.
        rounds: This worker's rounds.
        optimizer: This worker's optimizer.
        policy: What becomes of the workers' optimizer states when another number of workers goes on. "keep": nothing,
            so another number is refused. "mean": every worker gets the mean over the old workers, of an entry over
            those that trained it. "reset": all begin anew. With as many workers as before each gets its own back.
        store_base: Whether worker 0 keeps the base's weights. Without them a restore takes models that hold them.
        keep_last: Keep only this many of the newest rounds, and older generations until there are so many; by default
            everything.

    Raises:
        ValueError: A policy that is not known, ``keep_last`` below 1, or an optimizer of something else.

    Example:
        >>> log = WorkersLog("run/log", rounds, optimizer, policy="mean", keep_last=2)
        >>> resumed = log.restore(state={"schedule": schedule})
        >>> for step in range(resumed.step if resumed else 0, 1000):
        ...     train_one_step(step)
        ...     if rounds.pending == 0:
        ...         log.commit(state={"schedule": schedule})
    """

    def __init__(
        self,
        path: str | PathLike[str],
        rounds: LocalRounds,
        optimizer: Optimizer | None = None,
        *,
        policy: Policy = "keep",
        store_base: bool = True,
        keep_last: int | None = None,
    ) -> None:
        if policy not in _POLICIES:
            raise ValueError(f"policy must be one of {', '.join(map(repr, _POLICIES))}, got {policy!r}")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if optimizer is not None:
            check_members(dict(rounds.tuning.named_parameters()), optimizer)
        self.path, self.policy = Path(path), policy
        self._rounds, self._optimizer, self._store_base, self._keep_last = rounds, optimizer, store_base, keep_last
        self._wire = Wire(rounds._wire.group)  # of its own: what goes over it is not counted as that of a round
        self._generation = 0  # that this group commits to; 0 before it is known
        self._log: CheckpointLog | None = None
        self._turn = 0  # counts the commits that the workers have begun together; a retry is another one
        self._kept: list[int] = []  # numbers of this worker's commits of rounds that all workers have kept

    def __enter__(self) -> "WorkersLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write; the object can be used again."""
        if self._log is not None:
            self._log.close()

    # --- writing ------------------------------------------------------------------------------------------------------

    def commit(self, state: Mapping[str, Any] | None = None) -> Commit:
        """Keep the round that has just ended; on return it is durable on all workers.

        Args:
            state: What else a resuming training needs, by name, as for ``CheckpointLog.commit``.

        Returns:
            This worker's commit; its step is the number of the round.

        Raises:
            FishError: There are steps that have not been exchanged; another worker could not write; the folder is not
                the same for all; or it holds an earlier training and nothing was restored.
            ValueError: ``state`` uses a name that is taken.
            OSError: This worker could not write. Earlier rounds are as they were, and the next call may try again.
        """
        if state is not None and _ROUNDS in state:
            raise ValueError(f"state={_ROUNDS!r} is where the state of the rounds goes: choose another name")
        present = self._rounds.state_dict()
        if self._generation == 0:
            self._generation = self._decide(self._first_generation)
        if self._log is None:
            own = self._folder(self._generation, self._wire.rank)
            self._log = CheckpointLog(own, store_base=self._store_base and self._wire.rank == 0)
        self._turn += 1
        held = {**(state or {}), _ROUNDS: {"turn": self._turn, "state": present}}
        made, error = None, None
        try:
            made = self._log.commit(self._rounds.tuning, self._optimizer, step=self._rounds.number, state=held)
        except Exception as caught:  # whatever it is, the others are waiting
            error = caught
        self._together(error, f"round {self._rounds.number} is not kept")
        assert made is not None
        if not self._kept:
            self._check_shared(made)
        self._kept.append(made.number)
        self._forget_older(self._log)
        return made

    def _first_generation(self) -> int:
        """Return the number of the first generation; there must be none yet."""
        if found := self._generations():
            raise FishError(
                f"{self.path} holds {len(found)} generations of commits already: call restore first to go on from "
                "there, or name another folder"
            )
        return 1

    def _check_shared(self, made: Commit) -> None:
        """Have rank 0 look for the first commits of all workers."""
        numbers = [int(number) for number in self._wire.gather_bytes(str(made.number).encode())]

        def look() -> None:
            paths = [
                history.path_of(self._folder(self._generation, worker), "commit", number)
                for worker, number in enumerate(numbers)
            ]
            if missing := [str(path) for path in paths if not path.exists()]:
                raise FishError(
                    f"rank 0 does not see what others have just written: {', '.join(missing)}. All workers must keep "
                    "their commits in one folder that all of them see"
                )

        self._decide(look)

    def _forget_older(self, log: CheckpointLog) -> None:
        """Delete what need not be kept, now that all workers have a newer round."""
        if self._keep_last is None or len(self._kept) < self._keep_last:
            return
        del self._kept[: -self._keep_last]
        for number in set(log.numbers) - set(self._kept):  # also those that other workers could not write
            log.delete(number)
        if self._wire.rank == 0:
            for generation in self._generations():
                if generation < self._generation:
                    shutil.rmtree(self._generation_folder(generation), ignore_errors=True)  # tried again next time

    # --- reading ------------------------------------------------------------------------------------------------------

    def restore(self, state: Mapping[str, Any] | None = None, *, deal: Deal | None = None) -> Resumed | None:
        """Go on from the newest round that all workers have kept; with as many workers bit for bit.

        With another number of workers, a worker takes the generators of random numbers and ``state`` of the old worker
        of its rank; one that has none keeps its generators and takes the state of worker 0. Values, buffers and the
        outer optimizer are the same for all. With masks of their own the union is dealt anew. What coding of low
        precision has not sent yet is divided among the new workers.

        Args:
            state: Objects with ``load_state_dict``, by the names that they had in the commit.
            deal: With masks of their own and another number of workers: returns the mask of each from the union and
                the number of workers. By default entries that all had go to all, and the rest is dealt out
                by ``Mask.split``.

        Returns:
            Where the training goes on; None when nothing has been kept yet.

        Raises:
            FishError: Every kept round is damaged, the model is another one, or another number of workers would go on
                under the policy "keep"; on all workers, and before anything is changed.
            ValueError: The optimizer, ``state`` or ``deal`` does not fit.
            HandshakeError: The workers were made with different arguments.
        """
        agree(self._wire, {"policy": self.policy, "keep_last": str(self._keep_last)})
        decided = self._decide(self._find)
        if decided["found"] is None:
            self._begin(decided["next"])
            return None
        found = _Found(*decided["found"])
        skipped = [Problem(Path(path), reason) for path, reason in decided["skipped"]]
        workers, here = len(found.commits), self._wire.size
        if workers != here and self.policy == "keep":
            raise FishError(
                f"{workers} workers have trained until here, now there are {here}, and policy='keep' lets no other "
                "number go on: say with policy='mean' or policy='reset' what becomes of their optimizer states, or "
                f"start {workers} workers. Nothing was changed"
            )
        plan, error = None, None
        try:
            plan, base = self._prepare(found, state or {}, deal)
        except Exception as caught:
            error = caught
        self._together(error, "nothing was restored")
        assert plan is not None
        agree(self._wire, {"what deal= returned": plan.dealt})
        try:
            for name, held in (state or {}).items():
                held.load_state_dict(plan.snapshot.state[name])
            self._apply(plan, base)
        except Exception as caught:
            error = caught
        self._together(error, "the restore broke off halfway: start the workers again")
        self._rounds.load_state_dict(plan.rounds)
        self._rounds.handshake()
        generators.reinstate(plan.rng)
        self._begin(decided["next"])
        rest = {name: held for name, held in plan.snapshot.state.items() if name != _ROUNDS}
        return Resumed(self._rounds.number, self._rounds.step, workers, rest, skipped)

    def _find(self) -> dict[str, Any]:
        """Find the newest round that all workers of one generation have, intact."""
        generations, skipped = self._generations(), []
        following = max(generations, default=0) + 1
        for generation in reversed(generations):
            first = CheckpointLog(self._folder(generation, 0))
            for number in reversed(first.numbers):
                commits, problem = self._complete(generation, number)
                if problem is not None:
                    skipped.append([str(problem.path), problem.reason])
                elif commits:
                    return {"found": [generation, commits], "next": following, "skipped": skipped}
        if skipped:
            told = ";\n  ".join(reason for _, reason in skipped)
            raise FishError(f"{self.path} holds no round that all workers have kept and that is not damaged:\n  {told}")
        return {"found": None, "next": following, "skipped": []}

    def _complete(self, generation: int, number: int) -> tuple[list[int], Problem | None]:
        """Return the commits of all workers that were made together with one of worker 0, or what is wrong.

        Without a problem none are returned where a worker has not come to make its own.
        """
        commits, problem = [number], None
        try:
            first = self._read(generation, 0, number)
            self._base(first)
        except (FishError, OSError) as error:
            return [], Problem(history.path_of(self._folder(generation, 0), "commit", number), str(error))
        for worker in range(1, first.rounds["workers"]):
            for other in reversed(CheckpointLog(self._folder(generation, worker)).numbers):
                try:
                    turn = self._read(generation, worker, other).turn
                except (FishError, OSError) as error:
                    path = history.path_of(self._folder(generation, worker), "commit", other)
                    problem = problem or Problem(path, str(error))
                    continue
                if turn == first.turn:
                    commits.append(other)
                if turn <= first.turn:
                    break
            if len(commits) == worker:
                return [], problem
        return commits, None

    def _read(self, generation: int, worker: int, number: int) -> _Held:
        log = CheckpointLog(self._folder(generation, worker))
        commit, chain, snapshot = log.read(number)
        return _Held(commit.path, chain, snapshot)

    def _base(self, first: _Held) -> history.Base:
        """Read the base that worker 0 has kept."""
        file = first.chain[-1].base
        return history.read_base(first.path.parent, file.number, file.digest)

    def _prepare(self, found: _Found, state: Mapping[str, Any], deal: Deal | None) -> tuple[_Plan, history.Base]:
        """Read what this worker takes over and compare it with what is here; nothing is changed."""
        rank, workers, here = self._wire.rank, len(found.commits), self._wire.size
        source = rank if rank < workers else 0
        wanted = {0, source} if workers == here else set(range(workers))
        held = {worker: self._read(found.generation, worker, found.commits[worker]) for worker in sorted(wanted)}
        first, own = held[0], held[source]
        tuning, protocol = self._rounds.tuning, self._rounds.protocol
        base = self._base(first)
        check_base(base, tuning.model, tuning)
        check_buffers(own.snapshot, tuning.model, own.path)
        check_request(own.snapshot, self._optimizer, state, own.path)
        if self._optimizer is not None:
            check_members(dict(tuning.named_parameters()), self._optimizer)
        if (first.rounds["anchor"] is None) != (protocol.masks == "shared"):
            raise FishError(
                f"the rounds in {self.path} were not of masks={protocol.masks!r}: make LocalRounds as they were made"
            )
        random = {**own.chain[-1].rng, **own.snapshot.rng} if rank < workers else {}
        if workers == here:
            return _Plan(own.chain, own.snapshot, None, own.rounds, random, ""), base
        everyone = [held[worker] for worker in range(workers)]
        before = [one.mask for one in everyone]
        union = union_of(before)
        dealt = deal(union, here) if deal and protocol.masks == "own" else deal_anew(before, here, protocol)
        check_dealt(dealt, union, here)
        values: Tensor = first.snapshot.values
        if protocol.masks == "own":
            values = first.rounds["anchor"][places_in(union, dealt[rank])]
        states: dict[str, dict[str, Any]] = {}
        moments = [one.snapshot.moments for one in everyone]
        if self.policy == "mean" and self._optimizer is not None:
            if any(one is not None and one.rest["own"] for one in moments):
                raise ValueError("the optimizer keeps state that belongs to no parameter: restore with policy='reset'")
            all_states = [{} if m is None else states_of(mask, m) for mask, m in zip(before, moments, strict=True)]
            states = mean_states(before, all_states, dealt[rank])
        rounds = dict(own.rounds)
        if protocol.payload != "float32" and all(one.rounds["residual"] for one in everyone):
            owed = [one.rounds["residual"] for one in everyone]
            rounds["residual"] = spread_owed(protocol, before, owed, dealt, rank)
        else:
            rounds["residual"] = None
        # What worker 0's earlier masks have sealed, then this worker's part of the union.
        chain = [*first.chain[:-1], replace(first.chain[-1], mask=dealt[rank])]
        snapshot = replace(own.snapshot, values=values, moments=moments[0])
        digests = ", ".join(mask.digest for mask in dealt)
        return _Plan(chain, snapshot, states, rounds, random, digests), base

    def _apply(self, plan: _Plan, base: history.Base) -> None:
        """Bring this worker's model and optimizer to the state of the plan."""
        tuning, optimizer = self._rounds.tuning, self._optimizer
        if plan.states is None or optimizer is None:
            resume(tuning, optimizer, base, plan.chain, plan.snapshot)
            return
        resume(tuning, optimizer, base, plan.chain, replace(plan.snapshot, moments=None))
        mask, named = plan.chain[-1].mask, dict(tuning.named_parameters())
        named = {name: named[name] for name in mask.indices}
        old: Moments | None = plan.snapshot.moments
        assert old is not None  # check_request has seen to it
        give_back(named, optimizer, with_states(gather(named, optimizer), old, plan.states, mask))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, generation: int) -> None:
        """Have the next commit be the first of a generation."""
        self.close()
        self._log, self._generation, self._turn, self._kept = None, generation, 0, []

    def _generation_folder(self, generation: int) -> Path:
        return self.path / f"generation-{generation:08d}"

    def _folder(self, generation: int, worker: int) -> Path:
        return self._generation_folder(generation) / f"worker-{worker:05d}"

    def _generations(self) -> list[int]:
        """Return the numbers of all generations, ascending."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        matches = (re.fullmatch(r"generation-(\d{8,})", path.name) for path in found)
        return sorted(int(match[1]) for match in matches if match)

    def _decide(self, work: Callable[[], Any]) -> Any:
        """Have rank 0 find something out and tell all; where it fails, all of them raise."""
        told: dict[str, Any] = {}
        if self._wire.rank == 0:
            try:
                told = {"answer": work()}
            except Exception as error:  # whatever it is, the others are waiting
                told = {"error": f"{error}"}
        told = json.loads(self._wire.gather_bytes(json.dumps(told).encode())[0])
        if "error" in told:
            raise FishError(told["error"])
        return told["answer"]

    def _together(self, error: Exception | None, what: str) -> None:
        """Raise on all workers when one has an error: its own there, a ``FishError`` that names it on the others."""
        text = "" if error is None else f"{type(error).__name__}: {error}"
        texts = [one.decode() for one in self._wire.gather_bytes(text.encode())]
        if error is not None:
            raise error
        if failed := [f"rank {rank}: {one}" for rank, one in enumerate(texts) if one]:
            raise FishError(f"{what}; {'; '.join(failed)}")
