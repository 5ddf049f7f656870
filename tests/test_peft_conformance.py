"""What PEFT's own tests expect of every method and every kind of model, asked of a FishModel."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from peft import PeftModel, get_base_model_state_dict, set_base_model_state_dict
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fishmask
from fishmask import FishConfig, FishError, FishModel, get_fish_model
from tests.cases import BERT, GPT2, T5, VOCAB, Case, case, hf, images, seeded, tokens, word_classes
from tests.dense import loss_of


class Embedded(nn.Module):
    """A model of one's own: an embedding, and a linear layer that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.out = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(self.words(ids)))).mean(1)[:, :3]


DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OPT = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 8, "dropout": 0.0, "init_std": 0.3}
OPT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BART = {"vocab_size": VOCAB, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART |= {"dropout": 0.0, "init_std": 0.3, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
RESNET = {"num_channels": 3, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}

CASES = {
    "bert": case("bert"),
    "bert-tokens": case("bert-tokens"),
    "deberta": Case(
        "deberta", hf("DebertaV2ForSequenceClassification", "DebertaV2Config", **DEBERTA, num_labels=3), tokens("class")
    ),
    "gpt2": Case("gpt2", hf("GPT2LMHeadModel", "GPT2Config", **GPT2 | {"n_positions": 32}), tokens("next")),
    "llama": case("llama"),
    "opt": Case("opt", hf("OPTForCausalLM", "OPTConfig", **OPT), tokens("next")),
    "t5": Case("t5", hf("T5ForConditionalGeneration", "T5Config", **T5, dropout_rate=0.0), tokens("answer")),
    "bart": Case("bart", hf("BartForConditionalGeneration", "BartConfig", **BART), tokens("answer")),
    "vit": case("vit"),
    "resnet": Case("resnet", hf("ResNetForImageClassification", "ResNetConfig", **RESNET), images),
    "mlp": case("mlp"),
    "conv": case("conv"),
    "embedded": Case("embedded", seeded(Embedded), word_classes),
}
TEXT = ["bert", "bert-tokens", "deberta", "gpt2", "llama", "opt", "t5", "bart"]
GENERATING = ["gpt2", "llama", "opt", "t5", "bart"]
CHECKPOINTING = ["bert", "deberta", "gpt2", "llama", "opt", "t5", "bart", "vit"]

every = pytest.mark.parametrize("name", CASES)
one_of_each = pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "vit", "conv"])


def config(seed: int = 1, **settings: Any) -> FishConfig:
    return FishConfig(**{"density": 0.2, "score": "random", "seed": seed} | settings)


def moved(model: FishModel, seed: int = 0, by: float = 0.3) -> FishModel:
    """Stand for a training: move all values of the active adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in model.tuning.parameters():
            values.add_(torch.randn(values.shape, generator=generator), alpha=by)
    model.tuning.write_back()
    return model


def made(name: str, adapter: str = "default", seed: int = 1, **settings: Any) -> FishModel:
    """A model with one adapter, trained a little."""
    return moved(get_fish_model(CASES[name].make(), config(seed, **settings), adapter_name=adapter), seed)


def two(name: str) -> FishModel:
    """A model with two trained adapters, of which "default" is active."""
    model = made(name)
    model.add_adapter("other", config(2))
    model.set_adapter("other")
    moved(model, 7)
    model.set_adapter("default")
    return model.eval()


@torch.no_grad()
def out(model: nn.Module, name: str, seed: int = 0) -> Tensor:
    batch = CASES[name].batch(2, seed)
    return model(**batch).logits if isinstance(batch, dict) else model(batch[0])


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(model: FishModel) -> set[str]:
    """Names of the adapters whose values require gradients."""
    return {n.split(".")[1] for n, p in model.named_parameters() if n.startswith(model.prefix) and p.requires_grad}


# --- attributes -------------------------------------------------------------------------------------------------------


@every
def test_it_is_a_peft_model_and_the_base_stays_as_it_is(name: str) -> None:
    base = CASES[name].make()
    modules, keys = [(n, type(m)) for n, m in base.named_modules()], list(base.state_dict())
    model = get_fish_model(base, config())
    assert isinstance(model, PeftModel) and model.get_base_model() is base
    assert callable(model.save_pretrained) and callable(model.from_pretrained) and callable(model.push_to_hub)
    assert [(n, type(m)) for n, m in base.named_modules()] == modules and list(base.state_dict()) == keys
    assert model.base_model_torch_dtype == getattr(base, "dtype", None)
    assert getattr(model, "config", None) is getattr(base, "config", None)
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert model.peft_config["default"] is model.active_peft_config and model.modules_to_save is None
    assert model.get_nb_trainable_parameters() == (model.mask().k, sum(p.numel() for p in base.parameters()))


@one_of_each
def test_the_adapters_name_is_in_the_names_of_its_parameters(name: str) -> None:
    model = get_fish_model(CASES[name].make(), config(), adapter_name="test-adapter")
    values = [n for n, _ in model.named_parameters() if n.startswith(f"{model.prefix}test-adapter.")]
    assert len(values) == len(model.mask().indices) and model.peft_config.keys() == {"test-adapter"}


@pytest.mark.parametrize("name", TEXT)
def test_inputs_require_gradients_only_when_asked(name: str) -> None:
    base = CASES[name].make()
    words = base.get_input_embeddings().weight
    own = next(n for n, p in base.named_parameters() if p is words)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in base.parameters())
    model = get_fish_model(base, config(exclude=[own])).train()
    ids = CASES[name].batch(2, 0)["input_ids"]
    assert not model.get_input_embeddings()(ids).requires_grad
    model.prepare_model_for_gradient_checkpointing(model)
    assert model.get_input_embeddings()(ids).requires_grad


@pytest.mark.parametrize("name", TEXT)
def test_input_embeddings_can_be_passed(name: str) -> None:
    model, batch = made(name), CASES[name].batch(2, 0)
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    logits = model(inputs_embeds=embedded, **batch).logits
    assert torch.allclose(logits, out(model, name), atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------------------


@one_of_each
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    found = FishModel.from_pretrained(CASES[name].make(), tmp_path, is_trainable=True)
    assert same(bits(model), bits(found))
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    assert settings["base_model_name_or_path"] == (path or None) and settings["inference_mode"] is True
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(re.search(r"---\n(.*?)\n---", readme, re.DOTALL)[1])
    assert data["library_name"] == "fishmask" and "fishmask" in data["tags"] and "base_model" not in data


@every
def test_inference_after_a_load_is_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = made(name).train()
    loss_of(model, CASES[name].batch(2, 0)).backward()
    expected = out(model.eval(), name)
    model.save_pretrained(tmp_path)
    found = FishModel.from_pretrained(CASES[name].make(), tmp_path)
    assert torch.equal(out(found, name), expected) and not torch.equal(out(CASES[name].make(), name), expected)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv"])
def test_selected_adapters(name: str, tmp_path: Path) -> None:
    model = two(name)
    model.save_pretrained(tmp_path / "all")
    found = FishModel.from_pretrained(CASES[name].make(), tmp_path / "all", is_trainable=True)
    found.load_adapter(tmp_path / "all" / "other", "other", is_trainable=True)
    assert same(bits(model), bits(found))
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert not (tmp_path / "one" / "other").exists()
    model.save_pretrained(tmp_path / "two", selected_adapters=["other"])
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"other"}
    assert (tmp_path / "two" / "other" / "README.md").is_file()
    with pytest.raises(ValueError, match="there is no adapter 'unknown'"):
        model.save_pretrained(tmp_path / "three", selected_adapters=["default", "unknown"])
    assert not (tmp_path / "three").exists()


def test_names_that_contain_each_other_are_not_confused(tmp_path: Path) -> None:
    model = made("bert")
    expected = model.delta().values
    for other in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(other, config(3))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    saved = fishmask.Delta.load(tmp_path / "adapter_model.safetensors").values
    assert same(dict(saved), dict(expected))
    model.delete_adapter("default")
    assert model.active_adapter == "default2" and set(model.peft_config) == set(model.values)


def test_other_files_than_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors file"):
        made("mlp").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="never converted"):
        made("mlp").save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    assert not list(tmp_path.iterdir())


def test_a_config_that_is_passed_replaces_that_of_the_folder(tmp_path: Path) -> None:
    made("mlp").save_pretrained(tmp_path)
    mine = config(9)
    found = FishModel.from_pretrained(CASES["mlp"].make(), tmp_path, config=mine)
    assert found.peft_config["default"] is mine and mine.inference_mode


@one_of_each
def test_several_adapters_are_loaded_in_little_memory(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    model = FishModel.from_pretrained(CASES[name].make(), tmp_path, low_cpu_mem_usage=True, torch_device="cpu")
    first = model.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    second = model.load_adapter(tmp_path, "yet-another", autocast_adapter_dtype=False)
    assert first.missing_keys == second.missing_keys == first.unexpected_keys == []
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert list(model.peft_config) == ["default", "other", "yet-another"] and model.active_adapter == "default"


def test_a_device_map_is_of_no_consequence(tmp_path: Path) -> None:
    made("bert").save_pretrained(tmp_path)
    found = FishModel.from_pretrained(CASES["bert"].make(), tmp_path, device_map={"": "cpu"})
    assert torch.equal(out(found, "bert"), out(made("bert"), "bert"))
    with pytest.raises(TypeError, match="no argument device_plan"):
        found.load_adapter(tmp_path, "other", device_plan={})


# --- merging ----------------------------------------------------------------------------------------------------------


@every
def test_merge_and_unload(name: str, tmp_path: Path) -> None:
    model = made(name).eval()
    expected = out(model, name)
    model.merge_adapter()
    assert torch.equal(out(model, name), expected)
    model.merge_adapter()  # again changes nothing
    assert torch.equal(out(model, name), expected)
    model.unmerge_adapter()
    assert torch.equal(out(model, name), expected)
    base = CASES[name].make()
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(base) and list(plain.state_dict()) == list(base.state_dict())
    assert torch.equal(out(plain, name), expected) and not torch.equal(out(base, name), expected)
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(tmp_path)
        again = type(plain).from_pretrained(tmp_path).eval()
    else:
        again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(out(again, name), expected)
    assert all(p.requires_grad for p in plain.parameters())


@one_of_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merge_in_half_precision(name: str, dtype: torch.dtype) -> None:
    base = CASES[name].make().to(dtype)
    expected = bits(base)
    model = moved(get_fish_model(base, config()).to(dtype=dtype).eval())
    changed = bits(base)
    assert not same(changed, expected)
    plain = model.merge_and_unload()
    assert same(bits(plain), changed) and {p.dtype for p in plain.parameters()} == {dtype}


@one_of_each
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_merged(name: str, wrong: float) -> None:
    model = made(name)
    with torch.no_grad():
        next(model.tuning.parameters())[0] = wrong
    model.tuning.write_back()
    before, first = bits(model.get_base_model()), next(iter(model.mask().indices))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"'default' has values that are not finite: {re.escape(first)}"):
            merge(safe_merge=True)
    after = bits(model.get_base_model())
    assert before.keys() == after.keys() and all(
        torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in after
    )
    assert model.active_adapter == "default" and trained(model) == {"default"}
    model.merge_and_unload()


@one_of_each
def test_several_adapters_are_merged_together(name: str) -> None:
    model = made(name)
    model.add_adapter("other", config(), mask=fishmask.Mask.random(model.get_base_model(), 0.3, 5) - model.mask())
    model.set_adapter("other")
    moved(model, 3)
    deltas = {adapter: model.delta(adapter) for adapter in ("default", "other")}
    copies = {adapter: copy.deepcopy(model) for adapter in deltas}
    expected = CASES[name].make()
    for delta in deltas.values():
        delta.apply(expected, check_base=False)
    assert same(bits(model.merge_and_unload(adapter_names=["default", "other"])), bits(expected))
    for adapter, each in copies.items():
        alone = CASES[name].make()
        deltas[adapter].apply(alone)
        assert same(bits(each.merge_and_unload(adapter_names=[adapter])), bits(alone))


def test_adapters_that_share_entries_are_not_merged_together() -> None:
    model = two("bert")
    before = bits(model)
    with pytest.raises(FishError):
        model.merge_and_unload(adapter_names=["default", "other"])
    assert same(before, bits(model)) and model.active_adapter == "default"
    with pytest.raises(ValueError, match="set_adapter"):
        model.merge_adapter(adapter_names=["other"])
    with pytest.raises(ValueError, match="there is no adapter 'third'"):
        model.merge_and_unload(adapter_names=["third"])


# --- several adapters -------------------------------------------------------------------------------------------------


@one_of_each
def test_switching(name: str) -> None:
    model, base = two(name), CASES[name].make()
    first = out(model, name)
    model.set_adapter("other")
    second = out(model, name)
    assert not torch.equal(first, second) and not torch.equal(first, out(base, name))
    model.set_adapter("default")
    assert torch.equal(out(model, name), first) and trained(model) == {"default"}
    with pytest.raises(ValueError, match="there is no adapter 'unknown'"):
        model.set_adapter("unknown")
    assert model.active_adapter == "default"


@one_of_each
def test_deleting_the_active_adapter(name: str) -> None:
    model, base = two(name), CASES[name].make()
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    assert not any("other" in n for n, _ in model.named_modules())
    model.delete_adapter("default")
    assert model.active_adapters == [] and not model.peft_config and not list(model.values)
    assert same(bits(model.get_base_model()), bits(base))
    assert torch.equal(out(model.base_model, name), out(base, name))  # also by way of PEFT's inner model


@one_of_each
def test_deleting_an_inactive_adapter(name: str) -> None:
    model = two(name)
    expected = out(model, name)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(out(model, name), expected)
    with pytest.raises(ValueError, match="there is no adapter 'other'; there are: default"):
        model.delete_adapter("other")


@every
def test_unload_gives_the_base_bit_for_bit(name: str) -> None:
    base = CASES[name].make()
    expected, flags = bits(base), [p.requires_grad for p in base.parameters()]
    model = moved(get_fish_model(base, config()).train())
    loss_of(model, CASES[name].batch(2, 0)).backward()
    plain = model.unload()
    assert plain is base and same(bits(plain), expected) and flags == [p.requires_grad for p in plain.parameters()]
    assert fishmask.get_fish_model(plain, config()).active_adapter == "default"  # nothing is left behind


@one_of_each
@pytest.mark.parametrize("weights", [(0.5, 1.5), (-0.5, -0.8)], ids=str)
def test_weighted_combination(name: str, weights: tuple[float, float]) -> None:
    model = two(name)
    for overlap in ("sum", "mean", "last"):
        model.add_weighted_adapter(["default", "other"], weights, f"both-{overlap}", overlap=overlap)
    model.add_weighted_adapter(["default"], weights[:1], "reweighted")
    model.add_weighted_adapter(["default"], [1.0], "same")
    with model.disable_adapter():
        base = {n: p.detach().double().clone() for n, p in model.get_base_model().named_parameters()}
    changes = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        changes[adapter] = {n: p.detach().double() - base[n] for n, p in model.get_base_model().named_parameters()}
    model.set_adapter("both-sum")
    for n, p in model.get_base_model().named_parameters():
        expected = base[n] + weights[0] * changes["default"][n] + weights[1] * changes["other"][n]
        assert torch.allclose(p.double(), expected, atol=1e-6)
    model.set_adapter("reweighted")
    for n, p in model.get_base_model().named_parameters():
        assert torch.allclose(p.double(), base[n] + weights[0] * changes["default"][n], atol=1e-6)
    model.set_adapter("default")
    expected = out(model, name)
    model.set_adapter("same")
    assert torch.equal(out(model, name), expected)
    assert trained(model) == set() and not model.get_model_status().requires_grad["same"]


def test_combinations_that_are_refused() -> None:
    model = two("mlp")
    before = bits(model)
    for call, error, text in (
        (lambda: model.add_weighted_adapter(["default", "other"], [1, 1], "x"), FishError, "overlap"),
        (lambda: model.add_weighted_adapter(["default", "other"], [1], "x", overlap="sum"), ValueError, "weight"),
        (lambda: model.add_weighted_adapter(["default"], [1], "x", "svd"), ValueError, "'linear', got 'svd'"),
        (lambda: model.add_weighted_adapter(["default"], [1], "other"), ValueError, "already"),
        (lambda: model.add_weighted_adapter(["third"], [1], "x"), ValueError, "no adapter 'third'"),
        (lambda: model.add_weighted_adapter([], [], "x"), ValueError, "delta"),
    ):
        with pytest.raises(error, match=text):
            call()
        assert same(before, bits(model)) and set(model.peft_config) == {"default", "other"}


@every
def test_disable_adapter_gives_the_base_bit_for_bit(name: str) -> None:
    base = CASES[name].make()
    expected = out(base, name)
    model = made(name).eval()
    inside = out(model, name)
    assert not torch.equal(inside, expected)
    with model.disable_adapter():
        assert torch.equal(out(model, name), expected) and not model.has_active_enabled_adapter
        with model.disable_adapter():
            assert torch.equal(out(model, name), expected)
        assert torch.equal(out(model, name), expected)
    assert torch.equal(out(model, name), inside) and model.has_active_enabled_adapter
    model.disable_adapter_layers()
    assert torch.equal(out(model, name), expected) and not model.get_model_status().enabled
    model.enable_adapter_layers()
    assert torch.equal(out(model, name), inside)


def test_two_adapters_may_train_all_biases() -> None:
    """PEFT refuses a second adapter with biases; here each adapter has its own values of them."""
    model = made("bert", score="biases")
    first = out(model.eval(), "bert")
    model.add_adapter("other", config(score="biases"))
    model.set_adapter("other")
    assert torch.equal(out(moved(model, 5), "bert"), out(moved(model, 0, by=0.0), "bert"))
    assert not torch.equal(out(model, "bert"), first)
    model.set_adapter("default")
    assert torch.equal(out(model, "bert"), first)


def test_mixed_adapters_in_one_batch_are_refused() -> None:
    model, batch = two("gpt2"), CASES["gpt2"].batch(2, 0)
    with pytest.raises(ValueError, match="split the batch by adapter"):
        model(**batch, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="split the batch by adapter"):
        model.generate(batch["input_ids"], adapter_names=["default", "__base__"])


def test_conversion_to_lora_is_refused() -> None:
    model = made("bert")
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="LoRA conversion"):
        peft.convert_to_lora(model, rank=4)


# --- generating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate(name: str, dtype: torch.dtype) -> None:
    model = moved(get_fish_model(CASES[name].make().to(dtype), config())).eval()
    ids = torch.tensor([[3, 4, 5], [6, 4, 7]])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False), found
    )
    plain = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(
        plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False), found
    )


# --- training ---------------------------------------------------------------------------------------------------------


@every
def test_only_values_get_gradients(name: str) -> None:
    model = made(name).train()
    loss_of(model, CASES[name].batch(4, 0)).backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == n.startswith("values.default."), n
    with torch.no_grad():
        assert any(bool(p.grad.any()) for p in model.tuning.parameters())


def test_layers_are_left_out_by_exclude() -> None:
    """What layers_to_transform=[0] does in PEFT."""
    model = made("bert", exclude=["layer.1", "embeddings", "pooler", "classifier"]).train()
    loss_of(model, CASES["bert"].batch(4, 0)).backward()
    own = [n for n, p in model.named_parameters() if p.grad is not None]
    assert own and all(".layer.0." in n for n in own)


@pytest.mark.parametrize("name", CHECKPOINTING)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = made(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # else no two forwards agree

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model, CASES[name].batch(4, 0)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.prepare_model_for_gradient_checkpointing(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == plain.keys() and all(torch.allclose(found[n], plain[n], atol=1e-5) for n in plain)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_compiled_model_switches(name: str) -> None:
    """Frozen adapters are switched without a new compilation."""
    model, counter = two(name), CompileCounter()
    model.set_requires_grad(["default", "other"], False)
    compiled, compilations = torch.compile(model, backend=counter), []
    for adapter in ("default", "other", "default", "other"):
        model.set_adapter(adapter)
        assert torch.allclose(out(compiled, name), out(model, name), atol=1e-6)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_compiled_model_trains(name: str) -> None:
    model = made(name)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for each, called in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD([p for p in called.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            loss_of(called.train(), CASES[name].batch(4, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert each.active_adapter == "default"
    assert torch.allclose(model.tuning.values, twin.tuning.values, atol=1e-5)
    assert not torch.equal(model.tuning.values, made(name).tuning.values)


# --- which parameters require gradients -------------------------------------------------------------------------------


def test_requires_grad_after_each_verb(tmp_path: Path) -> None:
    model = get_fish_model(CASES["bert"].make(), config())
    assert trained(model) == {"default"}
    model.save_pretrained(tmp_path)
    steps: list[tuple[Callable[[], Any], set[str]]] = [
        (lambda: model.add_adapter("second", config(2)), {"default"}),
        (lambda: model.set_adapter("second"), {"second"}),
        (lambda: model.set_requires_grad("default", False), {"second"}),
        (lambda: model.set_adapter("default"), set()),
        (lambda: model.set_requires_grad("default"), {"default"}),
        (lambda: model.load_adapter(tmp_path, "frozen"), {"default"}),
        (lambda: model.load_adapter(tmp_path, "loose", is_trainable=True), {"default"}),
        (lambda: model.set_adapter("loose"), {"loose"}),
        (lambda: model.set_adapter("frozen"), set()),
        (lambda: model.set_adapter("frozen", inference_mode=False), {"frozen"}),
        (lambda: model.set_adapter("second", inference_mode=True), set()),
        (lambda: model.delete_adapter("second"), {"default"}),
        (model.disable_adapter_layers, set()),
        (lambda: model.set_adapter("loose"), set()),
        (model.enable_adapter_layers, {"loose"}),
        (lambda: model.add_adapter("fixed", config(4, inference_mode=True)), {"loose"}),
        (lambda: model.set_adapter("fixed"), set()),
        (model.half, set()),
        (lambda: model.set_adapter("default"), {"default"}),
        (model.float, {"default"}),
    ]
    for number, (step, expected) in enumerate(steps):
        step()
        assert trained(model) == expected, number
        own = {id(p) for p in model.get_base_model().parameters()}
        loose = {id(p) for p in model.parameters() if p.requires_grad} & own
        assert len(loose) == (0 if model.tuning is None or model.tuning.suspended else len(model.tuning.general))


# --- status, copies, and PEFT's free functions ------------------------------------------------------------------------


def test_status() -> None:
    model = two("bert")
    model.set_requires_grad("other", False)
    layers, whole = model.get_layer_status(), model.get_model_status()
    assert whole.peft_types == {"default": "FISH", "other": "FISH"} and whole.enabled is True
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    assert whole.requires_grad == {"default": True, "other": False} and whole.available_adapters == ["default", "other"]
    assert whole.num_adapter_layers == len(layers) and whole.active_adapters == ["default"]
    query = next(s for s in layers if s.name.endswith("layer.1.attention.self.query"))
    assert query.module_type == "Linear" and query.available_adapters == ["default", "other"]
    assert query.active_adapters == ["default"] and query.devices == {"default": ["cpu"], "other": ["cpu"]}


@one_of_each
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_live_on_their_own(name: str, copied: Callable[[Any], Any]) -> None:
    model = two(name)
    model.add_weighted_adapter(["other"], [0.5], "frozen")
    before, expected = bits(model), out(model, name)
    twin = copied(model)
    assert same(bits(twin), before) and torch.equal(out(twin, name), expected)
    twin.train()
    optimizer = torch.optim.SGD(twin.tuning.parameters(), lr=0.1)
    loss_of(twin, CASES[name].batch(4, 0)).backward()
    optimizer.step()
    twin.eval()
    assert not torch.equal(out(twin, name), expected) and torch.equal(out(model, name), expected)
    assert not any(p.grad is not None for p in model.parameters())
    for adapter in ("frozen", "other"):
        for each in (model, twin):
            each.set_adapter(adapter)
        assert torch.equal(out(model, name), out(twin, name))
    model.set_adapter("default")
    assert same(bits(model), before)
    assert same(bits(twin.unload()), bits(CASES[name].make()))


@one_of_each
def test_state_dict_of_the_base(name: str) -> None:
    base = CASES[name].make()
    expected = bits(base)
    model = moved(get_fish_model(base, config()))
    with model.disable_adapter():
        found = {n: t.clone() for n, t in get_base_model_state_dict(model).items()}
    assert same(found, expected)
    assert not same(dict(get_base_model_state_dict(model)), expected)  # the active adapter is in the weights
    set_base_model_state_dict(model, expected)
    assert same(bits(base), expected)  # whose values are now the base's
    assert all(
        torch.equal(values, base.get_parameter(n).flatten()[model.mask().indices[n]])
        for n, values in model.tuning.named_parameters()
    )


def test_pefts_own_loaders_refuse_an_adapter_of_ours(tmp_path: Path) -> None:
    made("bert").save_pretrained(tmp_path)
    for load in (
        lambda: PeftModel.from_pretrained(CASES["bert"].make(), tmp_path),
        lambda: peft.PeftConfig.from_pretrained(tmp_path),
        lambda: peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path),
        lambda: CASES["bert"].make().load_adapter(str(tmp_path)),
    ):
        with pytest.raises(KeyError, match="FISH"):
            load()
    for make in (
        lambda: peft.get_peft_model(CASES["bert"].make(), config()),
        lambda: peft.get_peft_model(CASES["bert"].make(), config(task_type="SEQ_CLS")),
        lambda: PeftModel.from_pretrained(CASES["bert"].make(), tmp_path, config=FishConfig.from_pretrained(tmp_path)),
        lambda: CASES["bert"].make().add_adapter(config()),
    ):
        with pytest.raises(FishError, match=r"fishmask\.get_fish_model"):
            make()
    model = made("bert")
    for use in (peft.get_peft_model_state_dict, lambda model: peft.set_peft_model_state_dict(model, {})):
        with pytest.raises(ValueError, match="FISH"):
            use(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT itself
def test_adapters_of_other_methods_are_refused(tmp_path: Path) -> None:
    lora = peft.get_peft_model(CASES["bert"].make(), peft.LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path)
    base = CASES["bert"].make()
    with pytest.raises(ValueError, match="of type LORA"):
        FishModel.from_pretrained(base, tmp_path)
    model = get_fish_model(base, config())
    with pytest.raises(ValueError, match="of type LORA"):
        model.load_adapter(tmp_path, "other")
    with pytest.raises(TypeError, match="takes a FishConfig, got LoraConfig"):
        model.add_adapter("other", peft.LoraConfig())
    for make in (FishModel, get_fish_model):
        with pytest.raises(FishError, match="has adapters already"):
            make(lora, config())
    assert list(model.peft_config) == ["default"]
