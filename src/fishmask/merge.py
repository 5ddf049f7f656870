"""What the workers' values become together: anchor + sum (or mean) over workers of (values - anchor).

The anchor are the values after the last merge, equal on all workers. All sums are taken in float64 in the order of the
ranks, whatever the network does, so that equal inputs give equal bits; only ``mode="fast"`` leaves the order to it.

Source: section 3 of the paper: local steps, then a sum of the workers' updates, simulated there in one process.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from fishmask.mask import Mask
from fishmask.payload import Payload, decode, encode
from fishmask.protocol import Denominator, Mode, Reduction
from fishmask.wire import Wire


@dataclass(frozen=True)
class Residual:
    """What coding has not sent yet and adds to the next round (error feedback): zero when values travel as they are.

    Attributes:
        own: Of this worker's differences, float32 [own values].
        merged: Of the merged differences that this worker sends on to all others, float32 [union].
    """

    own: Tensor
    merged: Tensor


@dataclass(frozen=True)
class Proposal:
    """What a worker brings to a round; its tensors are on the device of the values.

    Attributes:
        values: Its values, float32 [own values].
        anchor: The values of the union after the last round, float32 [union].
        trained: For every worker whether it has trained since then.
        residual: Left over from the last round.
    """

    values: Tensor
    anchor: Tensor
    trained: list[bool]
    residual: Residual


class Shared:
    """All workers have one mask: every value is summed over all of them.

    A worker sends (W - 1)/W of its values to those who sum them and as many sums to all: 2 (W - 1)/W k numbers, as a
    ring all-reduce does, with an order of its own choice.

    Args:
        k: Number of values.
        reduction: "mean" over the workers that have trained, or "sum".
        mode: "fast" leaves the sum to the backend's all-reduce; float32 only.
        payload: How differences travel; float32 sends the values themselves.

    Attributes:
        union: Number of values that are merged.
        own: Number of them that this worker trains.
    """

    def __init__(self, k: int, reduction: Reduction, mode: Mode, payload: Payload) -> None:
        self.union = self.own = k
        self._mean, self._mode, self._payload = reduction == "mean", mode, payload

    def merge(self, wire: Wire, proposal: Proposal) -> tuple[Tensor, Residual]:
        """Return the merged values [k], equal on all workers, and what coding has left over."""
        divisor = sum(proposal.trained) if self._mean else 1
        values, anchor, residual = proposal.values, proposal.anchor, proposal.residual
        if wire.size == 1:
            return values.clone(), residual
        if self._payload != "float32":
            return self._coded(wire, proposal, divisor)
        if self._mode == "fast":
            return (anchor.double() + wire.add(values - anchor).double() / divisor).float(), residual
        chunk = -(-self.union // wire.size)
        received = wire.swap(_rows(values, wire.size, chunk))
        base = _rows(anchor, wire.size, chunk)[wire.rank].double()
        merged = (base + ordered_sum(row.double() - base for row in received) / divisor).float()
        return wire.gather(merged).view(-1)[: self.union], residual

    def _coded(self, wire: Wire, proposal: Proposal, divisor: int) -> tuple[Tensor, Residual]:
        values, anchor, residual = proposal.values, proposal.anchor, proposal.residual
        chunk = -(-self.union // wire.size)
        wanted = _rows(values - anchor + residual.own, wire.size, chunk)
        sent = encode(wanted, self._payload)
        received = decode(wire.swap(sent), self._payload, chunk)
        rest = _rows(residual.merged, wire.size, chunk)
        mine = (ordered_sum(row.double() for row in received) / divisor + rest[wire.rank]).float()
        coded = encode(mine, self._payload)
        merged = decode(wire.gather(coded), self._payload, chunk).view(-1)[: self.union]
        rest[wire.rank] = mine - decode(coded, self._payload, chunk)
        left = Residual(
            (wanted - decode(sent, self._payload, chunk)).view(-1)[: self.union].clone(),
            rest.view(-1)[: self.union].clone(),
        )
        return (anchor.double() + merged.double()).float(), left


class Own:
    """Every worker has its own mask: each sends its own values to all others, (W - 1) k numbers.

    Args:
        masks: Those of all workers, in the order of their ranks and with the shapes of the model.
        reduction: "sum", or "mean" with a denominator.
        denominator: Divides a sum by the number of workers that have trained ("participants"), or by the number of
            those that hold the entry ("holders").
        head: How entries that all workers hold are reduced.
        payload: How differences travel; float32 sends the values themselves.
        device: Of the values.

    Attributes:
        mask: The union.
        places: Where each worker's entries are in the union, int64 [own values] each.
    """

    def __init__(
        self,
        masks: list[Mask],
        rank: int,
        reduction: Reduction,
        denominator: Denominator | None,
        head: Reduction | None,
        payload: Payload,
        device: torch.device,
    ) -> None:
        self.mask = union_of(masks)
        self.union, self.own, self._rank = self.mask.k, masks[rank].k, rank
        self.places = [places_in(self.mask, mask).to(device) for mask in masks]
        self._reduction, self._denominator, self._head, self._payload = reduction, denominator, head, payload
        self._common = self.holders([True] * len(masks)) == len(masks)

    def merge(self, wire: Wire, proposal: Proposal) -> tuple[Tensor, Residual]:
        """Return the merged values [union], equal on all workers, and what coding has left over."""
        anchor, residual = proposal.anchor.double(), proposal.residual
        largest = max(len(place) for place in self.places)
        if wire.size == 1:
            return proposal.values.clone(), residual
        if self._payload == "float32":
            rows = wire.gather(pad(proposal.values, (0, largest - self.own)))
            deltas = [row[: len(place)].double() - anchor[place] for row, place in zip(rows, self.places, strict=True)]
        else:
            wanted = proposal.values - proposal.anchor[self.places[self._rank]] + residual.own
            wanted = pad(wanted, (0, largest - self.own))
            sent = encode(wanted, self._payload)
            rows = decode(wire.gather(sent), self._payload, largest)
            deltas = [row[: len(place)].double() for row, place in zip(rows, self.places, strict=True)]
            left = wanted - decode(sent, self._payload, largest)
            residual = Residual(left[: self.own].clone(), residual.merged)
        total = torch.zeros_like(anchor)
        for delta, place in zip(deltas, self.places, strict=True):
            total[place] += delta
        return (anchor + total / self.divisor(proposal.trained)).float(), residual

    def gathered(self, wire: Wire, union: Tensor) -> Tensor:
        """Return a vector over the union with every worker's own part, float32 [union]; of several, the last's."""
        largest = max(len(place) for place in self.places)
        union = union.clone()
        rows = wire.gather(pad(union[self.places[self._rank]], (0, largest - self.own)))
        for row, place in zip(rows, self.places, strict=True):
            union[place] = row[: len(place)]
        return union

    def divisor(self, trained: list[bool]) -> Tensor:
        """Return what a sum is divided by for every entry, float64 [union], when these workers have trained."""
        count = sum(trained)
        if self._reduction == "sum":
            divisor = torch.ones(self.union, dtype=torch.float64, device=self.places[0].device)
        elif self._denominator == "participants":
            divisor = torch.full((self.union,), float(count), dtype=torch.float64, device=self.places[0].device)
        else:
            divisor = self.holders(trained).clamp_min(1)
        divisor[self._common] = 1.0 if self._head == "sum" else float(count)
        return divisor

    def holders(self, counted: list[bool]) -> Tensor:
        """Return how many of the workers that count have each entry in their mask, float64 [union]."""
        holders = torch.zeros(self.union, dtype=torch.float64, device=self.places[0].device)
        for place, counts in zip(self.places, counted, strict=True):
            holders[place] += counts
        return holders


def union_of(masks: list[Mask]) -> Mask:
    """Return the entries that any of the masks has."""
    union = masks[0]
    for mask in masks[1:]:
        union = union | mask
    return union


def places_in(union: Mask, mask: Mask) -> Tensor:
    """Return where the entries of a mask are among those of a mask that has them all, laid end to end; int64 [k]."""
    places, start = [torch.empty(0, dtype=torch.int64)], 0
    for name, indices in union.indices.items():
        if name in mask.indices:
            places.append(torch.searchsorted(indices, mask.indices[name]) + start)
        start += len(indices)
    return torch.cat(places)


def _rows(vector: Tensor, rows: int, chunk: int) -> Tensor:
    """Return a copy of a vector as rows of equal length, padded with zeros."""
    return pad(vector, (0, rows * chunk - len(vector))).clone().view(rows, chunk)


def ordered_sum(terms: Iterable[Tensor]) -> Tensor:
    """Add tensors one after the other, in their order."""
    return reduce(torch.add, terms)
