"""The methods that a sweep compares, by name, and the variations of Figure 2 of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fishmask.recipe import PRESETS, Recipe
from fishmask.sweep import Variant

# The paper's grid for GLUE. Biases and adapters are searched higher, as in their own papers.
PAPER_RATES = (1e-4, 5e-5, 1e-5)
HIGHER_RATES = (1e-3, 5e-4, 1e-4)


@dataclass(frozen=True)
class NamedMethod:
    """A method under the name that the command line knows it by.

    Attributes:
        about: What trains, in a few words.
        changes: The settings that make the method.
        rates: Learning rates to try by default.
    """

    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = PAPER_RATES


_ROBUST = {name: value for name, value in PRESETS["robust"].items() if name != "learning_rate"}
METHODS = {
    "full": NamedMethod("everything", {"method": "full"}),
    "robust": NamedMethod("the recipe of this library", _ROBUST, (1e-2, 3e-3, 1e-3)),
    "fish-paper": NamedMethod("FISH mask as in the paper", {"method": "fish"}),
    "fish-expected": NamedMethod("FISH mask, true Fisher information", {"method": "fish", "labels": "expected"}),
    "fish-sampled": NamedMethod("FISH mask, sampled labels", {"method": "fish", "labels": "sampled"}),
    "gradient": NamedMethod("largest |gradient|", {"method": "gradient"}),
    "snip": NamedMethod("largest |weight × gradient|", {"method": "snip"}),
    "magnitude": NamedMethod("largest |weight|", {"method": "magnitude"}),
    "random": NamedMethod("random entries", {"method": "random"}),
    "movement": NamedMethod("entries that a dense training moves most (LT-SFT)", {"method": "movement"}),
    "narrowing": NamedMethod(
        "entries that move most among ten times too many", {"method": "narrowing", "among": "layers"}
    ),
    "biases": NamedMethod("all biases (BitFit)", {"method": "biases"}, HIGHER_RATES),
    "lora": NamedMethod("LoRA of the same size, by PEFT", {"method": "lora"}, HIGHER_RATES),
    "shira": NamedMethod("SHiRA of the same size, by PEFT", {"method": "shira"}, HIGHER_RATES),
    "diff": NamedMethod("Diff Pruning, fixed to the same size", {"method": "diff"}),
}

# Figure 2, and the transforms and labels that the authors' code knows.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "density": (0.0002, 0.001, 0.005, 0.02),
    "examples": (32, 256, 1024, 16384),
    "labels": ("given", "expected", "sampled"),
    "score": ("square", "absolute"),
}


def variants(
    names: Sequence[str] | None,
    common: Recipe,
    rates: Mapping[str, Sequence[float]] | None = None,
    batch_sizes: Sequence[int] = (8, 16),
) -> tuple[Variant, ...]:
    """Return methods by name, ready for a sweep.

    Args:
        names: Names in :data:`METHODS`; all of them by default.
        common: The settings that they share.
        rates: Learning rates by the name of a method; those under "" are for all that are not named.
        batch_sizes: The batch sizes to try.

    Raises:
        ValueError: There is no such method.
    """
    rates = rates or {}
    unknown = sorted({*(names or ()), *(name for name in rates if name)} - METHODS.keys())
    if unknown:
        raise ValueError(f"no method {', '.join(map(repr, unknown))}; expected some of {', '.join(METHODS)}")
    return tuple(
        Variant(
            name.replace("-", " "),
            replace(common, **METHODS[name].changes),
            tuple(rates.get(name) or rates.get("") or METHODS[name].rates),
            tuple(batch_sizes),
        )
        for name in names or METHODS
    )


def ablation(base: Sequence[Variant], setting: str, values: Sequence[str] | None = None) -> tuple[Variant, ...]:
    """Return each variant once for every value of one setting.

    Args:
        base: The variants.
        setting: A key of :data:`ABLATIONS`.
        values: The values, as text; those of :data:`ABLATIONS` by default.

    Raises:
        ValueError: A value does not suit the setting.
    """
    known = ABLATIONS[setting]
    kind = type(known[0])
    try:
        chosen = known if values is None else tuple(kind(value) for value in values)
        if kind is str and not set(chosen) <= set(known):
            raise ValueError(f"got {', '.join(chosen)}")
    except ValueError as error:
        raise ValueError(f"{setting} takes values like {', '.join(map(str, known))}; {error}") from error
    return tuple(
        replace(variant, recipe=replace(variant.recipe, **{setting: value})) for variant in base for value in chosen
    )
