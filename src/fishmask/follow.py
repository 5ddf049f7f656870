"""The training that a checkpoint log follows, and what of its model lies below the present mask."""

from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from fishmask.attach import Tuning
from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.history import Entries, Reference, Segment
from fishmask.mask import Mask
from fishmask.params import among, find, take
from fishmask.quantized import weights

Overlay = dict[str, tuple[Tensor, Tensor]]  # name -> sorted flat indices, bits as integers; on the CPU


@dataclass
class Followed:
    """The training that commits are made of, and where in the log it stands."""

    tuning: "ref[Tuning]"
    mask: Mask  # the tuning's own; another object, even if equal, tells that others may have been trained meanwhile
    originals: Reference  # the base that the tuning's own memory of its base belongs to
    segment: Segment
    last: Reference | None  # the commit before
    newest: int  # number of the newest commit; a larger one is another process's
    below: Overlay  # entries whose bits below the mask are not the base's
    loads: int = 0  # of a state dict into the model, when its base was last checked

    def base_unchanged(self) -> bool:
        """Whether the model still has the base that its tuning remembers."""
        tuning = self.tuning()
        try:
            if tuning is not None:
                tuning.originals.check(tuning.model)
        except FishError:
            return False
        return tuning is not None


def left_entries(tuning: Tuning, below: Overlay) -> Entries:
    """Return the entries that were trained once, are not masked now, and differ from what is below the mask."""
    parameters = weights(tuning.model)
    left: Entries = {}
    for name, indices in tuning.originals.indices.items():
        masked = tuning.mask.indices.get(name, indices[:0])
        indices = indices[~among(indices, masked)]
        values = take(parameters[name], indices).cpu()
        bits = tuning.originals.bits(name, indices)
        if name in below:
            places, known = below[name]
            found, there = find(indices, places)
            bits = torch.where(there, known[found], bits)
        changed = raw_bits(values) != bits
        if changed.any():
            left[name] = (indices[changed], values[changed])
    return left


def lay_over(below: Overlay, sealed: Entries) -> None:
    """Have what a segment sealed replace or join what was sealed before."""
    for name, (indices, values) in sealed.items():
        bits = raw_bits(values)
        if name in below:
            places, known = below[name]
            kept = ~among(places, indices)
            indices, order = torch.cat([places[kept], indices]).sort()
            bits = torch.cat([known[kept], bits])[order]
        below[name] = (indices, bits)
