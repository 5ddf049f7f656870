"""Which likelihood a batch means, its cotangents, and the labels that do not fit."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask import fisher
from fishmask.likelihoods import Likelihood, Problem
from tests.cases import BERT, GPT2, T5, case, hf, tokens
from tests.reference import assert_close, loop


class Given(nn.Module):
    """Returns its parameter, so that the output is what the test says."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.z + 0 * x.sum()


def cotangents(output: Tensor, targets: Tensor | None, labels="given", **options) -> list[Tensor]:
    batch = (torch.zeros(len(output)), targets)
    return list(Likelihood(labels, **options)(Given(output), batch, 0).cotangents())


def fisher_matrix(columns: list[Tensor]) -> Tensor:
    """Sum of outer products, for the only example there is."""
    return sum(torch.outer(a.flatten().double(), a.flatten().double()) for a in columns)


# -- cotangents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 200.0])
def test_expected_classes_need_one_pass_fewer_than_there_are(classes, scale):
    z = torch.randn(1, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    columns = cotangents(z, torch.tensor([0]), "expected")
    p = z.softmax(-1)[0]
    assert len(columns) == classes - 1
    assert torch.allclose(fisher_matrix(columns), p.diag() - torch.outer(p, p), rtol=1e-9, atol=1e-14)


def test_expected_classes_with_a_class_that_is_impossible():
    z = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64)
    p = z.softmax(-1)[0]
    columns = cotangents(z, torch.tensor([0]), "expected")
    assert torch.allclose(fisher_matrix(columns), p.diag() - torch.outer(p, p), atol=1e-15)


def test_expected_positions_are_independent_and_ignored_ones_do_not_count():
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.tensor([[0, -100, 2, -100], [-100, 1, 0, 2]])
    columns = cotangents(z, y, "expected")
    assert len(columns) == 3 * 2  # the third counted position exists in one example only, and shares no pass
    for n in range(2):
        blocks = [
            (p.diag() - torch.outer(p, p)) * (label >= 0)
            for p, label in zip(z[n].softmax(-1), y[n].tolist(), strict=True)
        ]
        assert torch.allclose(fisher_matrix([a[n] for a in columns]), torch.block_diag(*blocks), atol=1e-14)


def test_given_cotangents_are_the_derivatives_of_the_loss():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(4, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (4, 5), generator=g)
    y[1, 2:] = -100
    (expected,) = torch.autograd.grad(F.cross_entropy(z.transpose(1, 2), y, reduction="sum"), z)
    assert torch.allclose(cotangents(z.detach(), y)[0], expected)
    t = torch.randn(4, 5, 3, generator=g, dtype=torch.float64)
    assert torch.allclose(cotangents(z.detach(), t)[0], z.detach() - t)


def test_sampled_classes_follow_the_probabilities():
    z = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64).expand(20_000, -1)
    (a,) = cotangents(z, torch.zeros(20_000, dtype=torch.long), "sampled", seed=1)
    drawn = (z.softmax(-1) - a).round()  # one-hot
    assert torch.equal(drawn.sum(-1), torch.ones(20_000, dtype=torch.float64))
    assert torch.allclose(drawn.mean(0), z[0].softmax(-1), atol=0.015)


def test_sampled_bernoulli_and_gaussian_have_the_right_variance():
    z = torch.full((20_000, 1), 0.7, dtype=torch.float64)
    p = torch.sigmoid(z[0, 0])
    bernoulli = Problem("bernoulli", z, None).sampled(0, 0)
    assert torch.allclose(bernoulli.square().mean(), p * (1 - p), atol=0.01)
    (gaussian,) = cotangents(z, z, "sampled")
    assert abs(gaussian.mean()) < 0.03 and abs(gaussian.var() - 1) < 0.05


def test_expected_bernoulli_is_diagonal():
    z = torch.tensor([[0.3, -2.0, 9.0]], dtype=torch.float64)
    p = z.sigmoid()[0]
    assert torch.allclose(fisher_matrix(list(Problem("bernoulli", z, None).expected())), (p * (1 - p)).diag())


def test_numbers_without_a_last_dimension_of_one_are_one_output_each():
    z, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[0.0], [0.0], [1.0]])
    assert torch.equal(cotangents(z, y)[0], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(cotangents(z[:, None], y.squeeze(1))[0], torch.tensor([[1.0], [2.0], [3.0]]))
    assert [a.tolist() for a in cotangents(z, y, "expected")] == [[1.0, 1.0, 1.0]]


# -- Hugging Face models ----------------------------------------------------------------------------------------------


def bert(**settings) -> nn.Module:
    return hf("BertForSequenceClassification", "BertConfig", **BERT, **settings)()


def hf_loss(model: nn.Module, batch, n: int, **changed) -> Tensor:
    return model(**{k: v[n : n + 1] for k, v in (batch | changed).items()}).loss


def summed_squares(model: nn.Module, losses) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss in losses:
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for name, g in zip(total, found, strict=True):
            total[name] += 0 if g is None else g.square()
    return total


def test_regression_head():
    model, batch = bert(num_labels=1), tokens("class")(3, 0)
    batch["labels"] = batch["labels"].float() - 0.3
    expected = summed_squares(model, (hf_loss(model, batch, n) / 2 for n in range(3)))  # theirs has no one half
    for shape in ((3,), (3, 1)):
        assert_close(fisher(model, [batch | {"labels": batch["labels"].view(shape)}], examples=3), expected)
    whole = {k: v[:1] for k, v in batch.items()}
    expected = summed_squares(model, [model(input_ids=whole["input_ids"]).logits.sum()])
    assert_close(fisher(model, [whole], examples=1, labels="expected"), expected)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", None])
def test_several_labels_at_once(problem_type):
    model, batch = bert(num_labels=4, problem_type=problem_type), tokens("class")(3, 0)
    batch["labels"] = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    found = fisher(model, [batch], examples=3)
    assert model.config.problem_type == problem_type  # their forward would set it
    model.config.problem_type = "multi_label_classification"
    assert_close(found, summed_squares(model, (4 * hf_loss(model, batch, n) for n in range(3))))  # theirs is the mean


def test_a_language_model_sums_over_positions():
    model, batch = case("gpt2").make(), case("gpt2").batch(3, 0)
    counted = batch["labels"].shape[1] - 1
    expected = summed_squares(
        model, (counted * F.cross_entropy(model(input_ids=x[None]).logits[0, :-1], x[1:]) for x in batch["input_ids"])
    )
    assert_close(fisher(model, [batch], examples=3), expected)


def test_a_classifier_on_a_causal_model_is_a_classifier():
    model = hf("GPT2ForSequenceClassification", "GPT2Config", **GPT2, num_labels=3)()
    batch = tokens("class", padded=True)(3, 0)
    assert_close(
        fisher(model, [batch], examples=3), summed_squares(model, (hf_loss(model, batch, n) for n in range(3)))
    )


@pytest.mark.filterwarnings("ignore:.*one example at a time")
def test_decoder_inputs_that_are_given_are_used():
    model = hf("T5ForConditionalGeneration", "T5Config", **T5)()
    batch = tokens("answer")(2, 0)
    shifted = fisher(model, [batch | {"decoder_input_ids": model._shift_right(batch["labels"])}], examples=2)
    assert_close(fisher(model, [batch], examples=2), shifted)
    other = fisher(model, [batch | {"decoder_input_ids": batch["labels"]}], examples=2)
    assert not torch.allclose(other["shared.weight"], shifted["shared.weight"])


@pytest.mark.parametrize("name", ["bert", "gpt2", "bert-tokens"])
@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_labels_may_be_missing_where_they_are_not_used(name, labels):
    c = case(name)
    batch = {k: v[:, :4] if v.dim() > 1 else v for k, v in c.batch(2, 0).items()}
    if name == "bert-tokens":
        batch["labels"] = torch.zeros_like(batch["labels"]).where(batch["attention_mask"].bool(), -100)
    bare = {k: v for k, v in batch.items() if k != "labels"}
    assert_close(
        fisher(c.make(), [bare], examples=2, labels=labels), fisher(c.make(), [batch], examples=2, labels=labels)
    )


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_missing_labels_are_refused():
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="labels='given' needs labels, but the batch has none"):
        fisher(case("bert").make(), [batch], examples=2)
    with pytest.raises(ValueError, match=r"the batch has no labels, so its likelihood is not known.*pass loss="):
        fisher(nn.Embedding(4, 3), [{"input": torch.ones(2, dtype=torch.long)}], examples=2, labels="sampled")


def test_a_vocabulary_of_expected_labels_is_refused():
    model = hf("BertForMaskedLM", "BertConfig", **BERT | {"vocab_size": 3000})()
    batch = tokens("mask")(2, 0)
    batch["labels"][0] = 1
    with pytest.raises(ValueError, match=r"labels='expected' would take 20,993 backward passes.*use labels='sampled'"):
        fisher(model, [batch], examples=2, labels="expected")


@pytest.mark.parametrize(
    ("output", "targets", "message"),
    [
        ((4, 3), torch.zeros(4, 1, dtype=torch.long), r"integers of shape \[4\], got int64 of shape \[4, 1\]"),
        ((4, 3), torch.zeros(4, 3, dtype=torch.long), r"integers of shape \[4\], got int64 of shape \[4, 3\]"),
        ((4, 3), torch.zeros(4), r"the output's shape \[4, 3\], got \[4\] \(float32\)"),
        ((4, 1), torch.zeros(4, 4), r"the output's shape \[4, 1\], got \[4, 4\]"),
        ((4,), torch.zeros(4, dtype=torch.long), r"labels must be integers of shape \[\], got int64"),
        ((4, 3), torch.tensor([0, 1, 3, 2]), r"labels must lie in 0 to 2 \(-100 is ignored\), got 0 to 3"),
        ((4, 3), torch.tensor([0, 1, -1, 2]), r"labels must lie in 0 to 2 \(-100 is ignored\), got -1 to 2"),
        ((4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.long), r"\(classes last\)"),
        ((3, 3), torch.zeros(4, dtype=torch.long), r"one row per example: expected \[4, ...\], got \[3, 3\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused_and_never_broadcast(output, targets, message):
    with pytest.raises(ValueError, match=message):
        Likelihood()(Given(torch.zeros(output)), (torch.zeros(len(targets)), targets), 0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 2), torch.zeros(2), torch.zeros(2)), r"got a tuple of \(Tensor, Tensor, Tensor\)"),
        (torch.zeros(2, 2), "got Tensor"),
        ({"x": torch.zeros(2, 2), "labels": [0, 1]}, "batch\\['labels'\\] must be a tensor, got list"),
    ],
)
def test_batches_of_other_kinds_are_refused(batch, message):
    with pytest.raises(TypeError, match=message):
        fisher(nn.Linear(2, 2), [batch], examples=2)


def test_outputs_of_other_kinds_are_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    batch = (torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"must return a tensor, or have one as \.logits, got a tuple of"):
        fisher(Pair(2, 2), [batch], examples=2)


def test_a_model_with_another_loss_is_refused():
    model = hf("BertForQuestionAnswering", "BertConfig", **BERT)()
    with pytest.raises(TypeError, match=r"got QuestionAnsweringModelOutput; pass loss="):
        fisher(model, [{"input_ids": torch.ones(2, 4, dtype=torch.long)}], examples=2, labels="sampled")


def test_gaussian_scores_of_plain_numbers():
    batch = (torch.randn(3, 5), torch.randn(3))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    assert_close(fisher(model, [batch], examples=3), loop(model, batch))
