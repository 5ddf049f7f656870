"""The distributed experiment on GLUE: its plans and masks, dense rounds, runs of real workers, and the tables."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import distributed_glue
from experiments.distributed_glue import (
    METHODS,
    PLANS,
    RATES,
    SINGLE,
    TABLE_2,
    Config,
    DenseRounds,
    random_mask,
    read_records,
    run,
    run_plan,
    table,
)
from fishmask import LocalRounds, Mask, attach
from tests.team import Team, WorkerFailed
from tests.tiny import BAD, GOOD, OTHER, model_folder

PAPER = "FISH, own masks, sum (paper)"
SWEEP = Path(__file__).parents[1] / "results" / "glue.jsonl"


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team(2) as made:
        yield made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run on sentences that a tiny model learns, and the folder of its data."""
    folder = tmp_path_factory.mktemp("glue")
    base = model_folder(folder / "model")
    generator = random.Random(0)
    (folder / "SST-2").mkdir()
    for part, rows in (("train", 96), ("dev", 60)):
        lines = ["sentence\tlabel"]
        for row in range(rows):
            words = [generator.choice((BAD, GOOD)[row % 2]), *generator.choices(OTHER, k=3)]
            lines.append(f"{' '.join(words)}\t{row % 2}")
        (folder / "SST-2" / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {"rows": 80, "epochs": 16, "batch": 8, "density": 0.1, "examples": 24}
    return Config("SST-2", PAPER, 2, 5, 0, 1e-2, base=str(base), max_length=12, **settings), folder


# --- plans and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_a_single_worker_stands_beside_all_others(plan):
    configs = set(PLANS[plan]())
    for one in configs:
        assert one.rate == RATES[METHODS[one.method].choice]
        assert replace(one, workers=1, every=30, method=SINGLE[METHODS[one.method].choice]) in configs


@pytest.mark.parametrize("plan", ["full", "reduced"])
def test_table_2_is_planned_whole_for_three_seeds(plan):
    configs = set(PLANS[plan]())
    cells = {
        (one.task, one.method, one.workers, one.every) for one in configs if one.workers > 1 and one.method in TABLE_2
    }
    assert cells == set(product(("SST-2", "MRPC", "RTE"), TABLE_2, (2, 4), (10, 30, 100)))
    assert len([one for one in configs if one.method in TABLE_2]) == 3 * len(cells) + 3 * 3 * len(SINGLE)


def test_the_reduced_plan_begins_with_what_the_target_is_about():
    first = [one for one in PLANS["reduced"]() if one.workers == 2][: 3 * len(TABLE_2)]
    assert {(one.task, one.every) for one in first} == {("SST-2", 30)}
    assert {one.method for one in first} == set(TABLE_2)


def test_rates_are_those_that_the_single_worker_has_chosen():
    lines = [json.loads(line) for line in SWEEP.read_text(encoding="utf-8").splitlines()]
    names = {"full": "dense", "fish paper": "fish", "random": "random"}
    found = {
        (names[line["variant"]], line["recipe"]["learning_rate"])
        for line in lines
        if line["variant"] in names and line["recipe"]["seed"] == 1 and line["task"] == "SST-2"
    }
    assert found == set(RATES.items())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))


def test_random_masks_share_the_head_and_nothing_else():
    model, head = network(), ("2.weight", "2.bias")
    parts = [random_mask(model, 0.4, 7, head, part, 2) for part in range(2)]
    shared = random_mask(model, 0.4, 7, head, 0, 1)
    assert {mask.k for mask in (*parts, shared)} == {int(0.4 * shared.n)}
    both = parts[0] & parts[1]
    assert {name: len(indices) for name, indices in both.indices.items()} == {"2.weight": 120, "2.bias": 3}
    assert random_mask(model, 0.4, 8, head, 0, 2) != parts[0]


# --- rounds -----------------------------------------------------------------------------------------------------------


def dense_run(rank: int, size: int, reduction: str, masked: bool) -> tuple[list[Any], int, list[int]]:
    """Train all weights with either kind of rounds; return them, how many rounds, and what each of them sent."""
    model = network()
    rounds: Any
    if masked:
        tuning = attach(model, Mask.from_dense({n: torch.ones_like(p).bool() for n, p in model.named_parameters()}))
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
        rounds = LocalRounds(tuning, every=3, reduction=reduction)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        rounds = DenseRounds(model, optimizer, every=3, reduction=reduction)
    sent = []
    generator = torch.Generator().manual_seed(rank)
    for _ in range(8):
        x = torch.randn(8, 6, generator=generator)
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rounds.pending == 0:
            sent.append(rounds.last.payload_bytes)
    rounds.finish()
    return [p.detach().numpy().copy() for p in model.parameters()], rounds.number, [*sent, rounds.last.payload_bytes]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dense_rounds_are_local_rounds_of_a_mask_of_everything(team, reduction):
    dense, masked = (team.run(dense_run, reduction, masked) for masked in (False, True))
    for one, other in zip(dense, masked, strict=True):
        assert all((a == b).all() for a, b in zip(one[0], other[0], strict=True))
        assert one[1:] == other[1:]
    assert dense[0][1] == 3
    assert all((a == b).all() for a, b in zip(dense[0][0], dense[1][0], strict=True))
    assert not (dense[0][0][0] == network()[0].weight.detach().numpy()).all()


# --- runs -------------------------------------------------------------------------------------------------------------


def run_here(rank: int, size: int, config: Config, source: Path) -> dict[str, Any]:
    return run(config, source)


def plan_here(rank: int, size: int, configs: list[Config], results: Path, source: Path) -> list[str]:
    told: list[str] = []
    run_plan(configs, results, source, told.append)
    return told


def test_the_papers_protocol_learns_refreshes_and_counts_what_it_sends(team, tiny):
    config, source = tiny
    records = team.run(run_here, config, source)
    one = records[0]
    assert one["steps"] == 80
    assert (one["rounds"], one["masks_chosen"]) == (16, 2)
    assert one["payload_bytes"] == 16 * 4 * one["entries"] == records[1]["payload_bytes"]
    assert one["first_mask_bytes"] > 0
    assert one["other_bytes"] > one["first_mask_bytes"] / 2  # the second mask is among it
    assert one["accuracy"] == one["score"] > one["majority"] + 0.2
    assert "accuracy" not in records[1]


@pytest.mark.parametrize("method", [name for name in METHODS if name != PAPER])
def test_every_method_trains_on_two_workers(team, tiny, method):
    config, source = tiny
    config = replace(config, method=method, epochs=2, every=3)
    records = team.run(run_here, config, source)
    assert [one["rounds"] for one in records] == [4, 4]  # of 10 steps: at 3, 6, 9, and the rest
    for one in records:  # float32, half of the entries to the other worker and back, or all of them to it
        assert one["payload_bytes"] == pytest.approx(4 * 4 * one["entries"], abs=4 * 8)
    assert records[0]["masks_chosen"] == (METHODS[method].choice == "fish")
    assert 0 <= records[0]["accuracy"] <= 1


def test_a_plan_runs_what_is_for_this_many_workers_and_has_no_record(team, tiny, tmp_path):
    config, source = tiny
    configs = [replace(config, epochs=1, seed=seed, every=4) for seed in range(2)]
    alone = replace(config, workers=1, epochs=1, method=SINGLE["fish"])
    results = tmp_path / "folder" / "results.jsonl"
    told = team.run(plan_here, [configs[0], alone], results, source)
    assert [len(lines) for lines in told] == [1, 0]
    team.run(plan_here, [alone, *configs], results, source)
    assert [Config(**record["config"]) for record in read_records(results)] == configs
    run_plan([alone, *configs], results, source, lambda line: None)
    assert [Config(**record["config"]) for record in read_records(results)] == [*configs, alone]
    assert read_records(results)[-1]["payload_bytes"] == 0


def test_a_run_for_other_workers_is_refused(team, tiny):
    config, source = tiny
    with pytest.raises(ValueError, match="for 2 workers, there are 1"):
        run(config, source)
    with pytest.raises(WorkerFailed, match="2 workers have no step each"):
        team.run(run_here, replace(config, epochs=0.1), source)


# --- tables -----------------------------------------------------------------------------------------------------------


def record(config: Config, accuracy: float) -> dict[str, Any]:
    sizes = {"payload_bytes": 4_000_000, "other_bytes": 1000, "first_mask_bytes": 2_000_000}
    return {
        "config": asdict(config), "accuracy": accuracy, "f1": accuracy + 0.1, "majority": 0.5, "steps": 120,
        "rounds": 8, **sizes,
    }  # fmt: skip


def test_the_table_sets_workers_beside_the_single_one(tmp_path):
    planned = list(PLANS["reduced"]())
    results = tmp_path / "results.jsonl"

    def cell(method: str, workers: int, every: int, task: str = "MRPC") -> list[Config]:
        key = (method, workers, every, task)
        return [one for one in dict.fromkeys(planned) if (one.method, one.workers, one.every, one.task) == key]

    lines = [record(one, 0.80 + 0.01 * one.seed) for one in cell(SINGLE["fish"], 1, 30)]
    lines += [record(one, 0.805) for one in cell(PAPER, 2, 30)]
    lines += [record(one, 0.70) for one in cell(SINGLE["fish"], 2, 30)][:1]
    lines += [record(replace(cell(PAPER, 2, 30)[0], density=0.3), 0.1)]  # of no plan
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = table(["reduced"], results)
    assert "SST-2" not in text
    sizes = "500.0 kB | 6.0 MB |"
    assert f"| {PAPER} | 80.5 ± 0.0, F1 90.5 ± 0.0 (3) | 81.0 ± 1.0, F1 91.0 ± 1.0 (3) | −0.5 | {sizes}" in text
    assert f"| {SINGLE['fish']} | 70.0, F1 80.0 (1) | 81.0 ± 1.0, F1 91.0 ± 1.0 (3) | −11.0 | {sizes}" in text
    assert f"with a merge every 30 steps: {PAPER}." in text
    assert table(["long", "reduced"], results) == text
    results.write_text("".join(json.dumps(line) + "\n" for line in lines[3:]), encoding="utf-8")
    assert "Within" in text and "Within" not in table(["reduced"], results)
    assert "240 steps of 16 in all, 120 by each worker. Always the most frequent class: 50.0." in text
    assert distributed_glue.RESULTS.name == "distributed_glue.jsonl"
