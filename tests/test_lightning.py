import importlib
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishmask
from fishmask import FishError, FishModel, Mask, Tuning, attach
from fishmask.log import CheckpointLog
from tests.test_trainer import Stop, blocks, differences

pl = pytest.importorskip("pytorch_lightning")

from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402

from fishmask.lightning import CheckpointCallback, ResumableLoader  # noqa: E402

# What Lightning says of itself and of loggers, workers and folders.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|exists and is not empty|eval mode|isinstance)"),
]
ROWS, WIDTH = 12, 20


class Module(pl.LightningModule):
    """A net with dropout and running statistics, and a target network that nothing trains."""

    def __init__(self, base: int = 0, width: int = WIDTH, density: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(base)
        self.save_hyperparameters({"width": width, "activation": torch.relu})  # which a commit cannot hold
        self.rate = 0.05
        self.net: nn.Module = self.network(width)
        self.register_buffer("seen", torch.zeros(()))
        self.tuning: Tuning = attach(self.net, mask_of(self.net, density=density))

    @staticmethod
    def network(width: int = WIDTH) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1)
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        self.seen += len(x)
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.tuning.parameters(), lr=self.rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def mask_of(net: nn.Module, seed: int = 0, density: float = 0.3) -> Mask:
    return Mask.random(net, density=density, seed=seed)


def noisy(batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Collate with an augmentation, which draws from the generator of the process too."""
    x, y = map(torch.stack, zip(*batch, strict=True))
    return [x + 0.1 * torch.randn_like(x), y]


def rows(seed: int, shuffle: bool, loader: type[DataLoader[Any]] = DataLoader) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 4, generator=generator)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return loader(data, batch_size=2, shuffle=shuffle, collate_fn=noisy if shuffle else None)


class StopAt(pl.Callback):
    def __init__(self, epoch: int, batch: int = 0) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise Stop


class Run:
    """One process of a training: builds everything anew from seeds, as a script would."""

    def __init__(
        self,
        folder: Path,
        *callbacks: Any,
        base: int = 0,
        width: int = WIDTH,
        density: float = 0.3,
        log: CheckpointLog | None = None,
        checkpoints: Any = None,
        loader: type[DataLoader[Any]] = ResumableLoader,
        module: type[Module] = Module,
        **settings: Any,
    ) -> None:
        self.module = module(base, width, density)
        self.loader = loader
        self.callback = CheckpointCallback(log or folder / "log")
        self.checkpoints = checkpoints or ModelCheckpoint(folder / "out", save_top_k=-1)
        settings = {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, **settings}
        self.trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.callback, self.checkpoints, *callbacks],
            **settings,
        )

    def fit(self, resume: str | Path | None = None) -> "Run":
        torch.manual_seed(1)
        self.trainer.fit(self.module, rows(0, True, self.loader), rows(1, False), ckpt_path=resume)
        return self

    def killed(self, resume: str | Path | None = None) -> None:
        with pytest.raises(Stop):
            self.fit(resume)

    def state(self) -> dict[str, Any]:
        return {
            "weights": {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()},
            "values": self.module.tuning.values.clone(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "scheduler": self.trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "position": (self.trainer.current_epoch, self.trainer.global_step),
        }


class Adapted(Module):
    """The same with a FishModel, and an optimizer as for any module."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.net = FishModel(self.net)

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate)
        configured["optimizer"] = optimizer
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return configured


def adapted(folder: Path, *callbacks: Any, dropout: float = 0.0, **settings: Any) -> tuple[Adapted, pl.Trainer]:
    """A FishModel, and a Trainer without our callback."""
    module = Adapted()
    module.tuning.model[3].p = dropout
    settings = {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05, **settings}
    saving = ModelCheckpoint(folder / "out", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return module, pl.Trainer(accelerator="cpu", callbacks=[saving, *callbacks], **quiet, **settings)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def newest(folder: Path) -> Path:
    return folder / "out" / files(folder)[-1]


@pytest.mark.parametrize("loader", [DataLoader, ResumableLoader])
@pytest.mark.parametrize("epoch", [1, 3])
def test_resume_at_the_end_of_an_epoch(tmp_path: Path, epoch: int, loader: type[DataLoader[Any]]) -> None:
    whole = Run(tmp_path / "a", loader=loader).fit().state()
    Run(tmp_path / "b", StopAt(epoch, 3), loader=loader).killed()
    resumed = Run(tmp_path / "b", loader=loader).fit(newest(tmp_path / "b"))
    assert not differences(whole, resumed.state())


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "out", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("batches", [1.0, 5])
@pytest.mark.parametrize("at", [(0, 3), (1, 4), (2, 0), (2, 1)])
def test_resume_within_an_epoch(tmp_path: Path, at: tuple[int, int], batches: float) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    whole = Run(a, checkpoints=every_step(a), limit_train_batches=batches).fit().state()
    Run(b, StopAt(*at), checkpoints=every_step(b), limit_train_batches=batches).killed()
    resumed = Run(b, checkpoints=every_step(b), limit_train_batches=batches).fit(newest(b))
    assert not differences(whole, resumed.state())


def test_the_order_is_new_with_a_plain_loader(tmp_path: Path) -> None:
    """The comparison above sees it; Lightning warns."""
    a, b = tmp_path / "a", tmp_path / "b"
    whole = Run(a, checkpoints=every_step(a), loader=DataLoader).fit().state()
    Run(b, StopAt(1, 4), checkpoints=every_step(b), loader=DataLoader).killed()
    resumed = Run(b, checkpoints=every_step(b), loader=DataLoader)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        resumed.fit(newest(b))
    assert differences(whole, resumed.state())


def test_files_and_commits_go_together(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "out", monitor="loss", save_top_k=2, save_last=True, filename="{epoch}")
    run = Run(tmp_path, checkpoints=checkpoints).fit()
    names = [f"{Path(path).name}" for path in checkpoints.best_k_models]
    assert files(tmp_path) == sorted([*names, "last.ckpt"])
    epochs = sorted({int(name.removeprefix("epoch=").removesuffix(".ckpt")) for name in names})
    steps = [commit.step for commit in run.callback.checkpoint_log.commits]
    assert sorted(steps) == sorted([*(3 * (epoch + 1) for epoch in epochs), 12])
    assert run.callback.checkpoint_log.verify() == []
    again = ModelCheckpoint(tmp_path / "out", monitor="loss", save_top_k=2, save_last=True, filename="{epoch}")
    resumed = Run(tmp_path, checkpoints=again, max_epochs=5).fit("last")
    assert resumed.trainer.global_step == 15


def test_links_name_the_same_commit(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "out", save_top_k=1, save_last="link")
    run = Run(tmp_path, checkpoints=checkpoints, max_epochs=2).fit()
    assert files(tmp_path) == ["epoch=1-step=6.ckpt", "last.ckpt"]
    assert [commit.step for commit in run.callback.checkpoint_log.commits] == [6]
    shutil.copy(newest(tmp_path), tmp_path / "out" / "copy.ckpt")
    run.trainer.strategy.remove_checkpoint(tmp_path / "out" / "epoch=1-step=6.ckpt")
    assert Run(tmp_path, max_epochs=3).fit(tmp_path / "out" / "copy.ckpt").trainer.global_step == 9


class Seen(pl.Callback):
    """Keep the weights of each validation with its loss."""

    def __init__(self) -> None:
        self.models: list[tuple[float, dict[str, Tensor]]] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["loss"])
            self.models.append((loss, {name: t.detach().clone() for name, t in pl_module.net.state_dict().items()}))


def test_the_best_model_is_evaluated(tmp_path: Path) -> None:
    seen = Seen()
    checkpoints = ModelCheckpoint(tmp_path / "out", monitor="loss", save_top_k=1)
    run = Run(tmp_path, seen, checkpoints=checkpoints, max_epochs=8)
    run.module.rate = 1.0
    run.fit()
    place, (loss, weights) = min(enumerate(seen.models), key=lambda item: item[1][0])
    assert place < 7, "the best model is the last one, so that this would show nothing"
    data = rows(1, shuffle=False)
    for evaluate in (run.trainer.validate, run.trainer.test):
        assert evaluate(run.module, data, ckpt_path="best", verbose=False)[0]["loss"] == loss
        assert not differences(weights, dict(run.module.net.state_dict()))
    run.module.tuning.values.data.zero_()
    run.module.tuning.write_back()
    predicted = torch.cat(run.trainer.predict(run.module, data, ckpt_path="best"))
    assert not differences(weights, dict(run.module.net.state_dict()))
    assert torch.allclose(predicted, run.module.net.eval()(data.dataset.tensors[0]))


class NewMask(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 3):
            pl_module.tuning.set_mask(mask_of(pl_module.net, seed=5), trainer.optimizers[0])


@pytest.mark.parametrize("at", [(1, 2), (1, 5), (2, 3)])
def test_mask_changed_by_another_callback(tmp_path: Path, at: tuple[int, int]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    whole = Run(a, NewMask(), checkpoints=every_step(a)).fit()
    assert whole.module.tuning.mask == mask_of(whole.module.net, seed=5)
    expected = whole.state()
    Run(b, NewMask(), StopAt(*at), checkpoints=every_step(b)).killed()
    resumed = Run(b, NewMask(), checkpoints=every_step(b)).fit(newest(b))
    assert not differences(expected, resumed.state())


def test_other_callbacks_keep_their_state(tmp_path: Path) -> None:
    stop = {"monitor": "loss", "patience": 3, "min_delta": 9.0}
    whole = Run(tmp_path / "a", EarlyStopping(**stop), max_epochs=9).fit()
    assert whole.trainer.current_epoch == 4
    expected = whole.state()
    Run(tmp_path / "b", EarlyStopping(**stop), StopAt(2), max_epochs=9).killed()
    resumed = Run(tmp_path / "b", EarlyStopping(**stop), max_epochs=9).fit(newest(tmp_path / "b"))
    assert not differences(expected, resumed.state())


def test_bfloat16(tmp_path: Path) -> None:
    """The values keep their float32 precision, which the weights do not have."""

    def run(folder: Path, *callbacks: Any) -> Run:
        made = Run(folder, *callbacks)
        made.module.tuning.detach()
        made.module.net.to(torch.bfloat16)
        made.module.net.register_forward_pre_hook(lambda net, args: tuple(x.bfloat16() for x in args))
        made.module.tuning = attach(made.module.net, mask_of(made.module.net))
        return made

    whole = run(tmp_path / "a").fit()
    expected = whole.state()
    assert differences(expected["values"], expected["values"].bfloat16().float())
    run(tmp_path / "b", StopAt(2)).killed()
    found = run(tmp_path / "b").fit(newest(tmp_path / "b")).state()
    for state in (expected, found):
        state["weights"] = {name: tensor.float() for name, tensor in state["weights"].items()}
    assert not differences(expected, found)


def test_sizes(tmp_path: Path) -> None:
    net = Module(width=10_000).net
    run = Run(tmp_path, log=CheckpointLog(tmp_path / "log", store_base=False), width=10_000, density=0.002).fit()
    dense = 4 * sum(p.numel() for p in net.parameters())
    k = run.module.tuning.mask.k
    # Running statistics of BatchNorm are as wide as the layer, and a part of every commit.
    statistics = 4 * sum(buffer.numel() for buffer in net.buffers())
    commits = run.callback.checkpoint_log.commits
    assert max(commit.bytes for commit in commits) < 3 * 4 * k + statistics + 16_000 < dense
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 200 * len(commits)
    run.callback.checkpoint_log.close()


def test_without_the_callback_nothing_is_loaded(tmp_path: Path) -> None:
    Run(tmp_path, max_epochs=1).fit()
    with pytest.raises(pickle.UnpicklingError):
        Module.load_from_checkpoint(newest(tmp_path))
    plain = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    with pytest.raises(pickle.UnpicklingError):
        plain.fit(Module(), rows(0, True), rows(1, False), ckpt_path=newest(tmp_path))


def test_full_checkpoints_are_lightnings(tmp_path: Path) -> None:
    """A full checkpoint that is there already is resumed from as before."""
    run = Run(tmp_path, max_epochs=1)
    run.callback.setup = lambda trainer, pl_module, stage: None
    run.fit()
    full = newest(tmp_path)
    assert torch.load(full, weights_only=False)["state_dict"].keys() == run.module.state_dict().keys()
    again = Run(tmp_path, max_epochs=2)
    again.trainer.fit(again.module, rows(0, True), rows(1, False), ckpt_path=full, weights_only=False)
    assert again.trainer.global_step == 6
    assert [commit.step for commit in again.callback.checkpoint_log.commits] == [6]
    assert full.exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, StopAt(1), log=CheckpointLog(tmp_path / "log", store_base=False)).killed()
    with pytest.raises(FishError, match="other weights"):
        Run(tmp_path, base=1).fit(newest(tmp_path))


def test_a_log_of_another_training_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, StopAt(1)).killed()
    with pytest.raises(FishError, match="ckpt_path"):
        Run(tmp_path).fit()
    with pytest.raises(FishError, match="no such commit"):
        Run(tmp_path / "other").fit(newest(tmp_path))


def test_damage(tmp_path: Path) -> None:
    run = Run(tmp_path, StopAt(2))
    run.killed()
    first, second = (tmp_path / "out" / name for name in files(tmp_path))
    commit = run.callback.checkpoint_log.commits[-1].path
    content = bytearray(commit.read_bytes())
    content[-100] ^= 1
    commit.write_bytes(content)
    with pytest.raises(FishError, match=commit.name):
        Run(tmp_path).fit(second)
    assert Run(tmp_path).fit(first).trainer.global_step == 12
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(FishError, match="is damaged"):
        Run(tmp_path).fit(first)


def test_resume_from_a_commit_itself(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a").fit().state()
    run = Run(tmp_path / "b").fit()
    shutil.rmtree(tmp_path / "b" / "out")
    assert not differences(whole, Run(tmp_path / "b").fit(run.callback.checkpoint_log.commits[1].path).state())


def test_a_fish_model_trains_as_a_plain_loop(tmp_path: Path) -> None:
    module, trainer = adapted(tmp_path)
    with module.net.disable_adapter():
        base = {name: p.detach().clone() for name, p in module.tuning.model.state_dict().items()}
    trainer.fit(module, rows(0, False), rows(1, False))
    plain = Module()
    plain.net[3].p = 0.0
    configured = plain.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    norms = []
    for _ in range(4):
        for index, batch in enumerate(rows(0, False)):
            (plain.training_step(batch, index) / 2).backward()
            if index % 2:
                norms.append(float(nn.utils.clip_grad_norm_(plain.tuning.parameters(), 0.05)))
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    assert min(norms) > 0.05 and trainer.global_step == len(norms) == 12
    assert torch.equal(module.tuning.values, plain.tuning.values)
    assert not differences(plain.net.state_dict(), module.tuning.model.state_dict())
    module.net.unload()
    assert not differences(base, module.net.get_base_model().state_dict())


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_fish_model_resumes_without_the_callback(tmp_path: Path, epoch: int) -> None:
    """Lightning's own checkpoint holds the values, and is loaded as strictly as any."""

    def state(module: Adapted, trainer: pl.Trainer) -> Any:
        weights = {name: p.detach().clone() for name, p in module.tuning.model.state_dict().items()}
        return weights, module.tuning.values.clone(), trainer.optimizers[0].state_dict()

    module, trainer = adapted(tmp_path / "a")
    trainer.fit(module, rows(0, False), rows(1, False))
    expected = state(module, trainer)
    killed, stopped = adapted(tmp_path / "b", StopAt(epoch))
    with pytest.raises(Stop):
        stopped.fit(killed, rows(0, False), rows(1, False))
    file = torch.load(newest(tmp_path / "b"), weights_only=False)
    saved = {name: tensor for name, tensor in file["state_dict"].items() if tensor.is_floating_point()}
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    k = module.tuning.mask.k
    assert sum(tensor.numel() for tensor in saved.values()) == k + sum(buffer.numel() for buffer in buffers)
    moments = [moment for entry in file["optimizer_states"][0]["state"].values() for moment in entry.values()]
    assert sum(moment.numel() for moment in moments if moment.dim()) == 2 * k
    resumed, goes_on = adapted(tmp_path / "b")
    goes_on.fit(resumed, rows(0, False), rows(1, False), ckpt_path=newest(tmp_path / "b"), weights_only=False)
    assert not differences(expected, state(resumed, goes_on))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_a_fish_model_in_half_precision(tmp_path: Path, precision: str) -> None:
    module, trainer = adapted(tmp_path, precision=precision)
    start = module.tuning.values.clone()
    trainer.fit(module, rows(0, False), rows(1, False))
    net, mask = module.net.get_base_model(), module.net.mask()
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert module.tuning.values.dtype == torch.float32 and not torch.equal(start, module.tuning.values)
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    module.net.unload()
    for name, p in Module().net.named_parameters():
        assert torch.equal(net.get_parameter(name), p.to(dtype))
        moved = (trained[name] != p.to(dtype)).flatten().nonzero().flatten().tolist()
        assert set(moved) <= set(mask.indices.get(name, torch.tensor([])).tolist())


def test_a_fish_model_with_the_callback(tmp_path: Path) -> None:
    """Commits hold what Lightning's checkpoints do not: the generators, so that dropout goes on as it would have."""
    whole = Run(tmp_path / "a", module=Adapted).fit().state()
    Run(tmp_path / "b", StopAt(2, 2), module=Adapted, checkpoints=every_step(tmp_path / "b")).killed()
    resumed = Run(tmp_path / "b", module=Adapted, checkpoints=every_step(tmp_path / "b"))
    assert not differences(whole, resumed.fit(newest(tmp_path / "b")).state())
    assert len(resumed.callback.checkpoint_log.commits) > 2


@pytest.mark.filterwarnings("ignore:.*(last checkpoint available|logging interval|validation)")
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of the documentation twice, as a script that was stopped and started again."""
    monkeypatch.chdir(tmp_path)
    quiet = (
        "Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs="
    )
    data = rows(0, shuffle=False).dataset
    for epochs in (2, 5):
        given: dict[str, Any] = {"__name__": "page", "net": Module.network(), "data": data}
        exec(blocks("Commits with Lightning").replace("Trainer(max_epochs=3", f"{quiet}{epochs}"), given)
        assert given["trainer"].current_epoch == epochs
    assert given["trainer"].ckpt_path.endswith("last.ckpt")
    given = {"__name__": "page", "net": Module.network(), "data": data, "fishmask": fishmask, "DataLoader": DataLoader}
    exec(blocks("Lightning").replace("Trainer(max_epochs=3", f"{quiet}3"), given)
    state = torch.load("run.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if name.startswith("net.base_model.") and name.endswith("weight")]


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fishmask.lightning")
    with pytest.raises(FishError, match=r"fishmask\[lightning\]"):
        importlib.import_module("fishmask.lightning")


def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FishError, match=r"commits to .*log already"):
        Run(tmp_path, CheckpointCallback(tmp_path / "second")).fit()
    run = Run(tmp_path)
    run.module.tuning.detach()
    with pytest.raises(FishError, match="no part of the LightningModule is attached"):
        run.fit()
    run = Run(tmp_path)
    run.module.configure_optimizers = lambda: torch.optim.SGD(run.module.parameters())
    with pytest.raises(ValueError, match="lacks"):
        run.fit()
    run = Run(tmp_path)
    run.module.configure_optimizers = lambda: [torch.optim.SGD([p]) for p in run.module.tuning.parameters()]
    run.module.automatic_optimization = False
    run.trainer.accumulate_grad_batches, run.trainer.gradient_clip_val = 1, None
    with pytest.raises(FishError, match="one optimizer"):
        run.fit()
    run = Run(tmp_path)
    monkeypatch.setattr(type(run.trainer), "world_size", 2)
    with pytest.raises(FishError, match="2 processes"):
        run.callback.setup(run.trainer, run.module, "fit")
    assert not (tmp_path / "second").exists()
