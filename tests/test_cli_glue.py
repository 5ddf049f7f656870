"""The commands of ``fishmask glue`` and ``fishmask report`` on tiny data."""

import json
from zipfile import ZipFile

import pytest
import torch

from fishmask.cli_mask import device_named
from fishmask.methods import METHODS
from tests import tiny
from tests.test_cli import answer, call, refusal
from tests.test_sweep import glue_folder, in_this_process, one_thread  # noqa: F401  (a fixture used by its name)

LITTLE = ("--density", 0.1, "--epochs", 2, "--max-length", 16, "--examples", 16, "--held-out", 0.25, "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    tiny.model_folder(folder / "model")
    glue_folder(folder / "data")
    return folder


@pytest.fixture(scope="module")
def swept(place):
    """The answer of a run of three methods on two tasks, and the jobs that it took."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        jobs = in_this_process(monkeypatch)
        found = answer(*command(place), "--task", "sts-b", "--task", "RTE", "--task", "stsb")
    return found, jobs


def command(place, *arguments, output="runs"):
    chosen = ("--method", "fish-paper", "--method", "lora", "--method", "full", "--seeds", 2, "--batch-size", 8)
    rates = ("--rates", "1e-2", "--rates", "full=1e-3,1e-2")
    about = ("--model", place / "model", "-o", place / output)
    return ("glue", "run", place / "data", *about, *chosen, *rates, *LITTLE, *arguments)


def test_run_answers_with_the_records_of_its_runs_and_leaves_them(place, swept):
    records, jobs = swept
    assert [(record["variant"], record["task"], record["recipe"]["seed"]) for record in records] == [
        ("fish paper", "STS-B", 0), ("fish paper", "RTE", 0), ("lora", "STS-B", 0), ("lora", "RTE", 0),
        ("full", "STS-B", 0), ("full", "STS-B", 0), ("full", "RTE", 0), ("full", "RTE", 0),
        ("fish paper", "STS-B", 1), ("fish paper", "RTE", 1), ("lora", "STS-B", 1), ("lora", "RTE", 1),
        ("full", "STS-B", 1), ("full", "RTE", 1),
    ]  # fmt: skip
    assert len(jobs) == len(records)
    rates = {record["variant"]: set() for record in records}
    for record in records:
        rates[record["variant"]].add(record["recipe"]["learning_rate"])
        assert (record["recipe"]["density"], record["recipe"]["epochs"], record["held_out"]) == (0.1, 2, 10)
    assert rates == {"fish paper": {1e-2}, "lora": {1e-2}, "full": {1e-3, 1e-2}}
    lines = [json.loads(line) for line in (place / "runs" / "results.jsonl").read_text().splitlines()]
    assert sorted(map(json.dumps, lines)) == sorted(map(json.dumps, records))


def test_the_same_again_runs_nothing_and_prints_a_table(monkeypatch, place, swept):
    jobs = in_this_process(monkeypatch)
    result = call(*command(place), "--task", "STS-B", "--task", "RTE")
    assert not jobs
    assert "fish paper" in result.stdout and "validation" in result.stdout
    assert "sums them up" in result.stderr and "sums them up" not in result.stdout
    assert answer(*command(place), "--task", "RTE") == [record for record in swept[0] if record["task"] == "RTE"]


def test_without_tasks_all_those_of_the_folder(monkeypatch, place, tmp_path):
    jobs = in_this_process(monkeypatch)
    arguments = ("--method", "random", "--rates", "1e-2", "--batch-size", 20, "--seeds", 1, "--epochs", 1)
    found = answer("glue", "run", place / "data", "--model", place / "model", "-o", tmp_path, *LITTLE, *arguments)
    assert [record["task"] for record in found] == ["STS-B", "MNLI", "RTE"] and len(jobs) == 3


def test_ablate_varies_one_setting(monkeypatch, place, tmp_path):
    in_this_process(monkeypatch)
    arguments = ("--task", "RTE", "--model", place / "model", "--rates", "1e-2", "--seeds", 1, *LITTLE)
    found = answer("glue", "ablate", "density", place / "data", "--values", "0.1,0.2", *arguments, "-o", tmp_path)
    assert [(record["variant"], record["recipe"]["density"]) for record in found] == [
        ("fish paper", 0.1), ("fish paper", 0.2), ("random", 0.1), ("random", 0.2),
    ]  # fmt: skip
    assert all(record["recipe"]["batch_size"] == 16 for record in found)
    found = answer("glue", "ablate", "score", place / "data", *arguments, "-o", tmp_path)
    assert [record["recipe"]["score"] for record in found] == ["square", "absolute"]
    table = call("glue", "ablate", "score", place / "data", *arguments, "-o", tmp_path).stdout
    assert all(word in table for word in ("score", "square", "absolute"))  # the rows are told apart
    # The one that both have in common was there already; the file has the runs of both commands.
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 5


def test_the_settings_of_the_training_are_options(monkeypatch, place, tmp_path):
    in_this_process(monkeypatch)
    options = {
        "density": 0.2, "epochs": 1, "max_length": 12, "weight_decay": 0.125, "clip": 0.5, "examples": 8,
        "padding": "max", "precision": "bfloat16",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    where = ("--model", place / "model", "-o", tmp_path, "--task", "RTE", "--device", "cpu", "--held-out", 0.25)
    setting = ("--method", "fish-paper", "--rates", "1e-2", "--batch-size", 8, "--seeds", 1)
    for command in (("run",), ("ablate", "labels")):
        values = ("--values", "given") if "ablate" in command else ()
        (found,) = answer("glue", *command, place / "data", *where, *setting, *given, *values)
        assert {name: found["recipe"][name] for name in options} == options


def test_methods_are_listed_with_their_rates():
    found = answer("glue", "methods")
    assert found.keys() == METHODS.keys()
    assert found["full"] == {"rates": [1e-4, 5e-5, 1e-5], "about": "everything"}
    shown = call("glue", "methods").stdout
    assert all(name in shown for name in METHODS)


def test_submit_writes_the_files_of_the_best_runs(place, swept, tmp_path):
    found = answer("glue", "submit", place / "runs", place / "data", "-o", tmp_path / "out", "--device", "cpu")
    with ZipFile(found["file"]) as archive:
        assert archive.namelist() == ["STS-B.tsv", "RTE.tsv"]
    assert found["rows"] == {"STS-B": 12, "RTE": 12}
    whole = [record for record in swept[0] if record["task"] == "RTE" and "validation" in record]
    assert found["runs"]["RTE"]["validation"] == max(record["validation"]["score"] for record in whole)
    only = answer("glue", "submit", place / "runs", place / "data", "-o", tmp_path / "lora", "--method", "lora")
    assert (place / "runs" / "RTE").as_posix() in only["runs"]["RTE"]["folder"]
    assert "lora-" in only["runs"]["RTE"]["folder"]
    for name in ("fish-paper", "fish paper"):
        only = answer("glue", "submit", place / "runs", place / "data", "-o", tmp_path / "fish", "--method", name)
        assert "fish-paper-" in only["runs"]["RTE"]["folder"]


def test_auto_takes_no_device_that_torch_was_only_built_for(monkeypatch):
    built_for = torch.device("cuda")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else built_for
    )
    assert device_named("auto") == "cpu"


def test_report_writes_its_page(place, swept, tmp_path):
    answer("report", place / "runs", "-o", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "fish paper" in text and "STS-B" in text
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "bitfit"), "no method 'bitfit'; expected some of full, "),
        (("--task", "boolq"), "no GLUE task 'boolq'; expected one of"),
        (("--rates", "fast"), "--rates takes numbers separated by commas, got 'fast'"),
        (("--rates", "1e-3,,1e-2"), "--rates takes numbers"),
        (("--rates", "nan"), "--rates takes numbers"),
        (("--rates", "full="), "--rates takes numbers separated by commas, got ''"),
        (("--rates", "-1e-3"), "learning_rate must be above 0"),
        (("--rates", "bitfit=1e-3"), "no method 'bitfit'"),
        (("--batch-size", "8.5"), "--batch-size takes numbers"),
        (("--batch-size", "0"), "batch_size must be above 0"),
        (("--density", "5"), "density must be a fraction"),
        (("--epochs", "0"), "epochs must be above 0"),
        (("--clip", "-1"), "clip must not be below 0"),
        (("--held-out", "1"), "share to hold out must be in (0, 1)"),
        (("--rows", "1"), "rows must be at least 2"),
        (("--search-rows", "0"), "search_rows must be at least 1"),
        (("--search-epochs", "1"), "search_epochs goes with search_rows"),
        (("--device", "gpu"), "--device gpu: "),
        (("--method", "full"), "the same name and the same settings"),
    ],
)
def test_what_is_not_understood_is_one_line_before_anything_is_written(place, tmp_path, arguments, message):
    output = tmp_path / "runs"
    assert message in refusal(*command(place), "--task", "RTE", *arguments, "-o", output, code=2)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("examples", "DATA", "--values", "many"), "examples takes values like 32, 256"),
        (("labels", "DATA", "--values", "given,guessed"), "labels takes values like given, expected, sampled"),
        (("density", "DATA", "--values", "0.1,0.1"), "the same name and the same settings"),
    ],
)
def test_wrong_values_of_an_ablation(place, tmp_path, arguments, message):
    arguments = [place / "data" if argument == "DATA" else argument for argument in arguments]
    arguments += ["--model", place / "model", "-o", tmp_path / "runs"]
    assert message in refusal("glue", "ablate", *arguments, code=2)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_setting_is_a_matter_of_usage(place):
    assert "'learning_rate' is not one of" in call("glue", "ablate", "learning_rate", place / "data", code=2).stderr


def test_what_cannot_be_done_is_one_line(place, tmp_path):
    output = ("-o", tmp_path / "runs")
    assert "cannot load" in refusal(*command(place), "--task", "RTE", "--model", tmp_path / "none", *output, code=1)
    assert "CoLA/train.tsv does not exist" in refusal(*command(place), "--task", "CoLA", *output, code=1)
    assert "has no task in GLUE's layout" in refusal("glue", "run", tmp_path, *output, code=2)
    assert "there is no finished run" in refusal("glue", "submit", tmp_path, place / "data", *output, code=1)
    assert "no record of a run" in refusal("report", place / "data", *output, code=1)
    assert not (tmp_path / "runs").exists()
