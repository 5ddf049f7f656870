"""Find uses of a weight that its module's site cannot see, such as ``F.linear(x, embedding.weight)``."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Questions about a tensor, which no gradient flows through. Property getters all have the name __get__.
_QUERIES = frozenset(
    """__format__ __hash__ __len__ __repr__ data_ptr detach dim element_size get_device is_complex is_contiguous
    is_floating_point ndimension nelement numel requires_grad_ size storage_offset stride type untyped_storage
    """.split()  # noqa: SIM905
)
_TRANSPOSES = frozenset(getattr(Tensor, name).__get__ for name in ("T", "H", "mT", "mH"))


class Watch(TorchFunctionMode):
    """While active, report every watched weight that a torch function takes outside its own module's forward."""

    def __init__(self, owners: Iterable[tuple[nn.Module, Iterable[Tensor]]], report: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._depth: dict[int, int] = {}
        self._report = report
        self._handles: list[Any] = []
        for module, weights in owners:
            ids = [id(weight) for weight in weights]
            self._depth.update(dict.fromkeys(ids, 0))
            self._handles.append(module.register_forward_pre_hook(self._step(ids, 1), prepend=True))
            self._handles.append(module.register_forward_hook(self._step(ids, -1), always_call=True))

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            if self._depth.get(id(tensor)) == 0 and not _is_query(func):
                self._report(tensor)
        return func(*args, **kwargs)

    def _step(self, ids: list[int], change: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for key in ids:
                self._depth[key] += change

        return hook


def _is_query(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _QUERIES or (name == "__get__" and func not in _TRANSPOSES)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
