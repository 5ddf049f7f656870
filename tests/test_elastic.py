"""Restarts from the log of all workers: in groups of another size, after damage, and under torchrun."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fishmask
from fishmask import FishError, LocalRounds, Mask
from fishmask.elastic import WorkersLog, kept_mask
from fishmask.merge import places_in, union_of
from fishmask.protocol import Protocol
from fishmask.regroup import check_dealt, deal_anew, mean_states, spread_owed
from tests.team import Team, WorkerFailed, teams_of

ROOT = Path(__file__).parent.parent
SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, Team]]:
    yield from teams_of(SIZES)


# --- what the workers do ----------------------------------------------------------------------------------------------


class Work:
    """A training with everything that must come back: dropout, BatchNorm, a schedule, an outer optimizer."""

    def __init__(self, rank: int, size: int, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.model.to(dtype)
        mask = Mask.random(self.model, 0.4, seed=1, exclude="4")
        head = Mask.from_dense({n: torch.full(p.shape, n.startswith("4.")) for n, p in self.model.named_parameters()})
        own = settings.get("masks") == "own"
        self.tuning = fishmask.attach(self.model, (mask.split(size)[rank] if own else mask) | head)
        self.optimizer = torch.optim.AdamW(self.tuning.parameters(), lr=0.02)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.97)
        self.rounds = LocalRounds(self.tuning, every=3, **settings)
        torch.manual_seed(100 + rank)

    def train(self, until: int, log: WorkersLog | None = None) -> None:
        dtype = next(self.model.parameters()).dtype
        while self.rounds.step < until:
            x = torch.randn(8, 6)
            F.cross_entropy(self.model(x.to(dtype)).float(), (x.sum(1) > 0).long()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            if self.rounds.protocol.overlap and self.rounds.step % 3 == 0:
                self.rounds.round()  # merge what was learnt while the last one was under way
            if log is not None and self.rounds.pending == 0:
                log.commit(state={"schedule": self.schedule})

    def found(self) -> dict[str, Any]:
        """Return all that must be equal, and what differs from worker to worker."""
        state = self.optimizer.state
        named = dict(self.tuning.named_parameters())
        kept = self.rounds.state_dict()
        return {
            "weights": {n: p.detach().float().numpy().copy() for n, p in self.model.state_dict().items()},
            "mask": self.tuning.mask,
            "moments": {n: state[p]["exp_avg"].numpy().copy() for n, p in named.items() if p in state},
            "steps": {n: float(state[p]["step"]) for n, p in named.items() if p in state},
            "anchor": None if kept["anchor"] is None else kept["anchor"].numpy(),
            "residual": kept["residual"] and {key: held.numpy() for key, held in kept["residual"].items()},
            "outer": json.dumps(kept["outer"], default=Tensor.tolist) if kept["outer"] else None,
            "rate": self.optimizer.param_groups[0]["lr"],
            "number": self.rounds.number,
            "torch": torch.get_rng_state().numpy(),
        }


DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {},
    "shared-overlap": {"overlap": 1},
    "shared-int8-diloco": {"payload": "int8", "outer": DILOCO},
    "own-sum": {"masks": "own", "reduction": "sum", "head": "mean"},
    "own-bfloat16": {"masks": "own", "denominator": "holders", "head": "mean", "payload": "bfloat16", "outer": DILOCO},
}


def undisturbed(rank: int, size: int, name: str, until: int) -> dict[str, Any]:
    work = Work(rank, size, SETTINGS[name])
    work.train(until)
    return work.found()


def begin(rank: int, size: int, name: str, path: str, until: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Train, commit every round, and go away with whatever has not been exchanged."""
    work = Work(rank, size, SETTINGS[name], dtype)
    with WorkersLog(path, work.rounds, work.optimizer) as log:
        assert log.restore() is None
        work.train(until - until % 3, log)
        found = work.found()
        work.train(until, log)
    return found


def go_on(
    rank: int, size: int, name: str, path: str, policy: str, until: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Restore into objects that were made anew, and train on."""
    work = Work(rank, size, SETTINGS[name], dtype)
    torch.manual_seed(7 + rank)
    with WorkersLog(path, work.rounds, work.optimizer, policy=policy) as log:
        resumed = log.restore(state={"schedule": work.schedule})
        assert resumed is not None
        found = work.found()
        work.train(until, log)
    return {**found, "resumed": resumed, "after": work.found()}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.tobytes() == b[name].tobytes(), name


# --- as many workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keep", "mean"])
@pytest.mark.parametrize("name", SETTINGS)
def test_as_many_workers_go_on_bit_for_bit(teams: dict[int, Team], tmp_path: Path, name: str, policy: str) -> None:
    wanted = teams[3].run(undisturbed, name, 12)
    teams[3].run(begin, name, str(tmp_path), 8)  # two rounds, and two steps that are lost
    for was, now in zip(wanted, teams[3].run(go_on, name, str(tmp_path), policy, 12), strict=True):
        assert (now["resumed"].number, now["resumed"].step, now["resumed"].workers) == (2, 6, 3)
        after = now["after"]
        for what in ("weights", "moments"):
            same_bits(after[what], was[what])
        for what in ("steps", "rate", "outer", "number"):
            assert after[what] == was[what]
        np.testing.assert_array_equal(after["torch"], was["torch"])
        if was["residual"]:
            same_bits(after["residual"], was["residual"])


def test_what_was_damaged_is_passed_over(teams: dict[int, Team], tmp_path: Path) -> None:
    teams[2].run(begin, "shared", str(tmp_path), 9)
    newest = tmp_path / "generation-00000001" / "worker-00001" / "commit-00000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    wanted = teams[2].run(undisturbed, "shared", 12)
    for was, now in zip(wanted, teams[2].run(go_on, "shared", str(tmp_path), "keep", 12), strict=True):
        assert now["number"] == 2
        assert [problem.path for problem in now["resumed"].skipped] == [newest]
        same_bits(now["after"]["weights"], was["weights"])


def test_a_round_that_one_worker_has_not_kept_does_not_count(teams: dict[int, Team], tmp_path: Path) -> None:
    teams[2].run(begin, "shared", str(tmp_path), 9)
    for worker, number in ((0, 2), (1, 3)):  # each lacks another
        (tmp_path / "generation-00000001" / f"worker-{worker:05d}" / f"commit-{number:08d}.safetensors").unlink()
    found = teams[2].run(go_on, "shared", str(tmp_path), "keep")
    assert [one["number"] for one in found] == [1, 1]
    assert found[0]["resumed"].skipped == []


def test_a_start_that_kept_nothing_together_is_passed_over(teams: dict[int, Team], tmp_path: Path) -> None:
    kept = teams[2].run(begin, "shared", str(tmp_path), 6)
    teams[2].run(go_on, "shared", str(tmp_path), "keep", 9)
    shutil.rmtree(tmp_path / "generation-00000002" / "worker-00001")  # as if killed in its first commit
    found = teams[2].run(go_on, "shared", str(tmp_path), "keep", 9)
    for was, now in zip(kept, found, strict=True):
        same_bits(now["weights"], was["weights"])
    assert (tmp_path / "generation-00000003").is_dir()


def test_a_damaged_base_is_passed_over_too(teams: dict[int, Team], tmp_path: Path) -> None:
    kept = teams[2].run(begin, "shared", str(tmp_path), 6)
    teams[2].run(go_on, "shared", str(tmp_path), "keep", 9)
    (tmp_path / "generation-00000002" / "worker-00000" / "base-00000001.safetensors").write_bytes(b"")
    for was, now in zip(kept, teams[2].run(go_on, "shared", str(tmp_path), "keep"), strict=True):
        assert [problem.path.parent.parent.name for problem in now["resumed"].skipped] == ["generation-00000002"]
        same_bits(now["weights"], was["weights"])


def test_without_an_intact_round_all_are_told(teams: dict[int, Team], tmp_path: Path) -> None:
    teams[2].run(begin, "shared", str(tmp_path), 6)
    for path in tmp_path.glob("*/worker-00001/commit-*"):
        path.write_bytes(b"")
    teams[2].start(go_on, "shared", str(tmp_path), "keep")
    for error, _ in teams[2].results():
        assert "holds no round that all workers have kept" in error


def with_new_masks(rank: int, size: int, name: str, path: str | None, until: int) -> dict[str, Any]:
    """Go over to another mask after the first and the third round; with a path, go on from there and keep all."""
    work = Work(rank, size, SETTINGS[name])
    base = {n: p.detach().clone() for n, p in Work(rank, 1, {}).model.named_parameters()}
    torch.manual_seed(100 + rank)
    head = Mask.from_indices({n: i for n, i in work.tuning.mask.indices.items() if n.startswith("4.")}, work.model)
    log = None if path is None else WorkersLog(path, work.rounds, work.optimizer, policy="mean")
    restored = log and log.restore(state={"schedule": work.schedule}) and work.found()
    union, resumed_mask = work.rounds._union.mask, work.tuning.mask
    while work.rounds.step < until:
        work.train(work.rounds.step + 3)
        if work.rounds.number in (1, 3):
            mask = Mask.random(work.model, 0.4, seed=work.rounds.number + 10, exclude="4")
            own = "own" in name
            work.rounds.set_mask((mask.split(size)[rank] if own else mask) | head, work.optimizer)
        if log is not None:
            log.commit(state={"schedule": work.schedule})
    if log is not None:
        log.close()
    found = work.found()
    delta = work.tuning.delta().mask
    work.tuning.revert()
    for n, p in work.model.named_parameters():  # what is trained, what others train, and what anybody ever trained
        assert torch.equal(p.view(torch.int32), base[n].view(torch.int32)), n
    return {**found, "delta": delta, "restored": restored, "union": union, "resumed mask": resumed_mask}


@pytest.mark.parametrize("name", ["shared-int8-diloco", "own-bfloat16"])
def test_masks_that_were_changed_come_back(teams: dict[int, Team], tmp_path: Path, name: str) -> None:
    wanted = teams[3].run(with_new_masks, name, None, 15)
    began = teams[3].run(with_new_masks, name, str(tmp_path), 9)
    fewer = tmp_path / "fewer"
    shutil.copytree(tmp_path / "generation-00000001", fewer / "generation-00000001")
    for was, now in zip(wanted, teams[3].run(with_new_masks, name, str(tmp_path), 15), strict=True):
        same_bits(now["weights"], was["weights"])
        same_bits(now["moments"], was["moments"])
        assert (now["mask"], now["delta"], now["outer"]) == (was["mask"], was["delta"], was["outer"])
    others = teams[2].run(with_new_masks, name, str(fewer), 15)
    for now in others:
        same_bits(now["restored"]["weights"], began[0]["weights"])
        assert now["union"] == union_of([was["mask"] for was in began])
        assert (began[0]["delta"] - now["delta"]).k == 0
        same_bits(now["weights"], others[0]["weights"])
    assert union_of([now["resumed mask"] for now in others]) == others[0]["union"]


def attach_with_kept(rank: int, size: int, path: str, settings: dict[str, Any]) -> Any:
    mask = kept_mask(path)
    if mask is None:
        return None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
    rounds = LocalRounds(fishmask.attach(model, mask), every=3, **settings)
    with WorkersLog(path, rounds, policy="reset") as log:
        log.restore()
    return mask, rounds._union.mask, rounds.tuning.mask


@pytest.mark.parametrize("name", ["shared", "own-sum"])
def test_a_mask_need_not_be_chosen_again(teams: dict[int, Team], tmp_path: Path, name: str) -> None:
    assert teams[2].run(attach_with_kept, str(tmp_path), SETTINGS[name]) == [None, None]
    began = teams[2].run(begin, name, str(tmp_path), 6)
    for was, (mask, _, restored) in zip(
        began, teams[2].run(attach_with_kept, str(tmp_path), SETTINGS[name]), strict=True
    ):
        assert mask == restored == was["mask"]
    for mask, union, _ in teams[3].run(attach_with_kept, str(tmp_path), SETTINGS[name]):
        assert union == union_of([was["mask"] for was in began])
        assert mask.k < union.k if name == "own-sum" else mask == union


def killed_while_committing(rank: int, size: int, path: str, moment: str) -> None:
    """Have worker 1 die in its second commit, before or after its own part is durable."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    work = Work(rank, size, {})
    with WorkersLog(path, work.rounds, work.optimizer) as log:
        work.train(3, log)
        if rank == 1:
            setattr(*((log._log, "commit", die) if moment == "before" else (log, "_together", die)))
        work.train(6, log)


@pytest.mark.parametrize(("moment", "number"), [("before", 1), ("after", 2)])
def test_a_worker_killed_in_its_commit(teams: dict[int, Team], tmp_path: Path, moment: str, number: int) -> None:
    with Team(2) as doomed:
        doomed.start(killed_while_committing, str(tmp_path), moment)
        (other, _), (killed, _) = doomed.results()
    assert killed == "died"
    assert "RoundError: the connection between the workers broke off" in other
    wanted = teams[2].run(undisturbed, "shared", 9)
    for was, now in zip(wanted, teams[2].run(go_on, "shared", str(tmp_path), "keep", 9), strict=True):
        assert now["resumed"].number == number
        same_bits(now["after"]["weights"], was["weights"])


# --- another number of workers ----------------------------------------------------------------------------------------


def refused(rank: int, size: int, name: str, path: str) -> tuple[str, bool]:
    work = Work(rank, size, SETTINGS[name])
    before = work.found()
    with WorkersLog(path, work.rounds, work.optimizer) as log, pytest.raises(FishError) as caught:
        log.restore(state={"schedule": work.schedule})
    same_bits(work.found()["weights"], before["weights"])
    return str(caught.value), not work.optimizer.state


def test_another_number_without_a_policy_is_refused_on_all(teams: dict[int, Team], tmp_path: Path) -> None:
    teams[3].run(begin, "shared", str(tmp_path), 6)
    for told, untouched in teams[2].run(refused, "shared", str(tmp_path)):
        assert "3 workers have trained until here, now there are 2, and policy='keep'" in told
        assert untouched
    assert [path.name for path in tmp_path.iterdir()] == ["generation-00000001"]


def dense(found: dict[str, Any], shapes: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return moments over all entries of the model, and where there are any."""
    whole = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape.shape))
        moments, there = np.zeros(size), np.zeros(size)
        if name in found["mask"].indices:
            index = found["mask"].indices[name].numpy()
            moments[index], there[index] = found["moments"][name], 1
        whole[name] = moments, there
    return whole


@pytest.mark.parametrize("policy", ["mean", "reset"])
@pytest.mark.parametrize("name", SETTINGS)
def test_from_four_to_two_to_three(teams: dict[int, Team], tmp_path: Path, name: str, policy: str) -> None:
    old = teams[4].run(begin, name, str(tmp_path), 7)
    for size in (2, 3):
        new = teams[size].run(go_on, name, str(tmp_path), policy, old[0]["number"] * 3 + 6)
        for rank, now in enumerate(new):
            same_bits(now["weights"], old[0]["weights"])
            assert (now["number"], now["rate"], now["outer"]) == (old[0]["number"], old[0]["rate"], old[0]["outer"])
            if old[0]["anchor"] is not None:
                np.testing.assert_array_equal(now["anchor"].view("i4"), old[0]["anchor"].view("i4"))
            if rank < len(old):
                np.testing.assert_array_equal(now["torch"], old[rank]["torch"])
            if name == "shared-int8-diloco":  # what all owed to the mean
                owed = sum(one["residual"]["own"] / len(old) + one["residual"]["merged"] for one in old)
                np.testing.assert_allclose(now["residual"]["own"], owed, rtol=1e-4, atol=1e-9)
                assert owed.any()
            if policy == "reset":
                assert not now["moments"]
                continue
            assert set(now["steps"].values()) == {max(s for one in old for s in one["steps"].values())}
            wholes = [dense(one, old[0]["weights"] and dict(Work(0, 1, {}).model.named_parameters())) for one in old]
            for parameter, index in now["mask"].indices.items():
                total = sum(whole[parameter][0] for whole in wholes)
                count = sum(whole[parameter][1] for whole in wholes)
                mean = (total[index.numpy()] / count[index.numpy()]).astype("f4")
                np.testing.assert_allclose(now["moments"][parameter], mean, rtol=1e-6)
        assert union_of([now["mask"] for now in new]) == union_of([was["mask"] for was in old])
        if name.startswith("own"):
            for now in new[1:]:
                assert set((now["mask"] & new[0]["mask"]).indices) == {"4.weight", "4.bias"}
        for now in new[1:]:  # they train on together
            same_bits(now["after"]["weights"], new[0]["after"]["weights"])
        assert new[0]["after"]["number"] == old[0]["number"] + 2
        old = [now["after"] for now in new]


def test_values_of_the_union_keep_their_precision(teams: dict[int, Team], tmp_path: Path) -> None:
    old = teams[2].run(begin, "own-sum", str(tmp_path), 6, torch.bfloat16)
    new = teams[3].run(go_on, "own-sum", str(tmp_path), "reset", 0, torch.bfloat16)
    anchor = torch.from_numpy(old[0]["anchor"])
    assert not torch.equal(anchor, anchor.bfloat16().float())
    for now in new:
        np.testing.assert_array_equal(now["anchor"].view("i4"), old[0]["anchor"].view("i4"))


def test_one_worker_with_all_entries_needs_to_be_told_what_belongs_to_all(
    teams: dict[int, Team], tmp_path: Path
) -> None:
    teams[1].run(begin, "own-sum", str(tmp_path), 6)
    with pytest.raises(WorkerFailed, match="pass deal="):
        teams[2].run(go_on, "own-sum", str(tmp_path), "reset")
    found = teams[2].run(deal_by_hand, str(tmp_path))
    assert set((found[0] & found[1]).indices) == {"4.weight", "4.bias"}


def deal_by_hand(rank: int, size: int, path: str) -> Mask:
    work = Work(rank, size, SETTINGS["own-sum"])
    head = Mask.from_indices({n: i for n, i in work.tuning.mask.indices.items() if n.startswith("4.")}, work.model)
    with WorkersLog(path, work.rounds, work.optimizer, policy="reset") as log:
        log.restore(deal=lambda union, workers: [part | head for part in (union - head).split(workers)])
    work.train(12)
    return work.tuning.mask


def test_dealt_masks_must_have_the_union() -> None:
    union = Mask.from_indices({"w": range(6)})
    parts = union.split(2)
    check_dealt(parts, union, 2)
    with pytest.raises(ValueError, match="2 masks for 3 workers"):
        check_dealt(parts, union, 3)
    with pytest.raises(ValueError, match="3 of the 6 that were trained are missing and 1 are new"):
        check_dealt([parts[0], Mask.from_indices({"w": [9]})], union, 2)
    with pytest.raises(ValueError, match="2 entries cannot be dealt to 3 workers"):
        deal_anew(Mask.from_indices({"w": [1, 2]}).split(2), 3, Protocol(1, masks="own", reduction="sum"))


def test_a_mean_is_over_those_that_have_it() -> None:
    masks = [
        Mask.from_indices({"w": [1, 2]}),
        Mask.from_indices({"w": [2, 5]}),
        Mask.from_indices({"w": [2], "v": [0]}),
    ]
    states = [
        {"w": {"exp_avg": torch.tensor([1.0, 2.0]), "step": torch.tensor(3.0), "momentum_buffer": None, "lr": 0.5}},
        {"w": {"exp_avg": torch.tensor([4.0, 8.0]), "step": torch.tensor(7.0), "momentum_buffer": None, "lr": 0.25}},
        {"w": {}, "v": {}},  # has not taken a step yet
    ]
    mean = mean_states(masks, states, Mask.from_indices({"w": [1, 2, 4, 5], "v": [0]}))
    assert mean["w"].pop("exp_avg").tolist() == [1.0, 3.0, 0.0, 8.0]
    assert mean == {"w": {"step": torch.tensor(7.0), "momentum_buffer": None, "lr": 0.5}, "v": {}}


def test_state_that_has_no_mean_is_refused() -> None:
    mask = Mask.from_indices({"w": [1, 2]})
    history = [{"w": {"old_dirs": [torch.ones(2)]}}] * 2
    with pytest.raises(ValueError, match=r"'old_dirs' that is not one number per value.*policy='reset'"):
        mean_states([mask, mask], history, mask)


RULES = [
    {},
    {"reduction": "sum"},
    {"masks": "own", "reduction": "sum", "head": "mean"},
    {"masks": "own", "denominator": "participants", "head": "sum"},
    {"masks": "own", "denominator": "holders", "head": "mean"},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules.values()) or "shared")
def test_what_is_owed_adds_as_much_to_the_next_round(rules: dict[str, Any]) -> None:
    protocol = Protocol(1, payload="int8", **rules)
    shapes = {"a": torch.empty(4, 5), "head": torch.empty(3)}
    union, head = Mask.random(shapes, 0.7, seed=3, keep="head"), Mask.from_indices({"head": [0, 1, 2]}, shapes)
    own = protocol.masks == "own"
    before = [part | head for part in (union - head).split(3)] if own else [union] * 3
    after = deal_anew(before, 2, protocol)
    torch.manual_seed(0)
    owed = [
        {"own": torch.randn(mask.k), "merged": torch.zeros(union.k) if own else torch.randn(union.k)} for mask in before
    ]

    def divisor(masks: list[Mask]) -> Tensor:
        """By the words of the documentation."""
        holders = torch.zeros(union.k)
        for mask in masks:
            holders[places_in(union, mask)] += 1
        if not own:
            return torch.ones(union.k) * (len(masks) if protocol.reduction == "mean" else 1)
        others = {"participants": torch.full((union.k,), float(len(masks))), "holders": holders}
        divisor = torch.ones(union.k) if protocol.reduction == "sum" else others[str(protocol.denominator)]
        return torch.where(holders == len(masks), float(len(masks)) if protocol.head == "mean" else 1.0, divisor)

    wanted = sum(residual["merged"] for residual in owed)
    for mask, residual in zip(before, owed, strict=True):
        place = places_in(union, mask)
        wanted[place] += residual["own"] / divisor(before)[place]
    found = torch.zeros(union.k)
    for rank, mask in enumerate(after):
        residual = spread_owed(protocol, before, owed, after, rank)
        place = places_in(union, mask)
        found[place] += residual["own"] / divisor(after)[place]
        assert not residual["merged"].any()
    torch.testing.assert_close(found, wanted)


# --- keeping ----------------------------------------------------------------------------------------------------------


def keep_two(rank: int, size: int, path: str, until: int) -> None:
    work = Work(rank, size, {})
    with WorkersLog(path, work.rounds, work.optimizer, policy="reset", keep_last=2) as log:
        log.restore()
        work.train(until, log)


def test_older_rounds_and_generations_go(teams: dict[int, Team], tmp_path: Path) -> None:
    def kept() -> dict[str, list[int]]:
        logs = sorted(tmp_path.glob("generation-*/worker-*"))
        return {f"{log.parent.name[-1]}.{log.name[-1]}": fishmask.CheckpointLog(log).numbers for log in logs}

    teams[2].run(keep_two, str(tmp_path), 9)
    assert kept() == {"1.0": [2, 3], "1.1": [2, 3]}
    teams[3].run(keep_two, str(tmp_path), 12)
    assert kept() == {"1.0": [2, 3], "1.1": [2, 3], "2.0": [1], "2.1": [1], "2.2": [1]}
    teams[3].run(keep_two, str(tmp_path), 18)
    assert kept() == {"3.0": [1, 2], "3.1": [1, 2], "3.2": [1, 2]}


def one_cannot_write(rank: int, size: int, path: str) -> list[str]:
    work = Work(rank, size, {})
    log = WorkersLog(path, work.rounds, work.optimizer, keep_last=1)
    assert log.restore() is None
    work.train(3)
    blocked = Path(path) / "generation-00000001" / "worker-00001"
    if rank == 1:
        blocked.parent.mkdir(parents=True)
        blocked.write_text("in the way")
    told = []
    try:
        log.commit()
    except (FishError, OSError) as error:
        told.append(f"{type(error).__name__}: {error}")
    if rank == 1:
        blocked.unlink()
    log.commit()
    with log:
        work.train(6)
        log.commit()
    return [*told, str(log._log.numbers)]


def test_where_one_cannot_write_all_are_told_and_may_try_again(teams: dict[int, Team], tmp_path: Path) -> None:
    first, second = teams[2].run(one_cannot_write, str(tmp_path))
    assert first[0].startswith("FishError: round 1 is not kept; rank 1: NotADirectoryError")
    assert second[0].startswith("NotADirectoryError")
    assert (first[1], second[1]) == ("[3]", "[2]")  # what only one could write is gone too
    assert teams[2].run(go_on_plainly, str(tmp_path)) == [2, 2]


def go_on_plainly(rank: int, size: int, path: str) -> int:
    work = Work(rank, size, {})
    with WorkersLog(path, work.rounds, work.optimizer) as log:
        return log.restore().number


def finish_apart(rank: int, size: int, path: str) -> str:
    """Commit every round, with fewer steps on one worker; return the error."""
    work = Work(rank, size, {})
    try:
        with work.rounds, WorkersLog(path, work.rounds, work.optimizer) as log:
            work.train(5 if rank == 1 else 9, log)
    except FishError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_commit_that_not_all_come_to_is_told_to_all(teams: dict[int, Team], tmp_path: Path) -> None:
    first, second = teams[2].run(finish_apart, str(tmp_path))
    assert first.startswith("HandshakeError: ")
    assert "rank 1: has come to a round instead" in first
    assert second.startswith("RoundError: round 3 failed")
    assert teams[2].run(go_on_plainly, str(tmp_path)) == [1, 1]


def misuse(rank: int, size: int, path: str) -> dict[str, str]:
    work = Work(rank, size, {})
    told: dict[str, str] = {}

    def tell(name: str, call: Any) -> None:
        try:
            call()
        except (FishError, ValueError) as error:
            told[name] = str(error)

    log = WorkersLog(f"{path}/{rank}", work.rounds, work.optimizer)
    tell("apart", log.commit)
    work.train(1)
    tell("pending", log.commit)
    work.train(3)
    tell("name", lambda: log.commit(state={"rounds": 1}))
    tell("policy", lambda: WorkersLog(path, work.rounds, work.optimizer, policy="median"))
    tell("keep_last", lambda: WorkersLog(path, work.rounds, work.optimizer, keep_last=0))
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    tell("optimizer", lambda: WorkersLog(path, work.rounds, other))
    tell("arguments", WorkersLog(path, work.rounds, keep_last=1 + rank).restore)
    with WorkersLog(f"{path}/shared", work.rounds, work.optimizer) as kept:
        kept.commit()
    tell("unrestored", WorkersLog(f"{path}/shared", work.rounds, work.optimizer).commit)
    return told


def test_misuse_is_told(teams: dict[int, Team], tmp_path: Path) -> None:
    first, second = teams[2].run(misuse, str(tmp_path))
    assert first.keys() == second.keys() == {*first}
    for told in (first, second):
        assert "All workers must keep their commits in one folder that all of them see" in told["apart"]
        assert "steps that have not been exchanged" in told["pending"]
        assert "choose another name" in told["name"]
        assert "policy must be one of 'keep', 'mean', 'reset', got 'median'" in told["policy"]
        assert told["keep_last"] == "keep_last must be at least 1, got 0"
        assert "the optimizer lacks" in told["optimizer"]
        assert "keep_last: 1 on rank 0; 2 on rank 1" in told["arguments"]
        assert "holds 1 generations of commits already: call restore first" in told["unrestored"]
    assert len(first) == 8


# --- torchrun ---------------------------------------------------------------------------------------------------------

KILLER = """
import json, os, runpy, signal, sys
import torch
from fishmask import LocalRounds

torch.set_num_threads(1)
kills = json.loads(os.environ["KILLS"])
start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

def phase(rounds, name):
    if start < len(kills) and kills[start] == [rank, rounds.number, name]:
        os.kill(os.getpid(), signal.SIGKILL)

LocalRounds._phase = phase
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_here(rank: int, size: int, script: str, folder: str) -> None:
    """Run a script that would make a group in the group of this team."""
    Path(folder).mkdir(exist_ok=True)
    group = patch.multiple(dist, init_process_group=Mock(), destroy_process_group=Mock())
    with group, patch.object(sys, "argv", [script, folder]):
        runpy.run_path(script, run_name="__main__")


@pytest.mark.slow
def test_a_worker_killed_in_each_phase_costs_nothing_but_that_round(teams: dict[int, Team], tmp_path: Path) -> None:
    script = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "elastic.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "train.py").write_text(script[1])
    (tmp_path / "killed.py").write_text(KILLER)
    kills = [[0, 1, "propose"], [1, 2, "reduce"], [0, 3, "vote"], [1, 4, "commit"]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {
        "KILLS": json.dumps(kills),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    command = [*torchrun, f"--max-restarts={len(kills)}", "killed.py", "train.py", "killed"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9") == len(kills)
    # Each start but the last was killed once: five generations, of which the newest is left.
    assert [path.name for path in (tmp_path / "killed").glob("generation-*")] == ["generation-00000005"]
    teams[2].run(run_here, str(tmp_path / "train.py"), str(tmp_path / "whole"))
    wanted = torch.load(tmp_path / "whole" / "model-0.pt")
    for rank in range(2):
        found = torch.load(tmp_path / "killed" / f"model-{rank}.pt")
        for name, weight in wanted.items():
            assert torch.equal(weight.view(torch.int32), found[name].view(torch.int32)), name
