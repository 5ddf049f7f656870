import sys

import pytest
import torch
from torch import nn

from fishmask.attach import attach
from fishmask.errors import FishError
from fishmask.mask import Mask
from fishmask.rivals import load_adapter, peft_model, save_adapter, trained_entries
from tests.cases import BERT, GPT2, hf, tokens

SMALL = BERT | {"num_hidden_layers": 1, "num_labels": 3}
DISTIL = {"vocab_size": 40, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 12}
MODELS = {
    "bert": (hf("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3), ("classifier",)),
    "roberta": (
        hf("RobertaForSequenceClassification", "RobertaConfig", **BERT, pad_token_id=0, num_labels=3),
        ("classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"),
    ),
    "distilbert": (
        hf("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL, num_labels=3),
        ("pre_classifier", "classifier"),
    ),
    "gpt2": (hf("GPT2ForSequenceClassification", "GPT2Config", **GPT2, num_labels=3), ("score",)),
}
# The linear layers of one encoder block, as [out, in] (Conv1D of GPT-2: [in, out]), and how many blocks there are.
BLOCKS = {
    "bert": [(8, 8)] * 4 + [(16, 8), (8, 16)],
    "roberta": [(8, 8)] * 4 + [(16, 8), (8, 16)],
    "distilbert": [(8, 8)] * 4 + [(16, 8), (8, 16)],
    "gpt2": [(8, 24), (8, 8), (8, 32), (32, 8)],
}
HEAD = {"bert": 27, "roberta": 72 + 27, "distilbert": 72 + 27, "gpt2": 24}
PAIRS = [(name, method) for name in MODELS for method in ("lora", "shira") if (name, method) != ("gpt2", "shira")]


def batch(seed=0, size=6):
    return tokens("class", padded=True)(size, seed)


def train(model, steps=3):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for step in range(steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model):
    return model(**batch(99)).logits


@pytest.mark.parametrize(("name", "method"), PAIRS)
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5])
def test_trained_entries_are_the_count_nearest_to_the_budget(name, method, density):
    make, head = MODELS[name]
    model = make()
    total = sum(p.numel() for p in model.parameters())
    peft_model(model, method, density, head, 0)
    step = 2 * sum(rows + columns for rows, columns in BLOCKS[name])  # entries of one more rank
    possible = [HEAD[name] + r * step for r in range(1, 200)]
    assert trained_entries(model) == min(possible, key=lambda count: abs(count - density * total))


def test_shira_stays_within_its_smallest_layer():
    model = MODELS["bert"][0]()
    peft_model(model, "shira", 1.0, ("classifier",), 0)
    assert trained_entries(model) == HEAD["bert"] + 4 * 2 * sum(rows + columns for rows, columns in BLOCKS["bert"])


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_adapters_and_head_learn_and_the_base_does_not_move(name, method):
    make, head = MODELS[name]
    model, base = make(), make()
    tuned = peft_model(model, method, 0.25, head, 0)
    torch.testing.assert_close(logits(model), logits(base))  # adapters start as nothing
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    train(model)
    moved = [key for key, p in model.named_parameters() if key in before and not torch.equal(p, before[key])]
    assert len(moved) == len(before)
    assert not torch.equal(logits(model), logits(base))
    assert torch.equal(logits(tuned), logits(model))
    frozen = {key: p for key, p in model.named_parameters() if not p.requires_grad}
    shared = {key.replace("base_layer.", "").replace("original_module.", ""): p for key, p in frozen.items()}
    assert {key for key, _ in base.named_parameters()} <= shared.keys()
    assert all(torch.equal(shared[key], p) for key, p in base.named_parameters())


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_fresh_base_with_the_saved_adapter_predicts_the_same_bits(name, method, tmp_path):
    make, head = MODELS[name]
    model = make()
    tuned = peft_model(model, method, 0.25, head, 0)
    train(model)
    assert save_adapter(tuned, tmp_path) == tmp_path / "adapter"
    fresh = make()
    with torch.no_grad():  # a new head is random; the trained one must come from the file
        for key, p in fresh.named_parameters():
            if any(key.startswith(part.split(".")[0]) for part in head):
                p.normal_()
    state = torch.get_rng_state()
    loaded = load_adapter(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(loaded), logits(model))
    assert not fresh.training and trained_entries(fresh) == 0


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_the_seed_decides_the_adapter_alone(method, tmp_path):
    def trained(seed):
        model = MODELS["bert"][0]()
        torch.manual_seed(5)
        state = torch.get_rng_state()
        peft_model(model, method, 0.25, ("classifier",), seed)
        assert torch.equal(torch.get_rng_state(), state)
        train(model)
        return logits(model)

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_shira_draws_other_positions_in_every_layer():
    tuned = peft_model(MODELS["bert"][0](), "shira", 0.25, ("classifier",), 0)
    drawn = [module.shira_indices["default"] for module in tuned.modules() if hasattr(module, "shira_indices")]
    square = {tuple(map(tuple, positions.tolist())) for positions in drawn if positions.max() < 8}
    assert len(drawn) == 12
    assert len(square) > 7  # two blocks with four layers [8, 8] each


def test_a_part_of_what_peft_would_train_is_refused():
    model = MODELS["distilbert"][0]()
    with pytest.raises(ValueError, match=r"pre_classifier\.weight"):
        peft_model(model, "lora", 0.25, ("classifier",), 0)
    model = MODELS["bert"][0]()
    with pytest.raises(ValueError, match=r"add classifier\.bias"):
        peft_model(model, "lora", 0.25, ("classifier.weight",), 0)
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_in_the_body_is_trained_whole_and_gets_no_adapter():
    model = MODELS["bert"][0]()
    block = "bert.encoder.layer.1.output.dense"
    tuned = peft_model(model, "lora", 0.25, ("classifier", block, "pooler"), 0)
    trained = [key for key, p in tuned.named_parameters() if p.requires_grad]
    assert sum(block in key for key in trained) == 2
    assert sum("pooler" in key for key in trained) == 2
    assert not any("lora" in key for key in trained if block in key or "pooler" in key)


def test_wrong_use_is_refused_before_anything_changes(monkeypatch, tmp_path):
    make, head = MODELS["bert"]
    model = make()
    for method, density, names, message in [
        ("ia3", 0.1, head, "'lora' or 'shira'"),
        ("lora", 0.0, head, "fraction in"),
        ("lora", 0.1, ("clasifier",), "matches no parameter"),
    ]:
        with pytest.raises(ValueError, match=message):
            peft_model(model, method, density, names, 0)
    with pytest.raises(FishError, match="no adapter_config"):
        load_adapter(model, tmp_path)
    with pytest.raises(FishError, match="Conv1D"):
        peft_model(MODELS["gpt2"][0](), "shira", 0.25, ("score",), 0)
    with pytest.raises(ValueError, match="no linear layers"):
        peft_model(nn.Sequential(nn.Embedding(4, 2)), "lora", 0.5, (), 0)
    tuning = attach(model, Mask.biases(model))
    with pytest.raises(FishError, match="attached"):
        peft_model(model, "lora", 0.25, head, 0)
    tuning.revert()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FishError, match=r"pip install 'fishmask\[peft\]'"):
        peft_model(model, "lora", 0.25, head, 0)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make().parameters(), strict=True))
    peft_model(model, "lora", 0.25, head, 0)
    with pytest.raises(FishError, match="already"):
        peft_model(model, "lora", 0.25, head, 0)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    make, head = MODELS["bert"]
    save_adapter(peft_model(make(), "lora", 0.25, head, 0), tmp_path)
    wider = hf("BertForSequenceClassification", "BertConfig", **BERT | {"hidden_size": 12}, num_labels=3)()
    with pytest.raises(FishError, match="cannot load the adapter"):
        load_adapter(wider, tmp_path)
    with pytest.raises(FishError, match="only one of the two has"):
        load_adapter(hf("BertForSequenceClassification", "BertConfig", **SMALL)(), tmp_path)
