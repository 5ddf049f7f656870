"""Local rounds whose members come and go: the exchange of one mask's values through a manager such as torchft's.

No quorum code is here: who takes part in a round, and when a state is handed over, is the manager's business. A round
is that of ``fishmask.LocalRounds``: propose, reduce on scratch memory, vote, commit. ``docs/elastic.md`` is the guide.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fishmask.attach import Tuning
from fishmask.buffers import read_buffers, write_buffers
from fishmask.errors import FishError, HandshakeError, RoundError
from fishmask.fingerprint import Base, fingerprint, values_digest
from fishmask.outer import MakeOuter, Outer
from fishmask.protocol import Reduction
from fishmask.round_log import Round

_KEY = "fishmask"  # under which the manager keeps our state
_BITS = 60  # of a digest in a whole number of 64 bits


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> bool:
        """Wait until it has ended; its tensor then holds the result, if the manager has seen no error."""


class Manager(Protocol):
    """What is asked of a manager: the part of ``torchft.Manager`` that is used here."""

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Have members that join or have fallen behind be given the state of one that has not."""

    def start_quorum(self) -> None:
        """Find out who takes part, and load the state of another member where this one has fallen behind."""

    def num_participants(self) -> int:
        """Return how many take part."""

    def allreduce(self, tensor: Tensor, *, reduce_op: Any) -> Work:
        """Reduce a tensor over the members, in place; a failure is kept for ``errored``."""

    def errored(self) -> Any:
        """Return what has failed since the quorum, or None."""

    def report_error(self, e: Exception) -> None:
        """Have ``should_commit`` say no."""

    def should_commit(self) -> bool:
        """Tell whether nothing has failed since the quorum."""


class ManagedRounds:
    """Local rounds of one shared mask among members that come and go, through a manager such as torchft's.

    Make one on every member (replica group of torchft) once the model is attached. It joins at once: it waits for the
    next round of the others, and starts from the values of their last one. From then on any optimizer of
    ``tuning.parameters()`` drives it, as with ``LocalRounds``. A round in which a member dies changes nothing and is
    tried again with those that are left, as often as the manager's ``max_retries`` allows.

    Args:
        tuning: The attached model's tuning. Its mask must stay.
        manager: A ``torchft.Manager`` made with ``use_async_quorum=False``, and with a ``quorum_timeout`` longer than
            the time from one round to the next.
        every: Steps from one round to the next.
        reduction: "mean" over the members that have trained since the last round, or "sum" of their differences.
        outer: Makes the optimizer that applies the merged difference, as for ``LocalRounds``.

    Attributes:
        number: Of the last round that was committed.
        step: Steps of this member since it joined first.
        pending: Steps since the last round.
        attempts: Quorums that this member has been in, of rounds that failed too.
        last: What the last round did; None before the first.

    Raises:
        ValueError: An argument is out of range, or the manager works with an asynchronous quorum.
        HandshakeError: This member trains something else than the others.
        RoundError: There is no quorum.

    Source:
        ``torchft.local_sgd`` (the use of the manager: quorum, all-reduce of a copy, ``should_commit`` as the vote).

    Example:
        >>> manager = torchft.Manager(
        ...     pg=torchft.ProcessGroupGloo(), load_state_dict=None, state_dict=None,
        ...     min_replica_size=1, use_async_quorum=False, quorum_timeout=timedelta(hours=1),
        ... )
        >>> with ManagedRounds(tuning, manager, every=30):
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        tuning: Tuning,
        manager: Manager,
        *,
        every: int,
        reduction: Reduction = "mean",
        outer: MakeOuter | None = None,
    ) -> None:
        if not isinstance(tuning, Tuning):
            raise TypeError(f"ManagedRounds takes the Tuning that attach returned, got {type(tuning).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is a number of steps of at least 1, got {every!r}")
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if getattr(manager, "_use_async_quorum", False):
            raise ValueError(
                "the manager works with an asynchronous quorum, so a member could join in the middle of a round: make "
                "it with use_async_quorum=False"
            )
        tuning._check_attached()
        self.tuning, self.every, self.reduction = tuning, every, reduction
        self.number = self.step = self.pending = self.attempts = 0
        self.last: Round | None = None
        self._manager, self._mask = manager, tuning.mask
        self._anchor = tuning.values.detach().clone()
        self._buffers = read_buffers(tuning.model, self._anchor.device)
        self._outer = None if outer is None else Outer(outer, tuning.mask, self._anchor)
        self._trains = {
            "mask": tuning.mask.digest,
            "base": Base.of(fingerprint(tuning.originals.base(tuning.model), tuning.mask)).digest,
            "every": str(every),
            "reduction": reduction,
            "outer optimizer": "none" if self._outer is None else repr(self._outer.optimizer),
        }
        manager.register_state_dict_fn(_KEY, self.load_state_dict, self.state_dict)
        self.round()
        self._handle = tuning.on_step(self._stepped)

    def __enter__(self) -> "ManagedRounds":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None and self.pending:
                self.round()
        finally:
            self.close()

    def close(self) -> None:
        """Stop counting steps; the values stay as they are. The manager is the caller's to shut down."""
        self._handle.remove()

    def round(self) -> Round | None:
        """Begin a round now, and try it again while members are lost in it; steps do it by themselves.

        Returns:
            What it did; None when no member had trained since the last.

        Raises:
            RoundError: A member's values are not finite, or the members came to different values; on all of them. Or
                there is no quorum any more. Values and local steps are as they were.
            HandshakeError: The members do not train the same thing; on all of them.
        """
        self._check()
        while True:
            begin, steps = perf_counter(), self.pending
            self.attempts += 1
            try:
                self._manager.start_quorum()  # a member that has fallen behind is now where the others are
            except FishError:
                raise
            except Exception as error:  # the manager's own errors are of many types
                raise RoundError(f"there is no quorum: {error}") from error
            steps = min(steps, self.pending)
            waited = perf_counter() - begin
            refusal, merged = None, None
            try:
                merged = self._exchange()
            except FishError as error:
                refusal = error
                self._manager.report_error(error)
            try:
                committed = self._manager.should_commit()
            except Exception as error:
                self._undo(merged)
                raise RoundError(f"round {self.number + 1} failed, and nothing was changed: {error}") from error
            if refusal is not None:
                raise refusal
            if not committed:
                self._undo(merged)
                continue
            if merged is None:
                return None
            self._phase("commit")
            return self._commit(merged, steps, waited, perf_counter() - begin - waited)

    def discard(self) -> None:
        """Go back to the values and buffers of the last round, after one that failed."""
        self._check()
        self._give()

    def state_dict(self) -> dict[str, Any]:
        """Return what a member that joins is given: the last round, and nothing of what this one has learnt since.

        Right after a round, a ``CheckpointLog`` takes it as part of its ``state``, beside the manager's own.
        """
        return {
            "trains": self._trains,
            "number": self.number,
            "anchor": self._anchor.cpu(),
            "floats": self._buffers[0].cpu(),
            "wholes": self._buffers[1].cpu(),
            "outer": self._outer.state_dict() if self._outer else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be where another member was after its last round; what this one has learnt since its own is lost.

        Raises:
            HandshakeError: The other trains something else. Nothing has changed then.
        """
        if other := [name for name, fact in self._trains.items() if state["trains"].get(name) != fact]:
            raise HandshakeError(f"this member does not train what the others do: {', '.join(other)} differs", {})
        device = self._anchor.device
        self.number, self._anchor = state["number"], state["anchor"].to(device)
        self._buffers = state["floats"].to(device), state["wholes"].to(device)
        if self._outer is not None:
            self._outer.load_state_dict(state["outer"])
        self._give()

    # --- a round ------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer) -> None:
        self._check()
        self.pending += 1
        self.step += 1
        if self.pending >= self.every:
            self.round()

    def _exchange(self) -> "_Merged | None":
        """Propose, reduce and vote; what the members came to, or None where none had trained or one was lost."""
        manager, device = self._manager, self._anchor.device
        self._phase("propose")
        values, (floats, wholes) = self.tuning.values.detach(), read_buffers(self.tuning.model, device)
        finite = bool(values.isfinite().all()) and bool((floats.isfinite() | ~self._buffers[0].isfinite()).all())
        facts = [self.number, *map(_bits, self._trains.values()), _bits(values_digest(self._anchor))]
        trained = int(self.pending > 0)
        largest = self._largest([*facts, *(-fact for fact in facts), int(not finite), trained])
        if largest is None:
            return None
        count = len(facts)
        names = ("round", *self._trains, "values")
        if other := [name for i, name in enumerate(names) if largest[i] != -largest[count + i]]:
            raise HandshakeError(f"the members do not train the same thing: they differ in {', '.join(other)}", {})
        if largest[-2]:
            whose = "some here" if not finite else "those of another member"
            raise RoundError(f"round {self.number + 1} failed, and nothing was changed: values are not finite, {whose}")
        if not largest[-1]:
            return None
        self._phase("reduce")
        moved = torch.where(floats == self._buffers[0], 0.0, floats - self._buffers[0])  # infinite ones may be equal
        scratch = torch.cat([values - self._anchor, moved, torch.ones(1, device=device)])
        scratch *= trained
        manager.allreduce(scratch, reduce_op=dist.ReduceOp.SUM).wait()
        counts = wholes.clone()
        if len(counts):
            manager.allreduce(counts, reduce_op=dist.ReduceOp.MAX).wait()
        if manager.errored():
            return None
        self._phase("vote")
        return self._vote(scratch, counts)

    def _vote(self, scratch: Tensor, wholes: Tensor) -> "_Merged":
        """Come to the round's values from the sums, and find out whether the others come to the same."""
        k, trained, members = len(self._anchor), int(scratch[-1]), self._manager.num_participants()
        total, moved = scratch[:k].double(), scratch[k:-1].double()
        values = (self._anchor.double() + total / (trained if self.reduction == "mean" else 1)).float()
        floats = (self._buffers[0].double() + moved / trained).float()
        before = self._outer.state_dict() if self._outer else {}
        wrong = ""
        try:
            if self._outer:
                values = self._outer.step(self._anchor, values)
            if not bool(values.isfinite().all()):
                wrong = "the merged values are not finite"
        except Exception as error:  # a user's optimizer may raise anything
            wrong = f"{type(error).__name__}: {error}"
        sent = 2 * (members - 1) * (scratch.nbytes + wholes.nbytes) // members  # by a ring
        merged = _Merged(values, (floats, wholes), trained, sent, before)
        result = _bits(values_digest(torch.cat([values, floats])))
        largest = self._largest([result, -result, int(bool(wrong))])
        # Where a member was lost, the manager has the error, and should_commit says no.
        if largest is not None and (largest[2] or largest[0] != -largest[1]):
            self._undo(merged)
            told = wrong or ("it went wrong on another member" if largest[2] else "the members came to other values")
            raise RoundError(f"round {self.number + 1} failed, and nothing was changed: {told}")
        return merged

    def _commit(self, merged: "_Merged", steps: int, waited: float, wired: float) -> Round:
        self._anchor, self._buffers = merged.values, merged.buffers
        self.number += 1
        self._give()
        self.last = Round(
            number=self.number,
            step=self.step,
            steps=steps,
            participants=merged.participants,
            payload_bytes=merged.sent,
            other_bytes=0,
            wait_seconds=waited,
            wire_seconds=wired,
            digest=values_digest(self._anchor),
        )
        return self.last

    def _undo(self, merged: "_Merged | None") -> None:
        """Have the outer optimizer forget a step that does not count."""
        if self._outer is not None and merged is not None:
            self._outer.load_state_dict(merged.outer)

    def _phase(self, name: str) -> None:
        """Mark the parts of a round, for tests of what happens when a member dies in one."""

    # --- inside -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _give(self) -> None:
        self.tuning.values.copy_(self._anchor)
        self.tuning.write_back()
        write_buffers(self.tuning.model, *self._buffers)
        self.pending = 0

    def _largest(self, numbers: list[int]) -> list[int] | None:
        """Return the largest of each number over the members; None when one was lost."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self._anchor.device)
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.MAX).wait()
        return None if self._manager.errored() else tensor.tolist()

    def _check(self) -> None:
        self.tuning._check_attached()
        if self.tuning.mask is not self._mask:
            raise FishError("the mask was changed: members that come and go train one mask throughout")


@dataclass
class _Merged:
    """What a round came to."""

    values: Tensor
    buffers: tuple[Tensor, Tensor]
    participants: int  # that have trained
    sent: int  # bytes
    outer: dict[str, Any]  # the outer optimizer's state before it


def _bits(text: str) -> int:
    """Return a whole number that tells texts apart."""
    return int(hashlib.sha256(text.encode()).hexdigest()[: _BITS // 4], 16)
