"""Models without data: on the meta device, where tensors have sizes alone, with batches and adapters of that kind."""

import copy
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.hub import located, without_weights
from fishmask.live import is_attached
from fishmask.quantized import QuantizedWeight, weights
from fishmask.sharded import is_sharded
from fishmask.weights import open_weights


def empty_model(source: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a model on the meta device, in training mode.

    Args:
        source: A model, whose tensors are neither copied nor touched; a configuration of transformers; or a model
            folder or a name on the hub, of which the configuration is read and, where that does not say the dtype and
            the weights are at hand, their headers.
        dtype: That of the weights; by default the source's own.

    Raises:
        FishError: There is no such model, or it is attached, quantized or sharded.
        TypeError: The source is none of these.
    """
    if isinstance(source, nn.Module):
        model: Any = _copied(source)
    elif isinstance(source, str | PathLike) or hasattr(source, "architectures"):
        model = without_weights(source)
        dtype = dtype or model.config.dtype or _dtype_on_disk(source) or torch.float32
    else:
        raise TypeError(f"expected a model, a configuration, a folder or a name, got {type(source).__name__}")
    return (model if dtype is None else model.to(dtype)).train()


def _copied(model: nn.Module) -> nn.Module:
    if is_attached(model):
        raise FishError("the model is attached: detach() or suspend() its Tuning first, or give the model's folder")
    if any(isinstance(p, QuantizedWeight) for p in weights(model).values()) or any(map(is_sharded, model.parameters())):
        raise FishError("quantized and sharded models are not forecast: give the configuration of the plain model")
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        twin = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, memo)


def _dtype_on_disk(source: Any) -> torch.dtype | None:
    """Return the dtype of a folder's weights; None where they are not at hand."""
    if not isinstance(source, str | PathLike):
        return None
    folder = Path(located(str(source)))
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return None
    headers = open_weights(folder).headers.values()
    return next((header.dtype for header in headers if header.dtype.is_floating_point), None)


def tokens(model: Any, examples: int, length: int) -> dict[str, Tensor]:
    """Make a batch of equal tokens with labels for a model of transformers, on the model's device.

    Raises:
        ValueError: The batch is empty or longer than the model's positions, or the model is none of transformers.
    """
    if examples < 1 or length < 1:
        raise ValueError(f"a batch has at least one example of one token, got {examples} x {length}")
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} is no model of transformers: give batch as a mapping of tensors")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"the model has {positions} positions, got {length} tokens")
    place: dict[str, Any] = {"device": next(model.parameters()).device, "dtype": torch.int64}
    ids = torch.ones(examples, length, **place)
    if "SequenceClassification" not in type(model).__name__:
        return {"input_ids": ids, "labels": torch.ones_like(ids)}
    if config.pad_token_id is None:
        config.pad_token_id = 0  # decoders look for the last token that is no padding
    # Said, since some models look at the labels to learn it.
    config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
    labels = torch.zeros(examples, **place)
    return {"input_ids": ids, "labels": labels.float() if config.num_labels == 1 else labels}


def recompute(model: Any) -> None:
    """Turn gradient checkpointing on.

    Raises:
        ValueError: The model knows none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} knows no gradient checkpointing as transformers' models do")
    model.activation_checkpointing_enable()
    model.config.use_cache = False


def rank_of(method: str) -> int:
    """Return the rank in "lora:R", and 0 for another method.

    Raises:
        ValueError: There is no such method.
    """
    name, _, rank = method.partition(":")
    if name == "lora" and rank.isdecimal() and int(rank) > 0:
        return int(rank)
    if method not in ("fish", "full", "floor"):
        raise ValueError(f"method must be 'fish', 'full', 'floor' or 'lora:R' with a rank R, got {method!r}")
    return 0


def prepared(model: Any, method: str) -> Any:
    """Freeze and extend a model for another method than "fish", and return what to call.

    Raises:
        FishError: The library PEFT is missing, or it makes no LoRA of this model.
    """
    rank = rank_of(method)
    model.requires_grad_(method == "full")
    if method == "floor":
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FishError("LoRA needs the library PEFT: pip install 'fishmask[peft]'") from error
    kind = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's calls into transformers
        try:
            return get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            name = type(model).__name__
            raise FishError(f"PEFT makes no LoRA of {name} on all linear layers ({reason}): leave it out") from error
