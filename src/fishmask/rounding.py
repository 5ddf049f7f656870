"""Rounding of the float32 values to the precision of the weights: to the nearest number, or at random without bias."""

import zlib
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]

_WORD = 0xFFFFFFFF
_ODD = 0x9E3779B1  # spreads names and places over all 32 bits


def salt_of(rounding: Rounding, seed: int, name: str) -> int | None:
    """Return what the draws for one parameter begin with; None for rounding to the nearest.

    Raises:
        ValueError: An unknown kind of rounding, or a seed that is not a whole number from 0 to 2**32 - 1.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if not isinstance(seed, int) or not 0 <= seed <= _WORD:
        raise ValueError(f"rounding_seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")
    return zlib.crc32(name.encode(), seed) if rounding == "stochastic" else None


def rounded(values: Tensor, dtype: torch.dtype, indices: Tensor, salt: int | None) -> Tensor:
    """Round float32 values to another floating-point dtype.

    Stochastic rounding takes one of the two neighbours, each with the probability that makes the value their mean. The
    draw is a hash of the salt, of the entry's place in its parameter, and of the value itself: whoever has the values
    has the weights, on every worker and after every restart, and writing a value twice writes the same number.

    Args:
        values: Values [K], float32.
        dtype: Of the weight.
        indices: Flat indices [K] of the entries in their parameter.
        salt: Of ``salt_of``; None rounds to the nearest.

    Returns:
        The rounded values [K]. What ``dtype`` can hold stays what it is; what is too large for it, and what is not
        finite, becomes what rounding to the nearest makes of it; and ``-v`` becomes the negative of what ``v`` does.

    Source:
        Gupta et al., "Deep Learning with Limited Numerical Precision", 2015: updates that are too small for the weight
        count on average.
    """
    near = values.to(dtype)
    if salt is None or dtype.itemsize != 2:
        return near  # float32 holds the values as they are
    size = values.abs()
    # Neighbours towards zero and away from it: as integers these numbers are one apart, whatever their sign.
    inner = near.view(torch.int16) - (near.abs().float() > size).to(torch.int16)
    low, high = inner.view(dtype), (inner + 1).view(dtype)
    start, end = low.abs().float(), high.abs().float()
    share = (size - start) / (end - start)  # exact, and 0 below an infinite end
    return torch.where(near.isfinite(), torch.where(_draws(size, indices, salt) < share, high, low), near)


def _draws(size: Tensor, indices: Tensor, salt: int) -> Tensor:
    """Return a number in [0, 1) with 24 random bits for each place and size [K]."""
    place = indices.long() * _ODD + salt
    bits = size.view(torch.int32).long() ^ _mixed((place ^ (place >> 32)) & _WORD)
    return (_mixed(bits) >> 8).float() * 2.0**-24


def _mixed(words: Tensor) -> Tensor:
    """Hash 32-bit words held as int64, in place: each bit of the result depends on every bit of the word.

    Source:
        Wellons, "Prospecting for Hash Functions", 2018: lowbias32. Factors below 2**31, so no product overflows.
    """
    words ^= words >> 16
    words *= 0x21F0AAAD
    words &= _WORD
    words ^= words >> 15
    words *= 0x735A2D97
    words &= _WORD
    words ^= words >> 15
    return words
