"""Sites: the places in a model where the gradient of masked entries is taken.

A site is a forward hook on one module. The module's own forward runs untouched on its frozen weight; the hook then
adds an identity node to the graph, whose backward passes the output gradient on and computes from it the gradient of
the k values alone. No dense weight gradient lives longer than that node's backward.

A copied or pickled model does not take its hooks along: they become hooks that do nothing, and the copy is a plain
model. A copied Tuning hooks its own copy of the model again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from fishmask.params import put
from fishmask.plans import ConvolutionPlan, LookupPlan, ProductPlan
from fishmask.rounding import rounded
from fishmask.sharded import Part, own_class

# A copy of the used columns of a layer's input pays only if it is clearly smaller than the input itself, which
# several layers (query, key, value) may share without a copy.
_KEEP_COMPACT = 0.25


@dataclass
class Entry:
    """The masked entries of one parameter."""

    weight: nn.Parameter
    flat: Tensor  # int64 [K], sorted flat indices: the mask's own, on the CPU
    indices: Tensor  # the same on the weight's device, as `placed` gives them
    values: nn.Parameter  # float32 [K]
    part: Part | None = None  # this rank's, of a sharded weight
    salt: int | None = None  # of stochastic rounding

    def rounded(self) -> Tensor:
        """Return the values as the weight holds them."""
        return rounded(self.values.detach(), self.weight.dtype, self.indices, self.salt)

    def write(self) -> None:
        """Write the values into the weight."""
        if self.part is None:
            put(self.weight, self.indices, self.rounded())
        else:
            self.part.put(self.weight, self.rounded())


class Hook:
    """A hook on a module that does nothing in a copy of the module."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Pass the module and its arguments on."""
        return self._call(*args)

    def __reduce__(self) -> Any:
        return _nothing_to_do, ()


def _nothing_to_do() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """Stand for a hook in a copied module."""


class _Collect(torch.autograd.Function):
    """Identity on a layer's output whose backward feeds the values of its weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None, site: "Site"
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.site = site
        return output.detach()  # not a view in autograd's eyes, so an in-place activation may follow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        (kept,) = ctx.saved_tensors
        grad = ctx.site.arrange(grad)
        _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        weight = ctx.site.weight_gradient(grad, kept) if needs_weight else None
        bias = ctx.site.bias_gradient(grad) if needs_bias else None
        return (grad if ctx.needs_input_grad[0] else None), None, weight, bias, None


class _Gather(torch.autograd.Function):
    """The weight itself, whose dense gradient is gathered into the values; for vectors, where dense is cheapest."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad.flatten().index_select(0, indices).float(), None, None


class _CollectNorm(torch.autograd.Function):
    """Identity on a layer norm's output whose backward feeds the values of its weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_values: Tensor | None,
        bias_values: Tensor | None,
        site: "NormSite",
    ) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.site = site
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs_output, *_, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        _, by_weight, by_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, mean, rstd, weight, bias, [False, needs_weight, needs_bias]
        )
        if needs_weight:
            by_weight = by_weight.flatten().index_select(0, ctx.site.weight_indices).float()
        if needs_bias:
            by_bias = by_bias.flatten().index_select(0, ctx.site.bias_indices).float()
        return (grad if needs_output else None), None, None, None, None, None, by_weight, by_bias, None


def _held_by(output: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the input, means and reciprocal deviations that a layer norm keeps, None where they cannot be had.

    Under hooks on saved tensors (gradient checkpointing is one) looking at them would set those off, and a layer whose
    input needs no gradient keeps none.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    node: Any = output.grad_fn
    if type(node).__name__ != "NativeLayerNormBackward0":
        return None
    return node._saved_input.detach(), node._saved_result1, node._saved_result2


class Site(Hook):
    """Forward hook of one module; subclasses know how its weight is used."""

    def __init__(self, weight: Entry | None, bias: Entry | None) -> None:
        super().__init__(self._attach)
        self.weight = weight
        self.bias = bias
        # The backward of a forward that has begun needs them also after drop().
        self.weight_indices = None if weight is None else weight.indices
        self.bias_indices = None if bias is None else bias.indices
        self.paused = False

    @property
    def nbytes(self) -> int:
        """Bytes of the plan, where there is one."""
        plan = getattr(self, "plan", None)
        return 0 if plan is None else int(plan.nbytes)

    def drop(self, values: nn.Parameter) -> None:
        """Serve these values no more."""
        if self.weight is not None and self.weight.values is values:
            self.weight = None
        if self.bias is not None and self.bias.values is values:
            self.bias = None

    def _attach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Return the output with the values' gradient attached (a forward hook's signature)."""
        if self.paused or not torch.is_grad_enabled() or (self.weight is None and self.bias is None):
            return None
        return self.collect(module, args[0] if args else next(iter(kwargs.values())), output)

    def collect(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Attach the values' gradient to ``output``, the module's result for the input ``x``."""
        kept = None if self.weight is None else self.keep(x.detach())
        weight = None if self.weight is None else self.weight.values
        bias = None if self.bias is None else self.bias.values
        collected: Tensor = _Collect.apply(output, kept, weight, bias, self)
        return collected

    def keep(self, x: Tensor) -> Tensor:
        """Return what the backward needs of the input."""
        return x

    def arrange(self, grad: Tensor) -> Tensor:
        """Lay out the output gradient as all that follows wants it."""
        return grad

    def weight_gradient(self, grad: Tensor, kept: Tensor) -> Tensor:
        """Return the gradient of the weight's values, float32 [K]."""
        raise TypeError(f"{type(self).__name__} has no weight gradient")

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of the bias's values, float32 [K]."""
        assert self.bias_indices is not None
        grad = _tokens(grad)
        if 8 * len(self.bias_indices) < grad.shape[1]:  # reading single columns costs eight times as much
            return grad.index_select(1, self.bias_indices).sum(0, dtype=torch.float32)
        return grad.sum(0, dtype=torch.float32).index_select(0, self.bias_indices)


class LinearSite(Site):
    """``nn.Linear`` (weight [O, I]) and, transposed, the ``Conv1D`` of GPT-2 (weight [I, O])."""

    def __init__(self, weight: Entry | None, bias: Entry | None, *, transposed: bool) -> None:
        super().__init__(weight, bias)
        self.transposed = transposed
        self.compact = False
        if weight is not None:
            self.plan = ProductPlan(weight.flat, weight.weight.shape, device=weight.weight.device)
            used = self.plan.rows if transposed else self.plan.columns
            in_features = weight.weight.shape[0 if transposed else 1]
            self.compact = used is not None and len(used) <= _KEEP_COMPACT * in_features

    def _input_of(self, x: Tensor) -> Tensor:
        return self.plan.rows_of(_tokens(x)) if self.transposed else self.plan.columns_of(_tokens(x))

    @override
    def keep(self, x: Tensor) -> Tensor:
        return self._input_of(x) if self.compact else x

    @override
    def arrange(self, grad: Tensor) -> Tensor:
        # One copy for weight, bias and the layer's own backward; attention hands over transposed gradients.
        return grad.contiguous()

    @override
    def weight_gradient(self, grad: Tensor, kept: Tensor) -> Tensor:
        grad = _tokens(grad)
        # Under autocast the layer worked in the dtype of its gradient.
        x = (kept if self.compact else self._input_of(kept)).to(grad.dtype)
        if self.transposed:
            return self.plan.product(x, self.plan.columns_of(grad))
        return self.plan.product(self.plan.rows_of(grad), x)


class ConvolutionSite(Site):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with zero padding, save padding="same"."""

    def __init__(self, weight: Entry | None, bias: Entry | None, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(weight, bias)
        padding = [0] * len(module.stride) if module.padding == "valid" else module.padding
        self.geometry: Any = (module.stride, padding, module.dilation, module.groups)
        self.dims = module.weight.dim()
        self.compact = False
        if weight is not None:
            self.plan = ConvolutionPlan(weight.flat, module.weight.shape, module.groups, device=module.weight.device)
            used = self.plan.inputs
            self.compact = used is not None and len(used) <= _KEEP_COMPACT * module.in_channels

    @override
    def keep(self, x: Tensor) -> Tensor:
        return self.plan.inputs_of(self._batched(x)) if self.compact else x

    @override
    def weight_gradient(self, grad: Tensor, kept: Tensor) -> Tensor:
        x = (kept if self.compact else self.plan.inputs_of(self._batched(kept))).to(grad.dtype)
        return self.plan.product(self.plan.outputs_of(self._batched(grad)), x, *self.geometry)

    @override
    def bias_gradient(self, grad: Tensor) -> Tensor:
        assert self.bias_indices is not None
        sums = self._batched(grad).flatten(2).sum((0, 2), dtype=torch.float32)
        return sums.index_select(0, self.bias_indices)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == self.dims else x.unsqueeze(0)


class EmbeddingSite(Site):
    """``nn.Embedding`` without max_norm, scale_grad_by_freq or sparse gradients."""

    def __init__(self, weight: Entry, padding_idx: int | None) -> None:
        super().__init__(weight, None)
        device = weight.weight.device
        self.plan = LookupPlan(weight.flat, weight.weight.shape, padding_idx=padding_idx, device=device)

    @override
    def weight_gradient(self, grad: Tensor, kept: Tensor) -> Tensor:
        return self.plan.product(_tokens(grad), kept.reshape(-1))


class NormSite(Site):
    """``nn.LayerNorm`` and ``nn.RMSNorm``: PyTorch's fused backward, asked for the gradient of weight and bias alone.

    It needs what the forward of the layer has kept for its own backward. Where that cannot be had, the output is
    computed again with a weight that leads to the values.
    """

    @override
    def collect(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        if (held := _held_by(output)) is not None:
            values = [None if entry is None else entry.values for entry in (self.weight, self.bias)]
            collected: Tensor = _CollectNorm.apply(output, *held, module.weight, module.bias, *values, self)
            return collected
        weight = module.weight if self.weight is None else _gathered(module.weight, self.weight)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, weight, module.eps)
        bias = module.bias if self.bias is None else _gathered(module.bias, self.bias)
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class DenseGradient:
    """Hook on a parameter's accumulated gradient: gather it into the values, drop it. Right for any use at all."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, weight: Tensor) -> None:
        """Move the gradient of ``weight`` to the values."""
        grad, weight.grad = weight.grad, None
        assert grad is not None
        if grad.is_sparse:
            grad = grad.to_dense()
        gathered = grad.reshape(-1).index_select(0, self.entry.indices).float()
        # Not by assignment: hooks on the values, such as those of DDP, must see it.
        torch.autograd.backward([self.entry.values], [gathered])


def site_for(module: nn.Module, entries: Mapping[str, Entry]) -> Site | None:
    """Return the site for ``module``, or None when its kind is not known and the general path must serve.

    Only exact types count: a subclass may use its weight differently.

    Args:
        module: A module that owns masked entries.
        entries: The masked entries by attribute name of ``module``.
    """
    # Another attribute than these, or an instance whose forward somebody has replaced: not the module we know.
    if not set(entries) <= {"weight", "bias"} or "forward" in vars(module):
        return None
    weight, bias = entries.get("weight"), entries.get("bias")
    kind = own_class(module)
    if isinstance(module, nn.Linear) and (kind is nn.Linear or kind.__module__.startswith("bitsandbytes.")):
        return LinearSite(weight, bias, transposed=False)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return LinearSite(weight, bias, transposed=True)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        simple = module.padding_mode == "zeros" and module.padding != "same"
        return ConvolutionSite(weight, bias, module) if simple else None
    if isinstance(module, nn.Embedding) and kind is nn.Embedding and weight is not None:
        simple = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return EmbeddingSite(weight, module.padding_idx) if simple else None
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return NormSite(weight, bias)
    return None


def _tokens(x: Tensor) -> Tensor:
    """Flatten [..., D] to [T, D]."""
    return x.reshape(-1, x.shape[-1])


def _gathered(weight: Tensor, entry: Entry) -> Tensor:
    gathered: Tensor = _Gather.apply(entry.values, weight, entry.indices)
    return gathered


def hook_input_embeddings(model: nn.Module) -> list[RemovableHandle]:
    """Let reentrant gradient checkpointing work on a Hugging Face model: it needs an input that requires grad."""
    getter = getattr(model, "get_input_embeddings", None)
    if not callable(getter):
        return []
    try:
        embeddings = getter()
    except NotImplementedError:
        return []
    if not isinstance(embeddings, nn.Module):
        return []

    def require_grad(module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and isinstance(output, Tensor)):
            return
        if not output.requires_grad and model.training and _checkpoints_reentrantly(model):
            output.requires_grad_(True)

    return [embeddings.register_forward_hook(Hook(require_grad))]


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    # Runs in every training forward: vars() is far quicker than getattr() where a module lacks the attribute.
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    return any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions if f is not None)
