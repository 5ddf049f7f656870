"""How workers exchange: one choice of rules for all of them, and the two that the paper uses, by name."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from fishmask.payload import Payload

Masks = Literal["shared", "own"]
Mode = Literal["exact", "fast"]
Reduction = Literal["mean", "sum"]
Denominator = Literal["participants", "holders"]

_CHOICES = {
    "masks": get_args(Masks),
    "reduction": get_args(Reduction),
    "denominator": (None, *get_args(Denominator)),
    "head": (None, *get_args(Reduction)),
    "mode": get_args(Mode),
    "payload": get_args(Payload),
}


@dataclass(frozen=True)
class Protocol:
    """The rules of local rounds; the attributes are the arguments of ``LocalRounds``.

    Raises:
        ValueError: One is out of range, or they contradict each other.
    """

    every: int
    masks: Masks = "shared"
    reduction: Reduction = "mean"
    denominator: Denominator | None = None
    head: Reduction | None = None
    mode: Mode = "exact"
    payload: Payload = "float32"
    overlap: int = 0

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is a number of steps of at least 1, got {self.every!r}")
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or not 0 <= self.overlap < self.every:
            raise ValueError(f"overlap must be from 0 to every - 1 = {self.every - 1} steps, got {self.overlap!r}")
        if self.mode == "fast" and self.payload != "float32":
            raise ValueError(f"mode='fast' sums float32 on the way; payload={self.payload!r} needs mode='exact'")
        if self.masks == "shared" and (self.denominator, self.head) != (None, None):
            raise ValueError(
                "denominator and head are for masks='own'; with a shared mask all workers hold all entries"
            )

    def facts(self) -> dict[str, str]:
        """Return all rules as texts, to compare with those of other workers."""
        return {item.name: str(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class Preset:
    """What a protocol of the paper asks for.

    Attributes:
        workers: How many there are; any number when None.
        masks: As for ``Protocol``, and so are ``reduction`` and ``head``.
        reduction: The same.
        head: The same.
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


def preset_of(name: str | None) -> Preset:
    """Return a preset by name; without a name one that asks for nothing.

    Raises:
        ValueError: There is none of that name.
    """
    if name is None:
        return Preset()
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
