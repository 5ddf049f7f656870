"""Local rounds: workers train for many steps on their masked entries, then exchange only those.

The second use of a fixed mask in the paper (section 3), on real processes. A round is

1. *propose*: every worker tells in 64 bytes where it stands, and whether anything is wrong with it;
2. *reduce*: the values become one vector, on scratch memory;
3. *vote*: every worker tells the digest of what it got;
4. *commit*: if all agree, the vector becomes the values, in one write.

Whatever fails before the commit fails on all workers, and leaves all their values as they were.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fishmask import exchange
from fishmask.attach import Tuning
from fishmask.ballot import Standing, propose, vote
from fishmask.buffers import read_buffers, write_buffers
from fishmask.errors import FishError, HandshakeError, RoundError
from fishmask.fingerprint import values_digest
from fishmask.handshake import Facts, agree, checksums
from fishmask.mask import Mask, Patterns
from fishmask.merge import Proposal, Residual, Shared
from fishmask.originals import persistent_buffers
from fishmask.outer import MakeOuter, Outer
from fishmask.payload import Payload
from fishmask.protocol import Denominator, Masks, Mode, Protocol, Reduction, preset_of
from fishmask.quantized import weights
from fishmask.round_log import Round, write_round, write_start
from fishmask.union import Union, masks_of
from fishmask.wire import Wire

_KNOWN = (RoundError, HandshakeError)  # errors that all workers have at once
# What a handshake sets, and a refused one leaves as it was.
_IN_COMMON = ("number", "step", "pending", "_flying", "_given", "_loads", "_union", "_anchor", "_residual", "_buffers",
              "_outer", "_digest")  # fmt: skip
_VERSION = 1  # of the records that workers exchange, and of the state that a commit keeps


@dataclass(frozen=True)
class _Launched:
    """What a worker takes into a round."""

    standing: Standing
    message: str
    values: Tensor
    buffers: tuple[Tensor, Tensor]
    step: int
    steps: int


@dataclass(frozen=True)
class _Merged:
    """What a round came to."""

    values: Tensor
    residual: Residual
    buffers: tuple[Tensor, Tensor] | None
    round: Round


@dataclass(frozen=True)
class _Outcome:
    """What the workers did together: nothing when none had trained."""

    finished: bool  # all workers are
    merged: _Merged | None


class LocalRounds:
    """Has workers train apart for ``every`` steps at a time and then merge the values of their masked entries.

    Make one on every worker of a process group (``torchrun``; gloo or NCCL) once the model is attached: it compares
    masks, weights and settings of all workers and refuses on all of them where they differ. From then on any optimizer
    of ``tuning.parameters()`` drives it: every ``every``-th step ends with a round. A process without a group trains
    alone by the same code. Leave the ``with`` block, or call ``finish``, to merge what is left.

    Args:
        tuning: The attached model's tuning.
        every: Steps from one round to the next (H).
        masks: "shared", one mask for all workers, or "own", every worker its own; entries of others are updated too.
        reduction: "mean" or "sum" of the workers' differences; a mean is over those that have trained.
        denominator: For masks that differ, what a mean divides by: the number of "participants", or of the "holders"
            of an entry.
        head: For masks that differ, how the entries that all workers hold are reduced.
        mode: "exact" sums in float64 in the order of the ranks, so that equal inputs give equal bits; "fast" leaves the
            sum to the backend's all-reduce. Both send as many bytes.
        payload: "float32", or differences as "bfloat16" or "int8" with what coding loses added to the next round.
        outer: Makes the optimizer that applies the merged difference as its gradient, for instance
            ``lambda values: torch.optim.SGD(values, lr=0.7, momentum=0.9, nesterov=True)`` (DiLoCo). By default the
            merged values are taken as they are.
        overlap: Train on for so many steps while a round is under way. Its result is then that many steps old when it
            arrives, and is added to what was learnt meanwhile.
        preset: A protocol of the paper by name (see ``fishmask.protocol.PRESETS``); what is left out is its.
        log: A file to which rank 0 adds one JSON line for every round; ``fishmask rounds`` reads it.
        group: The process group; by default that of all workers.

    Attributes:
        tuning: The tuning.
        protocol: The rules.
        refresh_every: Rounds from one mask to the next that the preset asks for, or None.
        warm_up_epochs: Epochs of dense training before the first mask that the preset asks for.
        number: Of the last round that was committed.
        step: Steps of this worker since training began.
        pending: Steps of this worker since its last round.
        last: What the last round did, or None.

    Raises:
        ValueError: An argument is out of range, or missing where masks differ.
        FishError: The tuning has other ``LocalRounds`` that are not closed.
        TypeError: ``tuning`` is none.
        HandshakeError: The workers do not train the same thing, or the first of them cannot write the log.
        RoundError: The connection broke off.
        OSError: A single process cannot write the log.

    Source:
        Section 3 of the paper; Douillard et al., "DiLoCo", 2023, for the outer optimizer; Karimireddy et al., "Error
        Feedback Fixes SignSGD", 2019, for payloads of low precision.

    Example:
        >>> tuning = fishmask.attach(model, mask)
        >>> optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
        >>> with fishmask.LocalRounds(tuning, every=30):
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        tuning: Tuning,
        *,
        every: int,
        masks: Masks | None = None,
        reduction: Reduction | None = None,
        denominator: Denominator | None = None,
        head: Reduction | None = None,
        mode: Mode = "exact",
        payload: Payload = "float32",
        outer: MakeOuter | None = None,
        overlap: int = 0,
        preset: str | None = None,
        log: str | Path | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(tuning, Tuning):
            raise TypeError(f"LocalRounds takes the Tuning that fishmask.attach returned, got {type(tuning).__name__}")
        wanted = preset_of(preset)
        self.protocol = Protocol(
            every=every,
            masks=masks or wanted.masks,
            reduction=reduction or wanted.reduction,
            denominator=denominator,
            head=head or (wanted.head if masks != "shared" else None),
            mode=mode,
            payload=payload,
            overlap=overlap,
        )
        if tuning.shards is not None:
            tuning.shards.refuse_apart(group, every, overlap, self.protocol.masks)
        if any(isinstance(getattr(hook, "__self__", None), LocalRounds) for hook in tuning.step_hooks):
            raise FishError("this Tuning has LocalRounds already, which would exchange it too: close() them first")
        self.tuning = tuning
        self.refresh_every, self.warm_up_epochs = wanted.refresh_every, wanted.warm_up_epochs
        self.number = self.step = self.pending = 0
        self.last: Round | None = None
        self._wire = Wire(group).apart() if overlap else Wire(group)
        self._log, self._make_outer = None if log is None else Path(log), outer
        self._executor = ThreadPoolExecutor(1, "fishmask-round") if overlap and self._wire.size > 1 else None
        self._flying: tuple[_Launched, Future[_Outcome]] | None = None
        self._broken = False
        self._given: dict[str, Any] | None = None
        # What all workers have had in common since the last round.
        self._union: Union
        self._anchor: Tensor
        self._residual: Residual
        self._buffers: tuple[Tensor, Tensor]
        self._outer: Outer | None
        self._digest: str
        self.handshake()
        if wanted.workers not in (None, self._wire.size) and self._wire.size > 1:
            warnings.warn(
                f"preset {preset} is the paper's with {wanted.workers} workers; there are {self._wire.size}",
                UserWarning,
                stacklevel=2,
            )
        self._begin_log()
        self._handle = tuning.on_step(self._stepped)

    # --- its life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "LocalRounds":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.finish()
            elif isinstance(error, Exception) and not isinstance(error, _KNOWN) and not self._broken:
                self._tell_failure(error)
        finally:
            self.close()

    def close(self) -> None:
        """Stop counting steps; the values stay as they are."""
        self._handle.remove()
        if self._executor is not None:
            self._executor.shutdown()

    def finish(self) -> None:
        """Merge what is left, once all workers have come to this point; those that are early wait for the others.

        Workers may have taken different numbers of steps: one that is here takes part in the rounds of the others, to
        which it adds nothing.

        Raises:
            RoundError: As for ``round``; where the others go on after it, this worker has to call ``finish`` again.
        """
        self._land()
        while not self._exchange_now(finished=True).finished:
            pass

    def round(self) -> Round | None:
        """Begin a round now; all workers must. Steps do it by themselves.

        Returns:
            What it did; None when no worker had trained since the last.

        Raises:
            RoundError: It failed; on all workers that are alive, with values and local steps as they were.
        """
        self._land()
        merged = self._exchange_now().merged
        return None if merged is None else merged.round

    def discard(self) -> None:
        """Go back to the values and buffers of the last round, after one that failed; call it on all workers."""
        self._check()
        self._land()
        self._union.give(self._anchor)
        write_buffers(self.tuning.model, *self._buffers)
        self.pending = 0

    # --- the mask -----------------------------------------------------------------------------------------------------

    def refresh(
        self,
        scores: Mapping[str, Tensor],
        optimizer: Optimizer | None = None,
        *,
        density: float,
        keep: Patterns = (),
        exclude: Patterns = (),
    ) -> Mask:
        """Choose a new mask from the scores of all workers together, right after a round.

        Args:
            scores: This worker's scores, summed over its own share of the examples on the merged model; those of a
                worker are added to those of the others.
            optimizer: As for ``set_mask``.
            density: Share of all entries that a worker trains, as for ``Mask.from_scores``.
            keep: Parameters that are trained whole, by all workers.
            exclude: Parameters never chosen from.

        Returns:
            The new mask of this worker. With masks of their own it is dealt from the best entries of all (see
            ``fishmask.exchange.deal``).

        Raises:
            ValueError: As for ``Mask.from_scores``.
            HandshakeError: The workers' scores are of different models, or are not finite.
            FishError: There are steps that have not been exchanged.
        """
        self._check_exchanged("choose a new mask")
        choose = exchange.choose if self.protocol.masks == "shared" else exchange.deal
        mask = choose(scores, density, keep, exclude, group=self._wire)
        self.set_mask(mask, optimizer)
        return mask

    def set_mask(self, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Train other entries from now on; all workers must call it, right after a round.

        Args:
            mask: The new mask of this worker.
            optimizer: The optimizer of the present values; its state is carried over, as ``Tuning.set_mask`` does. So
                is that of the outer optimizer, and what low precision has left over (not where an entry leaves a mask
                of the worker's own).

        Raises:
            HandshakeError: The workers' masks are not alike, or one of them cannot take its mask.
            ValueError: No worker can take its mask, or a rule for masks that differ is missing.
            FishError: There are steps that have not been exchanged.
        """
        self._check_exchanged("set another mask")
        refusal: Exception | None = None
        try:
            mask = self.tuning.check_mask(mask, optimizer)
        except (TypeError, ValueError, FishError) as error:
            refusal = error
        facts: Facts = {"mask": "its own" if self.protocol.masks == "own" else mask.digest}
        agree(self._wire, facts | {"able to take its mask": f"no: {refusal}" if refusal else "yes"})
        if refusal:
            raise refusal
        masks = masks_of(self._wire, self.protocol, mask)
        before, owed = self._union.mask, self._union.owed(self._residual)
        self.tuning.set_mask(mask, optimizer)
        self._union = Union(self.tuning, self._wire, self.protocol, masks)
        self._anchor = self._union.moved(self._anchor, before, self._union.present())
        self._union.give(self._anchor)
        self._residual = self._union.nothing()
        own = self._union.own(self._union.moved(owed, before, self._residual.merged))
        self._residual = Residual(own, self._residual.merged)
        if self._outer is not None:
            self._outer.carry(self._union.mask, self._anchor)
        self._digest = values_digest(self._anchor)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a commit needs besides values, mask and optimizer; right after a round.

        Raises:
            FishError: There are steps that have not been exchanged, so the workers' values differ.
        """
        self._check_exchanged("be kept")
        low, own = self.protocol.payload != "float32", self.protocol.masks == "own"
        return {
            "version": _VERSION,
            "number": self.number,
            "step": self.step,
            "workers": self._wire.size,
            "anchor": self._anchor.cpu().clone() if own else None,
            "outer": self._outer.state_dict() if self._outer else None,
            "residual": {"own": self._residual.own.cpu(), "merged": self._residual.merged.cpu()} if low else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what ``state_dict`` returned; call ``handshake`` on all workers once the tuning is restored too.

        Raises:
            ValueError: It is of another version.
        """
        if state.get("version") != _VERSION:
            raise ValueError(f"state of LocalRounds has version {_VERSION}, this has {state.get('version')}")
        self._given = dict(state)

    def handshake(self) -> None:
        """Compare masks, weights, buffers and settings of all workers, and start from them.

        The constructor does it; call it again on all workers after a restore, or after ``load_state_dict`` of the
        model. Without a state to go on from, the outer optimizer and what low precision has left over start anew.

        Raises:
            HandshakeError: The workers do not train the same thing, or one of them cannot go on from its state.
            FishError: The state that was loaded is of other masks.
        """
        self.tuning._check_attached()
        self._check_unbroken()
        before = {name: vars(self)[name] for name in _IN_COMMON if name in vars(self)}
        if self._flying is not None:  # its collectives must be over before others begin
            self._flying[1].exception()
        try:
            self._shake_hands(self._given or {})
        except BaseException:
            vars(self).update(before)
            raise
        self._wire.read_counters()

    def _shake_hands(self, given: Mapping[str, Any]) -> None:
        self.number, self.step = given.get("number", self.number), given.get("step", self.step)
        self.pending, self._flying = 0, None
        model = self.tuning.model
        parameters = weights(model)
        facts: Facts = {
            "format": str(_VERSION),
            "parameters": {name: f"{p.dtype} {tuple(p.shape)}" for name, p in parameters.items()},
            **self.protocol.facts(),
            "mask": "its own" if self.protocol.masks == "own" else self.tuning.mask.digest,
            "round": str(self.number),
        }
        agree(self._wire, facts)
        masks = masks_of(self._wire, self.protocol, self.tuning.mask)
        self._union = Union(self.tuning, self._wire, self.protocol, masks)
        present = self._union.gathered(self._wire)
        refusal: Exception | None = None
        try:
            self._start_from(given, present)
        except Exception as error:  # a user's optimizer may raise anything
            refusal = error
        agree(self._wire, {"able to start": f"no: {type(refusal).__name__}: {refusal}" if refusal else "yes"})
        if refusal:
            raise refusal
        alike = torch.equal(self.tuning.values, self._union.own(self._anchor))
        found: Facts = {
            "weights": checksums(parameters),
            "values": self._digest if alike else "other than those of another worker that has them too",
            "buffers": checksums(persistent_buffers(model)),
            "outer optimizer": repr(self._outer.optimizer) if self._outer else "none",
        }
        agree(self._wire, found)
        self._given, self._loads = None, self.tuning.loads

    def _start_from(self, given: Mapping[str, Any], present: Tensor) -> None:
        """Set what all workers have in common from a state, and from what is there where it says nothing."""
        union, residual = self._union, given.get("residual")
        for what, held, wanted in (
            ("anchor", given.get("anchor"), union.mask.k),
            ("residual", residual and residual["own"], union.own_mask.k),
            ("residual", residual and residual["merged"], union.mask.k),
        ):
            if held is not None and len(held) != wanted:
                raise FishError(
                    f"the {what} of this state has {len(held)} entries, but these masks have {wanted}: restore as many "
                    "workers as there were, each with its mask from its own commit"
                )
        if given.get("anchor") is not None:
            self._anchor = given["anchor"].to(union.device)
            union.give(self._anchor)
        else:
            self._anchor = present
        self._buffers = read_buffers(self.tuning.model, union.device)
        self._residual = union.nothing()
        if residual:
            self._residual = Residual(residual["own"].to(union.device), residual["merged"].to(union.device))
        self._outer = None
        if self._make_outer is not None:
            self._outer = Outer(self._make_outer, union.mask, self._anchor)
            if given.get("outer") is not None:
                self._outer.load_state_dict(given["outer"])
        self._digest = values_digest(self._anchor)

    # --- a round ------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer) -> None:
        """Count a step, and begin and end rounds."""
        self._check()
        self.pending += 1
        self.step += 1
        if self.pending >= self.protocol.overlap:
            self._land()
        if self.pending < self.protocol.every:
            return
        if self._executor is None:
            self._exchange_now()
        else:
            launched = self._launch()
            self._flying = launched, self._executor.submit(self._exchange, launched)

    def _exchange_now(self, finished: bool = False) -> _Outcome:
        self._check()
        launched = self._launch(finished)
        return self._settle(launched, lambda: self._exchange(launched))

    def _land(self) -> None:
        """Wait for the round that is under way, if any, and commit it."""
        if self._flying is not None:
            (launched, future), self._flying = self._flying, None
            self._settle(launched, future.result)

    def _settle(self, launched: _Launched, result: Callable[[], _Outcome]) -> _Outcome:
        """Commit the outcome of a round, or count its steps as pending again."""
        try:
            outcome = result()
        except BaseException as error:
            self.pending += launched.steps
            # Without reasons that all workers know, some may be in the middle of a collective.
            self._broken |= not (isinstance(error, RoundError) and error.reasons)
            raise
        if outcome.merged is not None:
            self._phase("commit")
            self._commit(launched, outcome.merged)
        return outcome

    def _launch(self, finished: bool = False, error: BaseException | None = None) -> _Launched:
        """Copy what a round works on, and see what is wrong with it."""
        values = self.tuning.values.detach().clone()
        floats, wholes = read_buffers(self.tuning.model, self._union.device)
        changed = not (torch.equal(floats, self._buffers[0]) and torch.equal(wholes, self._buffers[1]))
        wrong = int((~values.isfinite()).sum()) + int((~floats.isfinite() & self._buffers[0].isfinite()).sum())
        message = f"{wrong} of {len(values)} values are not finite" if wrong else ""
        if error is not None:
            message = f"{type(error).__name__}: {error}"
        steps, self.pending = self.pending, 0
        # Also without a step that was counted: a second optimizer's, or by hand.
        trained = steps > 0 or not torch.equal(values, self._union.own(self._anchor))
        standing = Standing(self.number, trained, finished, changed, bool(message), int(self._digest[:15], 16))
        return _Launched(standing, message, values, (floats, wholes), self.step, steps)

    def _exchange(self, mine: _Launched) -> _Outcome:
        """Propose, reduce and vote; nothing of the worker changes here, and what the outer optimizer did is undone."""
        self._phase("propose")
        wire, begin = self._wire, perf_counter()
        everyone = propose(wire, mine.standing, mine.message)
        waited = perf_counter() - begin
        finished, trained = all(one.finished for one in everyone), [one.trained for one in everyone]
        proposing, _ = wire.read_counters()
        if not any(trained):
            return _Outcome(finished, None)
        self._phase("reduce")
        values, residual = self._union.merge(wire, Proposal(mine.values, self._anchor, trained, self._residual))
        buffers = self._merge_buffers(mine.buffers, trained) if any(one.changed for one in everyone) else None
        sent, seconds = wire.read_counters()
        self._phase("vote")
        before = self._outer.state_dict() if self._outer else {}
        try:
            if self._outer:
                values = self._outer.step(self._anchor, values)
            wrong = "" if bool(values.isfinite().all()) else "the merged values are not finite"
        except Exception as error:  # a user's optimizer may raise anything
            wrong = f"{type(error).__name__}: {error}"
        digest = values_digest(values)
        try:
            vote(wire, self.number, digest, wrong)
        except BaseException:
            if self._outer:
                self._outer.load_state_dict(before)
            raise
        voting, later = wire.read_counters()
        done = Round(
            number=self.number + 1,
            step=mine.step,
            steps=mine.steps,
            participants=sum(trained),
            payload_bytes=sent,
            other_bytes=proposing + voting,
            wait_seconds=waited,
            wire_seconds=seconds + later,
            digest=digest,
        )
        return _Outcome(finished, _Merged(values, residual, buffers, done))

    def _merge_buffers(self, mine: tuple[Tensor, Tensor], trained: list[bool]) -> tuple[Tensor, Tensor]:
        """Return the mean of floating-point buffers over workers that have trained, and the largest whole numbers."""
        floats, wholes = mine
        if len(floats):
            if not trained[self._wire.rank]:  # it is not among those that the mean is over
                floats = self._buffers[0]
            layout, empty = Shared(len(floats), "mean", "exact", "float32"), floats.new_empty(0)
            merged, _ = layout.merge(self._wire, Proposal(floats, self._buffers[0], trained, Residual(empty, empty)))
            # Constants such as minus infinity have no difference.
            floats = torch.where(self._buffers[0].isfinite(), merged, self._buffers[0])
        if len(wholes):
            wholes = self._wire.gather(wholes).amax(0)
        return floats, wholes

    def _commit(self, launched: _Launched, merged: _Merged) -> None:
        learnt, values = None, self.tuning.values.detach()
        if not torch.equal(values, launched.values):  # while the round was under way
            learnt = values.double() - launched.values.double()
        self._anchor, self._residual = merged.values, merged.residual
        self._union.give(self._anchor, learnt)
        if merged.buffers is not None:
            now = read_buffers(self.tuning.model, self._union.device)
            parts = zip(merged.buffers, now, launched.buffers, strict=True)
            floats, wholes = (
                torch.where(present == then, agreed, agreed + (present - then)) for agreed, present, then in parts
            )
            write_buffers(self.tuning.model, floats, wholes)
            self._buffers = merged.buffers
        self.number, self.last, self._digest = merged.round.number, merged.round, merged.round.digest
        if self._log is not None and self._wire.rank == 0:
            write_round(self._log, merged.round)

    def _tell_failure(self, error: Exception) -> None:
        """Have the other workers fail their next round rather than wait for this one."""
        try:
            self._land()
            self._exchange(self._launch(error=error))
        except FishError:
            pass  # it fails here as well

    def _phase(self, name: str) -> None:
        """Mark the parts of a round, for tests of what happens when a worker dies in one."""

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin_log(self) -> None:
        refusal: OSError | None = None
        if self._log is not None and self._wire.rank == 0:
            try:
                write_start(self._log, self._facts_for_log())
            except OSError as error:
                refusal = error
        agree(self._wire, {"able to write the log": f"no: {refusal}" if refusal else "yes"})
        if refusal:
            raise refusal
        self._wire.read_counters()

    def _facts_for_log(self) -> dict[str, Any]:
        parameters = weights(self.tuning.model).values()
        return {
            "workers": self._wire.size,
            "entries": self._union.own_mask.k,
            "union": self._union.mask.k,
            "of": sum(p.numel() for p in parameters),
            "dense_bytes": sum(p.nbytes for p in parameters),
            **asdict(self.protocol),
        }

    def _check(self) -> None:
        self.tuning._check_attached()
        self._check_unbroken()
        if self._given is not None:
            raise FishError("this state was restored: call handshake() on all workers before the next step")
        if self.tuning.mask is not self._union.own_mask:
            raise FishError(
                "the mask was changed on the Tuning: call set_mask of LocalRounds instead, or handshake() after a "
                "restore, on all workers"
            )
        if self.tuning.loads != self._loads:
            raise FishError("the model's state was loaded anew: call handshake() on all workers before the next step")

    def _check_unbroken(self) -> None:
        if self._broken:
            raise FishError("an earlier round broke off, so the process group cannot be used: start the workers again")

    def _check_exchanged(self, wish: str) -> None:
        self._check()
        changed = not torch.equal(self.tuning.values, self._union.own(self._anchor))
        if self.pending or self._flying or changed:
            raise FishError(
                f"there are steps that have not been exchanged, so the workers differ and cannot {wish}: do it right "
                "after a round (when pending is 0), or call round() on all workers first"
            )
