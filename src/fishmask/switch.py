"""Many deltas on one base in one process, of which one is in use: switching costs k numbers."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishmask import applied
from fishmask.combine import Change, Overlap, check_combination, combined_buffers, combined_changes
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.live import LIVE, is_attached, tuning_of
from fishmask.params import aliases, find
from fishmask.places import Place, Write, exchange, place_of
from fishmask.quantized import settle
from fishmask.turns import ANYTHING, Serving, Turns

_KEPT = 8  # combinations, those used last

Entries = Mapping[str, tuple[Tensor, Tensor]]  # as `Delta.entries` returns them


@dataclass(frozen=True)
class Combination:
    """Several deltas in use together.

    Attributes:
        parts: Their names and weights, in order.
        overlap: What becomes of entries that several have, as for ``fishmask.combine``.
    """

    parts: tuple[tuple[str, float], ...]
    overlap: Overlap


Spec = str | Combination | None
Wanted = Spec | Sequence[str] | Mapping[str, float]


@dataclass(eq=False)
class _Held:
    """A delta, or a combination, ready to be written; the base is one without entries."""

    spec: Spec
    delta: Delta | None
    entries: Entries
    writes: dict[str, Write]
    parts: "tuple[_Held, ...]" = ()  # of a combination


class Switch:
    """Deltas on one base, known by names, of which one, a combination, or none is in use.

    Each keeps the base's bits at its own entries, so a switch writes k numbers out and k in, and the base comes back
    bit for bit whatever the order. All methods may be called from several threads. ``docs/serving.md`` is the guide.

    Args:
        model: The base, in memory, on the device and in the dtype it will be used in.

    Attributes:
        model: The model.

    Example:
        >>> base, tuned = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> switch = Switch(base)
        >>> switch.add("task", Delta.between(base, tuned))
        >>> switch.use("task")
        >>> torch.equal(base.weight, tuned.weight)
        True
        >>> switch.use(None)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: dict[str, _Held] = {}
        self._places: dict[str, Place] = {}
        self._combined: OrderedDict[Combination, _Held] = OrderedDict()
        self._combining = threading.Lock()
        self._base = self._chosen = _Held(None, None, {}, {})
        self._turns = Turns(self._base, self._write)
        self._serving: Serving | None = None
        self._owner = object()  # stands for this switch where a reference to it would keep the model alive

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all deltas, in the order they were added."""
        return tuple(self._held)

    @property
    def active(self) -> Spec:
        """What is in the model's weights now: a delta's name, a combination, or None for the base."""
        return self._present.spec

    @property
    def _present(self) -> _Held:
        present = self._turns.present
        assert isinstance(present, _Held)
        return present

    def delta(self, name: str) -> Delta:
        """Return the delta of a name.

        Raises:
            ValueError: There is none.
        """
        return _delta(self._known(name))

    def add(self, name: str, delta: Delta, *, check_base: bool = True) -> None:
        """Make a delta ready for use, without using it; forwards with what is in use may go on meanwhile.

        Args:
            name: What it is called from now on.
            delta: The delta.
            check_base: Refuse a delta that was made on other weights.

        Raises:
            ValueError: The name is taken.
            FishError: The delta does not fit the base; or the model is attached, sharded, or has other deltas applied.
        """
        with self._turn():
            if name in self._held:
                raise ValueError(f"there is a delta {name!r} already; remove() it first")
            tuning = tuning_of(self.model) if LIVE else None
            self._refuse_others(attached=tuning is not None and not tuning._disabled)
            delta.check(self.model, check_base)
            settle(self.model)
            self._follow(self._present)
            self._held[name] = self._ready(name, delta, delta.entries(self.model))

    def remove(self, name: str) -> None:
        """Forget a delta that is not in use.

        Raises:
            ValueError: There is none of that name.
            FishError: It is in use.
        """
        self._known(name)
        if name in _names(self._chosen):
            raise FishError(f"{name!r} is in use: use() another one, or None for the base, before removing it")
        with self._turns.at(self._chosen if name in _names(self._present) else ANYTHING):
            del self._held[name]
            with self._combining:
                for held in [held for held in self._combined.values() if name in _names(held)]:
                    assert isinstance(held.spec, Combination)
                    del self._combined[held.spec]

    def use(self, name: Wanted, *, overlap: Overlap | None = None, verify: bool = False) -> None:
        """Put a delta into the model's weights in place of what is in use; waits for requests that are being served.

        Args:
            name: A name; None for the base; several names, stacked so that the last counts where they overlap; or
                names with weights, as ``{"a": 0.5, "b": 0.5}``, which ``fishmask.combine`` explains. A combination is
                computed once; those used last are kept.
            overlap: What becomes of entries that several deltas have; by default ``"last"`` for names, ``"refuse"``
                for names with weights.
            verify: Make sure first that the weights are what this switch has written, as ``check`` does.

        Raises:
            ValueError: There is no delta of that name, or the combination makes no sense.
            FishError: The model is attached, has other deltas applied, or was changed or converted by others; deltas
                overlap where that is refused; or it is called while this thread serves a request.
        """
        wanted = self._resolve(name, overlap)
        if self._turns.held() is not None:
            raise FishError("use() inside using() or inside a forward would change the weights under it: end it first")
        if verify:
            self.check()
        with self._turns.at(wanted):
            self._chosen = wanted

    @contextmanager
    def using(self, name: Wanted, *, overlap: Overlap | None = None) -> Iterator[None]:
        """Have a delta in the weights for one request: ``with switch.using("a"): model(**request)``.

        Requests with the same delta run together in many threads; a change waits until all that run have ended, first
        come, first served. Afterwards the delta stays until something else is asked for, so that the next request
        with it costs nothing. Once this was called, a forward outside such a block takes a turn of its own, with what
        ``use`` chose last.

        Args:
            name: As for ``use``.
            overlap: As for ``use``.

        Raises:
            ValueError: As for ``use``.
            FishError: As for ``use``; or it is inside a block with something else.
        """
        wanted = self._resolve(name, overlap)
        if self._serving is None:
            self._serving = Serving(self.model, self._turns, lambda: self._chosen)
        hold = self._turns.held()
        if hold is None:
            with self._turns.at(wanted):
                yield
        elif wanted is self._present:
            yield
        else:
            raise FishError(
                f"using({name!r}) inside a block or a forward with {self.active!r} would change the weights under it: "
                "end that first"
            )

    def check(self) -> None:
        """Make sure that the weights are what this switch has written; compares k numbers for each delta.

        Raises:
            FishError: Somebody has changed or converted them.
        """
        with self._turn():
            self._follow(self._present, *self._held.values())
            self._compare([self._present, *self._held.values()])

    def rebase(self) -> None:
        """Take the model's present weights for the base: those it was moved or converted to while none was in use.

        Raises:
            FishError: A delta is in use, or a delta does not fit any more.
        """
        if self._chosen is not self._base or self._present is not self._base:
            raise FishError(f"{self.active!r} is in use: use(None) before moving or converting the model")
        with self._turns.at(self._base):
            deltas = {name: _delta(held) for name, held in self._held.items()}
            for delta in deltas.values():
                delta.check(self.model, check_base=False)
            settle(self.model)
            self._places, self._held = {}, {}
            self._combined.clear()
            for name, delta in deltas.items():
                self._held[name] = self._ready(name, delta, delta.entries(self.model))

    def release(self) -> None:
        """Leave the weights as they are and forget all deltas: the one that is ``active`` stays in the model."""
        with self._turn():
            applied.forget(self.model, self._owner)
            self._turns.present = self._chosen = self._base
            self._places, self._held = {}, {}
            self._combined.clear()
            if self._serving is not None:
                self._serving.end()
                self._serving = None

    # --- what is wanted -----------------------------------------------------------------------------------------------

    def _known(self, name: str) -> _Held:
        if name not in self._held:
            raise ValueError(f"there is no delta {name!r}; there are: {', '.join(self._held) or 'none'}")
        return self._held[name]

    def _resolve(self, wanted: Wanted, overlap: Overlap | None) -> _Held:
        if wanted is None:
            return self._base
        if isinstance(wanted, str):
            return self._known(wanted)
        if isinstance(wanted, Mapping):
            wanted = Combination(tuple(wanted.items()), overlap or "refuse")
        elif not isinstance(wanted, Combination):
            wanted = Combination(tuple((name, 1.0) for name in wanted), overlap or "last")
        parts = self._parts(wanted)
        with self._combining:
            held = self._combined.get(wanted)
        if held is None or held.parts != parts:  # others of the same names
            held = self._combination(wanted, parts)
        with self._combining:
            self._combined[wanted] = held
            self._combined.move_to_end(wanted)
            while len(self._combined) > _KEPT:
                self._combined.popitem(last=False)
        return held

    def _parts(self, combination: Combination) -> tuple[_Held, ...]:
        return tuple(self._known(name) for name, _ in combination.parts)

    def _combination(self, combination: Combination, parts: tuple[_Held, ...]) -> _Held:
        """Compute a combination from what is held; the model is not asked for its base."""
        weights = [weight for _, weight in combination.parts]
        check_combination(weights, combination.overlap, len(parts))
        names = aliases(self.model)
        changes: list[dict[str, Change]] = []
        buffers: list[dict[str, Tensor]] = []
        for held in parts:
            delta = _delta(held)
            changes.append({})
            for name, values in delta.values.items():
                indices, written = held.entries[target := names.get(name, name)]
                base = held.writes[target].base.cpu().view(written.dtype)
                changes[-1][target] = Change(indices, values, base)
            buffers.append({name: held.entries[name][1] for name in delta.buffers})
        united = combined_buffers(buffers, changes, combination.overlap)
        entries = {name: (torch.arange(len(values)), values) for name, values in united.items()}
        combined = combined_changes(changes, weights, combination.overlap)
        entries |= {name: (change.indices, change.values) for name, change in combined.items()}
        with self._turn():
            return self._ready(combination, None, entries, parts=parts)

    def _ready(
        self,
        spec: Spec,
        delta: Delta | None,
        entries: Entries,
        bases: Mapping[str, Tensor] | None = None,
        parts: tuple[_Held, ...] = (),
    ) -> _Held:
        """Find the places of entries, and the base's bits there, which are read if not given, whatever is in use."""
        writes = {}
        for name, (indices, values) in entries.items():
            if not len(indices):
                continue
            if name not in self._places:
                self._places[name] = place_of(self.model, name)
            place = self._places[name]
            bits = raw_bits(values).to(place.device)
            alike = self._alike(name, indices)
            if alike is not None:
                writes[name] = Write(place, alike.positions, bits, alike.base)
                continue
            positions = place.positions(indices)
            if bases is None:
                base = place.read(positions)
                self._cover(base, name, indices, "base")
            else:
                base = bases[name].to(place.device)
            writes[name] = Write(place, positions, bits, base)
        return _Held(spec, delta, entries, writes, parts)

    def _alike(self, name: str, indices: Tensor) -> Write | None:
        """Find a delta with the same entries of a tensor, to share their positions and the base's bits."""
        for held in self._held.values():
            if name in held.writes and torch.equal(held.entries[name][0], indices):
                return held.writes[name]
        return None

    def _cover(self, bits: Tensor, name: str, indices: Tensor, part: str) -> None:
        """Overwrite bits at the entries that are in use: by the base's ("base"), or by those in use ("bits")."""
        present = self._present
        if name in present.writes:
            places, covered = (x.to(bits.device) for x in find(indices, present.entries[name][0]))
            bits[covered] = getattr(present.writes[name], part)[places[covered]]

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep the weights as they are for a while."""
        if self._turns.held() is not None:
            yield
            return
        with self._turns.at(ANYTHING):
            yield

    def _write(self, wanted: _Held) -> None:
        """Write what is wanted in place of what is present, while nobody has a turn."""
        present = self._present
        self._refuse_others(attached=bool(LIVE) and is_attached(self.model))
        self._follow(present, wanted)
        writes = [*present.writes.values(), *wanted.writes.values()]
        if not all(write.place.is_seen for write in writes):
            self._compare([present, wanted], buffers=False)  # those of BatchNorm change in training
        try:
            with torch.no_grad():
                exchange(present.writes, wanted.writes)
        except BaseException:  # an interrupt in the middle
            with torch.no_grad():
                exchange(wanted.writes, {})
                exchange(present.writes, present.writes)
            raise
        finally:
            for write in writes:
                write.place.look()
        self._record(wanted)

    def _record(self, present: _Held) -> None:
        """Have those who apply a delta on top, or hash the base, know what is in the weights."""
        applied.forget(self.model, self._owner)
        if present.writes:
            applied.record(self.model, self._owner, present.entries, _bases(present))

    def _refuse_others(self, attached: bool) -> None:
        if attached:
            raise FishError("this model is being trained in place; call detach() or revert() on its Tuning first")
        if applied.is_changed(self.model, but_by=self._owner):
            raise FishError(
                "other deltas are applied to this model: revert() them, or use(None) on their Switch, and go on then"
            )

    def _follow(self, *asked: _Held) -> None:
        """Find the weights again where they were moved and hold what they held; else raise FishError."""
        if all(write.place.is_there for held in asked for write in held.writes.values()):
            return
        moved = {name: place_of(self.model, name) for name, place in self._places.items() if not place.is_there}
        if converted := [name for name, place in moved.items() if place.kind != self._places[name].kind]:
            raise FishError(f"these weights were converted by others: {_listed(converted)}; {self._advice()}")
        everyone = {id(held): held for held in (self._present, *self._held.values(), *self._combined.values(), *asked)}
        before = [(write, vars(write).copy()) for held in everyone.values() for write in held.writes.values()]
        anew: dict[int, Tensor] = {}  # deltas with the same entries go on sharing their positions
        for held in everyone.values():
            for name in moved.keys() & held.writes.keys():
                write, place = held.writes[name], moved[name]
                if id(write.positions) not in anew:
                    anew[id(write.positions)] = place.positions(held.entries[name][0])
                write.place, write.positions = place, anew[id(write.positions)]
                write.bits, write.base = write.bits.to(place.device), write.base.to(place.device)
        try:
            self._compare(everyone.values(), buffers=False)
        except FishError:
            for write, attributes in before:
                vars(write).update(attributes)
            raise
        self._places |= moved

    def _compare(self, held: Iterable[_Held], buffers: bool = True) -> None:
        """Raise FishError unless the weights are what is in use, and the base elsewhere, at the entries of ``held``."""
        changed = []
        for one in held:
            for name, write in one.writes.items():
                if buffers or not write.place.is_buffer:
                    expected = write.base.clone()
                    self._cover(expected, name, one.entries[name][0], "bits")
                    if not torch.equal(write.place.read(write.positions), expected):
                        changed.append(name)
        if changed:
            raise FishError(
                f"these weights were changed by others: {_listed(dict.fromkeys(changed))}; {self._advice()}"
            )

    def _advice(self) -> str:
        if self._present is self._base:
            return "if they are the base now, call rebase(), else undo that change"
        return f"undo that change; or load the base again, release() {self.active!r}, and add the deltas anew"

    # --- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: (held.delta, held.entries, _bases(held)) for name, held in self._held.items()}
        present = (self._present.spec, self._present.entries, _bases(self._present))
        return {"model": self.model, "held": kept, "present": present, "chosen": self._chosen.spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Switch.__init__(self, state["model"])
        for name, (delta, entries, bases) in state["held"].items():
            self._held[name] = self._ready(name, delta, entries, bases)
        spec, entries, bases = state["present"]
        if isinstance(spec, Combination):
            present = self._combined[spec] = self._ready(spec, None, entries, bases, self._parts(spec))
        else:
            present = self._resolve(spec, None)
        self._turns.present = present
        self._record(present)
        self._chosen = self._resolve(state["chosen"], None)


def _bases(held: _Held) -> dict[str, Tensor]:
    return {name: write.base for name, write in held.writes.items()}


def _delta(held: _Held) -> Delta:
    assert held.delta is not None
    return held.delta


def _names(held: _Held) -> tuple[str, ...]:
    if isinstance(held.spec, Combination):
        return tuple(name for name, _ in held.spec.parts)
    return () if held.spec is None else (held.spec,)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
