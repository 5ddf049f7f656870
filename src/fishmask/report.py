"""The report of many runs: tables, charts and what is missing, as Markdown and as one HTML page."""

import html
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fishmask.charts import CAPTIONS, INK, need_matplotlib, write_charts
from fishmask.records import (
    Record,
    densities_of,
    group_of,
    is_search,
    read_runs,
    searched_of,
    select_settings,
    task_order,
    tasks_of,
)
from fishmask.rows import differences, full_of, method_rows, named_results, text_of
from fishmask.tables import (
    Table,
    costs_table,
    differences_table,
    layers_table,
    markdown,
    methods_table,
    search_table,
    sweep_table,
)

# Fields that a fair comparison with full fine-tuning has in common.
_SHARED = ("epochs", "max_length", "weight_decay", "clip", "precision", "padding")
_SWEPT = {
    "density": "Density",
    "examples": "Examples scored (N)",
    "labels": "Labels of the scores",
    "score": "Squared against absolute gradients",
}


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
    pictures = {name: (output / f"{name}.svg").read_text(encoding="utf-8") for name in charts}
    parts = sections(found.records, charts)
    missing = gaps(found.records, found.skipped)
    (output / "report.md").write_text(markdown_page(title, missing, parts), encoding="utf-8")
    (output / "report.html").write_text(html_page(title, missing, parts, pictures), encoding="utf-8")
    return {
        "markdown": str(output / "report.md"),
        "html": str(output / "report.html"),
        "plots": [str(output / f"{name}.{suffix}") for name in charts for suffix in ("png", "svg")],
        "records": len(found.records),
        "results": len(results),
        "tasks": tasks_of(results),
        "skipped": found.skipped,
    }


class Section(NamedTuple):
    """A part of the report: a heading, a paragraph, tables by their captions, and the names of charts."""

    heading: str
    text: str
    tables: Mapping[str, Table]
    charts: Sequence[str]


def sections(records: Sequence[Record], charts: Sequence[str]) -> list[Section]:
    """Arrange tables and charts; what is empty is left out."""
    scores: dict[str, Table] = {}
    densities: list[float | None] = [*densities_of(select_settings(records))]
    for density in densities or [None]:
        at = "" if density is None else f", density {text_of(density, 'density')}"
        scores[f"Test score in percent{at}"] = methods_table(records, density)
        scores[f"Test score minus full fine-tuning in points{at}"] = differences_table(records, density)
    made = [
        Section(
            "Methods",
            "Mean ± standard deviation over seeds (count of seeds). The average is the mean over the tasks per seed, "
            "then over the seeds. Learning rate and batch size were chosen on validation scores alone. Differences to "
            "full fine-tuning are paired by seed.",
            scores,
            [],
        ),
        Section(
            "Settings",
            "Chosen by the validation score at the lowest seed; test scores play no part.",
            {"Validation score in percent by learning rate, the chosen one in bold": search_table(records)},
            [],
        ),
        Section(
            "Sweeps",
            "Test score in percent, cells as above.",
            {heading: sweep_table(records, field) for field, heading in _SWEPT.items()},
            ["density", "examples"],
        ),
        Section(
            "Where the budget went",
            "Share of the mask's entries by layer in percent.",
            {"By layer": layers_table(records)},
            ["layers"],
        ),
        Section("Costs", _machines(records), {"Means over the seeds": costs_table(records)}, []),
        Section("Learning curves", f"{CAPTIONS['curves']}.", {}, ["curves"]),
    ]
    kept = [
        part._replace(
            tables={caption: table for caption, table in part.tables.items() if table},
            charts=[name for name in part.charts if name in charts],
        )
        for part in made
    ]
    return [part for part in kept if part.tables or part.charts]


def _machines(records: Iterable[Record]) -> str:
    """Say where the runs were made."""
    machines = {
        f"{r['processor']}, {r.get('threads', '?')} thread(s), torch {r.get('torch', '?')}"
        for r in records
        if "processor" in r
    }
    told = f"Measured on: {'; '.join(sorted(machines))}. " if machines else ""
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
    tested = [(name, r) for name, r in named if r.scores]
    compared = [(name, r, full_of(r, results)) for name, r in tested if r.method != "full"]
    final = [record for record in records if not is_search(record)]
    chosen, searched = {group_of(r.records[0]) for r in results}, {searched_of(record) for record in final}

    def on(pairs: Iterable[tuple[str, str]]) -> list[str]:
        by_name: dict[str, dict[str, None]] = {}
        for name, detail in pairs:
            by_name.setdefault(name, {})[detail] = None
        return [f"{name} ({', '.join(details)})" for name, details in by_name.items()]

    lists = {
        "No validation score to choose a setting by, so left out": on(
            (record["variant"], record["task"]) for record in final if group_of(record) not in chosen
        ),
        "Searched on fewer rows, but not yet run on all": on(
            (r["variant"], r["task"]) for r in records if is_search(r) and searched_of(r) not in searched
        ),
        "No test score at all (a task whose test part has no labels, or runs for the search only)": sorted(
            {result.task for _, result in named} - set(tasks), key=task_order
        ),
        "No test score": on((name, r.task) for name, r in named if not r.scores and r.task in tasks),
        "One seed only, so no spread": on((name, r.task) for name, r in tested if len(r.scores) == 1),
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
        "No average, because a task is missing": on(
            (row.label, task) for row in rows for task in tasks if row.tested and row.scores([task]) is None
        ),
        "Averages over fewer seeds than some task has": on(
            (row.label, f"{common.seeds}")
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


def markdown_page(title: str, missing: Sequence[str], parts: Iterable[Section]) -> str:
    """Return the report as Markdown; it shows the charts' PNG files beside it."""
    blocks = [f"# {markdown(title)}"]
    if missing:
        blocks += ["## What is missing", "\n".join(f"- {markdown(line)}" for line in missing)]
    for part in parts:
        blocks += [f"## {part.heading}", markdown(part.text)]
        for caption, table in part.tables.items():
            blocks += [f"### {caption}", str(table)]
        blocks += [f"![{CAPTIONS[name]}]({name}.png)" for name in part.charts]
    return "\n\n".join(blocks) + "\n"


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
nav a { color: inherit; margin-right: 1rem; }
.scroll, figure { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.word { text-align: left; }
figure svg { max-width: 100%; min-width: 32rem; height: auto; }
thead, figcaption { color: var(--soft); font-size: .875rem; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def html_page(title: str, missing: Sequence[str], parts: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """Return the report as one page that needs no other file.

    Args:
        title: The heading.
        missing: Sentences about what is missing.
        parts: The sections.
        pictures: The text of each chart's SVG file by name.
    """
    links = "\n".join(f'<a href="#part-{i}">{part.heading}</a>' for i, part in enumerate(parts))
    body = [f"<nav>\n{links}\n</nav>"]
    if missing:
        items = "\n".join(f"<li>{html.escape(line)}</li>" for line in missing)
        body.append(f"<h2>What is missing</h2>\n<ul>\n{items}\n</ul>")
    for i, part in enumerate(parts):
        body.append(f'<h2 id="part-{i}">{part.heading}</h2>\n<p>{html.escape(part.text)}</p>')
        for caption, table in part.tables.items():
            body.append(f'<h3>{html.escape(caption)}</h3>\n<div class="scroll">\n{table.html()}\n</div>')
        for name in part.charts:
            caption = html.escape(CAPTIONS[name])
            body.append(f"<figure>\n{_inline(pictures[name], caption)}\n<figcaption>{caption}</figcaption>\n</figure>")
    return _PAGE.substitute(title=html.escape(title), body="\n".join(body))


def _inline(svg: str, caption: str) -> str:
    """Make a matplotlib SVG part of a page: no prolog, no ids that would occur twice, colours of the page."""
    svg = svg[svg.index("<svg ") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace(INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
