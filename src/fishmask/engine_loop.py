"""The reference engine: one example at a time by plain autograd. Exact for every model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishmask.batches import Batch, cut, size
from fishmask.guards import Guard
from fishmask.likelihoods import Likelihood
from fishmask.sums import Sums


class LoopEngine:
    """Adds each example's squared or absolute gradients to sums; the parameters must require gradients.

    Args:
        model: The model.
        parameters: Its parameters by canonical name.
        likelihood: What is differentiated.
        sums: The sums of those parameters that are scored.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], likelihood: Likelihood, sums: Sums
    ) -> None:
        self.model, self.likelihood, self.sums = model, likelihood, sums
        self._scored = {name: parameters[name] for name in sums.tensors}

    def add(self, batch: Batch, first: int) -> None:
        """Score the examples of ``batch``; the first of them is number ``first`` of the run."""
        for n in range(size(batch)):
            with Guard(self.model):
                evaluation = self.likelihood(self.model, cut(batch, n, n + 1), first + n)
            if not evaluation.output.requires_grad:
                continue  # this example went a way through the model that uses no parameter
            for number, cotangent in enumerate(evaluation.cotangents(), start=1):
                more = number < evaluation.passes
                self._add_powers(evaluation.output, cotangent, keep_graph=more)

    def _add_powers(self, output: Tensor, cotangent: Tensor, keep_graph: bool) -> None:
        gradients = torch.autograd.grad(
            output, list(self._scored.values()), cotangent, retain_graph=keep_graph, allow_unused=True
        )
        for name, gradient in zip(self._scored, gradients, strict=True):
            if gradient is not None:
                dense = gradient.to_dense() if gradient.is_sparse else gradient  # Embedding(sparse=True)
                # Not in place: autograd may hand out the same memory twice, or memory that it still needs.
                with self.sums.adding(name) as total:
                    total.add_(self.likelihood.power.of(dense.float()))
