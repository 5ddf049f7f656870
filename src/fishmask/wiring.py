"""The wiring of an attached model: the hooks on its modules and weights that take the gradient of the values."""

import warnings
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fishmask.errors import FishError
from fishmask.quantized import QuantizedWeight, packed
from fishmask.sharded import Shards
from fishmask.sites import DenseGradient, Entry, Hook, Site, site_for
from fishmask.watch import Watch


class Wiring:
    """Hooks for one choice of entries: a site for each module that is known, the general path for all other weights.

    Args:
        model: The model.
        entries: Its entries, by canonical name of the parameter.
        shards: How FSDP2 has spread the model, or None.
        loaded: Called once ``load_state_dict`` has reached a module with entries.
    """

    def __init__(
        self, model: nn.Module, entries: Mapping[str, Entry], shards: Shards | None, loaded: Callable[[], None]
    ) -> None:
        self._model, self._entries, self._shards = model, entries, shards
        self._sites: list[Site] = []
        self._handles: list[RemovableHandle] = []
        self._general: dict[str, RemovableHandle] = {}
        self._watch = Watch(self._found_elsewhere)
        self._forwards = 0  # with gradients
        try:
            self._connect(loaded)
        except BaseException:  # out of memory, an interrupt: leave the model as it was
            self.remove()
            raise

    def _connect(self, loaded: Callable[[], None]) -> None:
        entries, model = self._entries, self._model
        names = {id(packed(entry.weight)): name for name, entry in entries.items()}
        general: list[str] = []
        for module in model.modules():
            owned = {attribute: names[id(p)] for attribute, p in module._parameters.items() if id(p) in names}
            if not owned:
                continue
            self._handles.append(module.register_load_state_dict_post_hook(Hook(lambda *_: loaded())))
            site = site_for(module, {attribute: entries[name] for attribute, name in owned.items()})
            if site is None:
                general += owned.values()
                continue
            self._sites.append(site)
            # First of all hooks: it must see the module's own output.
            self._handles.append(module.register_forward_hook(site, prepend=True, with_kwargs=True))
            self._handles += self._watch.own(module, [self._used(name) for name in owned.values()])
        for name in dict.fromkeys(general):
            self.generalise(name)

    @property
    def general(self) -> tuple[str, ...]:
        """Names of the parameters on the general path."""
        return tuple(self._general)

    @property
    def nbytes(self) -> int:
        """Bytes of the plans of all sites."""
        return sum(site.nbytes for site in self._sites)

    def generalise(self, name: str) -> None:
        """Put a parameter on the general path: autograd makes its dense gradient, a hook gathers and drops it."""
        entry, used = self._entries[name], self._used(name)
        for site in self._sites:
            site.drop(entry.values)
        if name in self._general:
            self._general[name].remove()
        for weight in (entry.weight, used):
            weight.grad = None  # one from before attaching would be added to the next
            weight.requires_grad_(True)
        self._general[name] = used.register_post_accumulate_grad_hook(DenseGradient(entry))

    def pause(self, paused: bool) -> None:
        """Take no gradient at the sites for a while."""
        for site in self._sites:
            site.paused = paused

    def take_turn(self) -> bool:
        """Count a forward with gradients, and tell whether it is one to look at closely."""
        # Watching costs about two per cent of a forward, so it is done for the first, second, fourth, eighth ...
        self._forwards += 1
        return self._forwards & (self._forwards - 1) == 0

    def check(self) -> None:
        """Raise FishError if a weight with entries is no longer the model's."""
        if self._shards is not None:
            return
        present = {id(p) for p in self._model.parameters()}
        if gone := [name for name in self._entries if id(self._used(name)) not in present]:
            raise FishError(
                f"these weights are not in the model any more: {', '.join(gone)}. Replace modules and resize "
                "embeddings before attach(); or call detach(), and attach again"
            )

    def begin_forward(self, closely: bool) -> None:
        """Begin to watch for uses of a weight outside its module, if this forward is looked at closely."""
        self._watch.start(closely and not _has_compiled_part(self._model))

    def end_forward(self) -> None:
        """End what ``begin_forward`` began."""
        self._watch.stop()

    def remove(self) -> None:
        """Take all hooks off the model."""
        self._watch.stop(altogether=True)
        for handle in (*self._handles, *self._general.values()):
            handle.remove()
        for name in self._general:
            self._entries[name].weight.requires_grad_(False)
        self._handles, self._general, self._sites = [], {}, []

    def _used(self, name: str) -> nn.Parameter:
        """Return what the layers use for a masked parameter."""
        weight = packed(self._entries[name].weight)
        return weight if self._shards is None else self._shards.whole.get(name, weight)

    def _found_elsewhere(self, weight: Tensor) -> None:
        """Serve a weight that is also used outside its own module; this use and all later ones count from now on."""
        for name in self._entries:
            if self._used(name) is weight and name not in self._general:
                if isinstance(self._entries[name].weight, QuantizedWeight):
                    raise FishError(
                        f"{name} is quantized and used outside its own layer, where the trained entries are not: "
                        "leave it out of the mask, or load the model unquantized"
                    )
                self.generalise(name)
                if self._forwards > 2:
                    warnings.warn(
                        f"{name} is used outside its own module, which was not so at first: this use counts from now "
                        "on, but earlier steps may have lacked its part of the gradient",
                        UserWarning,
                        stacklevel=2,
                    )


def _has_compiled_part(model: nn.Module) -> bool:
    return any(type(module).__name__ == "OptimizedModule" for module in model.modules())
