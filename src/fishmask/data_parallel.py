"""Per-step data parallelism: ``DistributedDataParallel`` averages the gradient of the values and moves nothing else."""

from typing import Any, Never

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from fishmask.attach import Tuning
from fishmask.errors import FishError
from fishmask.handshake import agree, checksums
from fishmask.originals import persistent_buffers
from fishmask.params import canonical_parameters
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
        parameters = tuning.settled_parameters()
        shapes = {name: f"{p.dtype} {tuple(p.shape)}" for name, p in parameters.items()}
        wire = Wire(group)
        agree(wire, {"parameters": shapes, "mask": tuning.mask.digest})
        agree(wire, {"weights": checksums(parameters)})
        state = persistent_buffers(tuning.model)
        ignored = [name for name, _ in tuning.model.named_parameters(remove_duplicate=False)]
        ignored += [name for name, _ in tuning.model.named_buffers(remove_duplicate=False) if name not in state]
        # The name is DDP's.
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in ignored]
        tuning.reduced = True
