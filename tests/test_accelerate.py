"""A loop of one's own with accelerate, around a FishModel."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fishmask
from fishmask import FishError
from tests.test_fish_trainer import made, rows, values_of, weights, wrapped
from tests.test_trainer import blocks, differences


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def moments(optimizer: Any) -> list[Tensor]:
    state = optimizer.state_dict()["state"].values()
    return [moment for entry in state for moment in entry.values() if moment.dim()]


class Loop:
    """Eight batches of 4 rows in two epochs, accumulated in pairs; everything is made anew, as a script would."""

    def __init__(self, folder: Path, precision: str = "no", net: nn.Module | None = None) -> None:
        set_seed(0)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, mixed_precision=precision, project_dir=str(folder)
        )
        model = wrapped(made(dropout=0.1) if net is None else net)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        data = DataLoader(rows("bert", 0, 16), batch_size=4, shuffle=True)  # type: ignore[arg-type]
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, data, scheduler
        )
        self.norms: list[float] = []

    def epoch(self) -> None:
        self.model.train()
        for batch in self.data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    @property
    def fish(self) -> fishmask.FishModel:
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]


def plain_loop(precision: str) -> tuple[dict[str, Tensor], list[float]]:
    """The same with torch alone."""
    set_seed(0)
    net = made(dropout=0.1).train()
    tuning = fishmask.attach(net, wrapped(made()).mask())
    named = dict(tuning.named_parameters())
    order = [named[name] for name, _ in wrapped(made()).values["default"].named_parameters()]
    optimizer = torch.optim.AdamW(order, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = DataLoader(rows("bert", 0, 16), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    norms = []
    for _ in range(2):
        for index, batch in enumerate(data):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = net(**batch).loss
            (loss / 2).backward()
            if index % 2:
                norms.append(float(nn.utils.clip_grad_norm_(order, 0.1)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in named.items()}, norms


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trains_as_a_plain_loop(tmp_path: Path, precision: str) -> None:
    net = made(dropout=0.1)
    base = weights(net)
    loop = Loop(tmp_path, precision, net)
    loop.epoch()
    loop.epoch()
    found, norms = plain_loop(precision)
    assert loop.norms == pytest.approx(norms, rel=1e-6) and min(norms) > 0.1
    assert not differences(found, values_of(loop.fish))
    loop.fish.unload()
    assert not differences(base, weights(net))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resume_equals_uninterrupted(tmp_path: Path, precision: str) -> None:
    whole = Loop(tmp_path, precision)
    whole.epoch()
    state = tmp_path / "state"
    whole.accelerator.save_state(str(state))
    k = whole.fish.mask().k
    with safe_open(state / "model.safetensors", "pt") as file:
        names = set(file.keys())
        saved = sum(file.get_tensor(name).numel() for name in names if name.endswith(("weight", "bias")))
    assert saved == k and not any(name.startswith("base_model.model.") and "weight" in name for name in names)
    assert sum(moment.numel() for moment in moments(whole.optimizer)) == 2 * k
    whole.epoch()
    expected = copy.deepcopy((values_of(whole.fish), whole.optimizer.state_dict()))
    resumed = Loop(tmp_path, precision)
    resumed.accelerator.load_state(str(state))
    assert differences(expected[0], values_of(resumed.fish))
    resumed.epoch()
    assert not differences(expected, (values_of(resumed.fish), resumed.optimizer.state_dict()))
    assert not differences(weights(whole.fish.get_base_model()), weights(resumed.fish.get_base_model()))


def test_the_state_of_another_mask_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.accelerator.save_state(str(tmp_path / "state"))
    other = Accelerator(cpu=True)
    other.prepare(wrapped(made(), density=0.05))
    with pytest.raises(FishError, match="choose the same mask"):
        other.load_state(str(tmp_path / "state"))


def test_save_pretrained(tmp_path: Path) -> None:
    """As accelerate's own examples do at the end."""
    loop = Loop(tmp_path)
    loop.epoch()
    accelerator = loop.accelerator
    accelerator.unwrap_model(loop.model).save_pretrained(
        tmp_path / "adapter",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(loop.model),
    )
    fresh = made()
    fishmask.load(fresh, tmp_path / "adapter")
    assert not differences(weights(fresh), weights(loop.fish.get_base_model()))
    assert differences(weights(fresh), weights(made()))


def test_an_attached_model_alone_is_refused(tmp_path: Path) -> None:
    net = made()
    fishmask.attach(net, wrapped(made()).mask())
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    accelerator.backward(model(**{n: c[None] for n, c in rows("bert", 0, 1)[0].items()}).loss)
    with pytest.raises(FishError, match=r"nothing to train.*fishmask\.FishModel\(model\)"):
        optimizer.step()


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of the documentation."""
    monkeypatch.chdir(tmp_path)
    data = DataLoader(rows("bert", 0, 16), batch_size=4)  # type: ignore[arg-type]
    net = made()
    exec(blocks("accelerate"), {"torch": torch, "model": wrapped(net), "data": data})
    fresh = made()
    fishmask.load(fresh, tmp_path / "adapter")
    assert not differences(weights(fresh), weights(net))
    assert (tmp_path / "state" / "model.safetensors").is_file()
