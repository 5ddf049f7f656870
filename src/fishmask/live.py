"""The tunings of this process: which model is attached by which, and the optimizers that train them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fishmask.carry import refuse_retired
from fishmask.errors import FishError

if TYPE_CHECKING:
    from fishmask.attach import Tuning

LIVE: "WeakSet[Tuning]" = WeakSet()
TRAINERS = "for transformers.Trainer, accelerate, TRL and Lightning wrap the attached model: fishmask.FishModel(model)"


def is_attached(model: nn.Module) -> bool:
    """Whether ``model`` shares a parameter with a model that is attached."""
    return bool(_tunings_of(model))


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Take the gradient of the weights themselves, as on a model that is not attached, to score it in mid-training."""
    tunings = _tunings_of(model)
    for tuning in tunings:
        tuning._write_changes()
        tuning._pause(True)
    try:
        yield
    finally:
        for tuning in tunings:
            tuning._pause(False)


def tuning_of(model: nn.Module) -> "Tuning | None":
    """Return the tuning that ``model``, or a wrapper of it, is attached by; None when it is not attached.

    Raises:
        ValueError: Several parts of it are attached apart.
    """
    tunings = _tunings_of(model)
    if len(tunings) > 1:
        raise ValueError(f"{len(tunings)} parts of this model are attached apart; pass the Tuning that is meant")
    return tunings[0] if tunings else None


def _tunings_of(model: nn.Module) -> "list[Tuning]":
    own = {id(p) for p in model.parameters()}
    return [tuning for tuning in list(LIVE) if any(id(p) in own for p in tuning.model.parameters())]


@cache
def hook_optimizers() -> None:
    """Have every optimizer of the process write values back after its step."""

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refuse_retired(optimizer)
        _refuse_idle(optimizer)
        for tuning in _trained_by(optimizer):
            tuning._check_present()
            tuning._stepping = True  # a closure runs forwards inside the step

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The version of a tensor does not tell: fused optimizers on the CPU change it unnoticed.
        for tuning in _trained_by(optimizer):
            tuning._stepping = False
            tuning.write_back()
            tuning._expect_cleared(optimizer)
            if tuning._step_hooks and tuning._counts(optimizer):
                for hook in list(tuning._step_hooks.values()):
                    hook(optimizer)

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)


def _trained_by(optimizer: Optimizer) -> "list[Tuning]":
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [tuning for tuning in list(LIVE) if any(id(values) in held for values in tuning.parameters())]


def _refuse_idle(optimizer: Optimizer) -> None:
    """Refuse the optimizer that a trainer has made of an attached model's frozen weights, or of those not frozen."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.grad is not None for p in held):
        return
    waiting = [tuning for tuning in list(LIVE) if any(values.grad is not None for values in tuning.parameters())]
    own = {id(p) for tuning in waiting for p in tuning.model.parameters()}
    if waiting and (not held or any(id(p) in own for p in held)):
        raise FishError(
            "this optimizer has nothing to train, while the values of an attached model wait for a step: they are not "
            f"among model.parameters(). Build it from tuning.parameters(); {TRAINERS}"
        )
