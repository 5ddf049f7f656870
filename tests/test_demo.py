import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from experiments import demo_search, render
from fishmask import demo
from fishmask.cli import app
from fishmask.errors import FishError
from fishmask.loop import no_progress
from fishmask.measure import environment
from fishmask.workers import run_worker


def record(method, seed=0, pearson=0.5):
    recipe = {**asdict(demo.RECIPES[method]), "seed": seed}
    figures = {"pearson": pearson, "spearman": 0.25, "seconds_per_step": 0.125, "peak_memory_bytes": 700_000_000}
    sizes = {"entries": 1234, "loaded_memory_bytes": 400_000_000, "file_bytes": 670_000}
    reload = {"reload_identical": True} if method == "robust" else {}
    line = {"name": method, **figures, **sizes, "recipe": recipe, **environment(), **reload}
    return json.loads(json.dumps(line))


@pytest.fixture
def results(monkeypatch, tmp_path):
    """What the demo would measure; the commands see it instead of running for minutes."""
    results = [record(method) for method in demo.RECIPES]
    monkeypatch.setattr(demo, "run", lambda *args, **options: results)
    monkeypatch.chdir(tmp_path)
    return results


def test_the_demo_prints_one_table_with_every_method(results):
    result = CliRunner().invoke(app, ["demo"], env={"COLUMNS": "1000"})
    assert result.exit_code == 0, result.output
    for cell in (
        *demo.COLUMNS,
        "robust recipe, 0.5 %",
        "FISH as in the paper, 0.5 %",
        "biases only",
        "1,234",
        "0.500",
        "0.125",
        "700 MB",
        "400 MB of it are there before",
        "0.67 MB",
    ):
        assert cell in " ".join(result.stdout.split())
    assert "predictions identical, bit for bit" in result.stdout


def test_other_predictions_after_reloading_fail_the_demo(results):
    results[1]["reload_identical"] = False
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 1
    assert "the reloaded delta gives other predictions" in result.stderr
    assert json.loads(result.stdout) == results


def test_results_are_recorded_only_on_request(results, tmp_path):
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    assert not (tmp_path / "results").exists()
    assert CliRunner().invoke(app, ["demo", "--record"]).exit_code == 0
    lines = (tmp_path / "results" / "demo.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results


def test_a_method_that_fails_says_why(tmp_path):
    with pytest.raises(FishError, match=r"process for 'FISH' failed: .*invalid choice: 'nonsense'"):
        run_worker("fishmask.demo", ["--one", "nonsense"], title="FISH", threads=1, progress=no_progress)


def test_the_learning_rates_are_those_of_the_committed_search():
    lines = [(render.demo_name(line["recipe"]), line) for line in render.records("demo_search")]
    for name, recipe in demo.RECIPES.items():
        found = {line["recipe"]["learning_rate"]: line["pearson"] for known, line in lines if known == name}
        assert max(found, key=found.__getitem__) == recipe.learning_rate
        place = demo_search.GRID.index(recipe.learning_rate)
        assert set(demo_search.GRID[place - 1 : place + 2]) <= set(found)


def test_a_table_of_several_seeds_has_mean_and_deviation(monkeypatch):
    lines = [record(method, seed, 0.5 + seed / 10) for seed in (0, 1, 2) for method in demo.RECIPES]
    monkeypatch.setattr(render, "records", lambda name: lines)
    text = render.render("before\n<!-- begin demo -->\nold\n<!-- end demo -->\nafter\n")
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "0.600 ± 0.100" in text and "of 3 seeds" in text
    assert text.count("\n|") == 2 + len(demo.RECIPES)
    assert render.render(text) == text


def test_the_documents_are_up_to_date():
    for path in (render.ROOT / "README.md", *sorted((render.ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        assert render.render(text) == text, f"{path.name}: run python -m experiments.render"
