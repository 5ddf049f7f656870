"""Names of parameters: one canonical name each, and patterns that select them.

A tied parameter (one tensor under several names) appears once, under the first of its names in
``model.named_parameters()``; its other names are aliases.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fishmask import sharded
from fishmask.costs import stood_for

_REACH = torch.iinfo(torch.int32).max


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the floating-point parameters of ``model`` by canonical name, in module order, tied ones once.

    Quantized weights are not among them; ``fishmask.quantized.weights`` has them too.
    """
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and not is_quantized(p)}


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds a quantized form of its numbers, of bitsandbytes or torchao."""
    if type(parameter).__module__.startswith("bitsandbytes."):
        return not parameter.is_floating_point()  # they are made with float weights, and quantized when moved
    return is_in_torchao(parameter)


def is_in_torchao(parameter: Tensor) -> bool:
    """Whether a parameter is one of torchao's kinds of tensors."""
    return type(parameter).__module__.startswith("torchao.") and hasattr(parameter, "__tensor_flatten__")


def aliases(model: nn.Module) -> dict[str, str]:
    """Map every name of every parameter of ``model``, canonical or tied, to its canonical name."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    return {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def placed(indices: Tensor, tensor: Tensor) -> Tensor:
    """Return flat indices (int64, on the CPU) of ``tensor`` on its device, where they are kept for as long as training.

    On the CPU they are the same memory. Elsewhere they are a copy, in int32 where that reaches all entries; what
    serves quantized and sharded weights counts in int64.
    """
    device = tensor.device
    plain = isinstance(tensor, Tensor) and not sharded.is_sharded(tensor)
    if stood_for(device).type == "cpu" or not plain or tensor.numel() > _REACH:
        return indices.to(device)
    return indices.to(torch.int32).to(device)


def put(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write ``values`` to flat indices of ``tensor``, in place, whatever its strides; sorted ones if it is sharded."""
    indices = indices.long()  # no copy where they are
    if type(tensor) is nn.Parameter and tensor.is_contiguous():  # the case that must be quick
        tensor.view(-1).index_copy_(0, indices, values)
    elif not isinstance(tensor, Tensor):  # a QuantizedWeight
        tensor.put(indices, values)
    elif sharded.is_sharded(tensor):
        sharded.put(tensor, indices, values)
    elif tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, indices, values)
    else:
        tensor[torch.unravel_index(indices, tensor.shape)] = values  # put_ is refused in deterministic mode


def take(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the entries at flat indices (on any device), detached, on the tensor's device.

    Those of a sharded tensor come from all of its ranks, which call this together with the same sorted indices.
    """
    if not isinstance(tensor, Tensor):  # a QuantizedWeight
        return tensor.take(indices)
    if sharded.is_sharded(tensor):
        return sharded.take(tensor, indices.to(tensor.device))
    return tensor.detach().take(indices.to(tensor.device, torch.int64))


def find(indices: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Look indices up among sorted others; quicker than ``torch.isin``.

    Returns:
        The place of each index in ``others``, and whether it is there; where it is not, the place means nothing.
    """
    if not len(others):
        return torch.zeros_like(indices), torch.zeros_like(indices, dtype=torch.bool)
    places = torch.searchsorted(others, indices).clamp_(max=len(others) - 1)
    return places, others[places] == indices


def among(indices: Tensor, others: Tensor) -> Tensor:
    """Tell for each index whether it is one of the sorted others."""
    return find(indices, others)[1]


def matching(names: Iterable[str], patterns: str | Sequence[str], role: str) -> list[str]:
    """Select the names that any pattern matches, on whole dot-separated parts.

    A pattern is a run of parts that may stand anywhere in the name; ``*``, ``?`` and ``[...]`` work within one part.
    ``"classifier"`` matches ``classifier.weight`` and ``head.classifier.bias`` but not ``pre_classifier.weight``;
    ``"layer.*.attention"`` matches ``encoder.layer.3.attention.self.query.weight``. A pattern that is the whole name of
    a parameter matches that one alone: ``"norm.weight"``, where there is one, leaves ``layers.0.norm.weight`` out.

    Args:
        names: Parameter names.
        patterns: One pattern or several.
        role: What the patterns are for, named in the error ("keep", "exclude").

    Returns:
        The matching names, in the order of ``names``.

    Raises:
        ValueError: A pattern matches no name: most likely a typing error, so it is never ignored.
    """
    names = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    split = {name: name.split(".") for name in names}
    chosen: set[str] = set()
    for pattern in patterns:
        whole = pattern in split
        hits = {pattern} if whole else {name for name, parts in split.items() if _matches(parts, pattern.split("."))}
        if not hits:
            words = sorted({part for parts in split.values() for part in parts} | set(names))
            near = get_close_matches(pattern, words, n=3)
            hint = f"close names: {', '.join(near)}" if near else f"names look like: {', '.join(names[:3])}"
            raise ValueError(f"{role}={pattern!r} matches no parameter ({hint})")
        chosen |= hits
    return [name for name in names if name in chosen]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    width = len(pattern)
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(parts[i : i + width], pattern, strict=True))
        for i in range(len(parts) - width + 1)
    )
