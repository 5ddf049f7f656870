"""The paper's training on several workers: CIFAR-10 from scratch, masked values averaged every H steps.

    torchrun --standalone --nproc-per-node 2 -m experiments.distributed_cifar10 DATA --plan reduced
    python -m experiments.distributed_cifar10 DATA --plan reduced      # the runs of a single worker

DATA is as for ``experiments.cifar10``. The processes stay and do all runs of a plan for as many workers as there are,
one after the other; runs that have a record are skipped, and rank 0 adds each record as soon as it is there.

Every worker takes 1/W of the single worker's epochs, each over all images in its own order, with its own Nesterov SGD.
Training begins dense, in rounds of a mask of everything, until the learning rate is highest. Then all workers merge,
and a mask is chosen: by Fisher scores of the merged model, each worker scoring its share of the examples, or at random,
from a seed that all know. It is chosen anew after every tenth round. BatchNorm's statistics are averaged in each round;
the merged model is tested.

Source: section 3 of the paper. The authors' mask after the warm-up is of the model as it was at the last merge, which
can be the untrained one. Their random masks are disjoint, but averaged over all workers (--plan has both forms).
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn

from experiments import from_scratch
from experiments.cifar10 import read_records
from experiments.from_scratch import (
    Images,
    Record,
    accuracy,
    backward,
    now,
    score,
    seed_of_choice,
    set_rate,
    training_batches,
)
from experiments.images import TrainingImages, read_images
from experiments.masked_sgd import MOMENTUM, WEIGHT_DECAY, sgd
from experiments.resnet import HEADS, resnet9, resnet34
from fishmask import LocalRounds, Mask, attach
from fishmask.errors import RoundError
from fishmask.live import paused
from fishmask.measure import environment
from fishmask.params import canonical_parameters
from fishmask.protocol import PRESETS
from fishmask.round_log import read_log
from fishmask.wire import Wire

RESULTS = Path("results/distributed_cifar10.jsonl")
PAPER = PRESETS["paper-cifar"]


@dataclass(frozen=True)
class Config(from_scratch.Config):
    """One run; epochs, peak and rounds are those of each worker."""

    refresh: str = field(default="rounds", metadata={"choices": ("never", "rounds")})
    workers: int = 2
    every: int = 500  # steps from one round to the next
    masks: str = field(default="shared", metadata={"choices": ("shared", "own")})
    reduction: str = field(default="mean", metadata={"choices": ("mean", "sum")})

    def check(self) -> None:
        """Raise ValueError for what cannot be run."""
        super().check()
        if self.decay != "masked":
            raise ValueError(
                f"weight decay reaches the masked entries only here: decay must be masked, not {self.decay}"
            )
        if self.masks == "own" and self.method != "random":
            raise ValueError(f"masks of the workers' own are random ones, method {self.method} has a shared one")
        if self.reduction == "sum" and self.masks == "shared":
            raise ValueError("a sum is for masks of the workers' own: with a shared one it would multiply every step")
        if self.workers < 1 or self.examples % self.workers:
            raise ValueError(f"{self.examples} examples cannot be shared out evenly to {self.workers} workers")

    @property
    def steps(self) -> int:
        """Steps of each worker."""
        return self.epochs * self.steps_per_epoch

    @property
    def warm_up(self) -> int:
        """Steps of each worker before the first mask is chosen; 0 where everything is trained throughout."""
        return 0 if self.method == "dense" else round(self.peak * self.steps_per_epoch)

    @property
    def merges(self) -> int:
        """Rounds of the whole training, nearly."""
        return round(self.steps / self.every)


# --- one run ----------------------------------------------------------------------------------------------------------


def run(config: Config, images: Images, log: Path) -> Record | None:
    """Train and test once; call it on all workers of the process group.

    A training in which values are no longer finite ends there; the model is tested as it was after the last round.

    Args:
        config: What to run.
        images: Training images, as many as ``config`` says, and test images.
        log: Where rank 0 writes the log of the rounds; it must not exist.

    Returns:
        On rank 0 the record: configuration, accuracy on the test images (a fraction), mean training loss of each epoch
        of rank 0, how often a mask was chosen, entries, and by the log of rank 0 the rounds, bytes and seconds. Bytes
        are told apart: payload of dense rounds, payload of the others, everything else. None on other ranks.

    Raises:
        ValueError: The configuration cannot be run on these images or with this many workers.
    """
    config.check()
    wire = Wire()
    if len(images.training) != config.images:
        raise ValueError(f"the configuration says {config.images} images, but there are {len(images.training)}")
    if wire.size != config.workers:
        raise ValueError(f"the configuration says {config.workers} workers, but there are {wire.size}")
    device = images.test[0].device
    torch.manual_seed(config.seed)
    model = (resnet34() if config.model == "resnet34" else resnet9(config.width)).to(device)
    tuning = attach(model, _everything(model))
    optimizer = sgd(tuning.parameters())
    own = config.masks == "own"
    began = now(device)
    with LocalRounds(
        tuning,
        every=config.every,
        masks="own" if own else "shared",
        reduction="sum" if config.reduction == "sum" else "mean",
        denominator="participants" if own and config.reduction == "mean" else None,
        # What all workers hold: the head, and during the warm-up everything.
        head="mean" if own else None,
        log=log,
    ) as rounds:
        try:
            losses, seconds_choosing, masked = _train(config, model, images.training, rounds, optimizer, wire.rank)
            rounds.finish()
            diverged = False
        except RoundError as error:
            if not error.reasons:
                raise  # the connection is gone, not the training
            rounds.discard()
            losses, seconds_choosing, masked, diverged = [], [], tuning.mask.k, True
    seconds = now(device) - began
    mine = tuple(part[wire.rank :: wire.size] for part in images.test)
    right = round(accuracy(config, model, (mine[0], mine[1])) * len(mine[1]))
    right = int(wire.gather(torch.tensor([right])).sum())
    if wire.rank:
        return None
    done = [line for line in read_log(log) if "digest" in line]
    dense = [line["payload_bytes"] for line in done if config.method == "dense" or line["step"] <= config.warm_up]
    return {
        "config": asdict(config),
        "images": "JPEG copies",
        "diverged": diverged,
        "accuracy": right / len(images.test[1]),
        "test_images": len(images.test[1]),
        "loss": losses,
        "entries": sum(p.numel() for p in model.parameters()),
        "masked": masked,
        "choices": len(seconds_choosing),
        "rounds": len(done),
        "dense_rounds": len(dense),
        "dense_bytes": sum(dense),
        "masked_bytes": sum(line["payload_bytes"] for line in done) - sum(dense),
        "other_bytes": sum(line["other_bytes"] for line in done),
        "wire_seconds": sum(line["wire_seconds"] for line in done),
        "wait_seconds": sum(line["wait_seconds"] for line in done),
        "seconds_choosing": sum(seconds_choosing),
        "seconds": seconds,
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **environment(),
    }


def _train(
    config: Config,
    model: nn.Module,
    images: TrainingImages,
    rounds: LocalRounds,
    optimizer: torch.optim.SGD,
    worker: int,
) -> tuple[list[float], list[float], int]:
    """Take all steps; return the loss of each epoch, the seconds of each choice of a mask, and the entries at last."""
    device = next(model.parameters()).device
    rates, losses, seconds = config.rates(), torch.zeros(config.epochs, device=device), []
    chosen = 0  # number of the round after which the mask was chosen
    model.train()
    batches = chain.from_iterable(training_batches(config, images, epoch, worker) for epoch in range(config.epochs))
    for step, (pixels, labels) in enumerate(batches):
        first = bool(config.warm_up) and step == config.warm_up
        if first:
            rounds.round()
        due = bool(seconds) and rounds.pending == 0 and rounds.number - chosen == PAPER.refresh_every
        if first or due:
            began = now(device)
            choose(config, model, rounds, optimizer, images, len(seconds), worker)
            seconds.append(now(device) - began)
            chosen = rounds.number
        set_rate(optimizer, rates[step])
        losses[step // config.steps_per_epoch] += backward(config, model, pixels, labels)
        optimizer.step()
        optimizer.zero_grad()
    return (losses / config.steps_per_epoch).tolist(), seconds, rounds.tuning.mask.k


def choose(
    config: Config,
    model: nn.Module,
    rounds: LocalRounds,
    optimizer: torch.optim.SGD,
    images: TrainingImages,
    number: int,
    worker: int,
) -> None:
    """Give all workers the mask with this number, right after a round."""
    if config.method == "random":
        rounds.set_mask(random_mask(config, model, number, worker), optimizer)
        return
    with paused(model):
        scores = score(config, model, images, number, worker, config.workers)
    rounds.refresh(scores, optimizer, density=config.density, keep=HEADS[config.model])


def random_mask(config: Config, model: nn.Module, number: int, worker: int) -> Mask:
    """Return a worker's random mask with this number: one for all, or disjoint ones of equal size and the head."""
    seed, head = seed_of_choice(config, number), HEADS[config.model]
    if config.masks == "shared":
        return Mask.random(model, config.density, seed, keep=head)
    parameters = canonical_parameters(model)
    names = {name: p.new_full(p.shape, name.startswith(f"{head}."), dtype=torch.bool) for name, p in parameters.items()}
    whole = Mask.from_dense(names)
    each = int(config.density * whole.n) - whole.k
    union = Mask.random(model, (config.workers * each + 0.5) / whole.n, seed, exclude=head)
    return union.split(config.workers)[worker] | whole


def _everything(model: nn.Module) -> Mask:
    return Mask.from_dense(
        {name: torch.ones_like(p, dtype=torch.bool) for name, p in canonical_parameters(model).items()}
    )


# --- plans ------------------------------------------------------------------------------------------------------------


def single(config: Config) -> Config:
    """Return the run of one worker that takes as many steps as all workers of ``config`` do, its mask renewed alike."""
    times = config.workers
    return replace(
        config,
        workers=1,
        masks="shared",
        reduction="mean",
        epochs=times * config.epochs,
        peak=times * config.peak,
        every=times * config.every,
    )


def _methods(base: Config, densities: Iterable[float]) -> list[Config]:
    """Return a dense run and both kinds of shared mask."""
    dense = replace(base, method="dense", density=1.0, refresh="never")
    masked = [replace(base, method=method, density=density) for density in densities for method in ("fish", "random")]
    return [dense, *masked]


def _own(base: Config, densities: Iterable[float]) -> list[Config]:
    """Return the random masks of the workers' own, averaged as the authors have it and summed."""
    random = replace(base, method="random", masks="own")
    return [replace(random, density=d, reduction=how) for d in densities for how in ("mean", "sum")]


def paper() -> Iterator[Config]:
    """Table 3's setting over the authors' learning rates, single workers and the other random masks beside it."""
    densities = (0.005, 0.02, 0.1)
    for lr in (0.4, 0.2, 0.08, 0.04, 0.02):
        base = Config(lr=lr, epochs=50, examples=256)
        cells = []
        for every in (500, 100, 2500):
            shared = _methods(replace(base, every=every), densities)
            cells += [*shared, *_own(replace(base, every=every), densities)]
            # With few merges no mask is renewed, so one single worker serves both.
            cells += [single(config) for config in shared if every == 500 or (every == 100 and config.warm_up)]
        for config in cells:
            yield from (replace(config, seed=seed) for seed in range(3))


_SMALL = Config(
    model="resnet9",
    width=32,
    lr=0.1,
    epochs=4,
    peak=0.4,
    images=2000,
    batch=20,
    examples=256,
    precision="bfloat16",
)


def reduced() -> Iterator[Config]:
    """The same in small for a CPU: a ResNet-9 of half width, few images and epochs, merges at the same fractions.

    A worker takes 400 steps in place of 4,850 and merges every 8, 40 or 200 in place of 100, 500 or 2,500; the warm-up
    is a tenth of them in both. All runs have the rate that served ``experiments.cifar10``'s pilot best.
    """
    often, middle, seldom = (replace(_SMALL, every=every) for every in (8, 40, 200))
    first, last = (0.1, 0.005), (0.02,)
    cells = _methods(middle, first)
    cells += map(single, _methods(middle, first))
    cells += [*_methods(seldom, first), *_methods(often, first)]
    cells += _own(middle, first)
    cells += [single(config) for config in _methods(often, first) if config.warm_up]
    cells += _methods(middle, last)[1:]
    cells += [single(config) for config in _methods(middle, last)[1:]]
    cells += [*_own(often, first), *_own(seldom, first)]
    for config in cells:
        yield from (replace(config, seed=seed) for seed in (1, 2, 3))


PLANS = {"paper": paper, "reduced": reduced}


# --- results ----------------------------------------------------------------------------------------------------------


def run_plan(
    configs: Iterable[Config], results: Path, images: Callable[[int], Images], tell: Callable[[str], None]
) -> None:
    """Run what is for as many workers as there are and has no record yet; call it on all workers.

    Args:
        configs: What to run, in this order.
        results: A file of one JSON record per line, made when missing; rank 0 reads and writes it.
        images: Gives the images for a number of training images.
        tell: Takes a line of text before and after each run, on rank 0.
    """
    wire = Wire()
    known = [Config(**record["config"]) for record in read_records(results)] if wire.rank == 0 else []
    configs = [config for config in configs if config.workers == wire.size]
    wanted = torch.tensor([config not in known for config in configs], dtype=torch.uint8)
    for number, (config, mine) in enumerate(zip(configs, wire.gather(wanted)[0], strict=True), 1):
        if not mine:
            continue
        if wire.rank == 0:
            tell(f"run {number} of {len(configs)}: {config}")
        with TemporaryDirectory() as folder:
            record = run(config, images(config.images), Path(folder) / "rounds.jsonl")
        if record is None:
            continue
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)
        tell(f"accuracy {record['accuracy']:.2%} after {record['seconds']:.0f} s")


def table(plan: str, results: Path = RESULTS) -> str:
    """Return the Markdown table of a plan's runs, one row per mask, and what it shows in some sentences.

    Args:
        plan: A key of ``PLANS``.
        results: The records.

    Returns:
        Accuracies by number of merges, means over the seeds ± standard deviation, beside the single worker's. Bytes
        are those that a worker sends: in one round with the mask, and in a whole training with as many merges as the
        third accuracy column says.
    """
    planned = list(PLANS[plan]())
    groups: dict[Config, list[Record]] = {}
    for record in read_records(results):
        if (config := Config(**record["config"])) in planned:
            groups.setdefault(replace(config, seed=0), []).append(record)
    merges = sorted({config.merges for config in planned}, reverse=True)
    middle = merges[len(merges) // 2]
    columns = ["mask", "entries", "rate", "single worker", "single, renewed", *(f"{count} merges" for count in merges)]
    columns += ["a round", f"in all, {middle} merges"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * 2}{' ---: |' * (len(columns) - 2)}"]
    rows = dict.fromkeys(_row_of(config) for config in sorted(planned, key=_row_of) if config.workers > 1)
    for row in rows:
        method, density, lr, masks, reduction = row
        cells = {c.merges: runs for c, runs in groups.items() if c.workers > 1 and _row_of(c) == row}
        alone = {
            c.merges: runs for c, runs in groups.items() if c.workers == 1 and (c.method, c.density, c.lr) == row[:3]
        }
        if not cells:
            continue
        told = f"{method}, disjoint, {reduction}" if masks else method
        accuracies = [alone.get(middle, []), alone.get(merges[0], []), *(cells.get(count, []) for count in merges)]
        found = [told, "all" if method == "dense" else f"{density:.1%}", f"{lr:g}", *map(_accuracy, accuracies)]
        lines.append(f"| {' | '.join([*found, *_bytes(cells.get(middle, []))])} |")
    return "\n".join(lines) + f"\n\n{_caption(planned)}"


def _row_of(config: Config) -> tuple[str, float, float, str, str]:
    """Tell rows apart and put them in order: a shared mask, here "", comes first."""
    return config.method, config.density, config.lr, "" if config.masks == "shared" else config.masks, config.reduction


def _accuracy(runs: list[Record]) -> str:
    accuracies = [100 * one["accuracy"] for one in runs]
    if not accuracies:
        return ""
    spread = f" ± {stdev(accuracies):.1f}" if len(runs) > 1 else ""
    diverged = sum(one["diverged"] for one in runs)
    return f"{mean(accuracies):.1f}{spread} ({len(runs)}{f', {diverged} diverged' if diverged else ''})"


def _bytes(runs: list[Record]) -> list[str]:
    """Return megabytes of one round with the mask (of everything, where there is no other), and of all there is."""
    if not runs:
        return ["", ""]
    masked = [one for one in runs if one["rounds"] > one["dense_rounds"]]
    if masked:
        each = mean(one["masked_bytes"] / (one["rounds"] - one["dense_rounds"]) for one in masked)
    else:
        each = mean(one["dense_bytes"] / one["dense_rounds"] for one in runs)
    whole = mean(one["dense_bytes"] + one["masked_bytes"] + one["other_bytes"] for one in runs)
    return [f"{each / 1e6:.3f} MB", f"{whole / 1e6:.2f} MB"]


def _caption(planned: list[Config]) -> str:
    """Say what all runs of a plan share."""
    config = next(config for config in planned if config.workers > 1)
    network = "ResNet-34" if config.model == "resnet34" else f"ResNet-9 of width {config.width}"
    warm_up = next(one.warm_up for one in planned if one.workers > 1 and one.warm_up)
    steps = ", ".join(str(every) for every in sorted({one.every for one in planned if one.workers > 1}))
    smaller = "" if config.model == "resnet34" else "Much smaller than the paper's setting: "
    most = max(one.merges for one in planned)
    return (
        f"{smaller}{network}, {config.images:,} training images, {config.precision}, {config.workers} workers with "
        f"{config.steps:,} steps of {config.batch} each, merged every {steps} steps; masked runs are dense for the "
        f"first {warm_up}. The single worker takes {config.workers * config.steps:,} steps. Images are lossy JPEG "
        "copies, so these accuracies do not stand beside published ones. Accuracy: per cent of the test images, mean ± "
        f"standard deviation (seeds). A mask is chosen anew after every tenth round, so only with {most} merges: the "
        "single worker to compare those with is the one whose mask is renewed as often. Disjoint masks with "
        "the mean are the authors' random baseline. "
        "Bytes: what a worker sends, in one round with the mask, and in all, with the dense rounds of "
        "the warm-up and the choice of the mask (random ones come from a seed that all know). Empty: not run."
    )


# --- command line -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device())
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @cache
    def images(count: int) -> Images:
        pixels, labels = read_images(options.data, "test")
        training = TrainingImages(*read_images(options.data, "train", count), device)
        return Images(training, (pixels.to(device), labels.to(device)))

    try:
        run_plan(PLANS[options.plan](), options.results, images, lambda line: print(line, flush=True))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
