"""Local rounds: workers train for many steps on their masked entries, then exchange only those.

The second use of a fixed mask in the paper (section 3), on real processes. A round is

1. *propose*: every worker tells in 64 bytes where it stands, and whether anything is wrong with it;
2. *reduce*: the values become one vector, on scratch memory;
3. *vote*: every worker tells the digest of what it got;
4. *commit*: if all agree, the vector becomes the values, in one write.

Whatever fails before the commit fails on all workers, and leaves all their values as they were.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fishmask import exchange
from fishmask.attach import Tuning
from fishmask.buffers import read_buffers, write_buffers
from fishmask.carry import carry_optimizer
from fishmask.errors import FishError, RoundError
from fishmask.fingerprint import raw_bytes
from fishmask.handshake import Facts, agree, checksums
from fishmask.mask import Mask, Patterns
from fishmask.merge import Denominator, Masks, Mode, Own, Proposal, Reduction, Residual, Shared, places_in, union_of
from fishmask.originals import persistent_buffers
from fishmask.params import canonical_parameters
from fishmask.payload import Payload
from fishmask.presets import PRESETS, Preset
from fishmask.sites import Entry
from fishmask.wire import Wire

Outer = Callable[[list[nn.Parameter]], Optimizer]

_VERSION = "1"
_FAILED, _NOT_FINITE = 1, 2  # what may be wrong with a proposal


@dataclass(frozen=True)
class Round:
    """What one round did, as seen by one worker.

    Attributes:
        number: Of the round; the first is 1.
        step: Steps of this worker since training began.
        steps: Steps of this worker in this round.
        participants: How many workers have trained in it.
        payload_bytes: Bytes of values (and buffers) that this worker sent.
        other_bytes: Bytes of everything else that it sent: proposals and votes.
        wait_seconds: Time until all workers had come to the round.
        wire_seconds: Time in the exchange after that.
        digest: SHA-256 (hex) over the merged values as little-endian float32; equal on all workers.
    """

    number: int
    step: int
    steps: int
    participants: int
    payload_bytes: int
    other_bytes: int
    wait_seconds: float
    wire_seconds: float
    digest: str


@dataclass(frozen=True)
class _Launched:
    """What a worker takes into a round."""

    record: Tensor  # int64 [8], see _exchange
    message: str
    values: Tensor
    floats: Tensor
    wholes: Tensor
    step: int
    steps: int


@dataclass(frozen=True)
class _Outcome:
    """What a round comes to; without ``merged`` no worker had trained."""

    finished: bool  # all workers are
    merged: Tensor | None = None
    residual: Residual | None = None
    buffers: tuple[Tensor, Tensor] | None = None
    round: Round | None = None


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
        preset: A protocol of the paper by name (see ``fishmask.presets.PRESETS``); arguments that are left out are its.
        log: A file to which rank 0 adds one JSON line for every round; ``fishmask rounds`` reads it.
        group: The process group; by default that of all workers.

    Attributes:
        number: Of the last round that was committed.
        pending: Steps since the last round.
        refresh_every: Rounds from one mask to the next that the preset asks for, or None.

    Raises:
        ValueError: An argument is out of range, or missing where masks differ.
        HandshakeError: The workers do not train the same thing.
        RoundError: The connection broke off.

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
        outer: Outer | None = None,
        overlap: int = 0,
        preset: str | None = None,
        log: str | Path | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        chosen = _preset(preset)
        self.every, self.overlap = every, overlap
        self.masks: Masks = masks or chosen.masks
        self.reduction: Reduction = reduction or chosen.reduction
        self.denominator, self.head = denominator, head or chosen.head
        self.mode, self.payload = mode, payload
        self.refresh_every = chosen.refresh_every
        self._check_arguments()
        if not isinstance(tuning, Tuning):
            raise TypeError(f"LocalRounds takes the Tuning that fishmask.attach returned, got {type(tuning).__name__}")
        self.tuning = tuning
        self.number = self.pending = self._step = 0
        self._wire, self._log, self._make_outer = Wire(group), None if log is None else Path(log), outer
        self._executor = ThreadPoolExecutor(1, "fishmask-round") if overlap and self._wire.size > 1 else None
        self._flying: tuple[_Launched, Future[_Outcome]] | None = None
        self._broken = False
        self._anchor = torch.empty(0)  # the values of the union after the last round
        self._given: dict[str, Any] | None = None
        self._outer: Optimizer | None = None
        self._outer_entries: dict[str, Entry] = {}
        self.handshake()
        if chosen.workers not in (None, self._wire.size) and self._wire.size > 1:
            warnings.warn(
                f"preset {preset} is the paper's with {chosen.workers} workers; there are {self._wire.size}",
                UserWarning,
                stacklevel=2,
            )
        self._handle = tuning.on_step(self._stepped)
        self._write({"rounds": self._settings() | {"workers": self._wire.size, **self._sizes()}})

    # --- its life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "LocalRounds":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, Exception) and not self._broken and not isinstance(error, RoundError):
            self._tell_failure(error)
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
            RoundError: As for ``round``.
        """
        if self._flying:
            self._land()
        while not self._now(finished=True).finished:
            pass

    def round(self) -> Round | None:
        """Begin a round now; all workers must. Steps do it by themselves.

        Returns:
            What it did; None when no worker had trained since the last.

        Raises:
            RoundError: It failed; on all workers that are alive, with values and local steps as they were.
        """
        if self._flying:
            self._land()
        return self._now().round

    def discard(self) -> None:
        """Go back to the values and buffers of the last round, after one that failed; call it on all workers."""
        self._check()
        if self._flying:
            self._land()
        self._give(self._anchor)
        write_buffers(self.tuning.model, *self._agreed)
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
                worker are added to those of the others. ``fishmask.attach.paused`` lets an attached model be scored.
            optimizer: As for ``set_mask``.
            density: Share of all entries that a worker trains, as for ``Mask.from_scores``.
            keep: Parameters that are trained whole, by all workers.
            exclude: Parameters never chosen from.

        Returns:
            The new mask of this worker. With own masks it is dealt from the best entries of all (see
            ``fishmask.exchange.deal``).

        Raises:
            ValueError: As for ``Mask.from_scores``.
            HandshakeError: The workers' scores are of different models, or are not finite.
            FishError: There are steps that have not been exchanged.
        """
        self._check_exchanged("choose a new mask")
        if self.masks == "shared":
            mask = exchange.choose(scores, density, keep, exclude, group=self._wire.group)
        else:
            mask = exchange.deal(scores, density, keep, exclude, group=self._wire.group)
        self.set_mask(mask, optimizer)
        return mask

    def set_mask(self, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Train other entries from now on; all workers must call it, right after a round.

        Args:
            mask: The new mask of this worker.
            optimizer: The optimizer of the present values; its state is carried over, as ``Tuning.set_mask`` does. So
                is that of the outer optimizer, and what low precision has left over.

        Raises:
            HandshakeError: The workers' masks are not alike, or one of them cannot take its mask.
            FishError: There are steps that have not been exchanged.
        """
        self._check_exchanged("set another mask")
        try:
            self.tuning.check_mask(mask, optimizer)
            ready = "yes"
        except (ValueError, FishError) as error:
            ready = f"{type(error).__name__}: {error}"
        agree(self._wire, {"able to take the mask": ready})
        if ready != "yes":
            raise ValueError(ready)
        if self.masks == "shared":
            agree(self._wire, {"mask": mask.digest})
        before, anchor, owed, outer = self._union, self._anchor, self._owed(), self._outer_entries
        self.tuning.set_mask(mask, optimizer)
        self._lay_out()
        self._anchor = _carried(anchor, before, self._union, self._present())
        self._give(self._anchor)
        nothing = torch.zeros_like(self._anchor)
        self._residual = Residual(self._own_part(_carried(owed, before, self._union, nothing)), nothing)
        if self._outer is not None:
            self._outer_entries = self._entries_of_union()
            carry_optimizer(self._outer, outer, self._outer_entries)
        self._digest = _digest(self._anchor)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a commit needs besides values, mask and optimizer; right after a round.

        Raises:
            FishError: There are steps that have not been exchanged, so the workers' values differ.
        """
        self._check_exchanged("be kept")
        low = self.payload != "float32"
        return {
            "version": 1,
            "number": self.number,
            "step": self._step,
            "workers": self._wire.size,
            "anchor": self._anchor.cpu().clone() if self.masks == "own" else None,
            "outer": deepcopy(self._outer.state_dict()) if self._outer else None,
            "residual": {"own": self._residual.own.cpu(), "merged": self._residual.merged.cpu()} if low else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what ``state_dict`` returned; call ``handshake`` on all workers once the tuning is restored too."""
        if state.get("version") != 1:
            raise ValueError("this is not the state of LocalRounds that this version of fishmask knows")
        self._given = dict(state)

    def handshake(self) -> None:
        """Compare masks, weights, buffers and settings of all workers, and start from them.

        The constructor does it; call it again on all workers after a restore.

        Raises:
            HandshakeError: The workers do not train the same thing.
        """
        self.tuning._check_attached()
        given, self._given = self._given, None
        if given is not None:
            self.number, self._step = given["number"], given["step"]
        self._flying, self.pending = None, 0
        parameters = canonical_parameters(self.tuning.model)
        shapes = {name: f"{p.dtype} {tuple(p.shape)}" for name, p in parameters.items()}
        settings = {name: str(value) for name, value in self._settings().items()}
        facts: Facts = {"format": _VERSION, "parameters": shapes, **settings, "round": str(self.number)}
        if self.masks == "shared":
            facts["mask"] = self.tuning.mask.digest
        agree(self._wire, facts)
        self._lay_out()
        if given is not None and given["anchor"] is not None:
            if len(given["anchor"]) != self._union.k:
                raise FishError(
                    f"the state is of a union of {len(given['anchor'])} entries, the workers' masks have "
                    f"{self._union.k} together: restore as many workers as there were, each from its own commit"
                )
            self._anchor = given["anchor"].to(self._device)
            self._give(self._anchor)
        else:
            self._anchor = self._present()
        self._agreed = read_buffers(self.tuning.model, self._device)
        self._residual = Residual.zero(self.tuning.mask.k, self._union.k, self._device)
        if given is not None and given["residual"] is not None:
            self._residual = Residual(*(given["residual"][key].to(self._device) for key in ("own", "merged")))
        if self._make_outer is not None:
            self._outer_entries = self._entries_of_union()
            self._outer = self._make_outer([entry.values for entry in self._outer_entries.values()])
            if given is not None and given["outer"] is not None:
                self._outer.load_state_dict(given["outer"])
            agree(self._wire, {"outer optimizer": repr(self._outer)})
        self._digest = _digest(self._anchor)
        buffers = checksums(persistent_buffers(self.tuning.model))
        agree(self._wire, {"weights": checksums(parameters), "values": self._digest, "buffers": buffers})
        self._wire.read_counters()

    # --- a round ------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer) -> None:
        """Count a step of the optimizer that holds the first of the values, and begin and end rounds."""
        first = next(self.tuning.parameters())
        if not any(first is p for group in optimizer.param_groups for p in group["params"]):
            return
        self._check()
        self.pending += 1
        self._step += 1
        if self._flying and self.pending >= self.overlap:
            self._land()
        if self.pending >= self.every:
            if self._executor is None:
                self._now()
            else:
                launched = self._launch()
                self._flying = launched, self._executor.submit(self._exchange, launched)

    def _now(self, finished: bool = False) -> _Outcome:
        self._check()
        launched = self._launch(finished)
        return self._settle(launched, lambda: self._exchange(launched))

    def _land(self) -> None:
        assert self._flying is not None
        (launched, future), self._flying = self._flying, None
        self._settle(launched, future.result)

    def _settle(self, launched: _Launched, result: Callable[[], _Outcome]) -> _Outcome:
        """Commit the outcome of a round, or count its steps as pending again."""
        try:
            outcome = result()
        except BaseException as error:
            self.pending += launched.steps
            self._broken |= not (isinstance(error, RoundError) and error.reasons)
            raise
        self._commit(launched, outcome)
        return outcome

    def _launch(self, finished: bool = False, error: BaseException | None = None) -> _Launched:
        """Copy what a round works on."""
        values = self.tuning.values.detach().clone()
        floats, wholes = read_buffers(self.tuning.model, self._device)
        changed = not (torch.equal(floats, self._agreed[0]) and torch.equal(wholes, self._agreed[1]))
        wrong = int((~values.isfinite()).sum()) + int((~floats.isfinite() & self._agreed[0].isfinite()).sum())
        problem, message = (_NOT_FINITE, f"{wrong} of {len(values)} values are not finite") if wrong else (0, "")
        if error is not None:
            problem, message = _FAILED, f"{type(error).__name__}: {error}"
        steps, self.pending = self.pending, 0
        digest = int(self._digest[:15], 16)
        record = torch.tensor([self.number, steps, finished, problem, changed, digest, 0, 0])
        return _Launched(record, message, values, floats, wholes, self._step, steps)

    def _exchange(self, mine: _Launched) -> _Outcome:
        """Propose, reduce on scratch, vote; nothing of the worker changes here."""
        self._phase("propose")
        wire, begin = self._wire, perf_counter()
        records = wire.gather(mine.record)
        wait = perf_counter() - begin
        self._check_proposals(records, mine)
        finished, trained = bool(records[:, 2].all()), (records[:, 1] > 0).tolist()
        overhead = wire.read_counters()[0]
        if not any(trained):
            return _Outcome(finished)
        self._phase("reduce")
        proposal = Proposal(mine.values, self._anchor, trained, self._residual)
        merged, residual = self._layout.merge(wire, proposal)
        buffers = None
        if bool(records[:, 4].any()):
            layout = Shared(len(mine.floats), "mean", "exact", "float32")
            none = Residual.zero(0, 0, mine.floats.device)
            floats, _ = layout.merge(wire, Proposal(mine.floats, self._agreed[0], trained, none))
            buffers = floats, wire.gather(mine.wholes).amax(0)
        sent, seconds = wire.read_counters()
        self._phase("vote")
        state = deepcopy(self._outer.state_dict()) if self._outer is not None else None
        try:
            merged = self._apply_outer(merged)
            wrong = "" if bool(merged.isfinite().all()) else "the merged values are not finite"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        digest = _digest(merged)
        try:
            self._vote(digest, wrong)
        except BaseException:
            if self._outer is not None and state is not None:
                self._outer.load_state_dict(state)
            raise
        votes, later = wire.read_counters()
        done = Round(
            self.number + 1, mine.step, mine.steps, sum(trained), sent, overhead + votes, wait, seconds + later, digest
        )
        return _Outcome(finished, merged, residual, buffers, done)

    def _check_proposals(self, records: Tensor, mine: _Launched) -> None:
        """Raise RoundError on all workers if any proposal is not as it must be."""
        reasons: dict[int, str] = {}
        if bool(records[:, 3].any()):
            messages = self._wire.gather_bytes(mine.message.encode())
            reasons = {rank: text.decode() for rank, text in enumerate(messages) if text}
        for column, what in ((0, "has come to round {}, rank 0 to {}"), (5, "has other values after the last round")):
            for rank, value in enumerate(records[:, column].tolist()):
                if value != int(records[0, column]):
                    reasons.setdefault(rank, what.format(value + 1, int(records[0, column]) + 1))
        if reasons:
            raise RoundError(self._failure(reasons), reasons)

    def _vote(self, digest: str, wrong: str) -> None:
        votes = [json.loads(vote) for vote in self._ballots({"digest": digest, "wrong": wrong})]
        reasons = {rank: vote["wrong"] for rank, vote in enumerate(votes) if vote["wrong"]}
        if not reasons and len({vote["digest"] for vote in votes}) > 1:
            reasons = {rank: f"got {vote['digest'][:12]}" for rank, vote in enumerate(votes)}
        if reasons:
            raise RoundError(self._failure(reasons), reasons)

    def _ballots(self, vote: dict[str, str]) -> list[bytes]:
        return self._wire.gather_bytes(json.dumps(vote).encode())

    def _failure(self, reasons: Mapping[int, str]) -> str:
        told = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
        return (
            f"round {self.number + 1} failed, and nothing was changed: {told}. The steps since round {self.number} are "
            "still in the values: train on to have them in the next round, or call discard() on all workers to go back "
            f"to round {self.number}"
        )

    def _apply_outer(self, merged: Tensor) -> Tensor:
        """Return the values after the outer optimizer's step; without one those that were merged."""
        if self._outer is None:
            return merged
        entries = list(self._outer_entries.values())
        sizes = [len(entry.indices) for entry in entries]
        with torch.no_grad():
            gradients = (self._anchor - merged).split(sizes)
            for entry, start, gradient in zip(entries, self._anchor.split(sizes), gradients, strict=True):
                entry.values.copy_(start)
                entry.values.grad = gradient.clone()
        self._outer.step()
        return torch.cat([entry.values.detach() for entry in entries])

    def _commit(self, launched: _Launched, outcome: _Outcome) -> None:
        if outcome.merged is None or outcome.round is None or outcome.residual is None:
            return
        self._phase("commit")
        learnt = None
        if self.pending:  # while the round was under way
            learnt = self.tuning.values.detach().double() - launched.values.double()
        self._anchor, self._residual = outcome.merged, outcome.residual
        self._give(self._anchor, learnt)
        if outcome.buffers is not None:
            floats, wholes = outcome.buffers
            now, counts = read_buffers(self.tuning.model, self._device)
            self._agreed = outcome.buffers
            write_buffers(self.tuning.model, floats + (now - launched.floats), wholes + (counts - launched.wholes))
        self.number, self._digest = outcome.round.number, outcome.round.digest
        self._write({**asdict(outcome.round), "time": datetime.now(UTC).isoformat(timespec="milliseconds")})

    def _tell_failure(self, error: Exception) -> None:
        """Have the other workers fail their next round rather than wait for this one."""
        try:
            if self._flying:
                self._land()
            self._exchange(self._launch(error=error))
        except FishError:
            pass  # it fails here as well

    def _phase(self, name: str) -> None:
        """Mark the parts of a round, for tests of what happens when a worker dies in one."""

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        for name, value, known in (
            ("masks", self.masks, get_args(Masks)),
            ("reduction", self.reduction, get_args(Reduction)),
            ("denominator", self.denominator, (None, *get_args(Denominator))),
            ("head", self.head, (None, *get_args(Reduction))),
            ("mode", self.mode, get_args(Mode)),
            ("payload", self.payload, get_args(Payload)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is a number of steps of at least 1, got {self.every!r}")
        if not 0 <= self.overlap < self.every:
            raise ValueError(f"overlap must be from 0 to every - 1 = {self.every - 1} steps, got {self.overlap!r}")
        if self.mode == "fast" and self.payload != "float32":
            raise ValueError(f"mode='fast' sums float32 on the way; payload={self.payload!r} needs mode='exact'")
        if self.masks == "shared" and (self.denominator, self.head) != (None, None):
            raise ValueError(
                "denominator and head are for masks='own'; with a shared mask all workers hold all entries"
            )

    def _settings(self) -> dict[str, Any]:
        names = ("every", "masks", "reduction", "denominator", "head", "mode", "payload", "overlap")
        return {name: getattr(self, name) for name in names} | {"outer": self._make_outer is not None}

    def _sizes(self) -> dict[str, int]:
        parameters = canonical_parameters(self.tuning.model).values()
        return {
            "k": self.tuning.mask.k,
            "union": self._union.k,
            "n": sum(p.numel() for p in parameters),
            "dense_bytes": sum(p.nbytes for p in parameters),
        }

    def _check(self) -> None:
        self.tuning._check_attached()
        if self._broken:
            raise FishError("an earlier round broke the process group: start the workers again")
        if self._given is not None:
            raise FishError("this state was restored: call handshake() on all workers before the next step")
        if self.tuning.mask is not self._mask:
            raise FishError("the mask was changed on the Tuning: call set_mask of LocalRounds instead, on all workers")

    def _check_exchanged(self, wish: str) -> None:
        self._check()
        if self.pending or self._flying:
            raise FishError(
                f"{self.pending} steps have not been exchanged, so the workers differ and cannot {wish}: do it right "
                "after a round (when pending is 0), or call round() first"
            )

    def _lay_out(self) -> None:
        """Know what the workers hold: which values are merged, and where this worker's are among them."""
        self._mask, self._device = self.tuning.mask, self.tuning.values.device
        if self.masks == "shared":
            self._union = self._mask
            self._layout: Shared | Own = Shared(self._mask.k, self.reduction, self.mode, self.payload)
            self._place: Tensor | None = None
            return
        masks = exchange.gather_masks(self._wire, self._mask)
        self._check_rules(masks)
        self._layout = Own(
            masks, self._wire.rank, self.reduction, self.denominator, self.head, self.payload, self._device
        )
        self._union, self._place = self._layout.mask, self._layout.places[self._wire.rank]
        self._others = torch.ones(self._union.k, dtype=torch.bool, device=self._device)
        self._others[self._place] = False
        self.tuning.adopt(self._union - self._mask)

    def _check_rules(self, masks: Sequence[Mask]) -> None:
        """Raise ValueError where a rule is needed that nobody gave."""
        common = masks[0]
        for mask in masks[1:]:
            common = common & mask
        if len(masks) > 1 and common.k and self.head is None:
            raise ValueError(
                f"{common.k} entries are in the masks of all workers: say with head='mean' or head='sum' how they are "
                "reduced"
            )
        if (
            len(masks) > 1
            and self.reduction == "mean"
            and self.denominator is None
            and common.k < union_of(list(masks)).k
        ):
            raise ValueError(
                "the workers' masks differ: say with denominator='participants' or 'holders' what a mean divides by"
            )

    def _entries_of_union(self) -> dict[str, Entry]:
        """Make the parameters of the outer optimizer."""
        indices = {name: index.to(self._device) for name, index in self._union.indices.items()}
        parts = self._anchor.split([len(index) for index in indices.values()])
        return {
            name: Entry(values := nn.Parameter(part.clone()), index, values)
            for (name, index), part in zip(indices.items(), parts, strict=True)
        }

    def _present(self) -> Tensor:
        """Return the values of the union as they are on this worker."""
        if self._place is None:
            return self.tuning.values.detach().clone()
        parameters = canonical_parameters(self.tuning.model)
        weights = [
            parameters[name].detach().take(i.to(self._device)).float() for name, i in self._union.indices.items()
        ]
        present = torch.cat(weights)
        present[self._place] = self.tuning.values.detach()
        return present

    def _own_part(self, union: Tensor) -> Tensor:
        return union if self._place is None else union[self._place]

    @torch.no_grad()
    def _give(self, union: Tensor, learnt: Tensor | None = None) -> None:
        """Write the values of the union into the model: this worker's, with what it has learnt since, and the rest."""
        own = self._own_part(union)
        self.tuning.values.copy_(own if learnt is None else (own.double() + learnt).float())
        self.tuning.write_back()
        if self._place is not None:
            self.tuning.write_adopted(union[self._others])

    def _owed(self) -> Tensor:
        """Return what this worker has not sent yet, over the union.

        With another mask other workers add up other values, so what is owed to all becomes part of what this one owes.
        """
        owed = self._residual.merged * (self._wire.size if self.reduction == "mean" else 1)
        if self._place is None:
            return owed + self._residual.own
        owed[self._place] += self._residual.own
        return owed

    def _write(self, record: dict[str, Any]) -> None:
        if self._log is not None and self._wire.rank == 0:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                print(json.dumps(record), file=file)


def _carried(old: Tensor, before: Mask, after: Mask, fresh: Tensor) -> Tensor:
    """Move numbers over one union to another; entries that are new take those of ``fresh``."""
    place = places_in(before | after, before).to(old.device)
    whole = torch.zeros((before | after).k, dtype=old.dtype, device=old.device)
    known = torch.zeros_like(whole, dtype=torch.bool)
    whole[place], known[place] = old, True
    place = places_in(before | after, after).to(old.device)
    return torch.where(known[place], whole[place], fresh)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(raw_bytes(values)).hexdigest()


def _preset(name: str | None) -> Preset:
    if name is None:
        return Preset()
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
