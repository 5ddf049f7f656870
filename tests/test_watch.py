import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
