"""A sweep: several methods on several GLUE tasks, each with its own search for a learning rate and batch size.

Every run is a folder of its own below the sweep's folder. What is to be run next follows from the plan and from the
folders that are finished, and from nothing else: a sweep that was killed goes on where it stopped, a run that was under
way then begins anew, and a sweep that is started again with more seeds or methods runs only those.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import torch

from fishmask.claim import claimed, digest_of, digest_of_model
from fishmask.data import Examples, encode
from fishmask.errors import Diverged, FishError
from fishmask.glue import GlueTask, glue_task, hold_out, read_glue, take, task_score
from fishmask.hub import load_for_training, load_tokenizer, located
from fishmask.loop import Progress, no_progress
from fishmask.measure import environment
from fishmask.plot import plot_mask
from fishmask.publish import replace_file
from fishmask.recipe import Recipe, recipe_from
from fishmask.run import MODEL_FILE, write_run
from fishmask.train import Outcome, evaluate, fit
from fishmask.workers import end_with_starter, run_worker, stop_workers, tell, tell_result

Record = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method as it takes part in a sweep.

    Attributes:
        name: What tables call it.
        recipe: Its settings; learning rate, batch size and seed come from the search.
        rates: Learning rates to try.
        batch_sizes: Batch sizes to try.
    """

    name: str
    recipe: Recipe
    rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """What a sweep is to find out.

    Attributes:
        source: The GLUE data (see :func:`fishmask.glue.read_glue`).
        base: A local model folder or a name on the hub.
        tasks: Names of the tasks.
        variants: The methods.
        seeds: The first one searches; the setting it finds is run with all of them.
        rows: Use only so many training examples, for tasks that have more (see :func:`fishmask.glue.hold_out`).
        held_out: Share of the training examples to choose on.
        search_rows: Search with only so many of the rows to train on; by default with all of them, and then the winner
            of the search is also the first of the repetitions.
        search_epochs: Search with only so many epochs, too.
        device: Where to train.
    """

    source: str
    base: str
    tasks: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int | None = None
    held_out: float = 0.1
    search_rows: int | None = None
    search_epochs: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("tasks", "variants", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"a sweep needs at least one of {name}")
        for name, least in (("rows", 2), ("search_rows", 1), ("search_epochs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"the share to hold out must be in (0, 1), such as 0.1; got {self.held_out}")
        if self.search_epochs and not self.search_rows:
            raise ValueError("search_epochs goes with search_rows: say how many rows the shorter search is to use")
        # The records of finished runs have the tasks' own names: by other spellings they would not be found again.
        object.__setattr__(self, "tasks", tuple(glue_task(task).name for task in self.tasks))
        odd = [variant.name for variant in self.variants if not variant.name or set("/\\") & set(variant.name)]
        if odd:
            raise ValueError(f"the name of a variant is part of a folder's name; it cannot be {odd[0]!r}")
        known = {(variant.name, variant.recipe) for variant in self.variants}
        if len(known) < len(self.variants):
            raise ValueError("two variants have the same name and the same settings; expected each once")
        for task in self.tasks:
            for variant in self.variants:
                if not search_of(self, task, variant):  # which also checks every rate and batch size
                    raise ValueError(f"{variant.name} needs at least one learning rate and one batch size to try")


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a sweep."""

    task: str
    variant: str
    recipe: Recipe
    sweep: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> str:
        """The name of its folder below the sweep's folder; other settings, another folder."""
        # All settings, those at their defaults too: after a change of a default the new run must not have the folder of
        # the old one, which it would delete.
        content = json.dumps([self.task, self.variant, asdict(self.recipe), self.sweep], sort_keys=True)
        return f"{self.task}/{self.variant.replace(' ', '-')}-{sha256(content.encode()).hexdigest()[:10]}"


def plan(sweep: Sweep, records: Mapping[str, Record]) -> list[Job]:
    """Return every job that is known to be needed, given the finished ones, the most urgent first.

    For each task and variant first the grid at the first seed; once that is complete, the best setting of it with all
    seeds. Searches come before repetitions, and each seed is done for all before the next begins.

    Args:
        sweep: What is to be found out.
        records: The records of the finished jobs by their keys.
    """
    searches: list[Job] = []
    repetitions: list[tuple[int, Job]] = []
    for variant in sweep.variants:
        for task in sweep.tasks:
            grid = search_of(sweep, task, variant)
            searches += grid
            best = best_of(grid, records)
            if best is not None:
                repetitions += [(i, _repetition(sweep, variant, best, seed)) for i, seed in enumerate(sweep.seeds)]
    repetitions.sort(key=lambda item: item[0])
    return list(dict.fromkeys(searches + [job for _, job in repetitions]))


def search_of(sweep: Sweep, task: str, variant: Variant) -> list[Job]:
    """Return the jobs that search for the learning rate and batch size of a variant on a task."""
    recipe = replace(variant.recipe, seed=sweep.seeds[0], epochs=sweep.search_epochs or variant.recipe.epochs)
    common = _common(sweep)
    if sweep.search_rows:
        common["train_rows"] = sweep.search_rows
    return [
        Job(task, variant.name, replace(recipe, learning_rate=rate, batch_size=size), common)
        for size in variant.batch_sizes
        for rate in variant.rates
    ]


def _repetition(sweep: Sweep, variant: Variant, best: Job, seed: int) -> Job:
    recipe = replace(best.recipe, seed=seed, epochs=variant.recipe.epochs)
    return Job(best.task, best.variant, recipe, _common(sweep))


def _common(sweep: Sweep) -> dict[str, Any]:
    return {"base": Path(sweep.base).name, "rows": sweep.rows, "held_out": sweep.held_out}


def best_of(grid: Sequence[Job], records: Mapping[str, Record]) -> Job | None:
    """Return the job with the best score on the held-out rows; None while one is missing or when all diverged.

    Of equal scores the first in the grid wins. The test score is not looked at.
    """
    if any(job.key not in records for job in grid):
        return None
    scored = [(records[job.key]["validation"]["score"], job) for job in grid if "validation" in records[job.key]]
    return max(scored, key=lambda item: item[0])[1] if scored else None


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    workers: int = 1,
    progress: Progress = no_progress,
    told: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run what is missing of a sweep, each run in a process of its own.

    Args:
        sweep: What is to be found out.
        folder: Its folder; what is finished in it is not run again.
        workers: How many processes at a time; the cores are shared out among them.
        progress: Called with "all runs" for the whole, and with the progress of each run.
        told: Called with the record of each run that has just been finished.

    Returns:
        The records of all the jobs of the sweep. They are in ``results.jsonl`` in the folder, too, with those of every
        other run that is finished there.

    Raises:
        FishError: A package is missing; the model or the data cannot be read; the folder is in use, or holds runs on
            other data or another model of the same name; or a run failed for another reason than a loss that is not
            finite: the others were finished first.
    """
    _check_packages(sweep)
    data = _read(sweep)  # every fault of the data comes before the first hour of training
    load_tokenizer(sweep.base)  # and so does a model that is not there
    with claimed(folder, _inputs(sweep, data)):
        threads = max(1, (os.cpu_count() or 1) // workers)
        records = finished(folder)
        board = _Board(sweep, {task: len(parts[0][""]) for task, parts in data.items()}, records, progress)
        failed: dict[str, str] = {}
        running: dict[Future[Record], Job] = {}
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    _drop_whole_models(sweep, records, folder)
                    busy = {job.key for job in running.values()}
                    waiting = [job for job in plan(sweep, records) if job.key not in {*records, *failed, *busy}]
                    for job in waiting[: workers - len(running)]:
                        running[pool.submit(_run_in_process, sweep, job, folder, threads, board)] = job
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        try:
                            records[job.key] = future.result()
                            told(records[job.key])
                        except FishError as error:
                            failed[job.key] = str(error)
                        board.finished(job)
            except BaseException:  # such as Ctrl-C, which reaches this thread alone
                while wait(running, timeout=0.1).not_done:  # one may be about to start
                    stop_workers()
                raise
        lines = "".join(json.dumps(record) + "\n" for _, record in sorted(finished(folder).items()))
        replace_file(folder / "results.jsonl", [lines.encode()])
        if failed:
            key, reason = next(iter(failed.items()))
            raise FishError(f"{len(failed)} of the runs failed, the first in {folder / key}: {reason}")
        return [records[job.key] for job in plan(sweep, records)]


def _check_packages(sweep: Sweep) -> None:
    """Refuse what would fail in every run, after its training."""
    needed = {"sklearn": "hf", "matplotlib": "plot"}
    if any(variant.recipe.method in ("lora", "shira") for variant in sweep.variants):
        needed["peft"] = "peft"
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise FishError(f"these runs need the package {package}: pip install 'fishmask[{extra}]'")


def _read(sweep: Sweep) -> dict[str, list[dict[str, Examples]]]:
    """Return the train and the dev part of each task."""
    return {name: [read_glue(sweep.source, glue_task(name), part) for part in ("train", "dev")] for name in sweep.tasks}


def _inputs(sweep: Sweep, data: Mapping[str, list[dict[str, Examples]]]) -> dict[str, str]:
    """Return the digests of the base and of each task's data, by name."""
    inputs = {f"model {Path(sweep.base).name}": digest_of_model(located(sweep.base))}
    for name, parts in data.items():
        inputs[f"data of {name}"] = digest_of([[vars(examples) for examples in part.values()] for part in parts])
    return inputs


class _Board:
    """The progress of the whole, measured in examples to train on so that the time left can be told."""

    def __init__(
        self, sweep: Sweep, sizes: Mapping[str, int], records: Mapping[str, Record], progress: Progress
    ) -> None:
        self._progress, self._lock = progress, Lock()
        self._share: dict[str, float] = {}
        self._rows = {name: min(size, sweep.rows or sys.maxsize) for name, size in sizes.items()}
        jobs: set[Job] = set()
        for variant in sweep.variants:
            for task in sweep.tasks:
                grid = search_of(sweep, task, variant)
                # Whichever wins, its repetitions are as much work as those of the first.
                jobs |= {*grid, *(_repetition(sweep, variant, grid[0], seed) for seed in sweep.seeds)}
        self._total = sum(map(self._work, jobs))
        self._done = sum(self._work(job) for job in plan(sweep, records) if job.key in records)
        self._show()

    def _work(self, job: Job) -> int:
        rows: int = job.sweep.get("train_rows", self._rows[job.task])
        return rows * job.recipe.epochs

    def of(self, job: Job) -> Progress:
        """Return where one job reports to."""
        title = f"{job.task} {job.variant}"

        def report(phase: str, done: int, total: int) -> None:
            with self._lock:  # reports come from one thread for each worker
                self._progress(f"{title}: {phase}", done, total)
                if phase == "training":
                    self._share[job.key] = self._work(job) * done / total
                    self._show()

        return report

    def finished(self, job: Job) -> None:
        """Count a job as done."""
        with self._lock:
            self._share.pop(job.key, None)
            self._done += self._work(job)
            self._show()

    def _show(self) -> None:
        self._progress("all runs", int(self._done + sum(self._share.values())), self._total)


def finished(folder: Path) -> dict[str, Record]:
    """Return the records of the finished runs below a folder by the keys of their jobs.

    A record that cannot be read, or that is no record of a sweep, is as good as none: that run is not finished.
    """
    records = {}
    for path in sorted(folder.glob("*/*/metrics.json")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            record = json.loads(path.read_text(encoding="utf-8"))
            # The key is computed again: if a default has changed since, the run is another than its name says.
            job = Job(record["task"], record["variant"], recipe_from(record["recipe"]), record["sweep"])
            if "diverged" in record or isinstance(record["validation"]["score"], float):
                records[job.key] = record
    return records


def _drop_whole_models(sweep: Sweep, records: Mapping[str, Record], folder: Path) -> None:
    """Delete the whole models of method "full" that lost a complete search: each is as large as the base."""
    for variant in sweep.variants:
        for task in sweep.tasks:
            grid = search_of(sweep, task, variant)
            best = best_of(grid, records)
            for job in grid:
                if best is not None and job != best:
                    (folder / job.key / MODEL_FILE).unlink(missing_ok=True)


def _run_in_process(sweep: Sweep, job: Job, folder: Path, threads: int, board: _Board) -> Record:
    settings: dict[str, Any] = {"source": sweep.source, "base": sweep.base, "device": sweep.device}
    settings |= {"task": job.task, "variant": job.variant, "recipe": asdict(job.recipe), "sweep": job.sweep}
    settings["folder"] = str(folder / job.key)
    title = f"{job.task} {job.variant} at {job.recipe.learning_rate:g}"
    record: Record = run_worker(
        "fishmask.sweep", [json.dumps(settings)], title=title, threads=threads, progress=board.of(job)
    )
    return record


def run_job(settings: Mapping[str, Any], progress: Progress) -> Record:
    """Run one job in this process: train, evaluate, and leave its folder; ``metrics.json`` comes last."""
    folder = Path(settings["folder"])
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    folder.mkdir(parents=True)
    recipe = recipe_from(settings["recipe"])
    task, common = glue_task(settings["task"]), settings["sweep"]
    train, held_out = hold_out(read_glue(settings["source"], task, "train")[""], common["held_out"], common["rows"])
    if "train_rows" in common:
        # At random: the rows are in the order of the file, which may be sorted by label.
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        train = take(train, sorted(order[: common["train_rows"]].tolist()))
    record: Record = {"task": task.name, "variant": settings["variant"], "base": common["base"]}
    record |= {"sweep": common, "rows": len(train), "held_out": len(held_out), "recipe": asdict(recipe)}
    try:
        record |= _train(settings, task, recipe, train, held_out, folder, progress)
    except Diverged as error:  # a rate that is too high is a finding of the search
        record["diverged"] = str(error)
    record |= environment()
    replace_file(folder / "metrics.json", [json.dumps(record, indent=2).encode(), b"\n"])
    return record


def _train(
    settings: Mapping[str, Any], task: GlueTask, recipe: Recipe, train: Any, held_out: Any, folder: Path, progress: Any
) -> Record:
    base = settings["base"]
    loaded = load_for_training(base, task.classes, seed=recipe.seed)
    loaded.model.to(torch.device(settings["device"]))

    def encoded(examples: Any) -> Any:
        return encode(examples, loaded.tokenizer, recipe.max_length, recipe.padding)

    begin = perf_counter()
    outcome = fit(
        loaded.model,
        encoded(train),
        recipe,
        head=loaded.head,
        validation=encoded(held_out),
        judge=lambda quality: task_score(task, {"": quality}),
        log=folder / "log.jsonl",
        progress=progress,
    )
    seconds = perf_counter() - begin
    run = {"base": base, "task": task.name, "text": task.text, "pair": task.pair, "variant": settings["variant"]}
    file = write_run(folder, loaded.model, outcome, {**run, "recipe": asdict(recipe)})
    tests = {
        part: evaluate(loaded.model, encoded(examples), recipe.precision)
        for part, examples in read_glue(settings["source"], task, "dev").items()
    }
    return {
        "validation": {name: outcome.history[-1][name] for name in ("score", *task.metrics)},
        "test": task_score(task, tests),
        "entries": outcome.entries,
        "layers": _layers(outcome, folder),
        "seconds_training": seconds,
        "seconds_per_step": outcome.seconds_per_step,
        "seconds_scoring": outcome.seconds_scoring,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "file_bytes": file.stat().st_size,
    }


def _layers(outcome: Outcome, folder: Path) -> dict[str, int]:
    """Draw the mask of a run and return how many entries it has in each layer."""
    if outcome.tuning is None:
        return {}
    plot_mask(outcome.tuning.mask, folder / "mask.png")
    return {layer: chosen for layer, chosen, _ in outcome.tuning.mask.groups()}


if __name__ == "__main__":
    end_with_starter()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tell_result(run_job(json.loads(sys.argv[1]), tell))
