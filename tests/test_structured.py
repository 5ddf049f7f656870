"""The experiment and the benchmark of structured masks: real runs of few words, resumption, tables, index bytes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.structured import index_bytes
from experiments import render, structured
from experiments.structured import METHODS, RECIPES, run, table
from fishmask import Mask
from fishmask.container import encode_indices
from fishmask.data import Examples, rated_words
from fishmask.hub import load_for_training
from tests.tiny import model_folder


def record(task: str, method: str, block: str, rate: float, seed: int, found: float, test: float) -> dict[str, Any]:
    recipe = replace(RECIPES[task], **METHODS[method], block=block, learning_rate=rate, seed=seed)
    metric = structured.METRICS[task]
    quality = {"validation": {metric: found}, "test": {metric: test}}
    return {"task": task, **quality, "entries": 1000, "file_bytes": 4100, "recipe": asdict(recipe)}


def test_a_run_trains_whole_blocks_at_an_equal_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {part: take(rated_words(part), count) for part, count in (("train", 12), ("validation", 8), ("test", 8))}
    folder = str(model_folder(tmp_path / "model"))
    monkeypatch.setattr(structured, "examples", lambda task, source: few)
    monkeypatch.setattr(structured, "model_folder", lambda: folder)
    structured.begin.cache_clear()
    recipe = replace(RECIPES["words"], epochs=1, density=0.1)
    try:
        rows = run("words", replace(recipe, method="fish", block="rows"))
        single = run("words", replace(recipe, method="random", among="layers"))
    finally:
        structured.begin.cache_clear()
    model = load_for_training(folder).model
    k = sum(p.numel() for p in model.parameters()) // 10
    assert 0.95 * k < rows["entries"] <= single["entries"] == k
    assert rows["file_bytes"] - 4 * rows["entries"] < single["file_bytes"] - 4 * single["entries"]
    assert set(rows["test"]) == {"pearson", "spearman", "mse"}
    assert single["layers"]["bert.pooler.dense"] == 0 < single["layers"]["bert.encoder.layer.0"]


def take(examples: Examples, count: int) -> Examples:
    assert examples.targets is not None
    return Examples(examples.texts[:count], targets=examples.targets[:count])


def test_runs_that_are_recorded_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    def fake(task: str, recipe: Any, source: str | None) -> dict[str, Any]:
        seen.append((recipe.block, recipe.learning_rate, recipe.seed))
        good = 0.9 if (recipe.learning_rate == 3e-3) == (recipe.block == "rows") else 0.8
        return record(task, recipe.method, recipe.block, recipe.learning_rate, recipe.seed, good, good - 0.1)

    monkeypatch.setattr(structured, "RESULTS", tmp_path / "new" / "r.jsonl")
    monkeypatch.setattr(structured, "run", fake)
    for arguments in (["--seeds", "0"], ["--seeds", "0", "1"]):
        monkeypatch.setattr("sys.argv", ["structured", "--method", "fish", *arguments])
        structured.main()
    assert len(seen) == len(set(seen)) == 10 + 5
    assert {(block, rate) for block, rate, seed in seen if seed} == {
        ("", 1e-3), ("1x16", 1e-3), ("16x16", 1e-3), ("rows", 3e-3), ("columns", 1e-3),
    }  # fmt: skip


def test_the_table_takes_the_rate_that_is_best_on_validation() -> None:
    lines = [
        record("words", "fish", "", 1e-3, 0, 0.80, 0.70),
        record("words", "fish", "", 3e-3, 0, 0.81, 0.60),
        record("words", "fish", "", 3e-3, 1, 0.50, 0.64),
        record("MRPC", "fish", "", 1e-3, 0, 0.70, 0.75),
        record("words", "random", "rows", 1e-2, 0, 0.70, 0.5),
    ]
    rows = table(lines).splitlines()
    assert rows[2] == (
        "| Fisher scores, all parameters: single entries | 0.620 ± 0.028 (2) | 0.003 | 0.750 (1) | 0.001 | 1,000 | "
        "4.100 |"
    )
    assert rows[3] == "| at random, matrices of the layers: rows | 0.500 (1) | 0.01 |  |  | 1,000 | 4.100 |"
    assert len(rows) == 4


def test_index_bytes_of_blocks_and_of_their_numbers() -> None:
    mask = Mask.random({"w": torch.empty(64, 96), "v": torch.empty(40)}, 0.2, 0, block="4x8")
    coded, by_block = index_bytes(mask, "4x8")
    sizes = {name: shape.numel() for name, shape in mask.shapes.items()}
    assert coded == len(encode_indices(mask.indices, sizes)[0])
    assert 0 < by_block < coded
    assert index_bytes(mask, "")[0] == index_bytes(mask, "")[1] == coded


def test_the_documents_have_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"method": "fish", "block": "rows", "entries": 100, "index_bytes": 25, "index_bytes_by_block": 5}
    line |= {"seconds": {"32x8": 1.5}, "floor_seconds": {"32x8": 1.0}}
    line |= {"processor": "P", "threads": 1, "torch": "2", "date": "D"}
    (tmp_path / "structured_costs.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = render.render("<!-- begin structured-costs -->\n<!-- end structured-costs -->")
    assert "| mask | entries | step / floor, 32x8 |" in text
    assert "| Fisher scores, all parameters: rows | 100 | 1.50 | 0.250 | 0.050 |" in text
