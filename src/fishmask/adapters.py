"""Adapters on one base, of which at most one is in its weights: trained ones, which wait suspended, and frozen ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishmask.attach import Tuning, attach
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.live import is_attached
from fishmask.mask import Mask
from fishmask.originals import persistent_buffers
from fishmask.params import aliases
from fishmask.quantized import settle
from fishmask.switch import Switch


class Adapters:
    """Which adapters there are and which one is in the model.

    A trained adapter is a ``Tuning``, suspended while it is not in the model; a frozen one is a delta in a ``Switch``.
    Each operation is done on the base and puts back what was in the model, whatever fails on the way. The base is
    frozen until ``release``.

    Args:
        model: The base, or a model that is attached already: then ``wrap`` its tuning first.

    Attributes:
        model: The model.
        active: Name of the chosen adapter.
        enabled: Whether the chosen adapter is in the model; else the base is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self.enabled = True
        self._inside: str | None = None  # whose values are in the weights
        self._lent = False  # within base(): the weights are the base's, while an adapter is still attached
        self._tunings: dict[str, Tuning | None] = {}
        self._switch = Switch(model)
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        if not is_attached(model):
            _freeze(model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tunings)

    def __contains__(self, name: object) -> bool:
        return name in self._tunings

    def check(self, name: str) -> None:
        """Raise ValueError if there is no adapter of that name."""
        if name not in self._tunings:
            raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(self._tunings) or 'none'}")

    def check_free(self) -> None:
        """Raise FishError inside ``base()``, where no adapter can come or go."""
        if self._lent:
            raise FishError("inside disable_adapter() the base is only lent: leave the block first")

    # --- what they are ------------------------------------------------------------------------------------------------

    def tuning(self, name: str) -> Tuning | None:
        """Return the tuning of an adapter, None if it is frozen."""
        self.check(name)
        return self._tunings[name]

    def mask(self, name: str) -> Mask:
        """Return the mask of an adapter."""
        tuning = self.tuning(name)
        return self._switch.delta(name).mask if tuning is None else tuning.mask

    def delta(self, name: str) -> Delta:
        """Return the delta of an adapter, in the precision it is kept in."""
        tuning = self.tuning(name)
        if tuning is None:
            return self._switch.delta(name)
        with self._with(name):
            return tuning.delta("values")

    # --- which one is in the model ------------------------------------------------------------------------------------

    def use(self, name: str | None) -> None:
        """Choose an adapter, or none, and put it into the model unless adapters are disabled."""
        self.check_free()
        if name is not None:
            self.check(name)
        self._put(name if self.enabled else None)
        self.active = name

    def enable(self, enabled: bool) -> None:
        """Have the chosen adapter in the model, or the base until further notice."""
        self.check_free()
        self._put(self.active if enabled else None)
        self.enabled = enabled

    @contextmanager
    def base(self) -> Iterator[None]:
        """Have the base's weights in the model for a while, at the cost of k; what is attached stays attached."""
        if self._lent or self._inside is None:
            yield
            return
        tuning, self._lent = self._tunings[self._inside], True
        try:
            if tuning is not None:
                with tuning.disabled():
                    yield
                return
            self._switch.use(None)
            try:
                yield
            finally:
                self._switch.use(self._inside)
        finally:
            self._lent = False

    @contextmanager
    def _away(self) -> Iterator[None]:
        """Have the base in the model for a while, with nothing attached."""
        self.check_free()
        inside = self._inside
        self._put(None)
        try:
            yield
        finally:
            self._put_back(inside)

    @contextmanager
    def _with(self, name: str) -> Iterator[None]:
        """Have an adapter in the model for a while."""
        self.check_free()
        inside = self._inside
        self._put(name)
        try:
            yield
        finally:
            self._put_back(inside)

    def _put_back(self, name: str | None) -> None:
        """Put in again what was taken out; what interrupts this comes through once it is done."""
        try:
            self._put(name)
        except BaseException:
            self._put(name)
            raise

    def _put(self, name: str | None) -> None:
        """Put an adapter, or none, into the model in place of the one there; or leave that one there."""
        before = self._inside
        if name == before:
            return
        self._take_out()
        try:
            self._put_in(name)
        except BaseException:
            self._put_in(before)
            raise

    def _take_out(self) -> None:
        tuning = None if self._inside is None else self._tunings[self._inside]
        if tuning is None:
            self._switch.use(None)
        else:
            tuning.suspend()
            _rest(tuning)
            _freeze(self.model)  # one that was attached before it came here
        self._inside = None

    def _put_in(self, name: str | None) -> None:
        tuning = None if name is None else self._tunings[name]
        if tuning is None:
            self._switch.use(name)
        else:
            tuning.resume()
        self._inside = name

    # --- they come and go ---------------------------------------------------------------------------------------------

    def wrap(self, name: str, tuning: Tuning) -> None:
        """Take the tuning of an attached model for the first adapter."""
        self._tunings[name] = tuning
        self.active = self._inside = name
        self._required_grad |= tuning._required_grad

    def add(self, name: str, mask: Mask) -> None:
        """Add an adapter that is trained from the base's own values on."""
        self._tunings[name] = self._attached(mask)

    def take(self, name: str, delta: Delta, *, trained: bool, check_base: bool = True) -> None:
        """Add an adapter that has these values, or give them to the one of that name.

        Values of a trained adapter keep their identity where the mask is the same, so its optimizer serves on. A
        frozen one becomes trained where that is asked for; a trained one stays so.
        """
        with self._away():
            delta.check(self.model, check_base)
            tuning = self._tunings.get(name)
            if tuning is not None and _same_entries(tuning, delta, self.model):
                buffers = {n: b.clone() for n, b in persistent_buffers(self.model).items()} | delta.buffers
                with self._with(name):
                    _read_into(tuning, delta, buffers)
            elif trained or tuning is not None:
                self._replace(name, self._attached(delta.mask, delta))
            else:
                self._hold(name, delta)

    def set_trained(self, name: str, trained: bool) -> None:
        """Make an adapter trainable with the values it has, or freeze it with them."""
        if (self.tuning(name) is not None) == trained:
            return
        delta = self.delta(name)
        with self._away():
            if trained:
                self._replace(name, self._attached(delta.mask, delta))
                return
            self._switch.add(name, delta, check_base=False)
            self._end(name)
            self._tunings[name] = None

    def drop(self, name: str) -> None:
        """Forget an adapter; its values leave the model."""
        self.check_free()
        self.check(name)
        if name == self._inside:
            self._put(None)
        self._end(name)
        del self._tunings[name]
        self.active = None if name == self.active else self.active

    def release(self) -> None:
        """Forget all adapters and leave in the model what is there."""
        self.check_free()
        for name, tuning in self._tunings.items():
            if tuning is not None:
                tuning.detach() if name == self._inside else tuning.revert()
        self._switch.release()
        self._tunings.clear()
        self.active = self._inside = None
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._required_grad.get(name, p.requires_grad))

    def convert(self, apply: Callable[[], Any]) -> None:
        """Move or convert the base by ``apply`` while no adapter is in it; the adapters follow."""
        inside = self._inside
        self.check_free()
        self._put(None)
        before = _places(self.model)
        try:
            apply()
        finally:
            if _places(self.model) != before:
                settle(self.model)
                for tuning in self._tunings.values():
                    if tuning is not None:
                        tuning.rebase()
                self._switch.rebase()
            self._put_back(inside)

    def _attached(self, mask: Mask, delta: Delta | None = None) -> Tuning:
        """Return a suspended tuning of the base, with the values of a delta if one is given."""
        with self._away():
            tuning = attach(self.model, mask)
            try:
                if delta is not None:
                    _read_into(tuning, delta, delta.buffers)
                tuning.suspend()
            except BaseException:
                tuning.revert()
                raise
        _rest(tuning)
        return tuning

    def _hold(self, name: str, delta: Delta) -> None:
        """Hold a checked delta in the switch, in place of the one of that name."""
        old = self._switch.delta(name) if name in self._tunings else None
        if old is not None:
            self._switch.remove(name)
        try:
            self._switch.add(name, delta, check_base=False)
        except BaseException:
            if old is not None:
                self._switch.add(name, old, check_base=False)
            raise
        self._tunings[name] = None

    def _replace(self, name: str, tuning: Tuning) -> None:
        """Make a suspended tuning the adapter of that name."""
        if name in self._tunings:
            self._end(name)
        self._tunings[name] = tuning

    def _end(self, name: str) -> None:
        """End what an adapter is, which is not in the model."""
        tuning = self._tunings[name]
        if tuning is None:
            self._switch.remove(name)
        else:
            tuning.revert()


def _freeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def _rest(tuning: Tuning) -> None:
    for values in tuning.parameters():
        values.requires_grad_(False)


def _same_entries(tuning: Tuning, delta: Delta, model: nn.Module) -> bool:
    """Whether a delta has just the entries that the tuning trains and has ever trained."""
    names = aliases(model)
    found = {names.get(name, name): indices for name, indices in delta.mask.indices.items()}
    for held in (tuning.mask.indices, tuning.originals.indices):
        if found.keys() != held.keys() or not all(torch.equal(found[name], held[name]) for name in held):
            return False
    return True


def _read_into(tuning: Tuning, delta: Delta, buffers: dict[str, Tensor]) -> None:
    """Set the values of an attached model to those of a delta with the same entries, and these buffers."""
    names, found = aliases(tuning.model), dict(tuning.model.named_buffers())
    values = {names.get(name, name): held for name, held in delta.values.items()}
    with torch.no_grad():
        for name, parameter in tuning.named_parameters():
            parameter.copy_(values[name])
        for name, buffer in buffers.items():
            found[name].copy_(buffer)
    tuning.write_back()


def _places(model: nn.Module) -> list[Any]:
    """Return what tells whether parameters were moved or converted; of tensor subclasses nothing does."""
    plain = (torch.Tensor, nn.Parameter)
    return [
        (p.dtype, p.device, p.stride(), p.data_ptr()) if type(p.data) in plain else object() for p in model.parameters()
    ]
