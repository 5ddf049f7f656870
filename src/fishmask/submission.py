"""The files that the GLUE benchmark takes: one table of predictions for each test set, in one flat zip file.

A table is ``index<TAB>prediction``: rows count from 0 in the order of the test file, and a prediction is a label as the
task's own train file writes it (``entailment``, ``1``), or for STS-B a number from 0 to 5. The benchmark wants all
eleven files in a submission, those of WNLI and of the diagnostic set AX included.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from fishmask.data import Examples, encode
from fishmask.errors import FishError
from fishmask.glue import DIAGNOSTIC, TASKS, GlueTask, glue_task, read_diagnostic, read_glue
from fishmask.hub import DELTA_FILE, load_tokenizer
from fishmask.loop import Progress, no_progress
from fishmask.records import is_search
from fishmask.run import ADAPTER_FOLDER, MODEL_FILE, load_run, read_run
from fishmask.train import predict

ZIP_FILE = "submission.zip"
LOWEST, HIGHEST = 0.0, 5.0  # the range of STS-B; the benchmark refuses numbers outside

Predictions = Sequence[str] | Sequence[float]


@dataclass(frozen=True)
class SubmissionFile:
    """One of the files of a submission.

    Attributes:
        task: The task whose model predicts, as named in :data:`fishmask.glue.TASKS`.
        part: Which of the task's test sets it is, as named by :func:`fishmask.glue.read_glue`; "AX" for the diagnostic
            set.
        rows: Rows of the benchmark's own test file.
    """

    task: str
    part: str
    rows: int

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that may be predicted; empty for numbers."""
        return TASKS[self.task].classes


FILES = {
    "CoLA": SubmissionFile("CoLA", "", 1063),
    "SST-2": SubmissionFile("SST-2", "", 1821),
    "MRPC": SubmissionFile("MRPC", "", 1725),
    "STS-B": SubmissionFile("STS-B", "", 1379),
    "QQP": SubmissionFile("QQP", "", 390_965),
    "MNLI-m": SubmissionFile("MNLI", "_matched", 9796),
    "MNLI-mm": SubmissionFile("MNLI", "_mismatched", 9847),
    "QNLI": SubmissionFile("QNLI", "", 5463),
    "RTE": SubmissionFile("RTE", "", 3000),
    "WNLI": SubmissionFile("WNLI", "", 146),
    "AX": SubmissionFile("MNLI", DIAGNOSTIC.name, 1104),
}


def write_submission(predictions: Mapping[str, Predictions], folder: Path) -> Path:
    """Write predictions as the benchmark takes them.

    Args:
        predictions: For each file by its name in :data:`FILES` (such as "RTE" or "MNLI-mm") the predictions in the
            order of the test file: labels, or numbers for "STS-B", which are cut off at 0 and 5.
        folder: Where the tables and the zip file go; made when missing.

    Returns:
        The zip file, ``submission.zip`` in the folder.

    Raises:
        ValueError: There is no such file, a file has no predictions, or a label is none of the task's.
        FishError: A number is not finite.
    """
    if not predictions:
        raise ValueError(f"there is nothing to submit; expected predictions for some of {', '.join(FILES)}")
    tables = {name: _table(name, values) for name, values in predictions.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(folder / ZIP_FILE, "w", ZIP_DEFLATED) as archive:
        for name, table in tables.items():
            path = folder / f"{name}.tsv"
            path.write_text(table, encoding="utf-8", newline="\n")
            archive.write(path, path.name)
    return folder / ZIP_FILE


def _table(name: str, values: Predictions) -> str:
    if name not in FILES:
        raise ValueError(f"a submission has no file {name!r}; expected one of {', '.join(FILES)}")
    if not len(values):
        raise ValueError(f"{name}: there are no predictions")
    classes = FILES[name].classes
    unknown = sorted({str(value) for value in values if value not in classes}) if classes else []
    if unknown:
        raise ValueError(f"{name}: expected the labels {', '.join(classes)}, got {', '.join(unknown[:5])}")
    shown = [str(value) if classes else _number(name, float(value)) for value in values]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(shown))


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        raise FishError(f"{name}: a prediction is {value}; expected numbers from {LOWEST:g} to {HIGHEST:g}")
    return f"{min(max(value, LOWEST), HIGHEST):.3f}"


def submit(
    runs: Path,
    data: str | Path,
    output: Path,
    *,
    tasks: Sequence[str] = (),
    variant: str | None = None,
    base: str | None = None,
    fill: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Predict the test sets with the best run of each task and write the files of a submission.

    The best run has the highest validation score; what it reached on the test part is not looked at. MNLI's run also
    predicts the diagnostic set, when the data has it.

    Args:
        runs: The folder of a sweep, with one folder per task and in it one per run.
        data: The GLUE data with the test files (see :func:`fishmask.glue.read_glue`).
        output: The folder to write.
        tasks: Take part with these tasks; by default with all that have a run.
        variant: Take runs of this variant only.
        base: The base model, when it is not where the runs say.
        fill: Put sample predictions, which tell nothing, into the files that would be missing, in the size of the
            benchmark's own: it scores complete submissions only.
        device: Where to predict.
        progress: Called with the progress.

    Returns:
        ``file``, the zip file; ``rows`` by file; ``runs``, the folder and the validation score by task; ``missing``,
        the files that are not there; ``filled``, those with sample predictions; ``unlike_benchmark``, the benchmark's
        own number of rows for each file that has another: it would be refused there.

    Raises:
        ValueError: There is no such task.
        FishError: There is no run to predict with, a task that was asked for has none, a run is damaged or was trained
            on other classes, or a test file is missing or damaged.
    """
    names = [glue_task(name).name for name in tasks] or list(TASKS)
    chosen = {name: run for name in names if (run := best_run(runs / name, variant)) is not None}
    lacking = [name for name in names if name not in chosen] if tasks else []
    if lacking or not chosen:
        of = "" if variant is None else f" of variant {variant!r}"
        raise FishError(
            f"{runs}: there is no finished run{of} for {', '.join(lacking or names)}; expected the folder of a sweep, "
            "with <task>/<run>/metrics.json and the trained numbers beside it"
        )
    tests = {name: _read_tests(data, TASKS[name]) for name in chosen}  # faults of the data come before the work
    predictions: dict[str, Predictions] = {}
    for name, (folder, _) in chosen.items():
        predictions |= _predict_tests(TASKS[name], folder, tests[name], base, device, progress)
    missing = [name for name in FILES if name not in predictions]
    if fill:
        predictions |= {name: _sample(FILES[name]) for name in missing}
    file = write_submission({name: predictions[name] for name in FILES if name in predictions}, output)
    rows = {name: len(predictions[name]) for name in FILES if name in predictions}
    return {
        "file": str(file),
        "rows": rows,
        "runs": {name: {"folder": str(folder), "validation": score} for name, (folder, score) in chosen.items()},
        "missing": [] if fill else missing,
        "filled": missing if fill else [],
        "unlike_benchmark": {name: FILES[name].rows for name, count in rows.items() if count != FILES[name].rows},
    }


def best_run(folder: Path, variant: str | None = None) -> tuple[Path, float] | None:
    """Return the run of a task with the best validation score, and that score; None when there is none.

    Runs that diverged, searches on fewer rows, and those whose trained numbers were not kept, do not count. Of equal
    scores the first by name wins.

    Args:
        folder: The folder with the runs of the task.
        variant: Take runs of this variant only.

    Raises:
        FishError: A ``metrics.json`` is damaged.
    """
    found: list[tuple[Path, float]] = []
    for path in sorted(folder.glob("*/metrics.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            score = float(record["validation"]["score"]) if "validation" in record else math.nan
            wanted = (variant is None or record["variant"] == variant) and not is_search(record)
        except (ValueError, KeyError, TypeError) as error:
            raise FishError(f"{path} is damaged ({error!r}); run it again") from error
        kept = any((path.parent / name).exists() for name in (DELTA_FILE, MODEL_FILE, ADAPTER_FOLDER))
        if wanted and kept and math.isfinite(score):
            found.append((path.parent, score))
    return max(found, key=lambda run: run[1]) if found else None


def _read_tests(data: str | Path, task: GlueTask) -> dict[str, Examples]:
    """Read the test sets that a task's model predicts, by the names of their files."""
    tests = read_glue(data, task, "test")
    diagnostic = read_diagnostic(data) if task.name == "MNLI" else None
    if diagnostic is not None:
        tests[DIAGNOSTIC.name] = diagnostic
    return {name: tests[file.part] for name, file in FILES.items() if file.task == task.name and file.part in tests}


def _predict_tests(
    task: GlueTask,
    folder: Path,
    tests: Mapping[str, Examples],
    base: str | None,
    device: str,
    progress: Progress,
) -> dict[str, Predictions]:
    """Predict test sets by the names of their files."""
    run = read_run(folder)
    base = base or run["base"]
    progress(f"{task.name}: loading", 0, 1)
    model = load_run(folder, base).to(device)
    tokenizer = load_tokenizer(base)
    progress(f"{task.name}: loading", 1, 1)
    config = model.config
    regression = config.problem_type == "regression"
    classes = () if regression else tuple(config.id2label[i] for i in range(config.num_labels))
    if sorted(classes) != sorted(task.classes):
        raise FishError(
            f"{folder} predicts {', '.join(classes) or 'a number'}, and {task.name} needs "
            f"{', '.join(task.classes) or 'a number'}; was it trained on another task?"
        )
    predictions: dict[str, Predictions] = {}
    for name, examples in tests.items():
        encoded = encode(examples, tokenizer, run["recipe"]["max_length"])

        def report(phase: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {phase}", done, total)

        # As the run was evaluated; runs older than the setting have none.
        precision = run["recipe"].get("precision", "float32")
        outputs = predict(model, encoded, progress=report, precision=precision)
        if regression:
            predictions[name] = outputs.view(-1).tolist()
        else:
            predictions[name] = [classes[best] for best in outputs.argmax(dim=1).tolist()]
    return predictions


def _sample(file: SubmissionFile) -> Predictions:
    """Return predictions in turns, so that no metric meets a constant."""
    if file.classes:
        return [file.classes[row % len(file.classes)] for row in range(file.rows)]
    return [HIGHEST * row / (file.rows - 1) for row in range(file.rows)]
