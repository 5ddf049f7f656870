"""Tables of runs, as Markdown and HTML: scores, differences, settings, sweeps, costs and layers."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from fishmask.records import Record, Result, is_number, select_settings, tasks_of
from fishmask.rows import Row, Summary, differences, method_rows, named_results, summarize, sweep_rows, text_of

_NONE = "–"


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
        lines = [[*map(markdown, columns)], rule, *([*map(markdown, row)] for row in rows)]
        table = super().__new__(cls, "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else "")
        table.columns, table.rows, table.labels = columns, rows, labels
        return table

    def html(self) -> str:
        """Return the table as HTML, every cell escaped."""
        kinds = [' class="word"' if i < self.labels else "" for i in range(len(self.columns))]

        def line(cells: Sequence[str], scope: str, others: str) -> str:
            tags = [f'th scope="{scope}"', *[others] * (len(cells) - 1)]
            made = (f"<{t}{kind}>{_html(cell)}</{t[:2]}>" for t, kind, cell in zip(tags, kinds, cells, strict=True))
            return f"<tr>{''.join(made)}</tr>"

        head = line(self.columns, "col", 'th scope="col"')
        body = "\n".join(line(row, "row", "td") for row in self.rows)
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _html(text: str) -> str:
    return f"<strong>{html.escape(text)}</strong>" if isinstance(text, Strong) else html.escape(text)


def markdown(text: str) -> str:
    """Return text as Markdown that shows it on one line, in bold where it is :class:`Strong`."""
    escaped = re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))
    return f"**{escaped}**" if isinstance(text, Strong) else escaped


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


def _and_average(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Return the tasks that the mean of each column or line is over: each task alone, and all where there are more."""
    return {task: [task] for task in tasks} | ({"average": list(tasks)} if len(tasks) > 1 else {})


def _at(records: Iterable[Record], density: float | None) -> list[Result]:
    return [r for r in select_settings(records) if density is None or r.density in (None, density)]


def methods_table(records: Iterable[Record], density: float | None = None) -> Table:
    """Return the test scores of methods by task, in percent: mean ± standard deviation over seeds (count of seeds).

    The average is the mean over the tasks per seed, then over the seeds that all tasks have.

    Args:
        records: The records.
        density: Only methods of this density, a fraction, and those that have none; by default all.
    """
    results = _at(records, density)
    groups = _and_average(tasks_of(results))
    lines = [
        [row.label, _entries(row), *(_summary(row.scores(tasks)) for tasks in groups.values())]
        for row in method_rows(results)
        if row.tested
    ]
    return Table(["method", "entries", *groups], lines)


def _entries(row: Row) -> str:
    """Write the count of trained entries; it differs between tasks with the size of the head."""
    counts = sorted({r.records[0]["entries"] for r in row.results.values() if r.records[0].get("entries") is not None})
    return "–".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else _NONE


def differences_table(records: Iterable[Record], density: float | None = None) -> Table:
    """Return test score minus full fine-tuning in points, paired by seed; empty without full fine-tuning.

    Arguments and cells are as for :func:`methods_table`.
    """
    results = _at(records, density)
    groups = _and_average(tasks_of(r for r in results if r.method == "full"))

    def cell(row: Row, tasks: Iterable[str]) -> str:
        found = [row.results.get((task, None)) for task in tasks]
        return _summary(summarize([differences(r, results) if r else {} for r in found]), signed=True)

    lines = [
        [row.label, *(cell(row, tasks) for tasks in groups.values())]
        for row in method_rows(results)
        if groups and row.tested and row.first.method != "full"
    ]
    return Table(["method", *groups], lines)


def search_table(records: Iterable[Record]) -> Table:
    """Return the validation score, in percent, of every setting tried at the search seed; the chosen one is bold.

    Where settings were searched for on fewer rows, each size of training has lines of its own.
    """
    results = select_settings(records)
    rates = sorted({rate for result in results for rate, _ in result.settings})
    sized = any(result.searches for result in results)
    lines = []
    for name, result in named_results(results):
        own = result.fields.get("rows"), result.fields.get("epochs")
        for size, tried in (*result.searches.items(), (own, result.tried)):
            for batch in sorted({batch for _, batch in tried}):
                line = [name, result.task, *(map(text_of, size) if sized else ()), str(batch)]
                for rate in rates:
                    text = _percent(tried[rate, batch]) if (rate, batch) in tried else ""
                    line.append(Strong(text) if (rate, batch) == (result.learning_rate, result.batch_size) else text)
                lines.append(line)
    sizes = ["rows", "epochs"] if sized else []
    return Table(["method", "task", *sizes, "batch size", *(f"{rate:g}" for rate in rates)], lines, labels=2)


def sweep_table(records: Iterable[Record], field: str) -> Table:
    """Return the test score against a field of the recipe; empty where it takes one value only.

    Args:
        records: The records.
        field: "density", "examples", "labels", "score" or any other field of the recipe.
    """
    results = select_settings(records)
    rows, values, tasks = sweep_rows(results, field)
    lines = [
        [row.label, name, *(_summary(row.scores(among, value)) for value in values)]
        for row in rows
        for name, among in _and_average(tasks).items()
    ]
    headings = [text_of(value, field) for value in values]
    return Table(["method", "task", *headings], [line for line in lines if {*line[2:]} != {_NONE}], labels=2)


def costs_table(records: Iterable[Record]) -> Table:
    """Return size, times and peak memory of every method by task, means over the seeds of the chosen setting."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "entries": ("entries", "{:,.0f}".format),
        "file": ("file_bytes", _bytes),
        "seconds per step": ("seconds_per_step", "{:.3f}".format),
        "seconds of training": ("seconds_training", "{:,.0f}".format),
        "seconds of scoring": ("seconds_scoring", "{:,.1f}".format),
        "peak memory": ("peak_memory_bytes", _bytes),
    }

    def cell(result: Result, field: str, write: Callable[[float], str]) -> str:
        values = [record[field] for record in result.records if is_number(record.get(field))]
        return write(mean(values)) if values else _NONE

    lines = [
        [name, result.task, *(cell(result, *column) for column in columns.values())]
        for name, result in named_results(select_settings(records))
    ]
    return Table(["method", "task", *columns], lines, labels=2)


def _bytes(count: float) -> str:
    size, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= pair[0]), (1, "B"))
    return f"{count / size:.3g} {unit}"


def layers_table(records: Iterable[Record]) -> Table:
    """Return where the entries of each mask went: their share by layer in percent, means over seeds."""
    results = select_settings(records)
    groups = layer_groups(results)
    lines = [
        [name, result.task, *(_percent(shares.get(group, 0.0)) for group in groups)]
        for name, result in named_results(results)
        if (shares := layer_shares([result]))
    ]
    return Table(["method", "task", *groups], lines, labels=2)


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


def layer_shares(results: Iterable[Result]) -> dict[str, float]:
    """Return the share of entries by layer, the mean over all seeds of the results; empty without masks."""
    masks = [mask for mask in _masks(results) if sum(mask.values())]
    groups = dict.fromkeys(group for mask in masks for group in mask)
    return {group: mean(mask.get(group, 0) / sum(mask.values()) for mask in masks) for group in groups}


def _masks(results: Iterable[Result]) -> list[dict[str, int]]:
    return [layers_of((record.get("layers") or {}).items()) for result in results for record in result.records]


def layer_groups(results: Iterable[Result]) -> list[str]:
    """Return the groups of all masks in the order of a model, from the embeddings to the head."""
    ends = {"embeddings": 0, "pooler": 3, "head": 4}

    def place(name: str) -> tuple[int, int, str]:
        number = re.fullmatch(r"layer (\d+)", name)
        return (1, int(number[1]), name) if number else (ends.get(name, 2), 0, name)

    return sorted({group for mask in _masks(results) for group in mask}, key=place)
