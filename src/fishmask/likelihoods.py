"""Per-example log-likelihoods, as an output of the model and the cotangents to pull back through it.

The score of a parameter entry is a sum of squared or absolute derivatives. For each example n and each cotangent a,
shaped like the model's output z, it gains (d <a[n], z[n]> / d theta)², or the absolute value. One cotangent,
d(-log p)/dz, gives the gradient of a given or sampled label. For the expectation of squares over the labels,
sum_y p(y) g_y², any square root of the Fisher matrix of z serves as the set of cotangents; the Cholesky factor of
diag(p) - p pᵀ has one column fewer than there are classes. The expectation of absolute values, sum_y p(y) |g_y|, has no
such root: it takes p(y) d(-log p(y))/dz for every label y.

Sums, never means: an example with several positions has the log-likelihood of its whole sequence, the sum over its
positions.

Shapes: B examples, M positions in an example (1 for a classifier), C classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fishmask.batches import Batch, size
from fishmask.rules import ABSOLUTE, SQUARE, Power

Labels = Literal["given", "expected", "sampled"]
Loss = Callable[[nn.Module, Batch], Tensor]
Kind = Literal["categories", "gaussian", "bernoulli"]

IGNORED = -100
MOST_PASSES = 10_000
CLASSIFIERS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
OWN_LOSS = "pass loss=, a function (model, batch) -> losses of shape [B]"


@dataclass(frozen=True)
class Evaluation:
    """The model's output on a batch, and what to pull back through it.

    Attributes:
        output: The tensor to differentiate; its first dimension is the examples.
        passes: How many cotangents there are.
        cotangents: Makes the cotangents one by one, each shaped like ``output``.
    """

    output: Tensor
    passes: int
    cotangents: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Likelihood:
    """How labels enter the score.

    Attributes:
        labels: The convention, as for `fishmask.fisher`.
        loss: A user's own loss, if any.
        seed: Decides sampled labels.
        power: Whether gradients are squared or taken absolute, which differ in the expectation over labels.
    """

    labels: Labels = "given"
    loss: Loss | None = None
    seed: int = 0
    power: Power = SQUARE

    def __call__(self, model: nn.Module, batch: Batch, first: int) -> Evaluation:
        """Run the model on ``batch``, whose first example is number ``first`` of the whole run."""
        if self.loss is not None:
            losses = _own_losses(self.loss, model, batch)
            return Evaluation(losses, 1, lambda: iter([torch.ones_like(losses)]))
        inputs, targets = _split(batch)
        output = _output(_run(model, inputs, targets))
        count = size(batch)
        if output.dim() == 0 or output.shape[0] != count:
            raise ValueError(
                f"the model's output must have one row per example: expected [{count}, ...], got {list(output.shape)}"
            )
        problem = _problem(model, output.detach(), targets, inputs)
        if self.labels == "given":
            given = problem.given()
            return Evaluation(output, 1, lambda: iter([given.to(output.dtype)]))
        if self.labels == "sampled":
            sampled = problem.sampled(self.seed, first)
            return Evaluation(output, 1, lambda: iter([sampled.to(output.dtype)]))
        absolute = self.power is ABSOLUTE
        passes = problem.passes_absolute() if absolute else problem.passes()
        if passes > MOST_PASSES:
            raise ValueError(
                f"labels='expected' would take {passes:,} backward passes for every batch (one per position and "
                f"class; at most {MOST_PASSES:,} are done); use labels='sampled', which takes one"
            )
        expected = problem.expected_absolute if absolute else problem.expected
        return Evaluation(output, passes, lambda: (a.to(output.dtype) for a in expected()))


@dataclass(frozen=True)
class Problem:
    """A distribution of labels given the model's output, and the labels that came.

    Attributes:
        kind: "categories" over the last dimension, or one "gaussian" (unit variance) or "bernoulli" per output.
        output: The model's output, detached.
        targets: The labels, shaped for ``kind``; None where none came.
        counted: For categories, [B, *positions], true where a position counts.
    """

    kind: Kind
    output: Tensor
    targets: Tensor | None
    counted: Tensor | None = None

    def given(self) -> Tensor:
        """Return d(-log p(label))/d output."""
        if self.targets is None:
            raise ValueError("labels='given' needs labels, but the batch has none; add them or use labels='sampled'")
        return self._residual(self.targets)

    def sampled(self, seed: int, first: int) -> Tensor:
        """Return the same for labels drawn from the model, by numbers that depend on seed and example index only."""
        shape = self.output.shape[:-1] if self.kind == "categories" else self.output.shape
        generators = [np.random.default_rng((seed, first + n)) for n in range(shape[0])]
        count = math.prod(shape[1:])
        if self.kind == "gaussian":  # output - sample
            drawn = np.stack([g.standard_normal(count) for g in generators])
            return torch.from_numpy(drawn).to(self.output.device).view(shape)
        uniform = torch.from_numpy(np.stack([g.random(count) for g in generators])).to(self.output.device).view(shape)
        if self.kind == "bernoulli":
            return self._residual((uniform < self.output.double().sigmoid()).double())
        below = self.output.double().softmax(-1).cumsum(-1) < uniform[..., None]
        return self._residual(below.sum(-1).clamp_(max=self.output.shape[-1] - 1))

    def passes(self) -> int:
        """Return the number of cotangents of the expectation of squares over labels."""
        if self.counted is None:
            return math.prod(self.output.shape[1:])
        most = int(self.counted.flatten(1).sum(1).max()) if self.counted.dim() > 1 else 1
        return most * (self.output.shape[-1] - 1)

    def expected(self) -> Iterator[Tensor]:
        """Yield a square root of the Fisher matrix of the output, column by column."""
        if self.counted is not None:
            yield from _categorical_columns(self.output, self.counted)
            return
        flat = self.output.double().flatten(1) if self.output.dim() > 1 else self.output.double()[:, None]
        scale = torch.ones_like(flat) if self.kind == "gaussian" else (flat.sigmoid() * (-flat).sigmoid()).sqrt()
        for d in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, d] = scale[:, d]
            yield column.view(self.output.shape)

    def passes_absolute(self) -> int:
        """Return the number of cotangents of the expectation of absolute values; refuse more labels than one."""
        labels = math.prod(self.output.shape[1:])
        if self.counted is not None:
            labels = int(self.counted.flatten(1).sum(1).max()) if self.counted.dim() > 1 else 1
        if labels > 1:
            raise ValueError(
                f"labels='expected' with method='absolute' needs one label for each example, got {labels}: the "
                "absolute value of a sum over labels has no expectation that is a sum of passes; use labels='given' or "
                "'sampled'"
            )
        classes = self.output.shape[-1]
        return classes if self.counted is not None and classes > 2 else 1

    def expected_absolute(self) -> Iterator[Tensor]:
        """Yield p(label) times the derivative of -log p(label), for one label after the other.

        Two labels have the same up to sign, so one pass of double weight serves both. The gaussian's labels are the
        mean plus normal noise, of mean absolute value sqrt(2 / pi).
        """
        if self.kind == "gaussian":
            yield torch.full_like(self.output, math.sqrt(2 / math.pi), dtype=torch.float64)
        elif self.kind == "bernoulli":
            z = self.output.double()
            yield 2 * z.sigmoid() * (-z).sigmoid()
        else:
            p = self.output.double().softmax(-1)
            passes = self.passes_absolute()
            for c in range(passes):
                weight = (2 if p.shape[-1] == 2 else 1) * p[..., c, None]
                yield weight * self._residual(torch.full(p.shape[:-1], c, device=p.device))

    def _residual(self, labels: Tensor) -> Tensor:
        """Return mean - label: the derivative of -log p by the output, for all three kinds."""
        if self.kind == "gaussian":
            return self.output.double() - labels
        if self.kind == "bernoulli":
            return self.output.double().sigmoid() - labels
        assert self.counted is not None
        residual = self.output.double().softmax(-1)
        place = labels.where(self.counted, 0)[..., None]
        residual.scatter_add_(-1, place, torch.full_like(place, -1.0, dtype=residual.dtype))
        return residual * self.counted[..., None]


def _categorical_columns(output: Tensor, counted: Tensor) -> Iterator[Tensor]:
    """Yield Cholesky columns of diag(p) - p pᵀ, position by position; every example's j-th counted one together.

    Column c, with what is left q_c = 1 - p_0 - ... - p_c: sqrt(p_c q_c / q_{c-1}) at c, and times -p_i / q_c at i > c
    (Tanabe and Sagae 1992).
    """
    B, C = output.shape[0], output.shape[-1]
    p = output.double().softmax(-1).view(B, -1, C)
    counted = counted.reshape(B, -1)
    # Summed from the end, so that what is left stays exact when it is small.
    left = p.flip(-1).cumsum(-1).flip(-1)  # left[c] = p_c + ... + p_{C-1} = q_{c-1}
    after = torch.cat([left[..., 1:], torch.zeros_like(left[..., :1])], -1)
    order = counted.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    rows = torch.arange(B, device=p.device)
    for j in range(int(counted.sum(1).max())):
        at = order[:, j]
        live = counted[rows, at].double()
        for c in range(C - 1):
            here, rest = p[rows, at, c], after[rows, at, c]
            # A class of probability 0 contributes an all-zero column, never 0/0.
            diagonal = (here * rest / left[rows, at, c].clamp(min=1e-300)).sqrt() * live
            column = torch.zeros_like(p)
            column[rows, at, c] = diagonal
            column[rows, at, c + 1 :] = -(diagonal / rest.clamp(min=1e-300))[:, None] * p[rows, at, c + 1 :]
            yield column.view(output.shape)


def _own_losses(loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    losses = loss(model, batch)
    count = size(batch)
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss must return a tensor of one loss per example, got {type(losses).__name__}")
    if losses.shape != (count,):
        hint = "; use reduction='none'" if losses.dim() == 0 else ""
        raise ValueError(f"loss must return one loss per example, shape [{count}], got {list(losses.shape)}{hint}")
    return losses


def _split(batch: Batch) -> tuple[Any, Tensor | None]:
    """Take the labels out of a batch."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(f"batch['labels'] must be a tensor, got {type(labels).__name__}")
        return {key: value for key, value in batch.items() if key != "labels"}, labels
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise TypeError(
        f"a batch must be a dict with 'labels' or a tuple (inputs, targets), got {_told(batch)}; {OWN_LOSS}"
    )


def _told(batch: Batch) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of ({', '.join(type(item).__name__ for item in batch)})"
    return type(batch).__name__


def _run(model: nn.Module, inputs: Any, targets: Tensor | None) -> Any:
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
        decoder_given = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if _is_seq2seq_lm(model) and targets is not None and shift is not None and not decoder_given:
            inputs["decoder_input_ids"] = shift(labels=targets)
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _output(result: Any) -> Tensor:
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", result)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"the model must return a tensor, or have one as .logits, got {_told(result)}; {OWN_LOSS}")
    return logits


def _problem(model: nn.Module, output: Tensor, targets: Tensor | None, inputs: Any) -> Problem:
    """Choose the distribution: by what a Hugging Face model says of itself, else by shapes and dtypes."""
    if not hasattr(model, "loss_type") or not hasattr(model, "config"):
        return _problem_by_shape(output, targets)
    loss_type = model.loss_type
    if loss_type in CLASSIFIERS:
        return _sequence_problem(model, output, targets)
    if loss_type in ("ForTokenClassification", "ForMaskedLM") or _is_seq2seq_lm(model):
        return _categories(output, targets, _counted(output, targets, inputs))
    if _is_causal_lm(model):
        following = None if targets is None else _shifted(targets, IGNORED)
        counted = _shifted(_counted(output, targets, inputs), 0)
        return _categories(output, following, counted)
    if loss_type is None:
        return _problem_by_shape(output, targets)
    raise ValueError(f"no likelihood is known for {type(model).__name__} (its loss is {loss_type}); {OWN_LOSS}")


def _is_seq2seq_lm(model: nn.Module) -> bool:
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return encoder_decoder and getattr(model, "loss_type", None) not in CLASSIFIERS


def _is_causal_lm(model: nn.Module) -> bool:
    named = type(model).__name__.endswith("LMHeadModel")  # GPT-2's generation: loss_type is None
    return model.loss_type in ("ForCausalLM", "ForConditionalGeneration") or (model.loss_type is None and named)


def _shifted(values: Tensor, end: int) -> Tensor:
    """Position i takes the value of i + 1: what a causal language model predicts there."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], end)], 1)


def _counted(output: Tensor, targets: Tensor | None, inputs: Any) -> Tensor:
    """Which positions count: those with a label, or without labels those that the attention mask keeps."""
    if targets is not None:
        return targets != IGNORED
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == output.shape[:-1]:
        return mask.bool()
    return torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)


def _sequence_problem(model: nn.Module, output: Tensor, targets: Tensor | None) -> Problem:
    """One label, number or set of labels per example: the same cases as the model's own loss."""
    config: Any = model.config
    problem = config.problem_type
    if problem is None:
        single = targets is None or not targets.is_floating_point()
        problem = "single_label" if single else "multi_label"
        problem = "regression" if config.num_labels == 1 else problem
    if problem == "regression":
        return Problem("gaussian", output, None if targets is None else _like(output, targets))
    if problem.startswith("multi_label"):
        return Problem("bernoulli", output, None if targets is None else _like(output, targets))
    if targets is not None and targets.shape == (output.shape[0], 1):
        targets = targets.squeeze(1)
    return _categories(output, targets, None if targets is None else targets != IGNORED)


def _problem_by_shape(output: Tensor, targets: Tensor | None) -> Problem:
    if targets is None:
        raise ValueError(f"the batch has no labels, so its likelihood is not known; add labels, or {OWN_LOSS}")
    if targets.is_floating_point():
        return Problem("gaussian", output, _like(output, targets))
    return _categories(output, targets, targets != IGNORED)


def _like(output: Tensor, targets: Tensor) -> Tensor:
    """Give float targets the output's shape; only a last dimension of 1 may be missing or too many."""
    if targets.shape == output.shape:
        return targets.double()
    if targets.shape == output.squeeze(-1).shape or targets.squeeze(-1).shape == output.shape:
        return targets.double().view(output.shape)
    raise ValueError(
        f"targets must have the output's shape {list(output.shape)}, got {list(targets.shape)} "
        f"({str(targets.dtype).removeprefix('torch.')}); reshape them, or {OWN_LOSS}"
    )


def _categories(output: Tensor, targets: Tensor | None, counted: Tensor | None) -> Problem:
    shape, classes = output.shape[:-1], output.shape[-1]
    if counted is None:
        counted = torch.ones(shape, dtype=torch.bool, device=output.device)
    if targets is None:
        return Problem("categories", output, None, counted)
    if targets.is_floating_point() or targets.shape != shape or output.dim() < 2:
        raise ValueError(
            f"for outputs of shape {list(output.shape)} (classes last) labels must be integers of shape {list(shape)}, "
            f"got {str(targets.dtype).removeprefix('torch.')} of shape {list(targets.shape)}; {OWN_LOSS}"
        )
    targets = targets.long()
    chosen = targets[counted]
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < classes:
        raise ValueError(
            f"labels must lie in 0 to {classes - 1} ({IGNORED} is ignored), got {int(chosen.min())} to "
            f"{int(chosen.max())}"
        )
    return Problem("categories", output, targets, counted)
