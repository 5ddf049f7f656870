"""The report of many runs: tables, charts and what is missing, as Markdown and as one HTML page."""

import html
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fishmask import tables
from fishmask.charts import CAPTIONS, INK, need_matplotlib, write_charts
from fishmask.records import FREE_IN_SEARCH, Record, group_of, is_search, read_runs, select_settings, tasks_of
from fishmask.rows import differences, full_of, method_rows, named_results, text_of

# Fields that a fair comparison with full fine-tuning has in common.
_SHARED = ("epochs", "max_length", "weight_decay", "clip", "precision", "padding")
_SWEPT = {
    "density": "Density",
    "examples": "Examples scored (N)",
    "labels": "Labels of the scores",
    "score": "Squared against absolute gradients",
}
_READING = (
    "Mean ± standard deviation over seeds (count of seeds). The average is the mean over the tasks per seed, then over "
    "the seeds. Differences to full fine-tuning are paired by seed."
)


def report(paths: Iterable[str | Path], output: Path, title: str = "fishmask report") -> dict[str, Any]:
    """Write ``report.md``, ``report.html`` and the charts of many runs into a folder.

    The same records give the same bytes.

    Args:
        paths: Run folders (searched with all subfolders) and ``.jsonl`` files of records; see
            :func:`fishmask.records.read_runs`.
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
    need_matplotlib()
    found = read_runs(paths)
    if found.skipped:
        warnings.warn(f"skipped: {'; '.join(found.skipped)}", stacklevel=2)
    results = select_settings(found.records)
    output.mkdir(parents=True, exist_ok=True)
    charts = write_charts(results, found.curves, output)
    missing = _missing(gaps(found.records, found.skipped))
    blocks = [_heading(1, title), *missing, *_sections(found.records, charts, output)]
    page = _PAGE.substitute(title=html.escape(title), body="\n".join(block.html for block in blocks))
    (output / "report.md").write_text("\n\n".join(block.markdown for block in blocks) + "\n", encoding="utf-8")
    (output / "report.html").write_text(page, encoding="utf-8")
    return {
        "markdown": str(output / "report.md"),
        "html": str(output / "report.html"),
        "plots": [str(output / f"{name}.{suffix}") for name in charts for suffix in ("png", "svg")],
        "records": len(found.records),
        "results": len(results),
        "tasks": tasks_of(results),
        "skipped": found.skipped,
    }


class _Block(NamedTuple):
    """A heading, paragraph, list, table or chart in both languages."""

    markdown: str
    html: str


def _heading(level: int, text: str) -> _Block:
    return _Block(f"{'#' * level} {tables.markdown(text)}", f"<h{level}>{html.escape(text)}</h{level}>")


def _missing(lines: Sequence[str]) -> list[_Block]:
    if not lines:
        return []
    items = "\n".join(f"<li>{html.escape(line)}</li>" for line in lines)
    listed = _Block("\n".join(f"- {tables.markdown(line)}" for line in lines), f"<ul>\n{items}\n</ul>")
    return [_heading(2, "What is missing"), listed]


def _sections(records: Sequence[Record], charts: Sequence[str], folder: Path) -> Iterator[_Block]:
    """Arrange tables and charts; what is empty is left out."""
    results = select_settings(records)
    scores: dict[str, tables.Table] = {}
    densities: list[float | None] = [*sorted({r.density for r in results if r.density is not None})]
    for density in densities or [None]:
        at = "" if density is None else f", density {text_of(density, 'density')}"
        scores[f"Test score in percent{at}"] = tables.methods_table(records, density)
        scores[f"Test score minus full fine-tuning in points{at}"] = tables.differences_table(records, density)
    search = {"Validation score in percent by learning rate, the chosen one in bold": tables.search_table(records)}
    layers = {"By layer, in percent": tables.layers_table(records)}
    swept = {heading: tables.sweep_table(records, field) for field, heading in _SWEPT.items()}
    parts: list[tuple[str, str, dict[str, tables.Table], list[str]]] = [
        ("Methods", _READING, scores, []),
        ("Settings", "Chosen by the validation score at the lowest seed, never by test scores.", search, []),
        ("Sweeps", "Test score in percent, cells as above.", swept, ["density", "examples"]),
        ("Where the budget went", "Share of each mask's entries.", layers, ["layers"]),
        ("Costs", _machines(records), {"Means over the seeds": tables.costs_table(records)}, []),
        ("Learning curves", "Of the runs at the chosen settings.", {}, ["curves"]),
    ]
    for heading, text, made, names in parts:
        shown = [name for name in names if name in charts]
        if shown or any(made.values()):
            yield from (_heading(2, heading), _Block(tables.markdown(text), f"<p>{html.escape(text)}</p>"))
        for caption, table in made.items():
            if table:
                yield from (_heading(3, caption), _Block(table, f'<div class="scroll">\n{table.html()}\n</div>'))
        for name in shown:
            picture = _inline((folder / f"{name}.svg").read_text(encoding="utf-8"), CAPTIONS[name])
            figure = f"<figure>\n{picture}\n<figcaption>{CAPTIONS[name]}</figcaption>\n</figure>"
            yield _Block(f"![{CAPTIONS[name]}]({name}.png)", figure)


def _machines(records: Iterable[Record]) -> str:
    """Say where the runs were made."""
    parts = [(r["processor"], r.get("threads", "?"), r.get("torch", "?")) for r in records if "processor" in r]
    machines = "; ".join(sorted({f"{name}, {threads} thread(s), torch {torch}" for name, threads, torch in parts}))
    told = f"Measured on: {machines}. " if machines else ""
    return f"{told}Times compare only between runs on the same machine with the same load."


def gaps(records: Iterable[Record], skipped: Sequence[str] = ()) -> list[str]:
    """Say in plain sentences what the records do not show.

    Args:
        records: The records.
        skipped: Files that were left out, each with its reason.
    """
    records = list(records)
    results = select_settings(records)
    rows, tasks, named = method_rows(results), tasks_of(results), named_results(results)
    compared = [(name, r, full_of(r, results)) for name, r in named if r.scores and r.method != "full"]
    final = [record for record in records if not is_search(record)]
    decided = {group_of(result.records[0]) for result in results}
    followed = {group_of(record, FREE_IN_SEARCH) for record in final}

    def on(pairs: Iterable[tuple[str, str]]) -> list[str]:
        by_name: dict[str, dict[str, None]] = {}
        for name, detail in pairs:
            by_name.setdefault(name, {})[detail] = None
        return [f"{name} ({', '.join(details)})" for name, details in by_name.items()]

    lists = {
        "No validation score to choose a setting by, so left out": on(
            (r["variant"], r["task"]) for r in final if group_of(r) not in decided
        ),
        "Searched on fewer rows, but not yet run on all": on(
            (r["variant"], r["task"]) for r in records if is_search(r) and group_of(r, FREE_IN_SEARCH) not in followed
        ),
        "No test score (a task whose test part has no labels, or a run for the search only)": on(
            (name, r.task) for name, r in named if not r.scores
        ),
        "No average, because a task is missing": on(
            (row.label, task) for row in rows for task in tasks if row.tested and row.scores([task]) is None
        ),
        "One seed only, so no spread": on((name, r.task) for name, r in named if len(r.scores) == 1),
        "The best learning rate is the lowest or the highest tried, so a better one may lie beyond": on(
            (name, f"{r.task} {r.learning_rate:g}") for name, r in named if r.at_edge
        ),
        "One setting tried only, so taken as given and not chosen": on(
            (name, r.task) for name, r in named if len(r.settings) == 1
        ),
        "A setting without validation score at the search seed (diverged, or not run)": on(
            (name, r.task)
            for name, r in named
            for tried in (r.tried, *r.searches.values())
            if len(tried) > 1 and None in tried.values()
        ),
        "A seed of the chosen setting without test score (diverged), so left out of the mean": on(
            (name, f"{r.task} seed {seed}")
            for name, r in named
            for seed in (record["recipe"]["seed"] for record in r.records)
            if r.scores and seed not in r.scores
        ),
        "No full fine-tuning of the same base, rows and seed to compare with": on(
            (name, r.task) for name, r, _ in compared if not differences(r, results)
        ),
        "Compared with a full fine-tuning whose recipe differs": on(
            (name, f"{r.task}: {field.replace('_', ' ')}")
            for name, r, full in compared
            for field in _SHARED
            if full is not None and r.fields.get(field) != full.fields.get(field)
        ),
        "Not read": list(skipped),
    }
    return [f"{what}: {'; '.join(items)}." for what, items in lists.items() if items]


def _inline(svg: str, caption: str) -> str:
    """Make a matplotlib SVG part of a page: no prolog, no ids that would occur twice, colours of the page."""
    svg = svg[svg.index("<svg ") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace(INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e0; --soft: #a0a09a; --line: #3a3a38; --paper: #1a1a19; } }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.scroll, figure { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.word { text-align: left; }
figure svg { max-width: 100%; min-width: 32rem; height: auto; }
thead, figcaption { color: var(--soft); font-size: .875rem; }
</style>
</head>
<body>
$body
</body>
</html>
""")
