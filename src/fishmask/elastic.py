"""Commits of all workers together, and going on from them after a restart: with as many workers, or with others.

A folder of generations; each is one start of a group of workers and holds one checkpoint log for every worker. A round
counts as kept once all workers have their commit of it, and a restore begins a new generation, so commits of different
groups never mix. ``docs/elastic.md`` is the guide.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fishmask import history
from fishmask import rng as generators
from fishmask.errors import FishError
from fishmask.folder import Commit
from fishmask.generations import ROUNDS, Found, Generations
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
        self._generations = Generations(self.path)
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
            HandshakeError: Not all workers have come to commit; one that has finished is in its last round.
            ValueError: ``state`` uses a name that is taken.
            OSError: This worker could not write. Earlier rounds are as they were, and the next call may try again.
        """
        if state is not None and ROUNDS in state:
            raise ValueError(f"state={ROUNDS!r} is where the state of the rounds goes: choose another name")
        present = self._rounds.state_dict()
        # One that has fewer steps may be in a round of the others already, which knows no other messages.
        agree(self._wire, {"round to keep": str(self._rounds.number)})
        if self._generation == 0:
            self._generation = self._decide(self._first_generation)
        if self._log is None:
            own = self._generations.worker(self._generation, self._wire.rank)
            self._log = CheckpointLog(own, store_base=self._store_base and self._wire.rank == 0)
        self._turn += 1
        held = {**(state or {}), ROUNDS: {"turn": self._turn, "state": present}}
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
        if found := self._generations.numbers:
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
                history.path_of(self._generations.worker(self._generation, worker), "commit", number)
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
            self._generations.forget(self._generation)

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
        following = self._decide(lambda: max(self._generations.numbers, default=0) + 1)
        found, skipped = _newest(self._wire, self._generations)
        if found is None:
            self._begin(following)
            return None
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
        self._begin(following)
        rest = {name: held for name, held in plan.snapshot.state.items() if name != ROUNDS}
        return Resumed(self._rounds.number, self._rounds.step, workers, rest, skipped)

    def _prepare(self, found: Found, state: Mapping[str, Any], deal: Deal | None) -> tuple[_Plan, history.Base]:
        """Read what this worker takes over and compare it with what is here; nothing is changed."""
        rank, workers, here = self._wire.rank, len(found.commits), self._wire.size
        source = rank if rank < workers else 0
        wanted = sorted({0, source} if workers == here else range(workers))
        held = {worker: self._generations.read(found.generation, worker, found.commits[worker]) for worker in wanted}
        first, own = held[0], held[source]
        tuning, protocol = self._rounds.tuning, self._rounds.protocol
        base = first.base()
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

    def _decide(self, work: Callable[[], Any]) -> Any:
        return _decide(self._wire, work)

    def _together(self, error: Exception | None, what: str) -> None:
        """Raise on all workers when one has an error: its own there, a ``FishError`` that names it on the others."""
        text = "" if error is None else f"{type(error).__name__}: {error}"
        try:
            texts = [one.decode() for one in self._wire.gather_bytes(text.encode())]
        finally:
            if error is not None:
                raise error
        if failed := [f"rank {rank}: {one}" for rank, one in enumerate(texts) if one]:
            raise FishError(f"{what}; {'; '.join(failed)}")


def kept_mask(path: str | PathLike[str], group: dist.ProcessGroup | None = None) -> Mask | None:
    """Return a mask to attach with before a restore, so that a script that resumes need not choose one again.

    All workers call it together. With another number of workers and masks of their own, it is a part of the union that
    a restore deals anew.

    Args:
        path: The folder of a ``WorkersLog``.
        group: The process group; by default that of all workers.

    Returns:
        The mask of this worker; None when nothing has been kept yet.

    Raises:
        FishError: Every kept round is damaged.
    """
    wire, generations = Wire(group), Generations(Path(path))
    found, _ = _newest(wire, generations)
    if found is None:
        return None
    held = [generations.read(found.generation, rank, number) for rank, number in enumerate(found.commits)]
    if len(held) == wire.size:
        return held[wire.rank].mask
    shared = held[0].rounds["anchor"] is None
    return held[0].mask if shared else union_of([one.mask for one in held]).split(wire.size)[wire.rank]


def _newest(wire: Wire, generations: Generations) -> tuple[Found | None, list[Problem]]:
    """Return on all workers what rank 0 finds."""

    def find() -> Any:
        found, skipped = generations.newest()
        return found, [(str(path), reason) for path, reason in skipped]

    found, skipped = _decide(wire, find)
    return found and Found(*found), [Problem(Path(path), reason) for path, reason in skipped]


def _decide(wire: Wire, work: Callable[[], Any]) -> Any:
    """Have rank 0 find something out that JSON can hold, and tell all; where it fails, all of them raise."""
    told: dict[str, Any] = {}
    if wire.rank == 0:
        try:
            told = {"answer": work()}
        except Exception as error:  # whatever it is, the others are waiting
            told = {"error": f"{error}"}
    told = json.loads(wire.gather_bytes(json.dumps(told).encode())[0])
    if "error" in told:
        raise FishError(told["error"])
    return told["answer"]
