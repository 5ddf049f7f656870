import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fishmask
from fishmask.data import Examples, encode, rated_words, read_examples
from fishmask.demo import RECIPES, model_folder
from fishmask.errors import FishError
from fishmask.hub import load_for_training, load_like
from fishmask.loop import device_of, to_device
from fishmask.mask import Mask
from fishmask.measure import peak_memory_bytes, quality
from fishmask.run import train_table
from fishmask.train import Recipe, choose, evaluate, fit, predict
from tests import tiny

TINY = Recipe(density=0.1, learning_rate=3e-3, epochs=2, batch_size=8, max_length=16, examples=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.model_folder(tmp_path_factory.mktemp("train") / "model"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return read_examples(tiny.table(tmp_path_factory.mktemp("train") / "train.tsv"), "text", "label")


def start(folder, examples, seed=0):
    loaded = load_for_training(folder, examples.classes, seed=seed)
    return loaded, encode(examples, loaded.tokenizer, 16)


def tuned(folder, examples, recipe, **options):
    loaded, data = start(folder, examples, recipe.seed)
    return loaded, data, fit(loaded.model, data, recipe, head=loaded.head, **options)


@pytest.mark.parametrize("method", ["fish", "random", "magnitude", "biases", "full"])
def test_every_method_learns_the_tiny_task(folder, examples, method):
    rate = 1e-3 if method == "full" else 1e-2
    loaded, data, outcome = tuned(folder, examples, Recipe(method, 0.3, rate, epochs=30, batch_size=8, examples=48))
    assert evaluate(loaded.model, data)["accuracy"] > (0.6 if method == "biases" else 0.9)
    assert outcome.entries == (
        sum(p.numel() for p in loaded.model.parameters()) if method == "full" else outcome.tuning.mask.k
    )
    assert outcome.history[-1]["train_loss"] < outcome.history[0]["train_loss"]


@pytest.mark.parametrize("method", ["gradient", "snip", "movement", "narrowing", "diff", "lora", "shira"])
def test_the_other_methods_learn_it_too(folder, examples, method):
    recipe = Recipe(method, 0.3, 1e-2, epochs=20, batch_size=8, examples=48, dense_rate=1e-3)
    loaded, data, outcome = tuned(folder, examples, recipe)
    assert evaluate(loaded.model, data)["accuracy"] > 0.9
    assert (outcome.tuning is None) == (outcome.adapter is not None) == (method in ("lora", "shira"))
    trained = outcome.tuning.parameters() if outcome.tuning else loaded.model.parameters()
    assert outcome.entries == sum(p.numel() for p in trained if p.requires_grad) > 0
    assert not loaded.model.training


def test_padding_to_the_full_length_predicts_the_same(folder, examples):
    loaded, data = start(folder, examples)
    wide = encode(examples, loaded.tokenizer, 16, "max")
    torch.testing.assert_close(predict(loaded.model, wide), predict(loaded.model, data), rtol=1e-4, atol=1e-5)
    outcome = fit(loaded.model, wide, replace(TINY, padding="max"), head=loaded.head)
    assert outcome.entries == int(0.1 * outcome.tuning.mask.n)


def test_batches_go_to_the_device_of_the_model(folder, examples):
    loaded, data = start(folder, examples)
    moved = to_device(data.batch([0, 1]), device_of(loaded.model.to("meta")))
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


def test_regression_learns_too(folder, tmp_path):
    ratings = read_examples(tiny.table(tmp_path / "r.tsv", kind="ratings"), "text", "label")
    recipe = Recipe("fish", 0.3, 1e-2, epochs=30, batch_size=8)
    loaded, data, _ = tuned(folder, ratings, recipe)
    assert loaded.model.config.problem_type == "regression"
    assert evaluate(loaded.model, data)["pearson"] > 0.9


def test_the_same_seed_gives_the_same_delta_and_another_seed_another(folder, examples):
    deltas = [tuned(folder, examples, replace(TINY, seed=seed))[2].tuning.delta() for seed in (3, 3, 4)]
    assert deltas[0].mask.digest == deltas[1].mask.digest != deltas[2].mask.digest
    for name, values in deltas[0].values.items():
        assert torch.equal(values, deltas[1].values[name])


def test_only_masked_entries_move_and_the_head_is_kept_whole(folder, examples):
    loaded, _, outcome = tuned(folder, examples, TINY)
    before = load_for_training(folder, examples.classes, seed=0).model
    moved = Mask.between(before, loaded.model)
    assert 0 < moved.k <= outcome.tuning.mask.k == int(0.1 * outcome.tuning.mask.n)
    assert (moved - outcome.tuning.mask).k == 0
    assert len(outcome.tuning.mask.indices["classifier.weight"]) == 2 * 32


def test_the_warm_up_moves_the_head_alone_and_counts_as_training(folder, examples):
    seen = []
    recipe = replace(TINY, warm_up_head=5, exclude=("pooler",))
    loaded, data = start(folder, examples)

    def watch(phase, done, total):
        changed = Mask.between(load_for_training(folder, examples.classes, seed=0).model, loaded.model)
        seen.append((phase, done, total, set(changed.indices)))

    outcome = fit(loaded.model, data, recipe, head=loaded.head, progress=watch)
    head = {"classifier.weight", "classifier.bias"}
    phases = [phase for phase, *_ in seen]
    assert phases[:5] == ["training"] * 5 and phases[5] == "scoring"
    assert all(names == head for phase, done, _, names in seen if phase == "scoring" or done <= 5)
    assert seen[-1][3] > head
    assert [done for phase, done, *_ in seen if phase == "training"] == list(range(1, 13))
    assert not any("pooler" in name for name in outcome.tuning.delta().mask.indices)
    assert outcome.tuning.mask.k == int(0.1 * outcome.tuning.mask.n)


def test_a_mask_chosen_beforehand_is_the_one_trained(folder, examples):
    mask = Mask.random(load_for_training(folder, examples.classes).model, 0.05, seed=1)
    assert tuned(folder, examples, TINY, mask=mask)[2].tuning.mask == mask
    with pytest.raises(ValueError, match="does not go with method="):
        tuned(folder, examples, replace(TINY, method="full"), mask=mask)


def test_the_log_has_one_line_per_epoch_with_the_validation_quality(folder, examples, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("an earlier log\n")
    loaded, data = start(folder, examples)
    outcome = fit(loaded.model, data, TINY, head=loaded.head, validation=data, log=log)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records == outcome.history
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 6), (2, 12)]
    assert records[-1]["accuracy"] == evaluate(loaded.model, data)["accuracy"]


def test_predictions_are_in_the_order_of_the_data_whatever_the_batches(folder, examples):
    loaded, data = start(folder, examples)
    outputs = predict(loaded.model, data, batch_size=8)
    for row in (0, 7, 47):
        batch = {name: tensor for name, tensor in data.batch([row]).items() if name != "labels"}
        torch.testing.assert_close(outputs[row], loaded.model(**batch).logits[0].detach())


def test_a_loss_that_is_not_finite_stops_the_training(folder, examples):
    with pytest.raises(FishError, match="the loss became nan; try a lower learning rate"):
        loaded, data = start(folder, examples)
        with torch.no_grad():
            loaded.model.classifier.weight.fill_(math.nan)
        fit(loaded.model, data, replace(TINY, method="random"), head=loaded.head)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "bitfit"}, "method must be one of fish, gradient"),
        ({"density": 5}, "fraction in"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"labels": "guessed"}, "labels must be one of given, expected, sampled"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"among": "heads"}, "among must be one of all, layers"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, and finite"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0, and finite"),
        ({"epochs": 1.5}, "epochs must be a whole number; got 1.5"),
        ({"seed": -1}, "seed must not be below 0"),
        ({"method": "snip", "labels": "expected"}, "makes every score of method='snip' zero"),
        ({"block": "16"}, "block must be 'rows', 'columns', or height and width"),
        ({"method": "narrowing", "block": "rows", "epochs": 3}, "block is for masks chosen by a score"),
        ({"method": "diff", "among": "layers"}, "name what to leave out with exclude"),
        ({"method": "full", "among": "layers"}, "takes none"),
        ({"method": "narrowing", "epochs": 1}, "method='narrowing' .* needs more epochs than that; got epochs=1"),
        ({"clip": -1.0}, "clip must not be below 0"),
        ({"method": "full", "warm_up_head": 5}, "for masks"),
        ({"method": "biases", "exclude": ("pooler",)}, "takes none"),
    ],
)
def test_a_wrong_recipe_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**wrong)


def test_a_warm_up_as_long_as_the_training_is_refused(folder, examples):
    with pytest.raises(ValueError, match="leaves no step for training: there are 12"):
        tuned(folder, examples, replace(TINY, warm_up_head=12))


def test_fewer_examples_than_asked_for_are_all_scored(folder, examples):
    loaded, data = start(folder, examples)
    seen = []
    choose(loaded.model, data, Recipe(density=0.1), loaded.head, lambda phase, done, total: seen.append((done, total)))
    assert seen[-1] == (48, 48)


def test_the_head_depends_on_the_seed_alone(folder):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_for_training(folder, ("x", "y"), seed=5).model.classifier.weight
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, load_for_training(folder, ("x", "y"), seed=5).model.classifier.weight)
    assert not torch.equal(first, load_for_training(folder, ("x", "y"), seed=6).model.classifier.weight)


def test_a_checkpoint_with_a_head_keeps_it_or_gets_a_new_one_for_other_classes(folder, tmp_path):
    model = load_for_training(folder, ("x", "y"), seed=5).model
    model.save_pretrained(tmp_path / "two")
    load_like(folder).config.save_pretrained(tmp_path)
    tiny_tokenizer = load_for_training(folder, ("x", "y")).tokenizer
    tiny_tokenizer.save_pretrained(tmp_path / "two")
    same = load_for_training(str(tmp_path / "two"), ("x", "y"), seed=6)
    assert same.head == ("classifier.weight", "classifier.bias")
    assert torch.equal(same.model.classifier.weight, model.classifier.weight)
    other = load_for_training(str(tmp_path / "two"), ("x", "y", "z"), seed=6)
    assert other.head == ("classifier.weight", "classifier.bias")
    assert other.model.classifier.weight.shape == (3, 32)


def test_a_checkpoint_that_lacks_weights_of_the_body_is_refused(folder, tmp_path):
    model = load_like(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    load_for_training(folder, ("x", "y")).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FishError, match=r"lacks 2 weights of the model itself, such as .*layer\.1\.output\.dense"):
        load_for_training(str(tmp_path), ("x", "y"))


def test_a_model_that_is_nowhere_is_one_clear_error(tmp_path):
    with pytest.raises(FishError, match=r"cannot load .*nowhere.*expected a model folder or a name"):
        load_for_training(str(tmp_path / "nowhere"))


def test_quality_of_classes_against_counts_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    found = quality(logits, torch.tensor([0, 1, 0, 1]))
    assert found == {"accuracy": 0.5, "f1": 0.5, "mcc": 0.0}
    perfect = quality(torch.eye(3), torch.tensor([0, 1, 2]))
    assert perfect == {"accuracy": 1.0, "f1": 1.0, "mcc": 1.0}
    # TP 2, FN 1, FP 1, TN 4
    logits = torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 1, 0, 0, 0, 0]), 2).float()
    found = quality(logits, torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]))
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["mcc"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


def test_quality_of_numbers_with_ties_and_constants():
    outputs, targets = torch.tensor([[1.0], [2.0], [2.0], [10.0]]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    found = quality(outputs, targets)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 2, 10], [1, 3, 2, 4])[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    constant = quality(torch.ones(4, 1), targets)
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


class Interrupted(Exception):
    """Stands for a kill."""


def interrupt_at(step):
    def progress(phase, done, total):
        if phase == "training" and done == step:
            raise Interrupted

    return progress


@pytest.mark.parametrize("step", [2, 5, 6, 9, 12])
@pytest.mark.parametrize("warm_up", [0, 4])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(folder, examples, tmp_path, step, warm_up):
    recipe = replace(TINY, epochs=3, warm_up_head=warm_up)
    loaded, data, whole = tuned(folder, examples, recipe, log=tmp_path / "whole.jsonl")
    steps = 3 * math.ceil(len(data) / recipe.batch_size)
    assert steps == 18
    with fishmask.CheckpointLog(tmp_path / "log", store_base=False) as log, pytest.raises(Interrupted):
        tuned(folder, examples, recipe, checkpoints=log, checkpoint_every=3, progress=interrupt_at(step))
    done = []
    with fishmask.CheckpointLog(tmp_path / "log", store_base=False) as log:
        again, _, outcome = tuned(
            folder, examples, recipe, checkpoints=log, checkpoint_every=3, log=tmp_path / "again.jsonl",
            progress=lambda phase, n, total: done.append(n) if phase == "training" else None,
        )  # fmt: skip
    assert done == list(range(step // 3 * 3 + 1, steps + 1))
    assert Mask.between(again.model, loaded.model).k == 0
    assert outcome.history == whole.history
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert outcome.tuning.delta().mask == whole.tuning.delta().mask


def test_another_training_does_not_go_on_from_these_commits(folder, examples, tmp_path):
    with fishmask.CheckpointLog(tmp_path / "log") as log:
        tuned(folder, examples, TINY, checkpoints=log, checkpoint_every=1)
        before = sorted(path.name for path in log.path.iterdir())
        with pytest.raises(FishError, match=r"another recipe|by another"):
            tuned(folder, examples, replace(TINY, learning_rate=1e-4), checkpoints=log)
        with pytest.raises(FishError, match="other data"):
            tuned(folder, replace(examples, texts=examples.texts[::-1]), TINY, checkpoints=log)
        with pytest.raises(FishError, match="another mask"):
            mask = Mask.random(start(folder, examples, TINY.seed)[0].model, 0.1, seed=3)
            tuned(folder, examples, TINY, checkpoints=log, mask=mask)
        assert sorted(path.name for path in log.path.iterdir()) == before
    with pytest.raises(ValueError, match="no mask"):
        tuned(folder, examples, replace(TINY, method="full"), checkpoints=log)


def test_a_run_that_was_interrupted_leaves_the_same_folder(folder, tmp_path):
    data, columns = tiny.table(tmp_path / "train.tsv"), {"text": "text", "label": "label", "pair": None, "task": "auto"}
    train_table(folder, data, TINY, tmp_path / "whole", columns)
    with pytest.raises(Interrupted):
        train_table(folder, data, TINY, tmp_path / "again", columns, checkpoint_every=2, progress=interrupt_at(7))
    assert (tmp_path / "again" / "checkpoints").is_dir()
    train_table(folder, data, TINY, tmp_path / "again", columns, checkpoint_every=2)
    for name in ("delta.safetensors", "log.jsonl", "run.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "again" / "checkpoints").exists()


def test_the_peak_of_memory_rises_with_what_is_allocated():
    before = peak_memory_bytes()
    block = torch.ones(8 * before // 4 // 8 + 10_000_000)
    assert peak_memory_bytes() > before + 30_000_000
    del block


def test_the_quick_start_does_what_it_says(folder, examples, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text()
    first, later = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    loaded, data = start(folder, examples)
    fresh = load_for_training(folder, examples.classes, seed=9).model
    scope = {"model": loaded.model, "batches": list(data.sample(48, 8, seed=0)) * 22}
    exec(first.replace("0.005", "0.1"), scope)
    exec(later, {"fishmask": fishmask, "model": fresh})
    assert Mask.between(fresh, loaded.model).k == 0


@pytest.mark.slow
def test_the_embedded_model_learns_rated_words(tmp_path):
    recipe = replace(RECIPES["paper"], epochs=1, examples=64, warm_up_head=10)
    loaded = load_for_training(model_folder())
    words, checks = rated_words("train"), rated_words("validation")
    some = Examples(words.texts[::5], targets=words.targets[::5])
    train, validation = (encode(examples, loaded.tokenizer, 16) for examples in (some, checks))
    before = evaluate(loaded.model, validation)["pearson"]
    outcome = fit(loaded.model, train, recipe, head=loaded.head)
    assert outcome.entries == int(0.005 * outcome.tuning.mask.n)
    assert evaluate(loaded.model, validation)["pearson"] > before + 0.3


CACHED = replace(TINY, epochs=3, step_budget=0.6, prefix_cache_bytes=10**7)


@pytest.mark.parametrize("room", [10**7, 20_000])
def test_a_training_with_a_prefix_cache_goes_on_bit_for_bit_and_deletes_it(folder, examples, tmp_path, room):
    recipe = replace(CACHED, prefix_cache_bytes=room)
    loaded, data, whole = tuned(folder, examples, recipe, validation=None, prefix_folder=tmp_path / "one")
    assert all("layer.0" not in name and "embeddings" not in name for name in whole.tuning.mask.indices)
    assert whole.prefix["bytes"] <= room and not (tmp_path / "one").exists() and whole.seconds_filling > 0
    if room == 10**7:
        assert (whole.prefix["computed"], whole.prefix["served"]) == (len(data), 3 * len(data))
    else:
        assert whole.prefix["computed"] > 2 * len(data) and whole.prefix["served"] > 0
    with fishmask.CheckpointLog(tmp_path / "log", store_base=False) as log:
        with pytest.raises(Interrupted):
            tuned(folder, examples, recipe, checkpoints=log, checkpoint_every=3, progress=interrupt_at(11))
        again, _, outcome = tuned(folder, examples, recipe, checkpoints=log, checkpoint_every=3)
    assert Mask.between(again.model, loaded.model).k == 0
    assert outcome.history == whole.history


def test_a_prefix_cache_trains_as_without_one_where_nothing_drops_out(folder, examples):
    def trained(recipe):
        loaded, data = start(folder, examples)
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return fit(loaded.model, data, recipe, head=loaded.head)

    # Both step budgets leave the first block alone.
    plain, cached = trained(replace(CACHED, step_budget=0.8, prefix_cache_bytes=0)), trained(CACHED)
    assert plain.tuning.mask == cached.tuning.mask and not plain.prefix
    torch.testing.assert_close(cached.tuning.values, plain.tuning.values, rtol=1e-3, atol=1e-4)


def test_the_cache_begins_after_the_warm_up(folder, examples):
    seen = []
    recipe = replace(CACHED, warm_up_head=5, exclude=("pooler",))
    _, data, outcome = tuned(folder, examples, recipe, progress=lambda phase, *_: seen.append(phase))
    assert seen.index("filling the cache") == len(seen) - 1 - seen[::-1].index("scoring") + 1
    assert seen.index("training") < seen.index("scoring") and seen[-1] == "training"
    assert outcome.prefix["computed"] == len(data)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step_budget": 1.0},
        {"method": "random", "among": "layers"},
        {"exclude": ("embeddings",), "warm_up_head": 2},
    ],
)
def test_a_cache_needs_a_mask_that_leaves_the_first_block_alone(folder, examples, tmp_path, changes):
    seen = []
    recipe = replace(CACHED, **{"step_budget": None, **changes})
    with pytest.raises(FishError, match=r"needs everything up to bert.encoder.layer.0 frozen, but the mask may reach"):
        tuned(folder, examples, recipe, prefix_folder=tmp_path / "p", progress=lambda phase, *_: seen.append(phase))
    assert not seen and not (tmp_path / "p").exists()  # before anything is scored or trained


def test_a_cache_that_is_refused_later_leaves_no_folder(folder, examples, tmp_path):
    with pytest.raises(FishError, match=r"entries in bert.encoder.layer.0, so there is no frozen block"):
        tuned(folder, examples, replace(CACHED, step_budget=None, method="biases"), prefix_folder=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_mask_that_is_kept_above_by_names_needs_no_budget(folder, examples, tmp_path):
    recipe = replace(CACHED, step_budget=None, exclude=("embeddings", "layer.0"), epochs=1)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("mine")
    _, data, outcome = tuned(folder, examples, recipe, prefix_folder=tmp_path / "p")
    assert outcome.prefix["served"] == len(data)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"block": "2x2"}, "block='2x2'"), ({"step_budget": 0.6, "block": "rows"}, "step_budget=0.6, block='rows'")],
)
def test_a_mask_given_cannot_heed_a_budget_or_blocks(folder, examples, changes, named):
    mask = Mask.from_indices({"bert.encoder.layer.1.output.dense.bias": [0]})
    with pytest.raises(ValueError, match=f"a mask chosen beforehand does not go with {named}: leave it out"):
        tuned(folder, examples, replace(TINY, **changes), mask=mask)
