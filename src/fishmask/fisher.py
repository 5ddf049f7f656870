"""Scores of parameter entries: Fisher information and the simpler rules it is compared with."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fishmask.batches import Batch, cut, first_examples, size
from fishmask.engine_batched import BatchedEngine, Unsupported
from fishmask.engine_loop import LoopEngine
from fishmask.errors import FishError
from fishmask.guards import Guard, check_independence, left_as_found, require_gradients
from fishmask.likelihoods import Labels, Likelihood, Loss
from fishmask.params import canonical_parameters
from fishmask.quantized import dequantized
from fishmask.rules import ABSOLUTE, SQUARE, Power
from fishmask.sharded import refuse

Engine = Literal["auto", "batched", "loop"]
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
        progress: Show a progress bar on stderr.

    Returns:
        Float32 scores shaped like the parameters, by canonical name.

    Raises:
        ValueError: An argument or a batch is not what is described here, or there is no example.
        FishError: Dropout is active or BatchNorm uses batch statistics in eval mode; the model
            or the loss mixes examples; a score is not finite; or ``engine="batched"`` refuses.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = fisher(model, [(torch.randn(8, 2), torch.randint(3, (8,)))], examples=8)
        >>> {name: list(score.shape) for name, score in scores.items()}
        {'weight': [3, 2], 'bias': [3]}
    """
    likelihood = _checked(model, labels, examples, loss, engine, seed)
    with dequantized(model):
        return _example_sums(model, batches, likelihood, examples, engine, progress)


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
        progress: As for `fisher`.

    Returns:
        Float32 scores shaped like the parameters, by canonical name.

    Raises:
        ValueError: As for `fisher`, or ``batches`` is missing for a method that needs it.
        FishError: As for `fisher`.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    likelihood = _checked(model, labels, examples, loss, engine, seed, ABSOLUTE if method == "absolute" else SQUARE)
    with dequantized(model):
        parameters = canonical_parameters(model)
        if method == "random":
            return {
                name: torch.from_numpy(np.random.default_rng((seed, i)).random(tuple(p.shape), np.float32)).to(p.device)
                for i, (name, p) in enumerate(parameters.items())
            }
        if method == "magnitude":
            magnitudes = {name: p.detach().float().abs() for name, p in parameters.items()}
            _check_finite(magnitudes)
            return magnitudes
        if batches is None:
            raise ValueError(f"method={method!r} needs batches; only 'magnitude' and 'random' do without")
        if method in ("fisher", "absolute"):
            return _example_sums(model, batches, likelihood, examples, engine, progress)
        if labels == "expected":
            raise ValueError(f"labels='expected' makes every score of method={method!r} zero; use 'given' or 'sampled'")
        sums = _gradient_sums(model, batches, likelihood, examples, 1 if engine == "loop" else None, progress)
        for name, p in parameters.items():
            if method == "snip":
                sums[name] *= p.detach().float()
            sums[name].abs_()
        _check_finite(sums)
        return sums


def _example_sums(
    model: nn.Module,
    batches: Iterable[Batch],
    likelihood: Likelihood,
    examples: int,
    engine: Engine,
    progress: bool,
) -> dict[str, Tensor]:
    """Return the sum over examples of squared or absolute gradients, each example's on its own."""
    parameters = canonical_parameters(model)
    with left_as_found(model), _counter(progress, examples) as advance:
        scores = _zeros(parameters)
        run = _Run(model, parameters, likelihood, scores, engine)
        for first, batch in _taken(batches, examples, _device(model)):
            run.add(batch, first)
            advance(size(batch))
    _check_finite(scores)
    return scores


class _Run:
    """One scoring run: checks the first batch, picks the engine, falls back to the loop at most once."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        likelihood: Likelihood,
        scores: dict[str, Tensor],
        engine: Engine,
    ) -> None:
        self._model, self._likelihood, self._choice = model, likelihood, engine
        parts = (model, parameters, likelihood, scores)
        self._loop = LoopEngine(*parts)
        self._engine: BatchedEngine | LoopEngine = self._loop if engine == "loop" else BatchedEngine(*parts)
        self._checked_examples = 0

    def add(self, batch: Batch, first: int) -> None:
        try:
            if self._checked_examples < min(2, size(batch)):
                self._check(cut(batch, 0, min(2, size(batch))))
            require_gradients(self._model, self._engine is self._loop)
            self._engine.add(batch, first)
        except Unsupported as reason:
            if self._choice == "batched":
                raise FishError(
                    f"the batched engine cannot score this model exactly: {reason}; use engine='auto' or "
                    "engine='loop', which takes one example at a time"
                ) from None
            name = type(self._model).__name__
            message = f"{name} is scored one example at a time by the loop engine, because {reason}"
            warnings.warn(message, UserWarning, stacklevel=4)
            self._engine = self._loop
            require_gradients(self._model, True)
            self._loop.add(batch, first)

    def _check(self, few: Batch) -> None:
        """Check one example if the first batch has no more, and two as soon as there are two."""
        self._checked_examples = size(few)
        require_gradients(self._model, True)
        whole, alone = check_independence(self._model, few, self._likelihood)
        if isinstance(self._engine, BatchedEngine):
            require_gradients(self._model, False)
            self._engine.check(few, whole, alone)


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
    if isinstance(batches, Tensor | dict | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; wrap one batch: [batch]"
        )
    done = 0
    for first, batch in first_examples(batches, examples, device):
        yield first, batch
        done = first + size(batch)
    if done == 0:
        raise ValueError("batches has no examples; is it an iterator that was used up before?")
    if done < examples:
        message = f"only {done} examples were scored, because batches has no more; examples={examples} were asked for"
        warnings.warn(message, UserWarning, stacklevel=4)


def _check_finite(scores: dict[str, Tensor]) -> None:
    # One pass over each tensor; only a sum that is not finite needs the closer look (it may just be large).
    doubtful = [name for name, score in scores.items() if not bool(score.sum().isfinite())]
    bad = [name for name in doubtful if not bool(scores[name].isfinite().all())]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise FishError(
            f"scores must be finite, but those of {shown} are not: a weight, an input or a gradient is infinite or "
            "not a number, or too large for its dtype; check the model on this data, or score it in float32"
        )


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
