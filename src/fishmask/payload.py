"""How differences travel: as they are, as bfloat16, or as int8 with one scale for a block of them."""

from typing import Literal

import torch
from torch import Tensor

Payload = Literal["float32", "bfloat16", "int8"]

BLOCK = 256  # values that share a scale: 1.6 % more bytes, and a block is seldom dominated by one large value


def encode(values: Tensor, payload: Payload) -> Tensor:
    """Code float32 values [..., count] as bytes (uint8 [..., coded]), rows apart; their number depends on count alone.

    int8 codes a block of 256 values v as round(v / s) with s = max |v| / 127, preceded by all s as float32.
    """
    if payload == "float32":
        return values.contiguous().view(torch.uint8)
    if payload == "bfloat16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint8)
    count = values.shape[-1]
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1) / 127
    digits = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().clamp_(-127, 127)
    coded = digits.to(torch.int8).flatten(-2)[..., :count].contiguous().view(torch.uint8)
    return torch.cat([scales.contiguous().view(torch.uint8), coded], dim=-1)


def decode(coded: Tensor, payload: Payload, count: int) -> Tensor:
    """Undo ``encode``: return float32 values [..., count]."""
    if payload == "float32":
        return coded.contiguous().view(torch.float32)
    if payload == "bfloat16":
        return coded.contiguous().view(torch.bfloat16).float()
    start = 4 * -(-count // BLOCK)
    # A copy: a single row counts as contiguous whatever its stride, which the view does not take.
    scales = coded[..., :start].clone(memory_format=torch.contiguous_format).view(torch.float32)
    digits = coded[..., start:].contiguous().view(torch.int8).float()
    blocks = torch.nn.functional.pad(digits, (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = torch.finfo(torch.float32).max  # which the product may pass, because the scale is rounded
    values: Tensor = (blocks * scales.unsqueeze(-1)).clamp_(-largest, largest).flatten(-2)[..., :count].contiguous()
    return values
