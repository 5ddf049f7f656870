"""The side path of a quantized linear layer: ``base(x) + x Sᵀ``, with S as wide as the weight and sparse."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fishmask.params import find
from fishmask.plans import SidePlan, Sparse

if TYPE_CHECKING:
    from fishmask.quantized import QuantizedWeight

_INTEGER = torch.int32  # of the width of float32


class Side:
    """Forward hook of a quantized linear layer, and the entries that stand in for those of its weight.

    It remembers the base's numbers at every entry that was ever replaced, so that going back and forth costs no
    dequantization. Unlike the hooks of a tuning it goes along when the model is copied: it is part of the weights.

    Attributes:
        indices: Sorted flat indices [E] of the entries ever replaced.
        values: What stands there now, float32 [E]: the base's own number where nothing does.
        active: Whether any value is not the base's, bit for bit.
    """

    def __init__(self) -> None:
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._sum = 0
        self._empty()

    def _empty(self) -> None:
        self.indices = torch.empty(0, dtype=torch.int64)
        self.values, self._base = torch.empty(0), torch.empty(0)
        self.active = False
        self._forget()

    def _forget(self) -> None:
        """Drop what is found from the entries."""
        self._last: tuple[Tensor, Tensor] | None = None  # indices put last, and their places among all
        self._served: Tensor | None = None  # the indices put when the used places were found
        self._used: Tensor | None = None  # places of the entries in S
        self._plan: SidePlan | None = None
        self._sparse: dict[torch.dtype, Sparse] = {}

    @classmethod
    def install(cls, module: nn.Module) -> "Side":
        """Give a layer its side, with nothing in it."""
        side = cls()
        module.register_forward_hook(side, prepend=True, with_kwargs=True)
        return side

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be found again."""
        return {name: getattr(self, name) for name in ("indices", "values", "_base", "active", "_stamp", "_sum")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Add ``x Sᵀ`` to the layer's output; without replaced entries leave it as it is."""
        if not self.active:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return _Add.apply(output, x, *self._product(module, output))

    def follow(self, weight: "QuantizedWeight") -> None:
        """Notice that the quantized weight was moved; or replaced, which ends all entries as it would in a weight."""
        # The packed tensors of a subclass do not count their changes; the parameter around them does.
        held = (weight.parameter, *weight.stored())
        stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in held)
        if stamp == self._stamp:
            return
        stored = weight.stored_sum()
        if stored != self._sum:
            self._empty()
        self._move(weight.device)
        self._stamp, self._sum = stamp, stored

    def take(self, indices: Tensor) -> Tensor | None:
        """Return what stands at flat indices [K]; None if some were never put."""
        places = self._places(indices)
        return None if places is None else self.values[places]

    def put(self, weight: "QuantizedWeight", indices: Tensor, values: Tensor) -> None:
        """Have float32 values [K] stand at sorted flat indices [K]."""
        places = self._places(indices)
        if places is None:
            self._learn(weight, indices)
            places = self._places(indices)
            assert places is not None
        self.values[places] = values
        self._sparse = {}
        differs = self.values.view(_INTEGER) != self._base.view(_INTEGER)
        self.active = bool(differs.any())
        # S has the entries that differ, and all that are put: those in training will differ soon.
        if self.active and self._served is not indices:
            differs[places] = True
            used = differs.nonzero().squeeze(1)
            if self._used is None or not torch.equal(used, self._used):
                self._used, self._plan = used, None
            self._served = indices

    def excess(self) -> int:
        """Return the sum over the bits of all values, less that of the base's."""
        sums = (tensor.view(_INTEGER).sum(dtype=torch.int64) for tensor in (self.values, self._base))
        return int(next(sums)) - int(next(sums))

    def _move(self, device: torch.device) -> None:
        if self.indices.device == device:
            return
        self.indices, self.values, self._base = (t.to(device) for t in (self.indices, self.values, self._base))
        self._forget()

    def _places(self, indices: Tensor) -> Tensor | None:
        if self._last is None or self._last[0] is not indices:
            places, known = find(indices, self.indices)
            if not bool(known.all()):
                return None
            self._last = (indices, places)
        return self._last[1]

    def _learn(self, weight: "QuantizedWeight", indices: Tensor) -> None:
        """Remember the base's numbers at more entries."""
        new = indices[~find(indices, self.indices)[1]]
        base = weight.base().view(-1)[new]
        merged, order = torch.cat([self.indices, new]).sort()
        self.values, self._base = torch.cat([self.values, base])[order], torch.cat([self._base, base])[order]
        self.indices = merged
        self._forget()

    def _product(self, module: nn.Module, output: Tensor) -> tuple[SidePlan, Sparse]:
        """Return how to multiply by S, and S in the dtype and on the device of an output."""
        self._move(output.device)
        if self._used is None:  # moved, copied or read back
            self._used = (self.values.view(_INTEGER) != self._base.view(_INTEGER)).nonzero().squeeze(1)
        if self._plan is None:
            features: tuple[int, int] = (output.shape[-1], _in_features(module))
            self._plan = SidePlan(self.indices[self._used].cpu(), features, device=self.indices.device)
        if output.dtype not in self._sparse:
            differences = (self.values - self._base)[self._used]
            self._sparse[output.dtype] = self._plan.sparse(differences, output.dtype)
        return self._plan, self._sparse[output.dtype]


class _Add(torch.autograd.Function):
    """``output + x Sᵀ`` for an output [..., O] and an input [..., I]; S has no gradient here."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, plan: SidePlan, sparse: Sparse) -> Tensor:
        ctx.plan, ctx.sparse, ctx.shape, ctx.dtype = plan, sparse, x.shape, x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(output.dtype)
        with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype that the layer answered in
            return plan.added(output.reshape(-1, output.shape[-1]), flat, sparse).view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dx = None
        if ctx.needs_input_grad[1]:
            with torch.autocast(grad.device.type, enabled=False):
                flat = ctx.plan.transposed(grad.reshape(-1, grad.shape[-1]), ctx.sparse)
            dx = flat.view(ctx.shape).to(ctx.dtype)
        return (grad if ctx.needs_input_grad[0] else None), dx, None, None


def side_of(module: nn.Module) -> Side | None:
    """Return the side of a layer, None if it has none."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, Side)), None)


def _in_features(module: Any) -> int:
    return int(module.in_features)
