"""The files of a submission: names, labels and counts, and predictions of the right run with tiny models."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from fishmask.data import encode
from fishmask.errors import FishError
from fishmask.glue import TASKS, read_diagnostic, read_glue
from fishmask.hub import load_for_training
from fishmask.recipe import Recipe
from fishmask.run import write_run
from fishmask.submission import FILES, best_run, submit, write_submission
from fishmask.train import fit
from tests import tiny
from tests.test_glue import write

NAMES = ["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"]
RECIPE = Recipe("random", 0.3, 1e-2, epochs=2, batch_size=2, max_length=16)


def rows(archive: Path, name: str) -> list[str]:
    with ZipFile(archive) as file:
        header, *lines = file.read(f"{name}.tsv").decode().splitlines()
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == [str(index) for index in range(len(lines))]
    return [line.split("\t")[1] for line in lines]


# -- writing ----------------------------------------------------------------------------------------------------------


def test_the_files_and_their_sizes_are_those_of_the_benchmark():
    assert list(FILES) == NAMES
    assert sum(file.rows for file in FILES.values()) == 426_309
    assert [FILES[name].task for name in ("MNLI-m", "MNLI-mm", "AX")] == ["MNLI"] * 3


def test_tables_and_a_flat_zip(tmp_path):
    labels = {"RTE": ["not_entailment", "entailment"], "CoLA": ["1", "0", "1"], "AX": ["neutral", "contradiction"]}
    path = write_submission({**labels, "STS-B": [-0.25, 5.7, 2.34567]}, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "submission.zip"
    with ZipFile(path) as archive:
        assert archive.namelist() == ["RTE.tsv", "CoLA.tsv", "AX.tsv", "STS-B.tsv"]
        assert archive.read("RTE.tsv") == b"index\tprediction\n0\tnot_entailment\n1\tentailment\n"
        assert archive.read("RTE.tsv") == (path.parent / "RTE.tsv").read_bytes()
    assert {name: rows(path, name) for name in labels} == labels
    assert rows(path, "STS-B") == ["0.000", "5.000", "2.346"]


@pytest.mark.parametrize(
    ("predictions", "error", "message"),
    [
        ({}, ValueError, "nothing to submit; expected predictions for some of CoLA, SST-2"),
        ({"MNLI": ["neutral"]}, ValueError, "no file 'MNLI'; expected one of .*MNLI-m, MNLI-mm"),
        ({"RTE": []}, ValueError, "RTE: there are no predictions"),
        ({"RTE": ["entailment", "1"]}, ValueError, "RTE: expected the labels entailment, not_entailment, got 1"),
        ({"CoLA": [1, 0]}, ValueError, "CoLA: expected the labels 0, 1, got 0, 1"),
        ({"STS-B": [1.0, math.nan]}, FishError, "STS-B: a prediction is nan; expected numbers from 0 to 5"),
    ],
)
def test_what_the_benchmark_would_refuse_is_not_written(tmp_path, predictions, error, message):
    with pytest.raises(error, match=message):
        write_submission({"WNLI": ["0"], **predictions} if predictions else {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- choosing ---------------------------------------------------------------------------------------------------------


def record(folder: Path, validation: float | None, test: float = 0.5, variant="fish", kept="delta.safetensors") -> Path:
    folder.mkdir(parents=True)
    content = {"variant": variant, "test": {"score": test}}
    (folder / "metrics.json").write_text(
        json.dumps(content if validation is None else content | {"validation": {"score": validation}})
    )
    if kept:
        (folder / kept).touch()
    return folder


def test_the_best_run_is_chosen_by_validation_among_those_that_were_kept(tmp_path):
    record(tmp_path / "a", 0.6, test=0.9)
    best = record(tmp_path / "b", 0.7, test=0.1)
    record(tmp_path / "c", 0.7, test=0.8)
    record(tmp_path / "d", 0.9, kept="")
    record(tmp_path / "e", None)
    record(tmp_path / "f", math.nan)
    whole = record(tmp_path / "g", 0.5, variant="full", kept="model.safetensors")
    record(tmp_path / "h", 0.4, variant="lora", kept="adapter")
    short = record(tmp_path / "short", 0.9) / "metrics.json"
    short.write_text(json.dumps(json.loads(short.read_text()) | {"sweep": {"train_rows": 10}}))
    assert best_run(tmp_path) == (best, 0.7)
    assert best_run(tmp_path, "full") == (whole, 0.5)
    assert best_run(tmp_path, "lora")[1] == 0.4
    assert best_run(tmp_path, "other") is None and best_run(tmp_path / "missing") is None


@pytest.mark.parametrize("content", ["{", '{"validation": {}}', "[]", '{"validation": {"score": "high"}}'])
def test_a_damaged_record_is_named(tmp_path, content):
    record(tmp_path / "a", 0.5)
    (tmp_path / "a" / "metrics.json").write_text(content)
    with pytest.raises(FishError, match=r"a.metrics\.json is damaged .*run it again"):
        best_run(tmp_path, "fish")


# -- predicting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("submission") / "model")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write(tmp_path_factory.mktemp("submission") / "glue")


def trained(folder: Path, base: Path, glue: Path, name: str, score: float, seed: int = 0, method: str = "random"):
    """Write a run's folder; return a function from examples to the model's own outputs, one text at a time."""
    task, recipe = TASKS[name], Recipe(**{**asdict(RECIPE), "method": method, "seed": seed})
    loaded = load_for_training(str(base), task.classes, seed=seed)
    data = encode(read_glue(glue, task, "train")[""], loaded.tokenizer, recipe.max_length)
    outcome = fit(loaded.model, data, recipe, head=loaded.head)
    about = {"base": str(base), "text": task.text, "pair": task.pair, "recipe": asdict(recipe)}
    write_run(folder, loaded.model, outcome, about)
    metrics = {"variant": method, "validation": {"score": score}, "test": {"score": 1 - score}}
    (folder / "metrics.json").write_text(json.dumps(metrics))

    def outputs(examples) -> list[torch.Tensor]:
        pairs = examples.pairs or [None] * len(examples)
        found = []
        for text, pair in zip(examples.texts, pairs, strict=True):
            batch = loaded.tokenizer(text, pair, truncation=True, max_length=recipe.max_length, return_tensors="pt")
            found.append(loaded.model(**batch).logits[0].detach())
        return found

    return outputs


def labels(task, outputs) -> list[str]:
    return [task.classes[int(output.argmax())] for output in outputs]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, base, glue):
    """One run for each task but QQP, and two more for RTE that are worse on validation and better on test."""
    runs = tmp_path_factory.mktemp("submission") / "runs"
    models = {name: trained(runs / name / "b", base, glue, name, 0.6) for name in TASKS if name != "QQP"}
    for folder, seed in (("a", 1), ("c", 2)):
        trained(runs / "RTE" / folder, base, glue, "RTE", 0.5, seed, "full")
    return runs, models


def test_every_test_set_is_predicted_by_the_best_run_of_its_task(tmp_path, sweep, glue):
    runs, models = sweep
    seen = []
    found = submit(runs, glue, tmp_path / "out", progress=lambda phase, done, total: seen.append(phase))
    archive = tmp_path / "out" / "submission.zip"
    assert found["file"] == str(archive) and found["missing"] == ["QQP"] and found["filled"] == []
    with ZipFile(archive) as file:
        assert file.namelist() == [f"{name}.tsv" for name in NAMES if name != "QQP"]
    assert found["runs"]["RTE"] == {"folder": str(runs / "RTE" / "b"), "validation": 0.6}
    for name, file in FILES.items():
        if name == "QQP":
            continue
        task = TASKS[file.task]
        examples = read_diagnostic(glue) if name == "AX" else read_glue(glue, task, "test")[file.part]
        outputs = models[file.task](examples)
        written = rows(archive, name)
        assert found["rows"][name] == len(written) == len(examples)
        assert found["unlike_benchmark"][name] == file.rows
        if task.classes:
            assert written == labels(task, outputs)
        else:
            wanted = [min(max(float(output), 0.0), 5.0) for output in outputs]
            assert [float(value) for value in written] == pytest.approx(wanted, abs=6e-4)
    assert {"RTE: loading", "RTE: predicting", "AX: predicting", "MNLI-mm: predicting"} <= set(seen)


def test_missing_files_are_filled_on_request_in_the_size_of_the_benchmark(tmp_path, sweep, glue):
    found = submit(sweep[0], glue, tmp_path, tasks=["WNLI"], fill=True)
    archive = tmp_path / "submission.zip"
    assert found["filled"] == [name for name in NAMES if name != "WNLI"] and found["missing"] == []
    assert found["unlike_benchmark"] == {"WNLI": 146}
    assert len(rows(archive, "RTE")) == 3000 and set(rows(archive, "MNLI-mm")) == set(TASKS["MNLI"].classes)
    numbers = [float(value) for value in rows(archive, "STS-B")]
    assert (min(numbers), max(numbers), len(numbers)) == (0.0, 5.0, 1379)


def test_a_variant_and_another_place_of_the_base(tmp_path, sweep, glue, base):
    runs, models = sweep
    moved = tmp_path / "moved"
    base.rename(moved)
    try:
        with pytest.raises(FishError, match="cannot load"):
            submit(runs, glue, tmp_path / "out", tasks=["rte"])
        found = submit(runs, glue, tmp_path / "out", tasks=["rte"], base=str(moved))
    finally:
        moved.rename(base)
    assert rows(Path(found["file"]), "RTE") == labels(
        TASKS["RTE"], models["RTE"](read_glue(glue, TASKS["RTE"], "test")[""])
    )
    whole = submit(runs, glue, tmp_path / "full", variant="full")
    assert whole["runs"] == {"RTE": {"folder": str(runs / "RTE" / "a"), "validation": 0.5}}
    assert whole["missing"] == [name for name in NAMES if name != "RTE"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_runs_without_a_mask_predict_as_well(tmp_path, base, glue, method):
    model = trained(tmp_path / "runs" / "RTE" / "a", base, glue, "RTE", 0.5, method=method)
    found = submit(tmp_path / "runs", glue, tmp_path / "out")
    assert rows(Path(found["file"]), "RTE") == labels(TASKS["RTE"], model(read_glue(glue, TASKS["RTE"], "test")[""]))


def test_without_the_diagnostic_set_its_file_is_missing(tmp_path, sweep):
    glue = write(tmp_path / "glue")
    (glue / "diagnostic" / "diagnostic.tsv").unlink()
    found = submit(sweep[0], glue, tmp_path / "out", tasks=["MNLI"])
    assert "AX" in found["missing"] and list(found["rows"]) == ["MNLI-m", "MNLI-mm"]


def test_what_cannot_be_predicted_is_refused_before_anything_is_written(tmp_path, sweep, base, glue):
    runs = sweep[0]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no GLUE task 'boolq'"):
        submit(runs, glue, out, tasks=["boolq"])
    with pytest.raises(FishError, match=r"no finished run for QQP; expected the folder of a sweep"):
        submit(runs, glue, out, tasks=["RTE", "QQP"])
    with pytest.raises(FishError, match=r"no finished run of variant 'diff' for CoLA, SST-2"):
        submit(runs, glue, out, variant="diff")
    partial = write(tmp_path / "glue")
    (partial / "MRPC" / "test.tsv").unlink()
    with pytest.raises(FishError, match=r"MRPC.test\.tsv does not exist"):
        submit(runs, partial, out)
    trained(tmp_path / "runs" / "MNLI" / "a", base, glue, "RTE", 0.5)
    with pytest.raises(FishError, match="predicts entailment, not_entailment, and MNLI needs entailment, neutral"):
        submit(tmp_path / "runs", glue, out)
    trained(tmp_path / "runs2" / "CoLA" / "a", base, glue, "STS-B", 0.5)
    with pytest.raises(FishError, match="predicts a number, and CoLA needs 0, 1"):
        submit(tmp_path / "runs2", glue, out)
    assert not out.exists()
