"""``transformers.Trainer`` as it is, with a FishModel."""

import copy
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fishmask
from fishmask import FishConfig, FishError, FishModel, Mask
from tests.cases import case
from tests.replicas import moved
from tests.team import Team
from tests.test_trainer import NewMask, Record, Stop, StopAt, blocks, differences, examples, mask_of
from tests.test_trainer import model as model_of_words

CONFIG = FishConfig(task_type="SEQ_CLS", density=0.1, score="random")
FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip
How = Literal["chosen", "attached"]


def made(kind: str = "bert", dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base, the same each time."""
    net = case(kind).make().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return net


def wrapped(net: nn.Module, how: How = "chosen", density: float = 0.1) -> FishModel:
    mask = Mask.random(net, density, seed=3)
    if how == "attached":
        return FishModel(fishmask.attach(net, mask).model)
    return fishmask.get_fish_model(net, CONFIG, mask=mask)


def rows(kind: str, seed: int, count: int) -> list[dict[str, Tensor]]:
    batch = case(kind).batch(count, seed)
    return [{name: column[row] for name, column in batch.items()} for row in range(count)]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1,
        "weight_decay": 0.1, **settings,
    }  # fmt: skip
    return TrainingArguments(str(folder), **settings)


def trainer(
    folder: Path, model: nn.Module | None = None, *callbacks: TrainerCallback, kind: str = "bert", **settings: Any
) -> Trainer:
    """A Trainer of 20 rows: five batches, so that two epochs of accumulated pairs are six steps."""
    return Trainer(
        wrapped(made(kind)) if model is None else model,
        arguments(folder, **settings),
        train_dataset=rows(kind, 0, 20),
        eval_dataset=rows(kind, 1, 8),
        callbacks=list(callbacks),
    )


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.state_dict().items()}


def values_of(model: FishModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.tuning.named_parameters()}


def values(run: Trainer) -> dict[str, Tensor]:
    return values_of(run.model)


def logged(run: Trainer, key: str) -> list[float]:
    return [record[key] for record in run.state.log_history if key in record]


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts; keep that from walking through all of torch."""
    gc.freeze()
    yield
    gc.unfreeze()


class Batches:
    """A collator that remembers what it made."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.seen.append({name: torch.stack([row[name] for row in given]) for name in given[0]})
        return dict(self.seen[-1])


def plain_loop(
    kind: str, batches: list[dict[str, Tensor]], order: list[str], clip: float, autocast: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """What the Trainer does, written with torch alone: its optimizer, its schedule and its sums of losses."""
    net = made(kind).train()
    tuning = fishmask.attach(net, Mask.random(net, 0.1, seed=3))
    named = dict(tuning.named_parameters())
    decayed = [p for name, p in named.items() if "bias" not in name and "norm" not in name.lower()]
    others = [p for p in named.values() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2, fused=True)
    epochs = [batches[:5], batches[5:]]
    pairs = [epoch[at : at + 2] for epoch in epochs for at in (0, 2, 4)]
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, len(pairs))
    norms = []
    for pair in pairs:
        labels = [batch["labels"][:, 1:] if kind == "llama" else batch["labels"] for batch in pair]
        items = sum((label != -100).sum() for label in labels)
        for batch in pair:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = net(**batch, num_items_in_batch=items).loss
            loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_([named[name] for name in order], clip)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in tuning.named_parameters()}, norms


@pytest.mark.parametrize(
    ("kind", "how", "clip", "bf16"),
    [("bert", "chosen", 1.0, False), ("llama", "attached", 0.01, False), ("bert", "attached", 0.01, True)],
)
def test_trains_as_a_plain_loop(tmp_path: Path, kind: str, how: How, clip: float, bf16: bool) -> None:
    """Decay by name, clipping, accumulation, schedule and autocast: bit for bit, and only masked entries move."""
    batches, net = Batches(), made(kind)
    base, model = weights(net), wrapped(net, how)
    run = trainer(tmp_path, model, kind=kind, gradient_accumulation_steps=2, max_grad_norm=clip, bf16=bf16)
    run.data_collator = batches
    run.train()
    order = [name for name, _ in model.values["default"].named_parameters()]
    found, norms = plain_loop(kind, batches.seen, order, clip, bf16)
    assert not differences(found, values(run))
    assert logged(run, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert min(norms) > 0.01 and run.state.global_step == 6
    mask, moved = model.mask(), 0
    for name, p in net.named_parameters():
        inside = torch.zeros(p.numel(), dtype=torch.bool)
        inside[mask.indices.get(name, [])] = True
        assert torch.equal(p.detach().flatten()[~inside], base[name].flatten()[~inside])
        moved += int((p.detach().flatten()[inside] != base[name].flatten()[inside]).sum())
    assert moved > 0.9 * mask.k


def test_clipping_changes_the_update(tmp_path: Path) -> None:
    settings = {"optim": "sgd", "weight_decay": 0.0, "warmup_steps": 0}
    free, clipped = (
        trainer(tmp_path, max_grad_norm=norm, max_steps=1, **settings) for norm in (1e6, 1e-3)
    )  # fmt: skip
    start = values(free)
    free.train()
    clipped.train()
    far, near = ((torch.cat([(values(run)[n] - start[n]).flatten() for n in start])).norm() for run in (free, clipped))
    assert float(near) == pytest.approx(1e-5, rel=1e-3)  # the clipped norm times the learning rate
    assert far > 10 * near


def test_groups_of_the_optimizer(tmp_path: Path) -> None:
    """The Trainer's filter reads names; frozen weights are in no group."""
    run = trainer(tmp_path)
    run.create_optimizer()
    decayed, others = run.optimizer.param_groups
    names = {id(p): name for name, p in run.model.tuning.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == set(names)
    plain = {names[id(p)] for p in others["params"]}
    assert plain == {name for name in names.values() if "bias" in name or "LayerNorm" in name}
    assert run.get_num_trainable_parameters() == run.model.mask().k


def test_evaluates_and_predicts(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_strategy="epoch")
    run.train()
    losses = logged(run, "eval_loss")
    assert len(losses) == 2 and losses[0] != losses[1]
    predicted = run.predict(rows("bert", 1, 8))
    alone = made()
    run.model.delta().apply(alone)
    with torch.no_grad():
        logits = alone(**case("bert").batch(8, 1)).logits
    assert torch.equal(torch.from_numpy(predicted.predictions), logits)
    assert predicted.metrics["test_loss"] == losses[-1] == run.evaluate()["eval_loss"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    plain = trainer(tmp_path, kind="llama")
    plain.train()
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = trainer(tmp_path, kind="llama", **settings)
    run.train()
    assert run.model.get_base_model().is_activation_checkpointing
    assert not differences(values(plain), values(run))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def test_checkpoints_hold_only_deltas(tmp_path: Path) -> None:
    """The files of a folder that is an adapter's, with k values and twice as many moments."""
    config = transformers.BertConfig(
        vocab_size=60_000,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(config)
    base, dense = copy.deepcopy(net), 4 * sum(p.numel() for p in net.parameters())
    model = wrapped(net, density=5e-5)
    trainer(tmp_path, model, save_strategy="steps", save_steps=1, save_total_limit=3).train()
    assert checkpoints(tmp_path) == [8, 9, 10]
    for folder in tmp_path.iterdir():
        assert {path.name for path in folder.iterdir()} == FILES
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        assert sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()) == model.mask().k
        state = torch.load(folder / "optimizer.pt")["state"].values()
        assert sum(moment.numel() for entry in state for moment in entry.values() if moment.dim()) == 2 * model.mask().k
        assert sum(path.stat().st_size for path in folder.iterdir() if path.name != "rng_state.pth") < dense / 50
    fishmask.load(base, tmp_path / "checkpoint-10")
    assert not differences(weights(base), weights(net))


class State:
    """All that a training leaves, to compare two."""

    def __init__(self, run: Trainer) -> None:
        history = [
            {k: v for k, v in r.items() if k in ("loss", "grad_norm", "eval_loss")} for r in run.state.log_history
        ]
        self.everything = {
            "values": values(run),
            "weights": weights(run.model.get_base_model()),
            "optimizer": run.optimizer.optimizer.state_dict(),
            "scheduler": run.lr_scheduler.state_dict(),
            "history": history[:-1],  # the last one is of the seconds it took
            "generator": torch.get_rng_state(),
        }


def weights_as_numbers(state: Any) -> Any:
    """numpy knows no bfloat16."""
    if isinstance(state, dict):
        return {name: weights_as_numbers(part) for name, part in state.items()}
    if isinstance(state, Tensor) and state.dtype == torch.bfloat16:
        return state.view(torch.int16)
    return state


@pytest.mark.parametrize(
    ("kind", "dropout", "dtype", "stop"),
    [
        ("bert", 0.2, torch.float32, 2),  # in the middle of the first epoch
        ("bert", 0.2, torch.float32, 3),  # between two epochs
        ("bert", 0.1, torch.bfloat16, 4),
        ("llama", 0.0, torch.float32, 5),
    ],
)
def test_resume_equals_uninterrupted(tmp_path: Path, kind: str, dropout: float, dtype: torch.dtype, stop: int) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "kind": kind}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}

    def run(folder: Path, how: How, *callbacks: TrainerCallback) -> Trainer:
        return trainer(folder, wrapped(made(kind, dropout, dtype), how), *callbacks, **settings)

    whole = run(tmp_path / "a", "chosen")
    whole.train()
    expected = State(whole).everything
    killed = run(tmp_path / "b", "attached", StopAt(stop))
    with pytest.raises(Stop):
        killed.train()
    assert checkpoints(tmp_path / "b")[-1] == stop
    resumed = run(tmp_path / "b", "attached")
    resumed.train(resume_from_checkpoint=True)
    assert not differences(weights_as_numbers(expected), weights_as_numbers(State(resumed).everything))
    # And this can fail: other values to start from end elsewhere.
    assert differences(expected["values"], values(killed))


def test_resume_onto_another_base_or_mask_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    other = made()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight += 1
    with pytest.raises(FishError, match="other weights"):
        trainer(tmp_path, wrapped(other)).train(resume_from_checkpoint=True)


def test_resume_of_an_adapter_among_others(tmp_path: Path) -> None:
    """The one that is trained has a name of its own; a frozen one beside it stays as it is."""

    def model() -> FishModel:
        model = wrapped(made())
        model.add_adapter("task", CONFIG.replaced(seed=5))
        model.set_adapter("task")
        return model

    whole = trainer(tmp_path / "a", model(), save_strategy="steps", save_steps=4)
    whole.train()
    killed = trainer(tmp_path / "b", model(), StopAt(6), save_strategy="steps", save_steps=4)
    with pytest.raises(Stop):
        killed.train()
    assert (tmp_path / "b" / "checkpoint-4" / "task" / "adapter_model.safetensors").is_file()
    resumed = trainer(tmp_path / "b", model(), save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.active_adapter == "task"
    assert not differences(values(whole), values(resumed))


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_loaded(tmp_path: Path, limit: int | None) -> None:
    record = Record()
    run = trainer(
        tmp_path, None, record, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        learning_rate=0.2, save_total_limit=limit, num_train_epochs=4,
    )  # fmt: skip
    run.train()
    loss, step, _ = min(record.seen, key=lambda seen: seen[0])
    assert step < 20, "the best model is not the last one, or this would show nothing"
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert run.evaluate()["eval_loss"] == loss
    assert checkpoints(tmp_path) == ([step] if limit else [5, 10, 15, 20])
    best = made()
    fishmask.load(best, run.state.best_model_checkpoint)
    assert not differences(weights(best), weights(run.model.get_base_model()))


# --- what is written and sent -----------------------------------------------------------------------------------------


def test_save_model_and_card(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    again = FishModel.from_pretrained(made(), tmp_path / "saved")
    assert not differences(weights(again.get_base_model()), weights(run.model.get_base_model()))
    run.create_model_card(tasks="text-classification")
    assert "learning_rate" in (tmp_path / "README.md").read_text(encoding="utf-8")
    run.model.create_or_update_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "learning_rate" in card and "fishmask.load(" in card


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is uploaded can be read from there."""
    import huggingface_hub

    hub, repository = tmp_path / "hub", huggingface_hub.RepoUrl("https://huggingface.co/someone/words")

    def upload(self: Any, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> str:
        shutil.copytree(folder_path, hub, ignore=shutil.ignore_patterns(*ignore_patterns))
        return "done"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **kwargs: repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    run = trainer(tmp_path / "run", hub_model_id="someone/words", save_strategy="steps", save_steps=5)
    run.train()
    assert run.push_to_hub() == "done"
    assert not list(hub.glob("checkpoint-*"))
    fresh = made()
    fishmask.load(fresh, hub)
    assert not differences(weights(fresh), weights(run.model.get_base_model()))
    assert "- fishmask" in (hub / "README.md").read_text(encoding="utf-8")


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of the documentation."""
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"base": model_of_words(vocabulary=2000), "data": examples(0, 20)}
    quiet = '"run", report_to=[], use_cpu=True, disable_tqdm=True, max_steps=100,'
    exec(blocks("Trainer").replace('"run",', quiet), given)
    for folder in ("run/checkpoint-100", "adapter"):
        fresh = model_of_words(vocabulary=2000)
        fishmask.load(fresh, folder)
        assert not differences(weights(fresh), weights(given["base"]))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine"},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        {"bf16_full_eval": True},
        {"max_grad_norm": 0.0},
    ],
    ids=lambda settings: next(iter(settings)) + "-" + str(next(iter(settings.values()))),
)
def test_settings_that_work(tmp_path: Path, settings: dict[str, Any]) -> None:
    net = made()
    base = weights(net)
    run = trainer(tmp_path, wrapped(net), eval_strategy="epoch", **settings)
    start = values(run)
    run.train()
    assert run.state.global_step == 10 and logged(run, "grad_norm")[-1] > 0
    assert all(not torch.equal(start[name], now) for name, now in values(run).items())
    run.model.unload()
    assert not differences(base, weights(net))


def test_batch_size_is_found(tmp_path: Path) -> None:
    """auto_find_batch_size begins again with a smaller batch, with the values that there are then."""
    run = trainer(tmp_path, auto_find_batch_size=True)
    tried, step = [], run.training_step

    def training_step(model: nn.Module, inputs: dict[str, Tensor], items: Any = None) -> Tensor:
        tried.append(len(inputs["labels"]))
        if tried[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, items)

    run.training_step = training_step
    run.train()
    assert tried[0] == 4 and set(tried[1:]) <= {1, 2, 3} and run.state.global_step > 10


def test_model_init(tmp_path: Path) -> None:
    """The model is made anew for each training, as for a search of settings."""
    run = Trainer(model_init=lambda: wrapped(made()), args=arguments(tmp_path), train_dataset=rows("bert", 0, 20))
    run.train()
    first = values(run)
    run.train()
    assert not differences(first, values(run))


def test_another_mask_in_mid_training(tmp_path: Path) -> None:
    """A callback that sets a mask needs to know nothing of the FishModel: the new values are clipped and cleared."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e-3}
    run = trainer(tmp_path, None, NewMask(4), warmup_steps=0, weight_decay=0.0, **settings)
    base = weights(made())
    run.train()
    model = run.model
    assert model.mask() == mask_of(made(), seed=7) and run.state.global_step == 10
    moved = [values_of(model)[name] - base[name].flatten()[i] for name, i in model.mask().indices.items()]
    # Ten steps of length 0.001, which is what clipping leaves.
    assert 1e-3 < torch.cat(moved).norm() < 10.1e-3
    assert {id(p) for p in model.values.parameters()} == {id(p) for p in model.tuning.parameters()}


# --- without a FishModel ----------------------------------------------------------------------------------------------


def test_an_attached_model_alone_is_refused(tmp_path: Path) -> None:
    net = made()
    tuning = fishmask.attach(net, Mask.random(net, 0.1, seed=3))
    before = tuning.values.clone()
    with pytest.raises(FishError, match=r"fishmask\.FishModel\(model\)"):
        trainer(tmp_path, net).train()
    assert torch.equal(tuning.values, before)


def test_an_attached_model_with_an_optimizer_alone_is_refused(tmp_path: Path) -> None:
    """The Trainer would clear the gradients of the frozen weights, and those of the values would add up."""
    net = made()
    tuning = fishmask.attach(net, Mask.random(net, 0.1, seed=3))
    run = trainer(tmp_path, net)
    run.optimizer = torch.optim.AdamW(tuning.parameters())
    with pytest.raises(FishError, match=r"fishmask\.FishModel\(model\)"):
        run.train()
    assert run.state.global_step == 1


# --- two processes ----------------------------------------------------------------------------------------------------


def together(rank: int, size: int, folder: str, find_unused: bool | None = None) -> Any:
    """Train one rank's share, in the environment that torchrun gives; return the values, and what gloo moved."""
    if size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
        os.environ |= {name: str(number) for name, number in ranks.items()} | {"MASTER_ADDR": "localhost"}
    run = trainer(
        Path(folder), kind="llama", per_device_train_batch_size=4 // size, ddp_find_unused_parameters=find_unused,
        save_strategy="epoch",
    )  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run.train()
    found = {name: p.numpy() for name, p in values(run).items()}
    return found, moved(profile.events()), run.model.mask().k, run.state.global_step


def refusal(rank: int, size: int, folder: str) -> str:
    """Train with the Trainer's own setting, which looks for unused parameters."""
    try:
        together(rank, size, folder)
    except FishError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DDP reduces k numbers a step; both ranks hold the same values, those of one process with the double batch."""
    alone, _, _, steps = together(0, 1, str(tmp_path / "alone"))
    with Team(2) as team:
        (first, collectives, k, taken), (second, *_) = team.run(together, str(tmp_path / "pair"), False)
        refusals = team.run(refusal, str(tmp_path / "refused"))
    assert taken == steps == 10
    assert collectives["gloo:all_reduce"] == [k] * steps
    assert max(collectives["gloo:broadcast"]) == k  # and not the base
    for name, found in first.items():
        assert np.array_equal(found, second[name])
        assert np.allclose(found, alone[name], rtol=1e-4, atol=1e-6)
    saved = FishModel.from_pretrained(made("llama"), tmp_path / "pair" / "checkpoint-10").delta()
    assert all(np.array_equal(first[name], saved.values[name].numpy()) for name in first)
    assert all("ddp_find_unused_parameters=False" in text for text in refusals)
