import json
import math
import re
import warnings
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest
import torch
from torch import nn

from fishmask import report as reporting
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fingerprint import fingerprint
from fishmask.mask import Mask
from fishmask.report import (
    costs_table,
    differences,
    differences_table,
    full_of,
    gaps,
    layers_of,
    layers_table,
    method_rows,
    methods_table,
    read_runs,
    report,
    search_table,
    select_settings,
    settings_table,
    summarize,
    sweep_table,
    tasks_of,
)


def record(task="RTE", variant="fish", validation=0.6, test=0.5, rate=1e-3, batch=32, seed=0, **recipe):
    method = recipe.pop("method", "fish" if variant.startswith("fish") else variant)
    made = {
        "task": task,
        "variant": variant,
        "base": recipe.pop("base", "MiniLM"),
        "rows": recipe.pop("rows", 2241),
        "held_out": 249,
        "entries": recipe.pop("entries", 113568),
        "layers": recipe.pop("layers", {}),
        "recipe": {
            "method": method, "density": 0.005, "learning_rate": rate, "batch_size": batch, "seed": seed, "epochs": 4,
            "examples": 1024, "labels": "given", "score": "square", "keep": [], **recipe,
        },
    }  # fmt: skip
    made |= {} if validation is None else {"validation": {"score": validation}}
    return made | ({} if test is None else {"test": {"score": test}})


def seeds(*tests, **fields):
    return [record(test=test, seed=seed, **fields) for seed, test in enumerate(tests)]


def cells(table):
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- the selection rule


def test_validation_chooses_the_setting_and_the_test_score_never_does():
    records = [
        record(rate=1e-4, validation=0.60, test=0.90),
        record(rate=1e-3, validation=0.70, test=0.10),
        record(rate=1e-2, validation=0.65, test=0.95),
    ]
    (result,) = select_settings(records)
    assert (result.learning_rate, result.validation, result.scores) == (1e-3, 0.70, {0: 0.10})
    # Whatever the test scores are, the choice is the same.
    for scores in ((0.0, 1.0, 0.5), (None, None, None), (1.0, 0.0, 0.0)):
        for line, score in zip(records, scores, strict=True):
            line["test"] = None if score is None else {"score": score}
        assert select_settings(records)[0].learning_rate == 1e-3


def test_only_the_search_seed_decides():
    records = [
        record(rate=1e-3, validation=0.70, test=0.5, seed=0),
        record(rate=1e-2, validation=0.69, test=0.6, seed=0),
        record(rate=1e-3, validation=0.10, test=0.7, seed=1),
        record(rate=1e-2, validation=0.99, test=0.8, seed=1),
        record(rate=1e-1, validation=0.99, test=0.8, seed=2),
    ]
    (result,) = select_settings(records)
    assert (result.learning_rate, result.search_seed, result.scores) == (1e-3, 0, {0: 0.5, 1: 0.7})
    assert result.tried == {(1e-3, 32): 0.70, (1e-2, 32): 0.69, (1e-1, 32): None}


def test_batch_sizes_are_settings_and_every_other_field_parts_groups():
    records = [record(batch=16, validation=0.7), record(batch=32, validation=0.6)]
    records += [record(density=0.02), record(examples=32), record(task="MRPC"), record(base="other"), record(rows=9)]
    results = select_settings(records)
    assert len(results) == 6
    assert {result.batch_size for result in results if result.fields["examples"] == 1024} == {16, 32}
    (first,) = [r for r in results if len(r.tried) == 2]
    assert first.batch_size == 16


def test_of_equally_good_settings_the_repeated_one_wins_then_the_smaller():
    equal = [record(rate=rate, batch=batch) for rate in (1e-2, 1e-3) for batch in (32, 16)]
    (result,) = select_settings(equal)
    assert (result.learning_rate, result.batch_size) == (1e-3, 16)
    (result,) = select_settings([*equal, record(rate=1e-2, batch=32, seed=1)])
    assert (result.learning_rate, result.batch_size) == (1e-2, 32)


@pytest.mark.parametrize("validation", [None, math.nan])
def test_a_diverged_setting_is_never_chosen(validation):
    records = [record(rate=1.0, validation=validation, test=None), record(rate=1e-3, validation=0.0)]
    (result,) = select_settings(records)
    assert result.learning_rate == 1e-3
    assert result.tried[1.0, 32] is None


def test_the_later_of_two_lines_of_the_same_run_counts():
    (result,) = select_settings([record(test=0.1), record(test=0.2)])
    assert result.scores == {0: 0.2}


def test_density_does_not_part_methods_that_ignore_it():
    records = [record(variant=name, density=d, seed=i) for name in ("full", "biases") for i, d in enumerate((0.1, 0.2))]
    assert [(r.variant, r.density, len(r.scores)) for r in select_settings(records)] == [
        ("full", None, 2),
        ("biases", None, 2),
    ]


def test_without_validation_scores_only_a_single_setting_can_be_taken():
    assert select_settings([record(validation=None)])[0].validation is None
    assert select_settings([record(validation=None), record(validation=None, rate=1)]) == []


def test_results_do_not_depend_on_the_order_of_the_records():
    records = [
        record(task=task, variant=variant, seed=seed, density=density, rate=rate)
        for task in ("own", "RTE", "CoLA")
        for variant in ("random", "full", "fish", "own method")
        for density in (0.02, 0.005)
        for seed in (0, 1)
        for rate in (1e-3, 1e-4)
        if variant != "full" or density == 0.005
    ]
    assert select_settings(records[::-1]) == select_settings(records)
    assert str(methods_table(records[::-1])) == str(methods_table(records))
    assert tasks_of(select_settings(records)) == ["CoLA", "RTE", "own"]
    assert [row[0] for row in methods_table(records, 0.02).rows] == ["full", "fish", "random", "own method"]


# -------------------------------------------------------------------------------------------------------------- tables


def test_mean_spread_and_count():
    assert summarize([]) is None
    assert summarize([0.5]) == (0.5, None, 1)
    assert summarize([0.4, 0.6]) == (0.5, pytest.approx(stdev([0.4, 0.6])), 2)


def test_the_table_of_methods():
    records = [
        *seeds(0.70, 0.72, 0.74, task="RTE", variant="full", entries=1000),
        *seeds(0.80, 0.86, 0.80, task="MRPC", variant="full", entries=1002),
        *seeds(0.5, task="RTE"),
        *seeds(0.6, 0.8, task="MRPC"),
    ]
    table = methods_table(records)
    averages = [mean(pair) for pair in ((0.70, 0.80), (0.72, 0.86), (0.74, 0.80))]
    assert cells(table) == {
        "full": {
            "entries": "1,000–1,002",
            "MRPC": "82.0 ± 3.5 (3)",
            "RTE": "72.0 ± 2.0 (3)",
            "average": f"{100 * mean(averages):.1f} ± {100 * stdev(averages):.1f} (3)",
        },
        # Only seed 0 has both tasks.
        "fish": {"entries": "113,568", "MRPC": "70.0 ± 14.1 (2)", "RTE": "50.0 (1)", "average": "55.0 (1)"},
    }
    assert str(table).splitlines()[:2] == [
        "| method | entries | MRPC | RTE | average |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]


def test_a_method_that_lacks_a_task_has_no_average():
    table = cells(methods_table([record(task="RTE"), record(task="MRPC"), record(task="RTE", variant="random")]))
    assert table["fish"]["average"] == "50.0 (1)"
    assert table["random"] == {"entries": "113,568", "MRPC": "–", "RTE": "50.0 (1)", "average": "–"}


def test_one_task_needs_no_average_and_a_task_without_test_scores_no_column():
    table = methods_table([record(task="RTE"), record(task="WNLI", test=None)])
    assert table.columns == ["method", "entries", "RTE"]


def test_densities_stand_in_one_table_or_in_one_each():
    records = [record(density=d, test=d) for d in (0.02, 0.005)] + [record(variant="full", density=0.5)]
    assert [row[:2] for row in methods_table(records).rows] == [["full", "–"], ["fish", "0.5 %"], ["fish", "2 %"]]
    assert [row[0] for row in methods_table(records, 0.02).rows] == ["full", "fish"]
    assert cells(methods_table(records, 0.02))["fish"]["RTE"] == "2.0 (1)"


def test_rows_are_told_apart_by_fields_that_vary_within_a_task_only():
    between = [record(task="RTE", max_length=128), record(task="MRPC", max_length=64)]
    assert [row.label for row in method_rows(select_settings(between))] == ["fish"]
    within = [record(warm_up_head=0, keep=["head"]), record(warm_up_head=100, keep=["head"]), record(variant="random")]
    assert [r.label for r in method_rows(select_settings(within))] == [
        "fish, warm up head 0",
        "fish, warm up head 100",
        "random",
    ]
    bases = [record(), record(base="BERT")]
    assert [row.label for row in method_rows(select_settings(bases))] == ["fish, BERT", "fish, MiniLM"]


def test_differences_to_full_fine_tuning_are_paired_by_seed():
    records = [
        *seeds(0.70, 0.60, 0.80, task="RTE", variant="full"),
        *seeds(0.90, 0.90, 0.90, task="MRPC", variant="full"),
        *seeds(0.69, 0.63, task="RTE"),
        *seeds(0.88, 0.86, 0.10, task="MRPC"),
    ]
    table = cells(differences_table(records))
    # By hand: RTE -1, +3 over the two seeds of both; MRPC -2, -4, -80; means over the tasks by seed -1.5, -0.5.
    assert table == {
        "fish": {"MRPC": "−28.7 ± 44.5 (3)", "RTE": "+1.0 ± 2.8 (2)", "average": "−1.0 ± 0.7 (2)"},
    }
    results = select_settings(records)
    fish = next(r for r in results if r.variant == "fish" and r.task == "RTE")
    assert differences(fish, results) == {0: pytest.approx(-0.01), 1: pytest.approx(0.03)}


def test_full_fine_tuning_is_compared_on_equal_ground():
    fish = record(epochs=7)
    for full in (
        record(variant="full", rows=9),
        record(variant="full", base="BERT"),
        record(task="QQP", variant="full"),
    ):
        results = select_settings([fish, full])
        assert full_of(next(r for r in results if r.method == "fish"), results) is None
    fulls = [record(variant="full", epochs=7, test=0.4), record(variant="full", epochs=3, test=0.9)]
    assert cells(differences_table([fish, *fulls]))["fish"] == {"RTE": "+10.0 (1)"}
    assert not differences_table([fish])


def test_settings_and_the_search():
    records = [record(rate=1e-3, validation=0.61), record(rate=3e-3, validation=0.642), record(rate=1e-3, batch=16)]
    records += [record(variant="full", rate=1e-5, validation=None)]
    assert cells(settings_table(records)) == {"full": {"RTE": "1e-05 × 32"}, "fish": {"RTE": "0.003 × 32"}}
    assert str(search_table(records)).splitlines() == [
        "| method | task | batch size | 1e-05 | 0.001 | 0.003 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| full | RTE | 32 | **–** |  |  |",
        "| fish | RTE | 16 |  | 60.0 |  |",
        "| fish | RTE | 32 |  | 61.0 | **64.2** |",
    ]


def test_a_sweep_shows_rows_whose_field_varies():
    records = [record(examples=n, test=n / 10000) for n in (1024, 32, 256)] + [record(variant="random")]
    table = sweep_table(records, "examples")
    assert table.columns == ["method", "task", "32", "256", "1024"]
    assert table.rows == [["fish", "RTE", "0.3 (1)", "2.6 (1)", "10.2 (1)"]]
    assert not sweep_table(records, "density")
    assert sweep_table(records, "density") == ""


def test_variants_that_differ_in_the_swept_field_alone_share_a_row():
    records = [record(variant="fish paper"), record(variant="fish expected", labels="expected", test=0.4)]
    table = sweep_table(records, "labels")
    assert (table.columns[2:], table.rows) == (
        ["expected", "given"],
        [["fish expected / fish paper", "RTE", "40.0 (1)", "50.0 (1)"]],
    )
    same = [*records, record(variant="fish again", test=0.3), record(variant="fish again", labels="expected")]
    assert sweep_table(same, "labels").rows == [["fish again", "RTE", "50.0 (1)", "30.0 (1)"]]


def test_beside_a_density_sweep_stand_methods_of_one_density():
    records = [record(task=t, density=d) for t in ("RTE", "MRPC") for d in (0.005, 0.001)]
    records += [record(variant="lora"), record(variant="full")]
    table = sweep_table(records, "density")
    assert table.columns[2:] == ["0.1 %", "0.5 %"]
    assert [row[:2] for row in table.rows] == [["fish", "MRPC"], ["fish", "RTE"], ["fish", "average"], ["lora", "RTE"]]
    assert table.rows[-1] == ["lora", "RTE", "–", "50.0 (1)"]


def test_costs_are_means_over_the_seeds_of_the_chosen_setting():
    records = [record(seed=0), record(seed=1), record(rate=1.0, validation=0.1)]
    for line, step in zip(records, (0.2, 0.4, 99.0), strict=True):
        line |= {"seconds_per_step": step, "file_bytes": 320_000, "peak_memory_bytes": 1.25e9}
    (row,) = costs_table(records).rows
    assert row == ["fish", "RTE", "113,568", "320 kB", "0.300", "–", "–", "1.25 GB"]


def test_shares_by_layer_add_up_whatever_the_groups_are_called():
    names = {"bert.embeddings.LayerNorm": 1, "bert.embeddings.word_embeddings": 2, "bert.encoder.layer.10": 3}
    names |= {"bert.encoder.layer.2": 4, "bert.pooler.dense": 0, "classifier": 10, "extra": 5}
    assert layers_of(names.items()) == {
        "embeddings": 3, "layer 10": 3, "layer 2": 4, "pooler": 0, "head": 10, "extra": 5,
    }  # fmt: skip
    own = {"embeddings": 10, "layer 2": 10}
    table = layers_table([record(layers=names), record(layers=own, seed=1), record(variant="lora")])
    assert table.columns[2:] == ["embeddings", "layer 2", "layer 10", "extra", "pooler", "head"]
    assert table.rows == [["fish", "RTE", "31.0", "33.0", "6.0", "10.0", "0.0", "20.0"]]


def test_a_cell_cannot_break_out_of_its_table():
    table = methods_table([record(variant="fish a|b\n<i>*c*</i> & `d` [e](f)")])
    row = str(table).splitlines()[-1]
    assert row.startswith(r"| fish a\|b \<i\>\*c\*\</i\> \& \`d\` \[e\](f) | 113,568 |")
    assert "&lt;i&gt;*c*&lt;/i&gt; &amp; `d`" in table.html()


# ----------------------------------------------------------------------------------------------------- what is missing


def found_in(said, *words):
    return any(all(word in line for word in words) for line in said)


def test_what_is_missing_is_said():
    records = [
        *seeds(0.5, 0.6, variant="full", rate=1e-4),
        record(variant="full", rate=1e-5, validation=0.1),
        record(rate=1e-3, validation=0.6, padding="max"),
        record(rate=1e-2, validation=0.5, padding="max"),
        record(rate=1e-1, validation=None, test=None, padding="max"),
        record(task="WNLI", test=None),
        record(task="MRPC", rows=5),
        record(variant="random", test=None),
        record(variant="lora", validation=None),
        record(variant="lora", rate=1.0, validation=None),
    ]
    said = gaps(records, ["runs/broken/metrics.json (not JSON)"])
    assert found_in(said, "No test score at all", "WNLI")
    assert found_in(said, "No test score:", "random (RTE)")
    assert found_in(said, "One seed only, so no spread", "fish (MRPC, RTE)")
    assert found_in(said, "lowest or the highest", "full (RTE 0.0001)", "fish (RTE 0.001)")
    assert found_in(said, "One setting tried only", "random (RTE)")
    assert found_in(said, "diverged", "fish (RTE)")
    assert found_in(said, "No average", "full (MRPC)")
    assert found_in(said, "No full fine-tuning", "fish (MRPC)")
    assert found_in(said, "whose recipe differs", "fish (RTE: padding)")
    assert found_in(said, "left out", "lora (RTE)")
    assert found_in(said, "Not read", "runs/broken/metrics.json (not JSON)")


def test_seeds_that_cannot_be_paired_are_said():
    said = gaps([record(variant="full", seed=0), record(seed=1)])
    assert found_in(said, "No full fine-tuning of the same base, rows and seed", "fish (RTE)")
    assert cells(differences_table([record(variant="full", seed=0), record(seed=1)])) == {"fish": {"RTE": "–"}}


def test_nothing_is_said_where_nothing_is_missing():
    rates = [(1e-4, 0.5), (1e-3, 0.7), (1e-2, 0.6)]
    records = [record(variant=v, rate=rate, validation=score) for v in ("full", "fish") for rate, score in rates]
    records += [record(variant=v, rate=1e-3, seed=1) for v in ("full", "fish")]
    assert gaps(records) == []


def test_a_rate_below_one_that_diverged_is_not_at_the_edge():
    records = [record(rate=1e-3, validation=0.5), record(rate=1e-2, validation=0.7), record(rate=0.1, validation=None)]
    assert not select_settings(records)[0].at_edge


# ------------------------------------------------------------------------------------------------------- run folders


def run_folder(folder, line, *, layers=False):
    """Write a tiny run with a real delta, as the sweep does."""
    folder.mkdir(parents=True)
    base = nn.ModuleDict({"embeddings": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    torch.manual_seed(line["recipe"]["seed"])
    mask = Mask.random(base, 0.5, seed=0, keep="classifier*")
    values = {name: torch.randn(len(flat)) for name, flat in mask.indices.items()}
    Delta(mask, values, base=fingerprint(base.named_parameters(), mask)).save(folder / "delta.safetensors")
    points = [{"epoch": e, "step": 10 * e, "train_loss": 1 / e, "score": 0.5 + e / 10} for e in (1, 2)]
    lines(folder / "log.jsonl", points)
    line = {**line, "entries": mask.k} if layers else {k: v for k, v in line.items() if k != "layers"}
    (folder / "metrics.json").write_text(json.dumps(line), encoding="utf-8")
    return mask


def test_run_folders_are_found_at_any_depth_with_their_logs_and_masks(tmp_path):
    mask = run_folder(tmp_path / "RTE" / "fish-1", record())
    run_folder(tmp_path / "deep" / "er" / "MRPC" / "fish-2", record(task="MRPC"))
    found = read_runs([tmp_path])
    assert [r["task"] for r in found.records] == ["RTE", "MRPC"]
    assert found.skipped == []
    assert [[point["step"] for point in points] for points in found.curves.values()] == [[10, 20], [10, 20]]
    assert found.records[0]["layers"] == {"embeddings": mask.k - 10, "classifier": 10}


def test_damaged_and_unfinished_runs_are_skipped_by_name(tmp_path):
    for name, seed in (("good", 0), ("metrics", 1), ("log", 2), ("delta", 3), ("unfinished", 4), ("wrong", 5)):
        run_folder(tmp_path / name, record(seed=seed))
    (tmp_path / "metrics" / "metrics.json").write_text('{"task": "RTE", "va')
    (tmp_path / "log" / "log.jsonl").write_text('{"step": 10, "score": 0.5}\n{"step"')
    (tmp_path / "delta" / "delta.safetensors").write_bytes(b"nonsense")
    (tmp_path / "unfinished" / "metrics.json").unlink()
    (tmp_path / "wrong" / "metrics.json").write_text('{"accuracy": 0.5}')
    found = read_runs([tmp_path])
    assert sorted(r["recipe"]["seed"] for r in found.records) == [0, 2, 3]
    assert len(found.curves) == 2
    reasons = "\n".join(found.skipped)
    assert len(found.skipped) == 5
    for file in (
        "metrics/metrics.json",
        "log/log.jsonl",
        "delta/delta.safetensors",
        "unfinished",
        "wrong/metrics.json",
    ):
        assert str(tmp_path / file) in reasons
    assert "missing or wrong task, variant, recipe.method" in reasons


def test_files_of_records_lose_damaged_lines_only_and_later_lines_win(tmp_path):
    path = lines(tmp_path / "old.jsonl", [record(test=0.1), record(seed=1)])
    path.write_text(path.read_text() + "\n[1]\n{half", encoding="utf-8")
    newer = lines(tmp_path / "new.jsonl", [record(test=0.2)])
    found = read_runs([path, str(newer)])
    assert [r["test"]["score"] for r in found.records] == [0.2, 0.5]
    assert [reason.partition(" (")[0] for reason in found.skipped] == [f"{path} line 4", f"{path} line 5"]


def test_nothing_to_read_is_one_error(tmp_path):
    with pytest.raises(FishError, match="no record of a run"):
        read_runs([tmp_path])
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(FishError, match=r"bad\.jsonl line 1 \(not JSON"):
        read_runs([tmp_path / "bad.jsonl"])
    with pytest.raises(FishError, match=r"absent, other: no such file or folder"):
        read_runs(["absent", tmp_path, "other"])


# ------------------------------------------------------------------------------------------------------ the documents


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would load and show."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.ids, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.loaded += [v for n, v in attrs if n in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def runs(tmp_path):
    """Runs of two methods: two densities, two seeds, one folder each; full fine-tuning in a file."""
    for density in (0.005, 0.02):
        for seed in (0, 1):
            line = record(density=density, seed=seed, test=0.5 + density + seed / 10, layers={"layer 0": 3, "head": 1})
            run_folder(tmp_path / "runs" / "RTE" / f"fish-{density}-{seed}", line, layers=True)
    lines(tmp_path / "full.jsonl", [*seeds(0.6, 0.7, variant="full"), record(variant="<b>$\\frac$", examples=32)])
    return [tmp_path / "runs", tmp_path / "full.jsonl"]


def test_the_report(runs, tmp_path):
    told = report(runs, tmp_path / "out", "Mine & <yours>")
    assert (told["records"], told["results"], told["tasks"], told["skipped"]) == (7, 4, ["RTE"], [])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        *(f"{name}.{kind}" for name in ("curves", "density", "layers", "methods") for kind in ("png", "svg")),
        "report.html",
        "report.md",
    ]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine \\& \\<yours\\>\n")
    for heading in ("What is missing", "Methods", "Settings", "Sweeps", "Where the budget went", "Learning curves"):
        assert f"\n## {heading}\n" in text
    assert "\n| fish | 15 | 55.5 ± 7.1 (2) |\n" in text
    assert "](methods.png)" in text


def test_the_page_loads_nothing_and_escapes_everything(runs, tmp_path):
    report(runs, tmp_path / "out", "Mine & <yours> </title><script>alert(1)</script>")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == []
    assert not re.search(r"@import|url\((?!#)|<script|<b>|<!DOCTYPE svg", text)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg ") == 4
    assert "prefers-color-scheme" in text
    assert text.count('<div class="scroll">') == text.count("<table>") > 4
    assert any("<b>$\\frac$" in shown for shown in page.text)


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    report(runs, tmp_path / "one")
    report(runs, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert "dc:date" not in (tmp_path / "one" / "methods.svg").read_text()


def test_a_report_replaces_an_earlier_one(runs, tmp_path):
    out = tmp_path / "out"
    report(runs, out)
    (out / "mine.txt").write_text("kept")
    report([lines(tmp_path / "one.jsonl", [record()])], out)
    assert sorted(path.name for path in out.iterdir()) == [
        "methods.png", "methods.svg", "mine.txt", "report.html", "report.md",
    ]  # fmt: skip


def test_one_run_without_test_score_is_reported(tmp_path):
    told = report([lines(tmp_path / "one.jsonl", [record(test=None)])], tmp_path / "out")
    assert (told["plots"], told["tasks"]) == ([], [])
    assert "| fish | RTE | 32 | **60.0** |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_odd_labels_and_many_methods_can_be_drawn(tmp_path):
    records = [
        record(task=task, variant=f"_{i}$", method="fish", density=d, examples=n, layers={"layer 0": 1})
        for task in ("RTE", "MRPC")
        for i in range(3)
        for d, n in ((0.005, 32), (0.005, 64), (0.02, 64))
    ]
    records += [record(variant=f"v{i}", method="snip") for i in range(12)] + [record(variant="biases")]
    told = report([lines(tmp_path / "many.jsonl", records)], tmp_path / "out")
    assert [path.rpartition("/")[2] for path in told["plots"][::2]] == [
        "methods.png", "density.png", "examples.png", "layers.png",
    ]  # fmt: skip


def test_a_log_without_the_task_score_shows_its_first_metric(tmp_path):
    run_folder(tmp_path / "runs", record())
    lines(tmp_path / "runs" / "log.jsonl", [{"step": 5, "accuracy": 0.5, "f1": 0.1, "train_loss": 0.7}])
    report([tmp_path / "runs"], tmp_path / "out")
    assert "validation accuracy, %" in (tmp_path / "out" / "curves.svg").read_text(encoding="utf-8")


def test_one_warning_names_what_was_skipped(runs, tmp_path):
    (runs[0] / "RTE" / "fish-0.02-0" / "metrics.json").write_text("{")
    (runs[0] / "RTE" / "fish-0.02-1" / "log.jsonl").write_text("{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = report(runs, tmp_path / "out")
    (warning,) = caught
    assert "fish-0.02-0/metrics.json" in str(warning.message)
    assert "fish-0.02-1/log.jsonl" in str(warning.message)
    assert len(told["skipped"]) == 2
    assert "Not read" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_faults_come_before_anything_is_written(tmp_path, monkeypatch):
    file = lines(tmp_path / "records.jsonl", [record()])
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        report([file], file)
    with pytest.raises(FishError, match="no such file"):
        report([tmp_path / "absent"], tmp_path / "out")

    def absent():
        raise FishError("needs matplotlib")

    monkeypatch.setattr(reporting, "_matplotlib", absent)
    with pytest.raises(FishError, match="matplotlib"):
        report([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()
