"""Canonical names, aliases of tied parameters, and patterns."""

import pytest
import torch
from torch import nn

from fishmask.params import aliases, canonical_parameters, matching
from tests.cases import case

NAMES = [
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.1.attention.self.query.weight",
    "bert.encoder.layer.1.output.dense.bias",
    "bert.encoder.layer.10.output.dense.bias",
    "pre_classifier.weight",
    "classifier.weight",
    "head.classifier.bias",
]


def test_tied_parameters_have_one_canonical_name() -> None:
    model = case("gpt2").make()
    names = aliases(model)
    assert names["lm_head.weight"] == names["transformer.wte.weight"] == "transformer.wte.weight"
    parameters = canonical_parameters(model)
    assert "lm_head.weight" not in parameters
    assert list(parameters) == [name for name, _ in model.named_parameters()]


def test_integer_parameters_are_not_listed() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert list(canonical_parameters(model)) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("classifier", [5, 6]),
        ("*classifier", [4, 5, 6]),
        ("layer.1", [1, 2]),
        ("layer.1*", [1, 2, 3]),
        ("layer.*.attention", [0, 1]),
        ("layer.[01].*.self", [0, 1]),
        ("bias", [2, 3, 6]),
        (NAMES[2], [2]),
        (["bias", "pre_classifier"], [2, 3, 4, 6]),
        ((), []),
    ],
)
def test_patterns_match_runs_of_whole_parts(pattern: str | list[str], places: list[int]) -> None:
    assert matching(NAMES, pattern, "keep") == [NAMES[i] for i in places]


def test_a_whole_name_matches_itself_alone() -> None:
    names = ["norm.weight", "layers.0.norm.weight", "norm.bias"]
    assert matching(names, "norm.weight", "exclude") == ["norm.weight"]
    assert matching(names, ["norm.weight", "layers"], "exclude") == names[:2]
    assert matching(names, "norm", "exclude") == names


@pytest.mark.parametrize("pattern", ["class", "layer.2", "classifier.bias.more", "Classifier", ""])
def test_a_pattern_without_a_match_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"exclude=.* matches no parameter"):
        matching(NAMES, ["bias", pattern], "exclude")


def test_the_refusal_offers_close_names() -> None:
    with pytest.raises(ValueError, match=r"close names: .*classifier"):
        matching(NAMES, "clasifier", "keep")
