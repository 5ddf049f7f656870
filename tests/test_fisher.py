"""Both engines against an independent reference, the arguments, and the other scores."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding

from fishmask import FishError, fisher
from fishmask.fisher import scores
from fishmask.params import canonical_parameters
from tests.cases import BERT, CASES, Case, case, hf, tokens
from tests.reference import (
    assert_close,
    falls_back,
    gradients,
    logits_and_labels,
    loop,
    one,
    reference,
    reference_model,
)

by_name = pytest.mark.parametrize("c", CASES, ids=str)


# -- exactness --------------------------------------------------------------------------------------------------------


@by_name
def test_given_labels(c):
    batch = c.batch(4, 1)
    expected = reference(c, batch, 4, "given")
    with falls_back(c):
        assert_close(fisher(c.make(), [batch], examples=4), expected)
    assert_close(fisher(c.make(), [batch], examples=4, engine="loop"), expected)


SMALL = [c for c in CASES if c.name not in ("bert-masked-lm", "gpt2", "llama", "t5", "mixtral")]


@pytest.mark.parametrize("c", SMALL, ids=str)
def test_expected_labels(c):
    batch = c.batch(3, 2)
    expected = reference(c, batch, 3, "expected")
    with falls_back(c):
        assert_close(fisher(c.make(), [batch], examples=3, labels="expected"), expected)
    assert_close(fisher(c.make(), [batch], examples=3, labels="expected", engine="loop"), expected)


def test_expected_labels_of_a_language_model():
    c = case("gpt2")
    batch = {k: v[:, :3] for k, v in c.batch(2, 3).items()}
    assert_close(fisher(c.make(), [batch], examples=2, labels="expected"), reference(c, batch, 2, "expected"))


@by_name
def test_sampled_labels_depend_on_neither_engine_nor_batch_size(c):
    batch = c.batch(4, 4)
    halves = [
        {k: v[i : i + 2] for k, v in batch.items()} if isinstance(batch, dict) else tuple(t[i : i + 2] for t in batch)
        for i in (0, 2)
    ]
    with falls_back(c):
        whole = fisher(c.make(), [batch], examples=4, labels="sampled", seed=7)
    with falls_back(c):
        assert_close(fisher(c.make(), halves, examples=4, labels="sampled", seed=7), whole)
    assert_close(fisher(c.make(), [batch], examples=4, labels="sampled", seed=7, engine="loop"), whole)
    other = fisher(c.make(), [batch], examples=4, labels="sampled", seed=8, engine="loop")
    assert any(not torch.equal(other[k], whole[k]) for k in whole)


@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_sampled_labels_agree_with_their_expectation(name):
    c, draws = case(name), 4000
    x, y = c.batch(1, 5)
    many = (x.expand(draws, -1), y.expand(draws, *y.shape[1:]))
    sampled = fisher(c.make(), [many], examples=draws, labels="sampled")
    assert_close({k: s / draws for k, s in sampled.items()}, reference(c, (x, y), 1, "expected"), tolerance=0.1)


@pytest.mark.parametrize("name", ["bert-padded", "conv", "gpt2", "t5"])
def test_exactly_the_asked_number_of_examples(name):
    c = case(name)
    whole = c.batch(9, 6)

    def cut(start: int, stop: int):
        return (
            {k: v[start:stop] for k, v in whole.items()}
            if isinstance(whole, dict)
            else tuple(t[start:stop] for t in whole)
        )

    with falls_back(c):
        in_threes = fisher(c.make(), [cut(0, 3), cut(3, 6), cut(6, 9)], examples=7)
    assert_close(in_threes, reference(c, whole, 7, "given"))
    with falls_back(c):
        assert_close(fisher(c.make(), [cut(n, n + 1) for n in range(9)], examples=7), in_threes)


def test_no_batch_is_taken_beyond_the_asked_number():
    c = case("mlp")
    batches = iter([c.batch(4, 0), c.batch(4, 1), c.batch(4, 2)])
    fisher(c.make(), batches, examples=8)
    assert len(list(batches)) == 1


def test_rows_never_looked_up_score_zero_and_unreached_parameters_too():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(2, 2)
            self.used.bias.requires_grad_(False)

        def forward(self, x):
            return self.used(x)

    for engine in ("batched", "loop"):
        found = fisher(Unused(), [case("mlp").batch(4, 0)], examples=4, engine=engine)
        assert found["used.bias"].count_nonzero() == 3  # frozen parameters are scored as well
        assert found["spare.weight"].count_nonzero() == found["spare.bias"].count_nonzero() == 0
        words = fisher(case("bert").make(), [case("bert").batch(4, 0)], examples=4, engine=engine)
        assert words["bert.embeddings.word_embeddings.weight"][30:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_half_precision_weights(dtype, engine):
    c = case("bert")
    batch = c.batch(4, 1)
    found = fisher(c.make().to(dtype), [batch], examples=4, engine=engine)
    assert_close(found, reference(c, batch, 4, "given"), tolerance=0.25 if dtype == torch.bfloat16 else 0.05)


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_double_precision_weights(engine):
    """Padding makes derivatives of exactly zero, which are skipped in every dtype."""
    c = case("bert-padded")
    batch = c.batch(4, 1)
    found = fisher(c.make().double(), [batch], examples=4, engine=engine)
    assert found["classifier.weight"].dtype == torch.float32
    assert_close(found, reference(c, batch, 4, "given"))


# -- absolute values --------------------------------------------------------------------------------------------------


def absolute(c, batch, **options):
    count = len(batch[1] if isinstance(batch, tuple) else batch["labels"])
    return scores(c.make(), [batch], method="absolute", examples=count, **options)


def assert_near(ours, theirs, tolerance=1e-5):
    """A key's bias, which is nothing but rounding, is larger beside the rest than among squares."""
    assert_close(ours, theirs, tolerance, floor=1e-2)


@by_name
def test_absolute_values_of_given_labels(c):
    batch = c.batch(4, 1)
    expected = reference(c, batch, 4, "given", torch.abs)
    with falls_back(c):
        assert_near(absolute(c, batch), expected)
    assert_near(absolute(c, batch, engine="loop"), expected)


ONE_LABEL = [c for c in SMALL if c.name not in ("sequence", "regression", "bert-tokens")]


@pytest.mark.parametrize("c", ONE_LABEL, ids=str)
def test_absolute_values_of_expected_labels(c):
    batch = c.batch(3, 2)
    expected = reference(c, batch, 3, "expected", torch.abs)
    with falls_back(c):
        assert_near(absolute(c, batch, labels="expected"), expected)
    assert_near(absolute(c, batch, labels="expected", engine="loop"), expected)


def test_absolute_values_of_two_expected_classes_take_one_pass():
    c = Case("bert-two", hf("BertForSequenceClassification", "BertConfig", **BERT, num_labels=2), tokens("class"))
    batch = c.batch(3, 2)
    batch["labels"].clamp_(max=1)
    assert_near(absolute(c, batch, labels="expected"), reference(c, batch, 3, "expected", torch.abs))


@by_name
def test_absolute_values_of_sampled_labels_are_the_same_in_both_engines(c):
    batch = c.batch(4, 4)
    with falls_back(c):
        found = absolute(c, batch, labels="sampled", seed=7)
    assert_near(found, absolute(c, batch, labels="sampled", seed=7, engine="loop"))


@pytest.mark.parametrize("bernoulli", [False, True])
def test_absolute_values_of_one_expected_number_or_flag(bernoulli):
    """One output, with labels drawn from the model's own distribution: their mean is the expectation."""
    settings = {"num_labels": 1, "problem_type": "multi_label_classification" if bernoulli else "regression"}
    c = Case("bert-one", hf("BertForSequenceClassification", "BertConfig", **BERT, **settings), tokens("class"))
    batch = c.batch(1, 2)
    many = {k: v.expand(2000, *v.shape[1:]).contiguous() for k, v in batch.items()}
    many["labels"] = torch.zeros(2000, 1)
    batch["labels"] = torch.zeros(1, 1)
    drawn = absolute(c, many, labels="sampled")
    assert_near({k: s / 2000 for k, s in drawn.items()}, absolute(c, batch, labels="expected"), tolerance=0.05)


@pytest.mark.parametrize("name", ["sequence", "regression", "bert-tokens", "gpt2"])
def test_absolute_values_of_several_expected_labels_are_refused(name):
    with pytest.raises(ValueError, match=r"one label for each example, got [2-7]: .* use labels='given' or 'sampled'"):
        absolute(case(name), case(name).batch(3, 2), labels="expected")


def test_absolute_values_in_half_precision_and_of_an_own_loss():
    c = case("bert-padded")
    batch = c.batch(4, 1)
    expected = reference(c, batch, 4, "given", torch.abs)

    def loss(model, batch):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")

    for engine in ("batched", "loop"):
        assert_near(absolute(c, batch, loss=loss, engine=engine), expected)
        half = scores(c.make().bfloat16(), [batch], method="absolute", examples=4, engine=engine)
        assert_near(half, expected, tolerance=0.25)


@pytest.mark.parametrize("parameter", [lambda m, x: x + m.w, lambda m, x: x * m.w.expand_as(x)])
def test_absolute_values_leave_the_gradients_of_autograd_alone(parameter):
    """The loop's gradients may be views, or one tensor handed out for two parameters."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))

        def forward(self, x):
            return (torch.tanh(parameter(self, x)) + self.v).sum(1)

    model, batch = Both(), (torch.randn(4, 5), torch.randn(4))
    for engine in ("batched", "loop"):
        found = scores(model, [batch], method="absolute", examples=4, engine=engine)
        assert_near(found, loop(model, batch, torch.abs))


# -- other losses and batches -----------------------------------------------------------------------------------------


def test_own_loss():
    c = case("bert-padded")
    batch = c.batch(4, 1)

    def loss(model, batch):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")

    for engine in ("batched", "loop"):
        found = fisher(c.make(), [batch], examples=4, loss=loss, engine=engine)
        assert_close(found, reference(c, batch, 4, "given"))


def test_hugging_face_batch_encoding_and_nested_inputs():
    c = case("bert")
    batch = c.batch(3, 1)
    expected = fisher(c.make(), [batch], examples=2)
    encoding = BatchEncoding(dict(batch))
    assert_close(fisher(c.make(), [encoding], examples=2), expected)
    assert encoding["input_ids"].shape[0] == 3  # the caller's batch is left alone

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = c.make()

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids).logits

    for inputs in ({"input_ids": batch["input_ids"]}, (batch["input_ids"],), [batch["input_ids"]]):
        found = fisher(Logits(), [(inputs, batch["labels"])], examples=2)
        assert_close({k.removeprefix("inner."): s for k, s in found.items()}, expected)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]).sum(), r"shape \[2\], got \[\]; use reduction='none'"),
        (lambda model, batch: model(batch[0]), r"shape \[2\], got \[2, 3\]"),
    ],
)
def test_an_own_loss_of_wrong_shape_is_refused(loss, message):
    c = case("mlp")
    with pytest.raises(ValueError, match=message):
        fisher(c.make(), [c.batch(4, 0)], examples=4, loss=loss)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_scores_that_are_not_finite_are_refused_by_name(engine):
    x, y = case("regression").batch(4, 0)
    y[3] = 1e30
    with pytest.raises(FishError, match=r"must be finite, but those of 0\.weight, 0\.bias, 2\.weight, 2\.bias are not"):
        fisher(case("regression").make(), [(x, y)], examples=4, engine=engine)


def test_a_model_without_a_gradient_is_refused():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(FishError, match="depends on no parameter"):
        fisher(Detached(5, 3), [case("mlp").batch(4, 0)], examples=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": "true"}, ValueError, "labels must be one of given, expected, sampled"),
        ({"engine": "fast"}, ValueError, "engine must be one of auto, batched, loop"),
        ({"examples": 0}, ValueError, "examples must be a positive integer, got 0"),
        ({"examples": 2.0}, ValueError, "examples must be a positive integer"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": lambda m, b: m, "labels": "sampled"}, ValueError, "a loss of your own"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, error, message):
    def batches():
        raise AssertionError("no batch may be taken")
        yield

    with pytest.raises(error, match=message):
        fisher(case("mlp").make(), batches(), **options)


def test_wrong_models_and_batches_are_refused():
    c = case("mlp")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fisher(lambda x: x, [c.batch(4, 0)])
    with pytest.raises(ValueError, match="no floating-point parameters"):
        fisher(nn.ReLU(), [c.batch(4, 0)])
    with pytest.raises(TypeError, match=r"wrap one batch: \[batch\]"):
        fisher(case("bert").make(), case("bert").batch(4, 0))
    with pytest.raises(ValueError, match="no examples"):
        fisher(c.make(), [])
    with pytest.raises(ValueError, match="first dimension is the examples"):
        fisher(c.make(), [{"name": "x"}])
    with pytest.raises(ValueError, match="one row per example"):  # positions first: cut along the wrong dimension
        x = torch.randn(4, 4, 8)
        fisher(nn.Linear(8, 3), [((x,), torch.randint(3, (5,)))], examples=2)


def test_too_few_examples_warn():
    c = case("mlp")
    with pytest.warns(UserWarning, match="only 4 examples were scored"):
        found = fisher(c.make(), [c.batch(4, 1)], examples=5)
    assert_close(found, reference(c, c.batch(4, 1), 4, "given"))


# -- the run ----------------------------------------------------------------------------------------------------------


def test_progress_goes_to_stderr(capfd):
    c = case("mlp")
    quiet = fisher(c.make(), [c.batch(4, 0)], examples=4)
    assert capfd.readouterr() == ("", "")
    shown = fisher(c.make(), [c.batch(4, 0)], examples=4, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "4/4" in err
    assert all(torch.equal(shown[k], quiet[k]) for k in quiet)


def test_the_same_call_gives_the_same_bits():
    c = case("bert-padded")
    first, second = (fisher(c.make(), [c.batch(5, 0)], examples=5) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


# -- the other scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("name", ["conv", "bert-padded", "gpt2"])
def test_gradient_and_snip(name, engine):
    c = case(name)
    batch = c.batch(4, 1)
    model = reference_model(c)
    parameters = canonical_parameters(model)
    loss = 0.0
    for n in range(3):
        loss = loss + F.cross_entropy(*logits_and_labels(c, model, one(batch, n)), reduction="sum")
    sums = gradients(loss, parameters)
    options = {"examples": 3, "engine": engine}
    found = scores(c.make(), [batch], method="gradient", **options)
    assert_close(found, {k: g.abs() for k, g in sums.items()}, floor=1e-2)
    snip = {k: (g * parameters[k]).abs().detach() for k, g in sums.items()}
    assert_close(scores(c.make(), [batch], method="snip", **options), snip, floor=1e-2)


def test_fisher_by_method_is_fisher():
    c = case("mlp")
    a = scores(c.make(), [c.batch(4, 0)], examples=3, labels="sampled", seed=3)
    b = fisher(c.make(), [c.batch(4, 0)], examples=3, labels="sampled", seed=3)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_magnitude_and_random_need_no_batches():
    model = case("bert").make()
    before = copy.deepcopy(model.state_dict())
    magnitude = scores(model, method="magnitude")
    parameters = canonical_parameters(model)
    assert all(torch.equal(magnitude[k], p.detach().abs()) for k, p in parameters.items())
    a, b, c = (scores(model, method="random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == torch.float32 for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a)
    values = torch.cat([s.flatten() for s in a.values()])
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_wrong_methods_are_refused():
    c = case("mlp")
    with pytest.raises(ValueError, match="method must be one of fisher, absolute, gradient, snip, magnitude, random"):
        scores(c.make(), [c.batch(4, 0)], method="best")
    with pytest.raises(ValueError, match="needs batches"):
        scores(c.make(), method="gradient")
    with pytest.raises(ValueError, match="makes every score of method='snip' zero"):
        scores(c.make(), [c.batch(4, 0)], method="snip", labels="expected")
