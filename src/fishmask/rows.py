"""Methods side by side: the results of each on all tasks in one row, means over seeds, differences by seed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from fishmask.records import Result, order_of, sortable, task_order


class Summary(NamedTuple):
    """The mean of several seeds, their sample standard deviation (None for one seed), and how many there are."""

    mean: float
    spread: float | None
    seeds: int


def summarize(scores: Sequence[Mapping[int, float]]) -> Summary | None:
    """Summarize the mean over tasks, taken per seed over the seeds that all of the tasks have; None without any.

    Args:
        scores: For each task its scores (or differences) by seed.
    """
    seeds = sorted(set.intersection(*map(set, scores))) if scores else []
    values = [mean(of_task[seed] for of_task in scores) for seed in seeds]
    return Summary(mean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None


@dataclass(frozen=True)
class Row:
    """The results of one method: of one variant at one density with the same other fields, on every task.

    Attributes:
        label: The variant, and the fields in which its rows differ.
        results: By task and value of the swept field (None where nothing is swept).
    """

    label: str
    results: dict[tuple[str, Any], Result]

    @property
    def first(self) -> Result:
        """One of the results."""
        return next(iter(self.results.values()))

    @property
    def tested(self) -> bool:
        """Whether there is any test score."""
        return any(result.scores for result in self.results.values())

    def scores(self, tasks: Iterable[str], value: Any = None) -> Summary | None:
        """Summarize the test scores (fractions) of one task or of the mean of several; None if one is missing."""
        found = [self.results.get((task, value)) for task in tasks]
        return summarize([result.scores if result else {} for result in found])


def method_rows(results: Sequence[Result], swept: str | None = None) -> list[Row]:
    """Put the results of each method on all tasks into one row.

    A field tells rows apart when it takes several values within one task: what differs only between tasks (say, the
    length of texts) does not hinder their mean. Base and density always tell rows apart.

    Args:
        results: What ``select_settings`` returned.
        swept: A field whose values share one row. Variants that differ in this field alone share it too.
    """
    owner = "variant" if swept is None else "method"
    own, named = _varied(results, owner, swept), _varied(results, "variant", swept)
    always = [field for field in ("base", "density") if field != swept]
    several = [field for field in always if len({result.fields.get(field) for result in results} - {None}) > 1]
    groups: dict[Any, dict[str, list[Result]]] = {}
    for result in results:
        name = getattr(result, owner)
        key = name, *(result.fields.get(field) for field in [*always, *own[name]])
        groups.setdefault(key, {}).setdefault(result.variant, []).append(result)
    rows = []
    for by_variant in groups.values():
        together = [result for members in by_variant.values() for result in members]
        # Variants that were run with the same value of the swept field cannot share a row.
        alone = len(_cells(together, swept)) < len(together)
        for members in by_variant.values() if alone else [together]:
            fields, names = members[0].fields, dict.fromkeys(result.variant for result in members)
            words = [text_of(fields[field], field) for field in several if fields.get(field) is not None]
            words += [f"{field.replace('_', ' ')} {text_of(fields.get(field))}" for field in named[members[0].variant]]
            rows.append(Row(", ".join([" / ".join(names), *words]), _cells(members, swept)))
    # Results come sorted by task first; rows shall not depend on which task a method was run on.
    return sorted(rows, key=lambda row: order_of(row.first)[1:])


def _cells(results: Iterable[Result], swept: str | None) -> dict[tuple[str, Any], Result]:
    return {(result.task, result.fields.get(swept) if swept else None): result for result in results}


def _varied(results: Sequence[Result], owner: str, swept: str | None) -> dict[str, list[str]]:
    """Return for each variant (or method) the fields, but for base and density, that vary within one task."""
    fields = sorted({field for result in results for field in result.fields} - {"base", "density", swept})
    members: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        members.setdefault(getattr(result, owner), {}).setdefault(result.task, []).append(result)

    def varies(field: str, tasks: Mapping[str, list[Result]]) -> bool:
        return any(len({result.fields.get(field) for result in of_task}) > 1 for of_task in tasks.values())

    return {name: [field for field in fields if varies(field, tasks)] for name, tasks in members.items()}


def named_results(results: Sequence[Result]) -> list[tuple[str, Result]]:
    """Return every result with its row's label, in the order of the rows."""
    return [(row.label, result) for row in method_rows(results) for result in row.results.values()]


def text_of(value: Any, field: str = "") -> str:
    """Write a field's value as one would type it in a command, but a density in percent."""
    if isinstance(value, tuple):
        return " ".join(map(text_of, value)) or "none"
    if field == "density" and value is not None:
        return f"{100 * value:g} %"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def sweep_rows(results: Sequence[Result], field: str) -> tuple[list[Row], list[Any], list[str]]:
    """Return the rows in which a field takes several values on one task, its values in order, and those tasks.

    With the density, methods that were run at one density only stand beside those that were swept.
    """
    rows, tasks = [], set()
    for row in method_rows(results, field):
        tested = [key for key, result in row.results.items() if result.scores]
        swept = {task for task, count in Counter(task for task, _ in tested).items() if count > 1}
        tasks |= swept
        if swept or (field == "density" and any(value is not None for _, value in tested)):
            rows.append(row)
    values = {value for row in rows for task, value in row.results if task in tasks}
    return rows if tasks else [], sorted(values, key=sortable), sorted(tasks, key=task_order)


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
