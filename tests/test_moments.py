"""An optimizer's state, gathered by value and given back."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fishmask import tree
from fishmask.moments import Moments, check_groups, check_members, gather, give_back
from tests.test_tree import same, words

SIZES = {"a": 3, "b": 1, "c": 5}
K = sum(SIZES.values())


def values_of(sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in sizes.items()}


def train(values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for p in values.values():
            p.grad = p.detach().cos()
        optimizer.step()


def stored(moments: Moments) -> Moments:
    """As a commit keeps them."""
    packed, data = tree.pack(moments.rest)
    vectors = {key: vector.clone() for key, vector in moments.vectors.items()}
    return Moments(vectors, tree.unpack(json.loads(json.dumps(packed, allow_nan=False)), data))


def state_of(values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    found = {name: optimizer.state.get(p, {}) for name, p in values.items()}
    return copy.deepcopy({name: {key: state[key] for key in sorted(state)} for name, state in found.items()})


def test_moments_are_one_vector_per_kind_and_little_besides() -> None:
    values = values_of({f"p{i}": 1 + i % 7 for i in range(400)})
    optimizer = torch.optim.AdamW(values.values(), lr=0.1, amsgrad=True)
    train(values, optimizer)
    moments = gather(values, optimizer)
    k = sum(p.numel() for p in values.values())
    assert {key: tuple(vector.shape) for key, vector in moments.vectors.items()} == {
        "exp_avg": (k,), "exp_avg_sq": (k,), "max_exp_avg_sq": (k,),
    }  # fmt: skip
    assert same(moments.vectors["exp_avg"], torch.cat([optimizer.state[p]["exp_avg"] for p in values.values()]))
    assert same(moments.rest["scalars"], {"step": torch.full((400,), 2.0)})
    packed, _ = tree.pack(moments.rest)
    assert len(json.dumps(packed)) < 1000
    assert moments.rest["other"] == {}


def test_what_is_gathered_does_not_follow_the_training() -> None:
    values = values_of({"a": 3})  # one tensor: nothing to be laid end to end
    optimizer = torch.optim.AdamW(values.values(), lr=0.1)
    train(values, optimizer)
    moments = gather(values, optimizer)
    before = copy.deepcopy(moments)
    train(values, optimizer)
    assert same(moments.vectors, before.vectors)
    assert same(moments.rest["scalars"], before.rest["scalars"])


def test_what_is_given_back_is_nobody_elses() -> None:
    values = values_of({"a": 3})
    optimizer = torch.optim.AdamW(values.values(), lr=0.1)
    train(values, optimizer)
    moments = gather(values, optimizer)
    before = copy.deepcopy(moments)
    others = [values_of({"a": 3}, seed) for seed in (1, 2)]
    optimizers = [torch.optim.AdamW(other.values(), lr=0.1) for other in others]
    for other, its in zip(others, optimizers, strict=True):
        give_back(other, its, moments)
        train(other, its)
    assert same(moments.vectors, before.vectors)


def test_groups_get_their_members_and_options_back() -> None:
    def make(values: dict[str, nn.Parameter], first: str, **options: Any) -> torch.optim.Optimizer:
        groups = [{"params": [(first, values[first])], **options}]
        groups.append({"params": [(name, p) for name, p in values.items() if name != first]})
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    values, others = values_of(), values_of(seed=1)
    optimizer = make(values, "c", weight_decay=0.5, lr=0.7)
    train(values, optimizer)
    optimizer.param_groups[1]["initial_lr"] = 0.3
    other = make(others, "a")
    train(others, other, 1)
    give_back(others, other, stored(gather(values, optimizer)))
    assert same(state_of(others, other), state_of(values, optimizer))
    names = [
        [next(name for name, q in others.items() if q is p) for p in group["params"]] for group in other.param_groups
    ]
    assert names == [["c"], ["a", "b"]]
    assert [group["param_names"] for group in other.param_groups] == names
    for found, expected in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert same(
            {key: found[key] for key in sorted(found) if key != "params"},
            {key: expected[key] for key in sorted(expected) if key != "params"},
        )


@pytest.mark.parametrize("order", [["c", "a", "b"], ["b", "c", "a"], ["a", "b", "c"]])
def test_members_in_any_order(order: list[str]) -> None:
    values, others = values_of(), values_of(seed=1)
    optimizer = torch.optim.Adam([values[name] for name in order], lr=0.1)
    train(values, optimizer)
    other = torch.optim.Adam(others.values(), lr=0.5)
    give_back(others, other, stored(gather(values, optimizer)))
    assert same(state_of(others, other), state_of(values, optimizer))
    assert [id(p) for p in other.param_groups[0]["params"]] == [id(others[name]) for name in order]


def test_state_that_only_some_have() -> None:
    values, others = values_of(), values_of(seed=1)
    optimizer = torch.optim.AdamW(values.values(), lr=0.1)
    values["b"].requires_grad_(False)
    for name in ("a", "c"):
        values[name].grad = torch.ones_like(values[name])
    optimizer.step()
    assert not optimizer.state[values["b"]]
    other = torch.optim.AdamW(others.values(), lr=0.1)
    train(others, other)
    give_back(others, other, stored(gather(values, optimizer)))
    assert same(state_of(others, other), state_of(values, optimizer))


def test_an_optimizer_that_has_not_stepped() -> None:
    values = values_of()
    optimizer = torch.optim.AdamW(values.values(), lr=0.1)
    moments = stored(gather(values, optimizer))
    assert moments.vectors == {}
    train(values, optimizer)
    give_back(values, optimizer, moments)
    assert all(not state for state in state_of(values, optimizer).values())


class Odd(torch.optim.SGD):
    """Keeps state of all shapes, under names of its own, and beside state and groups."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.extra = {"seen": 0}

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            state["table"] = torch.arange(2.0 * p.numel()).view(2, -1) + state["count"]
            state["pair"] = (p.detach().clone(), None)
            state["blocks"] = torch.full((2,), float(state["count"]))
        self.state["all"]["norm"] = torch.tensor(3.5)
        self.extra["seen"] += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "extra": dict(self.extra)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.extra = dict(state_dict["extra"])
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("sizes", [SIZES, {"a": 2}, {"a": 1, "b": 1}], ids=str)
def test_optimizers_that_keep_other_things(sizes: dict[str, int]) -> None:
    values, others = values_of(sizes), values_of(sizes, seed=1)
    optimizer, other = Odd(values.values()), Odd(others.values())
    train(values, optimizer, 3)
    give_back(others, other, stored(gather(values, optimizer)))
    assert same(state_of(others, other), state_of(values, optimizer))
    assert same(dict(other.state["all"]), {"norm": torch.tensor(3.5)})
    assert other.extra == {"seen": 3}
    train(values, optimizer)
    with torch.no_grad():
        for p, q in zip(values.values(), others.values(), strict=True):
            q.copy_(p)
    train(others, other, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=2 * K, max_size=2 * K))
def test_every_bit_of_the_moments_comes_back(numbers: list[int]) -> None:
    raw = torch.tensor([number & 0xFFFFFFFF for number in numbers], dtype=torch.uint32).view(torch.float32)
    values, others = values_of(), values_of(seed=1)
    optimizer, other = torch.optim.Adam(values.values()), torch.optim.Adam(others.values())
    train(values, optimizer)
    parts: list[Tensor] = list(raw.split([size for size in SIZES.values() for _ in range(2)]))
    for p in values.values():
        optimizer.state[p].update(exp_avg=parts.pop(0), exp_avg_sq=parts.pop(0))
    give_back(others, other, stored(gather(values, optimizer)))
    assert same(state_of(others, other), state_of(values, optimizer))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_optimizer_of_other_values_is_refused() -> None:
    values = values_of()
    for held, text in (
        (values_of().values(), "the optimizer lacks 3 of this Tuning's 3 parameters"),
        ([values["a"]], "the optimizer lacks 2 of this Tuning's 3 parameters"),
        ([*values.values(), nn.Parameter(torch.ones(1))], "the optimizer trains 1 parameters outside the mask"),
    ):
        optimizer = torch.optim.SGD(held, lr=0.1)
        for check in (check_members, gather):
            with pytest.raises(ValueError, match=text):
                check(values, optimizer)


def test_another_number_of_groups_is_refused() -> None:
    values = values_of()
    moments = gather(values, torch.optim.SGD(values.values(), lr=0.1))
    optimizer = torch.optim.SGD([{"params": [p]} for p in values.values()], lr=0.1)
    with pytest.raises(ValueError, match=r"has 3 parameter groups, the commit's had 1: build it as it was built then"):
        check_groups(optimizer, moments)


def test_the_state_of_another_kind_of_optimizer_is_refused() -> None:
    values = values_of()
    moments = gather(values, torch.optim.SGD(values.values(), lr=0.1))
    check_groups(torch.optim.SGD(values.values(), lr=0.2), moments)
    with pytest.raises(ValueError, match="is AdamW, the commit's was SGD"):
        check_groups(torch.optim.AdamW(values.values()), moments)
