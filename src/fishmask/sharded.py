"""FSDP2: every rank holds a part of a weight's rows; the values are on all ranks, and each writes those of its rows.

With ``Shard(0)`` a rank's part of the sorted flat indices is one run of them, so nothing but its two ends is needed.
Functions that return something of a whole weight are collective: all ranks of its mesh call them together.
"""

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.wire import Wire

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BLOCK = 1 << 22  # elements of another rank that are held at once


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor."""
    # Not by its class: that takes a second to import, and where nobody has imported it there is no such tensor.
    return hasattr(tensor, "device_mesh")


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard`` gave it one of its own, derived from it."""
    kind = type(module)
    first, *others = kind.__bases__
    return others[0] if first.__name__ == "FSDPModule" and others else kind


@dataclass(frozen=True)
class Part:
    """This rank's part of the masked entries of a weight.

    Attributes:
        start: Of its run among all the weight's entries.
        stop: One beyond its end.
        places: Their flat indices in this rank's rows, int64 [stop - start].
    """

    start: int
    stop: int
    places: Tensor

    @classmethod
    def of(cls, weight: "DTensor", indices: Tensor) -> "Part":
        """Find it for sorted flat indices [K]."""
        rank, bounds = _rank(weight), _bounds(weight)
        start, stop = _cuts(indices, bounds)[rank : rank + 2]
        return cls(start, stop, indices[start:stop] - bounds[rank])

    def put(self, weight: Tensor, values: Tensor) -> None:
        """Write this rank's of all values [K], which are in the weight's dtype."""
        _local(weight).view(-1).index_copy_(0, self.places, values[self.start : self.stop])


def put(weight: "DTensor", indices: Tensor, values: Tensor) -> None:
    """Write the values [K] to sorted flat indices [K] of the weight; every rank those of its rows."""
    Part.of(weight, indices).put(weight, values)


def take(weight: "DTensor", indices: Tensor) -> Tensor:
    """Return the entries at sorted flat indices [K] on all ranks, bit for bit; collective."""
    cuts, part, local = _cuts(indices, _bounds(weight)), Part.of(weight, indices), _local(weight)
    counts = [stop - start for start, stop in pairwise(cuts)]
    if not max(counts):
        return local.new_empty(0)
    own = local.new_zeros(max(counts))
    own[: part.stop - part.start] = local.view(-1)[part.places.to(local.device)]
    rows = _wire(weight).gather(own.view(torch.uint8)).view(weight.dtype)
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])


def pieces(weight: "DTensor") -> Iterator[Tensor]:
    """Yield all entries in flat order, in pieces that are gone from all ranks but one after their turn; collective."""
    wire, bounds, local = _wire(weight), _bounds(weight), _local(weight).view(-1)
    for rank, (first, end) in enumerate(pairwise(bounds)):
        for start in range(first, end, _BLOCK):
            size = min(_BLOCK, end - start)
            piece = torch.empty(size, dtype=weight.dtype, device=wire.device)
            if rank == wire.rank:
                piece.copy_(local[start - first : start - first + size])
            wire.spread(piece.view(torch.uint8), rank)
            yield piece


def total(weight: "DTensor", part: int) -> int:
    """Add up what the ranks have counted in their parts of a weight; collective."""
    return int(_wire(weight).gather(torch.tensor([part])).sum())


def local_rows(weight: "DTensor") -> Tensor:
    """Return this rank's rows, sharing their memory."""
    return _local(weight)


class Shards:
    """How FSDP2 has spread a model.

    Attributes:
        wire: The ranks that hold it together.
        whole: What FSDP2 puts in a weight's place while a layer runs, by name; their memory is there only then.
    """

    def __init__(self, wire: Wire, whole: dict[str, nn.Parameter], groups: list[Any]) -> None:
        self.wire, self.whole, self._groups = wire, whole, groups

    @classmethod
    def of(cls, model: nn.Module) -> "Shards | None":
        """Look at a model and gather each group of layers once, together on all ranks; None if nothing is sharded.

        Raises:
            FishError: Some are in a way that is not supported; the message names them all.
        """
        fsdp = sys.modules.get("torch.distributed.fsdp")
        groups = [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
        for group in groups:
            group.reshard()
        weights = {name: p for name, p in model.named_parameters() if is_sharded(p)}
        if not weights:
            return None
        first = next(iter(weights.values())).device_mesh
        faults = [f"{name}: {fault}" for name, p in weights.items() if (fault := _fault(p, first))]
        if faults:
            raise FishError(
                "an attached model may be sharded by fully_shard(module, mesh=...) on one mesh of one dimension, with "
                f"Shard(0) for all parameters: {'; '.join(faults)}"
            )
        whole = _gathered(model, weights, groups)
        if others := [name for name in weights if name not in whole]:
            raise FishError(
                f"these parameters are sharded, but not by fully_shard on this model or within it: {', '.join(others)}."
                " Call fully_shard(model), then attach that model"
            )
        return cls(_wire(next(iter(weights.values()))), whole, groups)

    def settle(self) -> None:
        """Have the shards in their places again where FSDP2 still holds gathered weights, which would go stale."""
        for group in self._groups:
            group.reshard()

    def refuse_apart(self, group: dist.ProcessGroup | None, every: int, overlap: int, masks: str) -> None:
        """Raise FishError where ranks that hold one model together would train it apart.

        Args:
            group: The workers of ``LocalRounds``; None for all.
            every: Its steps from one round to the next.
            overlap: Its steps while a round is under way.
            masks: "shared" or "own".
        """
        together = {*dist.get_process_group_ranks(group)} & {*dist.get_process_group_ranks(self.wire.group)}
        if len(together) > 1 and (every > 1 or overlap or masks == "own"):
            raise FishError(
                f"the ranks {sorted(together)} hold one sharded model together, so they cannot train apart: merge "
                "every step (every=1, overlap=0, masks='shared'), or give LocalRounds a group that has one rank of "
                "every sharded copy"
            )

    def check_equal(self, values: Tensor) -> None:
        """Raise FishError on all ranks unless all have the same values; collective."""
        # Through the CPU: two numbers a rank.
        sums = self.wire.gather(torch.tensor([zlib.crc32(values.detach().cpu().numpy().tobytes())]))
        if bool((sums != sums[0]).any()):
            raise FishError(
                "the ranks of a sharded model have different values, and each writes its own rows: average the "
                "gradient, DistributedDataParallel(fishmask.data_parallel.Replica(tuning)), or merge every step, "
                "LocalRounds(tuning, every=1)"
            )


def refuse(model: nn.Module, role: str) -> None:
    """Raise FishError if ``model`` is sharded, where ``role`` works on whole weights in one process."""
    if any(is_sharded(p) for p in model.parameters()) or hasattr(model, "unshard"):
        raise FishError(
            f"{role} takes no sharded model: score it before fully_shard, and save it with "
            "torch.distributed.checkpoint (fishmask.dcp has a storage for it), or call tuning.delta() on all ranks and "
            "save that on one"
        )


def _gathered(model: nn.Module, weights: "dict[str, DTensor]", groups: list[Any]) -> dict[str, nn.Parameter]:
    """Return what FSDP2 puts in place of the weights."""
    names = {id(p): name for name, p in weights.items()}
    places = [
        (module, attribute, names[id(p)])
        for module in model.modules()
        for attribute, p in module._parameters.items()
        if id(p) in names
    ]
    whole: dict[str, nn.Parameter] = {}
    for group in groups:
        group.unshard()
        for module, attribute, name in places:
            present = module._parameters[attribute]
            if present is not None and not is_sharded(present):
                whole[name] = present
        group.reshard()
    return whole


def _fault(weight: "DTensor", first: Any) -> str:
    """Say what is not supported about a sharded parameter, or nothing."""
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        return f"{weight.placements} on a mesh of shape {tuple(mesh.shape)}"
    if not weight.placements[0].is_shard(0) or type(weight.placements[0]).__name__ != "Shard":
        return repr(weight.placements[0])
    if mesh.get_local_rank() != dist.get_rank(mesh.get_group()):
        return f"its mesh has the ranks in the order {mesh.mesh.tolist()}"
    if mesh.mesh.tolist() != first.mesh.tolist():
        return f"on the ranks {mesh.mesh.tolist()}, others on {first.mesh.tolist()}"
    if weight.device.type != mesh.device_type:
        return f"offloaded to {weight.device.type}"
    if _local(weight).numel() != _bounds(weight)[_rank(weight) + 1] - _bounds(weight)[_rank(weight)]:
        return f"{len(_local(weight))} of {len(weight)} rows on rank {_rank(weight)}"
    return ""


def _wire(weight: "DTensor") -> Wire:
    return Wire(weight.device_mesh.get_group())


def _rank(weight: "DTensor") -> int:
    return int(weight.device_mesh.get_local_rank())


@torch.no_grad()
def _local(weight: Tensor) -> Tensor:
    return cast("DTensor", weight).to_local()


def _bounds(weight: "DTensor") -> list[int]:
    """Return the flat index of the first entry of every rank, and that of the end."""
    rows, ranks = weight.shape[0], weight.device_mesh.size()
    chunk, row = -(-rows // ranks), weight.numel() // max(rows, 1)
    return [min(rank * chunk, rows) * row for rank in range(ranks + 1)]


def _cuts(indices: Tensor, bounds: list[int]) -> list[int]:
    """Return where the run of every rank begins among sorted indices, and where the last ends."""
    cuts: list[int] = torch.searchsorted(indices, torch.tensor(bounds, device=indices.device)).tolist()
    return cuts
