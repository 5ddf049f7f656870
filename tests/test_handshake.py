"""Workers compare facts before they exchange: what differs is told to all; a restored training goes on as it was."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fishmask
from fishmask import CheckpointLog, LocalRounds, Mask
from fishmask.ballot import Standing, propose
from fishmask.errors import HandshakeError, RoundError
from fishmask.handshake import agree, checksums
from fishmask.wire import Wire
from tests.team import Team, in_threads
from tests.test_rounds import network, own_mask


@pytest.fixture(scope="module")
def team() -> Any:
    with Team(2) as made:
        yield made


# --- facts ------------------------------------------------------------------------------------------------------------


def told(facts: list[Any]) -> tuple[str, dict[str, dict[str, list[int]]]]:
    """Have workers agree on facts; return the error of all, or nothing."""

    def work(wire: Wire) -> Any:
        try:
            agree(wire, facts[wire.rank])
        except HandshakeError as error:
            assert wire.gather(torch.tensor([wire.rank])).view(-1).tolist() == list(range(len(facts)))
            return str(error), error.disagreements
        return "", {}

    outcomes = in_threads(len(facts), work)
    for outcome in outcomes:
        assert outcome == outcomes[0]
    return outcomes[0]


def test_equal_facts_are_agreed_on() -> None:
    assert told([{"a": "1", "b": {"x": "2"}}] * 3) == ("", {})


def test_only_what_differs_is_told_with_the_ranks() -> None:
    text, disagreements = told([{"a": "1", "b": "alike"}, {"a": "2", "b": "alike"}, {"a": "1", "b": "alike"}])
    assert "a: 1 on ranks 0, 2; 2 on rank 1" in text
    assert "alike" not in text
    assert disagreements == {"a": {"1": [0, 2], "2": [1]}}


def test_of_long_lists_five_names_are_told() -> None:
    one = {f"w{number}": str(number) for number in range(9)}
    text, _ = told([{"weights": one}, {"weights": dict.fromkeys(one, "0") | {"w1": "1"}}])
    assert "weights: w2, w3, w4, w5, w6 and 2 more (digest" in text
    assert "load the same model everywhere" in text


def test_a_fact_that_one_lacks_and_another_order_are_told() -> None:
    assert "b: " in told([{"a": "1"}, {"a": "1", "b": "2"}])[0]
    assert "p: in another order" in told([{"p": {"x": "1", "y": "2"}}, {"p": {"y": "2", "x": "1"}}])[0]


def test_a_worker_in_a_round_and_one_that_compares_are_both_told() -> None:
    def work(wire: Wire) -> Any:
        try:
            if wire.rank == 0:
                agree(wire, {"mask": "m"})
            else:
                wrong = wire.rank == 2
                propose(wire, Standing(4, True, False, False, wrong, 7), "OSError: full" if wrong else "")
        except (HandshakeError, RoundError) as error:
            assert wire.gather(torch.tensor([wire.rank])).view(-1).tolist() == [0, 1, 2]
            return type(error), str(error)
        return None

    (zero, first), (one, second), (two, third) = in_threads(3, work)
    assert (zero, one, two) == (HandshakeError, RoundError, RoundError)
    assert "rank 1: has come to a round instead" in first
    assert "rank 2: OSError: full" in first
    assert second == third
    assert "rank 0: compares what it trains instead" in second


def test_checksums_tell_one_bit() -> None:
    tensor = torch.randn(100)
    other = tensor.clone()
    other.view(torch.int32)[50] ^= 1
    assert checksums({"w": tensor}) == checksums({"w": tensor.clone()})
    assert checksums({"w": tensor}) != checksums({"w": other})
    assert checksums({"w": tensor}) != checksums({"w": tensor.view(10, 10)})


def test_the_error_survives_a_pipe() -> None:
    error = pickle.loads(pickle.dumps(HandshakeError("they differ", {"a": {"1": [0], "2": [1]}})))
    assert (str(error), error.disagreements) == ("they differ", {"a": {"1": [0], "2": [1]}})


# --- states -----------------------------------------------------------------------------------------------------------


def starts_badly(rank: int, size: int, what: str) -> str:
    model = network()
    tuning = fishmask.attach(model, own_mask(model, rank, size))

    def outer(values: list[nn.Parameter]) -> Any:
        if what == "outer" and rank == 1:
            raise ArithmeticError("no such optimizer")
        return torch.optim.SGD(values, lr=0.5)

    rules = {"every": 2, "masks": "own", "reduction": "sum", "head": "mean", "payload": "int8"}
    try:
        rounds = LocalRounds(tuning, **rules, outer=outer)
        state = rounds.state_dict()
        if rank == 1 and what == "anchor":
            state["anchor"] = state["anchor"][:-1]
        if rank == 1 and what == "residual":
            state["residual"]["own"] = state["residual"]["own"][:-1]
        if rank == 1 and what == "round":
            state["number"] = 9
        rounds.load_state_dict(state)
        with pytest.raises(fishmask.FishError, match="call handshake"):
            rounds.round()
        rounds.handshake()
    except HandshakeError as error:
        if what != "outer":
            with pytest.raises(fishmask.FishError, match="call handshake"):
                rounds.round()
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("outer", "able to start: yes on rank 0; no: ArithmeticError: no such optimizer on rank 1"),
        ("anchor", "no: FishError: the anchor of this state has"),
        ("residual", "no: FishError: the residual of this state has"),
        ("round", "round: 0 on rank 0; 9 on rank 1: restore all workers from the same commit"),
        ("", ""),
    ],
)
def test_a_worker_that_cannot_start_is_told_on_all(team: Team, what: str, wanted: str) -> None:
    errors = team.run(starts_badly, what)
    assert errors[0] == errors[1]
    assert (wanted in errors[0]) if wanted else errors[0] == ""


OUTER = {
    "nesterov": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def goes_on(rank: int, size: int, folder: str, settings: dict[str, Any], outer: str, dtype: str, until: str) -> Any:
    """Train 8 steps undisturbed, or 4, or the last 4 from a commit after the first 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).to(getattr(torch, dtype))
    whole = Mask.random(model, 0.4, seed=1)
    mask = whole if "masks" not in settings else whole.split(size)[rank]
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    rounds = LocalRounds(tuning, every=2, outer=OUTER.get(outer), **settings)
    log = CheckpointLog(Path(folder) / f"worker{rank}")
    first = 0
    if until == "resumed":
        log.restore(tuning, optimizer, state={"rounds": rounds})
        rounds.handshake()
        first = 4
        assert rounds.number == 2
    for step in range(first, 4 if until == "half" else 8):
        generator = torch.Generator().manual_seed(100 * rank + step)
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(getattr(torch, dtype))).float(), y).backward()
        optimizer.step()
    if until == "half":
        log.commit(tuning, optimizer, step=4, state={"rounds": rounds})
    rounds.close()
    state = {name: tensor.double().numpy().copy() for name, tensor in model.state_dict().items()}
    return state, rounds.number, rounds._anchor.numpy().copy()


@pytest.mark.parametrize(
    ("settings", "outer", "dtype"),
    [
        ({}, "", "float32"),
        ({"payload": "int8"}, "adam", "bfloat16"),
        ({"masks": "own", "reduction": "sum"}, "nesterov", "bfloat16"),
        ({"masks": "own", "denominator": "holders", "payload": "bfloat16"}, "nesterov", "float32"),
    ],
    ids=str,
)
def test_a_resumed_training_equals_an_undisturbed_one(
    team: Team, tmp_path: Path, settings: dict[str, Any], outer: str, dtype: str
) -> None:
    wanted = team.run(goes_on, str(tmp_path / "whole"), settings, outer, dtype, "whole")
    team.run(goes_on, str(tmp_path / "log"), settings, outer, dtype, "half")
    resumed = team.run(goes_on, str(tmp_path / "log"), settings, outer, dtype, "resumed")
    for (state, number, anchor), (other, count, union) in zip(wanted, resumed, strict=True):
        assert number == count == 4
        np.testing.assert_array_equal(anchor.view("i4"), union.view("i4"))
        for name, tensor in state.items():
            np.testing.assert_array_equal(other[name], tensor, err_msg=name)
