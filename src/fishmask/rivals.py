"""The methods that we compare with: LoRA and SHiRA, through the library PEFT, and Diff Pruning, which nobody keeps."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fishmask.data import Encoded
from fishmask.errors import Diverged, FishError
from fishmask.live import is_attached
from fishmask.loop import Progress, autocast, device_of, no_progress, other_batches, to_device
from fishmask.mask import Mask
from fishmask.params import canonical_parameters, matching, take
from fishmask.recipe import Recipe
from fishmask.select import budget

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
    return loaded


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


# --- Diff Pruning -----------------------------------------------------------------------------------------------------

# What the authors' published code runs with (github.com/dguo98/DiffPruning, run_glue_diffpruning.py).
LOWER, UPPER = -1.5, 1.5
LOG_ALPHA = 5.0
GATE_RATE = 0.1
PENALTY = 1.25e-7


def hard_concrete(
    log_alpha: Tensor, uniform: Tensor, lower: float = LOWER, upper: float = UPPER, temperature: float = 1.0
) -> Tensor:
    """Draw gates in [0, 1] that are exactly 0 or 1 with a chance of their own, and yet have gradients.

    Args:
        log_alpha: Location of each gate, any shape: the larger, the more open.
        uniform: One uniform random number in [0, 1) per gate, of the same shape.
        lower: Below 0. The concrete variable in (0, 1) is stretched to (lower, upper), then cut off at 0 and 1.
        upper: Above 1.
        temperature: The lower, the more of the gates are near 0 or 1.

    Returns:
        The gates, differentiable in ``log_alpha``.

    Source:
        Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization", section 2.
    """
    concrete = torch.sigmoid((torch.logit(uniform) + log_alpha) / temperature)
    return (concrete * (upper - lower) + lower).clamp(0, 1)


def chance_of_opening(
    log_alpha: Tensor, lower: float = LOWER, upper: float = UPPER, temperature: float = 1.0
) -> Tensor:
    """Return the probability that a hard-concrete gate is not 0; their sum is the expected L0 norm."""
    return torch.sigmoid(log_alpha - temperature * math.log(-lower / upper))


def settled_gate(log_alpha: Tensor, lower: float = LOWER, upper: float = UPPER) -> Tensor:
    """Return the gate without its noise, as for prediction."""
    return (torch.sigmoid(log_alpha) * (upper - lower) + lower).clamp(0, 1)


class Differences:
    """Trainable differences from a model's weights, most of them behind hard-concrete gates.

    The weights are never changed: :meth:`drawn` makes new tensors from them.

    Args:
        parameters: The weights by name.
        whole: Names of those whose differences have no gates.
        frozen: Names of those without differences.
        structured: Give each tensor one more gate, which multiplies those of its entries.

    Attributes:
        values: The differences, by name and of the shape of the weights; zero at first.
        log_alpha: The gates' locations: one tensor of the shape of the weights for each gated name.
        shared: The locations of the gates that a whole tensor shares, one number each; empty unless ``structured``.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        whole: Sequence[str] = (),
        frozen: Sequence[str] = (),
        structured: bool = True,
    ) -> None:
        self._weights = {name: p.detach() for name, p in parameters.items()}
        self.values: dict[str, Tensor] = {}
        self.log_alpha: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            if name in frozen:
                continue
            # bfloat16 cannot hold small steps: differences and gates have at least float32.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.values[name] = torch.zeros_like(weight, dtype=dtype).requires_grad_()
            if name not in whole:
                self.log_alpha[name] = torch.full_like(weight, LOG_ALPHA, dtype=dtype).requires_grad_()
                if structured:
                    self.shared[name] = weight.new_full((), LOG_ALPHA, dtype=dtype).requires_grad_()

    @property
    def gates(self) -> list[Tensor]:
        """The locations of all gates."""
        return [*self.log_alpha.values(), *self.shared.values()]

    def drawn(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return all weights, moved by the differences behind gates drawn at random; differentiable."""

        def draw(log_alpha: Tensor) -> Tensor:
            uniform = torch.rand(log_alpha.shape, generator=generator, dtype=log_alpha.dtype, device=log_alpha.device)
            return hard_concrete(log_alpha, uniform)

        moved = dict(self._weights)
        for name, change in self._changes(draw).items():
            moved[name] = (moved[name] + change).to(moved[name].dtype)
        return moved

    @torch.no_grad()
    def settled(self) -> dict[str, Tensor]:
        """Return the differences of all weights but the frozen ones, behind gates without noise."""
        return self._changes(settled_gate)

    def _changes(self, gate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        changes = dict(self.values)
        for locations in (self.log_alpha, self.shared):
            for name, log_alpha in locations.items():
                changes[name] = gate(log_alpha) * changes[name]
        return changes

    def penalty(self) -> Tensor:
        """Return the expected number of gates that are not 0, those of whole tensors included; differentiable."""
        return torch.stack([chance_of_opening(log_alpha).sum() for log_alpha in self.gates]).sum()


def diff_pruning(
    model: nn.Module,
    data: Encoded,
    recipe: Recipe,
    keep: tuple[str, ...],
    steps: int,
    progress: Progress = no_progress,
    *,
    penalty: float = PENALTY,
    structured: bool = True,
) -> tuple[Mask, dict[str, Tensor]]:
    """Choose entries, and their first values, by training gated differences of all weights under an L0 penalty.

    Every weight becomes θ + z·w, with a trained difference w and a random gate z in [0, 1]; the loss grows by
    ``penalty`` times the expected number of open gates. Then the noise is taken out, and the budget goes to the kept
    parameters, whose differences have no gates, and to the entries with the largest abs(z·w). Go on training with the
    mask fixed, from the values returned here.

    It needs far more memory than full fine-tuning: differences and gates, with a gradient and two optimizer states
    each, are eight times the model, and a step makes about five more tensors of its size.

    Args:
        model: A model whose forward takes ``data.batch(...)`` and returns ``.loss``. It is not changed, not even for
            the time of the training.
        data: Training examples with targets.
        recipe: Density, excluded parameters, batch size, seed, weight decay, clipping, precision, and ``dense_rate``:
            the peak learning rate of the differences, which falls linearly to zero.
        keep: Names or patterns of parameters to train whole, counted in the budget: the new head.
        steps: Optimizer steps to train for.
        progress: Called with "dense training", the steps done and the steps in all.
        penalty: Weight of the L0 penalty.
        structured: Let the entries of each tensor share one more gate, the authors' "structured" variant.

    Returns:
        The mask, and for each name in it the values θ + z·w of its entries, in the order of the mask's indices: what
        to copy into the parameters of ``fishmask.attach(model, mask)`` by name.

    Raises:
        ValueError: The budget, ``keep`` or ``exclude`` do not fit (see ``Mask.from_scores``); no steps; no targets.
        FishError: The loss is not finite; the model carries adapters or an attached mask, or checkpoints activations.

    Source:
        Guo, Rush, Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning", ACL. As in the authors' code:
        the gates' constants, their rate of 0.1 (constant: the code makes a schedule for them and never uses it), and
        clipping of differences and gates apart. Unlike it: the entries are ranked without the noise of the last step.
    """
    if steps < 1:
        raise ValueError(f"Diff Pruning needs at least one step; got steps={steps}")
    if data.targets is None:
        raise ValueError("training needs examples with labels")
    _check_untouched(model)
    parameters = canonical_parameters(model)
    sizes = {name: p.numel() for name, p in parameters.items()}
    whole, free, _ = budget(sizes, recipe.density, keep, recipe.exclude)
    if not free:
        raise ValueError("keep and exclude leave Diff Pruning no entries to choose from")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        # The second forward would run on the model's own weights, without the differences, and nobody would notice.
        raise FishError("Diff Pruning cannot recompute activations: call model.activation_checkpointing_disable()")
    frozen = [name for name in sizes if name not in whole and name not in free]
    differences = Differences(dict(parameters), whole, frozen, structured)
    _train_differences(model, differences, data, recipe, steps, progress, penalty)
    changes = differences.settled()
    scores = {name: changes[name].abs() if name in changes else torch.zeros_like(p) for name, p in parameters.items()}
    mask = Mask.from_scores(scores, recipe.density, keep=keep, exclude=recipe.exclude)
    return mask, {
        name: take(parameters[name], indices).float() + take(changes[name], indices).float()
        for name, indices in mask.indices.items()
    }


def _train_differences(
    model: nn.Module,
    differences: Differences,
    data: Encoded,
    recipe: Recipe,
    steps: int,
    progress: Progress,
    penalty: float,
) -> None:
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    values, gates = list(differences.values.values()), differences.gates
    groups = [
        {"params": values, "lr": recipe.dense_rate, "weight_decay": recipe.weight_decay},
        {"params": gates, "lr": GATE_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 - step / steps, lambda step: 1.0])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    model.train()
    try:
        for step, batch in enumerate(islice(other_batches(data, recipe), steps), start=1):
            weights = differences.drawn(generator)
            with autocast(device, recipe.precision):
                loss = functional_call(model, weights | buffers, kwargs=to_device(batch, device)).loss
            if not loss.isfinite():
                raise Diverged(f"the loss became {loss.item()}; try a lower dense_rate")
            loss.backward()
            (penalty * differences.penalty()).backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(values, recipe.clip)
                nn.utils.clip_grad_norm_(gates, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress("dense training", step, steps)
    finally:
        model.train(training)
