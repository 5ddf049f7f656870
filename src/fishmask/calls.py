"""The functions that use a parameter, as the batched engine makes them: each call records its rules.

`HANDLERS` maps a function to the code that stands in for it; `VIEWS` are the functions that only look at a parameter
in another way. A call that neither knows is refused, so what the batched engine covers is proven, not assumed.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask.rules import Convolution, Lookup, Product, Rule, Small, View


class Tape(Protocol):
    """What handlers ask of the engine that records a forward pass."""

    B: int

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: Any) -> None: ...
    def view(self, value: Any) -> View | None:
        """Return the view that ``value`` is, None if it is no parameter."""

    def keep(self, value: Tensor) -> Tensor:
        """Return an input that a rule needs later, watched for changes in place."""

    def record(self, out: Tensor, *rules: Rule) -> Tensor:
        """Return ``out``, wired so that the rules receive its derivative."""

    def refuse(self, reason: str) -> NoReturn:
        """Give up on the batched engine, naming parameter and function."""


def _activation(tape: Tape, x: Any) -> Tensor:
    """Return ``x`` with the examples first; positions flattened into the examples are unflattened where provable."""
    if not isinstance(x, Tensor) or tape.view(x) is not None:
        tape.refuse("its input is itself a parameter")
    if x.dim() >= 2 and x.shape[0] == tape.B:
        return tape.keep(x)
    if not _flattened_examples(x, tape.B):
        tape.refuse(_no_examples("its input", x, tape.B))
    return tape.keep(x).view(tape.B, -1, x.shape[-1])


def _flattened_examples(x: Tensor, B: int) -> bool:
    """Whether ``x`` is [B*S, I] seen from [B, ...] so that the rows of an example follow each other."""
    base = x._base
    if base is None or base.dim() < 2 or base.shape[0] != B or x.dim() != 2 or not x.is_contiguous():
        return False
    inside = sum((size - 1) * stride for size, stride in zip(base.shape[1:], base.stride()[1:], strict=True))
    return base.numel() == x.numel() and inside < base.stride(0)


def _no_examples(what: str, x: Tensor, B: int) -> str:
    return f"{what}, of shape {list(x.shape)}, does not have the {B} examples as first dimension"


def _bias(tape: Tape, bias: Any) -> list[Rule]:
    """Return the rule of a bias on the last dimension, none where there is no bias or it is no parameter."""
    view = tape.view(bias)
    if view is None:
        return []
    if view.tensor.dim() != 1:
        tape.refuse(f"the bias has shape {list(view.tensor.shape)}")
    B = tape.B
    return [Small(view, lambda dY: dY.reshape(B, -1, dY.shape[-1]).sum(1, dtype=torch.float32))]


def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call ``F.linear``."""
    x = _activation(tape, input)
    view = tape.view(weight)
    rules = _bias(tape, bias)
    if view is not None:
        if weight.dim() != 2:
            tape.refuse(f"the weight has shape {list(weight.shape)}")
        rules.append(Product(view, x.reshape(tape.B, -1, x.shape[-1]), x_first=False))
    return tape.record(F.linear(input, weight, bias), *rules)


def addmm(
    tape: Tape, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Tensor:
    """Call ``torch.addmm``, as Hugging Face's Conv1D does."""
    if beta != 1 or alpha != 1 or out is not None:
        tape.refuse("beta, alpha or out is given")
    x = _activation(tape, mat1)
    rules = _bias(tape, input)
    if (view := tape.view(mat2)) is not None:
        rules.append(Product(view, x.reshape(tape.B, -1, x.shape[-1]), x_first=True))
    return tape.record(torch.addmm(input, mat1, mat2), *rules)


def matmul(tape: Tape, input: Tensor, other: Tensor, *, out: Any = None) -> Tensor:
    """Call ``torch.matmul`` with the parameter, a matrix, on the right."""
    view = tape.view(other)
    if view is None or other.dim() != 2 or out is not None:
        tape.refuse("only input @ matrix is known")
    x = _activation(tape, input)
    rule = Product(view, x.reshape(tape.B, -1, x.shape[-1]), x_first=True)
    return tape.record(torch.matmul(input, other), rule)


def embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Call ``F.embedding``; ids [1, S] that serve all examples give each its own copy of the rows."""
    view = tape.view(weight)
    if view is None or max_norm is not None or scale_grad_by_freq:
        tape.refuse("max_norm or scale_grad_by_freq is set" if view is not None else "it is used as ids")
    if input.dim() == 0 or input.shape[0] not in (1, tape.B) or (input.dim() == 1 and input.shape[0] != tape.B):
        tape.refuse(_no_examples("the tensor of ids", input, tape.B))
    ids = tape.keep(input).expand(tape.B, *input.shape[1:])
    out = F.embedding(input, weight).expand(tape.B, *input.shape[1:], -1)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return tape.record(out, Lookup(view, ids, padding))


def _scaled(tape: Tape, out: Tensor, weight: Any, bias: Any, plain: Callable[[], Tensor], axis: int) -> Tensor:
    """Record out = plain * weight + bias of a norm; the parameters lie along dimension ``axis`` and after, or on it.

    ``axis`` counts from the end for norms over the last dimensions; it is 1 for norms with one number per channel.
    """
    B, rules = tape.B, []

    def reduced(dY: Tensor) -> Tensor:
        if axis == 1:
            return dY.reshape(B, dY.shape[1], -1).sum(-1, dtype=torch.float32)
        return dY.reshape(B, -1, *dY.shape[axis:]).sum(1, dtype=torch.float32)

    if (view := tape.view(weight)) is not None:
        rules.append(Small(view, lambda dY: reduced(dY.float() * plain())))
    if (view := tape.view(bias)) is not None:
        rules.append(Small(view, reduced))
    return tape.record(out, *rules)


def layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Call ``F.layer_norm``."""
    x = _activation(tape, input)
    if input.dim() <= len(normalized_shape):
        tape.refuse("the norm is taken over the examples too")
    shape = input.shape  # the closure must not hold the output: its hook would hold the closure, for ever

    def plain() -> Tensor:
        return F.layer_norm(x.float(), normalized_shape, None, None, eps).view(shape)

    out = F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _scaled(tape, out, weight, bias, plain, -len(normalized_shape))


def rms_norm(
    tape: Tape, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Call ``F.rms_norm``."""
    x = _activation(tape, input)
    if input.dim() <= len(normalized_shape):
        tape.refuse("the norm is taken over the examples too")
    shape, exact_eps = input.shape, torch.finfo(input.dtype).eps if eps is None else eps

    def plain() -> Tensor:
        return F.rms_norm(x.float(), normalized_shape, None, exact_eps).view(shape)

    out = F.rms_norm(input, normalized_shape, weight, eps)
    return _scaled(tape, out, weight, None, plain, -len(normalized_shape))


def _channels(tape: Tape, input: Tensor) -> Tensor:
    if input.dim() < 2 or input.shape[0] != tape.B:
        tape.refuse(_no_examples("its input", input, tape.B))
    return _activation(tape, input)


def group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Call ``F.group_norm``."""
    x = _channels(tape, input)
    out = F.group_norm(input, num_groups, weight, bias, eps)
    return _scaled(tape, out, weight, bias, lambda: F.group_norm(x.float(), num_groups, None, None, eps), 1)


def batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Call ``F.batch_norm`` with running statistics."""
    if training or running_mean is None or running_var is None:
        tape.refuse("it uses the statistics of the batch")
    x, mean, var = _channels(tape, input), tape.keep(running_mean).float(), tape.keep(running_var).float()
    out = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scaled(tape, out, weight, bias, lambda: F.batch_norm(x.float(), mean, var, eps=eps), 1)


def _listed(value: int | tuple[int, ...] | list[int], spatial: int) -> list[int]:
    return [value] * spatial if isinstance(value, int) else list(value) * (spatial // len(value))


def convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Call ``F.conv1d``, ``conv2d`` or ``conv3d``."""
    spatial = weight.dim() - 2
    if input.dim() != spatial + 2 or input.shape[0] != tape.B:
        tape.refuse(_no_examples("its input", input, tape.B))
    if padding == "same":
        # May differ between the two sides: pad first, so that what is kept is what is convolved.
        totals = [d * (k - 1) for d, k in zip(_listed(dilation, spatial), weight.shape[2:], strict=True)]
        input = F.pad(input, [side for t in reversed(totals) for side in (t // 2, t - t // 2)])
    padding = 0 if isinstance(padding, str) else padding
    options = (_listed(stride, spatial), _listed(padding, spatial), _listed(dilation, spatial), groups)
    call = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    out = call(input, weight, bias, *options)
    B, rules = tape.B, list[Rule]()
    if (view := tape.view(weight)) is not None:
        rules.append(Convolution(view, _activation(tape, input), options))
    if (view := tape.view(bias)) is not None:
        rules.append(Small(view, lambda dY: dY.reshape(B, dY.shape[1], -1).sum(-1, dtype=torch.float32)))
    return tape.record(out, *rules)


def _added_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask to add to attention scores: true in a bool mask forbids."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Do what ``F.multi_head_attention_forward`` does on [positions, examples, E], in calls with known rules.

    ``is_causal`` is only a hint there: the mask it hints at must come too, and is what counts.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        tape.refuse("bias_k, bias_v, add_zero_attn or a static key or value is used")
    if query.dim() != 3 or (is_causal and attn_mask is None):
        tape.refuse("its query is not [positions, examples, E]" if query.dim() != 3 else "is_causal comes without mask")
    with tape:  # what follows is recorded like any other code of the model
        q, k, v = _projected(
            (query, key, value),
            (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
            in_proj_weight,
            in_proj_bias,
        )
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, positions, d]
        mask = _added_mask(attn_mask, query.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(q.shape[0], num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _added_mask(key_padding_mask, query.dtype)
            assert padding is not None
            mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask)
        out = F.linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), weights


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor],
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return queries, keys and values, examples first; one product does all three in self-attention."""
    x = [t.transpose(0, 1) for t in inputs]
    if separate is None and inputs[0] is inputs[1] is inputs[2]:
        assert weight is not None
        return F.linear(x[0], weight, bias).chunk(3, -1)
    weights = weight.chunk(3) if weight is not None and separate is None else separate
    assert weights is not None
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(t, w, b) for t, w, b in zip(x, weights, biases, strict=True))  # type: ignore[arg-type]


def _own_copies(tape: Tape, view: View, dims: int) -> Tensor:
    """Return the parameter with ``dims`` dimensions, expanded to one copy per example, as a leaf that is recorded."""
    p = view.tensor.detach()
    if p.dim() == dims and p.shape[0] != 1:
        tape.refuse(f"with shape {list(p.shape)} it meets {dims} dimensions, the first of which is the examples")
    p = p.reshape([1] * (dims - p.dim()) + list(p.shape))
    leaf = p.expand(tape.B, *p.shape[1:]).requires_grad_()
    tape.record(leaf, Small(view, lambda dY: dY))
    return leaf


def elementwise(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the handler of a broadcasting function such as ``torch.mul``."""

    def handler(tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
        others = [a for a in args if isinstance(a, Tensor) and tape.view(a) is None]
        shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))
        per_example = bool(shape) and shape[0] == tape.B and any(a.shape == shape for a in others)
        table = bool(shape) and shape[0] == 1 and not others  # such as class token + first position
        if not per_example and not table:
            tape.refuse(f"the result, of shape {list(shape)}, does not have the {tape.B} examples as first dimension")
        views = [tape.view(a) for a in args]
        return func(*(a if v is None else _own_copies(tape, v, len(shape)) for a, v in zip(args, views, strict=True)))

    def inplace(tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or (func.__name__ in _INPLACE and tape.view(args[0]) is not None):
            tape.refuse("it is called with keywords" if kwargs else "it changes the parameter")
        return handler(tape, *args)

    return inplace


def expand(tape: Tape, input: Tensor, *sizes: Any) -> Tensor:
    """Call ``Tensor.expand`` over the examples."""
    shape = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    view = tape.view(input)
    if view is None or not shape or shape[0] != tape.B:
        tape.refuse(f"it is expanded to {shape}, whose first dimension is not the {tape.B} examples")
    return _own_copies(tape, view, len(shape)).expand(shape)


def expand_as(tape: Tape, input: Tensor, other: Tensor) -> Tensor:
    """Call ``Tensor.expand_as`` over the examples."""
    return expand(tape, input, other.shape)


def repeat(tape: Tape, input: Tensor, *sizes: Any) -> Tensor:
    """Call ``Tensor.repeat`` over the examples."""
    times = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    view = tape.view(input)
    if view is None or not times or times[0] != tape.B:
        tape.refuse(f"it is repeated {times} times, and not once for each of the {tape.B} examples")
    return _own_copies(tape, view, len(times)).repeat(1, *times[1:])


_INPLACE = ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
_ELEMENTWISE = [
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide")
]
_ELEMENTWISE += [getattr(Tensor, name) for name in _INPLACE]
_ELEMENTWISE += [getattr(Tensor, f"__{r}{name}__") for r in ("", "r") for name in ("add", "sub", "mul", "truediv")]
_ELEMENTWISE += [torch.where]

HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    Tensor.expand: expand,
    torch.broadcast_to: expand,
    Tensor.broadcast_to: expand,
    Tensor.expand_as: expand_as,
    Tensor.repeat: repeat,
    torch.addmm: addmm,
    F.multi_head_attention_forward: attention,
    Tensor.addmm: addmm,
}
HANDLERS |= dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), convolution)
HANDLERS |= dict.fromkeys(
    (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__),
    matmul,
)
HANDLERS |= {func: elementwise(func) for func in _ELEMENTWISE}

VIEWS: set[Callable[..., Any]] = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.__getitem__}  # type: ignore[attr-defined]
VIEWS |= {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        *("t", "transpose", "swapaxes", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "reshape"),
        *("chunk", "split", "tensor_split", "unbind", "narrow"),
    )
}
VIEWS |= {Tensor.view, Tensor.view_as, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.type_as}
