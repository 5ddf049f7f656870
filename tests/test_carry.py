import pytest
import torch
from torch import nn

from fishmask.carry import carried, check_carriable


def test_carried_matches_entries_by_index() -> None:
    old, new = torch.tensor([1, 4, 9]), torch.tensor([0, 4, 5, 9, 12])
    assert carried(torch.tensor([1.0, 2.0, 3.0]), old, new).tolist() == [0, 2, 0, 3, 0]
    assert carried(torch.tensor([1, 2, 3], dtype=torch.int8), old, old).tolist() == [1, 2, 3]
    assert carried(torch.tensor([1.0, 2.0, 3.0]), old, torch.tensor([2])).tolist() == [0]


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.Rprop]
)
def test_optimizers_with_one_number_per_value_can_be_carried(make: type[torch.optim.Optimizer]) -> None:
    values = nn.Parameter(torch.ones(5))
    optimizer = make([values], lr=0.1)
    values.sum().backward()
    optimizer.step()
    check_carriable(optimizer, [values])
