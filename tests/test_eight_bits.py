"""Optimizers of libraries that keep their state in 8 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fishmask
from fishmask.mask import Mask
from tests.dense import assert_only_masked_moved, base_of


class Net(nn.Module):
    """One layer with enough entries for 8 bits, and one with few."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(100, 120), nn.Linear(120, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def model_and_mask() -> tuple[Net, Mask]:
    torch.manual_seed(0)
    model = Net()
    return model, Mask.random(model, 0.5, seed=0)


def adam8(values: Any, **options: Any) -> Any:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(values, lr=1e-2, **options)


def losses(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    told = []
    for seed in steps:
        x = torch.randn(32, 100, generator=torch.Generator().manual_seed(seed % 4))
        loss = nn.functional.cross_entropy(model(x), (x[:, :3]).argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return told


def test_training_in_eight_bits() -> None:
    model, mask = model_and_mask()
    base, tuning = base_of(model), fishmask.attach(model, mask)
    optimizer = adam8(tuning.parameters())
    told = losses(model, optimizer, range(24))
    assert sum(told[-4:]) < 0.5 * sum(told[:4])
    assert_only_masked_moved(base, model, mask)
    for name, values in tuning.named_parameters():
        assert torch.equal(model.get_parameter(name).detach().view(-1)[mask.indices[name]], values.detach())
    large, k = tuning._entries["up.weight"].values, len(mask.indices["up.weight"])
    kept = sum(optimizer.state[large][key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
    assert 2 * k <= kept <= 2.1 * k
    small = tuning._entries["down.weight"].values
    assert optimizer.state[small]["state1"].dtype == torch.float32  # fewer than 4,096


def test_a_change_of_mask_carries_whole_numbers_and_refuses_those_in_eight_bits() -> None:
    model, mask = model_and_mask()
    tuning = fishmask.attach(model, mask)
    optimizer = adam8(tuning.parameters())
    losses(model, optimizer, range(2))
    with pytest.raises(ValueError, match=r"AdamW8bit keeps state 'state1' .* build a new one"):
        tuning.set_mask(Mask.random(model, 0.5, seed=1), optimizer)
    assert tuning.mask == mask
    losses(model, optimizer, range(2))  # nothing was left half done
    tuning.set_mask(Mask.from_indices({"down.weight": mask.indices["down.weight"]}))
    optimizer = adam8(tuning.parameters())
    losses(model, optimizer, range(2))
    (values,) = tuning.parameters()
    before = optimizer.state[values]["state2"].clone()
    tuning.set_mask(Mask.from_indices({"down.weight": mask.indices["down.weight"][5:]}), optimizer)
    (values,) = tuning.parameters()
    assert torch.equal(optimizer.state[values]["state2"], before[5:])


def test_codes_as_many_as_values_are_refused_too() -> None:
    model = nn.Linear(16, 16, bias=False)
    tuning = fishmask.attach(model, Mask.random(model, 1.0, seed=0))  # 256: one block, and as long as bnb's tables
    optimizer = adam8(tuning.parameters(), min_8bit_size=1)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="keeps state 'state1'"):
        tuning.set_mask(Mask.random(model, 0.5, seed=0), optimizer)


def test_a_training_in_eight_bits_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, mask = model_and_mask()
    tuning = fishmask.attach(model, mask)
    optimizer = adam8(tuning.parameters())
    losses(model, optimizer, range(3))
    fishmask.CheckpointLog(tmp_path / "log").commit(tuning, optimizer, step=3)
    told = losses(model, optimizer, range(3, 6))
    again, _ = model_and_mask()
    other = fishmask.attach(again, mask)
    optimizer = adam8(other.parameters())
    fishmask.CheckpointLog(tmp_path / "log").restore(other, optimizer)
    assert losses(again, optimizer, range(3, 6)) == told
    assert torch.equal(other.values, tuning.values)


def test_states_of_torchao_are_refused(tmp_path: Path) -> None:
    kind = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    model = nn.Linear(64, 64, bias=False)
    tuning = fishmask.attach(model, Mask.random(model, 1.0, seed=0))
    optimizer = torch.optim.Adam(tuning.parameters())
    (values,) = tuning.parameters()
    optimizer.state[values] = {"exp_avg": kind.zeros(values.shape), "step": torch.zeros(())}
    with pytest.raises(ValueError, match="keeps state 'exp_avg'"):
        tuning.set_mask(Mask.random(model, 0.5, seed=0), optimizer)
    log = fishmask.CheckpointLog(tmp_path / "log")
    with pytest.raises(ValueError, match=r"keeps its state as OptimState8bit.*bitsandbytes"):
        log.commit(tuning, optimizer)
    assert log.commits == []
