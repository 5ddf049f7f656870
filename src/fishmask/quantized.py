"""Quantized weights: what their numbers are, and entries that stand in for some of them.

A quantized weight cannot be written to. Its layer computes ``base(x)``, and a side path adds ``x Sᵀ``, where S holds
the differences of the replaced entries from the base. ``QuantizedWeight`` makes this look like a weight: entries are
taken and put, and putting the base's own bits back leaves nothing to add. bitsandbytes and torchao are never imported
here: where nobody has imported them there is no such weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask.errors import FishError
from fishmask.params import is_in_torchao, is_quantized
from fishmask.side import Side, side_of

_OTHERS = ("qweight", "W_q", "weight_packed")  # where GPTQ and AWQ, HQQ, and compressed-tensors keep a layer's weight
_ADVICE = "load the model unquantized, or with bitsandbytes in 4 or 8 bits, or torchao's weight-only kinds"


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight as the numbers that it stands for: float32, in the shape that it has unquantized.

    It answers what the code that trains, applies and saves entries asks of a parameter. Two are equal if they are the
    same parameter of the same module.

    Attributes:
        module: The layer.
        attribute: Name of the parameter in it.
        shared: Whether other layers use it too.
    """

    module: nn.Module
    attribute: str
    shared: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The packed parameter, which the layer uses."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def shape(self) -> torch.Size:
        """Shape of the unquantized weight."""
        state = getattr(self.parameter, "quant_state", None)
        return self.parameter.shape if state is None else torch.Size(state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Always float32: entries beside the quantized weight need not be rounded."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.parameter.device

    @property
    def is_meta(self) -> bool:
        """Whether it has no memory."""
        return self.parameter.is_meta

    @property
    def requires_grad(self) -> bool:
        """Whether autograd would make a gradient of it, which torchao cannot."""
        return self.parameter.requires_grad

    def requires_grad_(self, required: bool) -> "QuantizedWeight":
        """Freeze it; a quantized weight has no gradient, whatever is asked for."""
        if not required or self.parameter.is_floating_point():
            self.parameter.requires_grad_(required)
        return self

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of entries."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.numel() * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Whether its numbers are, as they always are."""
        return True

    def is_inference(self) -> bool:
        """Whether it was made in inference mode."""
        return self.parameter.is_inference()

    def base(self) -> Tensor:
        """Return the numbers of the quantized weight alone, dequantized: float32 [O, I].

        Raises:
            FishError: bitsandbytes has repacked it.
        """
        weight = self.parameter
        with torch.no_grad():
            if type(weight).__name__ == "Params4bit":
                return self._base4(weight)
            if type(weight).__name__ == "Int8Params":
                rows = self.stored()[1].float() * (1 / 127)
                return weight.detach().as_subclass(Tensor).float() * rows[:, None]
            return weight.dequantize().detach().float()

    def _base4(self, weight: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        if is_repacked(weight):
            raise FishError(
                f"bitsandbytes has repacked this {type(self.module).__name__} in an evaluation on the CPU and rounded "
                f"its scales, so the base is gone: load the model again, and attach or apply before its first forward"
            )
        dense: Tensor = dequantize_4bit(weight.detach().as_subclass(Tensor), weight.quant_state)
        return dense.float().reshape(self.shape)

    def stored(self) -> list[Tensor]:
        """Return the tensors that make it up: packed numbers, scales, and what belongs to them."""
        weight: Any = self.parameter
        if type(weight).__name__ == "Params4bit":
            return [weight, *_tensors_in(weight.quant_state), *_tensors_in(weight.quant_state.state2)]
        if type(weight).__name__ == "Int8Params":
            # The scales move from the parameter to the layer in the first forward.
            rows = weight.SCB if getattr(weight, "SCB", None) is not None else vars(self.module)["state"].SCB
            return [weight, rows]
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]

    def stored_sum(self) -> int:
        """Return a sum over the bytes of what is stored."""
        return sum(int(_bytes(tensor).sum(dtype=torch.int64)) for tensor in self.stored())

    def checksum(self) -> int:
        """Return a sum over the bits that says whether anything has changed, replaced entries included."""
        side = self._side()
        return self.stored_sum() + (0 if side is None else side.excess())

    def detach(self) -> Tensor:
        """Return its numbers with all replaced entries, a new float32 tensor [O, I]."""
        dense, side = self.base(), self._side()
        if side is not None:
            dense.view(-1).index_copy_(0, side.indices, side.values)
        return dense

    def take(self, indices: Tensor) -> Tensor:
        """Return the numbers at flat indices [K], float32 on its device; costs K where all have been put before."""
        indices, side = indices.to(self.device), self._side()
        known = None if side is None else side.take(indices)
        return self.detach().take(indices) if known is None else known

    def put(self, indices: Tensor, values: Tensor) -> None:
        """Have ``values`` [K] stand in for the entries at flat indices [K]; the base's own leave the base alone.

        Raises:
            FishError: The layer is not linear, so nothing can be added beside it; or bitsandbytes has repacked it.
        """
        if (reason := self.unfit()) is not None:
            raise FishError(f"entries of this weight cannot be replaced: {reason}")
        with torch.inference_mode(False), torch.no_grad():
            keep_layout(self.module)
            side = self._side()
            if side is None:
                side = Side.install(self.module)
                side.follow(self)
            side.put(self, indices.to(self.device), values.detach().to(self.device, torch.float32))

    def _side(self) -> Side | None:
        side = side_of(self.module)
        if side is not None:
            side.follow(self)
        return side

    def unfit(self) -> str | None:
        """Say why its entries cannot be replaced; None if they can."""
        kind = type(self.module)
        known = kind is nn.Linear or (issubclass(kind, nn.Linear) and kind.__module__.startswith("bitsandbytes."))
        if self.shared:
            return f"it is quantized and shared by several layers, and a side path is one layer's; {_ADVICE}"
        if known and self.attribute == "weight" and "forward" not in vars(self.module):
            return None
        return f"it is a quantized {type(self.module).__name__}, and a side path needs a linear layer; {_ADVICE}"


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return everything that entries may be of, by canonical name and in module order: as of an unquantized model.

    That is ``canonical_parameters``, and the quantized weights as ``QuantizedWeight``, which answer what is asked of a
    parameter here; only autograd does not know them.
    """
    quantized = quantized_weights(model)
    return {
        name: cast(nn.Parameter, quantized.get(id(p), p))
        for name, p in model.named_parameters()
        if id(p) in quantized or p.is_floating_point()
    }


def packed(weight: nn.Parameter) -> nn.Parameter:
    """Return the parameter that layers use for one of ``weights``: itself, or the packed one."""
    return weight.parameter if isinstance(weight, QuantizedWeight) else weight


def quantized_weights(model: nn.Module) -> dict[int, QuantizedWeight]:
    """Return the quantized weights of ``model`` by the id of their parameter."""
    found: dict[int, QuantizedWeight] = {}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None and is_quantized(p):
                found[id(p)] = QuantizedWeight(module, attribute, shared=id(p) in found)
    return found


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Have quantized linear layers hold their numbers as plain float32 weights for a while, so that autograd sees them.

    This takes as much memory as the scores that it is for. Modules, names and hooks stay what they are.

    Raises:
        FishError: A 4-bit layer was repacked by bitsandbytes.
    """
    swapped: list[tuple[nn.Module, type[nn.Module], nn.Parameter, bool]] = []
    try:
        for weight in quantized_weights(model).values():
            if weight.unfit() is None:
                module, side = weight.module, side_of(weight.module)
                dense = nn.Parameter(weight.detach(), requires_grad=False)
                swapped.append((module, type(module), weight.parameter, side is not None and side.active))
                if side is not None:
                    side.active = False  # its entries are in the weight
                module.__class__, module._parameters[weight.attribute] = _Plain, dense
        yield
    finally:
        for module, kind, parameter, active in swapped:
            module.__class__, module._parameters["weight"] = kind, parameter
            if (side := side_of(module)) is not None:
                side.active = active


class _Plain(nn.Linear):
    """A linear layer in float32, whatever it is given, that answers in the dtype it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight, None if self.bias is None else self.bias.float()).to(x.dtype)


def untrainable(model: nn.Module) -> list[str]:
    """List what is in the way of training any part of ``model``: layers that lose the gradient of what is below."""
    faults = []
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        kind = type(module).__name__
        if weight is None:
            continue
        if type(module).__module__.startswith("bitsandbytes.") and weight.is_floating_point():
            faults.append(
                f"{path}: this {kind} is not quantized; move the model to its device first, or, where transformers "
                f"has made a new head, name it in llm_int8_skip_modules of the BitsAndBytesConfig"
            )
        elif is_repacked(weight):
            faults.append(
                f"{path}: bitsandbytes has repacked this {kind} in an evaluation on the CPU, which loses the gradient "
                "of its input; load the model again, and attach before its first forward"
            )
        elif is_in_torchao(weight) and isinstance(module, nn.Linear) and not _has_backward(weight):
            faults.append(
                f"{path}: a torchao weight ({type(weight).__name__}) through which no gradient flows; quantize the "
                "weights alone, not the activations (Int8WeightOnlyConfig, for instance)"
            )
    return faults


def foreign(module: nn.Module | None) -> str | None:
    """Say of which unknown kind of quantization a layer is; None if it does not look quantized."""
    if module is None or not any(hasattr(module, name) for name in _OTHERS):
        return None
    return f"{type(module).__name__} is quantized in a way that is not supported; {_ADVICE}"


def keep_layout(module: Any) -> None:
    """Keep bitsandbytes from repacking a layer for evaluation: that rounds its scales and cuts off gradients."""
    if type(module._parameters.get("weight")).__name__ == "Params4bit" and hasattr(
        module, "support_avx512bf16_for_cpu"
    ):
        module.support_avx512bf16_for_cpu = False


def settle(model: nn.Module) -> None:
    """Bring quantized layers into the state that they have in training, so that no forward changes the base.

    bitsandbytes would repack 4-bit layers for evaluation, and convert their biases in the first forward.
    """
    for module in model.modules():
        if type(module._parameters.get("weight")).__name__ == "Params4bit":
            keep_layout(module)
            bias, dtype = module._parameters.get("bias"), vars(module).get("compute_dtype")
            if bias is not None and dtype is not None:
                bias.data = bias.data.to(dtype)


def is_repacked(weight: Any) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight anew, for evaluation on the CPU."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _bytes(tensor: Tensor) -> Tensor:
    """View the memory of a dense tensor as bytes [N], whatever its class."""
    return tensor.detach().as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8)


def _tensors_in(state: Any) -> list[Tensor]:
    return [] if state is None else [value for value in vars(state).values() if isinstance(value, Tensor)]


def _has_backward(weight: Tensor) -> bool:
    """Try the product of one row of zeros with a torchao weight; what is asked is whether the row gets a gradient."""
    with torch.enable_grad(), torch.inference_mode(False):
        x = torch.zeros(1, weight.shape[-1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        try:
            y = F.linear(x, weight)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), allow_unused=True)
        except (RuntimeError, NotImplementedError, AssertionError):
            return False
    return grad is not None
