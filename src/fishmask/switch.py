"""Many deltas on one base in one process, of which one is in use: switching costs k numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishmask import applied
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.live import is_attached
from fishmask.params import put


@dataclass
class _Held:
    """A delta ready to be written."""

    delta: Delta
    entries: dict[str, tuple[Tensor, Tensor, Tensor]]  # name -> indices, its bits, the base's bits; on the weight


class Switch:
    """Deltas on one base, known by names, of which at most one is in use.

    Each keeps the base's bits at its own entries, so a switch writes k numbers out and k in, and the base comes back
    bit for bit whatever the order.

    Args:
        model: The base, in memory, on the device and in the dtype it will be used in.

    Attributes:
        model: The model.
        active: Name of the delta in use, or None for the base.

    Example:
        >>> base, tuned = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> switch = Switch(base)
        >>> switch.add("task", Delta.between(base, tuned))
        >>> switch.use("task")
        >>> torch.equal(base.weight, tuned.weight)
        True
        >>> switch.use(None)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._held: dict[str, _Held] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all deltas, in the order they were added."""
        return tuple(self._held)

    def delta(self, name: str) -> Delta:
        """Return the delta of a name.

        Raises:
            ValueError: There is none.
        """
        return self._known(name).delta

    def add(self, name: str, delta: Delta, *, check_base: bool = True) -> None:
        """Make a delta ready for use, without using it; the model may be in use meanwhile.

        Args:
            name: What it is called from now on.
            delta: The delta.
            check_base: Refuse a delta that was made on other weights.

        Raises:
            ValueError: The name is taken.
            FishError: The delta does not fit the base.
        """
        if name in self._held:
            raise ValueError(f"there is a delta {name!r} already; remove() it first")
        active = self.active
        self.use(None)
        try:
            delta.check(self.model, check_base)
            self._held[name] = self._ready(delta)
        finally:
            self.use(active)

    def remove(self, name: str) -> None:
        """Forget a delta that is not in use.

        Raises:
            ValueError: There is none of that name.
            FishError: It is in use.
        """
        self._known(name)
        if name == self.active:
            raise FishError(f"{name!r} is in use: use() another one, or None for the base, before removing it")
        del self._held[name]

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Put a delta into the model's weights in place of the one in use; None puts the base back.

        Raises:
            ValueError: There is no delta of that name.
            FishError: The model is attached.
        """
        wanted = None if name is None else self._known(name)
        if name == self.active:
            return
        if is_attached(self.model):
            raise FishError("this model is being trained in place; call detach() or revert() on its Tuning first")
        tensors = applied.targets(self.model)
        if self.active is not None:
            for target, (indices, _, base) in self._held[self.active].entries.items():
                put(raw_bits(tensors[target]), indices, base)
        if wanted is not None:
            for target, (indices, bits, _) in wanted.entries.items():
                put(raw_bits(tensors[target]), indices, bits)
        self.active = name

    def rebase(self) -> None:
        """Take the model's present weights for the base: those it was moved or converted to while none was in use.

        Raises:
            FishError: A delta is in use.
        """
        if self.active is not None:
            raise FishError(f"{self.active!r} is in use: use(None) before moving or converting the model")
        self._held = {name: self._ready(held.delta) for name, held in self._held.items()}

    def release(self) -> None:
        """Leave the weights as they are and forget all deltas: the one in use stays in the model for good."""
        self.active = None
        self._held.clear()

    def _known(self, name: str) -> _Held:
        if name not in self._held:
            raise ValueError(f"there is no delta {name!r}; there are: {', '.join(self._held) or 'none'}")
        return self._held[name]

    def _ready(self, delta: Delta) -> _Held:
        tensors, entries = applied.targets(self.model), {}
        for target, (indices, values) in delta.entries(self.model).items():
            device = tensors[target].device
            bits = raw_bits(values).to(device)
            entries[target] = (indices.to(device), bits, applied.read(tensors[target], indices))
        return _Held(delta, entries)
