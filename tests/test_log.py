"""What a log means: a training that is resumed, rolled back or branched is the training that never stopped."""

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import fishmask
from fishmask import CheckpointLog, Mask
from tests.test_tree import bits, same


class Net(nn.Module):
    """Every kind of parameter: tied, transposed, 0-d, empty, of whole numbers; with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop, self.again = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(6, 8)
        self.again.weight = self.up.weight
        self.down = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.none = nn.Parameter(torch.empty(0))
        self.count = nn.Parameter(torch.randint(9, (3,)), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(6, 6).T)
        self.register_buffer("kept", torch.randn(2, 3).T)
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down(self.drop(self.norm(self.up(x)) + self.again(x).tanh())) @ self.turned


class Reordered(nn.Module):
    """The same parameters, registered in another order; `again` shares its weight, but not before `up` has it."""

    def __init__(self) -> None:
        super().__init__()
        first = Net()
        for name in ("turned", "scale", "count", "none"):
            self.register_parameter(name, getattr(first, name))
        for name in ("down", "drop", "norm", "up", "again"):
            self.add_module(name, getattr(first, name))
        self.register_buffer("passing", first.passing, persistent=False)
        self.register_buffer("kept", first.kept)

    forward = Net.forward


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def scattered(seed: int, density: float = 0.4, model: Callable[[], nn.Module] = Net) -> Mask:
    with torch.random.fork_rng():
        return Mask.random(model(), density, seed=seed)


def adamw(tuning: fishmask.Tuning) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuning.parameters(), lr=0.01, weight_decay=0.1)


class Training:
    """A training that draws everything from the global generators, so that only a whole state resumes it exactly."""

    def __init__(
        self,
        mask: Mask | None = None,
        make: Callable[[fishmask.Tuning], torch.optim.Optimizer] = adamw,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        *,
        seed: int = 0,
        model: Callable[[], nn.Module] = Net,
    ) -> None:
        mask = mask or scattered(1)
        seed_all(seed)
        self.model = model().train()
        self.tuning = fishmask.attach(self.model, mask)
        self.optimizer = make(self.tuning)
        self.scheduler = schedule(self.optimizer) if schedule else None

    def run(self, steps: int) -> "Training":
        for _ in range(steps):
            x = torch.randn(5, 6) * random.uniform(0.5, 2) + np.random.normal()

            def closure(x: Tensor = x) -> Tensor:
                self.optimizer.zero_grad()
                loss = self.model(x.to(self.tuning.model.up.weight.dtype)).float().square().mean()
                loss.backward()
                return loss

            loss = self.optimizer.step(closure)
            if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            elif self.scheduler is not None:
                self.scheduler.step()
        return self

    def held(self) -> dict[str, Any]:
        return {} if self.scheduler is None else {"scheduler": self.scheduler}

    def commit(self, log: CheckpointLog, step: int = 0, **state: Any) -> fishmask.log.Commit:
        return log.commit(self.tuning, self.optimizer, step=step, state={**self.held(), **state})

    def restore(self, log: CheckpointLog, **options: Any) -> fishmask.log.Restored:
        return log.restore(self.model, self.optimizer, state=self.held(), **options)

    def state(self) -> dict[str, Any]:
        """All of it, down to the bits."""
        return {
            "model": copy.deepcopy(sorted_by_name(self.model.state_dict())),
            "values": {name: p.detach().clone() for name, p in sorted(self.tuning.named_parameters())},
            "optimizer": optimizer_state(self.tuning, self.optimizer),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            "rng": [random.getstate(), list(np.random.get_state()), torch.get_rng_state()],
        }


def sorted_by_name(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: state[key] for key in sorted(state, key=str)}


def optimizer_state(tuning: fishmask.Tuning, optimizer: torch.optim.Optimizer) -> Any:
    """State by the parameter's name and groups of names, so that it does not depend on any order but the groups'."""
    names = {id(p): name for name, p in tuning.named_parameters()}
    state = {names[id(p)]: sorted_by_name(s) for p, s in optimizer.state.items() if s}
    groups = [
        {**sorted_by_name(group), "params": sorted(names[id(p)] for p in group["params"]), "param_names": None}
        for group in optimizer.param_groups
    ]
    return copy.deepcopy([sorted_by_name(state), [sorted_by_name(group) for group in groups]])


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{place}/{i}")]
    return [] if same(a, b) else [place]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def names(folder: Path, kind: str = "") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(kind) and path.name != "lock")


# --- resume equals uninterrupted --------------------------------------------------------------------------------------


def two_groups(tuning: fishmask.Tuning) -> torch.optim.Optimizer:
    weights = [p for name, p in tuning.named_parameters() if "weight" in name]
    others = [p for name, p in tuning.named_parameters() if "weight" not in name]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.0, "lr": 0.03}, {"params": weights}], lr=0.01)


def named_groups(tuning: fishmask.Tuning) -> torch.optim.Optimizer:
    named = list(tuning.named_parameters())
    return torch.optim.SGD([{"params": named[::2], "lr": 0.02}, {"params": named[1::2]}], lr=0.01, momentum=0.9)


def of(kind: str, **options: Any) -> Callable[[fishmask.Tuning], torch.optim.Optimizer]:
    return lambda tuning: getattr(torch.optim, kind)(tuning.parameters(), **options)


OPTIMIZERS: dict[str, Callable[[fishmask.Tuning], torch.optim.Optimizer]] = {
    "sgd": of("SGD", lr=0.05),
    "sgd nesterov": of("SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd dampening": of("SGD", lr=0.05, momentum=0.9, dampening=0.5),
    "sgd fused": of("SGD", lr=0.05, momentum=0.9, fused=True),
    "adam": of("Adam", lr=0.01),
    "adamw": adamw,
    "adamw foreach": of("AdamW", lr=0.01, foreach=True),
    "adamw fused": of("AdamW", lr=0.01, fused=True),
    "adamw amsgrad": of("AdamW", lr=0.01, amsgrad=True),
    "adamw tensor lr": of("AdamW", lr=torch.tensor(0.01), foreach=False),
    "adagrad": of("Adagrad", lr=0.05, lr_decay=0.1),
    "adagrad fused": of("Adagrad", lr=0.05, fused=True),
    "rmsprop": of("RMSprop", lr=0.01, momentum=0.5, centered=True),
    "adafactor": of("Adafactor", lr=0.01),
    "nadam": of("NAdam", lr=0.01),
    "radam": of("RAdam", lr=0.01),
    "adamax": of("Adamax", lr=0.01),
    "adadelta": of("Adadelta", lr=0.5),
    "asgd": of("ASGD", lr=0.05),
    "rprop": of("Rprop", lr=0.01),
    "lbfgs": of("LBFGS", lr=0.1, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
    "two groups": two_groups,
    "named groups": named_groups,
    "named": lambda tuning: torch.optim.AdamW(tuning.named_parameters(), lr=0.01),
}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: schedulers.StepLR(o, 2, 0.5),
    "multi step": lambda o: schedulers.MultiStepLR(o, [2, 4, 4, 5], 0.5),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.05, total_steps=12),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 9, 2.0),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.001, 0.01, 2, cycle_momentum=False, mode="exp_range"),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0, cooldown=1, threshold=0.5),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.MultiStepLR(o, [1, 2])], milestones=[4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.5, 4), schedulers.StepLR(o, 2)]),
}


def check_resume(
    folder: Path,
    make: Callable[[fishmask.Tuning], torch.optim.Optimizer] = adamw,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    *,
    mask: Mask | None = None,
    other: Mask | None = None,
    models: tuple[Callable[[], nn.Module], Callable[[], nn.Module]] = (Net, Net),
) -> None:
    """Stop after 3 of 7 steps; resume in a model with other weights, other moments, and other generators."""
    through = Training(mask, make, schedule, model=models[0]).run(3)
    with CheckpointLog(folder) as log:
        through.commit(log, 3)
    stopped = through.state()
    through.run(4)
    again = Training(other or log.mask(), make, schedule, seed=7, model=models[1]).run(2)
    found = again.restore(CheckpointLog(folder))
    assert (found.step, found.commit.number, found.skipped) == (3, 1, [])
    assert not differences(again.state(), stopped)
    assert not differences(again.run(4).state(), through.state())
    assert differences(through.state(), stopped)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    check_resume(tmp_path, OPTIMIZERS[name])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_so_it_does_in_a_model_that_trained_another_mask(name: str, tmp_path: Path) -> None:
    check_resume(tmp_path, OPTIMIZERS[name], other=scattered(5, 0.2))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
def test_schedules_resume(name: str, tmp_path: Path) -> None:
    check_resume(tmp_path, schedule=SCHEDULERS[name])


@pytest.mark.parametrize("kind", ["one entry", "whole tensors", "everything", "one whole", "a scalar"])
def test_masks_of_every_size_resume(kind: str, tmp_path: Path) -> None:
    model = Net()
    every = {n: range(p.numel()) for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    chosen: dict[str, Any] = {
        "one entry": {"up.weight": [7]},
        "whole tensors": {name: index for name, index in every.items() if "bias" in name},
        "everything": every,
        "one whole": {"turned": every["turned"], "down.weight": [0, 47]},
        "a scalar": {"scale": [0]},
    }[kind]
    check_resume(tmp_path, mask=Mask.from_indices(chosen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_resume_with_the_whole_values(dtype: torch.dtype, tmp_path: Path) -> None:
    check_resume(tmp_path, models=(lambda: Net().to(dtype), lambda: Net().to(dtype)))


@pytest.mark.parametrize("name", ["adamw", "sgd nesterov", "two groups", "named", "lbfgs"])
@pytest.mark.parametrize("models", [(Net, Reordered), (Reordered, Net)], ids=["reordered", "back"])
def test_another_order_of_modules_resumes(name: str, models: Any, tmp_path: Path) -> None:
    check_resume(tmp_path, OPTIMIZERS[name], models=models)


def test_a_log_goes_on_in_another_order_of_modules(tmp_path: Path) -> None:
    through = Training().run(2)
    with CheckpointLog(tmp_path) as log:
        through.commit(log)
    again = Training(seed=5, model=Reordered)
    with CheckpointLog(tmp_path) as log:
        again.restore(log)
        again.run(2).commit(log)
    third = Training(seed=6)
    third.restore(CheckpointLog(tmp_path))
    assert not differences(third.state(), again.state())
    assert names(tmp_path, "segment") == ["segment-00000001.safetensors"]


# --- masks that change ------------------------------------------------------------------------------------------------


def change(training: Training, mask: Mask) -> None:
    training.tuning.set_mask(mask, training.optimizer)


def delta_of(training: Training) -> dict[str, Any]:
    """What the training says that it changed: the entries whose bits are not the base's, and the buffers."""
    delta, base = training.tuning.delta(), base_of(training)
    changed = {}
    for name, index in delta.mask.indices.items():
        differs = [bits(a) != bits(b) for a, b in zip(delta.values[name], base[name].reshape(-1)[index], strict=True)]
        changed[name] = (index[torch.tensor(differs)], delta.values[name][torch.tensor(differs)])
    return {"entries": {n: list(pair) for n, pair in changed.items() if len(pair[0])}, "buffers": delta.buffers}


def base_of(training: Training) -> dict[str, Tensor]:
    copied = copy.deepcopy(training.tuning)
    copied.revert()
    return {name: tensor.clone() for name, tensor in sorted_by_name(copied.model.state_dict()).items()}


def check_same_history(a: Training, b: Training) -> None:
    """The same state, the same difference to the base, the same base."""
    assert not differences(a.state(), b.state())
    assert not differences(delta_of(a), delta_of(b))
    assert not differences(base_of(a), base_of(b))


A, B, C = scattered(1).split(3)
STORIES: dict[str, list[Any]] = {
    # a mask: trained for two steps; "commit": keep it; the story is checked from every commit
    "one after the other": [A, "commit", B, "commit", C, "commit"],
    "overlapping": [A | B, "commit", B | C, "commit", A | C, "commit"],
    "several between commits": [A, "commit", B, C, A | B, "commit", C, B, C, "commit"],
    "none of the first kept": [A, B, C, "commit", A, "commit"],
    "leave and come back": [A, "commit", B, "commit", A, "commit", B, "commit", A | B, "commit"],
    "the same mask again, another between": [A, "commit", B, A, "commit", C, A, "commit"],
    "the same mask, set again": [A, "commit", A, "commit", A, "commit"],
    "commits within a mask": [A, "commit", A, "commit", B, "commit", B, "commit", "commit"],
    "from whole to one entry": [A | B | C, "commit", Mask.from_indices({"scale": [0]}), "commit", A, "commit"],
}


def tell(story: list[Any], log: CheckpointLog | None, training: Training, start: int = 0) -> list[int]:
    """Live a story from a place in it; return the places of the commits."""
    commits = []
    for place, what in enumerate(story):
        if place < start:
            continue
        if what == "commit":
            if log is not None:
                training.commit(log, place)
            commits.append(place)
        elif place:
            change(training, what)
            training.run(2)
        else:
            training.run(2)
    return commits


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_commit_of_a_story_of_masks_resumes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    story = STORIES[name]

    def model() -> nn.Module:
        return Net().to(dtype)

    through = Training(story[0], model=model)
    with CheckpointLog(tmp_path) as log:
        commits = tell(story, log, through)
    end = through.state()  # asking for the delta and the base draws no numbers, but be sure
    for number, place in enumerate(commits, 1):
        again = Training(scattered(9), seed=number, model=model).run(1)
        again.restore(CheckpointLog(tmp_path), at=number)
        tell(story, None, again, place + 1)
        assert not differences(again.state(), end)
        check_same_history(again, through)
    plain = model()
    CheckpointLog(tmp_path).restore(plain)
    assert not differences(sorted_by_name(plain.state_dict()), end["model"])
    assert CheckpointLog(tmp_path).verify() == []
