"""The report of many runs: settings chosen by validation, tables, plots and one HTML page.

Everything starts from *records*: one JSON object per run, as in the ``metrics.json`` of a run's folder or in a line of
``results.jsonl``. Records that differ only in learning rate, batch size and seed are one group, and each group yields
one :class:`Result`; a *row* of a table holds the results of one method on all tasks.
"""

import html
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from string import Template
from typing import Any, NamedTuple

from fishmask.delta import Delta
from fishmask.errors import FishError

Record = dict[str, Any]
Setting = tuple[float, int]

_TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")
_METHODS = (
    "full", "fish", "movement", "gradient", "snip", "magnitude", "random", "biases", "lora", "shira", "diff",
)  # fmt: skip
_SETTING = ("learning_rate", "batch_size", "seed")
_WITHOUT_DENSITY = ("full", "biases")  # the recipe has a density, but these methods ignore it
# Fields that a fair comparison with full fine-tuning has in common.
_SHARED = ("epochs", "max_length", "weight_decay", "clip", "precision", "padding")
_SWEPT = {
    "density": "Density",
    "examples": "Examples scored (N)",
    "labels": "Labels of the scores",
    "score": "Squared against absolute gradients",
}
_PLOTS = {
    "methods": "Test score of every method, mean and standard deviation over seeds",
    "density": "Test score against density, mean and standard deviation over seeds",
    "examples": "Test score against the number of examples scored, mean and standard deviation over seeds",
    "layers": "Share of each mask's entries by layer, mean over tasks and seeds",
    "curves": "Validation score and training loss against the step, one line per seed, at the chosen settings",
}
_NONE = "–"


# ---------------------------------------------------------------------------------------------------- reading records


class Found(NamedTuple):
    """What was read: records, the evaluations of those that have a log (by ``identity``), and what was skipped."""

    records: list[Record]
    curves: dict[Any, list[Record]]
    skipped: list[str]


def read_runs(paths: Iterable[str | Path]) -> Found:
    """Read the records of run folders and of ``.jsonl`` files.

    Args:
        paths: Folders, searched with all their subfolders for runs (``metrics.json`` beside ``log.jsonl``), and files
            with one record per line.

    Returns:
        The records in the order read, without duplicates: of two that agree in everything but what was measured, the
        later counts. Damaged files, damaged lines and unfinished runs are left out and named in ``skipped``, each with
        its reason.

    Raises:
        FishError: A path does not exist, or nothing could be read.
    """
    places = [Path(path) for path in paths]
    if absent := [str(place) for place in places if not place.exists()]:
        raise FishError(f"{', '.join(absent)}: no such file or folder; expected run folders or .jsonl files of records")
    found = Found([], {}, [])
    for path in places:
        if path.is_dir():
            for folder in sorted({file.parent for name in ("metrics.json", "log.jsonl") for file in path.rglob(name)}):
                _read_folder(folder, found)
        else:
            _read_lines(path, found)
    if not found.records:
        reasons = f"; skipped: {'; '.join(found.skipped)}" if found.skipped else ""
        looked = ", ".join(map(str, places)) or "no paths"
        raise FishError(f"no record of a run in {looked}; expected what `fishmask glue` wrote{reasons}")
    return found._replace(records=_unique(found.records))


def _read_folder(folder: Path, found: Found) -> None:
    metrics, log, delta = (folder / name for name in ("metrics.json", "log.jsonl", "delta.safetensors"))
    if not metrics.exists():
        found.skipped.append(f"{folder} (unfinished: no metrics.json)")
        return
    try:
        record = check_record(_parse(metrics.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        found.skipped.append(f"{metrics} ({error})")
        return
    try:
        if "layers" not in record and delta.exists():
            record["layers"] = {name: chosen for name, chosen, _ in Delta.load(delta).mask.groups()}
    except (OSError, FishError) as error:
        found.skipped.append(f"{delta} ({error})")
    found.records.append(record)
    try:
        points = [_parse(line) for _, line in _lines(log)]
        if not all(isinstance(point, dict) and _is_number(point.get("step")) for point in points):
            raise ValueError("a line without a step")
        found.curves[identity(record)] = points
    except (OSError, ValueError) as error:
        found.skipped.append(f"{log} ({error})")


def _read_lines(path: Path, found: Found) -> None:
    try:
        lines = _lines(path)
    except (OSError, ValueError) as error:
        found.skipped.append(f"{path} ({error})")
        return
    for number, line in lines:
        try:
            found.records.append(check_record(_parse(line)))
        except ValueError as error:
            found.skipped.append(f"{path} line {number} ({error})")


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers; not ``splitlines``, which parts JSON at U+2028 too."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def check_record(record: Any) -> Record:
    """Return the record of one run if it has what a report needs.

    Raises:
        ValueError: It lacks a part, or a part has the wrong type; the message names all of them.
    """
    if not isinstance(record, dict):
        raise ValueError("not a record: expected a JSON object")
    recipe = record.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    layers = record.get("layers") or {}
    parts = {
        "task": isinstance(record.get("task"), str),
        "variant": isinstance(record.get("variant"), str),
        "recipe.method": isinstance(recipe.get("method"), str),
        "recipe.learning_rate": _is_number(recipe.get("learning_rate")),
        "recipe.batch_size": isinstance(recipe.get("batch_size"), int),
        "recipe.seed": isinstance(recipe.get("seed"), int),
        "recipe.density": recipe.get("density") is None or _is_number(recipe["density"]),
        "validation": isinstance(record.get("validation"), dict | None),
        "test": isinstance(record.get("test"), dict | None),
        "layers": isinstance(layers, dict) and all(map(_is_number, layers.values())),
    }
    if wrong := [name for name, right in parts.items() if not right]:
        raise ValueError(f"not a record of a run: missing or wrong {', '.join(wrong)}")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def layers_of(groups: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add up entries by "embeddings", "layer 0", "layer 1", ..., "pooler" and "head".

    Args:
        groups: Name and count of each group, by any names that ``Mask.groups`` may give ("bert.encoder.layer.0").
            Names that are none of these are kept.
    """
    counts: dict[str, int] = {}
    for name, count in groups:
        counts[_layer(name)] = counts.get(_layer(name), 0) + count
    return counts


def _layer(name: str) -> str:
    if number := re.search(r"(?:^|[. ])(\d+)$", name):
        return f"layer {number[1]}"
    kinds = {"embeddings": r"embed|\bwte\b|\bwpe\b", "pooler": r"pooler", "head": r"classifier|head|^score$"}
    return next((kind for kind, words in kinds.items() if re.search(words, name)), name)


# -------------------------------------------------------------------------------------------------- the selection rule


@dataclass(frozen=True)
class Result:
    """What one group of runs comes to: the setting that validation chose, and its test scores.

    Attributes:
        task: The task.
        variant: The label of the method's configuration.
        fields: Everything else that the group has in common: the recipe but for learning rate, batch size and seed,
            with ``density`` None for methods that ignore it; ``base``, ``rows`` and ``held_out``. Lists are tuples.
        learning_rate: The chosen one.
        batch_size: The chosen one.
        search_seed: The lowest seed of the group with a validation score; the settings were compared at it.
        validation: Validation score of the chosen setting at the search seed, a fraction; None when there is none.
        tried: Validation score at the search seed for every setting (learning rate, batch size); None where missing.
        records: The records of the chosen setting, by seed.
    """

    task: str
    variant: str
    fields: Mapping[str, Any]
    learning_rate: float
    batch_size: int
    search_seed: int
    validation: float | None
    tried: Mapping[Setting, float | None]
    records: tuple[Record, ...]

    @property
    def method(self) -> str:
        """The recipe's method."""
        return str(self.fields["method"])

    @property
    def density(self) -> float | None:
        """Share of entries trained; None for methods that do not ask for it."""
        return self.fields.get("density")

    @property
    def scores(self) -> dict[int, float]:
        """Test score by seed, as fractions; seeds without one are left out."""
        scores = {record["recipe"]["seed"]: _score(record, "test") for record in self.records}
        return {seed: score for seed, score in scores.items() if score is not None}

    @property
    def entries(self) -> int | None:
        """How many numbers were trained."""
        return self.records[0].get("entries")

    @property
    def at_edge(self) -> bool:
        """Whether several learning rates were tried and the best is the lowest or the highest of them."""
        rates = sorted({rate for rate, _ in self.tried})  # one that diverged is a rate beyond, too
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])


def select_settings(records: Iterable[Record]) -> list[Result]:
    """Choose learning rate and batch size of every group by validation, never by test.

    A group is all records that agree in everything but learning rate, batch size and seed. In it the setting with the
    best validation score at the lowest seed (the search seed) is taken; of equal ones the one with more seeds, then the
    smaller batch, then the lower rate. Its test scores over all its seeds are the result.

    Returns:
        The results in a fixed order: by task, method, variant and density. A group without any validation score yields
        one only if it has a single setting.
    """
    results = [result for group in _groups(records) if (result := _select(group)) is not None]
    return sorted(results, key=_order)


def _groups(records: Iterable[Record]) -> list[list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in _unique(records):
        groups.setdefault(_group(record), []).append(record)
    return list(groups.values())


def _unique(records: Iterable[Record]) -> list[Record]:
    """Keep the later of records of the same run."""
    return list({identity(record): record for record in records}.values())


def identity(record: Record) -> Any:
    """Return what tells a run from every other: all of its configuration, nothing measured; hashable."""
    return _group(record), _setting(record), record["recipe"]["seed"]


def _group(record: Record) -> Any:
    return record["task"], record["variant"], tuple(sorted(_fields(record).items()))


def _fields(record: Record) -> dict[str, Any]:
    recipe = record["recipe"]
    fields = {name: _frozen(value) for name, value in recipe.items() if name not in _SETTING}
    if recipe["method"] in _WITHOUT_DENSITY:
        fields["density"] = None
    return fields | {name: _frozen(record.get(name)) for name in ("base", "rows", "held_out")}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _setting(record: Record) -> Setting:
    return record["recipe"]["learning_rate"], record["recipe"]["batch_size"]


def _score(record: Record, part: str) -> float | None:
    score = (record.get(part) or {}).get("score")
    # A diverged run may have written NaN.
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


def _select(group: list[Record]) -> Result | None:
    seeds = [r["recipe"]["seed"] for r in group if _score(r, "validation") is not None]
    search_seed = min(seeds or [r["recipe"]["seed"] for r in group])
    tried: dict[Setting, float | None] = dict.fromkeys(sorted(map(_setting, group)))
    tried |= {_setting(r): _score(r, "validation") for r in group if r["recipe"]["seed"] == search_seed}
    repeats = Counter(map(_setting, group))
    if not seeds and len(tried) > 1:
        return None
    # Where several are equally good, the one that was repeated is what the search took at its time.
    chosen = max(tried, key=lambda setting: (_least(tried[setting]), repeats[setting], -setting[1], -setting[0]))
    records = sorted((r for r in group if _setting(r) == chosen), key=lambda r: int(r["recipe"]["seed"]))
    first = records[0]
    return Result(
        first["task"], first["variant"], _fields(first), *chosen, search_seed, tried[chosen], tried, tuple(records)
    )  # fmt: skip


def _least(score: float | None) -> float:
    return -math.inf if score is None else score


def _order(result: Result) -> Any:
    place = _METHODS.index(result.method) if result.method in _METHODS else len(_METHODS)
    return (
        _task_order(result.task),
        place,
        result.variant,
        result.density or 0,
        [_sortable(value) for _, value in sorted(result.fields.items())],
    )


def _task_order(task: str) -> tuple[int, str]:
    return (_TASKS.index(task) if task in _TASKS else len(_TASKS), task)


def _sortable(value: Any) -> tuple[int, float, str]:
    """Return a key that puts numbers in their order and anything else after them."""
    return (0, value, "") if _is_number(value) else (1, 0, repr(value))


# --------------------------------------------------------------------------------------------------------------- rows


class Summary(NamedTuple):
    """The mean of several seeds, their sample standard deviation (None for one seed), and how many there are."""

    mean: float
    spread: float | None
    seeds: int


def summarize(values: Iterable[float]) -> Summary | None:
    """Return mean and spread of values; None when there are none."""
    values = list(values)
    return Summary(mean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None


@dataclass(frozen=True)
class Row:
    """The results of one method: of one variant at one density with the same other fields, on every task.

    Attributes:
        label: The variant, and the fields in which its rows differ.
        density: The density; None when the method has none, or where it is swept.
        results: By task and value of the swept field (None where nothing is swept).
    """

    label: str
    density: float | None
    results: dict[tuple[str, Any], Result]

    def scores(self, tasks: Sequence[str], value: Any = None) -> Summary | None:
        """Summarize test scores (fractions) over seeds: of one task, or of the mean over several.

        The mean over tasks is taken per seed, over the seeds that all tasks have; None when a task is missing.
        """
        found = [self.results[task, value].scores if (task, value) in self.results else {} for task in tasks]
        return summarize(_mean_by_seed(found))


def _mean_by_seed(found: Sequence[Mapping[int, float]]) -> list[float]:
    seeds = sorted(set.intersection(*map(set, found))) if found else []
    return [mean(scores[seed] for scores in found) for seed in seeds]


def method_rows(results: Sequence[Result], swept: str | None = None) -> list[Row]:
    """Put the results of each method on all tasks into one row.

    A field tells rows apart when it takes several values within one task: what differs only between tasks (say, the
    length of texts) does not hinder their mean. Base and density always tell rows apart.

    Args:
        results: What ``select_settings`` returned.
        swept: A field whose values share one row. Variants that differ in this field alone share it too.
    """
    of_variant = _varied(results, "variant", swept)
    of_method = _varied(results, "method", swept)
    several_bases = len({result.fields["base"] for result in results}) > 1
    rows: dict[Any, list[Result]] = {}
    for result in results:
        own = of_variant[result.variant] if swept is None else of_method[result.method]
        name = result.variant if swept is None else result.method
        always = (result.fields["base"], None if swept == "density" else result.density)
        rows.setdefault((name, always, tuple(result.fields.get(field) for field in own)), []).append(result)
    made = []
    for members in _split(rows.values(), swept):
        first = members[0]
        words = [" / ".join(dict.fromkeys(result.variant for result in members))]
        words += [str(first.fields["base"])] if several_bases else []
        words += [f"{field.replace('_', ' ')} {_text(first.fields.get(field))}" for field in of_variant[first.variant]]
        cells = {_cell(result, swept): result for result in members}
        made.append(Row(", ".join(words), None if swept == "density" else first.density, cells))
    # Results come sorted by task first; rows shall not depend on which task a method was run on.
    return sorted(made, key=lambda row: _order(_first(row))[1:])


def _cell(result: Result, swept: str | None) -> tuple[str, Any]:
    return result.task, None if swept is None else result.fields.get(swept)


def _split(rows: Iterable[list[Result]], swept: str | None) -> Iterator[list[Result]]:
    """Part variants that share a row although they were run with the same value of the swept field."""
    for members in rows:
        if len({_cell(result, swept) for result in members}) == len(members):
            yield members
        else:
            for variant in dict.fromkeys(result.variant for result in members):
                yield [result for result in members if result.variant == variant]


def _varied(results: Iterable[Result], name: str, swept: str | None) -> dict[str, list[str]]:
    """Return for each variant (or method) the fields, but for base and density, that vary within one task."""
    results = list(results)
    fields = sorted({field for result in results for field in result.fields} - {"base", "density", swept})
    values: dict[tuple[str, str, str], set[Any]] = {}
    for result in results:
        for field in fields:
            values.setdefault((getattr(result, name), field, result.task), set()).add(result.fields.get(field))
    varied = {(owner, field) for (owner, field, _), seen in values.items() if len(seen) > 1}
    return {getattr(r, name): [field for field in fields if (getattr(r, name), field) in varied] for r in results}


def full_of(result: Result, results: Iterable[Result]) -> Result | None:
    """Return the full fine-tuning to compare a result with: same task, base and rows.

    Where there are several, the one that agrees in the fields in which they differ; None without exactly one.
    """
    same = ("base", "rows", "held_out")
    full = [r for r in results if r.method == "full" and r.task == result.task]
    full = [r for r in full if all(r.fields[field] == result.fields[field] for field in same)]
    differing = {field for r in full for field in r.fields if any(r.fields[field] != o.fields.get(field) for o in full)}
    full = [r for r in full if all(r.fields[field] == result.fields.get(field) for field in differing)]
    return full[0] if len(full) == 1 else None


def differences(result: Result, results: Iterable[Result]) -> dict[int, float]:
    """Return test score minus that of full fine-tuning by seed, over the seeds that both have; fractions."""
    full = full_of(result, results)
    theirs = full.scores if full is not None else {}
    return {seed: score - theirs[seed] for seed, score in result.scores.items() if seed in theirs}


def tasks_of(results: Iterable[Result]) -> list[str]:
    """Return the tasks with any test score, in GLUE's order, others after them by name."""
    return sorted({result.task for result in results if result.scores}, key=_task_order)


def _densities(results: Iterable[Result]) -> list[float]:
    return sorted({result.density for result in results if result.density is not None})


# -------------------------------------------------------------------------------------------------------------- tables


class Strong(str):
    """A cell to print in bold."""


class Table(str):
    """A table as Markdown text, empty without rows, that knows its cells.

    Attributes:
        columns: The headings.
        rows: The cells as plain text.
        labels: How many columns, from the left, hold words; the others are aligned right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int

    def __new__(cls, columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> "Table":
        """Write the Markdown."""
        rule = [*["---"] * labels, *["---:"] * (len(columns) - labels)]
        lines = [[*map(_markdown, columns)], rule, *([*map(_markdown, row)] for row in rows)]
        table = super().__new__(cls, "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else "")
        table.columns, table.rows, table.labels = columns, rows, labels
        return table

    def html(self) -> str:
        """Return the table as HTML, every cell escaped."""
        classes = [' class="word"' if i < self.labels else "" for i in range(len(self.columns))]
        head = "".join(
            f'<th scope="col"{kind}>{html.escape(c)}</th>' for c, kind in zip(self.columns, classes, strict=True)
        )
        lines = []
        for row in self.rows:
            first, *others = (f"{kind}>{_html(cell)}" for kind, cell in zip(classes, row, strict=True))
            lines.append(f'<tr><th scope="row"{first}</th>{"".join(f"<td{cell}</td>" for cell in others)}</tr>')
        body = "\n".join(lines)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))
    return f"**{escaped}**" if isinstance(text, Strong) else escaped


def _html(text: str) -> str:
    return f"<strong>{html.escape(text)}</strong>" if isinstance(text, Strong) else html.escape(text)


def _text(value: Any) -> str:
    """Write a field's value as one would type it in a command."""
    if isinstance(value, tuple):
        return " ".join(map(_text, value)) or "none"
    return _NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _summary(summary: Summary | None, signed: bool = False) -> str:
    """Write a summary of fractions in percent: mean ± standard deviation (count of seeds)."""
    if summary is None:
        return _NONE
    rounded = round(100 * summary.mean, 1) + 0.0  # adding 0 turns -0.0 into 0.0
    figure = f"{rounded:{'+' if signed else ''}.1f}".replace("-", "−")
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.1f}"
    return f"{figure}{spread} ({summary.seeds})"


def _density(value: float) -> str:
    return f"{100 * value:g} %"


def _method_table(
    results: Sequence[Result],
    columns: Mapping[str, Callable[[Row], str]],
    skip: Callable[[Row], bool] = lambda _: False,
) -> Table:
    """Write one line per row, its density in a column of its own where there are several."""
    several = len(_densities(results)) > 1
    lines = [
        [row.label, *([_NONE if row.density is None else _density(row.density)] if several else [])]
        + [cell(row) for cell in columns.values()]
        for row in method_rows(results)
        if not skip(row)
    ]
    return Table(["method", *(["density"] if several else []), *columns], lines)


def _at(records: Iterable[Record], density: float | None) -> list[Result]:
    results = select_settings(records)
    return results if density is None else [r for r in results if r.density in (None, density)]


def methods_table(records: Iterable[Record], density: float | None = None) -> Table:
    """Return the test scores of methods by task, in percent: mean ± standard deviation over seeds (count of seeds).

    The average is the mean over the tasks per seed, then over the seeds that all tasks have.

    Args:
        records: The records.
        density: Only methods of this density, a fraction, and those that have none; by default all.
    """
    results = _at(records, density)

    def cell(among: Sequence[str], row: Row) -> str:
        return _summary(row.scores(among))

    columns = {name: partial(cell, among) for name, among in _and_average(tasks_of(results)).items()}
    return _method_table(results, {"entries": _entries, **columns}, skip=lambda row: not _tested(row))


def _and_average(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Return the tasks that the mean of each column or line is over: each task alone, and all where there are more."""
    return {task: [task] for task in tasks} | ({"average": list(tasks)} if len(tasks) > 1 else {})


def _tested(row: Row) -> bool:
    return any(result.scores for result in row.results.values())


def _entries(row: Row) -> str:
    """Write the count of trained entries; it differs between tasks with the size of the head."""
    counts = sorted({r.entries for r in row.results.values() if r.entries is not None})
    return "–".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else _NONE


def differences_table(records: Iterable[Record], density: float | None = None) -> Table:
    """Return test score minus full fine-tuning in points, paired by seed; empty without full fine-tuning.

    Arguments and cells are as for :func:`methods_table`.
    """
    results = _at(records, density)
    tasks = tasks_of(r for r in results if r.method == "full")

    def cell(among: Sequence[str], row: Row) -> str:
        pairs = [differences(row.results[t, None], results) if (t, None) in row.results else {} for t in among]
        return _summary(summarize(_mean_by_seed(pairs)), signed=True)

    columns = {name: partial(cell, among) for name, among in _and_average(tasks).items()}
    return _method_table(
        results, columns, skip=lambda row: not tasks or not _tested(row) or _first(row).method == "full"
    )


def _first(row: Row) -> Result:
    return next(iter(row.results.values()))


def settings_table(records: Iterable[Record]) -> Table:
    """Return the chosen learning rate and batch size ("0.003 × 32") of every method by task."""
    results = select_settings(records)
    tasks = sorted({result.task for result in results}, key=_task_order)

    def cell(task: str, row: Row) -> str:
        result = row.results.get((task, None))
        return f"{result.learning_rate:g} × {result.batch_size}" if result else _NONE

    return _method_table(results, {task: partial(cell, task) for task in tasks})


def search_table(records: Iterable[Record]) -> Table:
    """Return the validation score, in percent, of every setting tried at the search seed; the chosen one is bold."""
    results = select_settings(records)
    rates = sorted({rate for result in results for rate, _ in result.tried})

    def cell(result: Result, rate: float, batch: int) -> str:
        if (rate, batch) not in result.tried:
            return ""
        text = _percent(result.tried[rate, batch])
        return Strong(text) if (rate, batch) == (result.learning_rate, result.batch_size) else text

    lines = [
        [_name(row, results), result.task, str(batch), *(cell(result, rate, batch) for rate in rates)]
        for row in method_rows(results)
        for result in row.results.values()
        for batch in sorted({batch for _, batch in result.tried})
    ]
    return Table(["method", "task", "batch size", *(f"{rate:g}" for rate in rates)], lines, labels=2)


def _name(row: Row, results: Sequence[Result]) -> str:
    """Return the label of a row, with its density where the results have several."""
    shown = row.density is not None and len(_densities(results)) > 1
    return f"{row.label}, {_density(row.density)}" if shown and row.density is not None else row.label


class Swept(NamedTuple):
    """The rows of a sweep, the values of its field in order, and the tasks on which it was swept."""

    rows: list[Row]
    values: list[Any]
    tasks: list[str]


def sweep_rows(results: Sequence[Result], field: str) -> Swept:
    """Return the rows in which a field takes several values on one task; nothing where it never does.

    With the density, methods that were run at one density only are shown beside those that were swept.
    """
    tested = [
        (row, [key for key, result in row.results.items() if result.scores]) for row in method_rows(results, field)
    ]
    counts = [(row, Counter(task for task, _ in keys), keys) for row, keys in tested]
    tasks = {task for _, count, _ in counts for task, values in count.items() if values > 1}
    rows = [
        row
        for row, count, keys in counts
        if max(count.values(), default=0) > 1 or (field == "density" and any(value is not None for _, value in keys))
    ]
    values = {value for row in rows for task, value in row.results if task in tasks}
    if not tasks:
        return Swept([], [], [])
    return Swept(rows, sorted(values, key=_sortable), sorted(tasks, key=_task_order))


def sweep_table(records: Iterable[Record], field: str) -> Table:
    """Return the test score against a field of the recipe; empty where it takes one value only.

    Args:
        records: The records.
        field: "density", "examples", "labels", "score" or any other field of the recipe.
    """
    results = select_settings(records)
    rows, values, tasks = sweep_rows(results, field)
    lines = [
        [_name(row, results), name, *(_summary(row.scores(among, value)) for value in values)]
        for row in rows
        for name, among in _and_average(tasks).items()
    ]
    lines = [line for line in lines if set(line[2:]) != {_NONE}]
    headings = [_density(value) if field == "density" and value is not None else _text(value) for value in values]
    return Table(["method", "task", *headings], lines, labels=2)


def costs_table(records: Iterable[Record]) -> Table:
    """Return size, times and peak memory of every method by task, means over the seeds of the chosen setting."""
    results = select_settings(records)
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "entries": ("entries", lambda v: f"{v:,.0f}"),
        "file": ("file_bytes", _bytes),
        "seconds per step": ("seconds_per_step", lambda v: f"{v:.3f}"),
        "seconds of training": ("seconds_training", lambda v: f"{v:,.0f}"),
        "seconds of scoring": ("seconds_scoring", lambda v: f"{v:,.1f}"),
        "peak memory": ("peak_memory_bytes", _bytes),
    }

    def cell(result: Result, name: str, write: Callable[[float], str]) -> str:
        values = [record[name] for record in result.records if _is_number(record.get(name))]
        return write(mean(values)) if values else _NONE

    lines = [
        [_name(row, results), result.task, *(cell(result, *column) for column in columns.values())]
        for row in method_rows(results)
        for result in row.results.values()
    ]
    return Table(["method", "task", *columns], lines, labels=2)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def layers_table(records: Iterable[Record]) -> Table:
    """Return where the entries of each mask went: their share by layer in percent, means over seeds."""
    results = select_settings(records)
    groups = _layer_groups(results)
    lines = [
        [_name(row, results), result.task, *(_percent(shares.get(group, 0.0)) for group in groups)]
        for row in method_rows(results)
        for result in row.results.values()
        if (shares := layer_shares([result]))
    ]
    return Table(["method", "task", *groups], lines, labels=2)


def layer_shares(results: Iterable[Result]) -> dict[str, float]:
    """Return the share of entries by layer, the mean over all seeds of the results; empty without masks."""
    masks = [mask for mask in _masks(results) if sum(mask.values())]
    groups = dict.fromkeys(group for mask in masks for group in mask)
    return {group: mean(mask.get(group, 0) / sum(mask.values()) for mask in masks) for group in groups}


def _masks(results: Iterable[Result]) -> list[dict[str, int]]:
    return [layers_of((record.get("layers") or {}).items()) for result in results for record in result.records]


def _layer_groups(results: Iterable[Result]) -> list[str]:
    """Return the groups of all masks in the order of a model, from the embeddings to the head."""
    ends = {"embeddings": (0, 0), "pooler": (3, 0), "head": (4, 0)}

    def place(name: str) -> tuple[tuple[int, int], str]:
        number = re.fullmatch(r"layer (\d+)", name)
        return (1, int(number[1])) if number else ends.get(name, (2, 0)), name

    return sorted({group for mask in _masks(results) for group in mask}, key=place)


# ------------------------------------------------------------------------------------------------------ what is missing


def gaps(records: Iterable[Record], skipped: Sequence[str] = ()) -> list[str]:
    """Say in plain sentences what the records do not show.

    Args:
        records: The records.
        skipped: Files that were left out, each with its reason.
    """
    records = list(records)
    results = select_settings(records)
    rows, tasks = method_rows(results), tasks_of(results)
    named = [(_name(row, results), result) for row in rows for result in row.results.values()]
    tested = [(name, r) for name, r in named if r.scores]
    compared = [(name, r, full_of(r, results)) for name, r in tested if r.method != "full"]

    def on(pairs: Iterable[tuple[str, str]]) -> list[str]:
        by_name: dict[str, list[str]] = {}
        for name, detail in pairs:
            by_name.setdefault(name, []).append(detail)
        return [f"{name} ({', '.join(details)})" for name, details in by_name.items()]

    undecided = [group[0] for group in _groups(records) if _select(group) is None]
    lists = {
        "No validation score to choose a setting by, so left out": on((r["variant"], r["task"]) for r in undecided),
        "No test score at all (a task whose test part has no labels, or runs for the search only)": sorted(
            {result.task for _, result in named} - set(tasks), key=_task_order
        ),
        "No test score": on((name, r.task) for name, r in named if not r.scores and r.task in tasks),
        "One seed only, so no spread": on((name, r.task) for name, r in tested if len(r.scores) == 1),
        "The best learning rate is the lowest or the highest tried, so a better one may lie beyond": on(
            (name, f"{r.task} {r.learning_rate:g}") for name, r in named if r.at_edge
        ),
        "One setting tried only, so taken as given and not chosen": on(
            (name, r.task) for name, r in named if len(r.tried) == 1
        ),
        "A setting without validation score at the search seed (diverged, or not run)": on(
            (name, r.task) for name, r in named if r.validation is not None and None in r.tried.values()
        ),
        "No average, because a task is missing": on(
            (_name(row, results), task) for row in rows for task in tasks if row.scores([task]) is None and _tested(row)
        ),
        "Averages over fewer seeds than some task has": on(
            (_name(row, results), f"{common.seeds}")
            for row in rows
            if (common := row.scores(tasks)) and common.seeds < max(len(r.scores) for r in row.results.values())
        ),
        "No full fine-tuning of the same base, rows and seed to compare with": on(
            (name, r.task) for name, r, _ in compared if not differences(r, results)
        ),
        "Compared with a full fine-tuning whose recipe differs": on(
            (name, f"{r.task}: {field.replace('_', ' ')}")
            for name, r, full in compared
            if full is not None
            for field in _SHARED
            if r.fields.get(field) != full.fields.get(field)
        ),
        "Not read": list(skipped),
    }
    return [f"{what}: {'; '.join(items)}." for what, items in lists.items() if items]


# --------------------------------------------------------------------------------------------------------------- plots

_INK = "#333333"  # text and axes; the HTML page replaces it by the colour of its text
_COLOURS = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd",
    "#2f7f6f", "#a03d7a", "#7a9a2e", "#b08040",
)  # fmt: skip
_MARKERS = "osD^vP*X<>"
_STYLE = {
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def write_plots(results: Sequence[Result], curves: Mapping[Any, Sequence[Record]], folder: Path) -> list[str]:
    """Write the plots that the results allow, each as PNG and SVG; the same results give the same bytes.

    Args:
        results: What ``select_settings`` returned.
        curves: The evaluations of runs by ``identity``; of the runs at the chosen settings, these are drawn.
        folder: An existing folder; plots of an earlier report in it are replaced or removed.

    Returns:
        The names, without suffix, of the plots written.

    Raises:
        FishError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    figures = {
        "methods": lambda: _draw_methods(results),
        "density": lambda: _draw_sweep(results, "density"),
        "examples": lambda: _draw_sweep(results, "examples"),
        "layers": lambda: _draw_layers(results),
        "curves": lambda: _draw_curves(results, curves),
    }
    written = []
    for name, draw in figures.items():
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = draw()
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
                path = (folder / name).with_suffix(suffix)
                path.unlink(missing_ok=True)
                if figure is not None:
                    figure.savefig(path, dpi=150, metadata=metadata)
        written += [name] if figure is not None else []
    return written


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise FishError("a report draws plots and needs matplotlib: pip install 'fishmask[plot]'") from error
    return matplotlib


def _panels(count: int, across: int, width: float, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` axes of the given size in inches, so many across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(5.0, across * width), down * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False, **shared).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _looks(rows: Sequence[Row], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a colour for each variant, the same in all plots, and a marker for each of its rows."""
    variants = list(dict.fromkeys(_first(row).variant for row in method_rows(results)))
    looks = []
    met: Counter[str] = Counter()
    for row in rows:
        variant = _first(row).variant
        round_of_colours, colour = divmod(variants.index(variant), len(_COLOURS))
        marker = _MARKERS[(3 * round_of_colours + met[variant]) % len(_MARKERS)]
        looks.append({"color": _COLOURS[colour], "marker": marker})
        met[variant] += 1
    return looks


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=9)


def _draw_methods(results: Sequence[Result]) -> Any:
    """Draw one panel per task with a dot per method; None without test scores."""
    tasks = tasks_of(results)
    rows = [row for row in method_rows(results) if _tested(row)]
    if not rows:
        return None
    figure, panels = _panels(len(tasks), 3, 3.2, 1.2 + 0.28 * len(rows), sharey=True)
    looks = _looks(rows, results)
    for axes, task in zip(panels, tasks, strict=True):
        for i, row in enumerate(rows):
            if (found := row.scores([task])) is None:
                continue
            axes.errorbar(100 * found.mean, i, xerr=100 * (found.spread or 0), capsize=3, **looks[i])
            if _first(row).method == "full":
                axes.axvline(100 * found.mean, color="#999999", linestyle=":", linewidth=1, zorder=0)
        axes.set_title(task, fontsize=11)
        axes.set_xlabel("test score, %")
        axes.grid(axis="y", color="#999999", alpha=0.25)
        axes.set_yticks(range(len(rows)), [_name(row, results) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _draw_sweep(results: Sequence[Result], field: str) -> Any:
    """Draw one panel per task: score against a number of the recipe; None where it is not swept."""
    from matplotlib.lines import Line2D

    rows, values, tasks = sweep_rows(results, field)
    if not rows:
        return None
    fixed = [row for row in method_rows(results) if field == "density" and row.density is None]
    looks = _looks([*rows, *fixed], results)
    values = [value for value in values if value is not None]
    # Rows stand a little apart, so that their error bars do not hide each other.
    shifts = [1.25 ** ((i + 0.5) / len(rows) - 0.5) for i in range(len(rows))]
    figure, panels = _panels(len(tasks), 3, 3.6, 3.2 + 0.08 * len(rows))
    handles = {_name(row, results): Line2D([], [], **look) for row, look in zip(rows, looks, strict=False)}
    for axes, task in zip(panels, tasks, strict=True):
        for row, look, shift in zip(rows, looks, shifts, strict=False):
            found = {value: summary for value in values if (summary := row.scores([task], value))}
            means = [100 * summary.mean for summary in found.values()]
            spreads = [100 * (summary.spread or 0) for summary in found.values()]
            axes.errorbar([shift * v for v in found], means, yerr=spreads, capsize=3, markersize=5, **look)
        for i, row in enumerate(fixed):
            if (level := row.scores([task])) is not None:
                look = {"color": looks[len(rows) + i]["color"], "linestyle": ("--", ":", "-.")[i % 3]}
                handles[row.label] = axes.axhline(100 * level.mean, **look)
        axes.set_xscale("log")
        axes.set_xticks(values, [_density(v) if field == "density" else _text(v) for v in values])
        axes.minorticks_off()
        axes.set_title(task, fontsize=11)
        axes.set_xlabel("entries trained" if field == "density" else "examples scored")
        axes.set_ylabel("test score, %")
        axes.grid(color="#999999", alpha=0.25)
    _legend(figure, handles)
    return figure


def _draw_layers(results: Sequence[Result]) -> Any:
    """Draw one bar per method, stacked by layer; None without masks."""
    from matplotlib import colormaps

    groups = _layer_groups(results)
    bars = {_name(row, results): layer_shares(row.results.values()) for row in method_rows(results)}
    bars = {name: shares for name, shares in bars.items() if shares}
    if not bars:
        return None
    figure, (axes,) = _panels(1, 1, 9.0, 1.6 + 0.36 * len(bars))
    outside = {"embeddings": "#b07aa1", "pooler": "#999999", "head": "#cccccc"}
    inside = [group for group in groups if group not in outside]
    scale = colormaps["viridis"]
    colours = {group: scale(i / max(len(inside) - 1, 1)) for i, group in enumerate(inside)} | outside
    left = [0.0] * len(bars)
    handles = {}
    for group in groups:
        widths = [100 * shares.get(group, 0.0) for shares in bars.values()]
        handles[group] = axes.barh(range(len(bars)), widths, left=left, color=colours[group], height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the mask, %")
    figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=9)
    return figure


def _draw_curves(results: Sequence[Result], curves: Mapping[Any, Sequence[Record]]) -> Any:
    """Draw validation score and training loss of each task against the step; None without logs."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    rows = method_rows(results)
    logs = {
        (i, result.task, record["recipe"]["seed"]): curves[identity(record)]
        for i, row in enumerate(rows)
        for result in row.results.values()
        for record in result.records
        if curves.get(identity(record))
    }
    if not logs:
        return None
    tasks = sorted({task for _, task, _ in logs}, key=_task_order)
    figure, panels = _panels(2 * len(tasks), 2, 5.0, 2.8)
    scores = {task: _score_of_log(points) for (_, task, _), points in logs.items()}
    looks = _looks(rows, results)
    handles: dict[str, Any] = {}
    for (i, task, _), points in logs.items():
        # A log has too many points for markers of their own: the rows of a variant differ in their lines.
        look = {"color": looks[i]["color"], "linestyle": ("-", "--", ":", "-.")[_MARKERS.index(looks[i]["marker"]) % 4]}
        for column, (name, factor) in enumerate(((scores[task], 100), ("train_loss", 1))):
            shown = [(point["step"], factor * point[name]) for point in points if _is_number(point.get(name))]
            axes = panels[2 * tasks.index(task) + column]
            axes.plot(*zip(*shown, strict=True), **look, linewidth=1, marker=".", markersize=4)
        handles[_name(rows[i], results)] = Line2D([], [], **look)
    for i, axes in enumerate(panels):
        axes.set_title(tasks[i // 2], fontsize=11)
        axes.set_ylabel("training loss" if i % 2 else f"validation {scores[tasks[i // 2]]}, %")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(color="#999999", alpha=0.25)
    _legend(figure, handles)
    return figure


def _score_of_log(points: Sequence[Record]) -> str:
    """Return the name of the score in a log: "score", or in its absence the metric that says most by itself."""
    names = ("score", "accuracy", "pearson", "mcc")
    return next((name for name in names if any(name in point for point in points)), "score")


# -------------------------------------------------------------------------------------------------------- the documents


class Section(NamedTuple):
    """A part of the report: a heading, a paragraph, tables with their captions, and the names of plots."""

    heading: str
    text: str
    tables: Sequence[tuple[str, Table]]
    plots: Sequence[str]


def sections(records: Sequence[Record], plots: Sequence[str]) -> list[Section]:
    """Arrange tables and plots; sections without content are left out."""
    densities: list[float | None] = [*_densities(select_settings(records))] or [None]
    at = {density: "" if density is None else f", density {_density(density)}" for density in densities}
    scores = [(f"Test score in percent{at[d]}", methods_table(records, d)) for d in densities]
    against = [
        (f"Test score minus full fine-tuning in points{at[d]}", differences_table(records, d)) for d in densities
    ]
    swept = [(heading, sweep_table(records, field)) for field, heading in _SWEPT.items()]
    made = [
        Section(
            "Methods",
            "Mean ± standard deviation over seeds (count of seeds). The average is the mean over the tasks per seed, "
            "then over the seeds. Learning rate and batch size were chosen on validation scores alone. Differences to "
            "full fine-tuning are paired by seed.",
            [pair for pairs in zip(scores, against, strict=True) for pair in pairs],
            ["methods"],
        ),
        Section(
            "Settings",
            "Chosen by the validation score at the lowest seed; test scores play no part.",
            [
                ("Learning rate × batch size", settings_table(records)),
                ("Validation score in percent of every setting tried, the chosen one in bold", search_table(records)),
            ],
            [],
        ),
        Section("Sweeps", "Test score in percent, cells as above.", swept, ["density", "examples"]),
        Section(
            "Where the budget went",
            "Share of the mask's entries, %.",
            [("By layer", layers_table(records))],
            ["layers"],
        ),
        Section("Costs", _machines(records), [("Means over the seeds", costs_table(records))], []),
        Section("Learning curves", f"{_PLOTS['curves']}.", [], ["curves"]),
    ]
    kept = [
        s._replace(tables=[(c, t) for c, t in s.tables if t], plots=[p for p in s.plots if p in plots]) for s in made
    ]
    return [section for section in kept if section.tables or section.plots]


def _machines(records: Iterable[Record]) -> str:
    """Say where the runs were made."""
    machines = {
        f"{r['processor']}, {r.get('threads', '?')} thread(s), torch {r.get('torch', '?')}"
        for r in records
        if "processor" in r
    }
    told = f"Measured on: {'; '.join(sorted(machines))}. " if machines else ""
    return f"{told}Times compare only between runs on the same machine with the same load."


def markdown_report(title: str, missing: Sequence[str], parts: Iterable[Section]) -> str:
    """Return the report as Markdown; it shows the plots' PNG files beside it."""
    blocks = [f"# {_markdown(title)}"]
    if missing:
        blocks += ["## What is missing", "\n".join(f"- {_markdown(line)}" for line in missing)]
    for part in parts:
        blocks += [f"## {part.heading}", _markdown(part.text)]
        for caption, table in part.tables:
            blocks += [f"### {caption}", str(table)]
        blocks += [f"![{_PLOTS[name]}]({name}.png)" for name in part.plots]
    return "\n\n".join(blocks) + "\n"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; --tint: #f6f6f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --soft: #a0a09a; --line: #3a3a38; --paper: #1a1a19; --tint: #242423; }
}
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
nav a { color: inherit; margin-right: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--soft); }
.word { text-align: left; }
tbody tr:hover { background: var(--tint); }
figure { margin: 1.2rem 0; overflow-x: auto; }
figure svg { max-width: 100%; min-width: 32rem; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def html_report(title: str, missing: Sequence[str], parts: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """Return the report as one page that needs no other file.

    Args:
        title: The heading.
        missing: Sentences about what is missing.
        parts: The sections.
        pictures: The text of each plot's SVG file by name.
    """
    ids = {part.heading: part.heading.lower().replace(" ", "-") for part in parts}
    links = "\n".join(f'<a href="#{ids[part.heading]}">{html.escape(part.heading)}</a>' for part in parts)
    body = [f"<nav>\n{links}\n</nav>"]
    if missing:
        items = "\n".join(f"<li>{html.escape(line)}</li>" for line in missing)
        body.append(f"<h2>What is missing</h2>\n<ul>\n{items}\n</ul>")
    for part in parts:
        body.append(f'<h2 id="{ids[part.heading]}">{html.escape(part.heading)}</h2>\n<p>{html.escape(part.text)}</p>')
        for caption, table in part.tables:
            body.append(f'<h3>{html.escape(caption)}</h3>\n<div class="scroll">\n{table.html()}\n</div>')
        for name in part.plots:
            caption = html.escape(_PLOTS[name])
            body.append(f"<figure>\n{_inline(pictures[name], caption)}\n<figcaption>{caption}</figcaption>\n</figure>")
    return _PAGE.substitute(title=html.escape(title), body="\n".join(body))


def _inline(svg: str, caption: str) -> str:
    """Make a matplotlib SVG part of a page: no prolog, no ids that would occur twice, colours of the page."""
    svg = svg[svg.index("<svg ") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace(_INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)


def report(paths: Iterable[str | Path], output: Path, title: str = "fishmask report") -> dict[str, Any]:
    """Write ``report.md``, ``report.html`` and the plots of many runs into a folder.

    The same records give the same bytes.

    Args:
        paths: Run folders (searched with all subfolders) and ``.jsonl`` files of records; see :func:`read_runs`.
        output: The folder to write; made when missing, its earlier report is replaced.
        title: The heading.

    Returns:
        The files written, the counts of records and results, the tasks, and what was skipped.

    Raises:
        FishError: A path does not exist, there is no record, or matplotlib is not installed.
        ValueError: ``output`` is a file.

    Warns:
        UserWarning: Files were skipped; one warning names them all.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a folder to write the report into")
    _matplotlib()
    found = read_runs(paths)
    if found.skipped:
        warnings.warn(f"skipped: {'; '.join(found.skipped)}", stacklevel=2)
    results = select_settings(found.records)
    output.mkdir(parents=True, exist_ok=True)
    plots = write_plots(results, found.curves, output)
    parts = sections(found.records, plots)
    missing = gaps(found.records, found.skipped)
    pictures = {name: (output / f"{name}.svg").read_text(encoding="utf-8") for name in plots}
    (output / "report.md").write_text(markdown_report(title, missing, parts), encoding="utf-8")
    (output / "report.html").write_text(html_report(title, missing, parts, pictures), encoding="utf-8")
    return {
        "markdown": str(output / "report.md"),
        "html": str(output / "report.html"),
        "plots": [str(output / f"{name}.{suffix}") for name in plots for suffix in ("png", "svg")],
        "records": len(found.records),
        "results": len(results),
        "tasks": tasks_of(results),
        "skipped": found.skipped,
    }
