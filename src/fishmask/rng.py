"""The states of the random number generators that training draws from."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Any]:
    """Return the states of the global generators of Python, numpy, PyTorch and its CUDA devices."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, np.array(words, dtype=np.uint32), gauss],
        "numpy": list(np.random.get_state()),
        "torch": _planes(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def reinstate(states: dict[str, Any]) -> None:
    """Set the generators that are in ``states``; CUDA devices that are not here are left out."""
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in states:
        np.random.set_state(tuple(states["numpy"]))
    if "torch" in states:
        torch.set_rng_state(_from_planes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


def _planes(state: Tensor) -> Tensor:
    """Order the bytes by their place in 8-byte words, half of which are zero: so they compress to half."""
    return state.view(-1, 8).T.contiguous() if len(state) % 8 == 0 else state


def _from_planes(planes: Tensor) -> Tensor:
    return planes.T.reshape(-1).contiguous() if planes.dim() == 2 else planes
