"""The methods that we compare with and that are no masks of our own: LoRA and SHiRA, through the library PEFT."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fishmask.attach import is_attached
from fishmask.errors import FishError
from fishmask.params import canonical_parameters, matching

Adapter = Literal["lora", "shira"]

_FOLDER = "adapter"


def peft_model(model: nn.Module, method: Adapter, density: float, head: Sequence[str], seed: int) -> Any:
    """Put LoRA or SHiRA adapters into a model, as large as a mask of this density.

    The adapters go into every linear layer of the model's body: attention and feed-forward layers, not the embeddings,
    the pooler or the head. The head is trained whole. All else is frozen. The rank is the same in every layer, and such
    that the trained entries, the head included, come nearest to ``density × n``, n being all entries of the model. It
    is never below 1, and for SHiRA never so high that a layer's adapter would outgrow the layer: read the real count
    with :func:`trained_entries`.

    LoRA is used as most of PEFT's users do: alpha = 2 × rank, no dropout, biases frozen. SHiRA takes PEFT's random
    mask, drawn anew for every layer (PEFT itself draws the same positions in all layers of one shape).

    Args:
        model: A sequence-classification model of transformers; it is changed in place, so that calling it runs the
            adapters too. Conv1D layers (GPT-2) work with LoRA.
        method: "lora" or "shira".
        density: Share of all entries of the model to train, in (0, 1].
        head: Names or patterns of parameters to train whole (PEFT trains a copy of their modules).
        seed: Seed of the adapters' first weights and of SHiRA's masks. The state of torch's global generator is left
            as it was.

    Returns:
        The ``peft.PeftModel`` around the model, to be trained, saved with :func:`save_adapter`, or merged.

    Raises:
        ValueError: Unknown method, a density out of range, a head that matches nothing or that is only a part of what
            PEFT would train, or no linear layers.
        FishError: PEFT is missing; the model carries adapters or an attached mask already; SHiRA meets Conv1D layers.

    Source:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; Bhardwaj et al. 2024, "Sparse High Rank
        Adapters".
    """
    if method not in ("lora", "shira"):
        raise ValueError(f"method must be 'lora' or 'shira'; got {method!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be a fraction in (0, 1], such as 0.005 for 0.5 %; got {density}")
    peft = _peft()
    _check_untouched(model)
    parameters = canonical_parameters(model)
    kept = matching(parameters, head, "head")
    modules = _modules_to_save(model, kept)
    layers = {name: layer for name, layer in _body_layers(model).items() if f"{name}.weight" not in kept}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers outside its embeddings, pooler and head")
    transposed = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if transposed and method == "shira":
        raise FishError(f"SHiRA in PEFT takes nn.Linear alone, but {transposed[0]} is a Conv1D; use method='lora'")
    budget = density * sum(p.numel() for p in parameters.values()) - sum(parameters[name].numel() for name in kept)
    shapes = [tuple(layer.weight.shape) for layer in layers.values()]
    rank = max(1, round(budget / sum(rows + columns for rows, columns in shapes)))
    common = {"target_modules": list(layers), "modules_to_save": modules or None}
    if method == "lora":
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, fan_in_fan_out=bool(transposed), **common)
    else:
        rank = min(rank, *(rows * columns // (rows + columns) for rows, columns in shapes))
        _settle_sparse_checks()
        config = peft.ShiraConfig(r=rank, **common)
        config.mask_fn = _mask_per_layer(config.mask_fn, seed)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def trained_entries(model: nn.Module) -> int:
    """Count the entries that training changes: those of all parameters with ``requires_grad``, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapter(model: Any, folder: str | Path) -> Path:
    """Write the adapters and the trained head of a ``PeftModel`` as PEFT's own files.

    Returns:
        The folder with the files, ``folder/adapter``; any tool that reads PEFT's adapters can load it.
    """
    target = Path(folder) / _FOLDER
    # The embeddings are frozen. By default PEFT asks the hub for the base, to learn whether they have grown.
    model.save_pretrained(str(target), save_embedding_layers=False)
    return target


def load_adapter(model: nn.Module, folder: str | Path) -> Any:
    """Put the adapters and the head of :func:`save_adapter` into a fresh base, in place, ready to predict.

    Args:
        model: The base that the adapters were trained on, with a head of the same shape. PEFT's files do not hold the
            base's digest: other weights of the same shapes are not noticed.
        folder: The folder that was given to ``save_adapter``.

    Returns:
        The ``peft.PeftModel`` around the model, in eval mode, all parameters frozen.

    Raises:
        FishError: PEFT is missing, there is no adapter in the folder, it does not fit the model, or the model carries
            adapters or an attached mask already.
    """
    peft = _peft()
    source = Path(folder) / _FOLDER
    _check_untouched(model)
    if not (source / "adapter_config.json").is_file():
        raise FishError(f"{source} has no adapter_config.json: expected a folder written by save_adapter")
    _settle_sparse_checks()
    with torch.random.fork_rng(devices=[]), _quiet(), _one_error(source):  # PEFT draws first weights, then overwrites
        loaded = peft.PeftModel.from_pretrained(model, str(source))
        held = set(peft.utils.load_peft_weights(str(source), device="cpu"))
        wanted = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
        if held != wanted:
            raise ValueError(f"tensors that only one of the two has: {', '.join(sorted(held ^ wanted)[:5])}")
    return loaded.eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise FishError("LoRA and SHiRA need the library PEFT: pip install 'fishmask[peft]'") from error
    return peft


def _check_untouched(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        raise FishError("the model carries adapters of PEFT already; load the base afresh")
    if is_attached(model):
        raise FishError("a mask is attached to the model; detach() or revert() its Tuning first")


def _body_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of the pretrained body, without the pooler and without projections of embeddings."""
    prefix = getattr(model, "base_model_prefix", "")
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and (not prefix or name.startswith(f"{prefix}."))
        and not any(part == "pooler" or "embed" in part for part in name.split("."))
    }


def _modules_to_save(model: nn.Module, kept: Sequence[str]) -> list[str]:
    """Name the modules that PEFT is to train whole for these parameters."""
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in kept))
    # PEFT takes every module whose name ends so: "classifier" also takes a "pre_classifier".
    taken = tuple(f"{path}." for path, _ in model.named_modules() if path.endswith(tuple(owners)))
    if more := [name for name in canonical_parameters(model) if name.startswith(taken) and name not in kept]:
        raise ValueError(f"head names only a part of what PEFT would train with it; add {', '.join(more)}")
    return owners


def _mask_per_layer(draw: Any, seed: int) -> Any:
    """Wrap PEFT's mask function so that each layer it is called for gets a seed of its own."""
    seeds = torch.Generator().manual_seed(seed)

    def mask(layer: nn.Module, r: int, **options: Any) -> Any:
        own = int(torch.randint(2**62, (), generator=seeds))
        return draw(layer, r, **{**options, "random_seed": own})

    return mask


def _settle_sparse_checks() -> None:
    """State PyTorch's default, no checks of sparse tensors: it warns of SHiRA's, once, while nobody has chosen."""
    if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
        torch.sparse.check_sparse_tensor_invariants.disable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PEFT's calls into transformers warn of: old names, about which users of ours can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _one_error(source: Path) -> Iterator[None]:
    """Turn what loading may raise into one FishError that names the folder."""
    try:
        yield
    except Exception as error:  # safetensors, PEFT and torch share no class of errors
        raise FishError(f"cannot load the adapter in {source} into this model: {error}") from error
