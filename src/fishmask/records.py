"""Records of runs: reading them, and choosing each group's setting by validation.

A *record* is one JSON object per run, as in the ``metrics.json`` of a run's folder or in a line of ``results.jsonl``.
Records that differ only in learning rate, batch size and seed are one group, and each group yields one :class:`Result`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.glue import TASKS
from fishmask.recipe import Recipe

Record = dict[str, Any]
Setting = tuple[float, int]
Tried = Mapping[Setting, float | None]

FREE_IN_SEARCH = ("rows", "epochs")  # fields in which a search may differ from the final runs, beside the setting
_PARTS: dict[str, Any] = {  # what a record needs, and of which type
    "task": str,
    "variant": str,
    "rows": int | None,
    "recipe.method": str,
    "recipe.learning_rate": int | float,
    "recipe.batch_size": int,
    "recipe.seed": int,
    "recipe.epochs": int | None,
    "recipe.density": int | float | None,
    **dict.fromkeys(("validation", "test", "sweep", "layers"), dict | None),
}
_DEFAULTS = asdict(Recipe())
_WITHOUT_DENSITY = ("full", "biases")  # the recipe has a density, but these methods ignore it
_METHODS = (
    "full", "fish", "movement", "narrowing", "gradient", "snip", "magnitude", "random", "biases", "lora", "shira",
    "diff",
)  # fmt: skip


class Found(NamedTuple):
    """What was read: records, the evaluations of those that have a log (by ``identity``), and what was skipped."""

    records: list[Record]
    curves: dict[Any, list[Record]]
    skipped: list[str]

    @contextmanager
    def skipping(self, place: object) -> Iterator[None]:
        """Note a fault of one file or line, with its reason, and go on after the block."""
        try:
            yield
        except (OSError, ValueError, FishError) as error:
            self.skipped.append(f"{place} ({error})")


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
    for place in places:
        if place.is_dir():
            for folder in sorted({file.parent for name in ("metrics.json", "log.jsonl") for file in place.rglob(name)}):
                _read_folder(folder, found)
            continue
        with found.skipping(place):
            for number, line in _lines(place):
                with found.skipping(f"{place} line {number}"):
                    found.records.append(check_record(_parse(line)))
    if not found.records:
        reasons = f"; skipped: {'; '.join(found.skipped)}" if found.skipped else ""
        looked = ", ".join(map(str, places)) or "no paths"
        raise FishError(f"no record of a run in {looked}; expected what `fishmask glue` wrote{reasons}")
    return found._replace(records=_unique(found.records))


def _read_folder(folder: Path, found: Found) -> None:
    """Read one run: its record, its log, and the layers from its delta if the record lacks them."""
    metrics, log, delta = (folder / name for name in ("metrics.json", "log.jsonl", "delta.safetensors"))
    if not metrics.exists():
        found.skipped.append(f"{folder} (unfinished: no metrics.json)")
        return
    with found.skipping(metrics):
        record = check_record(_parse(metrics.read_text(encoding="utf-8")))
        found.records.append(record)
        if "layers" not in record and delta.exists():
            with found.skipping(delta):
                record["layers"] = {name: chosen for name, chosen, _ in Delta.load(delta).mask.groups()}
        with found.skipping(log):
            points = [_parse(line) for _, line in _lines(log)]
            if not all(isinstance(point, dict) and is_number(point.get("step")) for point in points):
                raise ValueError("a line without a step")
            found.curves[identity(record)] = points


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
    parts = record | {f"recipe.{name}": value for name, value in recipe.items()}
    wrong = [name for name, kind in _PARTS.items() if not isinstance(parts.get(name), kind)]
    if "layers" not in wrong and not all(map(is_number, (record.get("layers") or {}).values())):
        wrong.append("layers")
    if wrong:
        raise ValueError(f"not a record of a run: missing or wrong {', '.join(wrong)}")
    return record


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_search(record: Record) -> bool:
    """Tell whether a run only searched for a setting, on fewer rows than the final runs; it is no result."""
    return (record.get("sweep") or {}).get("train_rows") is not None


def group_of(record: Record, without: Sequence[str] = ()) -> Any:
    """Return what all runs of one result have in common: everything but setting and seed; hashable.

    Without ``FREE_IN_SEARCH`` it is what they have in common with their searches on fewer rows.
    """
    fields = {name: value for name, value in _fields(record).items() if name not in without}
    return record["task"], record["variant"], tuple(sorted(fields.items()))


def identity(record: Record) -> Any:
    """Return what tells a run from every other: all of its configuration, nothing measured; hashable."""
    return is_search(record), group_of(record), _setting(record), _seed(record)


def _unique(records: Iterable[Record]) -> list[Record]:
    """Keep the later of records of the same run."""
    return list({identity(record): record for record in records}.values())


def _fields(record: Record) -> dict[str, Any]:
    recipe = _DEFAULTS | record["recipe"]  # a record may be older than a setting
    fields = {name: _frozen(recipe[name]) for name in recipe if name not in ("learning_rate", "batch_size", "seed")}
    if recipe["method"] in _WITHOUT_DENSITY:
        fields["density"] = None
    return fields | {name: _frozen(record.get(name)) for name in ("base", "rows", "held_out")}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _setting(record: Record) -> Setting:
    return record["recipe"]["learning_rate"], record["recipe"]["batch_size"]


def _seed(record: Record) -> int:
    return int(record["recipe"]["seed"])


def _score(record: Record, part: str) -> float | None:
    score = (record.get(part) or {}).get("score")
    # A diverged run may have written NaN.
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


@dataclass(frozen=True)
class Result:
    """What one group of runs comes to: the setting that validation chose, and the runs at it.

    Attributes:
        task: The task.
        variant: The label of the method's configuration.
        fields: Everything else that the group has in common: the recipe but for learning rate, batch size and seed,
            with ``density`` None for methods that ignore it; ``base``, ``rows`` and ``held_out``. Lists are tuples.
        learning_rate: The chosen one.
        batch_size: The chosen one.
        tried: Validation score, a fraction, of every setting of the group at its lowest seed; None where missing.
        searches: The same of the searches on fewer rows, by their rows and epochs; the final runs followed these.
        records: The records of the chosen setting, by seed.
    """

    task: str
    variant: str
    fields: Mapping[str, Any]
    learning_rate: float
    batch_size: int
    tried: Tried
    searches: Mapping[tuple[int, int], Tried]
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
        scores = {_seed(record): _score(record, "test") for record in self.records}
        return {seed: score for seed, score in scores.items() if score is not None}

    @property
    def settings(self) -> set[Setting]:
        """Every setting that was tried, at whatever size."""
        return set().union(self.tried, *self.searches.values())

    @property
    def at_edge(self) -> bool:
        """Whether several learning rates were tried and the best is the lowest or the highest of them."""
        rates = sorted({rate for rate, _ in self.settings})  # one that diverged is a rate beyond, too
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])


def select_settings(records: Iterable[Record]) -> list[Result]:
    """Choose learning rate and batch size of every group by validation, never by test.

    A group is all records that agree in everything but learning rate, batch size and seed. In it the setting with the
    best validation score at the lowest seed (the search seed) is taken; of equal ones the one with more seeds, then the
    smaller batch, then the lower rate. Its test scores over all its seeds are the result. Searches on fewer rows
    (``sweep.train_rows``) are never results: they show what was tried before the final runs of their configuration.

    Returns:
        The results in a fixed order: by task, method, variant and density. A group without any validation score yields
        one only if it has a single setting.
    """
    groups: dict[Any, list[Record]] = {}
    searches: dict[Any, dict[tuple[int, int], list[Record]]] = {}
    for record in _unique(records):
        if is_search(record):
            size = record.get("rows") or 0, record["recipe"].get("epochs") or 0
            searches.setdefault(group_of(record, FREE_IN_SEARCH), {}).setdefault(size, []).append(record)
        else:
            groups.setdefault(group_of(record), []).append(record)
    results = [_select(group, searches.get(group_of(group[0], FREE_IN_SEARCH), {})) for group in groups.values()]
    return sorted((result for result in results if result is not None), key=order_of)


def _tried(group: list[Record]) -> Tried:
    """Return the validation score of every setting at the lowest seed that has any."""
    seeds = [_seed(r) for r in group if _score(r, "validation") is not None] or list(map(_seed, group))
    scores: dict[Setting, float | None] = dict.fromkeys(sorted(map(_setting, group)))
    return scores | {_setting(r): _score(r, "validation") for r in group if _seed(r) == min(seeds)}


def _select(group: list[Record], searches: Mapping[tuple[int, int], list[Record]]) -> Result | None:
    tried = _tried(group)
    if len(tried) > 1 and set(tried.values()) == {None}:
        return None
    repeats = Counter(map(_setting, group))

    def goodness(setting: Setting) -> tuple[float, ...]:
        score = tried[setting]
        # Where several are equally good, the one that was repeated is what the search took at its time.
        return -math.inf if score is None else score, repeats[setting], -setting[1], -setting[0]

    chosen = max(tried, key=goodness)
    runs = tuple(sorted((r for r in group if _setting(r) == chosen), key=_seed))
    before = {size: _tried(searches[size]) for size in sorted(searches)}
    return Result(runs[0]["task"], runs[0]["variant"], _fields(runs[0]), *chosen, tried, before, runs)


def order_of(result: Result) -> tuple[Any, ...]:
    """Return the key that sorts results: by task, method, variant, density and the other fields."""
    place = _METHODS.index(result.method) if result.method in _METHODS else len(_METHODS)
    others = [sortable(value) for _, value in sorted(result.fields.items())]
    return task_order(result.task), place, result.variant, result.density or 0, others


def task_order(task: str) -> tuple[int, str]:
    """Return a key that puts tasks in GLUE's order, others after them by name."""
    return (list(TASKS).index(task) if task in TASKS else len(TASKS), task)


def sortable(value: Any) -> tuple[int, float, str]:
    """Return a key that puts numbers in their order and anything else after them."""
    return (0, value, "") if is_number(value) else (1, 0, repr(value))


def tasks_of(results: Iterable[Result]) -> list[str]:
    """Return the tasks with any test score, in GLUE's order, others after them by name."""
    return sorted({result.task for result in results if result.scores}, key=task_order)
