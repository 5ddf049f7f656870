"""Sweeps on tiny GLUE folders: the plan, real processes that are killed, damaged records, what a run's folder holds."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fishmask import sweep as module
from fishmask import workers
from fishmask.data import encode
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.glue import TASKS, read_glue, task_score
from fishmask.hub import load_tokenizer
from fishmask.loop import no_progress
from fishmask.recipe import Recipe
from fishmask.run import load_run
from fishmask.sweep import Job, Sweep, Variant, best_of, finished, plan, run_job, run_sweep, search_of
from fishmask.train import evaluate
from tests import tiny

COMMON = Recipe(density=0.1, epochs=2, max_length=16, examples=16)
MEASURED = ("seconds_training", "seconds_per_step", "seconds_scoring", "peak_memory_bytes", "threads", "cores", "date")


def glue_folder(folder: Path, seed: int = 0, dev_seed: int = 1) -> Path:
    """Write RTE, STS-B and MNLI in GLUE's layout; labels follow from the words, dev labels from ``dev_seed`` too."""
    labels = {
        "RTE": ("entailment", "not_entailment"),
        "MNLI": ("neutral", "entailment", "contradiction"),
        "STS-B": ("4.2", "0.5"),
    }
    headers = {"RTE": "label", "MNLI": "gold_label", "STS-B": "score"}
    for task, names in labels.items():
        (folder / task).mkdir(parents=True)
        for part in ("train", *(f"{part}{suffix}" for part in ("dev", "test") for suffix in TASKS[task].parts)):
            words, dev = random.Random(f"{seed} {part}"), random.Random(f"{dev_seed} {part}")
            lines = ["\t".join(("index", "sentence1", "sentence2", *([headers[task]] * (not part.startswith("test")))))]
            for index in range(40 if part == "train" else 12):
                kind = index % len(names)
                first = " ".join(
                    (words.choice((tiny.GOOD, tiny.BAD, tiny.OTHER)[kind]), *words.choices(tiny.OTHER, k=3))
                )
                label = dev.choice(names) if part.startswith("dev") else names[kind]
                fields = (str(index), first, words.choice(tiny.OTHER), *([label] * (not part.startswith("test"))))
                lines.append("\t".join(fields))
            (folder / task / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a worker that shares two cores; two threads would also wait for each other at so small sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c():
    """Return a function that does what Ctrl-C does, also where tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *args: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    tiny.model_folder(folder / "model")
    glue_folder(folder / "glue")
    return folder


def sweep_of(place, *variants, tasks=("RTE",), seeds=(0, 1), **options):
    return Sweep(str(place / "glue"), str(place / "model"), tasks, variants, seeds=seeds, held_out=0.25, **options)


def variant(method, *rates, sizes=(8,), **changes):
    return Variant(method, replace(COMMON, method=method, **changes), rates or (1e-2,), sizes)


def in_this_process(monkeypatch):
    """Run jobs without the seconds that a process takes to start; return the list of those that were run."""
    done = []

    def run(sweep, job, folder, threads, board):
        settings = {"source": sweep.source, "base": sweep.base, "device": sweep.device, "folder": str(folder / job.key)}
        settings |= {"task": job.task, "variant": job.variant, "recipe": asdict(job.recipe), "sweep": job.sweep}
        record = run_job(json.loads(json.dumps(settings)), board.of(job))
        done.append(job)
        return json.loads(json.dumps(record))

    monkeypatch.setattr(module, "_run_in_process", run)
    return done


def unmeasured(records):
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


# -- the plan ---------------------------------------------------------------------------------------------------------

TWO = Sweep("glue", "model", ("RTE", "MNLI"), (variant("fish", 1e-2, 1e-3, sizes=(8, 16)), variant("full", 1e-4, 1e-5)))


def planted(jobs, score=lambda job: 0.5, test=lambda job: 0.5):
    return {job.key: {"validation": {"score": score(job)}, "test": {"score": test(job)}} for job in jobs}


def short(jobs):
    return [(j.variant, j.task, j.recipe.batch_size, j.recipe.learning_rate, j.recipe.seed) for j in jobs]


def test_every_search_comes_first_then_the_seeds_in_order():
    searches = plan(TWO, {})
    assert short(searches) == [
        (name, task, size, rate, 0)
        for name, sizes, rates in (("fish", (8, 16), (1e-2, 1e-3)), ("full", (8,), (1e-4, 1e-5)))
        for task in ("RTE", "MNLI")
        for size in sizes
        for rate in rates
    ]
    records = planted(searches, lambda job: job.recipe.learning_rate)
    everything = plan(TWO, records)
    assert everything == plan(TWO, records) and list(records) == [job.key for job in searches]  # pure
    assert everything[: len(searches)] == searches
    # Of equal scores (two batch sizes) the first of the grid; the first repetition is the search's own run.
    assert short(everything[len(searches) :]) == [
        (name, task, 8, rate, seed)
        for seed in (1, 2)
        for name, rate in (("fish", 1e-2), ("full", 1e-4))
        for task in ("RTE", "MNLI")
    ]


def test_the_example_of_the_documents_is_a_sweep(monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "glue.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    seen = []
    monkeypatch.setattr(module, "run_sweep", lambda sweep, folder, **options: seen.append((sweep, folder, options)))
    exec(example, {})
    ((sweep, folder, options),) = seen
    assert (sweep.tasks, [variant.name for variant in sweep.variants]) == (("RTE", "MRPC"), ["full", "robust"])
    assert (sweep.variants[0].rates, folder, options) == ((2e-5, 5e-5), Path("runs/glue"), {"workers": 2})


def test_tasks_are_known_by_their_own_names_however_they_are_spelt():
    sweep = replace(TWO, tasks=("rte", "sst2"))
    assert sweep.tasks == ("RTE", "SST-2")
    assert all(job.key.startswith(("RTE/", "SST-2/")) for job in plan(sweep, {}))


def test_the_test_score_has_no_say():
    grid = search_of(TWO, "RTE", TWO.variants[0])
    records = planted(grid, lambda job: job.recipe.learning_rate, lambda job: 1 - job.recipe.learning_rate)
    assert best_of(grid, records).recipe.learning_rate == 1e-2
    without = {key: {"validation": record["validation"]} for key, record in records.items()}
    assert best_of(grid, without) == best_of(grid, records)


def test_a_search_that_is_not_complete_has_no_winner():
    grid = search_of(TWO, "RTE", TWO.variants[0])
    for missing in grid:
        records = planted(job for job in grid if job != missing)
        assert best_of(grid, records) is None
        assert {job.recipe.seed for job in plan(TWO, records)} == {0}


def test_rates_that_diverged_lose_and_all_of_them_are_the_end_of_it():
    grid = search_of(TWO, "MNLI", TWO.variants[1])
    records = planted(grid, lambda job: 0.9) | {grid[0].key: {"diverged": "the loss became nan"}}
    assert best_of(grid, records) == grid[1]
    records |= {job.key: {"diverged": "the loss became nan"} for job in grid}
    assert best_of(grid, records) is None
    assert plan(replace(TWO, tasks=("MNLI",), variants=TWO.variants[1:]), records) == grid


@pytest.mark.parametrize("less", [{"search_rows": 20}, {"search_rows": 20, "search_epochs": 1}])
def test_a_smaller_search_is_no_repetition(less):
    sweep = replace(TWO, tasks=("RTE",), variants=TWO.variants[1:], **less)
    grid = search_of(sweep, "RTE", sweep.variants[0])
    assert [(job.recipe.epochs, job.sweep.get("train_rows")) for job in grid] == [
        (less.get("search_epochs", 2), less.get("search_rows"))
    ] * 2
    later = plan(sweep, planted(grid))[2:]
    assert short(later) == [("full", "RTE", 8, 1e-4, seed) for seed in (0, 1, 2)]
    assert all(job.recipe.epochs == 2 and "train_rows" not in job.sweep for job in later)
    assert later == plan(replace(TWO, tasks=("RTE",), variants=TWO.variants[1:]), {})[:1] + later[1:]


def test_more_seeds_and_methods_add_only_what_is_new():
    searches = plan(TWO, {})
    records = planted(plan(TWO, planted(searches)))
    assert all(job.key in records for job in plan(TWO, records))
    more = replace(TWO, seeds=(0, 1, 2, 3), variants=(*TWO.variants, variant("random", 1e-2)))
    new = [job for job in plan(more, records) if job.key not in records]
    assert short(new) == [
        ("random", "RTE", 8, 1e-2, 0), ("random", "MNLI", 8, 1e-2, 0),
        *(("fish", task, 8, 1e-2, 3) for task in ("RTE", "MNLI")),
        *(("full", task, 8, 1e-4, 3) for task in ("RTE", "MNLI")),
    ]  # fmt: skip


OTHER = {"seed": 1, "clip": 0.5, "epochs": 4, "labels": "sampled", "score": "absolute", "exclude": ("pooler",)}
OTHER |= {"method": "random", "precision": "bfloat16", "padding": "max", "dense_rate": 1e-3}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_have_another_folder(name):
    jobs = [Job("RTE", "fish", recipe, {}) for recipe in (COMMON, replace(COMMON, **{name: OTHER[name]}))]
    assert jobs[0].key != jobs[1].key and jobs[0] != jobs[1]
    assert Job("RTE", "fish", COMMON, {"rows": 9}).key != jobs[0].key


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ()}, "at least one of tasks"),
        ({"seeds": ()}, "at least one of seeds"),
        ({"tasks": ("boolq",)}, "no GLUE task 'boolq'"),
        ({"rows": 1}, "rows must be at least 2; got 1"),
        ({"search_rows": 0}, "search_rows must be at least 1; got 0"),
        ({"search_rows": 9, "search_epochs": -1}, "search_epochs must be at least 1"),
        ({"search_epochs": 1}, "search_epochs goes with search_rows"),
        ({"held_out": 1.0}, "share to hold out"),
        ({"variants": (variant("fish"), variant("fish"))}, "the same name and the same settings"),
        ({"variants": (variant("fish", 1e-3, -1.0),)}, "learning_rate must be above 0"),
        ({"variants": (variant("fish", sizes=(0,)),)}, "batch_size must be above 0"),
        ({"variants": (variant("fish", sizes=()),)}, "fish needs at least one learning rate and one batch size"),
    ],
)
def test_a_wrong_sweep_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(TWO, **wrong)


# -- runs -------------------------------------------------------------------------------------------------------------

METHODS = ("fish", "movement", "biases", "lora", "shira", "diff")


@pytest.fixture(scope="module")
def runs(place):
    """A sweep of every kind of run, with what it reported."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_this_process(monkeypatch)
        seen = []
        folder = place / "runs"
        everything = (variant("full", 1e-3, 1e-2, 1e30), *map(variant, METHODS))
        ratings = sweep_of(place, *everything, tasks=("STS-B",), seeds=(0,))
        records = run_sweep(ratings, folder, progress=lambda *args: seen.append(args))
        classes = sweep_of(place, variant("fish"), tasks=("RTE", "MNLI"), seeds=(0,), search_rows=20, search_epochs=1)
        records += run_sweep(classes, folder)
    return folder, records, seen


def folder_of(folder, record):
    return folder / next(key for key, other in finished(folder).items() if other == record)


def test_a_run_leaves_its_record_log_configuration_numbers_and_picture(place, runs):
    folder, records, _ = runs
    assert len(records) == 9 + 4
    for record in records:
        run = folder_of(folder, record)
        assert json.loads((run / "metrics.json").read_text()) == record
        assert record["rows"] + record["held_out"] == (30 if "train_rows" in record["sweep"] else 40)
        if "diverged" in record:
            assert record["recipe"]["learning_rate"] == 1e30 and "test" not in record and "validation" not in record
            continue
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in log] == list(range(1, record["recipe"]["epochs"] + 1))
        assert log[-1]["score"] == record["validation"]["score"]
        assert log[-1]["step"] == record["recipe"]["epochs"] * -(-record["rows"] // 8)
        about = json.loads((run / "run.json").read_text())
        assert (about["base"], about["task"]) == (str(place / "model"), record["task"])
        assert about["recipe"] == record["recipe"]
        masked = record["recipe"]["method"] not in ("full", "lora", "shira")
        assert (run / "mask.png").exists() == (run / "delta.safetensors").exists() == masked
        assert (run / "adapter").exists() == (record["recipe"]["method"] in ("lora", "shira"))
        assert sum(record["layers"].values()) == (record["entries"] if masked else 0)
        assert record["entries"] > 0 and record["file_bytes"] > 0 and record["peak_memory_bytes"] > 1e8
    by_task = {record["task"]: record for record in records if "test" in record}
    assert by_task["STS-B"]["test"].keys() == {"score", "pearson", "spearman"}
    assert by_task["MNLI"]["test"].keys() == {"score", "accuracy_matched", "accuracy_mismatched"}


def test_the_folder_predicts_what_the_record_says(place, runs):
    folder, records, _ = runs
    tokenizer = load_tokenizer(str(place / "model"))
    kinds = set()
    full = [record for record in records if record["variant"] == "full" and "test" in record]
    loser = folder_of(folder, min(full, key=lambda record: record["validation"]["score"]))
    for record in records:
        run = folder_of(folder, record)
        if "diverged" in record or run == loser:
            continue
        task = TASKS[record["task"]]
        model = load_run(run, str(place / "model"))
        parts = read_glue(place / "glue", task, "dev")
        found = {part: evaluate(model, encode(examples, tokenizer, 16)) for part, examples in parts.items()}
        assert task_score(task, found) == record["test"]
        kinds.add((record["recipe"]["method"], record["task"]))
    assert kinds == {(method, "STS-B") for method in (*METHODS, "full")} | {("fish", "RTE"), ("fish", "MNLI")}


def test_of_the_whole_models_only_the_winner_is_kept(runs):
    folder, records, _ = runs
    full = [record for record in records if record["variant"] == "full" and "diverged" not in record]
    assert len(full) == 2
    best = max(full, key=lambda record: record["validation"]["score"])
    kept = [record for record in full if (folder_of(folder, record) / "model.safetensors").exists()]
    assert kept == [best]


def test_all_runs_of_the_folder_are_in_one_file(runs):
    folder, records, _ = runs
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(records) and all(record in lines for record in records)
    assert not list(folder.rglob("*.tmp"))


def test_the_progress_of_the_whole_grows_to_its_total(runs):
    seen = runs[2]
    whole = [(done, total) for phase, done, total in seen if phase == "all runs"]
    assert seen[0] == ("all runs", 0, 9 * 2 * 40)
    assert whole == sorted(whole) and whole[-1] == (9 * 2 * 40, 9 * 2 * 40)
    assert len({done for done, _ in whole}) > 30
    assert {"STS-B fish: training", "STS-B fish: scoring", "STS-B movement: dense training"} <= {
        phase for phase, *_ in seen
    }


def test_a_smaller_search_trains_on_fewer_rows_and_epochs(runs):
    records = [record for record in runs[1] if record["task"] == "MNLI"]
    assert [(record["rows"], record["recipe"]["epochs"], record["held_out"]) for record in records] == [
        (20, 1, 10),
        (30, 2, 10),
    ]


def test_nothing_is_run_again_and_a_changed_default_makes_another_run(monkeypatch, place, tmp_path):
    done = in_this_process(monkeypatch)
    sweep = sweep_of(place, variant("random"), seeds=(0,))
    first = run_sweep(sweep, tmp_path)
    assert len(done) == 1
    seen = []
    assert run_sweep(sweep, tmp_path, progress=lambda *args: seen.append(args)) == first
    assert len(done) == 1 and set(seen) == {("all runs", 80, 80)}
    # As if the run were of a time when the default was another: what its folder is called counts for nothing.
    path = tmp_path / done[0].key / "metrics.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"recipe": record["recipe"] | {"clip": 0.25}}))
    old = path.parent.rename(path.parent.with_name("old"))
    assert run_sweep(sweep, tmp_path)[0]["recipe"]["clip"] == 1.0
    assert len(done) == 2 and (old / "metrics.json").exists() and len(finished(tmp_path)) == 2


DAMAGED = ["", "{", '{"task": "RTE', "not JSON", "[]", "null", '{"task": "RTE"}', b"\xff\xfe\x00"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_no_record(tmp_path, content):
    (tmp_path / "RTE" / "a").mkdir(parents=True)
    path = tmp_path / "RTE" / "a" / "metrics.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert finished(tmp_path) == {}
    sound = {"task": "RTE", "variant": "x", "recipe": asdict(COMMON), "sweep": {}, "validation": {"score": 0.5}}
    path.write_text(json.dumps(sound))
    assert len(finished(tmp_path)) == 1
    for part in ({"recipe": {"method": "bitfit"}}, {"recipe": {"new": 1}}, {"validation": {}}, {"validation": None}):
        path.write_text(json.dumps(sound | part))
        assert finished(tmp_path) == {}


def test_a_run_with_a_damaged_record_is_done_again_and_a_record_is_written_whole(monkeypatch, place, tmp_path, ctrl_c):
    done = in_this_process(monkeypatch)
    sweep = sweep_of(place, variant("random"), seeds=(0,))
    first = run_sweep(sweep, tmp_path)
    path = tmp_path / done[0].key / "metrics.json"
    path.write_text(path.read_text()[:100])
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run_job({**settings_of(sweep, done[0]), "folder": str(path.parent)}, no_progress)
    assert not path.exists()
    assert unmeasured(run_sweep(sweep, tmp_path)) == unmeasured(first)
    assert len(done) == 2 and json.loads(path.read_text())["test"] == first[0]["test"]


def settings_of(sweep, job):
    settings = {"source": sweep.source, "base": sweep.base, "device": "cpu", "task": job.task, "variant": job.variant}
    return settings | {"recipe": asdict(job.recipe), "sweep": job.sweep}


def test_dev_labels_change_the_test_score_and_nothing_else(place, tmp_path):
    glue_folder(tmp_path / "glue", dev_seed=2)
    assert read_glue(tmp_path / "glue", TASKS["RTE"], "train") == read_glue(place / "glue", TASKS["RTE"], "train")
    sweep = sweep_of(place, variant("fish"), seeds=(0,))
    settings = settings_of(sweep, plan(sweep, {})[0])
    records = []
    for name, source in (("a", place), ("b", tmp_path)):
        there = {"source": str(source / "glue"), "folder": str(tmp_path / name)}
        records += unmeasured([run_job(settings | there, no_progress)])
    assert records[0].pop("test") != records[1].pop("test")
    assert records[0] == records[1]
    deltas = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("a", "b")]
    assert deltas[0] == deltas[1]


def test_a_search_on_part_of_sorted_rows_sees_all_labels(monkeypatch, place, tmp_path):
    lines = (place / "glue" / "RTE" / "train.tsv").read_text().splitlines()
    (tmp_path / "RTE").mkdir()
    rows = sorted(lines[1:], key=lambda line: line.split("\t")[-1])
    (tmp_path / "RTE" / "train.tsv").write_text("\n".join([lines[0], *rows]) + "\n")
    (tmp_path / "RTE" / "dev.tsv").write_bytes((place / "glue" / "RTE" / "dev.tsv").read_bytes())
    seen = []
    monkeypatch.setattr(module, "_train", lambda settings, task, recipe, train, *rest: seen.append(train) or {})
    sweep = sweep_of(place, variant("fish"), seeds=(0,), search_rows=10)
    settings = settings_of(sweep, plan(sweep, {})[0]) | {"source": str(tmp_path), "folder": str(tmp_path / "run")}
    run_job(settings, no_progress), run_job(settings, no_progress)
    assert len(seen[0]) == 10 and set(seen[0].targets) == {0, 1} and seen[0] == seen[1]


def test_faults_of_the_model_and_the_data_come_before_anything_is_written(place, tmp_path):
    with pytest.raises(FishError, match=r"cannot load .*nowhere"):
        run_sweep(replace(sweep_of(place, variant("fish")), base=str(place / "nowhere")), tmp_path / "runs")
    with pytest.raises(FishError, match=r"CoLA.train\.tsv does not exist"):
        run_sweep(sweep_of(place, variant("fish"), tasks=("RTE", "CoLA")), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("package", "method"), [("peft", "lora"), ("matplotlib", "fish"), ("sklearn", "full")])
def test_a_missing_package_is_told_before_the_first_training(monkeypatch, place, tmp_path, package, method):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(FishError, match=f"need the package {package}: pip install"):
        run_sweep(sweep_of(place, variant(method)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    if package == "peft":  # and nobody else is asked for it
        with pytest.raises(FishError, match=r"CoLA.train\.tsv does not exist"):
            run_sweep(sweep_of(place, variant("fish"), tasks=("CoLA",)), tmp_path / "runs")


# -- processes --------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_survives_every_kind_of_end(monkeypatch, place, tmp_path, ctrl_c):
    """RTE and STS-B with two seeds: killed, one worker killed, Ctrl-C, then finished by two workers at once."""
    random_mask = Variant("random", replace(COMMON, method="random", epochs=10), (1e-2,), (8,))
    sweep = sweep_of(place, random_mask, tasks=("RTE", "STS-B"))
    with monkeypatch.context() as patched:
        in_this_process(patched)
        undisturbed = run_sweep(sweep, tmp_path / "undisturbed")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread for each of two workers, as here
    runs = tmp_path / "runs"
    first, second = (runs / job.key for job in plan(sweep, {}))

    # The command itself is killed in the middle of the second run: its worker does not go on for nobody.
    command = [sys.executable, "-m", "fishmask", "glue", "run", sweep.source, "--task", "rte", "--task", "sts-b"]
    command += ["--method", "random", "--rates", "1e-2", "--batch-size", "8", "--seeds", "2", "--density", "0.1"]
    command += ["--epochs", "10", "--max-length", "16", "--examples", "16", "--held-out", "0.25", "-o", str(runs)]
    command += ["--model", sweep.base, "--device", "cpu"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as process:
        try:
            wait_for(lambda: process.poll() is not None or (second / "log.jsonl").exists())
            assert process.poll() is None, process.stderr.read().decode()
            wait_for(lambda: (second / "log.jsonl").read_text())
        finally:
            process.kill()
    wait_for(lambda: group_is_gone(process.pid), 20)
    kept = contents(first)
    assert (first / "metrics.json") in kept and not (second / "metrics.json").exists()

    # One worker is killed while another is at work: the other finishes, and one error names the folder.
    def kill(phase, done, total):
        if phase == "STS-B random: training" and done == 3:
            for worker in workers._RUNNING:
                if "STS-B" in worker.args[-1]:
                    worker.kill()

    with pytest.raises(FishError, match=r"1 of the runs failed, the first in .*: the process for 'STS-B") as error:
        run_sweep(sweep, runs, workers=2, progress=kill)
    assert str(second) in str(error.value) and "ended by SIGKILL, perhaps because the memory ran out" in str(
        error.value
    )
    assert len((runs / "results.jsonl").read_text().splitlines()) == len(finished(runs)) == 2

    # Ctrl-C.
    stopped = []

    def interrupt(phase, done, total):
        if phase == "STS-B random: training" and not stopped:
            stopped.extend(workers._RUNNING)
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, runs, workers=2, progress=interrupt)
    assert stopped and all(worker.poll() is not None for worker in stopped) and not workers._RUNNING
    assert not (second / "metrics.json").exists()

    records = run_sweep(sweep, runs, workers=2)
    assert contents(first) == kept
    assert [(record["task"], record["recipe"]["seed"]) for record in records] == [
        ("RTE", 0), ("STS-B", 0), ("RTE", 1), ("STS-B", 1),
    ]  # fmt: skip
    assert unmeasured(records) == unmeasured(undisturbed)
    lines = [json.loads(line) for line in (runs / "results.jsonl").read_text().splitlines()]
    assert lines == [record for _, record in sorted(finished(runs).items())] and len(lines) == 4
    for key in finished(runs):
        values, wanted = (
            Delta.load(there / key / "delta.safetensors").values for there in (runs, tmp_path / "undisturbed")
        )
        assert values.keys() == wanted.keys()
        # The command's only worker had all cores to itself: sums in another order.
        room = 1e-2 if runs / key == first else 0
        assert all(torch.allclose(value, wanted[name], rtol=room, atol=room) for name, value in values.items())
