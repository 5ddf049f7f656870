"""The frontier of accuracy against training time: its runs, its clock and its tables."""

import json
import sys

import pytest

from benchmarks import budgets
from experiments import frontier
from experiments.frontier import POINTS, Clock, table
from fishmask.train import FILLING
from tests.test_distributed_glue import Config, team, tiny  # noqa: F401 (fixtures)


def line(name, seed=0, accuracy=0.8, seconds=100.0, rate=None, held_out=0.8, **changes):
    recipe = {"learning_rate": rate or POINTS[name].learning_rate}
    parts = {"cpu_seconds": 2 * seconds, "cpu_seconds_choosing": 0.2 * seconds, "cpu_seconds_filling": 0.1 * seconds}
    record = {"task": "MRPC", "name": name, "seed": seed, "rows": 1600, "steps": 200, "recipe": recipe}
    record |= {"validation": {"score": held_out}, "test": {"accuracy": accuracy}, "most_frequent": 0.684, **parts}
    record |= {"cpu_seconds_per_step": 0.7 * seconds / 200, "predicted_step": None, "prefix": {}}
    return record | changes


CACHED = {"predicted_step": 1 / 3, "prefix": {"bytes": 132_400_000, "served": 6400, "computed": 1600}}


def test_the_table_has_means_shares_of_the_plain_mask_and_the_goal():
    lines = [line("full", seconds=74), line("FISH plain"), line("FISH plain", 1, 0.7)]
    lines += [line("FISH 0.34 cache", seed, 0.81 - seed / 10, 40, **CACHED) for seed in (0, 1)]
    text = table(lines)
    assert "**MRPC**: 1,600 rows, 4 epochs. Always the same class: 68.4%." in text
    assert "| full | 0.0001 | 80.0% (1) |  | 0.74 | 0.74 | 74 | 15 | 7 | 52 |  |" in text
    assert "| FISH 0.34 cache | 0.001 | 76.0% ± 7.1 (2) | 0.33 | 0.40 | 0.40 | 40 | 8 | 4 | 28 | 132 |" in text
    assert "- FISH 0.34 cache: +1.0 ± 0.0 points (2 seeds) in 0.40 of the time: **reached**" in text


@pytest.mark.parametrize(("accuracy", "seconds"), [(0.79, 40), (0.81, 51)])
def test_the_goal_is_missed_by_accuracy_or_by_time(accuracy, seconds):
    text = table([line("FISH plain"), line("FISH 0.34 cache", 0, accuracy, seconds, **CACHED)])
    assert "**missed**" in text and "**reached**" not in text


def test_a_plain_mask_at_chance_says_nothing():
    text = table([line("FISH plain", accuracy=0.68), line("FISH 0.34 cache", 0, 0.7, 40, **CACHED)])
    assert "+2.0 points (1 seed) in 0.40 of the time: **says nothing, since the plain mask does no better" in text


def test_the_rate_is_the_one_that_did_best_on_held_out_rows():
    lines = [line("random plain"), line("random 0.34 cache", held_out=0.7, accuracy=0.9, **CACHED)]
    lines += [line("random 0.34 cache", seed, 0.6, rate=3e-2, held_out=0.75, **CACHED) for seed in (0, 1)]
    text = table(lines)
    assert "| random 0.34 cache | 0.03 | 60.0% ± 0.0 (2) |" in text and "90.0%" not in text


def test_each_task_has_a_table_and_points_without_runs_are_left_out():
    text = table([line("full"), line("full", task="RTE", most_frequent=0.527), line("FISH plain", task="RTE")])
    assert text.index("**MRPC**") < text.index("**RTE**") and "52.7%" in text and "random" not in text


def test_the_clock_counts_what_comes_before_the_first_step_as_choosing():
    clock = Clock()
    clock.spent = [("scoring", 1, 4.0), (FILLING, 0, 2.0), (FILLING, 1, 3.0), (FILLING, 2, 1.0)]
    clock.spent += [("training", 1, 1.5), *(("training", done, 0.5) for done in (2, 3, 4))]
    assert clock.seconds() == {
        "cpu_seconds": 13.0,
        "cpu_seconds_choosing": 4.0 + 2.0 + 1.0,
        "cpu_seconds_filling": 4.0,
        "cpu_seconds_training": 2.0,
        "cpu_seconds_per_step": 0.5,
    }


def test_steps_are_measured_beside_what_was_counted(tiny: tuple[Config, object], monkeypatch):  # noqa: F811
    monkeypatch.setattr(budgets, "BASE", tiny[0].base)
    monkeypatch.setattr(budgets, "DENSITY", 0.05)
    lines = budgets.measure(2, 3, 8)
    assert [(line["lowest"], line["cached"]) for line in lines] == [(0, False), (1, False), (1, True), (2, True)]
    assert [line["counted"] for line in lines] == sorted((line["counted"] for line in lines), reverse=True)
    assert lines[0]["measured"] == 1 and all(len(line["seconds_all"]) == 2 for line in lines)


def test_points_are_run_once_and_recorded(tiny: tuple[Config, object], tmp_path, monkeypatch):  # noqa: F811
    config, data = tiny
    monkeypatch.setattr(frontier, "BASE", config.base)
    output = tmp_path / "frontier.jsonl"
    monkeypatch.setattr(
        sys, "argv",
        ["frontier", str(data), "-o", str(output), "--task", "SST-2", "--rows", "80", "--seeds", "1",
         "--point", "full", "random 0.51 cache"],
    )  # fmt: skip
    frontier.main()
    whole, cached = (json.loads(text) for text in output.read_text().splitlines())
    assert whole["name"] == "full" and whole["prefix"] == {} and whole["lowest"] is None
    assert cached["rows"] == 64 and cached["held_out"] == 16 and cached["steps"] == 4 * 2
    assert cached["lowest"] == 1 and cached["prefix"]["served"] == 4 * cached["prefix"]["computed"] == 4 * 64
    assert sum(cached["layers"].values()) == cached["entries"] and cached["layers"]["bert.encoder.layer.0"] == 0
    assert 0 < cached["cpu_seconds_per_step"] < cached["cpu_seconds_training"] < cached["cpu_seconds"]
    assert cached["most_frequent"] == 0.5 and 0 <= cached["test"]["accuracy"] <= 1
    frontier.main()
    assert len(output.read_text().splitlines()) == 2
