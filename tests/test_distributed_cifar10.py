"""CIFAR-10 on several workers, on synthetic images: what they share, choose, send and record."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import distributed_cifar10
from experiments.distributed_cifar10 import PLANS, Config, run, run_plan, single, table
from experiments.from_scratch import Images, score, training_batches
from experiments.images import TrainingImages
from experiments.resnet import resnet9
from fishmask import Mask
from fishmask.live import paused
from tests.team import Team

# Sixteen steps of each worker, of which the first four are dense.
TINY = Config(
    model="resnet9", width=2, method="fish", density=0.1, lr=0.2, epochs=4, peak=1.0, images=40, batch=10, examples=20,
    seed=3, workers=2, every=3,
)  # fmt: skip
DENSE = replace(TINY, method="dense", density=1.0, refresh="never")


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = torch.randint(0, 200, (count, 32, 32, 3), generator=generator)
    return (pixels + 5 * labels[:, None, None, None]).to(torch.uint8), labels


def images() -> Images:
    return Images(TrainingImages(*pictures(40, 0), torch.device("cpu")), pictures(31, 1))


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team(2) as made:
        yield made


# --- what the workers do ----------------------------------------------------------------------------------------------


def observed(rank: int, size: int, config: Config, folder: Path) -> dict[str, Any]:
    """Run, and note the weights at every choice of a mask and at the end, the masks, and what all scores would say."""
    seen: dict[str, Any] = {"weights": [], "masks": [], "single": [], "rounds": [], "pending": []}
    chosen, tested = distributed_cifar10.choose, distributed_cifar10.accuracy

    def weights(model: torch.nn.Module) -> None:
        seen["weights"].append({name: p.detach().clone() for name, p in model.named_parameters()})

    def choose(config, model, rounds, optimizer, images, number, worker):
        weights(model)
        with paused(model):
            seen["single"].append(Mask.from_scores(score(config, model, images, number), config.density, keep="linear"))
        seen["pending"].append(rounds.pending)
        chosen(config, model, rounds, optimizer, images, number, worker)
        seen["masks"].append(rounds.tuning.mask)
        seen["rounds"].append(rounds.number)

    def accuracy(config, model, test):
        weights(model)
        seen["tested"] = len(test[1])
        return tested(config, model, test)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_cifar10, "choose", choose)
        patch.setattr(distributed_cifar10, "accuracy", accuracy)
        return seen | {"record": run(config, images(), folder / "rounds.jsonl")}


@pytest.mark.parametrize("method", ["fish", "random"])
def test_workers_share_a_mask_of_the_merged_model_and_touch_nothing_else(team, tmp_path, method):
    first, second = team.run(observed, replace(TINY, method=method), tmp_path)
    assert second["record"] is None and first["tested"] + second["tested"] == 31
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert first["masks"] == second["masks"] and first["pending"] == [0]
    (mask,), (before, after) = first["masks"], first["weights"]
    assert mask.k == int(0.1 * mask.n) == first["record"]["masked"]
    changed = Mask.between(before, after)
    assert (changed - mask).k == 0 and changed.k > 0.9 * mask.k
    torch.manual_seed(TINY.seed)
    fresh = {name: p.detach() for name, p in resnet9(TINY.width).named_parameters()}
    assert Mask.between(fresh, before).k > 0.9 * mask.n  # the warm-up is dense
    if method == "fish":  # the workers' shares of the examples are what one worker would score
        assert mask.overlap(first["single"][0]) > 0.99
    else:
        assert mask.overlap(first["single"][0]) < 0.9


def test_rounds_fall_where_they_should_and_their_bytes_are_told_apart(team, tmp_path):
    record = team.run(run_in, TINY, tmp_path)[0]
    # After steps 3 and, to choose the mask, 4; then 7, 10, 13 and 16.
    assert (record["rounds"], record["dense_rounds"], record["choices"]) == (6, 2, 1)
    model = resnet9(TINY.width)
    statistics = sum(b.numel() * 4 if b.is_floating_point() else 8 for b in model.buffers())
    n = sum(p.numel() for p in model.parameters())
    assert 4 * n <= record["dense_bytes"] / 2 - statistics <= 4 * n + 16  # padding to the number of workers
    assert 4 * record["masked"] <= record["masked_bytes"] / 4 - statistics <= 4 * record["masked"] + 16
    assert record["other_bytes"] > 4 * n / 2  # half of the scores go to the other worker
    random = team.run(run_in, replace(TINY, method="random"), tmp_path)[0]
    assert random["masked_bytes"] == record["masked_bytes"] and random["other_bytes"] < 4096
    dense = team.run(run_in, DENSE, tmp_path)[0]
    assert (dense["rounds"], dense["dense_rounds"], dense["masked_bytes"], dense["choices"]) == (6, 6, 0, 0)
    assert dense["masked"] == dense["entries"] == n
    for one in (record, random, dense):
        assert json.loads(json.dumps(one, allow_nan=False)) == one
        assert len(one["loss"]) == 4 and not one["diverged"] and one["test_images"] == 31
        assert (one["accuracy"] * 31) == pytest.approx(round(one["accuracy"] * 31))


def run_in(rank: int, size: int, config: Config, folder: Path) -> Any:
    log = folder / f"{config.method}-{config.masks}-{config.reduction}-{config.lr:g}.jsonl"
    return run(config, images(), log)


def test_a_mask_is_chosen_anew_after_every_tenth_round(team, tmp_path):
    first, _ = team.run(observed, replace(TINY, every=1), tmp_path)
    assert first["rounds"] == [4, 14]
    assert first["masks"][0] != first["masks"][1]
    assert first["record"]["choices"] == 2


def test_masks_of_the_workers_own_are_disjoint_and_are_averaged_or_summed(team, tmp_path):
    """With one masked round both reductions merge the same steps: a sum moves a worker's own entries twice as far."""
    moves = {}
    for reduction in ("mean", "sum"):
        config = replace(TINY, method="random", masks="own", reduction=reduction, every=12)
        first, second = team.run(observed, config, tmp_path / reduction)
        (mine,), (other,) = first["masks"], second["masks"]
        head = mine & other
        assert {name: len(indices) for name, indices in head.indices.items()} == {"linear.weight": 160}
        assert mine.k == other.k == int(0.1 * mine.n)
        before, after = first["weights"]
        assert all(torch.equal(after[name], second["weights"][1][name]) for name in after)
        changed = Mask.between(before, after)
        assert (changed - (mine | other)).k == 0 and changed.k > 0.9 * (mine | other).k
        moves[reduction] = {name: after[name].double() - before[name].double() for name in after}
    for name, move in moves["mean"].items():
        times = 1 if name == "linear.weight" else 2
        torch.testing.assert_close(moves["sum"][name], times * move, rtol=1e-3, atol=1e-6)


def test_a_training_that_is_not_finite_ends_at_the_last_round_and_says_so(team, tmp_path):
    # Far too high a rate from the second round on.
    config = replace(DENSE, lr=1e30)
    record = team.run(run_in, config, tmp_path)[0]
    assert record["diverged"] and record["rounds"] < 6 and 0 <= record["accuracy"] <= 1
    json.dumps(record, allow_nan=False)
    assert team.run(run_in, DENSE, tmp_path)[0]["rounds"] == 6  # the workers are as good as before


def test_every_worker_has_its_own_order_of_all_images():
    def labels(worker: int) -> list[int]:
        return torch.cat([y for _, y in training_batches(TINY, images().training, 0, worker)]).tolist()

    assert labels(0) == labels(0) != labels(1)
    assert sorted(labels(0)) == sorted(labels(1))


def test_workers_score_the_examples_of_one_between_them():
    torch.manual_seed(0)
    model, training = resnet9(2).eval(), images().training
    parts = [score(TINY, model, training, 0, worker, 2) for worker in (0, 1)]
    for name, whole in score(TINY, model, training, 0).items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole, rtol=1e-3, atol=1e-8)
    assert not torch.equal(parts[0]["linear.weight"], parts[1]["linear.weight"])


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_plans_hold_runs_that_can_be_run_and_as_much_work_for_one_worker(name):
    configs = list(PLANS[name]())
    for config in configs:
        config.check()
    assert len(set(configs)) == len(configs) > 0
    assert len({config.workers * config.steps for config in configs}) == 1
    assert {round(c.warm_up / c.steps, 9) for c in configs} == {0, 0.1}
    shared = [c for c in configs if c.workers == 2 and c.masks == "shared" and c.merges == 10]
    assert shared and all(single(config) in configs for config in shared)


def test_the_paper_plan_is_the_authors_setting():
    configs = [c for c in PLANS["paper"]() if c.workers == 2]
    assert {(c.model, c.images, c.epochs, c.peak, c.batch, c.examples) for c in configs} == {
        ("resnet34", 50_000, 50, 5.0, 512, 256)
    }
    assert {c.every for c in configs} == {100, 500, 2500} and {c.steps for c in configs} == {4850}
    assert {c.density for c in configs if c.method == "fish"} == {0.005, 0.02, 0.1}
    assert len(configs) == 3 * 5 * 3 * (1 + 2 * 3 + 2 * 3)


def test_a_plan_runs_what_is_for_this_many_workers_and_has_no_record(tmp_path):
    results, told = tmp_path / "folder" / "results.jsonl", []
    plan = [single(replace(TINY, epochs=2, seed=seed)) for seed in (1, 2)]
    run_plan([TINY, *plan], results, lambda count: images(), told.append)
    assert [json.loads(line)["config"] for line in results.read_text().splitlines()] == [asdict(c) for c in plan]
    told.clear()
    run_plan([*plan, replace(plan[0], method="random")], results, lambda count: images(), told.append)
    assert told[0].startswith("run 3 of 3") and len(told) == 2


def planned(rank: int, size: int, plan: list[Config], results: Path) -> list[str]:
    told: list[str] = []
    where = results if rank == 0 else results.with_name("other")
    run_plan(plan, where, lambda count: images(), told.append)
    return told


def test_all_workers_skip_what_rank_0_has_a_record_of(team, tmp_path):
    results = tmp_path / "results.jsonl"
    plan = [replace(TINY, epochs=2), replace(TINY, epochs=2, seed=4)]
    told, silent = team.run(planned, plan[:1], results)
    assert len(told) == 2 and not silent
    team.run(planned, plan, results)
    assert [json.loads(line)["config"]["seed"] for line in results.read_text().splitlines()] == [3, 4]
    assert list(tmp_path.iterdir()) == [results]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"decay": "leak"}, "decay must be masked"),
        ({"masks": "own"}, "method fish has a shared one"),
        ({"reduction": "sum"}, "a sum is for masks of the workers' own"),
        ({"workers": 3}, "20 examples cannot be shared out evenly to 3 workers"),
        ({"refresh": "epoch"}, "refresh must be one of never, rounds"),
        ({"images": 50}, "says 50 images, but there are 40"),
        ({}, "says 2 workers, but there are 1"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        run(replace(TINY, **change), images(), tmp_path / "rounds.jsonl")
    assert not list(tmp_path.iterdir())


# --- the table --------------------------------------------------------------------------------------------------------


def measured(config: Config, accuracy: float, **more: Any) -> str:
    record = {"diverged": False, "rounds": 11, "dense_rounds": 1, "dense_bytes": 1e6, "masked_bytes": 2e5}
    return json.dumps({"config": asdict(config), "accuracy": accuracy, **record, "other_bytes": 3e5, **more})


def test_the_table_has_means_beside_the_single_worker(tmp_path, monkeypatch):
    # 16 steps: 16, 8 and 2 merges.
    cells = [replace(TINY, every=every) for every in (1, 2, 8)]
    own = replace(cells[1], method="random", masks="own")
    plan = [replace(c, seed=s) for c in (*cells, single(cells[0]), single(cells[1]), own) for s in (1, 2)]
    monkeypatch.setitem(PLANS, "tiny", lambda: iter(plan))
    lines = [
        measured(replace(cells[1], seed=1), 0.5),
        measured(replace(cells[1], seed=2), 0.6, other_bytes=5e5),
        measured(replace(cells[1], seed=9), 0.9),  # not planned
        measured(replace(cells[2], seed=1), 0.1, diverged=True),
        measured(replace(single(cells[0]), seed=1), 0.7),
        measured(replace(single(cells[1]), seed=1), 0.8),
        measured(replace(own, seed=2), 0.4),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines) + "\n")
    head, _, *rows, between, caption = table("tiny", path).splitlines()
    assert head.endswith("| 16 merges | 8 merges | 2 merges | a round | in all, 8 merges |")
    assert rows == [
        "| fish | 10.0% | 0.2 | 80.0 (1) | 70.0 (1) |  | 55.0 ± 7.1 (2) | 10.0 (1, 1 diverged) | 0.020 MB | 1.60 MB |",
        "| random, disjoint, mean | 10.0% | 0.2 |  |  |  | 40.0 (1) |  | 0.020 MB | 1.50 MB |",
    ]
    assert not between and "16 steps of 10 each, merged every 1, 2, 8 steps" in caption


def test_the_command_runs_the_cells_of_one_worker(tmp_path, monkeypatch, capsys):
    plan = [single(replace(TINY, epochs=2)), TINY]
    monkeypatch.setitem(PLANS, "reduced", lambda: iter(plan))
    monkeypatch.setattr(distributed_cifar10, "read_images", lambda path, part, count=None: pictures(count or 31, 0))
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["distributed_cifar10", "DATA", "--plan", "reduced", "--results", str(results)])
    distributed_cifar10.main()
    assert [json.loads(line)["config"] for line in results.read_text().splitlines()] == [asdict(plan[0])]
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy")
