"""Per-step data parallelism: ``DistributedDataParallel`` averages the gradient of the values and moves nothing else."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from fishmask.attach import Tuning
from fishmask.errors import FishError
from fishmask.handshake import agree, checksums
from fishmask.originals import persistent_buffers
from fishmask.wire import Wire


class Replica(nn.Module):
    """An attached model as ``DistributedDataParallel`` needs it: with the values as its only parameters to reduce.

    DDP then moves k float32 values in every backward, and neither frozen weights nor their gradients. Buffers of the
    model's state (BatchNorm's statistics) are broadcast as DDP always does; those outside it, which every worker has
    made for itself, stay where they are. The optimizer takes ``tuning.parameters()`` as ever.

    Making one is collective: it compares masks and weights of all workers, because DDP will not move the weights.

    Args:
        tuning: The attached model's tuning.
        group: The process group that DDP gets as ``process_group``; by default that of all workers.

    Attributes:
        model: The attached model.
        tuning: Its tuning.

    Raises:
        HandshakeError: The workers' masks or weights differ.
        FishError: The tuning is not attached any more.
        RoundError: The connection broke off.

    Source:
        Li et al., "PyTorch Distributed", 2020, for DDP.

    Example:
        >>> tuning = fishmask.attach(model, mask)
        >>> ddp = DistributedDataParallel(Replica(tuning))
        >>> optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
        >>> for batch in batches:
        ...     ddp(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(self, tuning: Tuning, *, group: dist.ProcessGroup | None = None) -> None:
        if not isinstance(tuning, Tuning):
            raise TypeError(f"Replica takes the Tuning that fishmask.attach returned, got {type(tuning).__name__}")
        super().__init__()
        self.tuning, self.model = tuning, tuning.model
        self.values = _Values(tuning.parameters())
        agree_on(tuning, group)
        # The name is DDP's.
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in ignored_by_ddp(tuning.model)]

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            FishError: DDP holds values that are no longer trained, or is told to look for unused parameters where it
                cannot see the used ones.
        """
        self._check()
        output = self.model(*args, **kwargs)
        refuse_unseen(self.tuning)  # also those that this forward has only just found
        return output

    def _check(self) -> None:
        now = {id(values) for values in self.tuning.parameters()}
        if not self.tuning.attached or now != {id(values) for values in self.values}:
            raise FishError(
                "the mask was changed or detached since this Replica was made, so DDP holds values that lead nowhere: "
                "make a new Replica and a new DistributedDataParallel after set_mask() or attach()"
            )


def under_ddp() -> bool:
    """Whether a forward of ``DistributedDataParallel`` is under way."""
    return DistributedDataParallel._active_ddp_module is not None


def agree_on(tuning: Tuning, group: dist.ProcessGroup | None = None) -> None:
    """Compare masks and weights of all workers, which DDP will not move; collective.

    Raises:
        HandshakeError: They differ.
    """
    parameters = tuning.settled_parameters()
    shapes = {name: f"{p.dtype} {tuple(p.shape)}" for name, p in parameters.items()}
    wire = Wire(group)
    agree(wire, {"parameters": shapes, "mask": tuning.mask.digest})
    agree(wire, {"weights": checksums(parameters)})
    tuning.reduced = True


def ignored_by_ddp(model: nn.Module) -> list[str]:
    """Name what DDP must leave alone in an attached model: its weights, and the buffers outside its state."""
    state = persistent_buffers(model)
    ignored = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return ignored + [name for name, _ in model.named_buffers(remove_duplicate=False) if name not in state]


def refuse_unseen(tuning: Tuning) -> None:
    """Raise FishError where DDP looks for unused parameters and cannot see that some values are used."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or not ddp.find_unused_parameters or ddp.static_graph or not torch.is_grad_enabled():
        return
    if unseen := list(tuning.general):
        raise FishError(
            "find_unused_parameters=True takes the values of these parameters for unused, because their gradient "
            f"is gathered by hooks and not by the graph: {', '.join(unseen)}. Where every forward uses all of them, "
            "set find_unused_parameters=False, in transformers.Trainer by "
            "TrainingArguments(ddp_find_unused_parameters=False). Else use static_graph=True, which finds unused ones "
            "too, or leave them out of the mask"
        )


class _Values(nn.ParameterList):
    """The values, which are in the model's state as its weights and therefore not a second time in that of DDP."""

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    @override
    def _load_from_state_dict(self, *args: Any) -> None:
        pass
