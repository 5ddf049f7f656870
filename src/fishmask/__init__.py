"""fishmask: train a fixed, sparse set of a model's parameters, those with the largest Fisher information."""

from fishmask import data_parallel, exchange
from fishmask.attach import Tuning, attach
from fishmask.delta import Delta, load
from fishmask.errors import FishError, HandshakeError, RoundError
from fishmask.fisher import fisher, scores
from fishmask.log import CheckpointLog
from fishmask.mask import Mask
from fishmask.rounds import LocalRounds

__version__ = "0.1.0"
__all__ = [
    "CheckpointLog",
    "Delta",
    "FishError",
    "HandshakeError",
    "LocalRounds",
    "Mask",
    "RoundError",
    "Tuning",
    "attach",
    "data_parallel",
    "exchange",
    "fisher",
    "load",
    "scores",
]
