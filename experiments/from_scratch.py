"""One training from scratch on CIFAR-10: its configuration, its epochs, what it is chosen and judged by."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.images import TrainingImages, normalised
from experiments.masked_sgd import MOMENTUM, WEIGHT_DECAY, Attached, Saved, Training, Whole, decay_multiplier
from experiments.resnet import HEADS, resnet9, resnet34
from fishmask import FishError, Mask, fisher
from fishmask.measure import environment

Record = dict[str, Any]

# What random numbers are for; each stream is decided by (seed, epoch, purpose, worker).
_TRAINING, _SCORING, _STATISTICS, _CHOICE = range(4)
_SCORED_AT_ONCE = 64
_TESTED_AT_ONCE = 500


@dataclass(frozen=True)
class Config:
    """One run."""

    model: str = field(default="resnet34", metadata={"choices": tuple(HEADS)})
    width: int = field(default=64, metadata={"help": "channels of the first layer of a ResNet-9"})
    method: str = field(default="fish", metadata={"choices": ("dense", "fish", "random")})
    density: float = field(default=0.005, metadata={"help": "share of all entries that are trained; 1 for dense"})
    refresh: str = field(default="never", metadata={"choices": ("never", "epoch"), "help": "when to choose a new mask"})
    decay: str = field(default="masked", metadata={"choices": ("masked", "leak"), "help": "what weight decay reaches"})
    lr: float = field(default=0.4, metadata={"help": "highest learning rate"})
    epochs: int = field(default=100, metadata={})
    peak: float = field(default=5.0, metadata={"help": "epochs after which the learning rate is highest"})
    images: int = field(default=50_000, metadata={"help": "training images, of each class equally many"})
    batch: int = field(default=512, metadata={})
    examples: int = field(default=1024, metadata={"help": "training images that Fisher scores are summed over"})
    seed: int = field(default=0, metadata={"help": "decides weights, order, augmentation and random masks"})
    precision: str = field(default="float32", metadata={"choices": ("float32", "bfloat16")})

    def check(self) -> None:
        """Raise ValueError for what cannot be run."""
        for item in fields(self):
            choices = item.metadata.get("choices")
            if choices and (value := getattr(self, item.name)) not in choices:
                raise ValueError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.method == "dense" and (self.density, self.refresh, self.decay) != (1.0, "never", "masked"):
            raise ValueError("method dense trains everything: density must be 1, refresh never and decay masked")
        if not 0 < self.peak < self.epochs:
            raise ValueError(f"peak must be between 0 and the number of epochs, {self.epochs}; got {self.peak}")
        if not 0 < self.batch <= self.images:
            raise ValueError(f"batch must be from 1 to the number of images, {self.images}; got {self.batch}")
        if self.examples > self.images:
            raise ValueError(f"there are {self.images} images, so {self.examples} examples cannot be scored")

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches."""
        return self.images // self.batch

    def rates(self) -> list[float]:
        """Return the learning rate of each step: 0 to ``lr`` at epoch ``peak``, to 0 at the last."""
        steps = np.arange(1, self.epochs * self.steps_per_epoch + 1) / self.steps_per_epoch
        return [float(rate) for rate in np.interp(steps, (0, self.peak, self.epochs), (0.0, self.lr, 0.0))]


@dataclass(frozen=True)
class Images:
    """What a run trains and is tested on, on its device."""

    training: TrainingImages
    test: tuple[Tensor, Tensor]  # uint8 [N, 32, 32, 3], int64 [N]


def run(config: Config, images: Images, folder: Path, tell: Callable[[str], None] = lambda line: None) -> Record:
    """Train and test once; go on from the last commit in ``folder`` if there is one.

    A training whose loss is no longer finite ends there and is tested as it is.

    Args:
        config: What to run.
        images: Training images, as many as ``config`` says, and test images.
        folder: Where saves go; an empty one, or the log of this very run.
        tell: Takes a line of text after each epoch.

    Returns:
        The record: configuration, accuracy on the test images (a fraction), mean training loss and seconds of each
        epoch, bytes and seconds of each save (the first is made before training), entries, and the multiplier of
        frozen weights, expected and found.

    Raises:
        ValueError: The configuration cannot be run on these images.
        FishError: The folder is the log of another run.
    """
    config.check()
    if len(images.training) != config.images:
        raise ValueError(f"the configuration says {config.images} images, but there are {len(images.training)}")
    folder.mkdir(parents=True, exist_ok=True)
    device = images.test[0].device
    torch.manual_seed(config.seed)
    fresh = resnet34() if config.model == "resnet34" else resnet9(config.width)
    model = fresh.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    began = time.perf_counter()
    training = begin(config, model, images.training, folder)
    seconds_scoring = now(device) - began
    try:
        state = training.restored or {"config": asdict(config), "history": [], "saves": []}
        if state["config"] != asdict(config):
            raise FishError(f"{folder} is the log of another run, {state['config']}; name another folder")
        history, saves, rates = list(state["history"]), list(state["saves"]), config.rates()
        if training.restored is None:
            saves.append(list(training.save(0, state)))
        else:
            seconds_scoring = 0.0
        for epoch in range(len(history), config.epochs):
            if epoch and config.refresh == "epoch":
                began = time.perf_counter()
                training.set_mask(choose(config, model, images.training, epoch))
                seconds_scoring = now(device) - began
            began = time.perf_counter()
            loss = train_epoch(config, model, training, images.training, epoch, rates)
            seconds = {"seconds_training": now(device) - began, "seconds_scoring": seconds_scoring}
            seconds_scoring = 0.0
            history.append({"loss": loss if math.isfinite(loss) else None, **seconds})
            tell(f"epoch {epoch + 1} of {config.epochs}, loss {loss:.4f}, {seconds['seconds_training']:.1f} s")
            if not math.isfinite(loss):
                break
            done = {"config": asdict(config), "history": history, "saves": saves}
            saves.append(list(training.save((epoch + 1) * config.steps_per_epoch, done)))
        right = accuracy(config, model, images.test)
        return {
            **_record(config, model, training, history, saves),
            "accuracy": right,
            "test_images": len(images.test[1]),
        }
    finally:
        training.close()


def _record(
    config: Config, model: nn.Module, training: Training, history: list[Record], saves: list[list[float]]
) -> Record:
    diverged = history[-1]["loss"] is None
    parameters = list(model.parameters())
    device = parameters[0].device
    return {
        "config": asdict(config),
        "images": "JPEG copies",
        "diverged": diverged,
        "entries": sum(p.numel() for p in parameters),
        "masked": training.masked,
        "multiplier_expected": decay_multiplier(config.rates()) if config.decay == "leak" else None,
        "multiplier": None if diverged else training.multiplier(),
        **{name: [one[name] for one in history] for name in ("loss", "seconds_training", "seconds_scoring")},
        **{f"save_{name}": list(column) for name, column in zip(Saved._fields, zip(*saves, strict=True), strict=True)},
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **environment(),
    }


def begin(config: Config, model: nn.Module, images: TrainingImages, folder: Path) -> Training:
    """Return the training of a fresh model, with its first mask, or as the log in ``folder`` has it."""
    if config.method == "dense":
        return Whole(model, folder, None)
    if config.decay == "leak":
        return Whole(model, folder, choose(config, model, images, 0))
    return Attached(model, folder, lambda: choose(config, model, images, 0))


def choose(config: Config, model: nn.Module, images: TrainingImages, epoch: int) -> Mask:
    """Choose the mask of an epoch: by Fisher scores of the present weights, or at random.

    Scores are summed over augmented training images with their labels, in eval mode, which is what makes them defined
    for each image on its own. Before training, the running statistics of BatchNorm are set to those of the images
    first: the ones of a fresh model would have it scored as a network without normalisation.

    Source:
        Section 2 of the paper. The authors score single images in train mode, each its own batch.
    """
    head = HEADS[config.model]
    if config.method == "random":
        return Mask.random(model, config.density, seed_of_choice(config, epoch), keep=head)
    if epoch == 0:
        size = math.gcd(config.examples, _SCORED_AT_ONCE)
        settle_statistics(model, images.batches(size, _rng(config, epoch, _STATISTICS)), config.examples // size)
    return Mask.from_scores(score(config, model, images, epoch), config.density, keep=head)


def seed_of_choice(config: Config, number: int) -> int:
    """Return the seed of the random mask with this number."""
    return int(_rng(config, number, _CHOICE).integers(2**31))


def score(
    config: Config, model: nn.Module, images: TrainingImages, number: int, worker: int = 0, workers: int = 1
) -> dict[str, Tensor]:
    """Return the Fisher scores that the mask with this number is chosen by, summed over this worker's examples.

    All workers together take the examples that one would take alone.
    """
    share = config.examples // workers
    # Divides the share, so that no batch is dropped before it is reached.
    batches = images.batches(math.gcd(share, _SCORED_AT_ONCE), _rng(config, number, _SCORING))
    return fisher(model, islice(batches, worker, None, workers), examples=share)


@torch.no_grad()
def settle_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
    """Set the running statistics of BatchNorm to their means over ``count`` batches; the model is left in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    model.train()
    for images, _ in islice(batches, count):
        model(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def train_epoch(
    config: Config, model: nn.Module, training: Training, images: TrainingImages, epoch: int, rates: Sequence[float]
) -> float:
    """Train for one epoch (counted from 0) at its part of the learning ``rates``; return the mean loss."""
    model.train()
    total = torch.zeros((), device=next(model.parameters()).device)
    first = epoch * config.steps_per_epoch
    for step, (pixels, labels) in enumerate(training_batches(config, images, epoch), first):
        set_rate(training.optimizer, rates[step])
        total += backward(config, model, pixels, labels)
        training.mask_gradients()
        training.optimizer.step()
        training.optimizer.zero_grad()
    return float(total) / config.steps_per_epoch


def training_batches(
    config: Config, images: TrainingImages, epoch: int, worker: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches; every worker has an order and augmentation of its own over all images."""
    return images.batches(config.batch, _rng(config, epoch, _TRAINING, worker))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def backward(config: Config, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Add the gradient of the mean cross-entropy of a batch; return that loss, detached."""
    with _precision(config, pixels.device):
        logits = model(pixels)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def accuracy(config: Config, model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Return the share of test images that are told right, seen once each as they are."""
    model.eval()
    right = 0
    for pixels, labels in zip(*(torch.split(part, _TESTED_AT_ONCE) for part in test), strict=True):
        with _precision(config, pixels.device):
            right += int((model(normalised(pixels)).argmax(1) == labels).sum())
    return right / len(test[1])


def _rng(config: Config, epoch: int, purpose: int, worker: int = 0) -> np.random.Generator:
    return np.random.default_rng((config.seed, epoch, purpose, worker))


def _precision(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def now(device: torch.device) -> float:
    """Return the time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
