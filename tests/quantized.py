"""Small models with quantized layers of every kind that is supported, for the tests of side paths."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishmask.quantized import weights


class Net(nn.Module):
    """An embedding, two linear layers to quantize, a norm between them, and a head; [B, T] ids to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.norm = nn.Embedding(30, 64), nn.Linear(64, 128), nn.LayerNorm(128)
        self.down, self.head = nn.Linear(128, 64), nn.Linear(64, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.up(self.words(ids))))
        return self.head(torch.tanh(self.down(x)).mean(1))


QUANTIZED = ("up", "down")


def plain(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def in_bitsandbytes(model: nn.Module, names: Sequence[str], kind: str, **settings: Any) -> None:
    """Replace linear layers by those of bitsandbytes: kind "Linear4bit" or "Linear8bitLt"."""
    layers = pytest.importorskip("bitsandbytes.nn")
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = getattr(layers, kind)(old.in_features, old.out_features, old.bias is not None, **settings)
        new.load_state_dict(old.state_dict())
        new = new.to(old.weight.dtype).to("cpu")
        model.set_submodule(name, new)


def in_torchao(model: nn.Module, names: Sequence[str], config: str, **settings: Any) -> None:
    """Quantize linear layers by torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    made = getattr(quantization, config)(**settings)
    quantization.quantize_(model, made, filter_fn=lambda module, name: name in names)


Quantize = Callable[[nn.Module, Sequence[str]], None]
KINDS: dict[str, Quantize] = {
    "nf4": lambda model, names: in_bitsandbytes(model, names, "Linear4bit", quant_type="nf4"),
    "fp4": lambda m, names: in_bitsandbytes(m, names, "Linear4bit", quant_type="fp4", compress_statistics=False),
    "bnb int8": lambda model, names: in_bitsandbytes(model, names, "Linear8bitLt", has_fp16_weights=False),
    "int8": lambda model, names: in_torchao(model, names, "Int8WeightOnlyConfig"),
    "int4": lambda model, names: in_torchao(model, names, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "float8": lambda model, names: in_torchao(model, names, "Float8WeightOnlyConfig"),
}


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> Net:
    model = plain(dtype)
    KINDS[kind](model, QUANTIZED)
    return model


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights as numbers: dequantized, and with the replaced entries."""
    return {name: weight.detach().clone() for name, weight in weights(model).items()}


def dequantized_twin(model: nn.Module, like: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give ``like``, an unquantized model, the numbers of a quantized one."""
    like = like.to(dtype)
    with torch.no_grad():
        for name, p in like.named_parameters():
            p.copy_(weights(model)[name].detach())
    return like


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, (size, 5), generator=generator), torch.randint(3, (size,), generator=generator)
