"""The two protocols of the paper's distributed experiments, by name."""

from dataclasses import dataclass

from fishmask.merge import Masks, Reduction


@dataclass(frozen=True)
class Preset:
    """A protocol of local rounds.

    Attributes:
        workers: How many there are; any number by default.
        masks: Whether they share a mask.
        reduction: Of what they have learnt.
        head: Of entries that all hold, where masks differ.
        refresh_every: Rounds from one mask to the next; None for one mask throughout.
        warm_up_epochs: Epochs of dense training, in rounds of a mask of all entries, before the first mask is chosen.
    """

    workers: int | None = None
    masks: Masks = "shared"
    reduction: Reduction = "mean"
    head: Reduction | None = None
    refresh_every: int | None = None
    warm_up_epochs: int = 0


PRESETS = {
    "paper-glue": Preset(workers=2, masks="own", reduction="sum", head="sum", refresh_every=10),
    "paper-cifar": Preset(workers=2, refresh_every=10, warm_up_epochs=5),
}
