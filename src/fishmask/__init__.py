"""fishmask: train a fixed, sparse set of a model's parameters, those with the largest Fisher information."""

from fishmask.attach import Tuning, attach
from fishmask.delta import Delta, load
from fishmask.errors import FishError
from fishmask.fisher import fisher, scores
from fishmask.log import CheckpointLog
from fishmask.mask import Mask
from fishmask.rounds import LocalRounds

__version__ = "0.1.0"
__all__ = [
    "CheckpointLog",
    "Delta",
    "FishError",
    "LocalRounds",
    "Mask",
    "Tuning",
    "attach",
    "fisher",
    "load",
    "scores",
]
