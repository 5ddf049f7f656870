"""The mask of every method that chooses one, against the library's own parts or a loop written here."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fishmask.choose import choose, movement, narrow
from fishmask.data import Encoded, encode, read_examples
from fishmask.errors import Diverged
from fishmask.fisher import scores
from fishmask.hub import load_for_training
from fishmask.mask import Mask
from fishmask.recipe import Recipe
from fishmask.rivals import diff_pruning
from fishmask.train import fit
from tests import tiny

RECIPE = Recipe(density=0.1, learning_rate=3e-3, epochs=2, batch_size=8, max_length=16, examples=20, dense_rate=1e-3)
HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that loads the tiny model afresh, and its data of 48 rows."""
    place = tmp_path_factory.mktemp("choose")
    folder = str(tiny.model_folder(place / "model"))
    examples = read_examples(tiny.table(place / "train.tsv"), "text", "label")
    data = encode(examples, load_for_training(folder, examples.classes).tokenizer, 16)
    return lambda: (load_for_training(folder, examples.classes).model, data)


class Counting(nn.Module):
    """Batch norm and a buffer that counts forwards, behind the interface of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.classifier = nn.Embedding(9, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(6), persistent=False)

    def forward(self, input_ids, labels=None):
        self.seen += 1
        self.scale *= 1.01
        logits = self.classifier(self.norm(self.embed(input_ids).mean(1)) * self.scale)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def counted_data():
    ids = torch.randint(9, (40, 5), generator=torch.Generator().manual_seed(1)).tolist()
    return Encoded({"input_ids": ids}, {"input_ids": 0}, torch.arange(40) % 2)


def state(model):
    tensors = {**dict(model.named_parameters()), **{f"buffer {name}": b for name, b in model.named_buffers()}}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def unchanged(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("limit", [None, 0, 3])
def test_movement_leaves_no_trace_even_when_it_is_cut_short(limit):
    model = Counting()
    before = state(model)

    def progress(phase, done, total):
        assert (phase, total) == ("dense training", 10)
        assert not torch.equal(model.classifier.weight, before["classifier.weight"]) and model.seen == done
        if done == limit:
            raise KeyboardInterrupt

    recipe = replace(RECIPE, method="movement", dense_epochs=2, dense_rate=1e30 if limit == 0 else 1e-2)
    if limit is None:
        found = movement(model, counted_data(), recipe, progress)
        assert found.keys() == dict(model.named_parameters()).keys()
    else:
        with pytest.raises(Diverged if limit == 0 else KeyboardInterrupt):
            movement(model, counted_data(), recipe, progress)
    unchanged(model, before)


def test_movement_scores_are_what_a_dense_training_moves(start):
    model, data = start()
    recipe = replace(RECIPE, method="movement", dense_epochs=2, weight_decay=0.1, clip=0.5)
    reference = copy.deepcopy(model)
    torch.manual_seed(3)  # dropout
    found = movement(model, data, recipe)

    torch.manual_seed(3)
    reference.train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    batches = [data.batch(rows) for seed in (500, 1500) for rows in data.shuffled(8, seed=seed)]
    assert len(batches) == 12
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 12)
        optimizer.zero_grad()
        reference(**batch).loss.backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
        for p in reference.parameters():
            p.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
    for name, p in reference.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding, which Adam blows up
            moved = (p - model.get_parameter(name)).abs().detach()
            torch.testing.assert_close(found[name], moved, rtol=1e-2, atol=2e-6)
    assert max(float(score.max()) for score in found.values()) > 5e-3


@pytest.mark.parametrize("limit", [None, 2])
def test_narrowing_keeps_the_candidates_that_move_most_and_leaves_the_model(start, limit):
    model, data = start()
    before = state(model)
    recipe = replace(
        RECIPE, method="narrowing", density=0.05, candidates=4, epochs=3, search_epochs=1, search_rate=1e-2
    )
    seen, moved = [], {}

    def progress(phase, done, total):
        seen.append((phase, done, total))
        if done == limit:
            raise KeyboardInterrupt
        moved.update({name: (p - before[name]).abs().detach() for name, p in model.named_parameters()})

    if limit is None:
        mask, values = narrow(model, data, recipe, HEAD, progress)
        assert seen == [("narrowing", step, 6) for step in range(1, 7)]
        k, head = int(0.05 * mask.n), sum(before[name].numel() for name in HEAD)
        assert mask.k == k and values.keys() == set(HEAD)
        assert all(torch.equal((values[n].view(-1) - before[n].view(-1)).abs(), moved[n].view(-1)) for n in HEAD)
        candidates = torch.cat([scores[scores > 0] for name, scores in moved.items() if name not in HEAD])
        assert 3 * (k - head) < len(candidates) <= 4 * (k - head)
        least = candidates.topk(k - head).values.min()
        body = [name for name in mask.indices if name not in HEAD]
        assert all((moved[name].view(-1)[mask.indices[name]] >= least).all() for name in body)
    else:
        with pytest.raises(KeyboardInterrupt):
            narrow(model, data, recipe, HEAD, progress)
    unchanged(model, before)


def test_movement_chooses_the_entries_that_moved_most(start):
    model, data = start()
    recipe = replace(RECIPE, method="movement", exclude=("bert.embeddings*",))
    torch.manual_seed(0)
    mask = choose(model, data, recipe, HEAD)
    torch.manual_seed(0)
    assert mask == Mask.from_scores(movement(model, data, recipe), 0.1, keep=HEAD, exclude=recipe.exclude)
    assert mask.k == int(0.1 * mask.n) and not any("embeddings" in name for name in mask.indices)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"method": "fisher"}),
        ({"score": "absolute"}, {"method": "absolute"}),
        ({"labels": "expected"}, {"method": "fisher", "labels": "expected"}),
        ({"labels": "sampled", "seed": 5}, {"method": "fisher", "labels": "sampled", "seed": 5}),
        ({"engine": "loop"}, {"method": "fisher", "engine": "loop"}),
        ({"method": "gradient"}, {"method": "gradient"}),
        ({"method": "snip"}, {"method": "snip"}),
        ({"block": "rows"}, {"method": "fisher"}),
    ],
)
def test_scores_choose_as_the_library_does(start, changes, options):
    model, data = start()
    before, recipe = state(model), replace(RECIPE, **changes)
    seen = []
    mask = choose(model, data, recipe, HEAD, lambda *args: seen.append(args))
    unchanged(model, before)
    batches, block = data.sample(20, 8, recipe.seed), recipe.block or None
    assert mask == Mask.from_scores(scores(model, batches, examples=20, **options), 0.1, keep=HEAD, block=block)
    assert seen == [("scoring", 8, 20), ("scoring", 16, 20), ("scoring", 20, 20)]


def test_masks_without_data(start):
    model, data = start()
    exclude = ("*embeddings*",)
    assert choose(model, data, replace(RECIPE, method="random", seed=4, exclude=exclude), HEAD) == Mask.random(
        model, 0.1, 4, keep=HEAD, exclude=exclude
    )
    assert choose(model, data, replace(RECIPE, method="magnitude", exclude=exclude), HEAD) == Mask.magnitude(
        model, 0.1, keep=HEAD, exclude=exclude
    )
    assert choose(model, data, replace(RECIPE, method="random", seed=4, block="2x3"), HEAD) == Mask.random(
        model, 0.1, 4, keep=HEAD, block=(2, 3)
    )
    assert choose(model, data, replace(RECIPE, method="magnitude", block="columns"), HEAD) == Mask.magnitude(
        model, 0.1, keep=HEAD, block="columns"
    )
    biases = choose(model, data, replace(RECIPE, method="biases"), HEAD)
    assert set(biases.indices) == {name for name, _ in model.named_parameters() if name.endswith("bias")} | set(HEAD)


@pytest.mark.parametrize("method", ["full", "lora", "shira", "diff"])
def test_methods_that_choose_nothing_by_themselves_are_refused(start, method):
    model, data = start()
    with pytest.raises(ValueError, match=f"method='{method}' chooses no entries by itself"):
        choose(model, data, replace(RECIPE, method=method))


@pytest.mark.parametrize("method", ["movement", "diff"])
def test_dense_methods_in_the_training_loop_train_the_mask_that_they_found(start, method):
    recipe = replace(RECIPE, method=method, dense_epochs=2, learning_rate=1e-9)
    model, data = start()
    phases = []
    outcome = fit(model, data, recipe, head=HEAD, progress=lambda phase, done, total: phases.append((phase, total)))
    assert list(dict.fromkeys(phases)) == [("dense training", 12), ("training", 12)]
    mask = outcome.tuning.mask
    assert outcome.entries == mask.k == int(0.1 * mask.n) and outcome.seconds_scoring > 0
    fresh = start()[0]
    torch.manual_seed(recipe.seed)
    if method == "diff":
        wanted, values = diff_pruning(fresh, data, recipe, HEAD, 12)
    else:
        wanted, values = choose(fresh, data, recipe, HEAD), {}
    assert mask == wanted
    # At so low a rate the trained model is where the training on the mask began: at the differences, or rewound.
    for name, p in model.named_parameters():
        expected = fresh.get_parameter(name).detach().clone()
        if name in values:
            expected.view(-1)[mask.indices[name]] = values[name]
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-7)
    assert (Mask.between(fresh, model) - mask).k == 0


def test_training_in_bfloat16_leaves_float32_weights_and_an_exact_delta(start):
    models = {}
    for precision in ("float32", "bfloat16"):
        model, data = start()
        outcome = fit(model, data, replace(RECIPE, precision=precision), head=HEAD)
        assert all(p.dtype == torch.float32 for p in (*model.parameters(), *outcome.tuning.parameters()))
        fresh = start()[0]
        outcome.tuning.delta().apply(fresh)
        assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in model.named_parameters())
        models[precision] = outcome
    losses = [outcome.history[-1]["train_loss"] for outcome in models.values()]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    # The scores come before the training and are not cut short.
    assert models["float32"].tuning.mask == models["bfloat16"].tuning.mask
