"""Train the masked entries of a model in place.

The base weights stay where they are and are frozen; the k masked entries live a second time as one flat float32
vector of absolute values, the only thing that has gradients and optimizer state. After each optimizer step the values
are written back into the weights, so that the model always is the trained model.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fishmask.carry import carried, carry_optimizer, check_carriable, retire
from fishmask.errors import FishError
from fishmask.fitting import fit
from fishmask.handshake import agree
from fishmask.live import LIVE, TRAINERS, hook_optimizers, is_attached
from fishmask.mask import Mask
from fishmask.originals import Originals, Present
from fishmask.params import find, placed, put, take
from fishmask.quantized import QuantizedWeight, settle, untrainable, weights
from fishmask.rounding import Rounding, rounded, salt_of
from fishmask.sharded import Part, Shards, is_sharded
from fishmask.sites import Entry, Hook, hook_input_embeddings
from fishmask.wiring import Wiring

if TYPE_CHECKING:
    from fishmask.delta import Delta


def attach(model: nn.Module, mask: Mask, *, rounding: Rounding = "nearest", rounding_seed: int = 0) -> "Tuning":
    """Freeze ``model`` except for the entries of ``mask``, which become trainable values.

    The model keeps its classes, module names and ``state_dict`` keys. Give ``tuning.parameters()`` to any
    ``torch.optim`` optimizer and train as usual; the model's weights follow after each ``step()``.

    Args:
        model: Any module, on the device and in the dtype it will train in (float32, bfloat16 or float16). One that is
            on the meta device as a whole runs its steps without data.
        mask: Entries to train. Parameters go by canonical name or by any other name of a tied parameter.
        rounding: How values become weights of bfloat16 or float16: "nearest", or "stochastic", to one of the two
            neighbours at random so that the mean is right; see ``fishmask.rounding``. float32 weights hold the values
            as they are, whatever is said here.
        rounding_seed: Seed of stochastic rounding, from 0 to 2**32 - 1. The same values with the same seed are the
            same weights everywhere, so a training that goes on must be attached with the seed it had.

    Returns:
        The ``Tuning``: the k values, and what to do with them.

    Raises:
        FishError: The model, or part of it, is attached already.
        ValueError: The mask is empty, names parameters that the model lacks, does not fit their shapes, or chooses
            from weights of another dtype or of several devices, all faults in one message; or an unknown rounding.

    Source:
        Section 2 of the paper: update only the chosen entries. The authors' code multiplies dense gradients by a dense
        0/1 mask instead, and so lets weight decay and stale momentum reach the other entries.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> tuning = attach(model, Mask.from_indices({"weight": [1, 6]}))
        >>> sum(p.numel() for p in tuning.parameters())
        2
        >>> optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
    """
    return Tuning(model, mask, rounding, rounding_seed)


class Tuning:
    """An attached model: its k trainable values and their life. Made by ``attach``.

    A copied or pickled Tuning brings an attached copy of its model along. A copy of the model alone is a plain model
    with the present weights, all frozen.

    Attributes:
        model: The attached model.
        mask: The current mask, with the shapes of the model.
        originals: What the base was, at the entries that were ever masked.
        rounding: How values become weights of lower precision; ``rounding_seed``: the seed of its draws.
        loads: How many times ``load_state_dict`` has reached a module with masked entries.
        reduced: Whether a ``Replica`` has shown the values to ``DistributedDataParallel``.
    """

    _flat: Tensor  # float32 [k]: all values, in the order of the entries

    def __init__(self, model: nn.Module, mask: Mask, rounding: Rounding = "nearest", rounding_seed: int = 0) -> None:
        salt_of(rounding, rounding_seed, "")  # raises
        if is_attached(model):
            raise FishError(
                "this model is attached already: call set_mask() on its Tuning to train other entries, "
                "or detach() or revert() it first"
            )
        self._shards = Shards.of(model)
        parameters = weights(model)
        mask = self.mask = self._agreed(mask, model)
        if self._shards is not None and any(isinstance(p, QuantizedWeight) for p in parameters.values()):
            raise FishError("a quantized model sharded by FSDP2 cannot be trained: use DDP, or load it unquantized")
        if faults := untrainable(model):
            raise FishError("this quantized model cannot be trained:\n  " + ";\n  ".join(faults))
        settle(model)
        self.model = model
        self.rounding: Rounding = rounding
        self.rounding_seed = rounding_seed
        self.loads = 0
        self._attached = True
        self._away: Present | None = None
        self._clearing: RemovableHandle | None = None
        self._step_hooks: OrderedDict[int, Callable[[Optimizer], None]] = OrderedDict()
        self._entries: dict[str, Entry] = {}
        self._adopted: dict[str, Tensor] = {}
        self._required_grad = {name: p.requires_grad for name, p in parameters.items()}
        with torch.inference_mode(False):
            self.originals = Originals(model)
        try:
            with torch.inference_mode(False):
                self._begin()
                self._lay_out(mask)
        except BaseException:  # out of memory, an interrupt: leave the model as it was
            self._let_go()
            raise
        for name, p in parameters.items():
            p.requires_grad_(name in self.general)

    def _begin(self) -> None:
        """Set up what a copy must set up anew: hooks on the model, and the watch over its forward."""
        self._paused = self._disabled = self._stepping = self.reduced = False
        self._counted: nn.Parameter | None = None  # one of the values, by which the optimizer is known that counts
        self._wiring: Wiring | None = None
        self._handles = []
        self._handles += [
            self.model.register_forward_pre_hook(Hook(self._before_forward), prepend=True),
            self.model.register_forward_hook(Hook(self._after_forward), always_call=True),
            *hook_input_embeddings(self.model),
        ]
        LIVE.add(self)
        hook_optimizers()

    @property
    def attached(self) -> bool:
        """Whether the model is attached still."""
        return self._attached

    @property
    def suspended(self) -> bool:
        """Whether the model has its base back until ``resume``."""
        return self._away is not None

    @property
    def waiting_buffers(self) -> dict[str, Tensor]:
        """The buffers that training has changed, while they wait for ``resume``; the dict is the tuning's own."""
        return {} if self._away is None else self._away.buffers

    @property
    def general(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient autograd makes whole, because their use is not known."""
        return () if self._wiring is None else self._wiring.general

    def memory(self) -> dict[str, int]:
        """Count what attaching keeps on the model's device beyond the model.

        Returns:
            Bytes by part. "values": the float32 numbers; their gradients take as much in a backward, and optimizers
            add their state. "indices": those of the entries; on the CPU this is the mask's own memory. "originals":
            what ``revert`` gives back. "plans": how each layer comes to its gradient.
        """
        return {
            "values": self._flat.nbytes,
            "indices": sum(entry.indices.nbytes for entry in self._entries.values()),
            "originals": self.originals.nbytes,
            "plans": 0 if self._wiring is None else self._wiring.nbytes,
        }

    @property
    def shards(self) -> Shards | None:
        """How FSDP2 has spread the model, or None."""
        return self._shards

    def settled_parameters(self) -> dict[str, nn.Parameter]:
        """Return everything that entries may be of, by canonical name; as shards where FSDP2 has gathered some."""
        if self._shards is not None:
            self._shards.settle()
        return weights(self.model)

    # --- the values ---------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable values: one float32 vector per parameter with masked entries, k numbers in all."""
        yield from (entry.values for entry in self._entries.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (canonical name of the parameter, its values), the values in the order of the mask's indices."""
        yield from ((name, entry.values) for name, entry in self._entries.items())

    @property
    def values(self) -> Tensor:
        """All k values as one float32 vector [k], in the order of ``named_parameters``, sharing their memory."""
        return self._flat

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the model's weights.

        Every step of a ``torch.optim`` optimizer and every forward of the model does so by itself. Call it only after
        a change that PyTorch does not count as one (through ``.data``).

        Raises:
            FishError: The tuning is suspended.
        """
        self._check_present()
        if self._shards is not None:
            self._shards.settle()
        for entry in self._entries.values():
            entry.write()
        self._written = self._version()

    @torch.no_grad()
    def read_back(self) -> None:
        """Read the values from the model's weights; ``load_state_dict`` on the model does so by itself.

        Raises:
            FishError: The tuning is suspended.
        """
        self._check_present()
        parameters = self.settled_parameters()
        for name, entry in self._entries.items():
            if parameters[name] is not entry.weight:  # load_state_dict(assign=True) brings a new parameter
                entry.weight = parameters[name]
                entry.weight.requires_grad_(False)
                if self._wiring is not None and name in self.general:
                    self._wiring.generalise(name)
            found = take(entry.weight, entry.indices)
            # Where the weight is what the value has written, the value keeps the digits that the weight lacks.
            entry.values.copy_(torch.where(found == entry.rounded(), entry.values, found.float()))
        self._written = self._version()

    @property
    def step_hooks(self) -> tuple[Callable[[Optimizer], None], ...]:
        """The hooks of ``on_step``."""
        return tuple(self._step_hooks.values())

    def on_step(self, hook: Callable[[Optimizer], None]) -> RemovableHandle:
        """Have ``hook(optimizer)`` called after each step, once the values are written back.

        Where several optimizers share the values, the steps of the one that steps first count, and of those that
        replace it.

        Returns:
            A handle whose ``remove()`` ends it; so does ``detach``.
        """
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = hook
        return handle

    def adopt(self, mask: Mask) -> None:
        """Count entries outside the mask as trained, because others train them; ``write_adopted`` writes them.

        They belong to ``delta()`` and are restored by ``revert()``. A change of mask ends it; what was written stays.

        Args:
            mask: The entries, none of which is in the mask.

        Raises:
            ValueError: Some are, or the mask does not fit the model.
        """
        self._check_attached()
        parameters = self.settled_parameters()
        mask = mask if mask.k == 0 else fit(mask, self.model, parameters)
        if both := (mask & self.mask).k:
            raise ValueError(f"{both} of these {mask.k} entries are in the mask, so they are trained here")
        for name, indices in mask.indices.items():
            self.originals.remember(name, parameters[name], indices)
        self._adopted = {name: placed(flat, parameters[name]) for name, flat in mask.indices.items()}

    @torch.no_grad()
    def write_adopted(self, values: Tensor) -> None:
        """Write the values of all adopted entries into the weights: a vector in the order of their mask."""
        parameters = self.settled_parameters()
        parts = values.split([len(indices) for indices in self._adopted.values()])
        for (name, indices), part in zip(self._adopted.items(), parts, strict=True):
            put(parameters[name], indices, rounded(part, parameters[name].dtype, indices, self._salt(name)))

    # --- its life -----------------------------------------------------------------------------------------------------

    def check_mask(self, mask: Mask, optimizer: Optimizer | None = None) -> Mask:
        """Return a mask under canonical names and with the model's shapes, or raise what ``set_mask`` would."""
        self._check_attached()
        fitting = self._agreed(mask, self.model)
        if optimizer is not None:
            check_carriable(optimizer, self.parameters())
        return fitting

    def set_mask(self, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Train another set of entries from now on.

        Entries in both masks keep their value, pending gradient and optimizer state. Entries that leave keep the value
        they have reached and move no more. New ones start from the model's weight with optimizer state zero (a step
        count is kept per parameter).

        Args:
            mask: The new mask.
            optimizer: The optimizer of the present values; its groups and state are carried over. Without it, build a
                new one from ``parameters()``: a step of the old one is refused.

        Raises:
            ValueError: As for ``attach``; or the optimizer lacks these values, or keeps state that is not one number
                per value (L-BFGS). Nothing has changed then.
            FishError: Called after ``detach`` or ``revert``.
        """
        mask = self.check_mask(mask, optimizer)
        before = self._entries
        self.write_back()
        self._unwire()
        with torch.inference_mode(False):
            self._lay_out(mask)
        self.mask, self._adopted, self.reduced = mask, {}, False
        for name in before.keys() & self._entries.keys():
            old, new = before[name], self._entries[name]
            place, stays = find(new.indices, old.indices)
            with torch.no_grad():  # the digits that the weight lacks
                new.values.copy_(torch.where(stays, old.values[place], new.values))
            if old.values.grad is not None:
                new.values.grad = carried(old.values.grad, old.indices, new.indices)
        if optimizer is not None:
            carry_optimizer(optimizer, before, self._entries)
        retire(entry.values for entry in before.values())

    def detach(self) -> None:
        """Let go of the model with its trained weights; ``requires_grad`` is again as before ``attach``.

        Raises:
            FishError: Called twice.
        """
        self._check_attached()
        self.write_back()
        self._let_go()
        retire(self.parameters())

    @torch.no_grad()
    def suspend(self) -> None:
        """Give the model its base back, bit for bit, and let go of it until ``resume``.

        Values, optimizer state, the mask's history and the hooks of ``on_step`` wait. Meanwhile the model is a plain
        one: another mask may be attached to it, or it may be moved and converted (then call ``rebase``).

        Raises:
            FishError: The model is not attached, or is sharded.
        """
        self._check_attached()
        if self._shards is not None:
            raise FishError("a model sharded by FSDP2 cannot be suspended: revert() it, and attach again")
        self.write_back()
        away = self.originals.present(self.model)
        try:
            self.originals.restore(self.model)
        except BaseException:  # an interrupt: leave the model as it was
            away.write(self.model)
            raise
        self._away = away
        self._release()

    @torch.no_grad()
    def resume(self) -> None:
        """Go on where ``suspend`` stopped; the same optimizer serves.

        Raises:
            FishError: It is not suspended, the model is attached otherwise, or its masked entries are not the base's.
        """
        if self._away is None:
            raise FishError("this Tuning is not suspended, so there is nothing to resume")
        if is_attached(self.model):
            raise FishError("this model is attached by another Tuning: suspend(), detach() or revert() that one first")
        if changed := self.originals.differing(self.model):
            raise FishError(
                f"the model is no longer the base of this Tuning: other weights in {', '.join(changed)}. Undo that "
                "change; after moving or converting the model call rebase() before resume()"
            )
        self.originals.restore_buffers(self.model)  # those that others have moved meanwhile
        away = self._away
        try:
            away.write(self.model)
            self._away, self._attached = None, True
            with torch.inference_mode(False):
                self._begin()
                self._wire()
            for name, p in weights(self.model).items():
                p.requires_grad_(name in self.general)
            for values in self.parameters():
                values.requires_grad_(True)
            self.write_back()
        except BaseException:  # out of memory, an interrupt: it is suspended still
            self._away = away
            self.originals.restore(self.model)
            self._release()
            raise

    @torch.no_grad()
    def rebase(self) -> None:
        """Take the suspended model's present weights for the base: those it was moved or converted to.

        Values keep their identity and their float32 numbers, so an optimizer of them still serves; where the device is
        another one, its state has to move too, as after moving any model.

        Raises:
            FishError: It is not suspended.
        """
        if self._away is None:
            raise FishError("rebase() is for a suspended Tuning: call suspend() before moving or converting the model")
        parameters, touched = weights(self.model), self.originals.indices
        with torch.inference_mode(False):
            self.originals = Originals(self.model)
            for name, indices in touched.items():
                self.originals.remember(name, parameters[name], indices)
            device = parameters[next(iter(self._entries))].device
            self._flat = self._flat.to(device)
            for name, entry, part in zip(self._entries, self._entries.values(), self._parts(), strict=True):
                entry.weight, entry.indices = parameters[name], placed(entry.flat, parameters[name])
                grad, entry.values.grad = entry.values.grad, None
                entry.values.data = part
                entry.values.grad = None if grad is None else grad.to(device)
            self._adopted = {name: indices.to(device) for name, indices in self._adopted.items()}
        self._away = self._away.like(self.model)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Have the model be its base for a while, at the cost of k; training goes on afterwards.

        Forwards inside give what the base gives, and no gradient for the values. A forward from before can go on to
        its backward afterwards, but not inside.

        Raises:
            FishError: The model is not attached.
        """
        if self._disabled:
            yield
            return
        self._check_attached()
        self._write_changes()
        general = [self._entries[name].weight for name in self.general]
        with self.originals.put_back(self.model):
            self._disabled = True
            self._pause(self._paused)
            for weight in general:
                weight.requires_grad_(False)
            try:
                yield
            finally:
                self._disabled = False
                self._pause(self._paused)
                for weight in general:
                    weight.requires_grad_(True)

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the base bit for bit, also after ``detach``: entries ever masked, and buffers changed by training."""
        if self._away is not None:
            self._away = None
            self._step_hooks.clear()
            retire(self.parameters())
            return
        self.settled_parameters()
        self.originals.check(self.model)
        if self._attached:
            self.detach()
        self.originals.restore(self.model)

    @torch.no_grad()
    def delta(self, precision: Literal["weights", "values"] = "weights") -> "Delta":
        """Return what training changed: every entry ever masked, and changed buffers.

        Buffers matter where training moves them, such as the running statistics of BatchNorm.

        Args:
            precision: "weights", numbers in the weights' own dtype; "values", the float32 numbers that are trained, so
                that training can go on from them. They give the same weights, save where stochastic rounding made
                those: whoever applies values rounds to the nearest.

        Raises:
            FishError: The tuning is suspended, or what is not in the mask was changed.
        """
        self._check_present()
        from fishmask.delta import Delta
        from fishmask.fingerprint import fingerprint

        if self._attached:
            self.write_back()
        parameters = self.settled_parameters()
        self.originals.check(self.model)
        touched = Mask.from_indices(self.originals.indices, shapes=self.model)
        values = {name: take(parameters[name], indices) for name, indices in touched.indices.items()}
        if precision == "values":
            for name, entry in self._entries.items():
                values[name] = values[name].float()
                places = torch.searchsorted(touched.indices[name], entry.flat)
                values[name][places.to(entry.indices.device)] = entry.values.detach()
        config = getattr(self.model, "config", None)
        return Delta(
            touched,
            values,
            base=fingerprint(self.originals.base(self.model), touched),
            buffers=self.originals.changed_buffers(self.model),
            base_name=getattr(config, "_name_or_path", None) or None,
            base_revision=getattr(config, "_commit_hash", None),
        )

    def __repr__(self) -> str:
        state = "attached" if self._attached else "detached" if self._away is None else "suspended"
        return f"Tuning({type(self.model).__name__}, k={self.mask.k:,} of {self.mask.n:,}, {state})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out hooks and the flat vector; ``__setstate__`` makes them again."""
        kept = ("model", "mask", "loads", "_attached", "_away", "_adopted", "_required_grad", "originals", "_entries")
        return {name: getattr(self, name) for name in (*kept, "rounding", "rounding_seed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shards = Shards.of(self.model)
        self._step_hooks, self._clearing = OrderedDict(), None
        self._flat = torch.cat([entry.values.detach() for entry in self._entries.values()])
        for entry, values in zip(self._entries.values(), self._parts(), strict=True):
            entry.values.data = values
        self._written = self._version()
        if self._attached:
            self._begin()
            self._wire()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[Tensor, ...]:
        """Return the flat vector's parts, one for each parameter with entries."""
        parts: tuple[Tensor, ...] = self._flat.split([len(entry.flat) for entry in self._entries.values()])
        return parts

    def _check_present(self) -> None:
        if self._disabled:
            raise FishError("inside disabled() the model is its base, which is only lent: leave the block first")
        if self._away is not None:
            raise FishError("this Tuning is suspended, and its model is the base: call resume() first")

    def _check_attached(self) -> None:
        self._check_present()
        if not self._attached:
            raise FishError("this Tuning is no longer attached to its model: call fishmask.attach(model, mask) again")

    def _agreed(self, mask: Mask, model: nn.Module) -> Mask:
        """Return ``fit``'s mask, or raise its error, once all ranks of a sharded model have come to the same."""
        if self._shards is None:
            return fit(mask, model, weights(model))
        self._shards.settle()
        try:
            fitting, found = fit(mask, model, weights(model)), None
        except ValueError as error:
            fitting, found = mask, error
        agree(self._shards.wire, {"mask": fitting.digest if found is None else str(found)})
        if found is not None:
            raise found
        return fitting

    def _salt(self, name: str) -> int | None:
        return salt_of(self.rounding, self.rounding_seed, name)

    def _version(self) -> int:
        """Return a number that grows with every in-place change of the values."""
        return self._flat._version + sum(entry.values._version for entry in self._entries.values())

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether a step of an optimizer of these values is one for those who count."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        values = list(self.parameters())
        if not any(p is self._counted for p in values):  # the first step with these values
            self._counted = next(p for p in values if id(p) in held)
        return id(self._counted) in held

    def _expect_cleared(self, optimizer: Optimizer) -> None:
        """After a step: a gradient it has used, and that the next backward adds to, is a mistake of a trainer."""
        if self._clearing is not None:
            self._clearing.remove()
            self._clearing = None
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        values = next((p for p in self.parameters() if id(p) in held and p.grad is not None), None)
        if values is None or values.grad is None:
            return
        trained, stepped, version = ref(values), ref(values.grad), values.grad._version

        def check(new: Tensor) -> None:
            own = trained()
            held = None if own is None else own.grad
            if held is not None and held is stepped() and held._version == version and bool(held.any()):
                raise FishError(
                    "the gradients of the values were not cleared since the last step, so the next one would take them "
                    f"a second time: call optimizer.zero_grad() after each step; {TRAINERS}"
                )

        self._clearing = values.register_hook(check)

    def _write_changes(self) -> None:
        """Write the values back if they have changed, or may have: within a step their version does not tell."""
        if not self._disabled and (self._stepping or self._version() != self._written):
            self.write_back()

    @torch.no_grad()
    def _lay_out(self, mask: Mask) -> None:
        """Make the values of ``mask`` from the present weights, and hook the places where their gradient is taken."""
        parameters = self.settled_parameters()
        indices = {name: placed(flat, parameters[name]) for name, flat in mask.indices.items()}
        self._flat = torch.cat([take(parameters[name], index).float() for name, index in indices.items()])
        values = self._flat.split([len(index) for index in indices.values()])
        self._entries = {
            name: Entry(
                parameters[name],
                flat,
                indices[name],
                nn.Parameter(part),
                _part(parameters[name], indices[name]),
                self._salt(name),
            )
            for (name, flat), part in zip(mask.indices.items(), values, strict=True)
        }
        self._written = self._version()
        for name, entry in self._entries.items():
            self.originals.remember(name, entry.weight, mask.indices[name])
        self._wire()

    def _wire(self) -> None:
        self._unwire()
        self._wiring = Wiring(self.model, self._entries, self._shards, self._after_load)

    def _unwire(self) -> None:
        if self._wiring is not None:
            self._wiring.remove()
        self._wiring = None

    def _let_go(self) -> None:
        self._release()
        self._step_hooks.clear()

    def _release(self) -> None:
        self._attached = False
        LIVE.discard(self)
        self._unwire()
        for handle in self._handles:
            handle.remove()
        for name, p in self.settled_parameters().items():
            p.requires_grad_(self._required_grad.get(name, p.requires_grad))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._paused or self._disabled:
            return
        self._write_changes()
        if self._shards is None and hasattr(module, "unshard"):
            raise FishError("the model was sharded while attached: call fully_shard first, then attach")
        name, first = next(iter(self._entries.items()))
        if first.weight.device != self._flat.device or first.weight.dtype != self.originals.dtype(name):
            raise FishError(
                "the model was moved or converted while attached: move it to its device and dtype first, then attach"
            )
        grad = torch.is_grad_enabled()
        if grad and DistributedDataParallel._active_ddp_module is not None and not self.reduced:
            raise FishError(
                "DistributedDataParallel does not know the values of an attached model, so every worker would "
                "train alone: wrap the model as DistributedDataParallel(fishmask.data_parallel.Replica(tuning))"
            )
        assert self._wiring is not None
        closely = grad and self._wiring.take_turn()
        if closely:
            self._wiring.check()
        if closely and self._shards is not None:
            self._shards.check_equal(self._flat)
        self._wiring.begin_forward(closely)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._wiring is not None:
            self._wiring.end_forward()

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if self._wiring is not None:
            self._wiring.pause(paused or self._disabled)

    def _after_load(self) -> None:
        self.loads += 1
        self.read_back()


def _part(weight: nn.Parameter, indices: Tensor) -> Part | None:
    return Part.of(weight, indices) if is_sharded(weight) else None
