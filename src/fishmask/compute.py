"""What a training step costs by layer, and how far down a mask may reach within a budget of step time.

A model is seen as a chain: what runs before its numbered blocks, the blocks one after another, what runs after them.
Costs are multiply-adds counted in one forward, so the same model and batch shape give the same mask on every machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fishmask.batches import Batch, cut, to_device
from fishmask.errors import FishError
from fishmask.live import paused
from fishmask.params import aliases

BEFORE = -1  # the place of what runs before the first block


@dataclass(frozen=True)
class StepCosts:
    """What a forward costs by layer, and where each parameter is used.

    Attributes:
        chain: The name of the list of blocks, such as ``bert.encoder.layer``.
        before: Floating-point operations of one example before the first block.
        blocks: Those of each block.
        after: Those after the last block.
        places: By canonical name of the parameter the first block that cannot run without it: -1 before the blocks,
            0 to n - 1 for the blocks, n after them.
    """

    chain: str
    before: float
    blocks: tuple[float, ...]
    after: float
    places: dict[str, int]

    def step(self, lowest: int, cached: bool = False) -> float:
        """Return the cost of a step whose mask has its lowest entry in block ``lowest``, as a share of the plain step.

        The forward counts once; the backward counts what lies at ``lowest`` or above once more, for the gradient of the
        layers' inputs. The gradient of the masked entries is not counted: it is a few per cent of a step.

        Args:
            lowest: 0 for the first block, n for a mask of nothing but what runs after the blocks.
            cached: Whether the blocks below come from a ``PrefixCache``.

        Returns:
            The share, where 1 is a step with entries in the first block and without a cache.
        """
        above = sum(self.blocks[max(lowest, 0) :]) + self.after
        whole = self.before + sum(self.blocks) + self.after
        forward = self.before + above if cached else whole
        return (forward + above) / (whole + whole - self.before)

    def lowest(self, budget: float, cached: bool = False) -> int:
        """Return the lowest block that a mask may reach: in a chain the deepest choice has all others within it.

        Args:
            budget: The step's cost, as for ``step``.
            cached: Whether the blocks below come from a ``PrefixCache``.

        Returns:
            -1 if the mask may have entries everywhere, else 0 to n.

        Raises:
            ValueError: The budget is no fraction in (0, 1], or less than the cheapest mask costs.
        """
        if not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(
                f"step_budget is a share of the plain mask's step, in (0, 1], such as 0.5 for half; got {budget!r}"
            )
        n = len(self.blocks)
        if budget == 1:
            return BEFORE
        least = self.step(n, cached)
        if least > budget:
            raise ValueError(
                f"step_budget={budget} is less than any mask of this model costs: one that trains only what comes "
                f"after {self.chain} takes {least:.3f} of the plain step {'with' if cached else 'without'} a prefix "
                f"cache; use at least {_up(least)}"
            )
        return next(lowest for lowest in range(n + 1) if self.step(lowest, cached) <= budget)

    def excluded(self, budget: float, cached: bool = False) -> tuple[str, ...]:
        """Name the parameters that a mask within a budget leaves alone; arguments as for ``lowest``."""
        return self.below(self.lowest(budget, cached))

    def below(self, lowest: int) -> tuple[str, ...]:
        """Name the parameters that are used below a block."""
        return tuple(name for name, place in self.places.items() if place < lowest)


def _up(share: float) -> float:
    """Round up to three digits."""
    return -int(-share * 1000 // 1) / 1000


def step_costs(model: nn.Module, batch: Batch | None = None) -> StepCosts:
    """Count what each layer of a model costs, in one forward of one example in eval mode.

    Args:
        model: A model with one chain of numbered blocks, each run once and in their order.
        batch: A batch as it will be trained on; its first example is run. By default the model's ``dummy_inputs``,
            which are short: give a batch where sequences are long.

    Returns:
        The costs. They depend on shapes alone, never on time.

    Raises:
        FishError: The model is no such chain.
        ValueError: A batch is needed.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where it is

    name, blocks = chain_of(model)
    if batch is None:
        batch = getattr(model, "dummy_inputs", None)
        if batch is None:
            raise ValueError(
                f"{type(model).__name__} has no dummy_inputs: pass batch=, one of its inputs to count its costs on"
            )
    device = next(model.parameters()).device
    batch = to_device(cut(batch, 0, 1), device)
    numbers = {id(block): i for i, block in enumerate(blocks)}
    counter = FlopCounterMode(display=False)
    first: dict[int, int] = {}  # id of a module -> the block it cannot run without
    ends = [0.0] * (len(blocks) + 1)  # operations done at the end of each block; ends[0]: before the first
    began: list[int] = []
    finished: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in numbers:
            if not began:
                ends[0] = counter.get_total_flops()
            began.append(numbers[id(module)])
        first.setdefault(id(module), _place(began, finished))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in numbers:
            finished.append(numbers[id(module)])
            ends[numbers[id(module)] + 1] = counter.get_total_flops()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with paused(model), evaluating(model), _plain_attention(), torch.no_grad(), counter:
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if began != list(range(len(blocks))) or finished != began:
        raise FishError(
            f"the blocks of {name} do not run one after another, each once: {began} began and {finished} ended. "
            "A step budget and a prefix cache need a chain; layers that are shared or called in turns have none"
        )
    costs = tuple(end - start for start, end in pairwise(ends))
    return StepCosts(name, ends[0], costs, counter.get_total_flops() - ends[-1], _places(model, first, len(blocks)))


def _place(began: list[int], finished: list[int]) -> int:
    """Return the block that is running, or the next one when none is."""
    if len(began) > len(finished):
        return began[-1]
    return len(began) if began else BEFORE


def _places(model: nn.Module, first: dict[int, int], n: int) -> dict[str, int]:
    """Return the place of each parameter: that of the first of the modules that own it, tied ones included."""
    canonical = aliases(model)
    places: dict[str, int] = {}
    inherited: dict[str, int] = {}
    for path, module in model.named_modules():
        # One that is not called as a module belongs to the next above it, which may use its weights by itself.
        place = inherited[path] = first.get(id(module), inherited.get(path.rpartition(".")[0], BEFORE))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = canonical[f"{path}.{attribute}" if path else attribute]
                places[name] = min(places.get(name, n), place)
    return {name: places[name] for name in dict.fromkeys(canonical.values())}


def chain_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the name and the modules of a model's chain of blocks: its longest list of modules of one class.

    Raises:
        FishError: There is no such list, or two are equally long.
    """
    lists: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{other}.") for other in lists)  # the experts of a block, say
        alike = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        if isinstance(module, nn.ModuleList) and alike and len(module) > 1 and not inner:
            lists[path] = list(module)
    longest = [path for path, blocks in lists.items() if len(blocks) == max(map(len, lists.values()))]
    if len(longest) != 1:
        found = f"{', '.join(longest)} are equally long" if longest else "it has none"
        raise FishError(
            f"{type(model).__name__} was expected to have one longest nn.ModuleList of blocks of one class, such as "
            f"bert.encoder.layer or model.layers; {found}"
        )
    return longest[0], lists[longest[0]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have every module of a model in eval mode for a while."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Have attention run by its parts, which are counted alike on every device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of nn.TransformerEncoder
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def run(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch: a dict of arguments, (inputs, targets), or the inputs."""
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)
