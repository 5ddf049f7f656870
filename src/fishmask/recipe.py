"""How to fine-tune: every setting of a training run in one record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fishmask.blocks import block_size

Method = Literal[
    "fish",
    "gradient",
    "snip",
    "magnitude",
    "random",
    "biases",
    "movement",
    "narrowing",
    "diff",
    "lora",
    "shira",
    "full",
]
Precision = Literal["float32", "bfloat16"]
MASKLESS = ("full", "lora", "shira")
_WHOLE = (
    "epochs", "batch_size", "max_length", "seed", "warm_up_head", "examples", "dense_epochs", "candidates",
    "search_epochs", "prefix_cache_bytes",
)  # fmt: skip
_FROM_ZERO = ("seed", "warm_up_head", "weight_decay", "clip", "prefix_cache_bytes")
_REAL = ("learning_rate", "weight_decay", "clip", "dense_rate", "search_rate")


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        method: How the entries to train are chosen. "fish", "gradient", "snip", "magnitude" and "random" rank them by a
            score (see :func:`fishmask.scores`); "biases" takes all biases (BitFit); "movement" takes those that move
            most in a dense training beforehand (see :func:`fishmask.choose.movement`); "narrowing" those that move most
            in a training of ``candidates`` times too many (see :func:`fishmask.choose.narrow`); "diff" is Diff
            Pruning, "lora" and "shira" are the adapters of PEFT (see :mod:`fishmask.rivals`); "full" trains everything.
        density: Share of all entries to train, the head included; not used by "biases" and "full".
        learning_rate: Peak learning rate; it falls linearly to zero.
        epochs: Passes over the training data, warm-up included.
        batch_size: Examples per step.
        max_length: Texts are cut off after so many tokens.
        seed: Decides the head's first weights, dropout, the order of batches, the examples scored and random masks.
        weight_decay: AdamW's weight decay.
        clip: Largest norm of the gradient, 0 for no clipping.
        warm_up_head: Steps in which only the kept parameters train, before the entries are chosen.
        keep: Patterns of parameters to train whole; empty means the new head.
        exclude: Patterns of parameters never to train.
        among: What may be chosen: "all" entries, or those of the weight matrices in the model's "layers", which leaves
            out embeddings, poolers, norms and biases (see :func:`fishmask.choose.outside_of_layers`).
        block: Choose whole blocks: height and width such as "16x16", "rows" or "columns" (see :mod:`fishmask.blocks`);
            empty chooses single entries.
        labels: Whose labels the scores use (see :func:`fishmask.fisher`).
        examples: Training examples to score; all of them when there are fewer.
        engine: How the scores are computed (see :func:`fishmask.fisher`).
        score: What "fish" sums over the examples: the "square" of each gradient, or its "absolute" value.
        dense_epochs: Passes of the dense training of "movement" and "diff", in addition to ``epochs``.
        dense_rate: Its peak learning rate.
        candidates: How many times the budget "narrowing" trains at first.
        search_epochs: For how many of the ``epochs`` it does.
        search_rate: At what peak learning rate.
        precision: "bfloat16" runs the forward in autocast; weights, gradients and scores stay float32.
        padding: "longest" puts examples of like length together and pads to the longest of a batch; "max" shuffles
            freely and pads every batch to ``max_length``.
        step_budget: The most that a step may cost, as a share of one with entries in every block; the mask keeps to the
            last blocks then (see :mod:`fishmask.compute`). None for no limit.
        prefix_cache_bytes: The most bytes of a :class:`fishmask.PrefixCache` of the blocks below the mask; 0 for none.
    """

    method: Method = "fish"
    density: float = 0.005
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    warm_up_head: int = 0
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    among: Literal["all", "layers"] = "all"
    block: str = ""
    labels: Literal["given", "expected", "sampled"] = "given"
    examples: int = 1024
    engine: Literal["auto", "batched", "loop"] = "auto"
    score: Literal["square", "absolute"] = "square"
    dense_epochs: int = 1
    dense_rate: float = 1e-4
    candidates: int = 10
    search_epochs: int = 1
    search_rate: float = 3e-3
    precision: Precision = "float32"
    padding: Literal["longest", "max"] = "longest"
    step_budget: float | None = None
    prefix_cache_bytes: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("method", get_args(Method)),
            ("precision", get_args(Precision)),
            ("among", ("all", "layers")),
            ("labels", ("given", "expected", "sampled")),
            ("engine", ("auto", "batched", "loop")),
            ("score", ("square", "absolute")),
            ("padding", ("longest", "max")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in _WHOLE:
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number; got {getattr(self, name)!r}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be a fraction in (0, 1], such as 0.005 for 0.5 %; got {self.density}")
        for name in (*_WHOLE, *_REAL):
            value, least = getattr(self, name), name in _FROM_ZERO
            if not (math.isfinite(value) and (value >= 0 if least else value > 0)):
                raise ValueError(f"{name} must {'not be below 0' if least else 'be above 0'}, and finite; got {value}")
        if self.method == "narrowing" and self.search_epochs >= self.epochs:
            raise ValueError(
                f"method='narrowing' searches for search_epochs={self.search_epochs} and then trains: "
                f"it needs more epochs than that; got epochs={self.epochs}"
            )
        if self.step_budget is not None and self.method in ("biases", "diff", *MASKLESS):
            raise ValueError(
                f"step_budget is for masks chosen by density or a score; method={self.method!r} takes none"
            )
        if self.step_budget is not None and not 0 < self.step_budget <= 1:
            raise ValueError(f"step_budget must be a share in (0, 1], such as 0.5 for half; got {self.step_budget}")
        if self.prefix_cache_bytes and self.method in MASKLESS:
            raise ValueError(f"a prefix cache is for a training on a mask; method={self.method!r} has none")
        if self.method in (*MASKLESS, "diff", "movement", "narrowing") and self.warm_up_head:
            raise ValueError(f"warm_up_head is for masks chosen by a score; method={self.method!r} takes none")
        if self.method in ("gradient", "snip") and self.labels == "expected":
            raise ValueError(f"labels='expected' makes every score of method={self.method!r} zero; use 'given'")
        if self.method == "diff" and self.among != "all":
            raise ValueError("method='diff' takes no among; name what to leave out with exclude")
        if self.block:
            block_size(self.block)
            if self.method in ("biases", "narrowing", "diff", *MASKLESS):
                raise ValueError(f"block is for masks chosen by a score; method={self.method!r} takes none")
        if self.method in ("biases", *MASKLESS) and (self.exclude or self.among != "all"):
            raise ValueError(f"exclude and among are for masks chosen by density; method={self.method!r} takes none")

    def check_mask_given(self) -> None:
        """Refuse what a mask that was chosen beforehand cannot heed.

        Raises:
            ValueError: A method without a mask, ``warm_up_head``, ``step_budget`` or ``block`` is set.
        """
        settings = {
            "method": self.method in MASKLESS, "warm_up_head": self.warm_up_head > 0,
            "step_budget": self.step_budget is not None, "block": bool(self.block),
        }  # fmt: skip
        if refused := [f"{name}={getattr(self, name)!r}" for name, is_set in settings.items() if is_set]:
            raise ValueError(
                f"a mask chosen beforehand does not go with {', '.join(refused)}: leave it out, or the mask"
            )


def recipe_from(settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe that was written as JSON (lists become tuples again)."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return Recipe(**values)


PRESETS: dict[str, dict[str, Any]] = {
    # docs/glue.md tells how it was found, and how it does beside the others.
    "robust": {"method": "random", "among": "layers", "learning_rate": 1e-2},
    # As the paper's scripts for GLUE.
    "paper": {"method": "fish", "learning_rate": 5e-5, "epochs": 7},
}


def preset(name: str, **changes: Any) -> Recipe:
    """Return a documented recipe with some settings changed.

    Args:
        name: "robust", which this library recommends, or "paper".
        changes: Settings that differ from it.

    Raises:
        ValueError: There is no such preset, or a setting is wrong.
    """
    if name not in PRESETS:
        raise ValueError(f"recipe must be one of {', '.join(PRESETS)}; got {name!r}")
    return Recipe(**{**PRESETS[name], **changes})
