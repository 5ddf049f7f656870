"""What attaching takes: memory, none of it on a model that has none, and no second forward of any layer."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fishmask
from fishmask.costs import planned_for
from fishmask.mask import Mask
from fishmask.params import placed
from tests.cases import CASES, Case
from tests.dense import loss_of

SEVERAL = ("conv", "bert-padded", "gpt2", "torch-encoder")


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def test_a_model_without_memory_runs_its_steps() -> None:
    model = case("conv").make().train()
    every_kind = Mask.random(model, 0.3, seed=0) | Mask.biases(model)
    tuning = fishmask.attach(model.to("meta"), every_kind)
    optimizer = torch.optim.AdamW(tuning.parameters())
    for seed in range(2):
        inputs, targets = (tensor.to("meta") for tensor in case("conv").batch(2, 0))
        loss_of(model, (inputs, targets)).backward()
        assert all(p.grad is not None and p.grad.is_meta for p in tuning.parameters())
        optimizer.step()
        optimizer.zero_grad()
        tuning.set_mask(Mask.random(model, 0.1, seed), optimizer)
    tuning.suspend()
    tuning.resume()
    tuning.revert()
    assert all(p.requires_grad and p.is_meta for p in model.parameters())


def test_a_model_partly_without_memory_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias: on the meta device, not in memory"):
        fishmask.attach(model, Mask.from_indices({"0.weight": [0]}))
    with pytest.raises(ValueError, match=r"float32 on meta; must be .* in memory"):
        fishmask.attach(model, Mask.from_indices({"1.weight": [0]}))


# --- indices ----------------------------------------------------------------------------------------------------------


def test_indices_take_four_bytes_away_from_the_cpu_and_none_on_it() -> None:
    indices = torch.tensor([0, 5])
    assert placed(indices, torch.zeros(2, 3)) is indices
    with planned_for("cuda"):
        assert placed(indices, torch.zeros(2, 3, device="meta")).dtype == torch.int32
        assert placed(indices, torch.zeros(2**31 - 1, device="meta")).dtype == torch.int32
        assert placed(indices, torch.zeros(2**31, device="meta")).dtype == torch.int64
    assert placed(indices, torch.zeros(2, 3, device="meta")).dtype == torch.int64  # it stands for a CPU


@pytest.mark.parametrize("name", SEVERAL)
def test_narrow_indices_train_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: masks of all kinds of layers, a change of mask, and what reads and writes weights."""
    trained = []
    for narrow in (False, True):
        if narrow:
            module = importlib.import_module("fishmask.attach")
            monkeypatch.setattr(module, "placed", lambda indices, weight: indices.to(torch.int32))
        model = case(name).make().train()
        tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=0))
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.01)
        for seed in range(3):
            torch.manual_seed(seed)
            loss_of(model, case(name).batch(2, seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if seed == 1:
                tuning.set_mask(Mask.random(model, 0.3, seed=1), optimizer)
                with tuning.disabled():
                    pass
                tuning.read_back()
        assert {entry.indices.dtype for entry in tuning._entries.values()} == {torch.int32 if narrow else torch.int64}
        delta = tuning.delta()
        trained.append((tuning.values.detach().clone(), [p.detach().clone() for p in model.parameters()], delta))
        tuning.revert()
    (values, weights, delta), (others, other_weights, other_delta) = trained
    assert torch.equal(values, others)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert delta.mask == other_delta.mask
    assert all(torch.equal(delta.values[n], other_delta.values[n]) for n in delta.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_by_part(dtype: torch.dtype) -> None:
    model = case("conv").make().to(dtype)
    mask, buffers = Mask.random(model, 0.3, seed=0), sum(b.nbytes for b in model.buffers())
    tuning = fishmask.attach(model, mask)
    told = tuning.memory()
    assert told["values"] == 4 * mask.k
    assert told["indices"] == 8 * mask.k
    assert told["originals"] == dtype.itemsize * mask.k + buffers
    for name, entry in tuning._entries.items():  # all of them the mask's own memory
        assert entry.indices.data_ptr() == tuning.mask.indices[name].data_ptr()
        assert tuning.originals.indices[name].data_ptr() == tuning.mask.indices[name].data_ptr()
    assert 0 < told["plans"] < 9 * mask.k + 4 * sum(sum(p.shape) for p in model.parameters())
    tuning.revert()
    small = fishmask.attach(model, Mask.from_indices({"norm.weight": [1]})).memory()
    assert small == {"values": 4, "indices": 8, "originals": dtype.itemsize + buffers, "plans": 0}


# --- layer norms ------------------------------------------------------------------------------------------------------


class Forwards(TorchDispatchMode):
    """Counts the layer norms that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.native_layer_norm.default
        return func(*args, **(kwargs or {}))


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.up(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_is_computed_once_and_has_the_gradient_that_a_second_one_would_give(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Norms().to(dtype), torch.randn(3, 5, 6, dtype=dtype)
    for p in model.parameters():
        nn.init.normal_(p)
    tuning = fishmask.attach(model, Mask.random(model, 0.6, seed=0))
    taken, counts = [], []
    for hooked in (False, True):
        with Forwards() as forwards:
            if hooked:  # as in gradient checkpointing
                with torch.autograd.graph.save_on_cpu():
                    model(x).square().sum().backward()
            else:
                model(x).square().sum().backward()
        counts.append(forwards.count)
        taken.append({name: values.grad for name, values in tuning.named_parameters()})
        for values in tuning.parameters():
            values.grad = None
    assert counts == [2, 4]
    assert taken[0].keys() == taken[1].keys() >= {"first.weight", "first.bias", "second.weight"}
    for name, grad in taken[0].items():
        assert grad is not None
        assert torch.equal(grad, taken[1][name])


def test_a_norm_of_an_input_without_gradient_is_trained() -> None:
    model = nn.LayerNorm(4)
    tuning = fishmask.attach(model, Mask.random(model, 1.0, seed=0))
    x, other = torch.randn(3, 4), nn.LayerNorm(4)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for name, values in tuning.named_parameters():
        torch.testing.assert_close(values.grad, other.get_parameter(name).grad)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.002, 0.2, 1.0])
def test_gradients_of_bf16_layers_are_rounded_once_and_added_in_float32(density: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(512, 256, bias=False).bfloat16()
    tuning = fishmask.attach(model, Mask.random(model, density, seed=0))
    (values,) = tuning.parameters()
    (flat,) = tuning.mask.indices.values()
    taken = []
    batches = [(torch.randn(300, 512).bfloat16(), torch.randn(300, 256).bfloat16()) for _ in range(2)]
    for x, dY in batches:
        model(x).backward(dY)
        assert values.grad is not None
        exact = (dY.double().t() @ x.double()).flatten()[flat]
        error = (values.grad.double() - exact).abs()
        assert (error <= exact.abs() * 2.0**-8 + 1e-3).all()  # half a step of bfloat16, and a float32 sum of 300
        taken.append(values.grad)
        values.grad = None
    for x, dY in batches:
        model(x).backward(dY)
    assert torch.equal(values.grad, taken[0] + taken[1])
