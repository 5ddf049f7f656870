"""Find uses of a weight that its module's site cannot see, such as ``F.linear(x, embedding.weight)``."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fishmask.sites import Hook

# Questions about a tensor, which no gradient flows through. Property getters all have the name __get__.
_QUERIES = frozenset(
    """__format__ __hash__ __len__ __repr__ data_ptr detach dim element_size get_device is_complex is_contiguous
    is_floating_point ndimension nelement numel requires_grad_ size storage_offset stride type untyped_storage
    """.split()  # noqa: SIM905
)
_TRANSPOSES = frozenset(getattr(Tensor, name).__get__ for name in ("T", "H", "mT", "mH"))


class _Functions:
    """Calls of ``torch.autograd.Function``s, which modes do not see: told to the watches of the thread that calls.

    ``apply`` has another method in its place for as long as anybody watches, and no longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching = 0  # of all threads
        self._thread = threading.local()

    def follow(self, watch: "Watch") -> None:
        """Tell a watch of the calls of this thread."""
        self._watches().append(watch)
        with self._lock:
            self._watching += 1
            if self._watching == 1:
                self._apply = torch.autograd.Function.__dict__["apply"]
                torch.autograd.Function.apply = classmethod(self._told())  # type: ignore[assignment,method-assign]

    def leave(self, watch: "Watch") -> None:
        """Tell it no more."""
        self._watches().remove(watch)
        with self._lock:
            self._watching -= 1
            if self._watching == 0:
                torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]

    def _watches(self) -> "list[Watch]":
        if not hasattr(self._thread, "watches"):
            self._thread.watches = []
        watches: list[Watch] = self._thread.watches
        return watches

    def _told(self) -> Callable[..., Any]:
        apply = self._apply.__func__

        def told(cls: Any, *args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():  # what a report does is no use of a weight
                for watch in self._watches():
                    watch.look(cls, (*args, *kwargs.values()))
            return apply(cls, *args, **kwargs)

        return told


_FUNCTIONS = _Functions()


class _Thread(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.forwards = 0
        self.looking = False
        self.depth: dict[int, int] = {}  # id of a weight -> how many forwards of its modules are running


class Watch(TorchFunctionMode):
    """Between ``start`` and ``stop``, report every owned weight that a call takes outside its module's forward.

    Both may nest, and several threads may watch at a time.
    """

    def __init__(self, report: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._report = report
        self._owned: set[int] = set()  # ids of weights
        self._thread = _Thread()

    def own(self, module: nn.Module, weights: Iterable[Tensor]) -> list[RemovableHandle]:
        """Let ``module`` use ``weights``; return the handles of the hooks that follow its forward."""
        ids = [id(weight) for weight in weights]
        self._owned.update(ids)
        thread = self._thread

        def enter(*_: Any) -> None:
            if not torch.compiler.is_compiling() and thread.looking:
                for key in ids:
                    thread.depth[key] = thread.depth.get(key, 0) + 1

        def leave(*_: Any) -> None:
            if not torch.compiler.is_compiling() and thread.looking:
                for key in ids:
                    thread.depth[key] = thread.depth.get(key, 0) - 1

        return [
            module.register_forward_pre_hook(Hook(enter), prepend=True),
            module.register_forward_hook(Hook(leave), always_call=True),
        ]

    def start(self, look: bool = True) -> None:
        """Begin a forward of this thread; watch it if ``look``, or if one that it is part of is watched."""
        thread = self._thread
        thread.forwards += 1
        if look and not thread.looking:
            thread.depth.clear()  # no owner is running now
            thread.looking = True
            self.__enter__()
            _FUNCTIONS.follow(self)

    def stop(self, altogether: bool = False) -> None:
        """End the last ``start`` of this thread, or all of them."""
        thread = self._thread
        thread.forwards = 0 if altogether else max(0, thread.forwards - 1)
        if thread.forwards == 0 and thread.looking:
            thread.looking = False
            _FUNCTIONS.leave(self)
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Runs at every call of the forward, so plain look-ups first.
        owned = self._owned
        for value in args:
            if id(value) in owned or type(value) in (list, tuple):
                self.look(func, value)
        if not kwargs:
            return func(*args)
        for value in kwargs.values():
            if id(value) in owned or type(value) in (list, tuple):
                self.look(func, value)
        return func(*args, **kwargs)

    def look(self, func: Any, value: Any) -> None:
        """Report an owned weight, or those in a list, that ``func`` takes outside its module's forward."""
        if isinstance(value, list | tuple):
            for item in value:
                self.look(func, item)
        elif id(value) in self._owned and not self._thread.depth.get(id(value), 0) and not _is_query(func):
            self._report(value)


def _is_query(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _QUERIES or (name == "__get__" and func not in _TRANSPOSES)
