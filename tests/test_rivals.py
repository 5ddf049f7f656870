import math
import random
import sys

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from fishmask import rivals
from fishmask.attach import attach
from fishmask.data import Encoded
from fishmask.errors import FishError
from fishmask.mask import Mask
from fishmask.recipe import Recipe
from fishmask.rivals import (
    Differences,
    chance_of_opening,
    diff_pruning,
    hard_concrete,
    load_adapter,
    peft_model,
    save_adapter,
    settled_gate,
    trained_entries,
)
from tests.cases import BERT, GPT2, SEEN, generator, hf, tokens

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
    fresh = make().train()
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


def test_lora_adds_twice_its_two_factors():
    tuned = peft_model(MODELS["bert"][0](), "lora", 0.5, ("classifier",), 0)
    layer = tuned.get_submodule("base_model.model.bert.encoder.layer.0.intermediate.dense")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        x = torch.randn(5, 8, generator=generator(0))
        change = 2 * (x @ layer.lora_A["default"].weight.T) @ layer.lora_B["default"].weight.T
        torch.testing.assert_close(layer.train()(x), layer.base_layer(x) + change)


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_nothing_asks_the_network(method, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    make, head = MODELS["bert"]
    models = make(), make()
    for model in models:
        model.config._name_or_path = model.name_or_path = "someone/base-on-the-hub"
    save_adapter(peft_model(models[0], method, 0.25, head, 0), tmp_path)
    load_adapter(models[1], tmp_path)


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_adapters_train_in_autocast(method):
    model = MODELS["bert"][0]()
    peft_model(model, method, 0.25, ("classifier",), 0)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained)


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


# --- Diff Pruning -----------------------------------------------------------------------------------------------------

GATES = [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3)]
HEAD_ONLY = ("classifier",)
DIFF = Recipe("diff", 0.2, batch_size=8, dense_rate=1e-2)
SURE = BERT | {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def sentences(rows=48):
    """Examples of 2 to 7 tokens whose class, 0 to 2, the first token decides."""
    draw = random.Random(0)
    ids = [[draw.randrange(1, SEEN) for _ in range(draw.randint(2, 7))] for _ in range(rows)]
    fields = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return Encoded(fields, {"input_ids": 0, "attention_mask": 0}, torch.tensor([row[0] // 10 for row in ids]))


def sure_bert():
    return hf("BertForSequenceClassification", "BertConfig", **SURE)()


@torch.no_grad()
def mean_loss(model, data):
    model.eval()
    return model(**data.batch(range(len(data)))).loss.item()


@pytest.mark.parametrize(("lower", "upper", "temperature"), GATES)
def test_gates_follow_their_formula(lower, upper, temperature):
    log_alpha = torch.linspace(-6, 6, 25, dtype=torch.float64)
    uniform = torch.rand(25, generator=generator(0), dtype=torch.float64)
    gates = hard_concrete(log_alpha, uniform, lower, upper, temperature)
    for gate, a, u in zip(gates, log_alpha, uniform, strict=True):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / temperature))
        assert gate.item() == pytest.approx(min(1.0, max(0.0, s * (upper - lower) + lower)), abs=1e-12)
    at_zero = torch.tensor([3.0], requires_grad=True)  # a uniform number may be 0, whose logit is infinite
    hard_concrete(at_zero, torch.zeros(1), lower, upper, temperature).sum().backward()
    assert at_zero.grad.item() == 0.0


@pytest.mark.parametrize(("lower", "upper", "temperature"), GATES)
def test_gates_have_the_gradient_of_finite_differences(lower, upper, temperature):
    uniform = torch.linspace(0.03, 0.97, 11, dtype=torch.float64)[:, None].expand(11, 9)
    log_alpha = torch.linspace(-2, 2.1, 9, dtype=torch.float64).expand(11, 9).contiguous()  # not on a kink
    gates = hard_concrete(log_alpha, uniform, lower, upper, temperature)
    assert (gates == 0).any() and (gates == 1).any() and ((gates > 0) & (gates < 1)).any()
    log_alpha.requires_grad_()
    assert gradcheck(lambda a: hard_concrete(a, uniform, lower, upper, temperature), (log_alpha,))


@pytest.mark.parametrize(("lower", "upper", "temperature"), GATES)
@pytest.mark.parametrize("location", [-4.0, -0.5, 0.0, 2.0, 5.0])
def test_the_chance_of_opening_is_the_share_of_draws_above_zero(lower, upper, temperature, location):
    draws = 400_000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    gates = hard_concrete(torch.full_like(uniform, location), uniform, lower, upper, temperature)
    chance = chance_of_opening(torch.tensor(location, dtype=torch.float64), lower, upper, temperature)
    assert (gates > 0).double().mean().item() == pytest.approx(chance.item(), abs=1e-5)


@pytest.mark.parametrize(("lower", "upper"), [gate[:2] for gate in GATES])
def test_a_settled_gate_is_the_median_of_its_draws(lower, upper):
    log_alpha = torch.linspace(-5, 5, 21, dtype=torch.float64)
    uniform = torch.linspace(0, 1, 10_003, dtype=torch.float64)[1:-1]
    draws = hard_concrete(log_alpha[:, None], uniform.expand(21, -1), lower, upper)
    torch.testing.assert_close(settled_gate(log_alpha, lower, upper), draws.median(1).values)


def two_tensors():
    shapes = {"head": (3,), "body": (2, 3), "scale": (), "fixed": (4,)}
    g = generator(1)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("structured", [True, False])
def test_differences_have_the_gradient_of_finite_differences(structured):
    differences = Differences(two_tensors(), whole=["head"], frozen=["fixed"], structured=structured)
    trained = [*differences.values.values(), *differences.gates]
    assert [len(differences.values), len(differences.log_alpha), len(differences.shared)] == [3, 2, 2 * structured]
    g = generator(2)
    with torch.no_grad():  # gates half open, so that draws meet both ends and the middle
        for tensor in trained:
            tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64))

    def objective():
        moved = differences.drawn(generator(3))
        loss = sum((p * torch.arange(1.0, p.numel() + 1).view_as(p)).sin().sum() for p in moved.values())
        return loss + 0.3 * differences.penalty()

    objective().backward()
    for tensor in trained:
        for entry in range(tensor.numel()):
            with torch.no_grad():
                flat, step = tensor.view(-1), 1e-6
                flat[entry] += step
                above = objective()
                flat[entry] -= 2 * step
                below = objective()
                flat[entry] += step
            assert tensor.grad.view(-1)[entry].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-7)


def test_differences_start_at_nothing_behind_open_gates():
    weights = two_tensors()
    differences = Differences(weights, whole=["head"], frozen=["fixed"])
    assert all(torch.equal(p, weights[name]) for name, p in differences.drawn(generator(0)).items())
    assert differences.settled().keys() == weights.keys() - {"fixed"}
    entries, tensors = 6 + 1, 2
    assert differences.penalty().item() == pytest.approx((entries + tensors) / (1 + math.exp(-5)))
    with torch.no_grad():
        differences.values["body"].fill_(2.0)
        differences.values["head"].fill_(3.0)
        differences.log_alpha["body"][0] = torch.tensor([0.0, 1.0, -9.0])
        differences.shared["body"].fill_(0.5)
    gate = {a: min(1.0, max(0.0, 3 / (1 + math.exp(-a)) - 1.5)) for a in (0.0, 0.5, 1.0, -9.0, 5.0)}
    expected = [2 * gate[0.5] * gate[a] for a in (0.0, 1.0, -9.0, 5.0, 5.0, 5.0)]
    torch.testing.assert_close(differences.settled()["body"].view(-1), torch.tensor(expected, dtype=torch.float64))
    assert differences.settled()["head"].tolist() == [3.0] * 3
    half = Differences({"body": torch.ones(3, dtype=torch.bfloat16)})
    assert half.values["body"].dtype == torch.float32 and half.drawn(generator(0))["body"].dtype == torch.bfloat16


def test_with_open_gates_and_no_penalty_it_is_dense_training(monkeypatch):
    monkeypatch.setattr(rivals, "LOG_ALPHA", 60.0)
    data, steps = sentences(), 9
    mask, values = diff_pruning(sure_bert(), data, DIFF, HEAD_ONLY, steps, penalty=0.0)
    model = sure_bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=DIFF.dense_rate, weight_decay=0.0)
    batches = [rows for epoch in (0, 1) for rows in data.shuffled(8, seed=1000 * epoch + 500)]
    for step, rows in enumerate(batches[:steps]):
        optimizer.param_groups[0]["lr"] = DIFF.dense_rate * (1 - step / steps)
        optimizer.zero_grad()
        model(**data.batch(rows)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    start, end = dict(sure_bert().named_parameters()), dict(model.named_parameters())
    expected = Mask.from_scores({name: (end[name] - start[name]).abs().detach() for name in end}, 0.2, keep=HEAD_ONLY)
    assert len((mask & expected).indices) and (mask & expected).k > 0.98 * mask.k
    for name, indices in mask.indices.items():
        torch.testing.assert_close(values[name], end[name].detach().view(-1)[indices], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("structured", [True, False])
def test_the_chosen_values_alone_lower_the_loss(precision, structured):
    data, model = sentences(), sure_bert()
    total = sum(p.numel() for p in model.parameters())
    recipe = Recipe("diff", 0.2, batch_size=8, dense_rate=1e-2, precision=precision)
    mask, values = diff_pruning(model, data, recipe, HEAD_ONLY, 60, structured=structured)
    assert mask.k == int(0.2 * total) and mask.n == total
    assert len(mask.indices["classifier.weight"]) == 24 and len(mask.indices["classifier.bias"]) == 3
    before = mean_loss(model, data)
    tuning = attach(model, mask)
    with torch.no_grad():
        for name, parameter in tuning.named_parameters():
            parameter.copy_(values[name])
    assert mean_loss(model, data) < 0.7 * before
    tuning.revert()
    assert mean_loss(model, data) == before


def test_entries_are_chosen_where_training_moved_something():
    model = sure_bert()
    recipe = Recipe("diff", 0.2, batch_size=8, dense_rate=1e-2, exclude=("LayerNorm", "pooler"))
    mask, _ = diff_pruning(model, sentences(), recipe, HEAD_ONLY, 10)
    rows = mask.indices["bert.embeddings.word_embeddings.weight"] // 8
    assert len(rows) and rows.max() < SEEN  # no example has the tokens beyond
    assert not any("LayerNorm" in name or "pooler" in name for name in mask.indices)
    again, _ = diff_pruning(model, sentences(), recipe, HEAD_ONLY, 10)
    other, _ = diff_pruning(model, sentences(), Recipe(**vars(recipe) | {"seed": 1}), HEAD_ONLY, 10)
    assert mask == again
    assert mask != other


def test_a_large_penalty_closes_every_gate():
    data, model = sentences(), sure_bert()
    with pytest.warns(UserWarning, match="only 0 scores are not zero"):
        recipe = Recipe("diff", 0.2, batch_size=8, dense_rate=1e-2, exclude=("embeddings",))
        mask, values = diff_pruning(model, data, recipe, HEAD_ONLY, 80, penalty=1.0)
    assert not any("embeddings" in name for name in mask.indices)  # though the first of all ties at zero
    weights = dict(model.named_parameters())
    assert all(
        torch.equal(values[name], weights[name].detach().view(-1)[indices]) != name.startswith("classifier")
        for name, indices in mask.indices.items()
    )


def test_the_model_comes_back_bit_for_bit_even_from_an_error():
    data = sentences()

    def fail(phase, done, total):
        if done == 2:
            raise KeyboardInterrupt

    for training in (True, False):
        model = sure_bert().train(training)
        model.register_buffer("count", torch.zeros(()))
        model.register_forward_pre_hook(lambda module, args: module.count.add_(1) and None)
        model.bert.embeddings.requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        diff_pruning(model, data, DIFF, HEAD_ONLY, 2)
        with pytest.raises(KeyboardInterrupt):
            diff_pruning(model, data, DIFF, HEAD_ONLY, 4, fail)
        with pytest.raises(FishError, match="the loss became"):
            diff_pruning(model, data, Recipe("diff", 0.2, dense_rate=1e30, clip=0.0), HEAD_ONLY, 8)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.training is training and all(p.grad is None for p in model.parameters())
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
            f"bert.embeddings.{name}" for name, _ in model.bert.embeddings.named_parameters()
        }


def test_gates_are_drawn_by_the_seed_and_dropout_is_on():
    data = sentences()

    def values(seed, dropout_seed=0, dropout=0.0):
        model = hf("BertForSequenceClassification", "BertConfig", **SURE | {"hidden_dropout_prob": dropout})()
        recipe = Recipe("diff", 1.0, batch_size=len(data), dense_rate=1e-2, seed=seed)  # one batch, whatever the seed
        torch.manual_seed(dropout_seed)
        with pytest.warns(UserWarning, match="not zero"):  # all entries are chosen, those of unused tokens too
            return torch.cat([*diff_pruning(model, data, recipe, HEAD_ONLY, 4)[1].values()])

    assert torch.equal(values(0), values(0, dropout_seed=1))
    assert (values(0) - values(1)).abs().max() > 1e-3
    assert (values(0, dropout=0.3) - values(0, dropout_seed=1, dropout=0.3)).abs().max() > 1e-3


def test_diff_pruning_reports_its_steps():
    seen = []
    diff_pruning(sure_bert(), sentences(), DIFF, HEAD_ONLY, 8, lambda *report: seen.append(report))
    assert seen == [("dense training", step, 8) for step in range(1, 9)]


def test_wrong_use_of_diff_pruning_is_refused_before_training():
    data, model = sentences(), sure_bert()

    def refused(error, message, recipe=DIFF, keep=HEAD_ONLY, steps=5, data=data):
        with pytest.raises(error, match=message):
            diff_pruning(model, data, recipe, keep, steps, lambda *_: pytest.fail("it trained"))

    refused(ValueError, "at least one step", steps=0)
    refused(ValueError, "labels", data=Encoded(data.fields, data.padding, None))
    refused(ValueError, "keep takes", recipe=Recipe("diff", 0.001))
    refused(ValueError, "matches no parameter", keep=("clasifier",))
    refused(ValueError, "no entries to choose", recipe=Recipe("diff", 1.0), keep=("bert", "classifier"))
    model.activation_checkpointing_enable()
    refused(FishError, "activation_checkpointing_disable")
    model.activation_checkpointing_disable()
    attach(model, Mask.biases(model))
    refused(FishError, "attached")
