"""Local rounds on real processes, against a reference in one process."""

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
from torch import Tensor, nn
from torch.nn import functional as F

import fishmask
from fishmask import LocalRounds, Mask
from fishmask.errors import FishError, HandshakeError, RoundError
from fishmask.round_log import read_log, summary
from tests.team import Team, teams_of

SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, Team]]:
    yield from teams_of(SIZES)


# --- what the workers do ----------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x, y = batch(rank, step)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def own_mask(model: nn.Module, rank: int, size: int) -> Mask:
    """Disjoint parts of a random choice, and the head for all."""
    head = Mask.from_dense({name: torch.full(p.shape, name.startswith("4.")) for name, p in model.named_parameters()})
    return (Mask.random(model, 0.3, seed=1, exclude="4.*").split(size)[rank]) | head


def train(rank: int, size: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = settings.get("masks", "shared")
    mask = Mask.random(model, 0.3, seed=1) if masks == "shared" else own_mask(model, rank, size)
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    with LocalRounds(tuning, **settings) as rounds:
        for step in range(steps):
            descend(model, optimizer, rank, step)
    union = mask if masks == "shared" else fishmask.merge.union_of([own_mask(model, r, size) for r in range(size)])
    after = {name: p.detach() for name, p in model.named_parameters()}
    changed = Mask.between(before, after)
    return {
        "weights": {name: p.numpy().copy() for name, p in after.items()},
        "outside": (changed - union).k,
        "number": rounds.number,
        "delta": tuning.delta().mask.k,
        "union": union.k,
    }


def reference(size: int, steps: int, every: int, masks: str = "shared", reduction: str = "mean", **rest: Any) -> Any:
    """The same in one process, with full models and float64 sums over dense differences."""
    models = [network() for _ in range(size)]
    anchor = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    tunings, optimizers, held = [], [], []
    for rank, model in enumerate(models):
        mask = Mask.random(model, 0.3, seed=1) if masks == "shared" else own_mask(model, rank, size)
        held.append({n: torch.zeros(p.numel()) for n, p in model.named_parameters()})
        for name, indices in mask.indices.items():
            held[-1][name][indices] = 1
        tunings.append(fishmask.attach(model, mask))
        optimizers.append(torch.optim.AdamW(tunings[-1].parameters(), lr=0.05))
    for step in range(steps):
        for rank in range(size):
            descend(models[rank], optimizers[rank], rank, step)
        if (step + 1) % every and step + 1 < steps:
            continue
        for name in anchor:
            start = anchor[name].double()
            total = torch.zeros_like(start)
            holders = sum(h[name] for h in held).view(start.shape)
            for model in models:
                total += model.get_parameter(name).detach().double() - start
            divisor = torch.full_like(start, float(size)) if reduction == "mean" else torch.ones_like(start)
            if masks == "own":
                if reduction == "mean" and rest["denominator"] == "holders":
                    divisor = holders.clamp_min(1).double()
                divisor[holders == size] = size if rest["head"] == "mean" else 1
            anchor[name] = (start + total / divisor).float()
        for model, tuning in zip(models, tunings, strict=True):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(anchor[name])
            tuning.read_back()
    return {name: p.numpy() for name, p in anchor.items()}


RULES = [
    {"every": 4},
    {"every": 4, "reduction": "sum"},
    {"every": 3, "masks": "own", "reduction": "sum", "head": "sum"},
    {"every": 3, "masks": "own", "reduction": "sum", "head": "mean"},
    {"every": 3, "masks": "own", "denominator": "participants", "head": "mean"},
    {"every": 3, "masks": "own", "denominator": "holders", "head": "sum"},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", RULES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_workers_equal_the_reference_bit_for_bit(teams: dict[int, Team], size: int, settings: dict[str, Any]) -> None:
    results = teams[size].run(train, 10, settings)
    wanted = reference(size, 10, **settings)
    for result in results:
        assert result["outside"] == 0
        assert result["delta"] == result["union"]
        for name, weight in wanted.items():
            np.testing.assert_array_equal(result["weights"][name].view("i4"), weight.view("i4"))


# --- agreement --------------------------------------------------------------------------------------------------------


def start(rank: int, size: int, change: str) -> str:
    """Begin with one worker that differs; return the error."""
    torch.manual_seed(0)
    model = network().to(torch.bfloat16 if change == "dtype" and rank == 1 else torch.float32)
    mask = Mask.random(model, 0.3, seed=5 if change == "mask" and rank == 1 else 1)
    if change == "base" and rank == 1:
        mine = mask.indices["0.weight"]
        free = next(i for i in range(96) if i not in mine)
        model[0].weight.data.view(-1)[free] += 1e-7
    if change == "sizes" and rank == 1:
        mask = Mask.random(model, 0.2, seed=1)
    tuning = fishmask.attach(model, mask)
    if change == "values" and rank == 1:
        with torch.no_grad():
            next(tuning.parameters()).add_(1)
    every = 5 if change == "every" and rank == 1 else 4
    outer = partial(torch.optim.SGD, lr=0.7 if change == "outer" and rank == 1 else 0.5)
    before = tuning.values.clone()
    try:
        LocalRounds(tuning, every=every, outer=outer)
    except HandshakeError as error:
        assert torch.equal(tuning.values, before)
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("mask", "mask: "),
        ("sizes", "mask: "),
        ("base", "weights: 0.weight (digest"),
        ("dtype", "parameters: 0.bias, 0.weight"),
        ("values", "values: "),
        ("every", "every: 4 on ranks 0, 2; 5 on rank 1"),
        ("outer", "outer optimizer: "),
    ],
)
def test_a_worker_that_differs_is_told_on_all(teams: dict[int, Team], change: str, told: str) -> None:
    errors = teams[3].run(start, change)
    assert told in errors[0]
    assert len(set(errors)) == 1


def test_workers_that_agree_are_not_refused(teams: dict[int, Team]) -> None:
    assert teams[3].run(start, "nothing") == ["", "", ""]


def start_with_log(rank: int, size: int, path: str) -> tuple[str, int]:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    try:
        LocalRounds(tuning, every=1, log=path)
    except (HandshakeError, OSError) as error:
        descend(model, optimizer, rank, 0)  # drives no rounds
        return type(error).__name__, str(error).count("able to write the log: no: ")
    return "", 0


def test_a_log_that_cannot_be_written_is_told_on_all(teams: dict[int, Team], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "rounds.jsonl")
    assert teams[2].run(start_with_log, path) == [("HandshakeError", 1)] * 2
    assert teams[1].run(start_with_log, path)[0][0] in ("FileExistsError", "NotADirectoryError")


# --- failures ---------------------------------------------------------------------------------------------------------


def one_has_a_nan(rank: int, size: int, discards: bool) -> Any:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    rounds = LocalRounds(tuning, every=2)
    descend(model, optimizer, rank, 0)
    descend(model, optimizer, rank, 1)
    merged = tuning.values.clone()
    descend(model, optimizer, rank, 2)
    kept = tuning.values.clone()
    if rank == 1:
        with torch.no_grad():
            next(tuning.parameters())[0] = torch.nan
            kept = tuning.values.clone()
    with pytest.raises(RoundError) as caught:
        rounds.round()
    assert torch.equal(tuning.values.view(torch.int32), kept.view(torch.int32))
    assert (rounds.number, rounds.pending) == (1, 1)
    if discards:
        rounds.discard()
        assert torch.equal(tuning.values, merged)
        assert torch.equal(model[0].weight.view(-1)[tuning.mask.indices["0.weight"]], next(tuning.parameters()))
        descend(model, optimizer, rank, 3)
        assert rounds.round().steps == 1
    return str(caught.value)


@pytest.mark.parametrize("discards", [False, True])
def test_a_nan_fails_the_round_on_all_and_changes_nothing(teams: dict[int, Team], discards: bool) -> None:
    errors = teams[2].run(one_has_a_nan, discards)
    assert errors[0] == errors[1]
    assert "rank 1: 1 of" in errors[0]
    assert "The steps since round 1 are still in the values" in errors[0]


def one_raises(rank: int, size: int) -> str:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    try:
        with LocalRounds(tuning, every=2):
            descend(model, optimizer, rank, 0)
            if rank == 1:
                raise OSError("no more data")
            descend(model, optimizer, rank, 1)
    except (RoundError, OSError) as error:
        return f"{type(error).__name__} {error}"
    return ""


def test_the_error_of_one_worker_is_told_to_all(teams: dict[int, Team]) -> None:
    errors = teams[3].run(one_raises)
    assert errors[1] == "OSError no more data"
    assert errors[0] == errors[2]
    assert "rank 1: OSError: no more data" in errors[0]


# --- what else rounds do ----------------------------------------------------------------------------------------------


def uneven(rank: int, size: int) -> Any:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    with LocalRounds(tuning, every=2) as rounds:
        for step in range(3 + 2 * rank):
            descend(model, optimizer, rank, step)
    return rounds.number, tuning.values.numpy().copy()


def test_workers_may_have_different_numbers_of_steps(teams: dict[int, Team]) -> None:
    (first, one), (second, two) = teams[2].run(uneven)
    assert first == second == 3
    np.testing.assert_array_equal(one, two)


def only_one_trains(rank: int, size: int) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    rounds = LocalRounds(tuning, every=5)
    x, y = batch(rank, 0)
    loss = F.cross_entropy(model(x), y)  # also in training mode, and without a step, statistics change
    if rank == 1:
        loss.backward()
        optimizer.step()
    before = model[1].running_mean.numpy().copy()
    rounds.round()
    return before, model[1].running_mean.numpy().copy()


def test_statistics_are_those_of_workers_that_have_trained(teams: dict[int, Team]) -> None:
    (_, first), (trained, second), (_, third) = teams[3].run(only_one_trains)
    for merged in (first, second, third):
        np.testing.assert_array_equal(merged, trained)


def close_to(rank: int, size: int, settings: dict[str, Any]) -> Any:
    """Train towards the same end by another way of sending."""
    result = train(rank, size, 40, {"every": 4, **settings})
    return result["weights"]


@pytest.mark.parametrize(
    "settings", [{"mode": "fast"}, {"payload": "bfloat16"}, {"payload": "int8"}, {"overlap": 2}], ids=str
)
@pytest.mark.parametrize("masks", ["shared", "own"])
def test_other_ways_to_send_come_near(teams: dict[int, Team], settings: dict[str, Any], masks: str) -> None:
    rules = {} if masks == "shared" else {"masks": "own", "denominator": "holders", "head": "mean"}
    results = teams[3].run(close_to, {**settings, **rules})
    wanted = reference(3, 40, 4, **rules)
    for result in results[1:]:
        for name, weight in results[0].items():
            np.testing.assert_array_equal(result[name], weight)
    for name, weight in wanted.items():
        assert np.abs(results[0][name] - weight).max() < (0.5 if "overlap" in settings else 0.05)


def refreshed(rank: int, size: int, masks: str) -> Any:
    model = network()
    generator = torch.Generator().manual_seed(rank)
    scores = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    rules = {} if masks == "shared" else {"masks": "own", "reduction": "sum", "head": "sum"}
    first = Mask.random(model, 0.3, seed=1) if masks == "shared" else own_mask(model, rank, size)
    tuning = fishmask.attach(model, first)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    outer = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    with LocalRounds(tuning, every=3, outer=outer, **rules) as rounds:
        for step in range(9):
            descend(model, optimizer, rank, step)
            if rounds.number == 2 and rounds.pending == 0:
                mask = rounds.refresh(scores, optimizer, density=0.3, keep="4.*")
    return (
        {name: s.numpy() for name, s in scores.items()},
        mask,
        {n: p.detach().numpy() for n, p in model.named_parameters()},
        rounds.last.other_bytes,
    )


@pytest.mark.parametrize("masks", ["shared", "own"])
def test_a_refresh_chooses_from_the_sum_of_all_scores(teams: dict[int, Team], masks: str) -> None:
    results = teams[3].run(refreshed, masks)
    total = {name: torch.from_numpy(sum(r[0][name].astype("f8") for r in results)).float() for name in results[0][0]}
    keep = "4.*"
    if masks == "shared":
        assert {r[1].digest for r in results} == {Mask.from_scores(total, 0.3, keep=keep).digest}
    else:
        k = sum(t.numel() for name, t in total.items() if not name.startswith("4."))
        each = int(0.3 * sum(t.numel() for t in total.values()) + 1e-6) - 51
        best = Mask.from_scores({n: t for n, t in total.items() if not n.startswith("4.")}, 3 * each / k)
        whole = {n: torch.full(t.shape, n.startswith("4.")) for n, t in total.items()}
        union = results[0][1] | results[1][1] | results[2][1]
        assert union == best | Mask.from_dense(whole)
        assert [r[1].k for r in results] == [each + 51] * 3
    shards = 4 * sum(t.numel() for t in total.values()) * 2 // 3
    assert all(r[3] > shards for r in results)  # the round after a refresh counts what that has sent
    for result in results[1:]:
        for name, weight in results[0][2].items():
            np.testing.assert_array_equal(result[2][name], weight)


# --- what else a user may do ------------------------------------------------------------------------------------------


def unusual(rank: int, size: int) -> None:
    """A second LocalRounds, an optimizer of some of the values, a handshake at the wrong time."""
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    later = [p for name, p in tuning.named_parameters() if not name.startswith("0.")]
    rounds = LocalRounds(tuning, every=2)
    with pytest.raises(FishError, match="LocalRounds already"):
        LocalRounds(tuning, every=2)
    optimizer = torch.optim.SGD(later, lr=0.1)
    descend(model, optimizer, rank, 0)
    assert rounds.pending == 1
    before = tuning.values.clone()
    with pytest.raises(HandshakeError, match="weights: "):
        rounds.handshake()
    assert torch.equal(tuning.values, before)
    assert rounds.pending == 1
    descend(model, optimizer, rank, 1)
    assert (rounds.number, rounds.pending) == (1, 0)
    rounds.close()
    again = LocalRounds(tuning, every=2)
    again.close()


def test_unusual_calls_are_refused_and_change_nothing(teams: dict[int, Team]) -> None:
    teams[2].run(unusual)


def beside_others(rank: int, size: int) -> Any:
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    total = torch.zeros(1)
    with LocalRounds(tuning, every=3, overlap=2) as rounds:
        for step in range(9):
            descend(model, optimizer, rank, step)
            one = torch.ones(1)
            dist.all_reduce(one)
            total += one
    return rounds.number, total.item(), tuning.values.numpy().copy()


def test_rounds_under_way_do_not_meet_collectives_of_the_user(teams: dict[int, Team]) -> None:
    first, second = teams[2].run(beside_others)
    assert first[:2] == second[:2] == (3, 18.0)
    np.testing.assert_array_equal(first[2], second[2])


def of_low_precision(rank: int, size: int) -> Any:
    model = network().to(torch.bfloat16)
    tuning = fishmask.attach(model, own_mask(model, rank, size))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    with LocalRounds(tuning, every=2, masks="own", reduction="sum", head="mean") as rounds:
        for step in range(2):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(model(x.bfloat16()).float(), y).backward()
            optimizer.step()
        values = tuning.values.clone()
        rounds.handshake()
        assert torch.equal(tuning.values, values)
        rounds.set_mask(own_mask(model, (rank + 1) % size, size), optimizer)
    return values.numpy(), tuning.values.detach().numpy()


def test_values_of_other_workers_keep_their_precision(teams: dict[int, Team]) -> None:
    results = teams[3].run(of_low_precision)
    for rank, (_, taken_over) in enumerate(results):
        np.testing.assert_array_equal(taken_over, results[(rank + 1) % 3][0])


# --- the page that describes them -------------------------------------------------------------------------------------


def test_the_script_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 rounds, loss 0." in done.stdout
    facts = summary(read_log(tmp_path / "rounds.jsonl"))
    assert (facts["rounds"], facts["steps"], facts["workers"], facts["entries"]) == (4, 120, 2, 320)
    assert facts["payload_bytes"] == 4 * 320 * 4
    assert facts["ddp_bytes"] == 120 * 4 * (21 * 64 + 65 * 4)
    assert (tmp_path / "task.safetensors").stat().st_size < 8192


# --- simulated in one process -----------------------------------------------------------------------------------------


def by_hand(rank: int, size: int, settings: dict[str, Any], outer: str, moves: list[str]) -> Any:
    """Move values by hand between rounds; return them after each move, on every worker."""
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.0)
    rounds = LocalRounds(tuning, every=2, outer=OUTERS.get(outer), **settings)
    generator, seen = torch.Generator().manual_seed(rank), []
    for move in moves:
        if move == "step":
            with torch.no_grad():
                tuning.values.add_(torch.randn(tuning.mask.k, generator=generator), alpha=0.1)
            optimizer.step()
        elif move == "round":
            rounds.round()
        else:
            rounds.set_mask(Mask.random(model, 0.25, seed=2) | Mask.random(model, 0.1, seed=1), optimizer)
        seen.append(tuning.values.numpy().copy())
    rounds.close()
    residual = rounds._residual
    return seen, tuning.mask, (residual.own.numpy(), residual.merged.numpy())


OUTERS = {
    "sgd": partial(torch.optim.SGD, lr=0.5),
    "nesterov": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def drawn(size: int, counts: list[int]) -> list[list[Tensor]]:
    """What workers add to their values, step by step."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(size)]
    return [[torch.randn(k, generator=g) for g in generators] for k in counts]


def test_a_late_result_is_added_to_what_was_learnt_meanwhile(teams: dict[int, Team]) -> None:
    results = teams[3].run(by_hand, {"overlap": 1}, "", ["step"] * 6)
    model = network()
    anchor = fishmask.attach(model, Mask.random(model, 0.3, seed=1)).values.clone()
    values, launched = [anchor.clone() for _ in range(3)], None
    for step, drift in enumerate(drawn(3, [len(anchor)] * 6)):
        for rank in range(3):
            values[rank].add_(drift[rank], alpha=0.1)
        if launched is not None:  # one step after it began
            start = anchor.double()
            anchor = (start + sum(one.double() - start for one in launched) / 3).float()
            learnt = [now.double() - then.double() for now, then in zip(values, launched, strict=True)]
            values, launched = [(anchor.double() + one).float() for one in learnt], None
        if step in (1, 3, 5):
            launched = [one.clone() for one in values]
        for rank in range(3):
            # A round begins two steps after the last one has landed and one step was taken: at the 2nd, 4th, 6th step.
            np.testing.assert_array_equal(results[rank][0][step], values[rank].numpy())


@pytest.mark.parametrize("outer", OUTERS)
def test_an_outer_optimizer_steps_along_the_merged_difference(teams: dict[int, Team], outer: str) -> None:
    """Also after a change of mask: entries that stay keep their momentum, new ones have none."""
    moves = ["step", "step"] * 3 + ["mask"] + ["step", "step"] * 2
    results = teams[2].run(by_hand, {}, outer, moves)
    model = network()
    tuning = fishmask.attach(model, Mask.random(model, 0.3, seed=1))
    optimizer = OUTERS[outer](list(tuning.parameters()))
    before, after = tuning.mask, results[0][1]
    drifts = iter(drawn(2, [before.k] * 6 + [after.k] * 4))
    for place, move in enumerate(moves):
        if move == "mask":
            tuning.set_mask(after, optimizer)
        elif place in (0, 2, 4, 7, 9):
            anchor = tuning.values.detach().clone()
            values = [anchor.clone(), anchor.clone()]
            for value, drift in zip(values, next(drifts), strict=True):
                value.add_(drift, alpha=0.1)
        else:
            for value, drift in zip(values, next(drifts), strict=True):
                value.add_(drift, alpha=0.1)
            merged = (anchor.double() + sum(v.double() - anchor.double() for v in values) / 2).float()
            gradients = (anchor - merged).split([len(p) for p in tuning.parameters()])
            for p, gradient in zip(tuning.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
            for result in results:
                np.testing.assert_array_equal(result[0][place], tuning.values.numpy())


@pytest.mark.parametrize("payload", ["bfloat16", "int8"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_low_precision_owes_is_carried_to_another_mask(
    teams: dict[int, Team], payload: str, reduction: str
) -> None:
    moves = ["step", "step", "mask", "step", "step", "step", "step"]
    results = teams[3].run(by_hand, {"payload": payload, "reduction": reduction}, "", moves)
    model = network()
    before, after = Mask.random(model, 0.3, seed=1), results[0][1]
    start = fishmask.attach(model, before).values.detach().double()
    divisor = 3 if reduction == "mean" else 1
    wanted = torch.zeros(after.k, dtype=torch.float64)
    both = before & after
    old, new = fishmask.merge.places_in(before, both), fishmask.merge.places_in(after, both)
    drifts = drawn(3, [before.k] * 2 + [after.k] * 4)
    for number, drift in enumerate(drifts):
        learnt = 0.1 * sum(one.double() for one in drift) / divisor
        if number < 2:
            wanted[new] += learnt[old]
        else:
            wanted += learnt
    owed = sum(
        torch.from_numpy(own).double() / divisor + torch.from_numpy(rest).double() for _, _, (own, rest) in results
    )
    applied = torch.from_numpy(results[0][0][-1]).double()[new] - start[old]
    assert 1e-5 < float(owed.abs().max()) < 0.1
    torch.testing.assert_close(applied + owed[new], wanted[new], rtol=0, atol=1e-5)


def with_buffers(rank: int, size: int, trains: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model.register_buffer("never", torch.full((3,), -torch.inf))
    model.register_buffer("long", torch.full((3,), 0.1, dtype=torch.float64))
    tuning = fishmask.attach(model, Mask.random(model, 0.5, seed=1))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    model.train(trains)
    rounds = LocalRounds(tuning, every=2)
    local: dict[str, Any] = {}
    rounds._phase = lambda name: local.update({n: b.double().numpy().copy() for n, b in model.named_buffers()})
    for step in range(1 + (rank == 0)):
        descend(model, optimizer, rank, step)
    rounds.finish()
    rounds.close()
    return local, {n: b.double().numpy().copy() for n, b in model.named_buffers()}, rounds.last.payload_bytes


def test_statistics_are_averaged_counts_kept_and_constants_left_alone(teams: dict[int, Team]) -> None:
    results = teams[2].run(with_buffers, True)
    for _, after, _ in results:
        np.testing.assert_array_equal(after["never"], np.full(3, -np.inf))
        np.testing.assert_array_equal(after["long"], np.full(3, 0.1))
        assert after["1.num_batches_tracked"] == 2
        for name in ("1.running_mean", "1.running_var"):
            np.testing.assert_array_equal(after[name], results[0][1][name])
    still = teams[2].run(with_buffers, False)
    # 14 numbers of floating point and one whole one; nothing at all where no buffer has moved.
    assert [moved[2] - quiet[2] for moved, quiet in zip(results, still, strict=True)] == [14 * 4 + 8] * 2
