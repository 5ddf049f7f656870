"""What a model must be like to be scored, and that it is left as it was found."""

import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask import FishError, Mask, attach, fisher
from tests.cases import case
from tests.reference import assert_close, reference

# -- refusals ---------------------------------------------------------------------------------------------------------


class HandMade(nn.Module):
    """Linear layers around something to test."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, training=True)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize("engine", ["auto", "batched", "loop"])
@pytest.mark.parametrize(
    ("between", "message"),
    [
        (Dropping(), r"dropout is active in module 'between' \(Dropping\)"),
        (nn.BatchNorm1d(8, track_running_stats=False), r"BatchNorm in module 'between' \(BatchNorm1d\)"),
        (Noisy(), "or is random"),
    ],
)
def test_random_and_batch_dependent_models_are_refused(between, message, engine):
    with pytest.raises(FishError, match=message):
        fisher(HandMade(between), [case("mlp").batch(4, 0)], examples=4, engine=engine)


@pytest.mark.parametrize("engine", ["batched", "loop"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "conv"])
def test_an_attached_model_is_scored_like_any_other_and_trains_on(name, engine):
    c = case(name)
    batch, model, plain = c.batch(4, 0), c.make(), c.make()
    mask = Mask.random(model, 0.3, seed=0)
    tuning, twin = attach(model, mask), attach(plain, mask)
    for values in (tuning.values, twin.values):
        with torch.no_grad():
            values.mul_(1.5)
    twin.detach()  # writes the values; those of the model are still to be written
    flags = [p.requires_grad for p in model.parameters()]
    found = fisher(model, [batch], examples=4, engine=engine)
    for key, score in fisher(plain, [batch], examples=4, engine=engine).items():
        assert torch.equal(found[key], score), key
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in (*tuning.parameters(), *model.parameters()))
    output = model(**batch).logits if isinstance(batch, dict) else model(batch[0])
    output.square().sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())


def test_a_loss_that_mixes_examples_is_refused():
    c = case("mlp")

    def contrastive(model, batch):
        z = model(batch[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    for engine in ("auto", "batched", "loop"):
        with pytest.raises(FishError, match="mixes the examples"):
            fisher(c.make(), [c.batch(4, 0)], examples=4, loss=contrastive, engine=engine)


def test_mixing_is_found_after_a_first_batch_of_one():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return self.linear(x) - x.mean()

    class Mixed(Centred):
        def forward(self, x):
            z = self.linear(x)
            return z * (1 + z.mean(0))

    c = case("mlp")
    for engine in ("auto", "loop"):
        with pytest.raises(FishError, match="mixes the examples"):
            fisher(Mixed(), [c.batch(1, 0), c.batch(3, 1)], examples=4, engine=engine)


# -- what is left behind ----------------------------------------------------------------------------------------------


def snapshot(model: nn.Module):
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
        [id(b) for b in model.buffers()],
    )


def assert_same_state(a, b) -> None:
    assert a[0] == b[0] and a[3] == b[3]
    for (flag_a, grad_a), (flag_b, grad_b) in zip(a[1], b[1], strict=True):
        assert flag_a == flag_b and (grad_a is None) == (grad_b is None)
        assert grad_a is None or torch.equal(grad_a, grad_b)
    assert all(torch.equal(a[2][k], b[2][k]) for k in a[2])


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("name", ["conv", "bert", "t5"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:.*one example at a time")
def test_the_model_is_left_as_it_was_found(name, engine, fails):
    c = case(name)
    model = c.make().train()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda module, inputs, output: module.calls.add_(1) and None)
    before = snapshot(model)

    def batches():
        yield c.batch(3, 0)
        if fails:
            raise KeyError("the data ends badly")

    with pytest.raises(KeyError, match="ends badly") if fails else warnings.catch_warnings():
        fisher(model, batches(), examples=3 if not fails else 6, engine=engine)
    assert_same_state(before, snapshot(model))


def test_gradients_that_a_loss_leaves_in_the_model_are_put_back():
    def loss(model, batch):
        model[0].bias.grad = torch.ones(8)
        model[2].bias.grad = torch.ones(3)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = case("mlp").make()
    model[2].bias.grad = mine = torch.full((3,), 2.0)
    fisher(model, [case("mlp").batch(4, 0)], examples=4, loss=loss, engine="loop")
    assert model[0].bias.grad is None
    assert model[2].bias.grad is mine


def test_it_works_within_no_grad_and_inference_mode():
    c = case("conv")
    model, batch = c.make(), c.batch(3, 1)
    expected = reference(c, batch, 3, "given")
    with torch.no_grad():
        assert_close(fisher(model, [batch], examples=3), expected)
    with torch.inference_mode():
        assert_close(fisher(model, [c.batch(3, 1)], examples=3), expected)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = case("conv").make()
    with pytest.raises(FishError, match=r"was made under torch\.inference_mode"):
        fisher(model, [case("conv").batch(3, 1)], examples=3)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    for labels in ("given", "sampled"):
        fisher(case("bert").make(), [case("bert").batch(3, 0)], examples=3, labels=labels)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["bert", "llama", "conv", "vit"])
def test_nothing_of_a_batch_outlives_it(name):
    """A rule that held an output, whose hook holds the rule, would keep every batch's graph for ever."""
    c = case(name)
    model, seen = c.make(), []
    for module in model.modules():
        module.register_forward_hook(lambda m, i, o: seen.append(weakref.ref(o)) if isinstance(o, Tensor) else None)
    fisher(model, [c.batch(3, 0)], examples=3, engine="batched")
    assert len(seen) > 5
    assert not any(ref() is not None for ref in seen)


def test_another_models_gradients_are_left_alone():
    """A teacher inside the loss is no part of the model."""
    c = case("mlp")
    teacher, batch = c.make(), c.batch(4, 0)

    def distil(model, batch):
        return F.mse_loss(model(batch[0]), teacher(batch[0]) + 1, reduction="none").sum(1)

    for engine in ("batched", "loop"):
        fisher(c.make(), [batch], examples=4, loss=distil, engine=engine)
        assert all(p.grad is None for p in teacher.parameters())
