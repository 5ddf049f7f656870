"""The training loop: fine-tune a sequence-classification model, whole or on a mask.

The order of things for a mask: optionally train the new head alone for a while, score the model, choose the entries,
train their values. Warm-up and training share the steps and the schedule, so every method takes the same steps.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fishmask.attach import Tuning, attach
from fishmask.choose import check_frozen_below, choose, narrow
from fishmask.claim import digest_of
from fishmask.data import Encoded
from fishmask.errors import FishError
from fishmask.log import CheckpointLog
from fishmask.loop import Descent, Progress, autocast, device_of, no_progress, to_device
from fishmask.mask import Mask
from fishmask.measure import peak_memory_bytes, quality
from fishmask.params import canonical_parameters, matching
from fishmask.prefix import PrefixCache
from fishmask.recipe import MASKLESS, Precision, Recipe
from fishmask.rivals import diff_pruning, peft_model, trained_entries
from fishmask.states import delete_states

FILLING = "filling the cache"


@dataclass
class Outcome:
    """What a training run leaves.

    Attributes:
        tuning: The attached values; None for methods without a mask.
        adapter: The PEFT model of methods "lora" and "shira"; its base is the trained model, changed in place.
        entries: How many numbers were trained.
        seconds_per_step: Median over the steps after the warm-up.
        seconds_scoring: Time taken to choose the mask.
        seconds_filling: Time taken to fill the prefix cache.
        prefix: What the prefix cache held and did: its ``bytes``, the examples ``served`` and ``computed``.
        peak_memory_bytes: Most memory until the end of training: of the process, or on a GPU of its tensors there.
        history: One record per evaluation, the last one at the end of training.
    """

    tuning: Tuning | None
    entries: int
    adapter: Any = None
    seconds_per_step: float = 0.0
    seconds_scoring: float = 0.0
    seconds_filling: float = 0.0
    prefix: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: nn.Module,
    data: Encoded,
    recipe: Recipe,
    *,
    head: Sequence[str] = (),
    mask: Mask | None = None,
    validation: Encoded | None = None,
    judge: Callable[[dict[str, float]], dict[str, float]] = dict,
    log: Path | None = None,
    checkpoints: CheckpointLog | None = None,
    checkpoint_every: int = 100,
    prefix_folder: Path | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Fine-tune ``model`` in place.

    Args:
        model: A model whose forward takes ``data.batch(...)`` and returns ``.loss`` and ``.logits``.
        data: Training examples with targets.
        recipe: How to train.
        head: Names of the parameters of the new head, trained whole unless the recipe's ``keep`` says otherwise.
        mask: A mask chosen beforehand; the recipe's method then chooses none.
        validation: Examples to evaluate after every epoch.
        judge: Turns the quality of the predictions into what is recorded of it; by default all.
        log: The file to write, one JSON line per evaluation; an earlier one is replaced at the first.
        checkpoints: Where to commit; a training that was interrupted goes on from its newest commit as if nothing had
            happened. Needs a method with a mask.
        checkpoint_every: Steps from one commit to the next.
        prefix_folder: Where to keep the recipe's prefix cache while training; by default in memory.
        progress: Called with the phase ("scoring", "filling the cache", "training"), what is done, and of how much.

    Returns:
        The outcome; the model holds the trained weights and is in eval mode.

    Raises:
        Diverged: The loss is not finite.
        FishError: ``checkpoints`` holds another training: other data, another recipe, or another mask. Or the recipe
            has a prefix cache, and nothing keeps the mask out of the first block.
        ValueError: The recipe and the other arguments do not go together.
    """
    torch.manual_seed(recipe.seed)  # for dropout
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch_size)
    if recipe.warm_up_head >= steps:
        raise ValueError(f"warm_up_head={recipe.warm_up_head} leaves no step for training: there are {steps} in all")
    keep = tuple(recipe.keep or head)
    if mask is not None:
        recipe.check_mask_given()
    if checkpoints is not None and mask is None and recipe.method in MASKLESS:
        raise ValueError(f"method={recipe.method!r} has no mask, so its training cannot be committed")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    training = "" if checkpoints is None else _identity(data, recipe, mask)
    resumed = checkpoints if checkpoints is not None and checkpoints.numbers else None
    if resumed is not None:
        outcome = Outcome(attach(model, resumed.mask()), 0, **_known(resumed, training))
    else:
        # Of biases a lower block may have none, and they take no scoring to find out.
        if recipe.prefix_cache_bytes and mask is None and recipe.method != "biases":
            check_frozen_below(model, data, recipe, keep)
        outcome = _begin(model, data, recipe, keep, mask, progress)
    parameters = list(outcome.tuning.parameters() if outcome.tuning else model.parameters())
    over = recipe.search_epochs if recipe.method == "narrowing" and mask is None else 0
    step = over * (steps // recipe.epochs)
    descent = Descent(model, [p for p in parameters if p.requires_grad], recipe.learning_rate, steps, recipe, step)
    loss, count = 0.0, 0  # of the epoch so far
    if resumed is not None and outcome.tuning is not None:
        restored = resumed.restore(outcome.tuning, descent.optimizer, state={"schedule": descent.schedule})
        step, (loss, count) = restored.step, restored.state["loss"]
    seconds: list[float] = []
    with ExitStack() as during:

        def serve() -> None:
            """Have the blocks below the mask served from now on, if the recipe says so."""
            if recipe.prefix_cache_bytes and outcome.tuning is not None:
                during.enter_context(_served(outcome, outcome.tuning, data, recipe, prefix_folder, progress))

        if step > recipe.warm_up_head or not recipe.warm_up_head:
            serve()
        for epoch in range(over, recipe.epochs):
            if any(record["epoch"] > epoch for record in outcome.history):
                continue
            for place, rows in enumerate(data.shuffled(recipe.batch_size, seed=recipe.seed + 1000 * epoch)):
                if epoch * (steps // recipe.epochs) + place < step:
                    continue
                if outcome.tuning and recipe.warm_up_head and step == recipe.warm_up_head:
                    begin = perf_counter()
                    outcome.tuning.set_mask(choose(model, data, recipe, keep, progress), descent.optimizer)
                    outcome.seconds_scoring = perf_counter() - begin
                    serve()
                    seconds.clear()
                begin = perf_counter()
                loss += descent.step(data.batch(rows))
                seconds.append(perf_counter() - begin)
                step, count = step + 1, count + 1
                if checkpoints is not None and outcome.tuning and step % checkpoint_every == 0:
                    kept = {"history": outcome.history, "seconds_scoring": outcome.seconds_scoring}
                    state = {"schedule": descent.schedule, "training": training, "loss": (loss, count), "outcome": kept}
                    checkpoints.commit_async(outcome.tuning, descent.optimizer, step=step, state=state)
                progress("training", step, steps)
            record: dict[str, float] = {"epoch": epoch + 1, "step": step, "train_loss": loss / count}
            loss, count = 0.0, 0
            if validation is not None:
                record |= judge(evaluate(model, validation, recipe.precision))
            outcome.history.append(record)
            if log is not None:
                log.write_text("".join(json.dumps(record) + "\n" for record in outcome.history), encoding="utf-8")
    if checkpoints is not None:
        checkpoints.wait()
    model.eval()
    outcome.entries = sum(p.numel() for p in descent.optimizer.param_groups[0]["params"])
    outcome.seconds_per_step = median(seconds) if seconds else 0.0
    outcome.peak_memory_bytes = peak_memory_bytes(device_of(model))
    return outcome


@contextmanager
def _served(
    outcome: Outcome, tuning: Tuning, data: Encoded, recipe: Recipe, folder: Path | None, progress: Progress
) -> Iterator[None]:
    """Fill a prefix cache with all examples, in one order whenever it is filled, and use it; then delete its files."""
    begin = perf_counter()
    batches = data.in_order(recipe.batch_size)
    try:
        with PrefixCache(tuning, folder, limit_bytes=recipe.prefix_cache_bytes) as cache:
            progress(FILLING, 0, len(batches))
            with autocast(device_of(tuning.model), recipe.precision):
                for done, rows in enumerate(batches, start=1):
                    cache.fill([data.batch(rows)])
                    progress(FILLING, done, len(batches))
            outcome.seconds_filling = perf_counter() - begin
            yield
            outcome.prefix = {"bytes": cache.nbytes, "served": cache.served, "computed": cache.computed}
    finally:
        if folder is not None:
            delete_states(folder)


def _identity(data: Encoded, recipe: Recipe, mask: Mask | None) -> str:
    """Return a digest of what a training depends on besides its base."""
    targets = None if data.targets is None else data.targets.tolist()
    return digest_of([asdict(recipe), data.fields, targets, None if mask is None else mask.digest])


def _known(checkpoints: CheckpointLog, training: str) -> dict[str, Any]:
    """Return what the newest commit tells of the outcome so far."""
    state = checkpoints.read()[2].state
    if state.get("training") != training:
        raise FishError(
            f"{checkpoints.path} holds an interrupted training on other data, by another recipe or of another mask: "
            "resume that one, delete the folder, or name another"
        )
    outcome: dict[str, Any] = state["outcome"]
    return outcome


def _begin(
    model: nn.Module, data: Encoded, recipe: Recipe, keep: tuple[str, ...], mask: Mask | None, progress: Progress
) -> Outcome:
    """Choose what trains first: everything, the mask, or during the warm-up the kept parameters alone."""
    if recipe.method == "full":
        return Outcome(None, sum(p.numel() for p in model.parameters()))
    if recipe.method in ("lora", "shira"):
        adapter = peft_model(model, recipe.method, recipe.density, keep, recipe.seed)
        return Outcome(None, trained_entries(model), adapter)
    begin = perf_counter()
    if mask is None and recipe.method in ("diff", "narrowing"):
        if recipe.method == "diff":
            steps = recipe.dense_epochs * math.ceil(len(data) / recipe.batch_size)
            mask, values = diff_pruning(model, data, recipe, keep, steps, progress)
        else:
            mask, values = narrow(model, data, recipe, keep, progress)
        tuning = attach(model, mask)
        with torch.no_grad():
            for name, parameter in tuning.named_parameters():
                parameter.copy_(values.get(name, parameter))
        tuning.write_back()
        return Outcome(tuning, mask.k, seconds_scoring=perf_counter() - begin)
    if mask is None:
        mask = _whole(model, keep) if recipe.warm_up_head else choose(model, data, recipe, keep, progress)
    return Outcome(attach(model, mask), mask.k, seconds_scoring=perf_counter() - begin)


def _whole(model: nn.Module, keep: tuple[str, ...]) -> Mask:
    """Return the mask of every entry of the kept parameters."""
    parameters = canonical_parameters(model)
    kept = matching(parameters, keep, "keep")
    if not kept:
        raise ValueError("warm_up_head needs to know the head: name its parameters with keep")
    return Mask.from_dense({name: torch.full(p.shape, name in kept) for name, p in parameters.items()})


def predict(
    model: nn.Module,
    data: Encoded,
    batch_size: int = 64,
    progress: Progress = no_progress,
    precision: Precision = "float32",
) -> Tensor:
    """Return the model's logits ``[examples, classes]`` without dropout, in the order of ``data`` and on the CPU.

    Args:
        model: The model.
        data: The examples; their targets are not looked at.
        batch_size: Examples per forward.
        progress: Called with the progress.
        precision: That of the forward.
    """
    model.eval()
    device = device_of(model)
    parts: list[tuple[list[int], Tensor]] = []
    done = 0
    with torch.inference_mode(), autocast(device, precision):
        for rows in data.in_order(batch_size):
            batch = {name: tensor for name, tensor in data.batch(rows).items() if name != "labels"}
            parts.append((rows, model(**to_device(batch, device)).logits.float().cpu()))
            done += len(rows)
            progress("predicting", done, len(data))
    first = parts[0][1]
    outputs = first.new_empty(len(data), *first.shape[1:])
    for rows, logits in parts:
        outputs[rows] = logits
    return outputs.clone()


def evaluate(model: nn.Module, data: Encoded, precision: Precision = "float32") -> dict[str, float]:
    """Return the quality of the model's predictions (see :func:`fishmask.measure.quality`)."""
    if data.targets is None:
        raise ValueError("evaluation needs examples with labels")
    return quality(predict(model, data, precision=precision), data.targets)
