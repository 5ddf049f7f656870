"""Squared or absolute per-example gradients the slow way: one example at a time, in float64, with ordinary losses."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask.params import canonical_parameters
from tests.cases import Case

SHIFTED = ("gpt2", "llama", "mixtral")


def reference_model(c: Case) -> nn.Module:
    model = c.make().double()
    if c.name == "mixtral":
        model.config._experts_implementation = "eager"  # its default kernel has no float64
    return model


def one(batch, n: int):
    """Example n of a batch, in float64."""

    def cut(t: Tensor) -> Tensor:
        t = t[n : n + 1]
        return t.double() if t.is_floating_point() else t

    return {k: cut(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(cut(t) for t in batch)


def logits_and_labels(c: Case, model: nn.Module, example) -> tuple[Tensor, Tensor]:
    """Rows of logits [M, C] and their labels [M], positions that predict nothing left out."""
    if isinstance(example, tuple):
        z, y = model(example[0]), example[1]
    else:
        y = example["labels"]
        inputs = {k: v for k, v in example.items() if k != "labels"}
        if c.name == "t5":
            inputs["decoder_input_ids"] = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        z = model(**inputs).logits
    if c.name in SHIFTED:
        z, y = z[:, :-1], y[:, 1:]
    if y.is_floating_point():
        return z, y
    z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    return z[y != -100], y[y != -100]


def gradients(output: Tensor, parameters: dict) -> dict[str, Tensor]:
    found = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(parameters.items(), found, strict=True)}


def reference(c: Case, batch, count: int, labels: str, power=torch.square) -> dict[str, Tensor]:
    model = reference_model(c)
    parameters = canonical_parameters(model)
    total = {k: torch.zeros_like(p) for k, p in parameters.items()}

    def add(loss: Tensor, weight: float = 1.0) -> None:
        for k, g in gradients(loss, parameters).items():
            total[k] += weight * power(g)

    for n in range(count):
        z, y = logits_and_labels(c, model, one(batch, n))
        if labels == "given":
            add(0.5 * (z - y).square().sum() if y.is_floating_point() else F.cross_entropy(z, y, reduction="sum"))
        elif y.is_floating_point():
            for d in range(z.shape[1]):
                add(z[0, d])
        else:  # the paper's form, sum over classes of p_c g_c² or p_c |g_c|; positions are independent given the inputs
            log_p = z.log_softmax(-1)
            for m in range(len(z)):
                for k in range(z.shape[1]):
                    add(log_p[m, k], log_p[m, k].exp().item())
    return total


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance=1e-5, floor=1e-4) -> None:
    assert ours.keys() == theirs.keys()
    size = sum(t.double().square().sum() for t in theirs.values()).sqrt()
    assert size > 0
    wrong = {k: (ours[k].double() - theirs[k].double()).norm() for k in theirs}
    assert sum(w**2 for w in wrong.values()) ** 0.5 < tolerance * size
    for k, w in wrong.items():
        assert ours[k].dtype == torch.float32
        # A tensor that is nothing but rounding of a sum that cancels (a key's bias) has no relative error.
        assert w < tolerance * (theirs[k].double().norm() + floor * size), f"{k}: off by {w:.3g}"


@contextmanager
def falls_back(c: Case) -> Iterator[None]:
    """Expect the one notice of the loop taking over, or no warning at all."""
    if c.engine == "batched":
        yield
        return
    with pytest.warns(UserWarning, match="one example at a time by the loop engine, because") as caught:
        yield
    assert len(caught) == 1


def loop(model: nn.Module, batch: tuple[Tensor, Tensor], power=torch.square) -> dict[str, Tensor]:
    """The scores of a model with one number per example, under a Gaussian likelihood."""
    model = copy.deepcopy(model).double()
    parameters = canonical_parameters(model)
    total = {k: torch.zeros_like(p) for k, p in parameters.items()}
    for n in range(len(batch[1])):
        x, y = one(batch, n)
        for k, g in gradients(0.5 * (model(x) - y).square().sum(), parameters).items():
            total[k] += power(g)
    return total
