"""Made-up records and folders of runs, for the tests of the report."""

import json

import torch
from torch import nn

from fishmask.delta import Delta
from fishmask.fingerprint import fingerprint
from fishmask.mask import Mask


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


def search(*scores, rows=1000, epochs=2, **fields):
    """Records of a search on fewer rows, from pairs of learning rate and validation score."""
    made = [
        record(rate=rate, validation=score, test=0.99, rows=rows, epochs=epochs, **fields) for rate, score in scores
    ]
    return [line | {"sweep": {"base": "MiniLM", "rows": None, "train_rows": rows}} for line in made]


def seeds(*tests, **fields):
    return [record(test=test, seed=seed, **fields) for seed, test in enumerate(tests)]


def cells(table):
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


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
