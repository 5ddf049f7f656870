"""Scores of parameter entries: Fisher information and the simpler rules it is compared with."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fishmask.batches import Batch, cut, first_examples, size
from fishmask.errors import FishError
from fishmask.guards import Guard, check_independence, left_as_found, require_gradients
from fishmask.likelihoods import Labels, Likelihood, Loss
from fishmask.params import canonical_parameters
from fishmask.quantized import dequantized
from fishmask.rules import ABSOLUTE, SQUARE, Power
from fishmask.scoring import Engine, Scoring, check_finite, checked_batches
from fishmask.sharded import refuse
from fishmask.sums import Place

Method = Literal["fisher", "absolute", "gradient", "snip", "magnitude", "random"]


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: Labels = "given",
    examples: int = 1024,
    loss: Loss | None = None,
    engine: Engine = "auto",
    seed: int = 0,
    memory: int | None = None,
    sums: Place = "device",
    folder: str | PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Score every parameter entry by its diagonal Fisher information.

    The score is the sum, not the mean, over examples n of (d log p(y_n | x_n) / d theta)², exact to float32 rounding.
    For an example with several positions, log p is the sum over its positions. All floating-point parameters are
    scored, frozen ones too; one that the output does not depend on gets zeros. The model is scored in eval mode and
    left as it was found. Quantized linear layers are scored as plain ones with their dequantized weights.

    Args:
        model: A Hugging Face model, or any module together with what ``batches`` and ``loss`` say.
        batches: Hugging Face dict batches with ``labels``, or tuples (inputs, targets): integer targets are classes
            over the output's last dimension, float targets of the output's shape are regression targets.
        labels: "given", as in the data (the empirical Fisher); "expected", the exact expectation under the model's own
            predictions (C - 1 backward passes for C classes); "sampled", one label drawn from them for each example.
        examples: How many examples to use; the last batch is cut. With fewer there is a warning.
        loss: Your own function (model, batch) -> one negative log-likelihood per example, shape [B].
        engine: "batched" is fast and refuses what it cannot prove exact, "loop" takes one example at a time and
            handles every model, "auto" is "batched" and, where that refuses, a warning and "loop".
        seed: Decides the labels of "sampled", together with the number of the example alone.
        memory: Bytes that the running sums may take at once, four for each entry. Where those of all parameters take
            more, the examples are gone through several times, each time for some of the parameters.
        sums: "device", beside the model, or "cpu", which costs a transfer of the sums for every batch.
        folder: A folder to keep finished passes in, and from time to time the sums of the one under way. After an
            interruption the same call goes on from there, to the same bits.
        progress: Show a progress bar on stderr.

    Returns:
        Float32 scores shaped like the parameters, by canonical name. With ``folder`` they are mapped from its files,
        so they take no memory before they are read; after several passes without one they are on the CPU.

    Raises:
        ValueError: An argument or a batch is not what is described here, or there is no example.
        FishError: Dropout is active or BatchNorm uses batch statistics in eval mode; the model
            or the loss mixes examples; a score is not finite; ``engine="batched"`` refuses; the batches of a later
            pass are others; or ``folder`` holds another scoring or a damaged file, is in use, or is given with a
            ``loss`` that holds something whose content cannot be compared.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = fisher(model, [(torch.randn(8, 2), torch.randint(3, (8,)))], examples=8)
        >>> {name: list(score.shape) for name, score in scores.items()}
        {'weight': [3, 2], 'bias': [3]}
    """
    with (
        prepared(
            model,
            batches,
            labels=labels,
            examples=examples,
            loss=loss,
            engine=engine,
            seed=seed,
            memory=memory,
            sums=sums,
            folder=folder,
        ) as scoring,
        _counter(progress, scoring.steps) as advance,
    ):
        return scoring.run(advance)


@contextmanager
def prepared(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: Literal["fisher", "absolute"] = "fisher",
    labels: Labels = "given",
    examples: int = 1024,
    loss: Loss | None = None,
    engine: Engine = "auto",
    seed: int = 0,
    memory: int | None = None,
    sums: Place = "device",
    folder: str | PathLike[str] | None = None,
) -> Iterator[Scoring]:
    """Prepare what `fisher` does, so that it can be asked what it will take before it starts.

    Args:
        model: As for `fisher`, like all that is not named here.
        batches: As for `fisher`; for a plan they must be there to be gone through again: a list or a loader.
        method: "fisher" or "absolute"; see `scores`.
        labels: As for `fisher`.
        examples: As for `fisher`.
        loss: As for `fisher`.
        engine: As for `fisher`.
        seed: As for `fisher`.
        memory: As for `fisher`.
        sums: As for `fisher`.
        folder: As for `fisher`; what is finished there already is left out of the plan.

    Yields:
        The scoring: ``plan()`` tells passes, bytes and time, ``run()`` returns the scores.

    Raises:
        ValueError: As for `fisher`.
        FishError: As for `fisher`.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> with prepared(model, [(torch.randn(8, 2), torch.randint(3, (8,)))], examples=8, memory=24) as scoring:
        ...     passes, scores = scoring.plan().passes, scoring.run()
        >>> passes
        (1, 1)
    """
    power = ABSOLUTE if method == "absolute" else SQUARE
    likelihood = _checked(model, labels, examples, loss, engine, seed, power)
    with dequantized(model):
        scoring = Scoring(model, batches, likelihood, examples, engine, memory=memory, place=sums, folder=folder)
        with closing(scoring):
            yield scoring


def scores(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    method: Method = "fisher",
    labels: Labels = "given",
    examples: int = 1024,
    loss: Loss | None = None,
    engine: Engine = "auto",
    seed: int = 0,
    memory: int | None = None,
    sums: Place = "device",
    folder: str | PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Score every parameter entry by one of several methods.

    Args:
        model: As for `fisher`.
        batches: As for `fisher`; "magnitude" and "random" need none.
        method: "fisher" (`fisher`); "absolute", the same sum with |d log p / d theta| in place of its square;
            "gradient", |g| for g the gradient of -log p summed over the examples; "snip", |w g|; "magnitude", |w|;
            "random", uniform in [0, 1) and decided by ``seed`` alone.
        labels: As for `fisher`. "expected" is for "fisher" and "absolute" only, since the expectation of g is zero; for
            "absolute" it takes one pass for each class (one for two classes), and an example must have one label.
        examples: As for `fisher`.
        loss: As for `fisher`.
        engine: As for `fisher`; for "gradient" and "snip", "loop" takes examples singly and the others whole batches.
        seed: As for `fisher`, and of "random".
        memory: As for `fisher`, for "fisher" and "absolute"; so are ``sums`` and ``folder``.
        sums: As for `fisher`.
        folder: As for `fisher`.
        progress: As for `fisher`.

    Returns:
        Float32 scores shaped like the parameters, by canonical name.

    Raises:
        ValueError: As for `fisher`, or ``batches`` is missing for a method that needs it.
        FishError: As for `fisher`.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    likelihood = _checked(model, labels, examples, loss, engine, seed)
    if method not in ("fisher", "absolute") and (memory, sums, folder) != (None, "device", None):
        raise ValueError(f"memory, sums and folder are for the methods 'fisher' and 'absolute', not for {method!r}")
    if batches is None and method not in ("magnitude", "random"):
        raise ValueError(f"method={method!r} needs batches; only 'magnitude' and 'random' do without")
    if batches is not None and method in ("fisher", "absolute"):
        with (
            prepared(
                model,
                batches,
                method=method,
                labels=labels,
                examples=examples,
                loss=loss,
                engine=engine,
                seed=seed,
                memory=memory,
                sums=sums,
                folder=folder,
            ) as scoring,
            _counter(progress, scoring.steps) as advance,
        ):
            return scoring.run(advance)
    with dequantized(model):
        parameters = canonical_parameters(model)
        if method == "random":
            return {
                name: torch.from_numpy(np.random.default_rng((seed, i)).random(tuple(p.shape), np.float32)).to(p.device)
                for i, (name, p) in enumerate(parameters.items())
            }
        if method == "magnitude":
            magnitudes = {name: p.detach().float().abs() for name, p in parameters.items()}
            check_finite(magnitudes)
            return magnitudes
        if labels == "expected":
            raise ValueError(f"labels='expected' makes every score of method={method!r} zero; use 'given' or 'sampled'")
        assert batches is not None
        found = _gradient_sums(model, batches, likelihood, examples, 1 if engine == "loop" else None, progress)
        for name, p in parameters.items():
            if method == "snip":
                found[name] *= p.detach().float()
            found[name].abs_()
        check_finite(found)
        return found


def _gradient_sums(
    model: nn.Module,
    batches: Iterable[Batch],
    likelihood: Likelihood,
    examples: int,
    at_once: int | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Return the gradient of -log p, summed over examples."""
    parameters = canonical_parameters(model)
    with left_as_found(model), _counter(progress, examples) as advance:
        sums = _zeros(parameters)
        require_gradients(model, True)
        checked = 0
        for first, batch in _taken(batches, examples, _device(model)):
            count = size(batch)
            if checked < min(2, count):
                checked = min(2, count)
                check_independence(model, cut(batch, 0, checked), likelihood)
            for start in range(0, count, at_once or count):
                with Guard(model):
                    part = cut(batch, start, min(count, start + (at_once or count)))
                    evaluation = likelihood(model, part, first + start)
                (cotangent,) = evaluation.cotangents()
                gradients = torch.autograd.grad(
                    evaluation.output, list(parameters.values()), cotangent, allow_unused=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += gradient
            advance(count)
    return sums


def _checked(
    model: nn.Module,
    labels: Labels,
    examples: int,
    loss: Loss | None,
    engine: Engine,
    seed: int,
    power: Power = SQUARE,
) -> Likelihood:
    """Validate the arguments before any work."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, known in (("labels", labels, Labels), ("engine", engine, Engine)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"examples must be a positive integer, got {examples!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function (model, batch) -> losses of shape [B], got {type(loss).__name__}")
    if loss is not None and labels != "given":
        raise ValueError(
            f"labels={labels!r} needs the distribution that the model predicts, which a loss of your own does not "
            "tell; leave loss out, or use labels='given'"
        )
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise FishError(
            f"{type(model).__name__} was made under torch.inference_mode(), so no gradients can be taken; make it "
            "outside, or load its state_dict into one that is"
        )
    refuse(model, "scoring")
    if not canonical_parameters(model):
        raise ValueError(f"{type(model).__name__} has no floating-point parameters to score")
    return Likelihood(labels, loss, seed, power)


def _zeros(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}


def _device(model: nn.Module) -> torch.device:
    return next(iter(canonical_parameters(model).values())).device


def _taken(batches: Iterable[Batch], examples: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Yield batches up to ``examples``; warn about fewer, refuse none."""
    done = 0
    for first, batch in first_examples(checked_batches(batches), examples, device):
        yield first, batch
        done = first + size(batch)
    if done == 0:
        raise ValueError("batches has no examples; is it an iterator that was used up before?")
    if done < examples:
        message = f"only {done} examples were scored, because batches has no more; examples={examples} were asked for"
        warnings.warn(message, UserWarning, stacklevel=4)


@contextmanager
def _counter(progress: bool, examples: int) -> Iterator[Any]:
    """Give a function that counts examples, with a bar on stderr if wanted."""
    if not progress:
        yield lambda count: None
        return
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("examples"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=examples)
        yield lambda count: bar.advance(task, count)
