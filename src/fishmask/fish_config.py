"""How the mask of an adapter is chosen, as the JSON that PEFT's users know."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from fishmask.blocks import block_size
from fishmask.choose import outside_of_layers
from fishmask.errors import FishError
from fishmask.fisher import Method, scores
from fishmask.hub import CONFIG_FILE
from fishmask.mask import Mask
from fishmask.params import matching
from fishmask.quantized import weights

try:
    from peft import PeftConfig
except ImportError as error:
    raise FishError("adapters with PEFT's verbs need peft: pip install 'fishmask[peft]'") from error

PEFT_TYPE = "FISH"
Score = Method | Literal["biases"]
_SCORES = (*get_args(Method), "biases")
# Where transformers puts the new head of a task, which is trained whole as PEFT does.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass
class FishConfig(PeftConfig):  # type: ignore[misc]
    """The settings of one adapter: which entries it trains. Saved as ``adapter_config.json``.

    The fields of ``PeftConfig`` (``task_type``, ``base_model_name_or_path``, ``revision``, ``inference_mode``) mean
    what they mean there.

    Args:
        density: Share of the model's entries to train, in (0, 1].
        score: How entries are scored (``fishmask.scores``): "fisher", "absolute", "gradient" and "snip" need batches;
            "magnitude" and "random" do not. "biases" trains all biases, whatever the density.
        examples: How many examples to score on.
        labels: "given", "expected" or "sampled" (``fishmask.fisher``).
        keep: Names or patterns of parameters to train whole, counted in the budget. None keeps the new head that the
            task type has: ``classifier`` or ``score`` for SEQ_CLS and TOKEN_CLS, ``qa_outputs`` for QUESTION_ANS.
        exclude: Names or patterns of parameters never chosen from.
        among: "all" parameters, or the weight matrices of the model's "layers" alone, which did best with "random".
        block: Choose whole blocks of "16x16" or another height and width, or "rows" or "columns" (``fishmask.blocks``);
            empty chooses single entries.
        engine: The engine of ``fishmask.fisher``.
        seed: Of "random" and of sampled labels.

    Raises:
        ValueError: A setting is not one of those named here.

    Example:
        >>> config = FishConfig(task_type="SEQ_CLS", density=0.005, score="random", among="layers")
        >>> config.peft_type
        'FISH'
    """

    density: float = field(default=0.005)
    score: Score = field(default="fisher")
    examples: int = field(default=1024)
    labels: Literal["given", "expected", "sampled"] = field(default="given")
    keep: list[str] | None = field(default=None)
    exclude: list[str] = field(default_factory=list)
    among: Literal["all", "layers"] = field(default="all")
    block: str = field(default="")
    engine: Literal["auto", "batched", "loop"] = field(default="auto")
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.in_use = False  # by a FishModel
        number = isinstance(self.density, int | float) and not isinstance(self.density, bool)
        if not (number and 0 < self.density <= 1):
            raise ValueError(f"density is a share in (0, 1], got {self.density!r}")
        for name, least in (("examples", 1), ("seed", None)):
            own = getattr(self, name)
            if type(own) is not int or (least is not None and own < least):
                expected = "a whole number" if least is None else f"a whole number of at least {least}"
                raise ValueError(f"{name} must be {expected}, got {own!r}")
        for name, known in (
            ("score", _SCORES),
            ("labels", ("given", "expected", "sampled")),
            ("among", ("all", "layers")),
            ("engine", ("auto", "batched", "loop")),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.block, str):
            raise ValueError(f"block must be text such as '16x16', 'rows' or 'columns', got {self.block!r}")
        if self.block:
            block_size(self.block)
            if self.score == "biases":
                raise ValueError("block is for entries chosen by density; score='biases' takes none")
        for name in ("keep", "exclude"):
            own = getattr(self, name)
            if isinstance(own, str):
                setattr(self, name, [own])
            elif own is None and name == "keep":
                continue
            elif not isinstance(own, list | tuple) or not all(isinstance(pattern, str) for pattern in own):
                raise ValueError(f"{name} must be a list of names or patterns, got {own!r}")
            else:
                setattr(self, name, list(own))

    @property
    def is_prompt_learning(self) -> bool:
        """False; PEFT's own constructors ask this first, and learn here that they cannot make a ``FishModel``.

        Raises:
            FishError: No ``FishModel`` has this config.
        """
        if not self.in_use:
            raise FishError(
                "PEFT's get_peft_model and PeftModel know only PEFT's own methods, and the peft_config of a trainer "
                "goes to them: make the model with fishmask.get_fish_model(model, config) or "
                "fishmask.FishModel.from_pretrained(model, folder), and pass it without a peft_config"
            )
        return False

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "FishConfig":
        """Make the config from the content of an ``adapter_config.json``, whose unknown fields are ignored.

        Raises:
            ValueError: It is the config of another method.
        """
        if (found := kwargs.get("peft_type", PEFT_TYPE)) != PEFT_TYPE:
            raise ValueError(f"this adapter is of type {found}, not {PEFT_TYPE}: load it with peft")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            warnings.warn(
                f"unknown settings of an adapter are ignored: {', '.join(unknown)}", UserWarning, stacklevel=2
            )
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    @classmethod
    def of_folder(cls, folder: Path) -> "FishConfig":
        """Read the config in an adapter's folder; folders of ``fishmask train`` have none, and give the defaults.

        Raises:
            FishError: It cannot be read.
            ValueError: It is the config of another method.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FishError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise FishError(f"{path} is damaged: expected an object, found {type(content).__name__}")
        return cls.from_peft_type(**content)

    def replaced(self, **changes: Any) -> "FishConfig":
        """Return a copy with other settings."""
        return replace(self, **changes)

    def kept(self, model: nn.Module) -> list[str]:
        """Return the patterns of the parameters of ``model`` to train whole."""
        if self.keep is not None:
            return list(self.keep)
        names = list(weights(model))
        heads = _HEADS.get(str(getattr(self.task_type, "value", self.task_type)), ())
        return [head for head in heads if any(head in name.split(".") for name in names)]

    def choose(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = False) -> Mask:
        """Choose the mask on a model, and leave the model as it is.

        Args:
            model: The base.
            batches: As for ``fishmask.fisher``; scores that need none ignore them.
            progress: Show a progress bar while scoring.

        Raises:
            ValueError: The score needs batches, or a pattern matches nothing.
            FishError: As for ``fishmask.fisher``.
        """
        keep = self.kept(model)
        if self.score == "biases":
            return Mask.biases(model, keep=keep)
        exclude = [*self.exclude, *(outside_of_layers(model, keep) if self.among == "layers" else ())]
        block = self.block or None
        if self.score == "random":
            return Mask.random(model, self.density, self.seed, keep=keep, exclude=exclude, block=block)
        if self.score == "magnitude":
            return Mask.magnitude(model, self.density, keep=keep, exclude=exclude, block=block)
        if batches is None:
            raise ValueError(
                f"score={self.score!r} is computed on examples: pass batches, for instance "
                "get_fish_model(model, config, batches); 'random' and 'magnitude' need none"
            )
        matching(weights(model), keep, "keep")  # before the scoring, which takes long
        matching(weights(model), exclude, "exclude")
        found = scores(
            model,
            batches,
            method=self.score,
            labels=self.labels,
            examples=self.examples,
            engine=self.engine,
            seed=self.seed,
            progress=progress,
        )
        return Mask.from_scores(found, self.density, keep=keep, exclude=exclude, block=block)
