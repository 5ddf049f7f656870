import re
import warnings
from html.parser import HTMLParser

import pytest

from fishmask import report as reporting
from fishmask.errors import FishError
from fishmask.report import gaps, report
from fishmask.tables import differences_table
from tests.runs import cells, lines, record, run_folder, search, seeds


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
    assert found_in(said, "No test score", "fish (WNLI)", "random (RTE)")
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


def test_a_seed_that_diverged_is_said():
    records = [*seeds(0.5, 0.6), record(seed=2, validation=None, test=None)]
    assert found_in(gaps(records), "left out of the mean", "fish (RTE seed 2)")
    assert not found_in(gaps(records[:2]), "left out of the mean")


def test_what_a_search_on_fewer_rows_leaves_open_is_said():
    records = [*search((1e-3, 0.6), (1e-2, 0.7), (1e-1, None)), record(rate=1e-3), *search((1e-3, 0.6), task="QQP")]
    said = gaps(records)
    assert found_in(said, "lowest or the highest tried", "fish (RTE 0.001)")
    assert found_in(said, "diverged", "fish (RTE)")
    assert found_in(said, "Searched on fewer rows, but not yet run on all", "fish (QQP)")
    assert not found_in(said, "One setting tried only")


def test_nothing_is_said_where_nothing_is_missing():
    rates = [(1e-4, 0.5), (1e-3, 0.7), (1e-2, 0.6)]
    records = [record(variant=v, rate=rate, validation=score) for v in ("full", "fish") for rate, score in rates]
    records += [record(variant=v, rate=1e-3, seed=1) for v in ("full", "fish")]
    assert gaps(records) == []


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
        *(f"{name}.{kind}" for name in ("curves", "density", "layers") for kind in ("png", "svg")),
        "report.html",
        "report.md",
    ]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine \\& \\<yours\\>\n")
    for heading in ("What is missing", "Methods", "Settings", "Sweeps", "Where the budget went", "Learning curves"):
        assert f"\n## {heading}\n" in text
    assert "\n| fish | 15 | 55.5 ± 7.1 (2) |\n" in text
    assert "](density.png)" in text


def test_the_page_loads_nothing_and_escapes_everything(runs, tmp_path):
    report(runs, tmp_path / "out", "Mine & <yours> </title><script>alert(1)</script>")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == []
    assert not re.search(r"@import|url\((?!#)|<script|<b>|<!DOCTYPE svg", text)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg ") == 3
    assert "prefers-color-scheme" in text
    assert text.count('<div class="scroll">') == text.count("<table>") > 4
    assert any("<b>$\\frac$" in shown for shown in page.text)


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    report(runs, tmp_path / "one")
    report(runs, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert "dc:date" not in (tmp_path / "one" / "density.svg").read_text()


def test_a_report_replaces_an_earlier_one(runs, tmp_path):
    out = tmp_path / "out"
    report(runs, out)
    (out / "mine.txt").write_text("kept")
    report([lines(tmp_path / "one.jsonl", [record()])], out)
    assert sorted(path.name for path in out.iterdir()) == [
        "mine.txt",
        "report.html",
        "report.md",
    ]


def test_one_run_without_test_score_is_reported(tmp_path):
    told = report([lines(tmp_path / "one.jsonl", [record(test=None)])], tmp_path / "out")
    assert (told["plots"], told["tasks"]) == ([], [])
    assert "| fish | RTE | 32 | **60.0** |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_sweep_that_has_only_searched_yet_is_reported(tmp_path):
    told = report([lines(tmp_path / "one.jsonl", search((1e-3, 0.6), (1e-2, 0.7)))], tmp_path / "out")
    assert (told["records"], told["results"], told["plots"]) == (2, 0, [])
    assert "Searched on fewer rows" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


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
        "density.png",
        "examples.png",
        "layers.png",
    ]


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

    monkeypatch.setattr(reporting, "need_matplotlib", absent)
    with pytest.raises(FishError, match="matplotlib"):
        report([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()
