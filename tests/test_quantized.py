"""Side paths of quantized layers against dense float64 models with the same numbers, and what is refused."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fishmask
from fishmask import Delta, FishError, Mask
from fishmask.plans import SidePlan
from fishmask.quantized import QuantizedWeight, weights
from fishmask.side import side_of
from tests.quantized import KINDS, QUANTIZED, Net, batch, dequantized_twin, numbers_of, plain, quantized
from tests.test_attach import clustered
from tests.tiny import model_folder

INSIDE = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def quiet_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mask_of(model: nn.Module, density: float = 0.05, seed: int = 0) -> Mask:
    return Mask.random(model, density, seed)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        ids, targets = batch(step)
        F.cross_entropy(model(ids).float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module, mask: Mask | None = None, steps: int = 3) -> fishmask.Tuning:
    tuning = fishmask.attach(model, mask or mask_of(model))
    train(model, sgd(tuning.parameters()), steps)
    return tuning


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(99)[0])


# --- the numbers ------------------------------------------------------------------------------------------------------


@INSIDE
def test_weights_are_those_of_the_unquantized_model(kind: str) -> None:
    model, other = quantized(kind), plain()
    assert {n: p.shape for n, p in weights(model).items()} == {n: p.shape for n, p in other.named_parameters()}
    assert list(weights(model)) == [name for name, _ in other.named_parameters()]
    assert [n for n, p in weights(model).items() if isinstance(p, QuantizedWeight)] == ["up.weight", "down.weight"]


@INSIDE
def test_base_numbers_are_what_the_layer_computes_with(kind: str) -> None:
    model = quantized(kind)
    rows = weights(model)["up.weight"].detach()
    eye = torch.eye(64)
    torch.testing.assert_close(model.up(eye) - model.up.bias, rows.t(), atol=1e-5, rtol=1e-5)
    assert (rows - plain().up.weight).abs().max() > 0  # and not what it was before


@INSIDE
def test_masks_are_those_of_the_unquantized_model(kind: str) -> None:
    model = quantized(kind)
    assert Mask.random(model, 0.05, 3) == Mask.random(plain(), 0.05, 3)
    assert Mask.random(model, 0.05, 3).shapes == Mask.random(plain(), 0.05, 3).shapes
    assert Mask.magnitude(model, 0.05) == Mask.magnitude(dequantized_twin(model, plain()), 0.05)
    for block in ("4x4", "rows"):
        assert Mask.magnitude(model, 0.1, block=block) == Mask.magnitude(
            dequantized_twin(model, plain()), 0.1, block=block
        )
        assert Mask.random(model, 0.1, 3, block=block) == Mask.random(plain(), 0.1, 3, block=block)
    assert Mask.random(plain(), 0.05, 3).with_shapes(model).n == sum(p.numel() for p in plain().parameters())


@INSIDE
@pytest.mark.parametrize("method", ["fisher", "snip"])
def test_scores_are_those_of_the_dequantized_model(kind: str, method: Any) -> None:
    model = quantized(kind)
    twin, data, before = dequantized_twin(model, plain()), [batch(0)], output(model)
    found = fishmask.scores(model, data, method=method, examples=8)
    expected = fishmask.scores(twin, data, method=method, examples=8)
    assert list(found) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-7)
    assert torch.equal(output(model), before)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in quantized(kind).modules()]


def test_scoring_in_mid_training_sees_the_trained_entries() -> None:
    model = quantized("nf4")
    tuning = trained(model)
    twin, out = dequantized_twin(model, plain()), output(model)
    found, expected = (fishmask.fisher(m, [batch(0)], examples=8) for m in (model, twin))
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-7)
    assert torch.equal(output(model), out)
    with tuning.disabled():
        base = fishmask.fisher(model, [batch(0)], examples=8)
    assert not torch.allclose(base["up.weight"], found["up.weight"])
    assert torch.equal(output(model), out)


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, mask: Mask, dtype: torch.dtype, context: Any = None) -> tuple[Tensor, ...]:
    """Return output, input gradient, and the dense gradients' masked entries of `up` and `down`."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    with context or nullcontext():
        out = model.down(torch.tanh(model.norm(model.up(x))))
    out.float().square().sum().backward()
    if dtype is torch.float64:
        found = [model.get_parameter(n).grad.view(-1)[i] for n, i in mask.indices.items()]
    else:
        (tuning,) = (t for t in fishmask.live.LIVE if t.model is model)
        found = [values.grad for values in tuning.parameters()]
    return out.detach(), x.grad, torch.cat([grad.double() for grad in found])


MASKS: dict[str, Callable[[nn.Module], Mask]] = {
    "scattered": lambda model: _linear(mask_of(model, 0.02)),
    "few": lambda model: _linear(mask_of(model, 0.002)),
    "clustered": lambda model: _linear(clustered(plain())),
    "whole": lambda model: Mask.random(model, 1.0, 0) & _linear(Mask.random(model, 1.0, 0)),
}


def _linear(mask: Mask) -> Mask:
    return Mask.from_indices({n: i for n, i in mask.indices.items() if n.split(".")[0] in ("up", "norm", "down")})


@INSIDE
@pytest.mark.parametrize("masked", MASKS)
def test_outputs_and_gradients_against_float64(kind: str, masked: str) -> None:
    model = quantized(kind).train()
    mask = MASKS[masked](model)
    tuning = fishmask.attach(model, mask)
    with torch.no_grad():
        tuning.values.add_(torch.randn(len(tuning.values), generator=torch.Generator().manual_seed(2)), alpha=0.05)
    tuning.write_back()
    twin = dequantized_twin(model, plain(), torch.float64).train()
    found = gradients(model, mask, torch.float32)
    expected = gradients(twin, mask, torch.float64)
    for mine, right in zip(found, expected, strict=True):
        assert (mine.double() - right).norm() <= 2e-6 * right.norm()
    tuning.revert()
    assert (gradients_of_base := output(model)).isfinite().all()
    assert torch.equal(gradients_of_base, output(quantized(kind).train()))


@INSIDE
@pytest.mark.parametrize("make", [sgd, adam])
def test_training_equals_that_of_the_dequantized_model(kind: str, make: Any) -> None:
    model = quantized(kind).train()
    twin = dequantized_twin(model, plain()).train()
    mask, start = mask_of(model), output(model)
    pairs = [(m, fishmask.attach(m, mask)) for m in (model, twin)]
    assert torch.equal(output(model), start)
    first = pairs[0][1].values.clone()
    for one, tuning in pairs:
        train(one, make(tuning.parameters()), 20)
    mine, right = (tuning.values for _, tuning in pairs)
    assert (mine - right).norm() <= 1e-4 * (right - first).norm()
    assert (output(model) - output(twin)).norm() <= 1e-4 * (output(twin) - start).norm()


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    model = quantized(kind, dtype).train()
    mask = _linear(mask_of(model))
    tuning = fishmask.attach(model, mask)
    with torch.no_grad():
        tuning.values.add_(torch.randn(len(tuning.values), generator=torch.Generator().manual_seed(2)), alpha=0.05)
    tuning.write_back()
    twin = dequantized_twin(model, plain(), torch.float64).train()
    found, expected = gradients(model, mask, dtype), gradients(twin, mask, torch.float64)
    assert found[0].dtype == found[1].dtype == dtype
    for mine, right in zip(found, expected, strict=True):
        assert (mine.double() - right).norm() <= 8 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autocast(kind: str) -> None:
    model = quantized(kind).train()
    mask = _linear(mask_of(model))
    tuning = trained(model, mask, 1)
    for values in tuning.parameters():
        values.grad = None
    twin = dequantized_twin(model, plain(), torch.float64).train()
    found = gradients(model, mask, torch.float32, torch.autocast("cpu", torch.bfloat16))
    expected = gradients(twin, mask, torch.float64)
    for mine, right in zip(found, expected, strict=True):
        assert (mine.double() - right).norm() <= 0.05 * right.norm()


class Checkpointed(nn.Module):
    """The net with its inner part checkpointed."""

    def __init__(self, net: Net, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, ids: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.tanh(self.net.down(torch.tanh(self.net.norm(self.net.up(x)))))

        x = self.net.words(ids)
        if self.reentrant is None:
            return self.net.head(inner(x).mean(1))
        # As transformers does: reentrant checkpointing needs an input that requires a gradient.
        x = x.requires_grad_() if self.reentrant else x
        return self.net.head(checkpoint(inner, x, use_reentrant=self.reentrant).mean(1))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    models = [Checkpointed(quantized(kind), mode).train() for mode in (None, reentrant)]
    mask = Mask.random(plain(), 0.05, 0)
    mask = Mask.from_indices({f"net.{name}": i for name, i in mask.indices.items() if "words" not in name})
    tunings = [fishmask.attach(model, mask) for model in models]
    for model, tuning in zip(models, tunings, strict=True):
        train(model, sgd(tuning.parameters()), 3)
    assert torch.equal(tunings[0].values, tunings[1].values)
    assert not torch.equal(tunings[0].values, fishmask.attach(Checkpointed(quantized(kind), None), mask).values)


def test_gradients_accumulate() -> None:
    ids, targets = batch(0)
    found = []
    for parts in (1, 4):
        model = quantized("nf4").train()
        tuning = fishmask.attach(model, mask_of(model))
        for x, y in zip(ids.chunk(parts), targets.chunk(parts), strict=True):
            (F.cross_entropy(model(x), y) / parts).backward()
        found.append(torch.cat([values.grad for values in tuning.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


@INSIDE
def test_another_mask_keeps_what_the_first_has_reached(kind: str) -> None:
    model = quantized(kind).train()
    tuning = fishmask.attach(model, mask_of(model))
    optimizer = adam(tuning.parameters())
    train(model, optimizer, 3)
    reached, out = numbers_of(model), output(model)
    other = mask_of(model, 0.05, seed=5)
    tuning.set_mask(other, optimizer)
    assert torch.equal(output(model), out)
    train(model, optimizer, 3, first=3)
    now = numbers_of(model)
    moved = Mask.from_dense({name: now[name] != reached[name] for name in now})
    assert moved.k and (moved - other).k == 0
    tuning.revert()
    assert torch.equal(output(model), output(quantized(kind).train()))


# --- life -------------------------------------------------------------------------------------------------------------


def stored_of(model: nn.Module) -> list[Tensor]:
    """Copy the packed numbers and scales of all quantized weights."""
    found = [weight for weight in weights(model).values() if isinstance(weight, QuantizedWeight)]
    return [tensor.detach().as_subclass(Tensor).clone() for w in found for tensor in w.stored()]


@INSIDE
def test_base_comes_back_bit_for_bit(kind: str) -> None:
    model = quantized(kind).train()
    base, keys, stored = output(model), model.state_dict().keys(), stored_of(model)
    tuning = fishmask.attach(model, mask_of(model))
    assert torch.equal(output(model), base)
    train(model, sgd(tuning.parameters()), 3)
    out = output(model)
    assert not torch.equal(out, base)
    assert all(map(torch.equal, stored_of(model), stored))
    assert model.state_dict().keys() == keys
    with tuning.disabled():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), out)
    tuning.suspend()
    assert torch.equal(output(model), base)
    tuning.resume()
    assert torch.equal(output(model), out)
    tuning.detach()
    assert torch.equal(output(model), out)
    tuning.revert()
    assert torch.equal(output(model), base)
    assert not any(side.active for name in QUANTIZED if (side := side_of(model.get_submodule(name))))


def test_entries_that_move_later_than_others_count() -> None:
    model = quantized("int8")
    weight, indices = weights(model)["up.weight"], torch.tensor([3, 70, 71, 2000])
    base, x = weight.detach().view(-1)[indices], torch.randn(4, 64)
    for moved in (torch.tensor([0.0, 1, 0, 0]), torch.tensor([2.0, 1, 0, 3]), torch.tensor([0.0, 0, 0, 3])):
        weight.put(indices, base + moved)
        torch.testing.assert_close(model.up(x), F.linear(x, weight.detach(), model.up.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
def test_suspended_training_goes_on_as_if_it_had_not_been(kind: str) -> None:
    values = []
    for interrupted in (False, True):
        model = quantized(kind).train()
        tuning = fishmask.attach(model, mask_of(model))
        optimizer = adam(tuning.parameters())
        train(model, optimizer, 3)
        if interrupted:
            tuning.suspend()
            other = trained(model, mask_of(model, 0.03, seed=8))
            other.revert()
            tuning.resume()
        train(model, optimizer, 3, first=3)
        values.append(tuning.values.clone())
    assert torch.equal(*values)


@INSIDE
def test_a_delta_serves_the_model_it_was_trained_on_and_its_kin(kind: str, tmp_path: Path) -> None:
    model = quantized(kind).train()
    tuning = trained(model)
    out, base = output(model), output(quantized(kind).train())
    tuning.delta().save(tmp_path / "task.safetensors")
    tuning.revert()
    delta = fishmask.load(model, tmp_path / "task.safetensors")
    assert torch.equal(output(model), out)
    delta.revert(model)
    assert torch.equal(output(model), base)
    # The unquantized model is another base; the same numbers unquantized are the same base.
    with pytest.raises(FishError, match=r"other weights: up\.weight, down\.weight"):
        delta.apply(plain())
    twin = dequantized_twin(model, plain()).train()
    delta.apply(twin)
    torch.testing.assert_close(output(twin), out, rtol=1e-4, atol=1e-5)
    other = plain().train()
    delta.apply(other, check_base=False)
    for name, indices in delta.mask.indices.items():
        assert torch.equal(other.get_parameter(name).detach().view(-1)[indices], delta.values[name])


def test_a_delta_of_the_unquantized_model_serves_a_quantized_one() -> None:
    source = plain().train()
    delta = trained(source).delta()
    model = quantized("nf4").train()
    base = output(model)
    delta.apply(model, check_base=False)
    numbers = numbers_of(model)
    for name, indices in delta.mask.indices.items():
        assert torch.equal(numbers[name].view(-1)[indices], delta.values[name])
    twin = dequantized_twin(model, plain()).train()
    torch.testing.assert_close(output(model), output(twin), rtol=1e-4, atol=1e-5)
    delta.revert(model)
    assert torch.equal(output(model), base)


def test_every_kind_of_quantization_is_a_base_of_its_own() -> None:
    models = [plain(), *(quantized(kind) for kind in KINDS)]
    deltas = [trained(model, steps=1) for model in models]
    digests = {tuning.delta().base.digest for tuning in deltas}
    assert len(digests) == len(models)
    again = [trained(quantized(kind), steps=1).delta().base.digest for kind in KINDS]
    assert set(again) < digests


def test_deltas_stack_and_leave_in_any_order() -> None:
    model = quantized("int8").train()
    base, deltas = output(model), []
    for seed in (1, 2):
        tuning = trained(model, mask_of(model, 0.1, seed))
        deltas.append(tuning.delta())
        tuning.revert()
    alone = []
    for delta in deltas:
        delta.apply(model)
        alone.append(output(model))
        delta.revert(model)
    for first, second in (deltas, deltas[::-1]):
        first.apply(model)
        second.apply(model)
        assert torch.equal(output(model), output(model))
        first.revert(model)
        assert torch.equal(output(model), alone[deltas.index(second)])
        second.revert(model)
        assert torch.equal(output(model), base)


def test_difference_of_two_quantized_models_is_a_delta() -> None:
    base, tuned = quantized("nf4").train(), quantized("nf4").train()
    delta = trained(tuned).delta()
    found = Delta.between(base, tuned)
    assert found.base == delta.base
    assert (found.mask - delta.mask).k == 0
    found.apply(base)
    torch.testing.assert_close(output(base), output(tuned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
def test_copies_bring_the_trained_entries_along(kind: str) -> None:
    model = quantized(kind).train()
    tuning = trained(model)
    out, base = output(model), output(quantized(kind).train())
    alone, both = copy.deepcopy(model), copy.deepcopy(tuning)
    assert torch.equal(output(alone), out) and torch.equal(output(both.model), out)
    assert not any(p.requires_grad for p in alone.parameters())
    train(both.model, sgd(both.parameters()), 2)
    assert torch.equal(output(model), out) and not torch.equal(output(both.model), out)
    both.revert()
    assert torch.equal(output(both.model), base)


def test_loading_a_state_keeps_the_trained_entries_beside_the_same_base_alone() -> None:
    model = quantized("int8").train()
    tuning = trained(model)
    values, out = tuning.values.clone(), output(model)
    model.load_state_dict(model.state_dict())
    assert torch.equal(tuning.values, values) and torch.equal(output(model), out)
    other = plain()
    with torch.no_grad():
        other.up.weight.mul_(2)
    KINDS["int8"](other, QUANTIZED)
    model.load_state_dict(other.state_dict())
    numbers = numbers_of(other)
    for name, found in tuning.named_parameters():
        if name != "down.weight":  # the same base still
            assert torch.equal(found, numbers[name].view(-1)[tuning.mask.indices[name]]), name
    with pytest.raises(FishError, match=r"the base is gone: .*up\.weight"):
        tuning.revert()


@pytest.mark.parametrize("masked", ["up.weight", "down.weight", "norm.weight"])
def test_evaluating_on_the_cpu_does_not_repack_the_base(masked: str) -> None:
    model = quantized("nf4")
    tuning = trained(model.train(), Mask.from_indices({masked: range(100), "words.weight": range(500)}))
    out, values = output(model), tuning.values.clone()
    assert torch.allclose(output(model.eval()), out, atol=1e-5)
    train(model.train(), sgd(tuning.parameters()), 1)
    for now, before in zip(tuning.values.split([500, 100]), values.split([500, 100]), strict=True):
        assert not torch.equal(now, before)
    tuning.revert()
    assert torch.equal(output(model.train()), output(quantized("nf4").train()))


def test_a_layer_with_replaced_entries_is_not_repacked() -> None:
    model = quantized("nf4").eval()
    weight = weights(model)["up.weight"]
    base = weight.detach()
    weight.put(torch.tensor([5]), torch.tensor([1.0]))
    output(model)
    assert torch.equal((weight.detach() != base).view(-1).nonzero(), torch.tensor([[5]]))


def test_biases_have_the_dtype_that_bitsandbytes_computes_in_from_the_start() -> None:
    from tests.quantized import in_bitsandbytes

    model = plain()
    in_bitsandbytes(model, QUANTIZED, "Linear4bit", quant_type="nf4", compute_dtype=torch.bfloat16)
    assert model.up.bias.dtype == torch.float32
    tuning = trained(model.train())
    assert model.up.bias.dtype == torch.bfloat16
    tuning.revert()  # would be refused if a forward had converted it


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
def test_switch(kind: str) -> None:
    model = quantized(kind).train()
    base, outs, switch = output(model), {}, None
    deltas = {}
    for seed, name in enumerate("ab"):
        tuning = trained(model, mask_of(model, 0.1, seed))
        outs[name], deltas[name] = output(model), tuning.delta()
        tuning.revert()
    switch = fishmask.Switch(model)
    for name, delta in deltas.items():
        switch.add(name, delta)
    for name in "abba":
        switch.use(name)
        torch.testing.assert_close(output(model), outs[name], rtol=1e-6, atol=1e-6)
        switch.use(None)
        assert torch.equal(output(model), base)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "int8"])
def test_adapters(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = quantized(kind).train()
    base = output(model)
    config = fishmask.FishConfig(density=0.05, score="random")
    fish = fishmask.get_fish_model(model, config)
    assert fish.get_nb_trainable_parameters() == (fish.mask().k, sum(p.numel() for p in plain().parameters()))
    assert not [key for key in fish.state_dict() if not key.startswith("values.")]
    train(fish, sgd(p for p in fish.parameters() if p.requires_grad), 3)
    out = output(fish)
    with fish.disable_adapter():
        assert torch.equal(output(fish), base)
    assert torch.equal(output(fish), out)
    fish.save_pretrained(tmp_path)
    fish.add_adapter("other", config.replaced(seed=1))
    fish.set_adapter("other")
    assert torch.equal(output(fish), base)
    fish.set_adapter("default")
    assert torch.equal(output(fish), out)
    fish.unload()
    assert torch.equal(output(model), base)
    again = fishmask.FishModel.from_pretrained(model, tmp_path)  # frozen
    torch.testing.assert_close(output(again.train()), out, rtol=1e-6, atol=1e-6)
    assert torch.equal(output(again.merge_and_unload().train()), output(model))


QUANTIZERS: dict[str, Callable[[], Any]] = {
    "4 bits": lambda: _transformers().BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"]),
    "8 bits": lambda: _transformers().BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"]),
    "torchao": lambda: _transformers().TorchAoConfig(_torchao().Int8WeightOnlyConfig()),
}


def _transformers() -> Any:
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("transformers")


def _torchao() -> Any:
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*Int8Params.*:UserWarning")
def test_trainer(kind: str, tmp_path: Path) -> None:
    hub = _transformers()
    pytest.importorskip("peft")

    def loaded() -> Any:
        return hub.AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=QUANTIZERS[kind](), num_labels=3, dtype=torch.float32
        )

    folder = model_folder(tmp_path / "model")
    whole = hub.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    whole.save_pretrained(folder)  # with a head
    model = loaded()
    assert sum(isinstance(weight, QuantizedWeight) for weight in weights(model).values()) >= 12
    config = fishmask.FishConfig(task_type="SEQ_CLS", density=0.05, score="random", among="layers")
    fish = fishmask.get_fish_model(model, config)
    assert fish.mask() == config.choose(whole)
    rows = [{"input_ids": [5 + i % 7, 6, 7 + i % 3], "labels": i % 3} for i in range(16)]
    arguments = hub.TrainingArguments(
        str(tmp_path / "out"), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = hub.Trainer(fish, arguments, train_dataset=rows)
    trainer.train()
    deltas = sorted(path.name for path in (tmp_path / "out" / "checkpoint-6").glob("*.safetensors"))
    assert deltas == ["adapter_model.safetensors"]
    # Training goes on from the checkpoint in the middle, on the model loaded anew, to the same values.
    other = fishmask.get_fish_model(loaded(), config)
    hub.Trainer(other, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert torch.equal(other.tuning.values, fish.tuning.values)
    served, ids = loaded(), torch.tensor([[5, 6, 7]])
    fishmask.load(served, tmp_path / "out" / "checkpoint-6")
    with torch.no_grad():
        outs = [m.train(False)(ids).logits for m in (fish, served)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


# --- the product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [True, False, None])
@pytest.mark.parametrize("entries", [1, 40, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_side_path(block: bool | None, entries: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(entries)
    rows, columns, tokens = 48, 64, 7
    indices = torch.randperm(rows * columns, generator=generator)[:entries].sort().values
    values, x, out = (torch.randn(n, generator=generator) for n in (entries, tokens * columns, tokens * rows))
    x, out = x.view(tokens, columns).to(dtype), out.view(tokens, rows).to(dtype)
    dense = torch.zeros(rows * columns, dtype=torch.float64)
    dense[indices] = values.double()
    dense = dense.view(rows, columns)
    plan = SidePlan(indices, (rows, columns), device=torch.device("cpu"), block=block)
    sparse = plan.sparse(values, dtype)
    found = plan.added(out, x, sparse), plan.transposed(out, sparse)
    for mine, right in zip(found, (out.double() + x.double() @ dense.t(), out.double() @ dense), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - right).norm() <= 4 * torch.finfo(dtype).eps * right.norm()


def test_scattered_entries_of_a_large_layer_make_no_dense_matrix() -> None:
    shape = (2048, 2048)
    scattered = torch.randperm(shape[0] * shape[1])[: shape[0] * shape[1] // 200].sort().values
    plan = SidePlan(scattered, shape, device=torch.device("cpu"))
    assert not plan.block
    held = sum(part.values().numel() for part in plan.sparse(torch.ones(len(scattered)), torch.float32))
    assert held == 2 * len(scattered)
    few = (torch.arange(100)[:, None] * shape[1] + torch.arange(100)).reshape(-1)
    block = SidePlan(few, shape, device=torch.device("cpu"))
    assert block.block and block.sparse(torch.ones(len(few)), torch.float32)[0].numel() == len(few)


# --- what is refused --------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> Any:
    return [(name, p.requires_grad, len(m._forward_hooks)) for name, m in model.named_modules() for p in m.parameters()]


def refused(model: nn.Module, mask: Mask, match: str, error: type[Exception] = FishError) -> None:
    before = state_of(model)
    with pytest.raises(error, match=match):
        fishmask.attach(model, mask)
    assert state_of(model) == before


def test_quantized_activations_are_refused_because_no_gradient_flows() -> None:
    from tests.quantized import in_torchao

    model = plain()
    in_torchao(model, ["down"], "Int8DynamicActivationInt8WeightConfig")
    mask = Mask.from_indices({"up.weight": [0, 1]})
    refused(model, mask, r"down: a torchao weight \(\w+\) through which no gradient flows; quantize the weights alone")
    # Serving needs no gradient.
    delta = Delta.between(plain(), (tuned := plain()))
    with torch.no_grad():
        tuned.down.weight.view(-1)[:50] += 1
    delta = Delta.between(plain(), tuned)
    base = output(model)
    delta.apply(model, check_base=False)
    assert not torch.equal(output(model), base)
    delta.revert(model)
    assert torch.equal(output(model), base)


def test_quantized_embeddings_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    quantization.quantize_(model, config, filter_fn=lambda module, name: name == "words")
    refused(
        model,
        Mask.from_indices({"words.weight": [0], "up.weight": [1]}),
        r"words\.weight: it is a quantized Embedding, and a side path needs a linear layer; load the model unquantized",
        ValueError,
    )
    tuning = trained(model, Mask.from_indices({"up.weight": [1, 2, 3]}))  # others of the same model train
    tuning.revert()


def test_layers_that_are_not_quantized_yet_are_refused() -> None:
    layers = pytest.importorskip("bitsandbytes.nn")
    model = plain()
    model.up = layers.Linear4bit(64, 128)
    refused(model, Mask.from_indices({"down.weight": [0]}), "up: this Linear4bit is not quantized; move the model")


def test_layers_that_bitsandbytes_has_repacked_are_refused() -> None:
    model = quantized("nf4").eval()
    model.up.support_avx512bf16_for_cpu = True  # as where the CPU has the instructions
    output(model)
    assert model.up.weight.quant_state.packing_format_for_cpu
    refused(model, Mask.from_indices({"down.weight": [0]}), "up: bitsandbytes has repacked this Linear4bit")
    tuned = plain()
    with torch.no_grad():
        tuned.up.weight[0] += 1
    with pytest.raises(FishError, match="repacked this Linear4bit in an evaluation on the CPU and rounded"):
        Delta.between(plain(), tuned).apply(model, check_base=False)


def test_other_kinds_of_quantization_are_named() -> None:
    class GPTQLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(8, 128, dtype=torch.int32))

    model = plain()
    model.up = GPTQLinear()  # type: ignore[assignment]
    refused(model, Mask.from_indices({"up.weight": [0]}), r"up\.weight: GPTQLinear is quantized in a way", ValueError)


def test_weights_used_outside_their_layer_are_refused() -> None:
    model = quantized("int8")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids) + F.linear(self.net.words(ids), self.net.up.weight).sum((1, 2))[:, None]

    whole = Tied()
    fishmask.attach(whole, Mask.from_indices({"net.up.weight": [0]}))
    with pytest.raises(FishError, match=r"net\.up\.weight is quantized and used outside its own layer"):
        whole(batch(0)[0])


def test_weights_shared_by_two_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    KINDS["int8"](model, ["0"])
    model[1].weight = model[0].weight
    refused(model, Mask.from_indices({"0.weight": [0]}), "shared by several layers", ValueError)


def test_layers_whose_forward_is_replaced_are_refused() -> None:
    model = quantized("int8")
    model.up.forward = lambda x: x  # type: ignore[method-assign]
    refused(model, Mask.from_indices({"up.weight": [0]}), "a side path needs a linear layer", ValueError)


def test_all_works_without_the_libraries() -> None:
    code = """
import sys
sys.modules["bitsandbytes"] = sys.modules["torchao"] = None
import torch, fishmask
model = torch.nn.Linear(4, 2)
tuning = fishmask.attach(model, fishmask.Mask.random(model, 0.5, 0))
optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
model(torch.ones(3, 4)).sum().backward()
optimizer.step()
print(tuning.delta().k, len(fishmask.fisher(model, [(torch.ones(3, 4), torch.zeros(3, dtype=int))], examples=3)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "2"]


def test_a_conversion_of_a_model_with_adapters_goes_there_and_back() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    model = fishmask.get_fish_model(quantized("nf4"), fishmask.FishConfig(density=0.05, score="random"))
    model.half()
    model.set_adapter("default")
    model.float()
    with model.disable_adapter():
        pass
    model.unload()


def test_a_switch_within_inference_mode_goes_on_outside() -> None:
    pytest.importorskip("bitsandbytes")
    base, deltas = quantized("nf4"), []
    for seed in range(2):
        tuning = fishmask.attach(quantized("nf4"), Mask.random(base, 0.05, seed=seed))
        with torch.no_grad():
            tuning.values.add_(1)
        deltas.append(tuning.delta())
    switch, before = fishmask.Switch(base), numbers_of(base)
    for name, delta in zip("ab", deltas, strict=True):
        switch.add(name, delta)
    with torch.inference_mode():
        for name in "ab":
            switch.use(name)
    for name in ("a", "b", None):
        switch.use(name)
    assert all(torch.equal(before[n], t) for n, t in numbers_of(base).items())
