"""A training run as a folder: from tables to a delta, and from a delta to predictions.

The folder holds ``delta.safetensors`` (or ``model.safetensors`` for method "full"), the model's ``config.json``,
``run.json`` (the base, the columns, the recipe), ``metrics.json`` and ``log.jsonl``.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishmask.data import Encoded, Examples, Task, encode, read_examples
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.hub import DELTA_FILE, delta_in, load_for_training, load_like, load_tokenizer, save_model
from fishmask.log import CheckpointLog
from fishmask.loop import Progress, no_progress
from fishmask.mask import Mask
from fishmask.measure import quality
from fishmask.recipe import Recipe
from fishmask.rivals import load_adapter, save_adapter
from fishmask.states import delete_states
from fishmask.train import Outcome, fit, predict

MODEL_FILE = "model.safetensors"
ADAPTER_FOLDER = "adapter"
CHECKPOINTS_FOLDER = "checkpoints"
PREFIX_FOLDER = "prefix_cache"


def train_table(
    model: str,
    data: Path,
    recipe: Recipe,
    folder: Path,
    columns: Mapping[str, Any],
    *,
    validation: Path | None = None,
    mask: Path | None = None,
    checkpoint_every: int | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fine-tune a model on a table and write the run's folder.

    Args:
        model: A local model folder or a name on the hub.
        data: The table of training examples.
        recipe: How to train.
        folder: The folder to write; made when missing.
        columns: The arguments ``text``, ``label``, ``pair`` and ``task`` of :func:`fishmask.data.read_examples`.
        validation: A table to evaluate on after every epoch.
        mask: The file of a mask to train instead of choosing one.
        checkpoint_every: Commit every so many steps to the folder ``checkpoints`` of the run, and go on from there
            when the same run is called again after it was interrupted; the commits are deleted at the end.
        device: Where to train.
        progress: Called with the progress.

    Returns:
        The metrics, as in ``metrics.json``.
    """
    if mask is not None:
        recipe.check_mask_given()
    examples = read_examples(data, **columns)
    checks = _checks(validation, columns, examples)
    chosen = None if mask is None else read_mask(mask)
    progress("loading", 0, 1)
    loaded = load_for_training(model, examples.classes, seed=recipe.seed)
    loaded.model.to(device)
    progress("loading", 1, 1)
    length, padding = recipe.max_length, recipe.padding
    encoded = encode(examples, loaded.tokenizer, length, padding)
    judged = None if checks is None else encode(checks, loaded.tokenizer, length, padding)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    commits = folder / CHECKPOINTS_FOLDER
    log = CheckpointLog(commits, store_base=False, keep_last=2) if checkpoint_every else None
    prefix = folder / PREFIX_FOLDER
    if recipe.prefix_cache_bytes:
        delete_states(prefix)  # what a killed run left
    try:
        outcome = fit(
            loaded.model,
            encoded,
            recipe,
            head=loaded.head,
            mask=chosen,
            validation=judged,
            log=folder / "log.jsonl",
            checkpoints=log,
            checkpoint_every=checkpoint_every or 1,
            prefix_folder=prefix,
            progress=progress,
        )
    except BaseException:
        if made and not any(folder.iterdir()):  # refused before the first evaluation
            folder.rmdir()
        raise
    finally:
        if log is not None:
            log.close()
    file = write_run(folder, loaded.model, outcome, {"base": model, **columns, "recipe": asdict(recipe)})
    metrics = _metrics(outcome, file)
    write_json(folder / "metrics.json", metrics)
    if checkpoint_every:
        _drop(commits)
    return metrics


def _drop(commits: Path) -> None:
    """Delete a log; half of one, left by a kill in between, would stand in the way of the next run."""
    if commits.exists():
        shutil.rmtree(commits.rename(commits.with_name(f".{commits.name}.done")), ignore_errors=True)


def _checks(path: Path | None, columns: Mapping[str, Any], training: Examples) -> Examples | None:
    """Read the validation table as the training table was understood."""
    if path is None:
        return None
    task = "classification" if training.classes else "regression"
    return read_examples(path, **{**columns, "task": task}, classes=training.classes)


def write_run(folder: Path, model: Any, outcome: Outcome, run: Mapping[str, Any]) -> Path:
    """Write the trained numbers, the configuration and ``run.json``; return the file of the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    for earlier in (DELTA_FILE, MODEL_FILE):  # what a run by another method left in the same folder
        (folder / earlier).unlink(missing_ok=True)
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    if outcome.tuning is not None:
        file = folder / DELTA_FILE
        model.config.save_pretrained(folder)
        outcome.tuning.delta().save(file)
    elif outcome.adapter is not None:
        model.config.save_pretrained(folder)
        file = save_adapter(outcome.adapter, folder) / "adapter_model.safetensors"
    else:
        file = folder / MODEL_FILE
        save_model(model, folder)
    write_json(folder / "run.json", run)
    return file


def _metrics(outcome: Outcome, file: Path) -> dict[str, Any]:
    return {
        **outcome.history[-1],
        "entries": outcome.entries,
        "mask": None if outcome.tuning is None else outcome.tuning.mask.digest,
        "seconds_per_step": outcome.seconds_per_step,
        "seconds_scoring": outcome.seconds_scoring,
        **({"seconds_filling": outcome.seconds_filling, "prefix_cache": outcome.prefix} if outcome.prefix else {}),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "file": str(file),
        "file_bytes": file.stat().st_size,
    }


def predict_table(
    folder: Path,
    data: Path,
    output: Path,
    *,
    base: str | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Predict for every row of a table with what a training run left, and write one JSON line per row.

    Args:
        folder: The run's folder.
        data: The table.
        output: The file to write.
        base: The base model; by default the one in ``run.json``.
        text: The column of the texts; by default as in training.
        pair: The column of the second texts; by default as in training.
        label: The column of the labels, to report the quality.
        device: Where to predict.
        progress: Called with the progress.

    Returns:
        The number of rows, and the quality when there are labels.
    """
    run = read_run(folder)
    base = base or run["base"]
    progress("loading", 0, 1)
    model = load_run(folder, base).to(device)
    progress("loading", 1, 1)
    regression = model.config.problem_type == "regression"
    classes = () if regression else tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    task: Task = "regression" if regression else "classification"
    examples = read_examples(data, text or run["text"], label, pair=pair or run["pair"], task=task, classes=classes)
    encoded = encode(examples, load_tokenizer(base), run["recipe"]["max_length"])
    # As the training evaluated it; runs older than the setting have none.
    precision = run["recipe"].get("precision", "float32")
    outputs = predict(model, encoded, progress=progress, precision=precision)
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(outputs, classes))
    return {"predictions": str(output), "rows": len(examples), **_quality(outputs, encoded)}


def _rows(outputs: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    if not classes:
        return [{"prediction": value} for value in outputs.view(-1).tolist()]
    return [
        {
            "prediction": classes[max(range(len(row)), key=row.__getitem__)],
            "probabilities": dict(zip(classes, row, strict=True)),
        }
        for row in torch.softmax(outputs, dim=1).tolist()
    ]


def _quality(outputs: Tensor, encoded: Encoded) -> dict[str, float]:
    return {} if encoded.targets is None else quality(outputs, encoded.targets)


def load_run(folder: Path, base: str) -> Any:
    """Load the model that a run left: the base with the delta or the adapters, or the whole model of method "full"."""
    if (folder / MODEL_FILE).exists():
        return load_like(str(folder))
    if (folder / ADAPTER_FOLDER).exists():
        model = load_like(base, folder)
        load_adapter(model, folder)
        return model
    delta = Delta.load(folder / DELTA_FILE)
    model = load_like(base, folder)
    delta.apply(model)
    return model


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json`` of a run's folder.

    Raises:
        FishError: There is none, or it is damaged.
    """
    path = folder / "run.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        run["base"], run["text"], run["pair"], run["recipe"]["max_length"]
    except FileNotFoundError as error:
        raise FishError(f"{path} is missing; expected the folder that `fishmask train` wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FishError(f"{path} is damaged ({error!r}); train again") from error
    return run


def read_mask(path: Path) -> Mask:
    """Read the mask of a mask file, of a delta file, or of a run's folder."""
    path = delta_file(path)
    try:
        return Mask.load(path)
    except FishError:
        return Delta.load(path).mask


def delta_file(path: Path) -> Path:
    """Return the file meant by a path that may be the folder of a run."""
    path = delta_in(path) if path.is_dir() else path
    if not path.exists():
        raise FishError(f"{path} does not exist; expected a file, or the folder of a training run on a mask")
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
