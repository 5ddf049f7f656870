"""Stand in for a device: operations on the meta device that keep in memory what that device's kernels would."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

_FLASH = 1  # of torch._fused_sdp_choice
_WIDEST_FLASH_HEAD = 256
_ALIGNMENT = 8  # of the memory-efficient kernel's bias, in columns
_QUESTIONS = (Tensor.__bool__, Tensor.item)


class StandIn(TorchFunctionMode):
    """While it is entered, attention and dropout of meta tensors are those of a device.

    PyTorch chooses their kernels by device: the meta device gets attention that keeps a matrix of all pairs of
    positions and dropout that keeps a float mask, which flash attention and the GPU's dropout do not. Whatever a model
    asks about its data is true: models ask whether nothing is padded, and whether every row is one sequence. No number
    is in any tensor: models ask whether the one that pads is among the tokens.

    Args:
        device: "cpu" asks PyTorch itself; for "cuda" these are its choices for GPUs since Ampere: flash attention in
            half precision without a mask, else memory-efficient attention.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda = device == "cuda"

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            attend = _on_cuda if self._cuda else _on_cpu
            with torch._C.DisableTorchFunction():
                return attend(*args, **kwargs)
        if func in _QUESTIONS and args[0].is_meta and args[0].dtype is torch.bool:
            return True
        if func is Tensor.__contains__ and args[0].is_meta:
            return False
        if func is F.dropout and self._cuda and args[0].is_meta:
            return _dropped(*args, **kwargs)
        return func(*args, **kwargs)


def _dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    q, k, v = (torch.empty_like(t, device="cpu") for t in (query, key, value))  # untouched memory is not taken
    mask = None if attn_mask is None else torch.empty_like(attn_mask, device="cpu")
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, **options)
    if choice != _FLASH:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return torch.as_tensor(output)


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] <= _WIDEST_FLASH_HEAD:
        return torch.as_tensor(
            torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        columns = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -columns % _ALIGNMENT))[..., :columns]
        bias = attn_mask.expand(*query.shape[:-1], columns)
    output = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
    return torch.as_tensor(output)
