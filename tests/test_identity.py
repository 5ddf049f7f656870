"""What tells losses and models of one name apart, and what does not."""

import functools
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from fishmask import FishError
from fishmask.identity import loss_digest, structure_digest

SCALE = 1.0


def plain(model, batch, scale=1.0):
    return F.cross_entropy(model(batch[0]) * scale, batch[1], reduction="none")


def closed(held):
    return lambda model, batch: F.cross_entropy(model(batch[0]) * held, batch[1], reduction="none")


def by_global(model, batch):
    return F.cross_entropy(helper(model(batch[0])), batch[1], reduction="none")


def helper(output):
    return output * SCALE


class Loss:
    def __init__(self, held):
        self.held = held

    def __call__(self, model, batch):
        return self.method(model, batch)

    def method(self, model, batch):
        return plain(model, batch, self.held)


class Margin(nn.Module):
    """A module with an option that it does not print."""

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, model, batch):
        return model(batch[0]).square().sum(1) * self.margin


def made(text):
    """Make a loss of the same name from its text."""
    space = {"F": F, "__name__": "made"}
    exec(f"def loss(model, batch):\n    return {text}", space)
    return space["loss"]


PAIRS = {
    "closure": (lambda: closed(1.0), lambda: closed(10.0)),
    "a tensor": (lambda: closed(torch.ones(3)), lambda: closed(torch.tensor([1.0, 1.0, 2.0]))),
    "an array": (lambda: closed(np.ones(3)), lambda: closed(np.zeros(3))),
    "a nested value": (lambda: closed({"a": [1, {2}]}), lambda: closed({"a": [1, {3}]})),
    "partial": (lambda: functools.partial(plain, scale=1.0), lambda: functools.partial(plain, scale=2.0)),
    "another function in a partial": (lambda: functools.partial(plain), lambda: functools.partial(by_global)),
    "an object": (lambda: Loss(1.0), lambda: Loss(2.0)),
    "a method": (lambda: Loss(1.0).method, lambda: Loss(2.0).method),
    "code": (lambda: made("model(batch).sum(1)"), lambda: made("model(batch).mean(1)")),
    "a constant": (lambda: made("model(batch).sum(1) * 2"), lambda: made("model(batch).sum(1) * 3")),
    "a lambda within": (
        lambda: made("(lambda x: x + 1)(model(batch))"),
        lambda: made("(lambda x: x + 2)(model(batch))"),
    ),
    "a module": (lambda: closed(nn.CrossEntropyLoss()), lambda: closed(nn.CrossEntropyLoss(label_smoothing=0.1))),
    "a module as the loss": (lambda: Margin(1.0), lambda: Margin(2.0)),
    "a library's function": (lambda: closed(F.relu), lambda: closed(F.gelu)),
    "a library's builtin": (lambda: closed(torch.relu), lambda: closed(torch.tanh)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_one_name_are_told_apart(name):
    one, other = PAIRS[name]
    assert loss_digest(one()) == loss_digest(one())
    assert loss_digest(one()) != loss_digest(other())


def test_what_a_loss_refers_to_counts(monkeypatch):
    """A global of a function that it calls; a default that was changed."""
    before = loss_digest(by_global)
    assert loss_digest(by_global) == before
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert loss_digest(by_global) != before
    before = loss_digest(plain)
    monkeypatch.setattr(plain, "__defaults__", (2.0,))
    assert loss_digest(plain) != before


def test_a_loss_that_refers_to_itself_ends():
    def loss(model, batch):
        return loss(model, batch)

    assert loss_digest(loss) == loss_digest(loss)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(FishError, match=r"held in loss holds a lock; write it as a function"):
        loss_digest(closed(threading.Lock()))
    with pytest.raises(FishError, match=r"holds a Generator"):
        loss_digest(Loss(torch.Generator()))


def test_models_are_told_apart_by_what_they_are_made_of():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 10}
    digests = [
        structure_digest(BertModel(BertConfig(**size, num_attention_heads=heads, hidden_act=act)))
        for heads, act in ((2, "gelu"), (2, "gelu"), (4, "gelu"), (2, "relu"))
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    moved = BertModel(BertConfig(**size, num_attention_heads=2))
    moved.config._name_or_path = "elsewhere"
    assert structure_digest(moved) == digests[0]
    assert structure_digest(nn.Sequential(nn.ReLU())) != structure_digest(nn.Sequential(nn.GELU()))
