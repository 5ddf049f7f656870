"""A model's buffers as vectors that workers can merge: BatchNorm's statistics, and what it counts."""

import torch
from torch import Tensor, nn

from fishmask.originals import persistent_buffers


def read_buffers(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the floating-point buffers of the model's state as one float32 vector, and the others as one of int64."""
    floats, wholes = _kinds(model)
    return _vector(floats, torch.float32, device), _vector(wholes, torch.int64, device)


@torch.no_grad()
def write_buffers(model: nn.Module, floats: Tensor, wholes: Tensor) -> None:
    """Write back what ``read_buffers`` returned, or what became of it; numbers that it has already keep their bits."""
    for buffers, vector in zip(_kinds(model), (floats, wholes), strict=True):
        for buffer, part in zip(buffers, vector.split([b.numel() for b in buffers]), strict=True):
            new = part.view(buffer.shape).to(buffer.device)
            if buffer.dtype == torch.float64:  # more digits than the vector has: rounded only where it changes
                new = torch.where(new == buffer.float(), buffer, new.double())
            buffer.copy_(new)


def _kinds(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    buffers = [b for b in persistent_buffers(model).values() if not b.is_complex()]
    return [b for b in buffers if b.is_floating_point()], [b for b in buffers if not b.is_floating_point()]


def _vector(buffers: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    empty = torch.empty(0, dtype=dtype, device=device)
    return torch.cat([empty, *(b.detach().reshape(-1).to(device, dtype) for b in buffers)])
