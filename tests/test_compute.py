from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fishmask import FishError, Mask
from fishmask.compute import StepCosts, step_costs
from fishmask.data import Encoded
from fishmask.params import canonical_parameters
from fishmask.recipe import Recipe
from fishmask.train import choose
from tests.cases import BERT, LLAMA, case, generator, hf, tokens

DEEP = hf("BertForSequenceClassification", "BertConfig", **{**BERT, "num_hidden_layers": 4}, num_labels=3)
COSTS = StepCosts("blocks", 2.0, (10.0, 10.0, 10.0), 4.0, {"words": -1, "a": 0, "b": 1, "c": 2, "head": 3})


class Tower(nn.Module):
    """Blocks that are run in an order of their own."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in self.order:
            x = self.blocks[place](x)
        return x


def scored(model):
    return {name: torch.rand(p.shape, generator=generator(i)) for i, (name, p) in enumerate(model.named_parameters())}


def test_a_step_costs_the_forward_and_the_backward_above_the_mask():
    whole = 2 + 3 * 10 + 4
    plain = whole + whole - 2
    assert COSTS.step(-1) == COSTS.step(0) == 1
    assert COSTS.step(2) == pytest.approx((whole + 10 + 4) / plain)
    assert COSTS.step(2, cached=True) == pytest.approx((2 + 2 * (10 + 4)) / plain)
    assert COSTS.step(3, cached=True) == pytest.approx((2 + 2 * 4) / plain)


def test_the_lowest_block_is_the_deepest_within_the_budget():
    for cached in (False, True):
        shares = [COSTS.step(lowest, cached) for lowest in range(4)]
        assert shares == sorted(shares, reverse=True)
        for lowest, (here, above) in enumerate(pairwise(shares), start=1):
            assert COSTS.lowest(above, cached) == lowest
            assert COSTS.lowest((here + above) / 2, cached) == lowest
    assert COSTS.lowest(1) == -1 and COSTS.excluded(1) == ()
    assert COSTS.excluded(0.72) == ("words", "a", "b") and COSTS.excluded(0.72, cached=True) == ("words", "a")


@pytest.mark.parametrize("budget", [0, 1.5, -0.1, float("nan"), "0.5", None])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(ValueError, match=r"share of the plain mask's step, in \(0, 1\]"):
        COSTS.lowest(budget)


def test_a_budget_that_no_mask_meets_names_one_that_can_be_met():
    with pytest.raises(ValueError, match=r"takes 0.571 of the plain step without a prefix cache; use at least 0.572"):
        COSTS.lowest(0.5)
    assert COSTS.lowest(0.572) == 3
    with pytest.raises(ValueError, match=r"takes 0.143 of the plain step with a prefix cache; use at least 0.143"):
        COSTS.lowest(0.1, cached=True)


def test_layers_are_counted_where_they_run():
    model = DEEP()
    costs = step_costs(model, tokens("class")(5, 0))
    matrices, attention = 4 * 8 * 8 + 2 * 8 * 16, 2 * 7 * 8
    # Two operations for a multiply-add of 7 tokens.
    assert costs.chain == "bert.encoder.layer" and costs.blocks == (2 * 7 * (matrices + attention),) * 4
    assert costs.before == 0 and costs.after == 2 * (8 * 8 + 8 * 3)
    assert costs.places.keys() == canonical_parameters(model).keys()
    for name, place in costs.places.items():
        number = name.removeprefix("bert.encoder.layer.")[0]
        assert place == (-1 if "embeddings" in name else int(number) if number.isdigit() else 4), name
    assert step_costs(model, tokens("class")(2, 9)) == costs  # of one example, whatever it says


@pytest.mark.parametrize(("name", "head"), [("gpt2", None), ("llama", "lm_head.weight"), ("bert-masked-lm", None)])
def test_a_tied_weight_is_where_it_is_used_first(name, head):
    places = step_costs(case(name).make(), case(name).batch(2, 0)).places
    assert places[next(iter(places))] == -1  # the words, which some heads share
    assert head is None or places[head] == 2


def test_parts_that_are_not_called_belong_to_what_contains_them():
    places = step_costs(case("torch-encoder").make(), case("torch-encoder").batch(2, 0)).places
    assert places["encoder.layers.1.self_attn.out_proj.weight"] == 1  # attention takes its weight, and calls nothing
    assert places["place"] == -1 and places["head.weight"] == 2


def test_counting_leaves_the_model_as_it_was():
    model = DEEP().train()
    model.bert.pooler.eval()
    before, random = [module.training for module in model.modules()], torch.get_rng_state()
    step_costs(model, tokens("class")(2, 0))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random) and torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["mlp", "albert", "conv"])
def test_a_model_without_a_chain_is_refused(name):
    with pytest.raises(FishError, match=r"one longest nn.ModuleList of blocks of one class.*it has none"):
        step_costs(case(name).make(), case(name).batch(2, 0))


def test_two_chains_of_one_length_are_refused():
    with pytest.raises(FishError, match=r"encoder.block, decoder.block are equally long"):
        step_costs(case("t5").make(), case("t5").batch(2, 0))


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 2, 2), (0, 1)])
def test_blocks_that_are_no_chain_are_refused(order):
    with pytest.raises(FishError, match="do not run one after another, each once"):
        step_costs(Tower(order), torch.ones(2, 3))
    assert step_costs(Tower((0, 1, 2)), torch.ones(2, 3)).blocks == (18, 18, 18)


def test_a_model_without_a_batch_of_its_own_needs_one():
    with pytest.raises(ValueError, match="Tower has no dummy_inputs: pass batch="):
        step_costs(Tower((0, 1, 2)))
    assert step_costs(DEEP()).chain == "bert.encoder.layer"


def test_a_model_on_the_meta_device_is_counted_too():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    batch = {"input_ids": case("llama").batch(2, 0)["input_ids"]}  # a padded mask is looked into, which needs numbers
    found, expected = (step_costs(m, batch) for m in (model, case("llama").make()))
    assert found == expected


def test_a_mask_within_a_budget_is_the_best_of_what_it_may_reach():
    model = DEEP()
    scores, batch = scored(model), tokens("class")(2, 0)
    mask = Mask.from_scores(scores, 0.2, step_budget=0.55, model=model, batch=batch, cached=True)
    costs = step_costs(model, batch)
    lowest = costs.lowest(0.55, cached=True)
    assert lowest == 2
    above = {name: score for name, score in scores.items() if costs.places[name] >= lowest}
    assert set(mask.indices) <= set(above) and mask.k == int(0.2 * mask.n)
    ranked = torch.cat([score.flatten() for score in above.values()]).sort(descending=True).values
    chosen = torch.cat([above[name].flatten()[indices] for name, indices in mask.indices.items()])
    assert torch.equal(chosen.sort(descending=True).values, ranked[: mask.k])
    with_more = {"keep": "classifier", "exclude": "pooler"}
    assert Mask.from_scores(scores, 0.2, **with_more, step_budget=1, model=model) == Mask.from_scores(
        scores, 0.2, **with_more
    )


def test_a_budget_without_a_model_or_against_what_is_kept_is_refused():
    model = DEEP()
    with pytest.raises(ValueError, match="step_budget needs model="):
        Mask.from_scores(scored(model), 0.2, step_budget=0.5)
    with pytest.raises(ValueError, match=r"both kept and excluded: bert.encoder.layer.0"):
        Mask.from_scores(scored(model), 0.2, keep="layer.0", step_budget=0.7, model=model)


def test_every_method_with_a_density_keeps_to_the_budget():
    model, batch = DEEP(), tokens("class", padded=True)(12, 0)
    rows = [ids[real].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"] == 1, strict=True)]
    fields = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    data = Encoded(fields, dict.fromkeys(fields, 0), batch["labels"])
    recipe = Recipe(density=0.05, batch_size=4, examples=8, epochs=2, step_budget=0.7)
    costs = step_costs(model, data.batch([0]))
    lowest = costs.lowest(0.7)
    for method in ("fish", "gradient", "snip", "magnitude", "random", "movement"):
        mask = choose(model, data, replace(recipe, method=method), keep=("classifier",))
        places = {costs.places[name] for name in mask.indices}
        assert min(places) >= lowest == 3 and len(mask.indices["classifier.weight"]) == 24, method


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step_budget": 0.0}, "step_budget must be a share"),
        ({"step_budget": 1.2}, "step_budget must be a share"),
        ({"step_budget": 0.5, "method": "biases"}, "step_budget is for masks chosen by density"),
        ({"step_budget": 0.5, "method": "full"}, "step_budget is for masks chosen by density"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes must not be below 0"),
        ({"prefix_cache_bytes": 1, "method": "lora"}, "a prefix cache is for a training on a mask"),
    ],
)
def test_a_recipe_with_a_wrong_budget_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**wrong)
