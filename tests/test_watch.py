from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask import Mask, attach
from fishmask.watch import Watch


def watched(layer: nn.Linear, use: object) -> list[Tensor]:
    """Return the weights reported while `use(layer)` runs."""
    reported: list[Tensor] = []
    watch = Watch(reported.append)
    handles = watch.own(layer, [layer.weight])
    watch.start()
    use(layer)
    watch.stop()
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    return reported


def test_own_forward_and_questions_are_not_reported() -> None:
    def use(layer: nn.Linear) -> None:
        layer(torch.ones(2, 3))
        assert layer.weight.shape == (4, 3)
        assert layer.weight.dtype == torch.float32
        assert layer.weight.size(0) == 4
        layer.weight.detach().sum()
        layer.weight.data.sum()

    assert watched(nn.Linear(3, 4), use) == []


def test_other_uses_are_reported() -> None:
    for use in (
        lambda layer: F.linear(torch.ones(2, 3), layer.weight),
        lambda layer: torch.ones(2, 4) @ layer.weight,
        lambda layer: layer.weight.T,
        lambda layer: layer.weight[0],
        lambda layer: torch.cat([layer.weight, torch.ones(1, 3)]),
        lambda layer: F.linear(input=torch.ones(2, 3), weight=layer.weight),
    ):
        layer = nn.Linear(3, 4)
        assert any(weight is layer.weight for weight in watched(layer, use))


def test_the_depth_survives_an_error_in_the_forward() -> None:
    layer = nn.Linear(3, 4)
    reported: list[Tensor] = []
    watch = Watch(reported.append)
    watch.own(layer, [layer.weight])
    watch.start()
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 5))
    layer.weight.sum()
    watch.stop()
    assert len(reported) == 1


def test_watching_nests() -> None:
    layer = nn.Linear(3, 4)
    reported: list[Tensor] = []
    watch = Watch(reported.append)
    watch.own(layer, [layer.weight])
    watch.start()
    watch.start()
    watch.stop()
    layer.weight.sum()
    watch.stop()
    layer.weight.sum()
    watch.stop()
    assert len(reported) == 1


class Product(torch.autograd.Function):
    """A product as kernels for large heads compute it: autograd asks for the weight's gradient when it is called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x if ctx.needs_input_grad[1] else None


class Headless(nn.Module):
    """The head's module holds its weight and never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(self.body(x), self.head.weight)


def test_a_function_of_ones_own() -> None:
    """Its weight is found before the first call, so no gradient is lost; nothing stays behind in torch."""
    apply, x = torch.autograd.Function.__dict__["apply"], torch.randn(5, 3)
    model, dense = Headless(), Headless()
    tuning = attach(model, Mask.random(model, 0.9, seed=0))
    dense(x).square().sum().backward()
    model(x).square().sum().backward()
    assert tuning.general == ("head.weight",)
    for name, values in tuning.named_parameters():
        expected = dense.get_parameter(name).grad.flatten()[tuning.mask.indices[name]]
        assert torch.allclose(values.grad, expected, rtol=1e-6), name
    assert torch.autograd.Function.__dict__["apply"] is apply
