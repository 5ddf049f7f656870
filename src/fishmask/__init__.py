"""fishmask: train a fixed, sparse set of a model's parameters, those with the largest Fisher information."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fishmask import data_parallel, exchange, sync
from fishmask.attach import Tuning, attach
from fishmask.between import between
from fishmask.combine import combine
from fishmask.delta import Delta, load
from fishmask.errors import FishError, HandshakeError, RoundError
from fishmask.fisher import fisher, scores
from fishmask.forecast import forecast
from fishmask.formats import export_delta, import_delta
from fishmask.log import CheckpointLog
from fishmask.mask import Mask
from fishmask.prefix import PrefixCache
from fishmask.rounds import LocalRounds
from fishmask.switch import Switch

if TYPE_CHECKING:
    from fishmask.fish_config import FishConfig
    from fishmask.fish_model import FishModel, get_fish_model

__version__ = "0.1.0"
__all__ = [
    "CheckpointLog",
    "Delta",
    "FishConfig",
    "FishError",
    "FishModel",
    "HandshakeError",
    "LocalRounds",
    "Mask",
    "PrefixCache",
    "RoundError",
    "Switch",
    "Tuning",
    "attach",
    "between",
    "combine",
    "data_parallel",
    "exchange",
    "export_delta",
    "fisher",
    "forecast",
    "get_fish_model",
    "import_delta",
    "load",
    "scores",
    "sync",
]


# What needs peft, and the module that it is in. Imported when first asked for: peft and transformers take seconds.
_LATER = {"FishConfig": "fish_config", "FishModel": "fish_model", "get_fish_model": "fish_model"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fishmask' has no attribute {name!r}")
    return getattr(import_module(f"fishmask.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
