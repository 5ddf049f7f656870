"""The nine tasks of the GLUE benchmark (Wang et al., 2018): their files, their labels and their scores.

A source of data is a folder in GLUE's own layout (``RTE/train.tsv`` and so on, as its download script leaves it), or
the data set on the Hugging Face hub, ``nyu-mll/glue``, or a local copy of that. GLUE's own test labels are not public:
what is tested on here is its dev set, and choices are made on rows held out of train (:func:`hold_out`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from fishmask.data import Examples, Table, examples_of, read_table
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
        hub: The name of its configuration on the hub, where the label is always in the column ``label``.
        hub_texts: The columns of the texts there, where they have other names.
        cut_rows: Whether the published train file has rows that a line break inside a text cuts in two.
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
    hub_texts: tuple[str, ...] = ()
    cut_rows: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the texts, one or two."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


_ENTAILMENT = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")
_ALL = (
    GlueTask(
        "CoLA", "sentence", None, "label", ("0", "1"), ("mcc",), "cola", columns=("source", "label", "mark", "sentence")
    ),
    GlueTask("SST-2", "sentence", None, "label", ("0", "1"), ("accuracy",), "sst2"),
    GlueTask(
        "MRPC",
        "#1 String",
        "#2 String",
        "Quality",
        ("0", "1"),
        ("f1", "accuracy"),
        "mrpc",
        hub_texts=("sentence1", "sentence2"),
    ),
    GlueTask("STS-B", "sentence1", "sentence2", "score", (), ("pearson", "spearman"), "stsb"),
    GlueTask("QQP", "question1", "question2", "is_duplicate", ("0", "1"), ("f1", "accuracy"), "qqp", cut_rows=True),
    GlueTask(
        "MNLI",
        "sentence1",
        "sentence2",
        "gold_label",
        _INFERENCE,
        ("accuracy",),
        "mnli",
        parts=("_matched", "_mismatched"),
        hub_texts=("premise", "hypothesis"),
    ),
    GlueTask("QNLI", "question", "sentence", "label", _ENTAILMENT, ("accuracy",), "qnli"),
    GlueTask("RTE", "sentence1", "sentence2", "label", _ENTAILMENT, ("accuracy",), "rte"),
    GlueTask("WNLI", "sentence1", "sentence2", "label", ("0", "1"), ("accuracy",), "wnli"),
)
TASKS = {task.name: task for task in _ALL}
# Not a tenth task: sentences chosen to show what a model of MNLI can do. GLUE wants predictions for them.
DIAGNOSTIC = GlueTask(
    "AX",
    "sentence1",
    "sentence2",
    "label",
    _INFERENCE,
    ("accuracy",),
    "ax",
    hub_texts=("premise", "hypothesis"),
)
_MOST_CUT_ROWS = 100


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
    """Return the tasks that a source holds, in GLUE's order."""
    return [task for task in _ALL if (Path(source) / task.name / "train.tsv").is_file() or _on_hub(source, task)]


def read_glue(source: str | Path, task: GlueTask, part: Part) -> dict[str, Examples]:
    """Read one part of a task.

    Args:
        source: A folder in GLUE's own layout, the name of the data set on the hub (``nyu-mll/glue``), or a local copy
            of that.
        task: The task.
        part: "train", "dev" or "test"; the rows of "test" have no labels.

    Returns:
        The examples of each of the task's files for this part: ``{"": examples}``, or for the dev and test parts of
        MNLI ``{"_matched": ..., "_mismatched": ...}``.

    Raises:
        FishError: A file is missing or damaged; or the hub cannot be read, or ``datasets`` is not installed.
    """
    if _on_hub(source, task):
        suffixes = ("",) if part == "train" else task.parts
        return {suffix: _read_hub(str(source), task, part, suffix) for suffix in suffixes}
    folder = Path(source) / task.name
    files = {"": folder / "train.tsv"} if part == "train" else {s: folder / f"{part}{s}.tsv" for s in task.parts}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise FishError(f"{missing[0]} does not exist; expected a folder in GLUE's layout with {task.name} in it")
    return {suffix: _read(path, task, part) for suffix, path in files.items()}


def read_diagnostic(source: str | Path) -> Examples | None:
    """Read the diagnostic set, which has no labels; None when the source does not have it."""
    if _on_hub(source, DIAGNOSTIC):
        return _read_hub(str(source), DIAGNOSTIC, "test", "")
    path = Path(source) / "diagnostic" / "diagnostic.tsv"
    return _read(path, DIAGNOSTIC, "test") if path.is_file() else None


def _read(path: Path, task: GlueTask, part: Part) -> Examples:
    if task.cut_rows and part == "train":
        table = _whole_rows(path)
    else:
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


def _whole_rows(path: Path) -> Table:
    """Return a table without the rows that are cut, as every reader of QQP does; its newer release has none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FishError(f"{path}: not UTF-8 at byte {error.start}; is the file damaged?") from error
    rows = [line.split("\t") for line in lines if line.strip()]
    whole = [row for row in rows if len(row) == len(rows[0])]
    if len(whole) < 2 or len(rows) - len(whole) > _MOST_CUT_ROWS:
        raise FishError(
            f"{path}: {len(rows) - len(whole)} of {len(rows)} lines do not have as many fields as the first one; "
            f"expected at most {_MOST_CUT_ROWS}; is the file damaged?"
        )
    return {name: [row[column] for row in whole[1:]] for column, name in enumerate(whole[0])}


def _on_hub(source: str | Path, task: GlueTask) -> bool:
    """Whether a source is a name on the hub, or a local copy of the data set there."""
    path = Path(source)
    if path.is_dir():
        return any((path / task.hub).glob("*.parquet"))
    # A name like nyu-mll/glue, unless it is the path of a file that is missing in a folder that is there.
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not path.parent.exists()


def _read_hub(source: str, task: GlueTask, part: Part, suffix: str) -> Examples:
    try:
        import datasets
    except ImportError as error:
        raise FishError("reading GLUE from the hub needs datasets: pip install 'fishmask[glue]'") from error
    split = ("validation" if part == "dev" else part) + suffix
    where = f"{source}, {task.hub}, {split}"
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(source, task.hub, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FishError(f"cannot read {where}: {error} (expected a data set like nyu-mll/glue on the hub)") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    texts = task.hub_texts or task.texts
    missing = [column for column in (*texts, "label") if column not in rows.column_names]
    if missing:
        raise FishError(f"{where}: no column {', '.join(missing)}; it has {', '.join(rows.column_names)}")
    first, *second = ([str(text) for text in rows[column]] for column in texts)
    examples = Examples(first, second[0] if second else None)
    if part == "test":
        return examples
    labels = list(rows["label"])
    if not task.classes:
        return replace(examples, targets=[float(label) for label in labels])
    if not set(labels) <= set(range(len(task.classes))):
        raise FishError(f"{where}: labels must be 0 to {len(task.classes) - 1}, got {sorted(set(labels))[:10]}")
    return replace(examples, targets=labels, classes=task.classes)


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
        The examples to train on and those held out, at least one of each.

    Raises:
        ValueError: The share or the rows are out of range.
        FishError: There are fewer than two examples.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be in (0, 1), such as 0.1; got {share}")
    if rows is not None and rows < 2:
        raise ValueError(f"at least 2 rows are needed, to train and to hold out; got {rows}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()[:rows]
    if len(order) < 2:
        raise FishError(f"expected at least two training examples, to train and to hold out; found {len(order)}")
    held = min(2000, max(1, round(share * len(order))), len(order) - 1)
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
