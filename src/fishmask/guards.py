"""What must hold before scores mean anything, and leaving the model as it was found.

A per-example gradient is defined only where the model is deterministic and its examples do not see each other.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fishmask.batches import Batch, cut, size
from fishmask.errors import FishError
from fishmask.likelihoods import Likelihood
from fishmask.live import paused

# Where each function takes its switch: (position, name, default). Dropout is active when p > 0 and training.
_DROPOUTS: dict[Callable[..., Any], tuple[tuple[int, float], tuple[int, bool]]] = {
    F.dropout: ((1, 0.5), (2, True)),
    F.dropout1d: ((1, 0.5), (2, True)),
    F.dropout2d: ((1, 0.5), (2, True)),
    F.dropout3d: ((1, 0.5), (2, True)),
    F.alpha_dropout: ((1, 0.5), (2, False)),
    F.feature_alpha_dropout: ((1, 0.5), (2, False)),
}


class Guard(TorchFunctionMode):
    """Refuses active dropout and BatchNorm on the batch's own statistics, whoever calls them, by the module's name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check one call, then make it."""
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        return func(*args, **kwargs)

    def check(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise FishError for a call whose result is random or mixes examples."""
        if _drops(func, args, kwargs):
            raise FishError(
                f"dropout is active in {self._caller()} although the model is in eval mode, so its scores would be "
                "random; switch it off there (training=self.training, or p=0)"
            )
        if func is F.batch_norm and _argument(args, kwargs, 5, "training", False):
            raise FishError(
                f"BatchNorm in {self._caller()} uses the statistics of the batch although the model is in eval mode. "
                "This mixes examples, so per-example gradients are not defined, and one example alone would give "
                "others; use running statistics (track_running_stats=True) or another norm"
            )

    def _caller(self) -> str:
        """Name the innermost module of the model that is running now."""
        names = {id(module): name for name, module in self._model.named_modules()}
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in names:
                return f"module {names[id(module)]!r} ({type(module).__name__})"
            frame = frame.f_back  # type: ignore[assignment]
        return "a function outside the model's modules"


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _drops(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in _DROPOUTS:
        (p_at, p), (training_at, training) = _DROPOUTS[func]
        active = _argument(args, kwargs, training_at, "training", training)
        return bool(active) and _argument(args, kwargs, p_at, "p", p) > 0
    if func in (torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout):
        return bool(_argument(args, kwargs, 2, "train", False)) and _argument(args, kwargs, 1, "p", 0.0) > 0
    if func is F.scaled_dot_product_attention:
        return bool(_argument(args, kwargs, 4, "dropout_p", 0.0) > 0)
    if func is F.multi_head_attention_forward:
        return bool(_argument(args, kwargs, 13, "training", True)) and _argument(args, kwargs, 10, "dropout_p", 0.0) > 0
    return func is F.rrelu and bool(_argument(args, kwargs, 3, "training", False))


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Score in eval mode with gradients, without autocast; then put back modes, requires_grad, .grad and buffers."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        kind = next((p.device.type for p in model.parameters()), "cpu")
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False), paused(model):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, requires_grad, gradient in flags:
            p.requires_grad_(requires_grad)
            p.grad = gradient
        for module, name, buffer, version, value in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


def require_gradients(model: nn.Module, required: bool) -> None:
    """Set requires_grad of every parameter that can have one."""
    for p in model.parameters():
        if p.is_floating_point() or p.is_complex():
            p.requires_grad_(required)


def check_independence(model: nn.Module, batch: Batch, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Run the model plainly on ``batch`` and on its last example alone; refuse if the example differs.

    Returns:
        The output of the whole batch, detached, and that of the example, with its graph.
    """
    n = size(batch) - 1
    with Guard(model):
        whole = likelihood(model, batch, 0).output
        if not whole.requires_grad:
            raise FishError(
                "the model's output depends on no parameter, so there is nothing to score; is it computed under "
                "torch.no_grad() or detached?"
            )
        whole = whole.detach()
        alone = likelihood(model, cut(batch, n, n + 1), n).output
    if not same(alone.detach()[0], whole[n], (whole.norm() / size(batch) ** 0.5).item()):
        raise FishError(
            f"example {n} of the first batch gives another {'loss' if likelihood.loss else 'output'} alone than within "
            f"the batch (off by {(whole[n] - alone.detach()[0]).norm().item():.3g}): the model or the loss mixes the "
            "examples of a batch, or is random, so per-example gradients are not defined. Use a loss that is computed "
            "for each example on its own (no in-batch negatives, no batch statistics)"
        )
    return whole, alone


def same(a: Tensor, b: Tensor, scale: float) -> bool:
    """Whether two outputs agree to 1e-3, or to what their dtype can tell, against the larger of norm and ``scale``."""
    tolerance = max(1e-3, 8 * torch.finfo(a.dtype).eps)
    a, b = a.double(), b.double()
    return a.shape == b.shape and (a - b).norm().item() <= tolerance * max(b.norm().item(), scale, 1e-12)


def walk(output: Tensor, parameters: Mapping[str, nn.Parameter]) -> tuple[set[str], dict[str, str], list[Tensor]]:
    """Walk the autograd graph of ``output``.

    Returns:
        The names of the parameters it depends on; for those that a custom autograd function takes, directly or through
        a view, the name of that function; and the other leaves it depends on.
    """
    names = {id(p): name for name, p in parameters.items()}
    reached: set[str] = set()
    custom: dict[str, str] = {}
    foreign: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := _leaf(node)) is not None and id(leaf) in names:
            reached.add(names[id(leaf)])
        elif leaf is not None:
            foreign.append(leaf)
        following = [child for child, _ in node.next_functions if child is not None]
        waiting += following
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            taken = (_leaf(_below_views(child)) for child in following)
            custom |= {names[id(leaf)]: type(node).__name__ for leaf in taken if leaf is not None and id(leaf) in names}
    return reached, custom, foreign


def _leaf(node: Any) -> Tensor | None:
    """Return the tensor that a node of the graph accumulates into; only a leaf's node has one."""
    return getattr(node, "variable", None)


def _below_views(node: Any) -> Any:
    """Follow a chain of functions of one tensor down to its start; a lookup is no view."""
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None and "Embedding" not in node.name():
        node = node.next_functions[0][0]
    return node
