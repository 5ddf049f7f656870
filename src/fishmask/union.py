"""The entries that any worker trains, and which of them are this worker's."""

import torch
from torch import Tensor

from fishmask.attach import Tuning
from fishmask.exchange import gather_masks
from fishmask.mask import Mask
from fishmask.merge import Own, Proposal, Residual, Shared, places_in, union_of
from fishmask.params import take
from fishmask.protocol import Protocol
from fishmask.quantized import weights
from fishmask.wire import Wire


class Union:
    """What the workers of a group train together, as one of them sees it; made on all of them at once.

    Vectors over the union are float32 [k], in the order of its mask, on the device of the values.

    Args:
        tuning: This worker's tuning; with masks of their own it then counts the entries of the others as trained.
        wire: The workers.
        protocol: The rules.
        masks: Those of all workers, from ``masks_of``.

    Attributes:
        mask: The union of all workers' masks.
        own_mask: This worker's.
        device: Of the values.
    """

    def __init__(self, tuning: Tuning, wire: Wire, protocol: Protocol, masks: list[Mask]) -> None:
        self._tuning, self._workers, self._mean = tuning, wire.size, protocol.reduction == "mean"
        self.mask = self.own_mask = tuning.mask
        self.device = tuning.values.device
        self._place: Tensor | None = None
        if protocol.masks == "shared":
            self._layout: Shared | Own = Shared(self.mask.k, protocol.reduction, protocol.mode, protocol.payload)
            return
        self._layout = Own(
            masks, wire.rank, protocol.reduction, protocol.denominator, protocol.head, protocol.payload, self.device
        )
        self.mask, self._place = self._layout.mask, self._layout.places[wire.rank]
        self._others = torch.ones(self.mask.k, dtype=torch.bool, device=self.device)
        self._others[self._place] = False
        tuning.adopt(self.mask - self.own_mask)

    def merge(self, wire: Wire, proposal: Proposal) -> tuple[Tensor, Residual]:
        """Return the merged values of the union, equal on all workers, and what coding has left over."""
        return self._layout.merge(wire, proposal)

    def nothing(self) -> Residual:
        """Return a residual of zeros."""
        own, union = self.own_mask.k, self.mask.k
        return Residual(torch.zeros(own, device=self.device), torch.zeros(union, device=self.device))

    def present(self) -> Tensor:
        """Return the values of the union as they are on this worker."""
        own = self._tuning.values.detach()
        if self._place is None:
            return own.clone()
        parameters = weights(self._tuning.model)
        present = torch.cat([take(parameters[name], indices).float() for name, indices in self.mask.indices.items()])
        present[self._place] = own
        return present

    def gathered(self, wire: Wire) -> Tensor:
        """Return the values of the union as those that hold them have them: weights may be of lower precision."""
        present = self.present()
        return self._layout.gathered(wire, present) if isinstance(self._layout, Own) else present

    @torch.no_grad()
    def give(self, vector: Tensor, learnt: Tensor | None = None) -> None:
        """Write values of the union into the model: this worker's, with what it has learnt since, and the others'."""
        own = self.own(vector)
        self._tuning.values.copy_(own if learnt is None else (own.double() + learnt).float())
        self._tuning.write_back()
        if self._place is not None:
            self._tuning.write_adopted(vector[self._others])

    def own(self, vector: Tensor) -> Tensor:
        """Return this worker's part of a vector over the union."""
        return vector if self._place is None else vector[self._place]

    def owed(self, residual: Residual) -> Tensor:
        """Return what this worker has not sent yet, over the union.

        With another mask other workers add up other values, so what is owed to all becomes part of what this one owes.
        """
        owed = residual.merged * (self._workers if self._mean else 1)
        if self._place is None:
            return owed + residual.own
        owed[self._place] += residual.own
        return owed

    def moved(self, vector: Tensor, before: Mask, fresh: Tensor) -> Tensor:
        """Move a vector over another union, of mask ``before``, to this one; new entries take those of ``fresh``."""
        both = before | self.mask
        whole = torch.zeros(both.k, dtype=vector.dtype, device=vector.device)
        known = torch.zeros_like(whole, dtype=torch.bool)
        place = places_in(both, before).to(vector.device)
        whole[place], known[place] = vector, True
        place = places_in(both, self.mask).to(vector.device)
        return torch.where(known[place], whole[place], fresh)


def masks_of(wire: Wire, protocol: Protocol, mask: Mask) -> list[Mask]:
    """Return the masks of all workers, which with one for all are this worker's; nothing changes.

    Args:
        wire: The workers.
        protocol: The rules.
        mask: This worker's, with the shapes of the model.

    Raises:
        ValueError: The masks differ, and a rule for that is missing; on all workers.
    """
    masks = [mask] * wire.size if protocol.masks == "shared" else gather_masks(wire, mask)
    if protocol.masks == "own" and len(masks) > 1:
        _check_rules(masks, protocol)
    return masks


def _check_rules(masks: list[Mask], protocol: Protocol) -> None:
    """Raise ValueError where a rule is needed that nobody gave."""
    common = masks[0]
    for mask in masks[1:]:
        common = common & mask
    if common.k and protocol.head is None:
        raise ValueError(
            f"{common.k} entries are in the masks of all workers: say with head='mean' or head='sum' how they are "
            "reduced"
        )
    if protocol.reduction == "mean" and protocol.denominator is None and common.k < union_of(masks).k:
        raise ValueError(
            "the workers' masks differ: say with denominator='participants' or 'holders' what a mean divides by"
        )
