"""Turns at something that many may use at once as it is, and that changes only while nobody does.

First come, first served: whoever finds a queue joins it, so nobody waits for ever. When the turn comes to a queue's
head, all who wait for the same go in with it.
"""

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from fishmask.errors import FishError

ANYTHING: Final = object()  # for those who take it as it is


@dataclass(eq=False)
class _Ticket:
    """A place in the queue."""

    wanted: object
    thread: int
    called: threading.Condition
    admitted: bool = False


@dataclass(eq=False)
class _Hold:
    """A turn that is being taken."""

    turns: "Turns"
    wanted: object
    thread: int = field(default_factory=threading.get_ident)
    forwards: int = 0  # how many forwards deep, where a forward has taken it for itself
    caller: FrameType | None = None  # of that forward
    over: bool = False


# By context and not by thread, so that `asyncio.to_thread` inside a block works within its turn.
_holds: ContextVar[tuple[_Hold, ...]] = ContextVar("_holds", default=())


class Turns:
    """Turns at one thing.

    Args:
        present: What it is now.
        change: Makes it something else; called while nobody has a turn. If it raises, it is what it was.
    """

    def __init__(self, present: object, change: Callable[[Any], None]) -> None:
        self.present = present
        self._change = change
        self._mutex = threading.Lock()
        self._holders: Counter[int] = Counter()  # turns by thread
        self._queue: deque[_Ticket] = deque()
        self._open: set[_Hold] = set()

    def held(self) -> _Hold | None:
        """Return this context's turn, or None."""
        for hold in _holds.get():
            if hold.turns is self and not hold.over:
                if hold.forwards and not _is_running(hold):  # an interrupt left it without a word
                    self.leave(hold)
                    continue
                return hold
        return None

    def enter(self, wanted: object) -> _Hold:
        """Wait for a turn at what is wanted, and make it that.

        Raises:
            FishError: This thread has a turn at something else, which would never end.
        """
        thread = threading.get_ident()
        with self._mutex:
            if self._queue or not self._fits(wanted):
                self._end_dead()
            if self._queue or not self._fits(wanted):
                if thread not in self._holders:
                    self._wait(_Ticket(wanted, thread, threading.Condition(self._mutex)))
                elif not self._is(wanted):
                    raise FishError(
                        "this thread has not finished with another delta, in another task or in a generator that "
                        "waits to go on, so waiting for it would never end: serve each request from beginning to end "
                        "in a thread of its own, such as asyncio.to_thread()"
                    )
                else:
                    self._holders[thread] += 1
            else:
                self._admit(wanted, thread)
            hold = _Hold(self, wanted, thread)
            self._open.add(hold)
        _holds.set((*(h for h in _holds.get() if not h.over), hold))
        return hold

    def leave(self, hold: _Hold) -> None:
        """End a turn."""
        with self._mutex:
            self._end(hold)
            self._call_next()
        _holds.set(tuple(h for h in _holds.get() if not h.over))

    def _end(self, hold: _Hold) -> None:
        """Count a turn as ended; with the mutex."""
        if hold.over:
            return
        hold.over, hold.caller = True, None
        self._open.discard(hold)
        self._holders[hold.thread] -= 1
        if not self._holders[hold.thread]:
            del self._holders[hold.thread]

    def _end_dead(self) -> None:
        """End the turns of forwards that an interrupt ended: PyTorch calls no hook then."""
        for hold in [hold for hold in self._open if hold.forwards and not _is_running(hold)]:
            self._end(hold)

    @contextmanager
    def at(self, wanted: object) -> Iterator[None]:
        """Take a turn for the time of a ``with`` block."""
        hold = self.enter(wanted)
        try:
            yield
        finally:
            self.leave(hold)

    def _is(self, wanted: object) -> bool:
        return wanted is ANYTHING or wanted is self.present

    def _fits(self, wanted: object) -> bool:
        return not self._holders or self._is(wanted)

    def _wait(self, ticket: _Ticket) -> None:
        self._queue.append(ticket)
        try:
            while not (ticket.admitted or (self._queue[0] is ticket and self._fits(ticket.wanted))):
                if not ticket.called.wait(1.0):  # nobody calls for a turn that an interrupt has ended
                    self._end_dead()
        except BaseException:
            if ticket.admitted:
                self._holders[ticket.thread] -= 1
                self._holders += Counter()  # drops zeros
            else:
                self._queue.remove(ticket)
            self._call_next()
            raise
        if not ticket.admitted:
            self._queue.popleft()
            self._admit(ticket.wanted, ticket.thread)

    def _admit(self, wanted: object, thread: int) -> None:
        try:
            if not self._is(wanted):
                self._change(wanted)
                self.present = wanted
        except BaseException:
            self._call_next()
            raise
        self._holders[thread] += 1
        for ticket in [t for t in self._queue if self._is(t.wanted)]:
            self._queue.remove(ticket)
            ticket.admitted = True
            self._holders[ticket.thread] += 1
            ticket.called.notify()

    def _call_next(self) -> None:
        if self._queue and self._fits(self._queue[0].wanted):
            self._queue[0].called.notify()


# --- forwards take turns too ------------------------------------------------------------------------------------------


class Serving:
    """Has each forward of a module outside of a turn take one by itself, as long as this object lives.

    ``torch.compile`` leaves the hooks as they are where it compiles the module itself; where the module's call is part
    of a larger graph, they are left out of it.

    Args:
        module: The module.
        turns: The turns.
        wanted: Returns what such a forward wants.
    """

    def __init__(self, module: nn.Module, turns: Turns, wanted: Callable[[], object]) -> None:
        self.turns, self.wanted = turns, wanted
        _keep_out_of_graphs()
        _served[module] = ref(self)
        self._handles = [
            module.register_forward_pre_hook(_before_forward, prepend=True),
            module.register_forward_hook(_after_forward, always_call=True),
        ]

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


_served: "WeakKeyDictionary[nn.Module, ref[Serving]]" = WeakKeyDictionary()
_CALL = nn.Module._call_impl.__code__


def _before_forward(module: nn.Module, args: Any) -> None:
    """Take a turn, unless this context has one."""
    serving = _serving(module)
    if serving is None:
        return
    hold = serving.turns.held()
    if hold is None:
        hold = serving.turns.enter(serving.wanted())
        hold.forwards, hold.caller = 1, _caller()
    elif hold.forwards:
        hold.forwards += 1


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    """End the turn that this forward took."""
    serving = _serving(module)
    hold = None if serving is None else serving.turns.held()
    if hold is not None and hold.forwards:
        hold.forwards -= 1
        if not hold.forwards:
            hold.turns.leave(hold)


def _serving(module: nn.Module) -> Serving | None:
    """Return what serves a module; None for a copy of one that is served."""
    found = _served.get(module)
    return None if found is None else found()


def _keep_out_of_graphs() -> None:
    """Have torch.compile neither compile the hooks nor break a graph for them."""
    global _before_forward, _after_forward
    if hasattr(_before_forward, "_torchdynamo_disable"):
        return
    hooks = torch.compiler.disable(_before_forward), torch.compiler.disable(_after_forward)
    for hook in hooks:
        torch.compiler.substitute_in_graph(hook, skip_signature_check=True)(_nothing)
    # Under their own names, so that a module with these hooks can be pickled.
    _before_forward, _after_forward = hooks


def _nothing(*args: Any) -> None:
    """Stand for a hook in a graph."""


def _caller() -> FrameType | None:
    """Return the frame of the module's call that runs a hook."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def _is_running(hold: _Hold) -> bool:
    """Whether the forward that has taken a turn runs still, in its own thread."""
    if hold.caller is None:
        return True
    frame = sys._current_frames().get(hold.thread)
    while frame is not None and frame is not hold.caller:
        frame = frame.f_back
    return frame is not None
