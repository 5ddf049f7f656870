"""What a training step takes in memory, told before it is run: by parts, and at its peak."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from fishmask.attach import attach
from fishmask.costs import planned_for
from fishmask.empty import empty_model, prepared, rank_of, recompute, tokens
from fishmask.errors import FishError
from fishmask.ledger import Ledger
from fishmask.mask import Mask
from fishmask.quantized import weights
from fishmask.stand_in import StandIn

OptimizerName = Literal["adamw", "adamw8bit", "sgd"]

PARTS = {
    "weights": "weights and buffers",
    "values": "values, or adapters",
    "masks": "masks and plans",
    "activations": "saved activations",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "workspace": "workspace",
}
_DENSITY = 0.005
_GRANULE = {"cpu": 64, "cuda": 512}  # bytes that the allocators of PyTorch align a block to
# bitsandbytes: a scale for so many numbers, and tensors smaller than this keep their state in float32.
_SCALED, _SMALLEST = 256, 4096


@dataclass(frozen=True)
class Forecast:
    """The memory of one training step, in bytes.

    Attributes:
        method: What is trained: "fish", "full", "lora:16", or "floor" for nothing.
        n: Entries of the model.
        trained: Entries that training changes.
        batch: The shape of the batch: examples, tokens of each; empty where it is not tokens.
        dtype: That of the weights.
        device: The kind of device whose kernels are reckoned with.
        optimizer: The optimizer whose state is reckoned with.
        checkpointing: Whether activations are computed again in the backward.
        parts: Bytes by part when their sum is largest; the keys of ``PARTS``.
        most: The most bytes that each part has at any moment of the step.
        host: Bytes of the mask's own indices, which are in the host's memory; they count in ``parts`` on the CPU.
    """

    method: str
    n: int
    trained: int
    batch: tuple[int, ...]
    dtype: str
    device: str
    optimizer: str
    checkpointing: bool
    parts: dict[str, int]
    most: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        """The most bytes of all parts together."""
        return sum(self.parts.values())

    def record(self) -> dict[str, Any]:
        """Return everything as plain Python, for JSON."""
        return {**asdict(self), "peak": self.peak}

    def __str__(self) -> str:
        about = f"{self.method}: {self.trained:,} of {self.n:,} entries, {self.dtype}, {self.device}, {self.optimizer}"
        lines = [f"{'':<22}{'at the peak':>14}{'at most':>14}"]
        for part, label in PARTS.items():
            lines.append(f"{label:<22}{size_text(self.parts[part]):>14}{size_text(self.most[part]):>14}")
        return "\n".join([about, *lines, f"{'together':<22}{size_text(self.peak):>14}"])


def forecast(
    model: Any,
    *,
    batch: tuple[int, int] | Mapping[str, Tensor],
    method: str = "fish",
    density: float | None = None,
    mask: Mask | None = None,
    optimizer: OptimizerName = "adamw",
    dtype: torch.dtype | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    checkpointing: bool = False,
    seed: int = 0,
) -> Forecast:
    """Tell how much memory a training step takes, without loading weights and without computing anything.

    A step is run on the meta device, where tensors have sizes and no data, with the attention and dropout of the device
    that is asked for; every block of memory is followed from its birth to its end. So it is what PyTorch's allocator
    gives out. Outside are what single kernels and libraries take while they run, what the allocator rounds up, the
    process itself, and what glibc keeps of freed memory: docs/large_models.md says how much, and how to have it back.

    Args:
        model: A model, which is not touched; a configuration of transformers; or a model folder or a name on the hub,
            of which only the configuration and the headers of the weights are read. Those are made for classification
            of sequences, or causal language models where the configuration says so.
        batch: (examples, tokens of each), without padding; or, for models that take anything else, the arguments of
            one call as a mapping of tensors. The model's output must have a ``loss``.
        method: "fish", entries of a mask; "full", everything; "lora:R", LoRA of rank R on all linear layers; "floor",
            nothing, but the gradients of all inputs.
        density: For "fish": the share of entries of a random mask, by default 0.005. Its plans are those of scattered
            entries, the most that this count takes.
        mask: For "fish": the mask itself, exact.
        optimizer: "adamw", ``torch.optim.AdamW(fused=True)``, since other kinds take temporary copies;
            "adamw8bit", that of bitsandbytes; "sgd", without momentum.
        dtype: That of the weights; by default the model's own.
        device: Whose kernels to reckon with; it need not be there.
        checkpointing: Reckon with transformers' gradient checkpointing.
        seed: Seed of the random mask.

    Returns:
        The bytes, by part and together.

    Raises:
        ValueError: An unknown method, a mask beside a density or another method, or a batch that is empty or longer
            than the model's positions.
        FishError: The model is attached, quantized or sharded; its step depends on its data, or fails without them; or
            PEFT makes no LoRA of it.

    Example:
        >>> from transformers import BertConfig
        >>> told = forecast(BertConfig(num_hidden_layers=2), batch=(8, 32), density=0.01)
        >>> told.parts["weights"] > told.parts["gradients"]
        True
    """
    rank_of(method)
    if method != "fish" and (mask is not None or density is not None):
        raise ValueError(f"density and mask are for method 'fish', got them with {method!r}")
    if mask is not None and density is not None:
        raise ValueError("a mask has its density: give density or mask, not both")
    if optimizer not in ("adamw", "adamw8bit", "sgd"):
        raise ValueError(f"optimizer must be 'adamw', 'adamw8bit' or 'sgd', got {optimizer!r}")
    if device not in _GRANULE:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    empty = empty_model(model, dtype)
    inputs = tokens(empty, *batch) if isinstance(batch, tuple) else {n: t.to("meta") for n, t in batch.items()}
    if checkpointing:
        recompute(empty)
    if method == "fish" and mask is None:
        mask = Mask.random(empty, _DENSITY if density is None else density, seed)
    n = sum(p.numel() for p in weights(empty).values())
    ledger = Ledger(granule=_GRANULE[device], host=device == "cpu")
    with torch.random.fork_rng(devices=[]), StandIn(device), planned_for(device):
        trained = account(empty, inputs, ledger, method=method, mask=mask, optimizer=optimizer)
    most, parts = ledger.parts("workspace", since="forward")
    return Forecast(
        method=method,
        n=n,
        trained=trained,
        batch=tuple(batch) if isinstance(batch, tuple) else (),
        dtype=dtype_text(empty),
        device=device,
        optimizer=optimizer,
        checkpointing=checkpointing,
        parts={part: parts.get(part, 0) for part in PARTS},
        most={part: most.get(part, 0) for part in PARTS},
        host=0 if mask is None else sum(indices.nbytes for indices in mask.indices.values()),
    )


def account(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    ledger: Ledger,
    *,
    method: str,
    mask: Mask | None,
    optimizer: OptimizerName,
) -> int:
    """Prepare a model, on any device, for training, run one step, and note in a ledger what it takes.

    Returns:
        How many entries are trained.

    Raises:
        FishError: The step fails, or PEFT makes no LoRA of the model.
    """
    ledger.hold([*model.parameters(), *model.buffers()], "weights")
    own = {id(p) for p in model.parameters()}
    name, tuning = type(model).__name__, None
    if mask is not None:
        ledger.hold(mask.indices.values(), "masks")
    with ledger:
        ledger.begin("masks")
        if mask is not None:
            tuning = attach(model, mask)
            trained = list(tuning.parameters())
            ledger.hold([tuning.values], "values")
        else:
            model = prepared(model, method)
            trained = [p for p in model.parameters() if p.requires_grad]
            ledger.hold([p for p in model.parameters() if id(p) not in own], "values")
        ledger.keep("masks")
        ledger.begin("state")
        state = optimizer_state(trained, optimizer)
        ledger.keep("optimizer")
        with _one_error(name, dtype_text(model)):
            ledger.begin("forward")
            loss = model(**inputs).loss
            ledger.keep("activations")
            ledger.begin("backward")
            # Not loss.backward(): modes that stand in for functions are off inside functions they were asked about.
            ones = torch.ones_like(loss)
            _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
            del loss, ones
        ledger.hold([p.grad for p in trained if p.grad is not None], "gradients")
        ledger.begin("step")
        if tuning is not None:
            tuning.write_back()
            tuning.detach()
        del state
    return sum(p.numel() for p in trained)


@contextmanager
def _one_error(name: str, dtype: str) -> Iterator[None]:
    """Turn whatever a model's own code raises in a step into one error that says what to do."""
    try:
        yield
    except FishError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if "meta" in reason.lower():
            text = f"a step of {name} depends on its data, not on sizes alone ({reason}): measure a real step instead"
        else:
            text = (
                f"a step of {name} in {dtype} cannot be run without data ({reason}): give another dtype, a "
                "configuration with all that the model needs, or a batch with labels that its forward takes"
            )
        raise FishError(text) from error


def dtype_text(model: nn.Module) -> str:
    """Write the dtype of a model's weights for a person."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def optimizer_state(trained: Iterable[Tensor], optimizer: OptimizerName) -> list[Tensor]:
    """Make tensors as large as an optimizer's state."""
    state: list[Tensor] = []
    for p in trained:
        if optimizer == "adamw":
            state += [torch.empty_like(p), torch.empty_like(p)]
        elif optimizer == "adamw8bit" and p.numel() < _SMALLEST:
            state += [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]
        elif optimizer == "adamw8bit":
            scales = -(-p.numel() // _SCALED)
            for _ in range(2):
                state += [torch.empty_like(p, dtype=torch.uint8), torch.empty(scales, device=p.device)]
    return state


def size_text(count: float) -> str:
    """Write a number of bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
