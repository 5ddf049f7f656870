"""The quality of predictions, against counts by hand and formulas written out."""

import builtins
import math
import sys

import numpy as np
import pytest
import torch

from fishmask.errors import FishError
from fishmask.measure import quality


def logits(predicted, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def test_classes_against_counts_by_hand():
    # true positives 2, false negatives 1, false positives 1, true negatives 4
    found = quality(logits([1, 1, 0, 1, 0, 0, 0, 0], 2), torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]))
    assert found == pytest.approx({"accuracy": 6 / 8, "f1": 4 / 6, "mcc": (2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5)})


def test_f1_of_several_classes_is_their_mean_also_with_one_that_never_comes():
    found = quality(logits([0, 0, 1, 1], 3), torch.tensor([0, 1, 1, 1]))
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


@pytest.mark.parametrize(
    ("wanted", "accuracy", "f1"), [([0, 1, 1], 2 / 3, 0.8), ([1, 1, 1], 1.0, 1.0), ([0], 0.0, 0.0)]
)
def test_a_single_predicted_class_has_no_correlation_and_no_warning(wanted, accuracy, f1):
    found = quality(logits([1] * len(wanted), 2), torch.tensor(wanted))
    assert found == pytest.approx({"accuracy": accuracy, "f1": f1, "mcc": 0.0})


def test_numbers_with_ties_against_the_formula():
    outputs, targets = torch.tensor([[1.0], [2.0], [2.0], [10.0]]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    found = quality(outputs, targets)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 2, 10], [1, 3, 2, 4])[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert found["mse"] == pytest.approx((0 + 1 + 0 + 36) / 4)


@pytest.mark.parametrize("outputs", [[1.0, 1.0, 1.0], [1.0, 1.0 + 1e-15, 1.0], [math.nan, 1.0, 2.0]])
def test_constant_or_undefined_numbers_have_no_correlation_and_no_warning(outputs):
    found = quality(torch.tensor(outputs, dtype=torch.float64)[:, None], torch.tensor([1.0, 2.0, 3.0]))
    assert (found["pearson"], found["spearman"]) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_one_number_has_no_correlation():
    assert quality(torch.ones(1, 1), torch.ones(1)) == {"pearson": 0.0, "spearman": 0.0, "mse": 0.0}


def test_a_missing_scikit_learn_is_named(monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.delitem(sys.modules, "sklearn.metrics", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FishError, match=r"metrics need scikit-learn: pip install 'fishmask\[hf\]'"):
        quality(torch.ones(1, 1), torch.ones(1))
