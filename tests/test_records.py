import math

import pytest

from fishmask.errors import FishError
from fishmask.records import read_runs, select_settings, tasks_of
from fishmask.tables import methods_table
from tests.runs import lines, record, run_folder, search, seeds


def test_validation_chooses_the_setting_and_the_test_score_never_does():
    records = [
        record(rate=1e-4, validation=0.60, test=0.90),
        record(rate=1e-3, validation=0.70, test=0.10),
        record(rate=1e-2, validation=0.65, test=0.95),
    ]
    (result,) = select_settings(records)
    assert (result.learning_rate, result.scores) == (1e-3, {0: 0.10})
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
    assert (result.learning_rate, result.scores) == (1e-3, {0: 0.5, 1: 0.7})
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
    assert select_settings([record(validation=None)])[0].tried == {(1e-3, 32): None}
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


def test_a_rate_below_one_that_diverged_is_not_at_the_edge():
    records = [record(rate=1e-3, validation=0.5), record(rate=1e-2, validation=0.7), record(rate=0.1, validation=None)]
    assert not select_settings(records)[0].at_edge


def test_a_search_on_fewer_rows_is_no_result_but_what_was_tried_before_one():
    tried = ((1e-4, 0.90), (1e-3, 0.95), (1e-2, None))
    # The final runs took 1e-4; that, and not the best of the search, is the setting of the result.
    records = [*search(*tried), *seeds(0.5, 0.6, rate=1e-4), *search((1e-3, 0.1), variant="random")]
    for some in (records, records[::-1]):
        (result,) = select_settings(some)
        assert (result.variant, result.learning_rate, result.scores) == ("fish", 1e-4, {0: 0.5, 1: 0.6})
        assert (result.tried, result.searches) == ({(1e-4, 32): 0.6}, {(1000, 2): {(r, 32): v for r, v in tried}})
    assert result.at_edge
    assert not select_settings([*records, *search((1e-5, 0.1), rows=500)])[0].at_edge
    assert select_settings(search(*tried)) == []


def test_a_search_belongs_to_runs_of_the_same_configuration():
    final = record(rate=1e-3)
    for other in (
        {"task": "MRPC"},
        {"variant": "fish robust"},
        {"density": 0.02},
        {"base": "BERT"},
        {"labels": "sampled"},
    ):
        (result,) = select_settings([final, *search((1e-3, 0.9), **other)])
        assert result.searches == {}
    for other in ({"seed": 3}, {"batch": 16}, {"epochs": 1}, {"rows": 20}):
        (result,) = select_settings([final, *search((1e-3, 0.9), **other)])
        assert len(result.searches) == 1


def test_a_search_on_as_many_rows_as_there_are_does_not_replace_the_final_run(tmp_path):
    final = record(test=0.5)
    found = read_runs([lines(tmp_path / "all.jsonl", [final, *search((1e-3, 0.9), rows=2241, epochs=4)])])
    assert len(found.records) == 2
    assert select_settings(found.records)[0].scores == {0: 0.5}


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
