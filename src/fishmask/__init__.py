"""fishmask: train a fixed, sparse set of a model's parameters, those with the largest Fisher information."""

from fishmask.errors import FishError

__version__ = "0.1.0"
__all__ = ["FishError"]
