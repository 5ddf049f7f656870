"""Rounds whose members come and go: with a manager made of this group's collectives, and with torchft's own."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fishmask
from fishmask import FishError, LocalRounds, Mask
from fishmask.errors import HandshakeError, RoundError
from fishmask.managed import ManagedRounds
from tests.team import Team

ROOT = Path(__file__).parent.parent
DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team(3) as made:
        yield made


class GroupManager:
    """The interface of a manager, over the group of a team.

    Args:
        losing: The collectives, counted from 1, in which a member is lost: all others see an error.
        doubtful: The votes, counted from 1, in which this member alone says no.
    """

    def __init__(self, losing: tuple[int, ...] = (), doubtful: tuple[int, ...] = ()) -> None:
        self.losing, self.doubtful = losing, doubtful
        self.collectives = self.votes = self.step = 0
        self.error: Any = None

    def register_state_dict_fn(self, key: str, load_state_dict: Any, state_dict: Any) -> None:
        self.load, self.save = load_state_dict, state_dict

    def start_quorum(self) -> None:
        self.error = None
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (self.step, self.save()))
        newest = max(step for step, _ in states)
        if self.step < newest:
            self.load(next(state for step, state in states if step == newest))
            self.step = newest

    def num_participants(self) -> int:
        return dist.get_world_size()

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: Any) -> Any:
        self.collectives += 1
        if self.collectives in self.losing:
            tensor.random_()  # what a broken sum leaves behind
            self.error = "a member was lost"
        elif self.error is None:
            dist.all_reduce(tensor, reduce_op)
        return self

    def wait(self) -> bool:
        return True

    def errored(self) -> Any:
        return self.error

    def report_error(self, e: Exception) -> None:
        self.error = e

    def should_commit(self) -> bool:
        self.votes += 1
        commits = self.error is None and self.votes not in self.doubtful
        self.step += commits
        return commits


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def prepared(seed: int = 0, mask: int = 1) -> tuple[fishmask.Tuning, torch.optim.Optimizer]:
    # Without the bias before BatchNorm: its gradient is nothing but rounding, which Adam blows up.
    tuning = fishmask.attach(made := model(seed), Mask.random(made, 0.4, seed=mask, exclude="0.bias"))
    return tuning, torch.optim.AdamW(tuning.parameters(), lr=0.02)


def train(tuning: fishmask.Tuning, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        F.cross_entropy(tuning.model(x), (x.sum(1) > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(tuning: fishmask.Tuning) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in tuning.model.state_dict().items()}


def managed(rank: int, size: int, settings: dict[str, Any], losing: tuple[int, ...] = ()) -> Any:
    tuning, optimizer = prepared()
    manager = GroupManager(losing)
    with ManagedRounds(tuning, manager, every=4, **settings) as rounds:
        train(tuning, optimizer, rank, 10)  # two rounds, and two steps that are merged at the end
    assert (rounds.number, rounds.step, rounds.pending) == (3, 10, 0)
    assert rounds.last is not None
    assert (rounds.last.participants, rounds.last.steps) == (size, 2)
    return weights(tuning), rounds.attempts, rounds.last


def local(rank: int, size: int, settings: dict[str, Any]) -> Any:
    tuning, optimizer = prepared()
    with LocalRounds(tuning, every=4, **settings):
        train(tuning, optimizer, rank, 10)
    return weights(tuning)


@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"outer": DILOCO}], ids=["mean", "sum", "diloco"])
def test_members_that_stay_come_to_what_local_rounds_do(team: Team, settings: dict[str, Any]) -> None:
    wanted = team.run(local, settings)[0]
    results = team.run(managed, settings)
    for found, attempts, last in results:
        assert attempts == 4  # one to join, and three rounds
        assert last.digest == results[0][2].digest
        for name, weight in wanted.items():
            np.testing.assert_allclose(found[name], weight, atol=1e-5)
            np.testing.assert_array_equal(found[name], results[0][0][name])


# A round has four collectives: propose, reduce, the counts of BatchNorm, vote; joining has one.
@pytest.mark.parametrize("losing", [(1,), (2,), (3,), (4,), (5,), (6, 7, 8), (3, 9)], ids=str)
def test_a_round_in_which_a_member_is_lost_is_tried_again(team: Team, losing: tuple[int, ...]) -> None:
    wanted = team.run(managed, {"outer": DILOCO})
    for (found, attempts, _), (undisturbed, _, _) in zip(
        team.run(managed, {"outer": DILOCO}, losing), wanted, strict=True
    ):
        assert attempts > 4
        for name, weight in undisturbed.items():
            np.testing.assert_array_equal(found[name].view(weight.dtype), weight)


def one_fails(rank: int, size: int, fault: str) -> Any:
    tuning, optimizer = prepared()
    manager = GroupManager()
    rounds = ManagedRounds(tuning, manager, every=4, outer=DILOCO)
    train(tuning, optimizer, rank, 4)
    merged = weights(tuning)
    train(tuning, optimizer, 10 + rank, 1)
    if rank == 1 and fault == "values":
        with torch.no_grad():
            next(tuning.parameters())[0] = torch.nan
        tuning.write_back()
    if fault == "outer":  # on one member only, after the reduction
        assert rounds._outer is not None
        step = rounds._outer.optimizer.step
        rounds._outer.optimizer.step = lambda: step() if rank else step(closure=1 / 0)
    before = weights(tuning), rounds.state_dict()
    try:
        rounds.round()
    except RoundError as error:
        told = str(error)
    after = weights(tuning), rounds.state_dict()
    for name, weight in before[0].items():
        assert weight.tobytes() == after[0][name].tobytes()
    assert repr(before[1]) == repr(after[1])
    assert (rounds.number, rounds.pending, manager.step) == (1, 1, 2)  # the manager does not count it either
    rounds.discard()
    for name, weight in weights(tuning).items():
        np.testing.assert_array_equal(weight, merged[name])
    return told


@pytest.mark.parametrize(
    ("fault", "there", "elsewhere"),
    [
        ("values", "values are not finite, some here", "values are not finite, those of another member"),
        ("outer", "ZeroDivisionError: division by zero", "it went wrong on another member"),
    ],
)
def test_what_goes_wrong_on_one_fails_on_all_and_changes_nothing(
    team: Team, fault: str, there: str, elsewhere: str
) -> None:
    told = team.run(one_fails, fault)
    culprit = 1 if fault == "values" else 0
    for rank, text in enumerate(told):
        assert text.startswith("round 2 failed, and nothing was changed: ")
        assert text.endswith(there if rank == culprit else elsewhere)


def differ(rank: int, size: int, what: str) -> str:
    odd = rank == 1
    tuning, _ = prepared(seed=int(odd and what == "base"), mask=2 if odd and what == "mask" else 1)
    every = 5 if odd and what == "every" else 4
    outer = DILOCO if odd and what == "outer optimizer" else None
    if odd and what == "values":
        with torch.no_grad():
            next(tuning.parameters()).add_(1)
    try:
        ManagedRounds(tuning, GroupManager(), every=every, outer=outer)
    except HandshakeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("what", ["mask", "base", "every", "outer optimizer", "values"])
def test_members_that_differ_are_told_before_anything_is_summed(team: Team, what: str) -> None:
    told = team.run(differ, what)
    assert set(told) == {told[0]}
    named = told[0].partition("they differ in ")[2].split(", ")
    assert what in named
    assert team.run(differ, "nothing") == ["nothing"] * 3


def one_misses_a_round(rank: int, size: int) -> Any:
    tuning, optimizer = prepared()
    manager = GroupManager(doubtful=(3,) if rank == 1 else ())  # its second round
    with ManagedRounds(tuning, manager, every=4, outer=DILOCO) as rounds:
        train(tuning, optimizer, rank, 8)
        if rank != 1:
            train(tuning, optimizer, 10 + rank, 4)
        last = rounds.last
    return weights(tuning), rounds.number, rounds.pending, last


def test_a_member_that_missed_a_round_is_given_it(team: Team) -> None:
    results = team.run(one_misses_a_round)
    for found, number, pending, last in results:
        assert (number, pending) == (3, 0)
        assert last.participants == 2  # the third had nothing to add
        for name, weight in results[0][0].items():
            np.testing.assert_array_equal(found[name], weight)


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_state_of_something_else_is_refused(alone: None) -> None:
    tuning, _ = prepared()
    rounds = ManagedRounds(tuning, GroupManager(), every=4)
    other = ManagedRounds(prepared(mask=2)[0], GroupManager(), every=4).state_dict()
    before = weights(tuning)
    with pytest.raises(HandshakeError, match=r"does not train what the others do: mask differs"):
        rounds.load_state_dict(other)
    for name, weight in weights(tuning).items():
        np.testing.assert_array_equal(weight, before[name])
    tuning.set_mask(Mask.random(tuning.model, 0.2, seed=5))
    with pytest.raises(FishError, match="train one mask throughout"):
        rounds.round()


def test_a_checkpoint_log_keeps_it(alone: None, tmp_path: Path) -> None:
    def start() -> tuple[fishmask.Tuning, torch.optim.Optimizer, ManagedRounds]:
        tuning, optimizer = prepared()
        return tuning, optimizer, ManagedRounds(tuning, GroupManager(), every=4, outer=DILOCO)

    tuning, optimizer, rounds = start()
    train(tuning, optimizer, 0, 4)
    with fishmask.CheckpointLog(tmp_path) as log:
        log.commit(tuning, optimizer, state={"rounds": rounds})
    train(tuning, optimizer, 1, 4)
    wanted = weights(tuning), rounds.number
    tuning, optimizer, rounds = start()
    with fishmask.CheckpointLog(tmp_path) as log:
        log.restore(tuning, optimizer, state={"rounds": rounds})
    assert rounds.number == 1
    train(tuning, optimizer, 1, 4)
    assert rounds.number == wanted[1]
    for name, weight in weights(tuning).items():
        np.testing.assert_array_equal(weight, wanted[0][name])


def test_misuse_is_told() -> None:
    tuning, _ = prepared()
    manager = GroupManager()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ManagedRounds(tuning, manager, every=0)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'median'"):
        ManagedRounds(tuning, manager, every=1, reduction="median")
    with pytest.raises(TypeError, match="got Linear"):
        ManagedRounds(nn.Linear(1, 1), manager, every=1)
    manager._use_async_quorum = True
    with pytest.raises(ValueError, match="use_async_quorum=False"):
        ManagedRounds(tuning, manager, every=1)


# --- torchft ----------------------------------------------------------------------------------------------------------

MEMBER = """
import os, pathlib, runpy, signal, sys, time
import torch
from fishmask.managed import ManagedRounds

torch.set_num_threads(1)
member, again = os.environ["MEMBER"], os.environ["AGAIN"] == "yes"
joining = pathlib.Path(sys.argv[2]) / "joining"

def phase(rounds, name):
    if member == "1" and not again and (rounds.number, name) == (4, os.environ["DIES"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if member != "1" and (rounds.number, name) == (7, "propose"):
        while not joining.exists():  # have the one that comes back find the others at work
            time.sleep(0.05)
    if again and (rounds.step, name) == (0, "propose"):
        assert rounds.number >= 7, rounds.number  # it was given the others' last round

whole = ManagedRounds.round

def announced(rounds):
    if again:  # its manager is known to the lighthouse by now, so that the others' next quorum waits for it
        joining.write_text("yes")
    return whole(rounds)

ManagedRounds._phase, ManagedRounds.round = phase, announced
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")
@pytest.mark.parametrize("dies", ["reduce", "commit"])
def test_a_member_of_torchft_that_is_killed_comes_back(tmp_path: Path, dies: str) -> None:
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "elastic.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "managed.py").write_text(next(script for script in scripts if "torchft" in script))
    (tmp_path / "member.py").write_text(MEMBER)
    port = free_port()
    options = ["--min_replicas", "2", "--join_timeout_ms", "5000", "--heartbeat_timeout_ms", "2000"]
    lighthouse = Path(sys.executable).with_name("torchft_lighthouse")
    logs = (tmp_path / "log").open("w")
    running = [subprocess.Popen([lighthouse, "--bind", f"127.0.0.1:{port}", *options], stderr=logs)]
    stores = []

    def start(member: int, again: bool) -> subprocess.Popen[bytes]:
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        environment = os.environ | {
            "MEMBER": str(member),
            "AGAIN": "yes" if again else "no",
            "DIES": dies,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(stores[-1].port),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
            "PYTHONPATH": str(ROOT / "src"),
        }
        command = [sys.executable, "member.py", "managed.py", "."]
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=logs))
        return running[-1]

    def told() -> str:
        return (tmp_path / "log").read_text(errors="replace")[-20000:]

    try:
        first, second, third = (start(member, again=False) for member in range(3))
        assert second.wait(timeout=120) == -signal.SIGKILL, told()
        returned = start(1, again=True)
        for process in (first, third, returned):
            assert process.wait(timeout=60) == 0, told()
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        logs.close()
    found = [torch.load(tmp_path / f"member-{member}.pt") for member in range(3)]
    for other in found[1:]:
        for name, weight in found[0].items():
            assert torch.equal(weight, other[name]), name
