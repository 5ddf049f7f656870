"""Choosing the entries to train, by every method that a recipe knows."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fishmask.attach import attach
from fishmask.compute import StepCosts, step_costs
from fishmask.data import Encoded
from fishmask.errors import FishError
from fishmask.fisher import scores
from fishmask.loop import Descent, Progress, no_progress, other_batches
from fishmask.mask import Mask
from fishmask.params import canonical_parameters, matching
from fishmask.quantized import weights
from fishmask.recipe import Recipe
from fishmask.select import budget, random_k, top_k


def choose(
    model: nn.Module, data: Encoded, recipe: Recipe, keep: tuple[str, ...] = (), progress: Progress = no_progress
) -> Mask:
    """Choose the mask that the recipe asks for on the model as it is now, and leave the model as it is.

    Args:
        model: The model.
        data: Training examples with targets.
        recipe: A recipe whose method chooses entries.
        keep: Patterns of parameters to train whole, counted in the budget.
        progress: Called with the phase, the examples or steps done, and how many there are.

    Raises:
        ValueError: The method trains no mask.
    """
    exclude, block = _excluded(model, data, recipe, keep), recipe.block or None
    if recipe.method == "random":
        return Mask.random(model, recipe.density, recipe.seed, keep=keep, exclude=exclude, block=block)
    if recipe.method == "magnitude":
        return Mask.magnitude(model, recipe.density, keep=keep, exclude=exclude, block=block)
    if recipe.method == "biases":
        return Mask.biases(model, keep=keep)
    if recipe.method == "movement":
        found = movement(model, data, recipe, progress)
    elif recipe.method in ("fish", "gradient", "snip"):
        found = _scores(model, data, recipe, progress)
    else:
        raise ValueError(f"method={recipe.method!r} chooses no entries by itself")
    return Mask.from_scores(found, recipe.density, keep=keep, exclude=exclude, block=block)


def check_frozen_below(model: nn.Module, data: Encoded, recipe: Recipe, keep: Sequence[str] = ()) -> None:
    """Refuse a recipe that may choose entries in the first block or before it, which a prefix cache needs frozen.

    Before anything is scored or trained, so what counts is what may be chosen, not what will be.

    Args:
        model: The model.
        data: Training examples.
        recipe: A recipe whose method chooses entries.
        keep: Patterns of parameters to train whole.

    Raises:
        FishError: There is such a parameter, or the model is no chain of blocks.
    """
    costs = _costs(model, data, recipe)
    left_out = set(matching(weights(model), _excluded(model, data, recipe, keep), "exclude"))
    if low := [name for name in costs.below(1) if name not in left_out]:
        raise FishError(
            f"a prefix cache needs everything up to {costs.chain}.0 frozen, but the mask may reach there ({low[0]} and "
            f"{len(low) - 1} others): set a step_budget below 1, or leave the first blocks out with exclude"
        )


def _excluded(model: nn.Module, data: Encoded, recipe: Recipe, keep: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of everything that may not be chosen."""
    exclude = (*recipe.exclude, *(outside_of_layers(model, keep) if recipe.among == "layers" else ()))
    if recipe.step_budget is None:
        return exclude
    cached = recipe.prefix_cache_bytes > 0
    return (*exclude, *_costs(model, data, recipe).excluded(recipe.step_budget, cached=cached))


def _costs(model: nn.Module, data: Encoded, recipe: Recipe) -> StepCosts:
    """Count the costs of a step on the batch of middling length."""
    lengths = data.in_order(recipe.batch_size)
    return step_costs(model, data.batch(lengths[len(lengths) // 2]))


def outside_of_layers(model: nn.Module, keep: Sequence[str] = ()) -> list[str]:
    """Name the parameters that are no weight matrices of the model's layers, the kept ones apart.

    A layer is a module with a number in its name, such as ``encoder.layer.3``; a weight matrix has two dimensions or
    more (a convolution's kernel is one).

    Raises:
        ValueError: The model has no such matrix.
    """
    parameters = weights(model)
    kept = set(matching(parameters, keep, "keep"))
    inside = {
        name for name, p in parameters.items() if p.dim() > 1 and any(part.isdecimal() for part in name.split("."))
    }
    if not inside - kept:
        raise ValueError(f"{type(model).__name__} has no weight matrix in a numbered layer; use among='all'")
    return [name for name in parameters if name not in inside | kept]


def _scores(model: nn.Module, data: Encoded, recipe: Recipe, progress: Progress) -> dict[str, Tensor]:
    examples = min(recipe.examples, len(data))
    method: Any = recipe.method
    if method == "fish":
        method = "fisher" if recipe.score == "square" else "absolute"
    return scores(
        model,
        counted(data.sample(examples, recipe.batch_size, recipe.seed), examples, progress),
        method=method,
        labels=recipe.labels,
        examples=examples,
        engine=recipe.engine,
        seed=recipe.seed,
    )


def narrow(
    model: nn.Module, data: Encoded, recipe: Recipe, keep: tuple[str, ...] = (), progress: Progress = no_progress
) -> tuple[Mask, dict[str, Tensor]]:
    """Choose the entries that move most when ``recipe.candidates`` times too many, drawn at random, are trained.

    This is "movement" at the cost of a sparse training: state for the candidates alone, no dense optimizer. It takes
    the first ``recipe.search_epochs`` epochs of the training, on the schedule of the whole.

    Returns:
        The mask, and the values that the kept parameters have learnt meanwhile, by name. All other entries of the model
        are as they were; so are those of the kept parameters until the caller writes the values.

    Raises:
        ValueError: Nothing is left to choose from (see ``Mask.random``).
        Diverged: The loss is not finite.
    """
    exclude = _excluded(model, data, recipe, keep)
    sizes = {name: p.numel() for name, p in weights(model).items()}
    kept, free, k = budget(sizes, recipe.density, keep, exclude)
    room = {name: sizes[name] for name in free}
    wide = random_k(room, min(recipe.candidates * k, sum(room.values())), recipe.seed)
    whole = {name: torch.arange(sizes[name]) for name in kept}
    tuning = attach(model, Mask.from_indices({**wide, **whole}))
    try:
        start = {name: values.detach().clone() for name, values in tuning.named_parameters()}
        per_epoch = math.ceil(len(data) / recipe.batch_size)
        descent = Descent(model, tuning.parameters(), recipe.search_rate, recipe.epochs * per_epoch, recipe)
        step = 0
        for epoch in range(recipe.search_epochs):
            for rows in data.shuffled(recipe.batch_size, seed=recipe.seed + 1000 * epoch):
                descent.step(data.batch(rows))
                step += 1
                progress("narrowing", step, recipe.search_epochs * per_epoch)
        end = {name: values.detach().clone() for name, values in tuning.named_parameters()}
    finally:
        tuning.revert()
        model.eval()
    moved = top_k({name: (end[name] - start[name]).abs() for name in wide}, k)
    chosen = {name: wide[name][places.cpu()] for name, places in moved.items()}
    return Mask.from_indices({**chosen, **whole}, model), {name: end[name] for name in kept}


def counted(batches: Iterator[dict[str, Tensor]], examples: int, progress: Progress) -> Iterator[dict[str, Tensor]]:
    """Hand the batches on and report the examples handed out as phase "scoring"."""
    done = 0
    for batch in batches:
        done += len(batch["input_ids"])
        progress("scoring", done, examples)
        yield batch


def movement(model: nn.Module, data: Encoded, recipe: Recipe, progress: Progress = no_progress) -> dict[str, Tensor]:
    """Score every entry by how far a dense training moves it, and rewind that training.

    Needs what dense training needs: gradients, two optimizer states and the starting weights, each as large as the
    model. It runs ``recipe.dense_epochs`` passes at ``recipe.dense_rate``.

    Returns:
        |w_after − w_before|, shaped like the parameters, by canonical name.

    Source:
        Ansell, Ponti, Korhonen, Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022 (LT-SFT).
    """
    parameters = canonical_parameters(model)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    steps = recipe.dense_epochs * math.ceil(len(data) / recipe.batch_size)
    descent = Descent(model, parameters.values(), recipe.dense_rate, steps, recipe)
    try:
        for step, batch in enumerate(islice(other_batches(data, recipe), steps), start=1):
            descent.step(batch)
            progress("dense training", step, steps)
        return {name: (p.detach() - start[name]).float().abs() for name, p in parameters.items()}
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(start[name])
                p.grad = None
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.eval()
