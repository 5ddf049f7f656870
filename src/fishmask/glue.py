"""The nine tasks of the GLUE benchmark (Wang et al., 2018): their files, their labels and their scores.

A source of data is a folder in GLUE's own layout (``RTE/train.tsv`` and so on). GLUE's own test labels are not public:
what is tested on here is its dev set, and choices are made on rows held out of train (:func:`hold_out`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

from fishmask.data import Examples, examples_of, read_table
from fishmask.errors import FishError

Part = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: Its name, which is also the name of its folder.
        text: The column of the texts.
        pair: The column of the second texts, None for tasks on single sentences.
        label: The column of the labels.
        classes: The labels in the order of their numbers; empty for regression.
        metrics: The metrics whose mean is the task's score.
        parts: The name that follows "dev" and "test" in the names of the files: MNLI has two dev sets.
        columns: The columns of train and dev where these files have no header.
        hub: The name of its configuration on the hub.
    """

    name: str
    text: str
    pair: str | None
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: str
    parts: tuple[str, ...] = ("",)
    columns: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
_ALL = (
    GlueTask(
        "CoLA", "sentence", None, "label", ("0", "1"), ("mcc",), "cola", columns=("source", "label", "mark", "sentence")
    ),
    GlueTask("SST-2", "sentence", None, "label", ("0", "1"), ("accuracy",), "sst2"),
    GlueTask("MRPC", "#1 String", "#2 String", "Quality", ("0", "1"), ("f1", "accuracy"), "mrpc"),
    GlueTask("STS-B", "sentence1", "sentence2", "score", (), ("pearson", "spearman"), "stsb"),
    GlueTask("QQP", "question1", "question2", "is_duplicate", ("0", "1"), ("f1", "accuracy"), "qqp"),
    GlueTask(
        "MNLI",
        "sentence1",
        "sentence2",
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "mnli",
        parts=("_matched", "_mismatched"),
    ),
    GlueTask("QNLI", "question", "sentence", "label", _ENTAILMENT, ("accuracy",), "qnli"),
    GlueTask("RTE", "sentence1", "sentence2", "label", _ENTAILMENT, ("accuracy",), "rte"),
    GlueTask("WNLI", "sentence1", "sentence2", "label", ("0", "1"), ("accuracy",), "wnli"),
)
TASKS = {task.name: task for task in _ALL}


def glue_task(name: str) -> GlueTask:
    """Return the task of this name; case and hyphens do not matter.

    Raises:
        ValueError: There is no such task.
    """
    for task in _ALL:
        if name.lower().replace("-", "") == task.hub:
            return task
    raise ValueError(f"no GLUE task {name!r}; expected one of {', '.join(TASKS)}")


def tasks_in(source: str | Path) -> list[GlueTask]:
    """Return the tasks that a folder holds, in GLUE's order."""
    return [task for task in _ALL if (Path(source) / task.name / "train.tsv").is_file()]


def read_glue(source: str | Path, task: GlueTask, part: Part) -> dict[str, Examples]:
    """Read one part of a task.

    Args:
        source: A folder in GLUE's own layout.
        task: The task.
        part: "train", "dev" or "test"; the rows of "test" have no labels.

    Returns:
        The examples of each of the task's files for this part: ``{"": examples}``, or for the dev and test parts of
        MNLI ``{"_matched": ..., "_mismatched": ...}``.

    Raises:
        FishError: A file is missing or damaged.
    """
    folder = Path(source) / task.name
    files = {"": folder / "train.tsv"} if part == "train" else {s: folder / f"{part}{s}.tsv" for s in task.parts}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise FishError(f"{missing[0]} does not exist; expected a folder in GLUE's layout with {task.name} in it")
    return {suffix: _read(path, task, part) for suffix, path in files.items()}


def _read(path: Path, task: GlueTask, part: Part) -> Examples:
    table = read_table(path, columns=() if part == "test" else task.columns)
    return examples_of(
        table,
        str(path),
        task.text,
        None if part == "test" else task.label,
        pair=task.pair,
        task="classification" if task.classes else "regression",
        classes=task.classes,
    )


def take(examples: Examples, rows: Sequence[int]) -> Examples:
    """Return some of the examples, in the given order."""
    return replace(
        examples,
        texts=[examples.texts[row] for row in rows],
        pairs=None if examples.pairs is None else [examples.pairs[row] for row in rows],
        targets=None if examples.targets is None else [examples.targets[row] for row in rows],
    )


def hold_out(examples: Examples, share: float = 0.1, rows: int | None = None) -> tuple[Examples, Examples]:
    """Split training examples into a part to train on and a part to choose on.

    The split is drawn once and for all: it depends on the number of examples alone, never on the seed of a run.

    Args:
        examples: The examples of the task's train file.
        share: Share to hold out, in (0, 1); at most 2,000 examples are.
        rows: Use only so many examples in all, drawn at random; all by default.

    Returns:
        The examples to train on and those held out.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be in (0, 1), such as 0.1; got {share}")
    if rows is not None and rows < 2:
        raise ValueError(f"at least 2 rows are needed, to train and to hold out; got {rows}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()[:rows]
    held = min(2000, max(1, round(share * len(order))))
    return take(examples, sorted(order[held:])), take(examples, sorted(order[:held]))


def task_score(task: GlueTask, qualities: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sum up the qualities of a task's files (see :func:`fishmask.measure.quality`) as GLUE does.

    Args:
        task: The task.
        qualities: The quality by file, as named by :func:`read_glue`.

    Returns:
        ``score``, the mean of the task's metrics over its files, as a fraction; and each metric by its name, with the
        name of the file behind it where there are two (``accuracy_matched``).
    """
    metrics = {metric + suffix: quality[metric] for suffix, quality in qualities.items() for metric in task.metrics}
    return {"score": mean(metrics.values()), **metrics}
