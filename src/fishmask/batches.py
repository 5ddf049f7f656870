"""Batches of any shape that a model takes: count their examples, cut them, move them, take one example."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from fishmask.fingerprint import describe, element_bytes

Batch = Any  # a dict, a tuple (inputs, targets), or whatever a user's own loss takes


def size(batch: Batch) -> int:
    """Return the number of examples: the first dimension of the labels, of the targets, or of the first tensor."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        first: Tensor | None = batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        first = batch[1]
    else:
        first = next(_tensors(batch), None)
    if first is None or first.dim() == 0:
        kind = "no tensor" if first is None else "a first tensor without a batch dimension"
        raise ValueError(f"a batch must hold tensors whose first dimension is the examples; got {kind}: {type(batch)}")
    return first.shape[0]


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Take examples ``start`` to ``stop``: every tensor whose first dimension is the batch's size is sliced."""
    count = size(batch)

    def one(value: Tensor) -> Tensor:
        return value[start:stop].clone() if value.dim() > 0 and value.shape[0] == count else value

    return batch if (start, stop) == (0, count) else _map(one, batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor to ``device`` and out of any autograd graph; part of a larger tensor becomes its own."""

    def one(value: Tensor) -> Tensor:
        return value.detach().to(device, copy=True)

    return _map(one, batch)


def digest(batch: Batch) -> str:
    """Return SHA-256 (hex) over the tensors of a batch: dtype, shape and bytes of each, in the order they come."""
    sha = hashlib.sha256()
    for tensor in _tensors(batch):
        sha.update(f"{describe(tensor)}\n".encode())
        sha.update(element_bytes(tensor))
    return sha.hexdigest()


def elements(batch: Batch) -> int:
    """Return how many numbers a batch holds, which is what scoring it takes time and memory for."""
    return sum(tensor.numel() for tensor in _tensors(batch))


def first_examples(batches: Iterable[Batch], examples: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Yield (index of the first example, batch) until exactly ``examples`` are out; the last batch is cut."""
    done = 0
    for batch in batches:
        count = min(size(batch), examples - done)
        if count:
            yield done, to_device(cut(batch, 0, count), device)
        done += count
        if done == examples:
            return


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _map(one: Any, value: Any) -> Any:
    """Apply ``one`` to every tensor inside mappings, tuples and lists; keep their types and all else."""
    if isinstance(value, Tensor):
        return one(value)
    if isinstance(value, Mapping):
        items = {key: _map(one, item) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return items
        new = copy(value)
        new.update(items)
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(one, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(one, item) for item in value)
    return value
