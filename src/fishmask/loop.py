"""One training step, the same for every method."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor, nn

from fishmask.data import Encoded
from fishmask.errors import Diverged
from fishmask.recipe import Precision, Recipe

Progress = Callable[[str, int, int], None]


def no_progress(phase: str, done: int, total: int) -> None:
    """Report nothing."""


class Descent:
    """AdamW whose learning rate falls linearly to zero over a known number of steps.

    Args:
        model: A model whose forward returns ``.loss``.
        parameters: What to train.
        rate: The first learning rate.
        steps: The number of steps.
        recipe: Weight decay, clipping and precision.
        first: How many of the steps are over already.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        rate: float,
        steps: int,
        recipe: Recipe,
        first: int = 0,
    ) -> None:
        self._model, self._recipe = model, recipe
        self._device = device_of(model)
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - (first + step) / steps)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Take one step and return the loss.

        Raises:
            Diverged: The loss is not finite.
        """
        self._model.train()
        with autocast(self._device, self._recipe.precision):
            loss: Tensor = self._model(**to_device(batch, self._device)).loss
        if not loss.isfinite():
            raise Diverged(f"the loss became {loss.item()}; try a lower learning rate")
        loss.backward()
        if self._recipe.clip:
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self._recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(loss.detach())


def other_batches(data: Encoded, recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """Yield batches without end, epoch after epoch, in another order than the training that follows."""
    for epoch in count():
        for rows in data.shuffled(recipe.batch_size, seed=recipe.seed + 1000 * epoch + 500):
            yield data.batch(rows)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context of a forward pass in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
