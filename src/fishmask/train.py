"""The training loop: fine-tune a sequence-classification model, whole or on a mask.

The order of things for a mask: optionally train the new head alone for a while, score the model, choose the entries,
train their values. Warm-up and training share the steps and the schedule, so every method takes the same steps.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import IO, Literal, get_args

import torch
from torch import Tensor, nn

from fishmask.attach import Tuning, attach
from fishmask.data import Encoded
from fishmask.errors import FishError
from fishmask.fisher import fisher
from fishmask.mask import Mask
from fishmask.measure import peak_memory_bytes, quality
from fishmask.params import canonical_parameters, matching

Method = Literal["fish", "random", "magnitude", "biases", "full"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        method: How the mask is chosen; "full" trains every parameter and needs none.
        density: Share of all entries to train, the head included; not used by "biases" and "full".
        learning_rate: Peak learning rate; it falls linearly to zero.
        epochs: Passes over the training data, warm-up included.
        batch_size: Examples per step.
        max_length: Texts are cut off after so many tokens.
        seed: Decides the head's first weights, dropout, the order of batches, the examples scored and random masks.
        weight_decay: AdamW's weight decay.
        clip: Largest norm of the gradient, 0 for no clipping.
        warm_up_head: Steps in which only the kept parameters train, before the model is scored.
        keep: Patterns of parameters to train whole; empty means the new head.
        exclude: Patterns of parameters never to train.
        labels: Whose labels the Fisher scores use (see :func:`fishmask.fisher`).
        examples: Training examples to score; all of them when there are fewer.
        engine: How the scores are computed (see :func:`fishmask.fisher`).
    """

    method: Method = "fish"
    density: float = 0.005
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    warm_up_head: int = 0
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    labels: Literal["given", "expected", "sampled"] = "given"
    examples: int = 1024
    engine: Literal["auto", "batched", "loop"] = "auto"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {self.method!r}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be a fraction in (0, 1], such as 0.005 for 0.5 %; got {self.density}")
        for name in ("learning_rate", "epochs", "batch_size", "max_length", "examples"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "warm_up_head"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0; got {getattr(self, name)}")
        if self.method == "full" and self.warm_up_head:
            raise ValueError("warm_up_head is for masks; method='full' trains everything from the first step")
        if self.method in ("biases", "full") and self.exclude:
            raise ValueError(f"exclude is for masks chosen by density; method={self.method!r} takes none")


@dataclass
class Outcome:
    """What a training run leaves.

    Attributes:
        tuning: The attached values; None for method "full".
        entries: How many numbers were trained.
        seconds_per_step: Median over the steps after the warm-up.
        seconds_scoring: Time taken to choose the mask.
        peak_memory_bytes: Most memory that the process has had resident until the end of training.
        history: One record per evaluation, the last one at the end of training.
    """

    tuning: Tuning | None
    entries: int
    seconds_per_step: float = 0.0
    seconds_scoring: float = 0.0
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
    log: IO[str] | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Outcome:
    """Fine-tune ``model`` in place.

    Args:
        model: A model whose forward takes ``data.batch(...)`` and returns ``.loss`` and ``.logits``.
        data: Training examples with targets.
        recipe: How to train.
        head: Names of the parameters of the new head, trained whole unless the recipe's ``keep`` says otherwise.
        mask: A mask chosen beforehand; the recipe's method then chooses none.
        validation: Examples to evaluate after every epoch.
        log: Where one JSON line per evaluation goes.
        progress: Called with the phase ("scoring", "training"), the steps done and the steps in all.

    Returns:
        The outcome; the model holds the trained weights and is in eval mode.

    Raises:
        FishError: The loss is not finite.
    """
    torch.manual_seed(recipe.seed)  # for dropout
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch_size)
    if recipe.warm_up_head >= steps:
        raise ValueError(f"warm_up_head={recipe.warm_up_head} leaves no step for training: there are {steps} in all")
    keep = tuple(recipe.keep or head)
    if mask is not None and (recipe.method == "full" or recipe.warm_up_head):
        raise ValueError("a mask chosen beforehand goes with neither method='full' nor warm_up_head")
    outcome = _begin(model, data, recipe, keep, mask, progress)
    parameters = list(outcome.tuning.parameters() if outcome.tuning else model.parameters())
    rate, decay = recipe.learning_rate, recipe.weight_decay
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    seconds: list[float] = []
    step = 0
    for epoch in range(recipe.epochs):
        losses: list[float] = []
        for rows in data.shuffled(recipe.batch_size, seed=recipe.seed + 1000 * epoch):
            if outcome.tuning and recipe.warm_up_head and step == recipe.warm_up_head:
                begin = perf_counter()
                outcome.tuning.set_mask(choose(model, data, recipe, keep, progress), optimizer)
                outcome.seconds_scoring = perf_counter() - begin
                seconds.clear()
            model.train()
            begin = perf_counter()
            losses.append(_step(model, data.batch(rows), optimizer, recipe.clip))
            schedule.step()
            seconds.append(perf_counter() - begin)
            step += 1
            progress("training", step, steps)
        record: dict[str, float] = {"epoch": epoch + 1, "step": step, "train_loss": sum(losses) / len(losses)}
        if validation is not None:
            record |= evaluate(model, validation)
        outcome.history.append(record)
        if log is not None:
            print(json.dumps(record), file=log, flush=True)
    model.eval()
    outcome.entries = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    outcome.seconds_per_step = median(seconds)
    outcome.peak_memory_bytes = peak_memory_bytes()
    return outcome


def _begin(
    model: nn.Module, data: Encoded, recipe: Recipe, keep: tuple[str, ...], mask: Mask | None, progress: Progress
) -> Outcome:
    """Choose what trains first: everything, the mask, or during the warm-up the kept parameters alone."""
    if recipe.method == "full":
        return Outcome(None, sum(p.numel() for p in model.parameters()))
    begin = perf_counter()
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


def choose(
    model: nn.Module,
    data: Encoded,
    recipe: Recipe,
    keep: tuple[str, ...],
    progress: Progress = lambda phase, done, total: None,
) -> Mask:
    """Choose the mask that the recipe asks for on the model as it is now."""
    model.eval()
    if recipe.method == "random":
        return Mask.random(model, recipe.density, recipe.seed, keep=keep, exclude=recipe.exclude)
    if recipe.method == "magnitude":
        return Mask.magnitude(model, recipe.density, keep=keep, exclude=recipe.exclude)
    if recipe.method == "biases":
        return Mask.biases(model, keep=keep)
    examples = min(recipe.examples, len(data))
    batches = data.sample(examples, recipe.batch_size, recipe.seed)
    scores = fisher(
        model,
        counted(batches, examples, progress),
        labels=recipe.labels,
        examples=examples,
        engine=recipe.engine,
        seed=recipe.seed,
    )
    return Mask.from_scores(scores, recipe.density, keep=keep, exclude=recipe.exclude)


def counted(batches: Iterator[dict[str, Tensor]], examples: int, progress: Progress) -> Iterator[dict[str, Tensor]]:
    """Hand the batches on and report the examples handed out as phase "scoring"."""
    done = 0
    for batch in batches:
        done += len(batch["input_ids"])
        progress("scoring", done, examples)
        yield batch


def _step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Take one optimizer step and return the loss."""
    loss: Tensor = model(**batch).loss
    if not loss.isfinite():
        raise FishError(f"the loss became {loss.item()}; try a lower learning rate")
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def predict(
    model: nn.Module,
    data: Encoded,
    batch_size: int = 64,
    progress: Progress = lambda phase, done, total: None,
) -> Tensor:
    """Return the model's logits ``[examples, classes]`` without dropout, in the order of ``data``."""
    model.eval()
    parts: list[tuple[list[int], Tensor]] = []
    done = 0
    with torch.inference_mode():
        for rows in data.in_order(batch_size):
            batch = {name: tensor for name, tensor in data.batch(rows).items() if name != "labels"}
            parts.append((rows, model(**batch).logits.float()))
            done += len(rows)
            progress("predicting", done, len(data))
    first = parts[0][1]
    outputs = first.new_empty(len(data), *first.shape[1:])
    for rows, logits in parts:
        outputs[rows] = logits
    return outputs.clone()


def evaluate(model: nn.Module, data: Encoded) -> dict[str, float]:
    """Return the quality of the model's predictions (see :func:`fishmask.measure.quality`)."""
    if data.targets is None:
        raise ValueError("evaluation needs examples with labels")
    return quality(predict(model, data), data.targets)
