"""TRL's trainers as they are, with a FishModel."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fishmask
from fishmask import FishConfig, FishError, FishModel
from tests.cases import LLAMA
from tests.test_fish_trainer import checkpoints, logged, values, values_of, weights
from tests.test_trainer import Stop, StopAt, blocks, differences

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # TRL's own default
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]
WORDS = ["the", "a", "river", "house", "is", "cold", "warm", "kind", "good", "bad", "day", "night"]
CONFIG = FishConfig(task_type="CAUSAL_LM", density=0.1, score="random")


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts; keep that from walking through all of torch."""
    gc.freeze()
    yield
    gc.unfreeze()


def tokenizer() -> PreTrainedTokenizerFast:
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*marks.values(), *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **marks)


def made(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def wrapped(net: nn.Module | None = None) -> FishModel:
    return fishmask.get_fish_model(made() if net is None else net, CONFIG)


def settings(**given: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 4, "max_steps": 8, "save_steps": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "max_length": 16, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 1, **given,
    }  # fmt: skip


def tuned(folder: Path, model: Any, *callbacks: Any, **given: Any) -> SFTTrainer:
    texts = [{"text": f"the {a} is {b}"} for a in ("river", "house") for b in ("cold", "warm", "kind", "good")]
    peft = {"peft_config": given.pop("peft_config")} if "peft_config" in given else {}
    return SFTTrainer(
        model=model, args=SFTConfig(str(folder), **settings(**given)), train_dataset=Dataset.from_list(texts * 4),
        processing_class=tokenizer(), callbacks=list(callbacks), **peft,
    )  # fmt: skip


def test_sft(tmp_path: Path) -> None:
    """It learns; its checkpoints are adapters, from which training resumes bit for bit."""
    net = made()
    base = weights(net)
    whole = tuned(tmp_path / "a", wrapped(net))
    whole.train()
    losses = logged(whole, "loss")
    assert losses[-1] < losses[0] - 0.1 and min(logged(whole, "grad_norm")) > 0
    assert checkpoints(tmp_path / "a") == [4, 8]
    fresh = made()
    fishmask.load(fresh, tmp_path / "a" / "checkpoint-8")
    assert not differences(weights(fresh), weights(net))
    killed = tuned(tmp_path / "b", wrapped(), StopAt(6))
    with pytest.raises(Stop):
        killed.train()
    resumed = tuned(tmp_path / "b", wrapped())
    resumed.train(resume_from_checkpoint=True)
    assert not differences(values(whole), values(resumed))
    whole.model.unload()
    assert not differences(base, weights(net))


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_the_head(tmp_path: Path, tied: bool) -> None:
    """TRL reads the head's weight outside its module; the gradient of its entries is whole all the same."""
    net = made(tied)
    model = fishmask.get_fish_model(net, CONFIG.replaced(keep=["lm_head" if not tied else "embed_tokens"], density=0.5))
    run = tuned(tmp_path, model, optim="sgd", max_steps=1, save_strategy="no", lr_scheduler_type="constant",
                learning_rate=1.0, max_grad_norm=0.0)  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    collate = run.data_collator
    run.data_collator = lambda rows: seen.append(collate(rows)) or dict(seen[-1])
    start = values(run)
    run.train()
    dense = made(tied)
    loss = dense(**{name: seen[0][name] for name in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    assert logged(run, "loss")[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, indices in model.mask().indices.items():
        moved = start[name] - values(run)[name]
        assert torch.allclose(moved, dense.get_parameter(name).grad.flatten()[indices], rtol=1e-4, atol=1e-6), name


def test_a_config_of_ours_for_the_trainer_is_refused(tmp_path: Path) -> None:
    """It would go through peft.get_peft_model, which knows PEFT's own methods alone."""
    with pytest.raises(FishError, match=r"get_fish_model\(model, config\)"):
        tuned(tmp_path, made(), peft_config=CONFIG.replaced())


def preferring(folder: Path, model: FishModel, **given: Any) -> DPOTrainer:
    rows = [
        {"prompt": f"the {a} is", "chosen": f" {b}", "rejected": f" {c}"}
        for a, b, c in (("river", "cold", "warm"), ("house", "warm", "cold"))
    ]
    args = DPOConfig(str(folder), **settings(save_strategy="no", **given))
    return DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows * 8), processing_class=tokenizer())


def test_dpo(tmp_path: Path) -> None:
    """The reference is the base, exactly: the same training as with a second model in memory as the reference."""
    net = made()
    base = weights(net)
    run = preferring(tmp_path / "a", wrapped(net))
    run.model.delete_adapter("ref")  # a copy of the adapter as it begins, which is the base
    run.train()
    assert logged(run, "rewards/margins")[-1] > 0.01
    second = wrapped()
    rows, args = run.train_dataset, DPOConfig(str(tmp_path / "b"), **settings(save_strategy="no"))
    other = DPOTrainer(model=second, ref_model=made(), args=args, train_dataset=rows, processing_class=tokenizer())
    other.train()
    assert not differences(values(run), values(other))
    assert logged(run, "loss") == logged(other, "loss")
    with run.model.disable_adapter():
        assert not differences(base, weights(net))


def test_dpo_with_an_adapter_as_the_reference_is_not_silently_wrong(tmp_path: Path) -> None:
    """TRL switches adapters between forward and backward, which needs weights that are still there."""
    run = preferring(tmp_path, wrapped())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.train()


def test_dpo_from_an_adapter_that_is_trained_already(tmp_path: Path) -> None:
    """The reference is that adapter as it was: its probabilities are computed once, before the training."""
    tuned(tmp_path / "first", first := wrapped()).train()
    first.save_pretrained(tmp_path / "adapter")
    model = FishModel.from_pretrained(made(), tmp_path / "adapter", is_trainable=True)
    start = values_of(model)
    run = preferring(tmp_path / "a", model, precompute_ref_log_probs=True)
    assert set(model.peft_config) == {"default", "ref"} and model.active_adapter == "default"
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # nothing has moved away from the reference yet
    assert logged(run, "rewards/margins")[-1] > 0.01
    assert not differences(start, dict(model.delta("ref").values))
    assert differences(start, values(run))


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of the documentation."""
    monkeypatch.chdir(tmp_path)
    texts = Dataset.from_list([{"text": "the river is cold"}] * 8)
    given: dict[str, Any] = {"fishmask": fishmask, "base": made(), "data": texts, "tokenizer": tokenizer()}
    quiet = '"run", report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2, bf16=False'
    exec(blocks("TRL").replace('"run"', quiet), given)
    fresh = made()
    fishmask.load(fresh, tmp_path / "run" / "checkpoint-2")
    assert not differences(weights(fresh), weights(given["base"]))
