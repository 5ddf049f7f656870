"""Attached models that have no memory yet, and what attaching takes of it."""

import pytest
import torch
from torch import nn

import fishmask
from fishmask.mask import Mask
from tests.cases import case
from tests.dense import loss_of


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
    with pytest.raises(ValueError, match=r"float32 on meta; must be .* in memory"):
        fishmask.attach(model, Mask.from_indices({"1.weight": [0]}))
