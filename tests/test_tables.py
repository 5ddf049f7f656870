from statistics import mean, stdev

import pytest

from fishmask.records import select_settings
from fishmask.rows import differences, full_of, method_rows, summarize
from fishmask.tables import (
    costs_table,
    differences_table,
    layers_of,
    layers_table,
    methods_table,
    search_table,
    sweep_table,
)
from tests.runs import cells, record, search, seeds


def test_mean_spread_and_count():
    assert summarize([]) is None
    assert summarize([{}]) is None
    assert summarize([{0: 0.5}]) == (0.5, None, 1)
    assert summarize([{0: 0.4, 7: 0.6}]) == (0.5, pytest.approx(stdev([0.4, 0.6])), 2)
    assert summarize([{0: 0.4, 1: 0.6}, {1: 0.8, 2: 0.1}]) == (pytest.approx(0.7), None, 1)


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
    assert [row[0] for row in methods_table(records).rows] == ["full", "fish, 0.5 %", "fish, 2 %"]
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
    assert str(search_table(records)).splitlines() == [
        "| method | task | batch size | 1e-05 | 0.001 | 0.003 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| full | RTE | 32 | **–** |  |  |",
        "| fish | RTE | 16 |  | 60.0 |  |",
        "| fish | RTE | 32 |  | 61.0 | **64.2** |",
    ]


def test_searches_on_fewer_rows_have_lines_of_their_own():
    records = [*search((1e-3, 0.61), (3e-3, 0.70)), *seeds(0.5, 0.6, rate=3e-3, validation=0.72)]
    assert str(search_table(records)).splitlines() == [
        "| method | task | rows | epochs | batch size | 0.001 | 0.003 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| fish | RTE | 1000 | 2 | 32 | 61.0 | **70.0** |",
        "| fish | RTE | 2241 | 4 | 32 |  | **72.0** |",
    ]
    alone = [line for line in records if "sweep" not in line]
    for table in (methods_table, differences_table, costs_table, layers_table):
        assert table(records) == table(alone)
    assert sweep_table(records, "epochs") == ""


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
