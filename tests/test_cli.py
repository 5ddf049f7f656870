import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fishmask.cli import app
from fishmask.data import encode, read_examples
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.hub import load_for_training, load_tokenizer
from fishmask.mask import Mask
from fishmask.recipe import Recipe
from fishmask.run import load_run, train_table
from fishmask.scorefile import read_scores
from fishmask.states import FolderStates
from fishmask.train import predict
from tests import tiny

COMMANDS = [
    ("demo",), ("score",), ("mask", "select"), ("mask", "show"), ("mask", "overlap"), ("train",), ("predict",),
    ("delta", "show"), ("delta", "verify"), ("delta", "apply"), ("delta", "between"), ("plot",), ("glue", "run"),
    ("glue", "ablate"), ("glue", "methods"), ("glue", "submit"), ("report",), ("plan",), ("costs",),
]  # fmt: skip


def call(*arguments, code=0):
    """Run a command; on success nothing but the result is on stdout, on failure one line is on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if code:
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
    return result


def answer(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


def refusal(*arguments, code):
    lines = call(*arguments, code=code).stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, tables, scores, a mask, and a training run on it."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.model_folder(folder / "model")
    tiny.table(folder / "train.tsv")
    tiny.table(folder / "dev.tsv", seed=1)
    call("score", folder / "model", folder / "train.tsv", "-o", folder / "scores.st")
    call("mask", "select", folder / "scores.st", "--density", 0.1, "-o", folder / "mask.st")
    call(
        "train", folder / "model", folder / "train.tsv", "--validation", folder / "dev.tsv",
        "--mask", folder / "mask.st", "--learning-rate", 0.01, "--epochs", 2, "-o", folder / "run",
    )  # fmt: skip
    return folder


def test_the_scores_file_holds_every_parameter_of_the_model(place):
    model = load_for_training(str(place / "model"), ("bad", "good")).model
    assert {n: t.shape for n, t in load_file(place / "scores.st").items()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_select_keeps_the_head_unless_told_otherwise(place, tmp_path):
    kept = answer("mask", "select", place / "scores.st", "--density", 0.1, "-o", tmp_path / "a.st")
    assert kept["kept_whole"] == ["classifier.weight", "classifier.bias"]
    assert Mask.load(tmp_path / "a.st") == Mask.load(place / "mask.st")
    free = answer("mask", "select", place / "scores.st", "--density", 0.01, "--no-keep-head", "-o", tmp_path / "b.st")
    assert (free["kept_whole"], free["entries"]) == ([], int(0.01 * free["of"]))
    call(
        "mask",
        "select",
        place / "scores.st",
        "--density",
        0.2,
        "--keep",
        "pooler",
        "--exclude",
        "embeddings",
        "-o",
        tmp_path / "c.st",
    )
    mask = Mask.load(tmp_path / "c.st")
    assert len(mask.indices["bert.pooler.dense.bias"]) == 32
    assert not any("embeddings" in name for name in mask.indices)


def test_blocks_are_chosen_by_select_and_train(place, tmp_path):
    values, head = read_scores(place / "scores.st")
    found = answer("mask", "select", place / "scores.st", "--density", 0.1, "--block", "rows", "-o", tmp_path / "b.st")
    expected = Mask.from_scores(values, 0.1, keep=head, block="rows")
    assert Mask.load(tmp_path / "b.st") == expected != Mask.load(place / "mask.st")
    assert found["entries"] == expected.k <= 0.1 * found["of"]
    options = ("--method", "magnitude", "--density", 0.1, "--epochs", 1, "--block", "4x4", "-o", tmp_path / "r")
    call("train", place / "model", place / "train.tsv", *options)
    base = load_for_training(str(place / "model"), ("bad", "good")).model
    chosen = Mask.magnitude(base, 0.1, keep=head, block=(4, 4))
    assert Delta.load(tmp_path / "r" / "delta.safetensors").mask == chosen
    refused = refusal("mask", "select", place / "scores.st", "--block", "16", "-o", tmp_path / "n.st", code=2)
    assert "block must be 'rows', 'columns', or height and width" in refused
    assert not (tmp_path / "n.st").exists()


def test_show_and_overlap_count_entries(place, tmp_path):
    mask = Mask.load(place / "mask.st")
    shown = answer("mask", "show", place / "mask.st")
    assert shown["digest"] == mask.digest
    assert sum(parameter["entries"] for parameter in shown["parameters"]) == shown["entries"] == mask.k
    first, second = mask.split(2)
    first.save(tmp_path / "first.st")
    assert answer("mask", "overlap", place / "mask.st", tmp_path / "first.st") == {
        "entries_first": mask.k, "entries_second": first.k, "shared": first.k,
        "share_of_first": first.k / mask.k, "share_of_second": 1.0, "equal": False,
    }  # fmt: skip
    assert "classifier.weight" in call("mask", "show", place / "mask.st").stdout
    assert second.k > 0


def test_a_step_budget_and_a_prefix_cache_are_told_and_leave_nothing(place, tmp_path):
    options = ("--method", "fish", "--density", 0.1, "--examples", 16, "--epochs", 2, "-o", tmp_path / "run")
    told = answer(
        "train", place / "model", place / "train.tsv", *options, "--step-budget", 0.6, "--prefix-cache", "20MB"
    )
    assert told["prefix_cache"]["served"] == 2 * told["prefix_cache"]["computed"] == 2 * 48
    assert 0 < told["prefix_cache"]["bytes"] < 20_000_000 and told["seconds_filling"] > 0
    assert not (tmp_path / "run" / "prefix_cache").exists()
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recipe["step_budget"], recipe["prefix_cache_bytes"]) == (0.6, 20_000_000)
    refusal("train", place / "model", place / "train.tsv", *options, "--step-budget", 0.1, code=2)
    refusal("train", place / "model", place / "train.tsv", *options, "--prefix-cache", "much", code=2)


def test_a_mask_given_is_refused_beside_what_it_cannot_heed(place, tmp_path):
    options = ("--mask", place / "mask.st", "--step-budget", 0.55, "--block", "4x4", "-o", tmp_path / "run")
    refused = refusal("train", place / "model", tmp_path / "not there.tsv", *options, code=2)
    assert "does not go with step_budget=0.55, block='4x4'" in refused and not (tmp_path / "run").exists()


def test_a_run_deletes_only_states_of_its_own(place, tmp_path):
    options = ("--method", "random", "--density", 0.1, "--epochs", 1, "-o", tmp_path / "run")
    folder = tmp_path / "run" / "prefix_cache"
    states = FolderStates(folder, 1000, {"of": "a run that was killed"})
    cached = (*options, "--step-budget", 0.6, "--prefix-cache", "20MB")
    assert "being written by another process" in refusal("train", place / "model", place / "train.tsv", *cached, code=1)
    states.close()
    (folder / "mine.txt").write_text("mine")
    call("train", place / "model", place / "train.tsv", *options)
    assert len(list(folder.iterdir())) == 5
    call("train", place / "model", place / "train.tsv", *cached)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_train_leaves_the_delta_the_metrics_and_the_log(place):
    assert sorted(path.name for path in (place / "run").iterdir()) == [
        "config.json", "delta.safetensors", "log.jsonl", "metrics.json", "run.json",
    ]  # fmt: skip
    log = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert [record["epoch"] for record in log] == [1, 2]
    assert {name: metrics[name] for name in log[-1]} == log[-1]
    assert (
        metrics["mask"]
        == Mask.load(place / "mask.st").digest
        == Delta.load(place / "run" / "delta.safetensors").mask.digest
    )
    assert metrics["file_bytes"] == (place / "run" / "delta.safetensors").stat().st_size


def test_two_runs_with_one_seed_leave_the_same_file(place, tmp_path):
    for name in ("one", "two"):
        call("train", place / "model", place / "train.tsv", "--density", 0.1, "--epochs", 1, "-o", tmp_path / name)
    assert (tmp_path / "one" / "delta.safetensors").read_bytes() == (
        tmp_path / "two" / "delta.safetensors"
    ).read_bytes()


def test_predictions_after_reloading_are_bit_identical(place):
    from fishmask.run import read_mask
    from fishmask.train import Recipe, fit

    examples = read_examples(place / "train.tsv", "text", "label")
    loaded = load_for_training(str(place / "model"), examples.classes)
    data = encode(examples, loaded.tokenizer, 128)
    fit(loaded.model, data, Recipe(learning_rate=0.01, epochs=2), mask=read_mask(place / "mask.st"))
    trained = predict(loaded.model, data)
    reloaded = predict(load_run(place / "run", str(place / "model")), data)
    assert torch.equal(trained.view(torch.int32), reloaded.view(torch.int32))


@pytest.mark.parametrize("kind", ["classes", "ratings"])
def test_predict_writes_one_line_per_row_and_the_quality(place, tmp_path, kind):
    table = tiny.table(tmp_path / "t.tsv", kind, rows=20)
    call("train", place / "model", table, "--density", 0.1, "--epochs", 1, "-o", tmp_path / "run")
    result = answer("predict", tmp_path / "run", table, "--label", "label", "-o", tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    outputs = predict(
        load_run(tmp_path / "run", str(place / "model")),
        encode(read_examples(table, "text"), load_tokenizer(str(place / "model")), 128),
    )
    assert result["rows"] == len(rows) == 20
    if kind == "ratings":
        assert [row["prediction"] for row in rows] == outputs.view(-1).tolist()
        assert -1 <= result["pearson"] <= 1
        return
    assert [row["prediction"] for row in rows] == [("bad", "good")[i] for i in outputs.argmax(dim=1).tolist()]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    right = sum(row["prediction"] == wanted for row, wanted in zip(rows, labels(table), strict=True))
    assert result["accuracy"] == right / 20


def labels(table):
    return [line.split("\t")[1] for line in table.read_text().splitlines()[1:]]


def test_a_recipe_is_where_the_other_options_start_from(monkeypatch, place):
    found = []

    def train_table(model, data, recipe, *others, **options):
        found.append((recipe.method, recipe.among, recipe.learning_rate, recipe.epochs))
        raise FishError("enough")

    monkeypatch.setattr("fishmask.run.train_table", train_table)
    mask = ("--mask", place / "mask.st")
    for options in (
        (), ("--recipe", "robust"), ("--recipe", "paper"), ("--recipe", "paper", "--method", "random"),
        ("--recipe", "robust", "--epochs", 5), ("--method", "random"), ("--method", "full"), mask,
        (*mask, "--recipe", "paper"),
    ):  # fmt: skip
        refusal("train", place / "model", place / "train.tsv", *options, code=1)
    assert found == [
        ("random", "layers", 1e-2, 3), ("random", "layers", 1e-2, 3), ("fish", "all", 5e-5, 7),
        ("random", "all", 5e-5, 7), ("random", "layers", 1e-2, 5), ("random", "all", 5e-4, 3), ("full", "all", 5e-5, 3),
        ("fish", "all", 5e-4, 3), ("fish", "all", 5e-5, 7),
    ]  # fmt: skip


def test_a_run_in_bfloat16_predicts_as_it_was_evaluated(place, tmp_path):
    table = tiny.table(tmp_path / "t.tsv", "ratings", rows=20)
    options = ("--density", 0.1, "--epochs", 1, "--precision", "bfloat16", "--validation", table)
    trained = answer("train", place / "model", table, *options, "-o", tmp_path / "run")
    result = answer("predict", tmp_path / "run", table, "--label", "label", "-o", tmp_path / "p.jsonl")
    assert {name: result[name] for name in ("pearson", "mse")} == {name: trained[name] for name in ("pearson", "mse")}


def test_a_table_is_padded_as_the_recipe_says(monkeypatch, place, tmp_path):
    widths = []

    def fit(model, data, recipe, *, validation, **options):
        widths.append((data.width, validation.width))
        raise FishError("enough")

    monkeypatch.setattr("fishmask.run.fit", fit)
    for padding in ("longest", "max"):
        recipe = Recipe(max_length=12, padding=padding)
        columns = {"text": "text", "label": "label"}
        with pytest.raises(FishError, match="enough"):
            train_table(
                str(place / "model"), place / "train.tsv", recipe, tmp_path, columns, validation=place / "dev.tsv"
            )
    assert widths == [(0, 0), (12, 12)]


def test_a_fully_trained_run_predicts_too_and_replaces_an_earlier_delta(place, tmp_path):
    for method, file in (("random", "delta.safetensors"), ("full", "model.safetensors")):
        call(
            "train",
            place / "model",
            place / "train.tsv",
            "--method",
            method,
            "--density",
            0.1,
            "--epochs",
            1,
            "-o",
            tmp_path / "r",
        )
        found = {path.name for path in (tmp_path / "r").iterdir()}
        assert found & {"delta.safetensors", "model.safetensors"} == {file}
    assert answer("predict", tmp_path / "r", place / "dev.tsv", "-o", tmp_path / "p.jsonl")["rows"] == 48


def test_pairs_of_sentences_and_json_lines(place, tmp_path):
    rows = [{"one": "a day", "two": "is warm", "y": "yes"}, {"one": "a day", "two": "is cold", "y": "no"}] * 8
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ("--text", "one", "--pair", "two", "--label", "y")
    call(
        "train", place / "model", tmp_path / "t.jsonl", *columns, "--density", 0.1, "--epochs", 1, "-o", tmp_path / "r"
    )
    assert json.loads((tmp_path / "r" / "run.json").read_text())["pair"] == "two"
    assert answer("predict", tmp_path / "r", tmp_path / "t.jsonl", "-o", tmp_path / "p.jsonl")["rows"] == 16


def test_delta_show_and_verify(place):
    shown = answer("delta", "show", place / "run")
    assert shown["entries"] == Mask.load(place / "mask.st").k
    assert (shown["values"], shown["base"]) == (["float32"], str(place / "model"))
    assert answer("delta", "verify", place / "run", "--base", place / "model")["fits_base"] is True
    assert answer("delta", "verify", place / "run" / "delta.safetensors")["fits_base"] is None


def test_apply_writes_a_model_that_predicts_the_same_and_between_finds_the_delta_again(place, tmp_path):
    call("delta", "apply", place / "model", place / "run", "-o", tmp_path / "whole")
    from transformers import AutoModelForSequenceClassification

    data = encode(read_examples(place / "dev.tsv", "text"), load_tokenizer(str(tmp_path / "whole")), 128)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(predict(whole, data), predict(load_run(place / "run", str(place / "model")), data))
    assert whole.config.id2label == {0: "bad", 1: "good"}
    answer("delta", "between", place / "model", tmp_path / "whole", "-o", tmp_path / "again")
    again, first = (Delta.load(folder / "delta.safetensors") for folder in (tmp_path / "again", place / "run"))
    assert (again.mask - first.mask).k == 0
    assert answer("delta", "verify", tmp_path / "again", "--base", place / "model")["fits_base"] is True


def test_plot_draws_masks_deltas_and_runs(place, tmp_path):
    for source in (place / "mask.st", place / "run" / "delta.safetensors", place / "run"):
        assert answer("plot", source, "-o", tmp_path / "mask.png")["entries"] == Mask.load(place / "mask.st").k
        assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "mask.png").unlink()


def test_a_condition_that_is_not_met_is_one_line_and_exit_code_1(place, tmp_path):
    damaged = tmp_path / "delta.safetensors"
    content = bytearray((place / "run" / "delta.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "delta.safetensors" in refusal("delta", "show", damaged, code=1)
    assert "does not exist" in refusal("delta", "verify", tmp_path / "absent", code=1)
    assert "holds a mask, not a delta" in refusal("delta", "show", place / "mask.st", code=1)
    assert "not a scores file" in refusal("mask", "select", place / "model" / "model.safetensors", code=1)
    assert "scores" in refusal("mask", "select", place / "train.tsv", code=1)
    assert "run.json is missing" in refusal("predict", tmp_path, place / "dev.tsv", code=1)
    assert "cannot load" in refusal("train", tmp_path / "nowhere", place / "train.tsv", code=1)
    absent = ("--mask", tmp_path / "absent.st", "-o", tmp_path / "new")
    assert "does not exist" in refusal("train", place / "model", place / "train.tsv", *absent, code=1)
    assert not (tmp_path / "new").exists()
    assert "No such file" in refusal("train", place / "model", tmp_path / "absent.tsv", code=1)
    (tmp_path / "run.json").write_text("{}")
    assert "run.json is damaged" in refusal("predict", tmp_path, place / "dev.tsv", code=1)


def test_another_base_is_refused_unless_asked_for(place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place / "model", other)
    model = load_for_training(str(other)).model.bert
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] += 1
        model.embeddings.word_embeddings.weight.add_(1)
    model.save_pretrained(other)
    assert "embeddings.word_embeddings" in refusal("delta", "verify", place / "run", "--base", other, code=1)
    assert "embeddings.word_embeddings" in refusal("delta", "apply", other, place / "run", "-o", tmp_path / "x", code=1)
    assert not (tmp_path / "x").exists()
    call("delta", "apply", other, place / "run", "--any-base", "-o", tmp_path / "x")


def test_misuse_is_one_line_and_exit_code_2(place):
    train = ("train", place / "model", place / "train.tsv")
    assert "no column 'sentence'; it has: text, label" in refusal(*train, "--text", "sentence", code=2)
    assert "density must be a fraction" in refusal(*train, "--density", 50, code=2)
    assert "matches no parameter" in refusal("mask", "select", place / "scores.st", "--exclude", "poler", code=2)
    assert "ends in .png" in refusal("plot", place / "mask.st", "-o", "mask.bmp", code=2)
    assert "No such option" in call(*train, "--rate", 1, code=2).stderr


def test_the_traceback_is_shown_on_request(place, tmp_path):
    result = CliRunner().invoke(app, ["--traceback", "delta", "show", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(command):
    text = " ".join(call(*command, "--help").stdout.split())
    assert f"Example: fishmask {' '.join(command)}" in text


def test_the_help_lists_every_command_in_order():
    text = call("--help").stdout
    places = [text.index(f"│ {name} ") for name in ("demo", "score", "mask", "train", "predict", "delta", "plot")]
    assert places == sorted(places)


def test_the_help_does_not_load_transformers():
    code = "import atexit, sys; from fishmask.cli import main; sys.argv[1:] = ['--help']"
    code += "; atexit.register(lambda: print('transformers' in sys.modules)); main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")


def test_the_version_is_printed():
    from fishmask import __version__

    assert call("--version").stdout == f"fishmask {__version__}\n"


def test_python_dash_m_runs_the_same_commands():
    result = subprocess.run([sys.executable, "-m", "fishmask", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("fishmask ")
