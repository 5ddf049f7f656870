"""Rounds that fail: workers that die or stop in any phase, raise, or do something else; nothing changes by halves."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fishmask
from fishmask import LocalRounds, Mask
from fishmask.errors import FishError, HandshakeError, RoundError
from tests.team import Team
from tests.test_rounds import batch, descend, network, reference

EVERY = 2
FATAL = 2  # the round in which a worker dies


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team(3) as made:
        yield made


def bits(values: Tensor) -> Tensor:
    return values.detach().clone().view(torch.int32)


ADAM, PLAIN = partial(torch.optim.AdamW, lr=0.05), partial(torch.optim.SGD, lr=0.05)


def attached(optimizer: Callable[..., Any] = ADAM, **settings: Any) -> Any:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    return model, tuning, optimizer(tuning.parameters()), LocalRounds(tuning, **{"every": EVERY, **settings})


# --- workers that die -------------------------------------------------------------------------------------------------


def train_until_it_breaks(
    rank: int, size: int, victim: int, phase: str, number: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train; the victim sends itself a signal in a phase of a round. Return what the end was like."""
    model, tuning, optimizer, rounds = attached(**settings)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: dict[str, Any] = {"values": None}

    def mark(name: str) -> None:
        if name == "propose" and not settings.get("overlap"):
            seen["values"] = bits(tuning.values)
        if rank == victim and name == phase and rounds.number == FATAL - 1:
            os.kill(os.getpid(), number)

    rounds._phase = mark
    merged, begin = {}, time.perf_counter()
    told = None
    for step in range(5 * EVERY):
        if phase == "between" and rank == victim and rounds.number == FATAL - 1 and rounds.pending == EVERY - 1:
            os.kill(os.getpid(), number)
        begin = time.perf_counter()
        try:
            descend(model, optimizer, rank, step)
        except RoundError as error:
            told = error
            break
        merged.setdefault(rounds.number, {n: p.detach().numpy().copy() for n, p in model.named_parameters()})
    seconds = time.perf_counter() - begin
    assert told is not None, "no round failed"
    kept = bits(tuning.values)
    with pytest.raises(FishError, match="start the workers again"):
        descend(model, optimizer, rank, step)
    after = {name: p.detach() for name, p in model.named_parameters()}
    return {
        "reasons": told.reasons,
        "text": str(told),
        "number": rounds.number,
        "pending": rounds.pending,
        "untouched": seen["values"] is None or torch.equal(kept, seen["values"]),
        "outside": (Mask.between(base, after) - tuning.mask).k,
        "seconds": seconds,
        "merged": merged.get(rounds.number),
    }


def check_survivor(told: str, end: dict[str, Any], size: int, latest: int) -> None:
    assert told == ""
    assert end["reasons"] == {}
    assert "the connection between the workers broke off" in end["text"]
    assert end["untouched"]
    assert end["outside"] == 0
    assert end["number"] in (FATAL - 1, latest)
    wanted = reference(size, EVERY * end["number"], EVERY)
    for name, weight in wanted.items():
        np.testing.assert_array_equal(end["merged"][name].view("i4"), weight.view("i4"))


# A worker that dies before its vote is out takes the round with it. One that dies after it may leave survivors that
# have all votes, and commit, and others that have not: each of them is at one round or the other, and none goes on.
PHASES = [("between", FATAL - 1), ("propose", FATAL - 1), ("reduce", FATAL - 1), ("vote", FATAL - 1), ("commit", FATAL)]


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(("phase", "latest"), PHASES)
def test_survivors_of_a_killed_worker_are_as_before_the_round(victim: int, phase: str, latest: int) -> None:
    with Team(3, timeout=10) as team:
        team.start(train_until_it_breaks, victim, phase, signal.SIGKILL, {})
        results = team.results()
        assert results.pop(victim)[0] == "died"
        for told, end in results:
            check_survivor(told, end, 3, latest)
            assert end["seconds"] < 10
        assert [process.is_alive() for process in team.processes] == [rank != victim for rank in range(3)]


@pytest.mark.parametrize("phase", ["propose", "vote"])
def test_survivors_of_a_worker_killed_while_they_train_on(phase: str) -> None:
    with Team(3, timeout=10) as team:
        team.start(train_until_it_breaks, 1, phase, signal.SIGKILL, {"overlap": 1})
        results = team.results()
        assert results.pop(1)[0] == "died"
        for told, end in results:
            assert told == ""
            assert end["reasons"] == {}
            assert (end["number"], end["outside"]) == (FATAL - 1, 0)
            assert end["pending"] == EVERY + 1


@pytest.mark.parametrize("phase", ["propose", "reduce", "vote"])
def test_a_stopped_worker_ends_the_round_of_all_after_the_timeout(phase: str) -> None:
    with Team(3, timeout=2) as team:
        team.start(train_until_it_breaks, 1, phase, signal.SIGSTOP, {})
        ends = [team._result(team._pipes[rank]) for rank in (0, 2)]
        team.signal(1, signal.SIGCONT)
        ends.append(team._result(team._pipes[1]))
        for told, end in ends:
            check_survivor(told, end, 3, FATAL - 1)
        assert all(1 < end["seconds"] < 10 for _, end in ends[:2])
        assert all(process.is_alive() for process in team.processes)


def train_with_a_pause(rank: int, size: int, phase: str) -> Any:
    model, _, optimizer, rounds = attached()
    if rank == 1:
        rounds._phase = lambda name: rounds.number or name != phase or os.kill(os.getpid(), signal.SIGSTOP)
    with rounds:
        for step in range(EVERY):
            descend(model, optimizer, rank, step)
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}, rounds.last.wait_seconds


def resume(team: Team, rank: int, seconds: float) -> None:
    """Wait until a worker has stopped, and after a while let it go on."""
    stat = Path(f"/proc/{team.processes[rank].pid}/stat")
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.02)
    time.sleep(seconds)
    team.signal(rank, signal.SIGCONT)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("phase", ["propose", "vote"])
def test_a_worker_that_stops_for_a_while_is_waited_for(team: Team, phase: str) -> None:
    team.start(train_with_a_pause, phase)
    resume(team, 1, 0.3)
    wanted = reference(3, EVERY, EVERY)
    results = team.results()
    for told, (weights, _) in results:
        assert told == ""
        for name, weight in wanted.items():
            np.testing.assert_array_equal(weights[name], weight)
    if phase == "propose":
        assert results[0][1][1] > 0.2  # seconds that the first worker waited for the round


# --- workers that do something else -----------------------------------------------------------------------------------


def raises_before_a_refresh(rank: int, size: int) -> Any:
    model, tuning, optimizer, rounds = attached(every=1)
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    before = None
    try:
        with rounds:
            descend(model, optimizer, rank, 0)
            before = bits(tuning.values)
            if rank == 1:
                raise OSError("no scores")
            rounds.refresh(scores, optimizer, density=0.3)
    except (HandshakeError, OSError) as error:
        assert torch.equal(bits(tuning.values), before)
        return str(error)
    return ""


def test_an_error_on_the_way_to_a_refresh_is_told_to_those_that_wait_in_it(team: Team) -> None:
    errors = team.run(raises_before_a_refresh)
    assert errors[1] == "no scores"
    assert errors[0] == errors[2]
    assert "rank 1: OSError: no scores" in errors[0]


def refreshes_while_others_exchange(rank: int, size: int) -> Any:
    model, tuning, optimizer, rounds = attached(every=1)
    scores = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    with rounds:
        descend(model, optimizer, rank, 0)
        mask = tuning.mask
        wanted = (HandshakeError, "has come to a round instead") if rank == 1 else (RoundError, "compares what it")
        with pytest.raises(wanted[0], match=wanted[1]):
            if rank == 1:
                rounds.refresh(scores, optimizer, density=0.3)
            else:
                descend(model, optimizer, rank, 1)
        assert tuning.mask is mask
        if rank == 1:
            descend(model, optimizer, rank, 1)
        else:
            rounds.round()
    return rounds.number, tuning.values.numpy().copy()


def test_workers_that_come_for_different_things_are_told_and_can_go_on(team: Team) -> None:
    results = team.run(refreshes_while_others_exchange)
    assert [number for number, _ in results] == [2] * 3
    for _, values in results:
        np.testing.assert_array_equal(values, results[0][1])


def only_one_has(rank: int, size: int, what: str) -> Any:
    """One worker does something that its own check refuses; the others are told in their next round."""
    model, tuning, optimizer, rounds = attached()
    try:
        with rounds:
            for step in range(EVERY):
                descend(model, optimizer, rank, step)
            if rank == 1 and what == "another mask":
                tuning.set_mask(Mask.random(model, 0.2, seed=3), optimizer)
            if rank == 1 and what == "loaded weights":
                model.load_state_dict(network().state_dict())
            if rank == 1 and what == "another round":
                rounds.number += 1
            if rank == 1 and what == "other values":
                rounds._digest = "0" * 64
            if rank == 1 and what == "let go":
                tuning.detach()
            kept = bits(tuning.values)
            for step in range(EVERY, 2 * EVERY):
                descend(model, optimizer, rank, step)
                if step < 2 * EVERY - 1:
                    kept = bits(tuning.values)
    except (FishError, RoundError) as error:
        assert rounds.number == 1 + (rank == 1 and what == "another round")
        assert not torch.equal(kept, bits(tuning.values)) or rank == 1  # the local step is kept
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("another mask", "rank 1: FishError: the mask was changed on the Tuning"),
        ("loaded weights", "rank 1: FishError: the model's state was loaded anew"),
        ("let go", "rank 1: FishError: the optimizer holds values of a mask that is no longer attached"),
        ("another round", "rank 1: comes to round 3, rank 0 to round 2"),
        ("other values", "rank 1: had other values than rank 0 after the last round"),
    ],
)
def test_what_one_worker_has_done_is_told_to_all(team: Team, what: str, told: str) -> None:
    results = team.run(only_one_has, what)
    assert results[0] == results[2]
    assert results[0][0] == "RoundError"
    assert told in results[0][1]
    assert results[1][0] in ("FishError", "RoundError")


class Bad(torch.optim.SGD):
    """An outer optimizer that fails once, on one worker, after it has changed its state."""

    how, times = "", 0

    def step(self, closure: Any = None) -> None:
        super().step()
        Bad.times -= 1
        if Bad.times == 0 and Bad.how == "raises":
            raise ArithmeticError("no step")
        if Bad.times == 0 and Bad.how == "infinity":
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = torch.inf
        if Bad.times == 0 and Bad.how == "otherwise":
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] += 1


def has_a_bad_outer_optimizer(rank: int, size: int, how: str, momentum: float) -> Any:
    Bad.how, Bad.times = how if rank == 1 else "", 2
    model, tuning, optimizer, rounds = attached(PLAIN, outer=partial(Bad, lr=0.5, momentum=momentum))
    error = ""
    with rounds:
        for step in range(3 * EVERY):
            try:
                descend(model, optimizer, rank, step)
            except RoundError as caught:
                error, kept = str(caught), bits(tuning.values)
                state = rounds._outer.state_dict()
                assert not rounds._broken
                assert rounds.pending == EVERY
                rounds.round()  # again, now well
                assert not torch.equal(kept, bits(tuning.values))
                assert state["state"].keys() == rounds._outer.state_dict()["state"].keys()
    return error, tuning.values.numpy().copy()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "rank 1: ArithmeticError: no step"),
        ("infinity", "rank 1: the merged values are not finite"),
        ("otherwise", "came to"),
    ],
)
def test_a_failed_vote_takes_the_outer_optimizer_back(team: Team, how: str, told: str, momentum: float) -> None:
    well = team.run(has_a_bad_outer_optimizer, "", momentum)
    ill = team.run(has_a_bad_outer_optimizer, how, momentum)
    assert all(told in error for error, _ in ill)
    assert all(error == "" for error, _ in well)
    for _, values in (*ill, *well):
        np.testing.assert_array_equal(values, well[0][1])


# --- steps of all kinds -----------------------------------------------------------------------------------------------


def equal_ends(results: list[Any]) -> None:
    for number, values in results:
        assert number == results[0][0]
        np.testing.assert_array_equal(values, results[0][1])


def skips(rank: int, size: int, overlap: int) -> Any:
    """As a GradScaler does on one worker: no step, so no hook."""
    model, tuning, optimizer, rounds = attached(every=3, overlap=overlap)
    with rounds:
        for step in range(11):
            if rank == 1 and step in (0, 4, 5):
                continue
            descend(model, optimizer, rank, step)
    return rounds.number, tuning.values.numpy().copy()


@pytest.mark.parametrize("overlap", [0, 2])
def test_steps_may_be_skipped(team: Team, overlap: int) -> None:
    results = team.run(skips, overlap)
    equal_ends(results)
    assert results[0][0] == 4


def works_so_long(rank: int, size: int, steps: list[int], overlap: int) -> Any:
    model, tuning, optimizer, rounds = attached(overlap=overlap)
    start = bits(tuning.values)
    with rounds:
        for step in range(steps[rank]):
            descend(model, optimizer, rank, step)
    assert rounds.step == steps[rank]
    assert torch.equal(bits(tuning.values), start) == (not any(steps))
    return rounds.number, tuning.values.numpy().copy()


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize(("steps", "rounds"), [([0, 0, 0], 0), ([0, 5, 2], 3), ([7, 0, 1], 4), ([4, 4, 4], 2)])
def test_workers_may_take_any_number_of_steps(team: Team, steps: list[int], rounds: int, overlap: int) -> None:
    results = team.run(works_so_long, steps, overlap)
    equal_ends(results)
    # Where a round under way and what was learnt meanwhile come to the end together, one round more merges the rest.
    assert results[0][0] in ((rounds,) if not overlap or not any(steps) else (rounds, rounds + 1))


def one_worker_alone_does_not_dilute(rank: int, size: int) -> Any:
    model, tuning, optimizer, rounds = attached()
    with rounds:
        for step in range(EVERY if rank == 0 else 0):
            descend(model, optimizer, rank, step)
            mine = bits(tuning.values)
    return rounds.last.participants, (mine.numpy() if rank == 0 else None), bits(tuning.values).numpy()


def test_a_mean_is_over_those_that_have_trained(team: Team) -> None:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    for step in range(EVERY):
        descend(model, optimizer, 0, step)
    for participants, _, values in team.run(one_worker_alone_does_not_dilute):
        assert participants == 1
        np.testing.assert_allclose(values.view("f4"), tuning.values.numpy(), rtol=1e-6)


def two_optimizers(rank: int, size: int) -> Any:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    first, *rest = tuning.parameters()
    optimizers = torch.optim.SGD([first], lr=0.1), torch.optim.SGD(rest, lr=0.1)
    with LocalRounds(tuning, every=EVERY) as rounds:
        for step in range(2 * EVERY):
            descend(model, optimizers[0], rank, step)
            optimizers[1].step()
            optimizers[1].zero_grad()
        # The second has stepped after the round.
        assert rounds.pending == 0
        with pytest.raises(FishError, match="not been exchanged"):
            rounds.state_dict()
        assert rounds.round().steps == 0
        assert rounds.state_dict()["number"] == 3
        with torch.no_grad():
            tuning.values.add_(rank)
    return rounds.number, tuning.values.numpy().copy()


def test_what_a_second_optimizer_has_moved_is_merged_too(team: Team) -> None:
    results = team.run(two_optimizers)
    equal_ends(results)
    assert results[0][0] == 4


def lbfgs(rank: int, size: int) -> Any:
    model, tuning, optimizer, rounds = attached(partial(torch.optim.LBFGS, max_iter=3))

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(rank, 0)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with rounds:
        for _ in range(2 * EVERY):
            optimizer.step(closure)
    return rounds.number, tuning.values.numpy().copy()


def test_an_optimizer_with_a_closure_steps_once(team: Team) -> None:
    results = team.run(lbfgs)
    equal_ends(results)
    assert results[0][0] == 2


def lives_on(rank: int, size: int) -> Any:
    """Finish twice, close, and train on without rounds."""
    model, tuning, optimizer, rounds = attached()
    descend(model, optimizer, rank, 0)
    rounds.finish()
    rounds.finish()
    assert (rounds.number, rounds.pending) == (1, 0)
    descend(model, optimizer, rank, 1)
    rounds.discard()
    rounds.close()
    rounds.close()
    merged = tuning.values.numpy().copy()
    for step in range(2, 2 + 2 * EVERY):
        descend(model, optimizer, rank, step)
    assert (rounds.number, rounds.pending) == (1, 0)
    tuning.detach()
    with pytest.raises(FishError, match="no longer attached"):
        rounds.round()
    return 1, merged


def test_rounds_end_more_than_once(team: Team) -> None:
    equal_ends(team.run(lives_on))


def flies(rank: int, size: int) -> Any:
    """Discard, refuse to refresh, and begin anew while a round is under way."""
    model, tuning, optimizer, rounds = attached(every=3, overlap=2)
    for step in range(4):
        descend(model, optimizer, rank, step)
    assert rounds._flying
    scores = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    for refused in (rounds.state_dict, partial(rounds.refresh, scores, optimizer, density=0.3)):
        with pytest.raises(FishError, match="not been exchanged"):
            refused()
    rounds.discard()
    first = bits(tuning.values)
    assert (rounds.number, rounds.pending) == (1, 0)
    assert torch.equal(first, bits(rounds._anchor))
    for step in range(4, 8):
        descend(model, optimizer, rank, step)
    rounds.round()
    assert (rounds.number, rounds.pending) == (3, 0)
    kept = rounds.refresh(scores, optimizer, density=0.3)
    assert kept == tuning.mask
    for step in range(8, 11):
        descend(model, optimizer, rank, step)
    assert rounds._flying
    rounds.discard()
    rounds.finish()
    rounds.close()
    return rounds.number, tuning.values.numpy().copy()


def test_a_round_under_way_is_landed_before_anything_else(team: Team) -> None:
    results = team.run(flies)
    equal_ends(results)
    assert results[0][0] == 4


def a_flight_fails(rank: int, size: int) -> Any:
    model, tuning, optimizer, rounds = attached(PLAIN, every=3, overlap=1)
    for step in range(2):
        descend(model, optimizer, rank, step)
    with torch.no_grad():
        if rank == 1:
            next(tuning.parameters())[0] = torch.nan
    descend(model, optimizer, rank, 2)
    with pytest.raises(RoundError, match="rank 1: 130 of 130 values are not finite"):
        descend(model, optimizer, rank, 3)
    assert (rounds.number, rounds.pending) == (0, 4)
    rounds.discard()
    for step in range(4, 8):
        descend(model, optimizer, rank, step)
    assert (rounds.number, rounds.pending) == (1, 1)
    rounds.close()
    return 0, bits(rounds._anchor).numpy()


def test_a_round_that_fails_under_way_leaves_its_steps_pending(team: Team) -> None:
    equal_ends(team.run(a_flight_fails))


# --- one process ------------------------------------------------------------------------------------------------------


def test_an_interrupt_within_a_round_changes_nothing_and_ends_the_rounds() -> None:
    model, _, optimizer, rounds = attached()

    def interrupt(name: str) -> None:
        if name == "vote" and rounds.number == 1:
            raise KeyboardInterrupt

    rounds._phase = interrupt
    for step in range(2 * EVERY - 1):
        descend(model, optimizer, 0, step)
    with pytest.raises(KeyboardInterrupt), rounds:
        descend(model, optimizer, 0, 2 * EVERY - 1)
    assert (rounds.number, rounds.pending) == (1, EVERY)
    descend(model, optimizer, 0, 2 * EVERY)  # the block has ended the rounds, not the training
    with pytest.raises(FishError, match="start the workers again"):
        rounds.round()


def test_loaded_weights_are_begun_from_after_a_handshake() -> None:
    model, tuning, optimizer, rounds = attached(reduction="sum")
    descend(model, optimizer, 0, 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    descend(model, optimizer, 0, 1)
    model.load_state_dict(state)
    for refused in (rounds.round, rounds.finish, rounds.discard, rounds.state_dict):
        with pytest.raises(FishError, match="call handshake"):
            refused()
    rounds.handshake()
    loaded = bits(tuning.values)
    assert (rounds.number, rounds.pending) == (1, 0)
    rounds.discard()
    assert torch.equal(bits(tuning.values), loaded)
    rounds.close()


def test_the_block_is_closed_when_its_last_round_fails() -> None:
    model, tuning, optimizer, rounds = attached()
    with pytest.raises(RoundError, match="not finite"), rounds:
        descend(model, optimizer, 0, 0)
        with torch.no_grad():
            tuning.values[0] = torch.nan
    pending = rounds.pending
    descend(model, optimizer, 0, 1)
    assert rounds.pending == pending
