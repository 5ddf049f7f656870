import gc
import importlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

import fishmask
from fishmask import FishConfig, FishError, FishModel, Mask, attach, pointer
from fishmask.live import tuning_of
from fishmask.log import CheckpointLog
from fishmask.trainer import CheckpointCallback


def model(seed: int = 0, vocabulary: int = 200) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.2,
        )
    )  # fmt: skip


def examples(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 200, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(int(row[0] < 100))} for row in ids]


def mask_of(net: torch.nn.Module, seed: int = 0) -> Mask:
    return Mask.random(net, density=0.03, seed=seed)


class Stop(Exception):
    """The process dies here."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Stop


class Run:
    """One process of a training: builds everything anew from seeds, as a script would."""

    def __init__(
        self,
        folder: Path,
        *callbacks: TrainerCallback,
        base: int = 0,
        log: CheckpointLog | None = None,
        mask: Mask | None = None,
        rate: float = 1e-2,
        vocabulary: int = 200,
        adapted: bool = False,
        **settings: Any,
    ) -> None:
        self.model = model(base, vocabulary)
        self.tuning = attach(self.model, mask or mask_of(self.model))
        optimizer = None if adapted else torch.optim.AdamW(self.tuning.parameters(), lr=rate)
        settings = {
            "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "warmup_steps": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 4, "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "seed": 1, **settings,
        }  # fmt: skip
        self.trainer = Trainer(
            FishModel(self.model) if adapted else self.model,
            transformers.TrainingArguments(str(folder / "out"), **{"learning_rate": rate, **settings}),
            train_dataset=examples(0, 22),  # the last step of an epoch has half a batch
            eval_dataset=examples(1, 8),
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
        )
        self.callback = CheckpointCallback(self.trainer, folder / "log" if log is None else log)

    def train(self, resume: bool | str | None = None) -> "Run":
        self.trainer.train(resume_from_checkpoint=resume)
        return self

    def killed(self, resume: bool | str | None = None) -> None:
        with pytest.raises(Stop):
            self.trainer.train(resume_from_checkpoint=resume)

    def state(self) -> dict[str, Any]:
        """Everything that training has made: weights, moments, rates, logs, generators."""
        history = [
            {key: value for key, value in record.items() if "runtime" not in key and "per_second" not in key}
            for record in self.trainer.state.log_history
        ]
        optimizer = self.trainer.optimizer.optimizer
        return {
            "weights": {name: p.detach().clone() for name, p in self.model.state_dict().items()},
            "values": self.tuning.values.clone(),
            "optimizer": optimizer.state_dict(),
            "scheduler": self.trainer.lr_scheduler.state_dict(),
            "history": [record for record in history if "train_loss" not in record],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1],
            "python": random.getstate(),
            "best": (self.trainer.state.best_metric, self.trainer.state.best_global_step),
        }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Name where two nested states differ, tensors bit for bit."""
    if isinstance(a, dict):
        keys = dict.fromkeys((*a, *b))
        return [found for key in keys for found in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        alike = type(a) is type(b) and bool(np.all(a == b))
    return [] if alike else [where]


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts; keep that from walking through all of torch."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


def folders(path: Path) -> list[int]:
    return folders_in(path / "out")


def folders_in(path: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("checkpoint-")) for folder in path.glob("checkpoint-*"))


def blocks(heading: str) -> str:
    """Return the first block of Python below a heading of docs/trainers.md."""
    page = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text(encoding="utf-8")
    return page.split(f"## {heading}", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


@pytest.mark.parametrize(
    ("strategy", "step", "newest", "adapted"),
    [("steps", 5, 4, False), ("steps", 11, 8, True), ("epoch", 6, 6, True), ("epoch", 9, 6, False)],
)
def test_resume_equals_uninterrupted(tmp_path: Path, strategy: str, step: int, newest: int, adapted: bool) -> None:
    settings = {"save_strategy": strategy, "eval_strategy": strategy, "eval_steps": 4, "adapted": adapted}
    whole = Run(tmp_path / "a", **settings).train().state()
    Run(tmp_path / "b", StopAt(step), **settings).killed()
    assert folders(tmp_path / "b")[-1] == newest
    resumed = Run(tmp_path / "b", **settings).train(resume=True)
    assert resumed.trainer.state.global_step == 12
    assert not differences(whole, resumed.state())
    assert [commit.step for commit in resumed.callback.checkpoint_log.commits] == folders(tmp_path / "b")


def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a", save_steps=1).train().state()
    Run(tmp_path / "b", StopAt(3), save_steps=1).killed()
    Run(tmp_path / "b", StopAt(7), save_steps=1).killed(resume=True)
    Run(tmp_path / "b", StopAt(8), save_steps=1).killed(resume=True)
    assert not differences(whole, Run(tmp_path / "b", save_steps=1).train(resume=True).state())


@pytest.mark.parametrize("forgotten", ["_load_rng_state", "_load_optimizer_and_scheduler"])
def test_nothing_that_is_restored_is_idle(tmp_path: Path, forgotten: str) -> None:
    whole = Run(tmp_path / "a").train().state()
    Run(tmp_path / "b", StopAt(5)).killed()
    run = Run(tmp_path / "b")
    run.callback._begun = True
    setattr(run.trainer, forgotten, lambda checkpoint: None)
    run.trainer._save_checkpoint = lambda model, trial: None
    assert differences(whole, run.train(resume=True).state())


def test_resume_from_a_checkpoint_by_name(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a").train().state()
    Run(tmp_path / "b").train()
    assert folders(tmp_path / "b") == [4, 8, 12]
    run = Run(tmp_path / "b").train(resume=str(tmp_path / "b" / "out" / "checkpoint-4"))
    assert not differences(whole, run.state())
    # The steps were taken again: their folders hold the new commits, and the old ones are gone.
    assert [(commit.number, commit.step) for commit in run.callback.checkpoint_log.commits] == [(1, 4), (4, 8), (5, 12)]


def test_trains_as_a_plain_loop(tmp_path: Path) -> None:
    run = Run(tmp_path, max_grad_norm=0.1, gradient_accumulation_steps=1, num_train_epochs=1, logging_steps=1)
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches, collate = [], run.trainer.data_collator
    run.trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])
    run.train()
    loop = model()
    tuning = attach(loop, run.tuning.mask)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 3, len(batches))
    norms = []
    loop.eval()
    for batch in batches:
        loop(**batch).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(tuning.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert torch.allclose(run.tuning.values, tuning.values, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(run.tuning.values, attach(model(), run.tuning.mask).values)
    assert min(norms) > 0.1  # so it was clipped
    logged = [record["grad_norm"] for record in run.trainer.state.log_history if "grad_norm" in record]
    assert logged == pytest.approx(norms, rel=1e-4)


def test_gradient_norm_without_clipping(tmp_path: Path) -> None:
    run = Run(tmp_path, max_grad_norm=0.0, max_steps=2, logging_steps=1).train()
    assert all(record["grad_norm"] > 0 for record in run.trainer.state.log_history if "grad_norm" in record)


class Record(TrainerCallback):
    """Keep the model of each evaluation with its loss."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, dict[str, torch.Tensor]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
        weights = {name: p.detach().clone() for name, p in tuning_of(given["model"]).model.state_dict().items()}
        self.seen.append((metrics["eval_loss"], state.global_step, weights))


@pytest.mark.parametrize(
    ("strategy", "limit", "adapted"), [("best", None, False), ("steps", 2, True), ("epoch", 1, False)]
)
def test_best_model_and_limit(tmp_path: Path, strategy: str, limit: int | None, adapted: bool) -> None:
    settings: dict[str, Any] = {
        "adapted": adapted,
        "save_strategy": strategy, "eval_strategy": "epoch" if strategy == "epoch" else "steps", "eval_steps": 2,
        "save_steps": 2, "save_total_limit": limit, "load_best_model_at_end": True, "rate": 0.2,
        "metric_for_best_model": "eval_loss", "greater_is_better": False, "num_train_epochs": 4,
    }  # fmt: skip
    record = Record()
    run = Run(tmp_path, record, **settings).train()
    whole = run.state()
    loss, step, weights = min(record.seen, key=lambda seen: seen[0])
    assert 0 < step < 24, "the best model is neither the first nor the last one, or this would show nothing"
    assert run.trainer.state.best_global_step == step
    assert not differences(weights, dict(run.model.state_dict()))
    assert run.trainer.evaluate()["eval_loss"] == loss
    kept = folders(tmp_path)
    assert step in kept
    assert limit is None or len(kept) <= max(limit, 1 if strategy == "best" or limit == 1 else 2)
    assert sorted(commit.step for commit in run.callback.checkpoint_log.commits) == kept
    if strategy != "best" and limit == 2:
        assert 24 in kept
    other = tmp_path / "killed"
    Run(other, StopAt(step + 7 if strategy == "epoch" else step + 1), **settings).killed()
    if strategy == "epoch":
        assert folders(other) == [step, step + 6], "the newest is kept besides the best"
    assert not differences(whole, Run(other, **settings).train(resume=True).state())


def test_best_model_that_was_saved_before_it_was_evaluated(tmp_path: Path) -> None:
    settings = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so the first one is the best
    run = Run(tmp_path, eval_strategy="epoch", save_steps=3, **settings).train()
    assert run.trainer.state.best_global_step == 6
    assert run.trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-6")


def test_limit_keeps_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path, save_steps=1, save_total_limit=3).train()
    assert folders(tmp_path) == [10, 11, 12]
    assert [commit.step for commit in run.callback.checkpoint_log.commits] == [10, 11, 12]
    assert run.callback.checkpoint_log.verify() == []
    # After a resume from the oldest one, the newest are those just made, whatever their steps.
    again = Run(tmp_path, StopAt(11), save_steps=1, save_total_limit=2)
    again.killed(resume=str(tmp_path / "out" / "checkpoint-10"))
    assert folders(tmp_path) == [11, 12]
    assert [commit.step for commit in again.callback.checkpoint_log.commits] == [12, 11]


class NewMask(TrainerCallback):
    """Train other entries from a step on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.at:
            tuning = tuning_of(given["model"])
            tuning.set_mask(mask_of(tuning.model, seed=7), given["optimizer"])


@pytest.mark.parametrize(("step", "adapted"), [(5, False), (7, True)])
def test_mask_changed_by_another_callback(tmp_path: Path, step: int, adapted: bool) -> None:
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "adapted": adapted}
    whole = Run(tmp_path / "a", NewMask(6), **settings).train()
    expected = whole.state()
    Run(tmp_path / "b", NewMask(6), StopAt(step), **settings).killed()
    resumed = Run(tmp_path / "b", NewMask(6), **settings).train(resume=True)
    assert not differences(expected, resumed.state())
    assert len({commit.mask for commit in resumed.callback.checkpoint_log.commits}) == 2


def test_best_model_of_another_mask(tmp_path: Path) -> None:
    """Training can go on after the best model, which had another mask, was loaded."""
    whole = Run(tmp_path / "a", NewMask(6), lr_scheduler_type="constant", num_train_epochs=3).train().state()
    run = Run(tmp_path / "b", NewMask(6), lr_scheduler_type="constant").train()
    generators = torch.get_rng_state()
    run.trainer.state.best_model_checkpoint = str(tmp_path / "b" / "out" / "checkpoint-4")
    run.trainer._load_best_model()
    assert run.tuning.mask == mask_of(run.model)
    assert torch.equal(generators, torch.get_rng_state())
    run.trainer.args.num_train_epochs = 3
    assert not differences(whole, run.train(resume=True).state())


def test_other_callbacks_are_kept(tmp_path: Path) -> None:
    """EarlyStopping exports a state, which goes with the commit."""
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_loss",
        "greater_is_better": False, "restore_callback_states_from_checkpoint": True, "load_best_model_at_end": True,
    }  # fmt: skip
    whole = Run(tmp_path / "a", EarlyStoppingCallback(3, early_stopping_threshold=9.0), **settings).train()
    assert whole.trainer.state.global_step == 4
    expected = whole.state()
    stop = EarlyStoppingCallback(3, early_stopping_threshold=9.0)
    Run(tmp_path / "b", stop, StopAt(2), **settings).killed()
    assert stop.early_stopping_patience_counter == 1
    resumed = Run(tmp_path / "b", EarlyStoppingCallback(3, early_stopping_threshold=9.0), **settings)
    assert not differences(expected, resumed.train(resume=True).state())


def test_grad_scaler(tmp_path: Path) -> None:
    def scaled(folder: Path, *callbacks: TrainerCallback) -> Run:
        run = Run(folder, *callbacks)
        run.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        return run

    whole = scaled(tmp_path / "a").train()
    expected = whole.state()
    scaled(tmp_path / "b", StopAt(6)).killed()
    resumed = scaled(tmp_path / "b").train(resume=True)
    state = whole.trainer.accelerator.scaler.state_dict()
    assert state["scale"] != 64.0
    assert state == resumed.trainer.accelerator.scaler.state_dict()
    assert not differences(expected, resumed.state())


def test_sizes(tmp_path: Path) -> None:
    """Nothing but the base is as large as the model, and the base is left out on request."""
    net = model(vocabulary=10_000)
    mask = Mask.random(net, density=0.002, seed=0)
    dense = 4 * sum(p.numel() for p in net.parameters())
    log = CheckpointLog(tmp_path / "log", store_base=False)
    run = Run(tmp_path, log=log, mask=mask, vocabulary=10_000, save_steps=1).train()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < dense / 10
    extra = [commit.bytes - 3 * 4 * run.tuning.mask.k for commit in log.commits]
    history = len(json.dumps(run.trainer.state.log_history))
    assert max(extra) < 6000 + history
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"commit.json", "trainer_state.json"}
    log.close()


def test_without_the_callback_nothing_is_loaded(tmp_path: Path) -> None:
    run = Run(tmp_path).train()
    folder = tmp_path / "out" / "checkpoint-8"
    plain = Trainer(model(), run.trainer.args, train_dataset=examples(0, 22))
    with pytest.raises(ValueError, match="valid checkpoint"):
        plain.train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="config"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(OSError, match="safetensors"):
        BertForSequenceClassification.from_pretrained(folder, config=run.model.config)


def test_mean_loss_is_of_the_steps_taken(tmp_path: Path) -> None:
    """The log history goes on without a gap, and the mean that the Trainer reports is of its own steps."""
    single = Run(tmp_path / "a", logging_steps=1).train().trainer.state.log_history
    losses = [record["loss"] for record in single if "loss" in record]
    Run(tmp_path / "b", StopAt(5)).killed()
    result = Run(tmp_path / "b").trainer.train(resume_from_checkpoint=True)
    assert result.training_loss == pytest.approx(sum(losses[4:]) / 8, rel=1e-5)


def test_full_checkpoints_are_the_trainers(tmp_path: Path) -> None:
    """A full checkpoint that is there already is resumed from as before."""
    run = Run(tmp_path, StopAt(5))
    for name, method in run.callback._originals.items():
        setattr(run.trainer, name, method)
    run.killed()
    full = tmp_path / "out" / "checkpoint-4"
    assert (full / "model.safetensors").is_file()
    torch.manual_seed(5)
    again = Run(tmp_path).train(resume=True)
    assert again.trainer.state.global_step == 12
    assert [commit.step for commit in again.callback.checkpoint_log.commits] == [8, 12]
    assert (full / "model.safetensors").is_file()


def test_another_base_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, StopAt(5), log=CheckpointLog(tmp_path / "log", store_base=False)).killed()
    other = Run(tmp_path, base=1)
    before = {name: p.detach().clone() for name, p in other.model.state_dict().items()}
    with pytest.raises(FishError, match="other weights"):
        other.train(resume=True)
    assert not differences(before, dict(other.model.state_dict()))


def test_a_stored_base_is_restored(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a").train().state()
    Run(tmp_path / "b", StopAt(5)).killed()
    assert not differences(whole, Run(tmp_path / "b", base=1).train(resume=True).state())


def test_a_log_of_another_training_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, StopAt(5)).killed()
    steps = StopAt(0)
    with pytest.raises(FishError, match="resume_from_checkpoint"):
        Run(tmp_path, steps).train()
    shutil.copytree(tmp_path / "out", tmp_path / "other" / "out")
    with pytest.raises(FishError, match="no such commit"):
        Run(tmp_path / "other").train(resume=True)


def test_damage(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a").train().state()
    Run(tmp_path / "b", StopAt(9)).killed()
    folder = tmp_path / "b" / "out" / "checkpoint-8"
    (folder / "trainer_state.json").write_text("{}")  # the commit has it too
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert not differences(whole, Run(tmp_path / "b").train(resume=True).state())
    commit = CheckpointLog(tmp_path / "c" / "log").commits[-1].path
    content = bytearray(commit.read_bytes())
    content[-100] ^= 1
    commit.write_bytes(content)
    with pytest.raises(FishError, match=commit.name):
        Run(tmp_path / "c").train(resume=True)
    shutil.rmtree(tmp_path / "c" / "out" / "checkpoint-8")
    run = Run(tmp_path / "c")
    assert not differences(whole, run.train(resume=True).state())
    (tmp_path / "c" / "out" / "checkpoint-12" / "commit.json").write_text("{")
    with pytest.raises(FishError, match=r"commit\.json is damaged"):
        Run(tmp_path / "c")


def test_folders_in_the_making_are_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(tmp_path / "a").train().state()
    run = Run(tmp_path / "b")
    replace, calls = pointer.replace_file, []

    def killed(path: Path, parts: list[bytes]) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise Stop
        replace(path, parts)

    monkeypatch.setattr(pointer, "replace_file", killed)
    run.killed()
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "b" / "out").iterdir()} == {"checkpoint-4", ".checkpoint-8.tmp"}
    assert [commit.step for commit in run.callback.checkpoint_log.commits] == [4, 8]
    resumed = Run(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b" / "out").iterdir()] == ["checkpoint-4"]
    assert not differences(whole, resumed.train(resume=True).state())


def test_folders_that_are_gone_come_from_the_log(tmp_path: Path) -> None:
    """Also when the process dies between the first commit and its folder."""
    whole = Run(tmp_path / "a").train().state()
    Run(tmp_path / "b", StopAt(9)).killed()
    shutil.rmtree(tmp_path / "b" / "out")
    resumed = Run(tmp_path / "b")
    assert folders(tmp_path / "b") == [8]
    assert not differences(whole, resumed.train(resume=True).state())


def test_compacted(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a").train().state()
    Run(tmp_path / "b", StopAt(9)).killed()
    with CheckpointLog(tmp_path / "b" / "log") as log:
        log.compact()
    with pytest.raises(FishError, match="no such commit"):
        Run(tmp_path / "b").train(resume=str(tmp_path / "b" / "out" / "checkpoint-4"))
    assert not differences(whole, Run(tmp_path / "b").train(resume=True).state())


def test_one_after_the_other(tmp_path: Path) -> None:
    """The same Trainer trains twice, the second time for longer."""
    whole = Run(tmp_path / "a", lr_scheduler_type="constant").train().state()
    run = Run(tmp_path / "b", num_train_epochs=1, lr_scheduler_type="constant").train()
    run.trainer.args.num_train_epochs = 2
    assert not differences(whole, run.train(resume=True).state())


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of the documentation twice, as a script that was stopped and started again."""
    monkeypatch.chdir(tmp_path)
    code = blocks("Commits with the Trainer")
    quiet = '"run", report_to=[], use_cpu=True, disable_tqdm=True, max_steps='
    reached = []
    for steps in (200, 300):
        config = FishConfig(density=0.03, score="random", seed=steps)  # not asked the second time: the log has the mask
        given: dict[str, Any] = {"base": model(), "config": config, "data": examples(0, 40)}
        exec(code.replace('"run",', f"{quiet}{steps},"), given)
        given["log"].close()
        assert given["model"].mask() == config.replaced(seed=200).choose(model())
        reached.append((given["trainer"].state.global_step, folders_in(tmp_path / "run")))
    assert reached == [(200, [100, 200]), (300, [100, 200, 300])]


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fishmask.trainer")
    with pytest.raises(FishError, match=r"fishmask\[hf\]"):
        importlib.import_module("fishmask.trainer")


def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    with pytest.raises(FishError, match="another log already"):
        CheckpointCallback(run.trainer, tmp_path / "second")
    args, data = run.trainer.args, examples(0, 4)
    with pytest.raises(FishError, match="not attached"):
        CheckpointCallback(Trainer(model(), args, train_dataset=data), tmp_path / "second")
    resting = fishmask.get_fish_model(model(), FishConfig(density=0.03, score="random"))
    resting.set_requires_grad("default", False)
    with pytest.raises(FishError, match="active adapter is trainable"):
        CheckpointCallback(Trainer(resting, args, train_dataset=data), tmp_path / "second")
    net = model()
    tuning = attach(net, mask_of(net))
    with pytest.raises(ValueError, match="optimizers="):
        CheckpointCallback(Trainer(net, args, train_dataset=data), tmp_path / "second")
    some = torch.optim.AdamW(list(tuning.parameters())[1:])
    with pytest.raises(ValueError, match="lacks 1 of"):
        CheckpointCallback(Trainer(net, args, train_dataset=data, optimizers=(some, None)), tmp_path / "second")
    trainer = Trainer(net, args, train_dataset=data, optimizers=(torch.optim.AdamW(tuning.parameters()), None))
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(FishError, match="2 processes"):
        CheckpointCallback(trainer, tmp_path / "second")
    monkeypatch.undo()
    monkeypatch.setattr(args, "_n_gpu", 3)
    with pytest.raises(FishError, match="3 devices"):
        CheckpointCallback(trainer, tmp_path / "second")
    assert not (tmp_path / "second").exists()
