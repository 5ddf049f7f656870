"""What a log means: a training that is resumed, rolled back or branched is the training that never stopped."""

import copy
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import fishmask
from fishmask import CheckpointLog, FishError, Mask
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
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 3),
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


@pytest.mark.parametrize("name", OPTIMIZERS)
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


@pytest.mark.parametrize("name", ["two groups", "named groups"])
@pytest.mark.parametrize("later", [B, Mask.from_indices({"up.bias": [0, 1], "down.bias": [0]})], ids=["B", "one group"])
def test_groups_over_a_change_of_mask_resume(name: str, later: Mask, tmp_path: Path) -> None:
    through = Training(A, OPTIMIZERS[name]).run(2)
    with CheckpointLog(tmp_path) as log:
        for mask in (later, A, later):
            change(through, mask)
            through.run(1).commit(log)
        end = through.run(2).state()
    again = Training(log.mask(), OPTIMIZERS[name], seed=4)
    again.restore(CheckpointLog(tmp_path))
    assert not differences(again.run(2).state(), end)


def test_entries_that_left_at_the_base_and_at_odd_bits(tmp_path: Path) -> None:
    through = Training(A)
    nan = torch.tensor(0x7FC00123, dtype=torch.int32).view(torch.float32)
    odds = [nan, *torch.tensor([0.0, -0.0, 1e-45, float("-inf")])]
    with CheckpointLog(tmp_path) as log:
        for odd in odds:
            change(through, A)
            with torch.no_grad():
                through.tuning.values.fill_(odd)
            change(through, B)
            through.commit(log)
        change(through, A)
        with torch.no_grad():  # back to where they began
            base = base_of(through)
            for name, p in through.tuning.named_parameters():
                p.copy_(base[name].reshape(-1)[A.indices[name]])
        change(through, C)
        through.commit(log)
    for number in range(1, 7):
        again = Training(C, seed=number)
        again.restore(CheckpointLog(tmp_path), at=number)
        left = again.model.state_dict()["up.weight"].reshape(-1)[A.indices["up.weight"]]
        began = base["up.weight"].reshape(-1)[A.indices["up.weight"]]
        assert same(left, odds[number - 1].expand_as(left) if number < 6 else began)
    check_same_history(again, through)


def test_entries_that_go_back_to_the_base_after_a_restore(tmp_path: Path) -> None:
    through = Training(A)
    base = base_of(through)
    with CheckpointLog(tmp_path) as log:
        through.run(1)
        change(through, B)
        through.commit(log)  # seals what A has trained
    again = Training(C, seed=4)
    with CheckpointLog(tmp_path) as log:
        again.restore(log)
        change(again, A)
        with torch.no_grad():
            for name, p in again.tuning.named_parameters():
                p.copy_(base[name].reshape(-1)[A.indices[name]])
        change(again, B)
        again.commit(log)
        end = again.state()
    third = Training(C, seed=5)
    third.restore(CheckpointLog(tmp_path))
    assert not differences(third.state(), end)


# --- going back, and elsewhere ----------------------------------------------------------------------------------------


def test_a_rollback_in_the_same_process_takes_the_other_turn(tmp_path: Path) -> None:
    through = Training(A, seed=3)
    with CheckpointLog(tmp_path) as log:
        through.run(2).commit(log, 2)
        first = through.state()
        change(through, B)
        through.run(2).commit(log, 4)
        second = through.run(1).state()
        for _ in range(2):  # twice the same
            assert through.restore(log, at=1).step == 2
            assert not differences(through.state(), first)
            change(through, B)
            assert not differences(through.run(3).state(), second)
        through.restore(log, at=2)
        assert not differences(through.run(1).state(), second)


def test_restoring_twice_is_restoring_once(tmp_path: Path) -> None:
    through = Training(A, seed=3)
    with CheckpointLog(tmp_path) as log:
        through.run(2).commit(log)
        again = Training(B, seed=4)
        for _ in range(3):
            again.restore(log)
            check_same_history(again, through)
            again.run(2)


def test_a_branch_of_segments(tmp_path: Path) -> None:
    """1 - 2 - 3 with masks A, B, C, and from 1: 4 - 5 with C, B."""
    through = Training(A, seed=3)
    ends: dict[int, Any] = {}
    with CheckpointLog(tmp_path) as log:
        for mask in (A, B, C):
            change(through, mask)
            number = through.run(2).commit(log).number
            ends[number] = through.state()
        through.restore(log, at=1)
        for mask in (C, B):
            change(through, mask)
            number = through.run(3).commit(log).number
            ends[number] = through.state()
        through.restore(log, at=3)
        number = through.run(1).commit(log).number
        ends[number] = through.state()
    assert list(ends) == [1, 2, 3, 4, 5, 6]
    assert [commit.segment for commit in CheckpointLog(tmp_path).commits] == [1, 2, 3, 4, 5, 3]
    for number, state in ends.items():
        again = Training(C, seed=number)
        again.restore(CheckpointLog(tmp_path), at=number)
        assert not differences(again.state(), state)
        assert CheckpointLog(tmp_path).mask(number) == again.tuning.mask
    assert CheckpointLog(tmp_path).verify() == []


def test_reinstate_makes_an_earlier_commit_the_newest(tmp_path: Path) -> None:
    through = Training(A, seed=3)
    with CheckpointLog(tmp_path) as log:
        through.run(2).commit(log, 2, position=17)
        first = through.state()
        change(through, B)
        through.run(2).commit(log, 4, position=18)
        commit = log.reinstate(1)
        assert (commit.number, commit.step, commit.segment) == (3, 2, 1)
        assert log.commits[-1] == commit
        with pytest.raises(FishError, match="restore one first"):
            through.commit(log)
        again = Training(B, seed=4)
        assert again.restore(log).state["position"] == 17
        assert not differences(again.state(), first)
        assert again.run(1).commit(log, 3).number == 4
    assert [c.number for c in log.commits] == [1, 2, 3, 4]
    assert log.verify() == []


def test_a_log_that_begins_in_the_middle_of_a_training(tmp_path: Path) -> None:
    through = Training(A).run(2)
    change(through, B)
    through.run(2)
    with CheckpointLog(tmp_path) as log:
        through.commit(log)
        change(through, C)
        through.run(1).commit(log)
    again = Training(C, seed=4)
    again.restore(CheckpointLog(tmp_path))
    check_same_history(again, through)


def test_two_logs_of_one_training(tmp_path: Path) -> None:
    through = Training(A)
    with CheckpointLog(tmp_path / "a") as a, CheckpointLog(tmp_path / "b", store_base=False) as b:
        for mask, log in ((A, a), (B, b), (C, a), (A, b)):
            change(through, mask)
            through.run(1).commit(log)
            stopped = through.state()
            again = Training(B, seed=0 if log is b else 4)
            again.restore(CheckpointLog(log.path))
            assert not differences(again.state(), stopped)
            check_same_history(again, through)


def test_revert_after_a_restore_gives_back_the_base_of_the_log(tmp_path: Path) -> None:
    through = Training(A, seed=3)
    base = base_of(through)
    with CheckpointLog(tmp_path) as log:
        through.run(2)
        change(through, B)
        through.run(2).commit(log)
    again = Training(C, seed=4).run(1)
    again.restore(CheckpointLog(tmp_path))
    again.run(2).tuning.revert()
    assert same(sorted_by_name(again.model.state_dict()), base)


def test_gradients_of_the_training_that_was_given_up_are_gone(tmp_path: Path) -> None:
    through = Training(A)
    with CheckpointLog(tmp_path) as log:
        through.commit(log)
        through.run(1)
        assert any(p.grad is not None for p in through.tuning.parameters())
        through.restore(log)
        assert all(p.grad is None for p in through.tuning.parameters())


def test_a_wrapped_model_is_found(tmp_path: Path) -> None:
    through = Training(A).run(1)
    with CheckpointLog(tmp_path) as log:
        through.commit(log)
        stopped = through.state()
        through.run(1)
        found = log.restore(nn.Sequential(through.model), through.optimizer)
        assert found.tuning is through.tuning
        assert not differences(through.state(), stopped)


# --- what else a commit holds -----------------------------------------------------------------------------------------


def test_a_gradient_scaler_resumes(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, growth_factor=1.5)

    def step(training: Training, scaler: torch.amp.GradScaler) -> None:
        training.optimizer.zero_grad()
        scaler.scale(training.model(torch.randn(4, 6)).square().mean()).backward()
        scaler.step(training.optimizer)
        scaler.update()

    through, grown = Training(), scaler()
    with CheckpointLog(tmp_path) as log:
        for _ in range(3):
            step(through, grown)
        through.commit(log, scaler=grown)
    again, fresh = Training(seed=4), scaler()
    CheckpointLog(tmp_path).restore(again.model, again.optimizer, state={"scaler": fresh})
    assert fresh.state_dict() == grown.state_dict() != scaler().state_dict()
    end = fresh_end = None
    for training, own in ((again, fresh), (through, grown)):
        seed_all(5)
        for _ in range(3):
            step(training, own)
        end, fresh_end = fresh_end, [training.state(), own.state_dict()]
    assert not differences(end, fresh_end)


def test_plain_values_come_back_in_the_report(tmp_path: Path) -> None:
    through = Training()
    given = {"epoch": 3, "order": torch.randperm(5), "best": float("nan"), "seen": {1: b"x"}, "rng": np.arange(3)}
    with CheckpointLog(tmp_path) as log:
        commit = through.commit(log, 7, **given)
        found = through.restore(log)
    assert same(found.state, given)
    assert (found.step, found.commit, found.tuning) == (7, commit, through.tuning)


def test_the_generators_can_be_left_alone(tmp_path: Path) -> None:
    through = Training()
    with CheckpointLog(tmp_path) as log:
        through.commit(log)
        seed_all(5)
        before = through.state()["rng"]
        through.restore(log, rng=False)
        assert not differences(through.state()["rng"], before)
        through.restore(log)
        assert len(differences(through.state()["rng"], before)) == 3


def test_a_training_without_an_optimizer(tmp_path: Path) -> None:
    through = Training()
    with CheckpointLog(tmp_path) as log:
        log.commit(through.tuning)
        stopped = through.state()
        with torch.no_grad():
            through.tuning.values.add_(1)
        log.restore(through.tuning)
        assert not differences(through.state(), stopped)
        with pytest.raises(ValueError, match="holds no optimizer state"):
            log.restore(through.tuning, through.optimizer)


# --- a base that is found elsewhere -----------------------------------------------------------------------------------


def head_mask() -> Mask:
    """Some entries, and the whole of what stands for a new head."""
    whole = {name: range(p.numel()) for name, p in Net().named_parameters() if name.startswith("down.")}
    return scattered(1, 0.2) | Mask.from_indices(whole, shapes=Net())


def with_another_head() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model.down.reset_parameters()
    return model


def test_a_new_head_comes_back_where_the_base_is_not_stored(tmp_path: Path) -> None:
    through = Training(head_mask()).run(2)
    base = base_of(through)
    with CheckpointLog(tmp_path / "log", store_base=False) as log:
        through.commit(log)
        change(through, A)  # the head moves no more in parts
        through.run(2).commit(log)
    with CheckpointLog(tmp_path / "whole") as whole:
        Training().run(1).commit(whole)
    sizes = [(folder / "base-00000001.safetensors").stat().st_size for folder in (log.path, whole.path)]
    assert sizes[0] < sizes[1]
    again = Training(B, model=with_another_head)
    assert differences(sorted_by_name(again.model.state_dict()), base)
    again.restore(CheckpointLog(log.path))
    check_same_history(again, through)
    plain = with_another_head()
    CheckpointLog(log.path).restore(plain)
    assert not differences(sorted_by_name(plain.state_dict()), through.state()["model"])


class Refusing:
    def state_dict(self) -> dict[str, Any]:
        return {"position": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError(f"not {state['position']}")


def test_an_object_that_refuses_its_state_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0, 5]}))
    with CheckpointLog(tmp_path / "log") as log:
        log.commit(tuning, state={"loader": Refusing()})
    with torch.no_grad():
        tuning.values.add_(1)
    tuning.write_back()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="not 3"):
        CheckpointLog(tmp_path / "log").restore(tuning, state={"loader": Refusing()})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_base_is_refused_and_named(tmp_path: Path) -> None:
    with CheckpointLog(tmp_path, store_base=False) as log:
        Training(head_mask()).run(2).commit(log)
    torch.manual_seed(0)
    plain, trained = Net(), Training()
    with torch.no_grad():
        plain.norm.weight[3] += 1e-6
        plain.down.weight.zero_()  # does not matter
    trained = Training(A, model=lambda: plain)
    before = copy.deepcopy(plain.state_dict())
    for model in (plain, trained.model, trained.tuning):
        with pytest.raises(
            FishError, match=r"is not the one of this log; build and load it .*:\n  other weights: norm.weight$"
        ):
            CheckpointLog(tmp_path).restore(model)
    assert same(dict(before), dict(plain.state_dict()))


def test_a_model_of_another_structure_is_refused_whole(tmp_path: Path) -> None:
    with CheckpointLog(tmp_path) as log:
        Training().run(1).commit(log)
    other = Net()
    other.extra, other.up.bias, other.scale = nn.Linear(2, 2), nn.Parameter(torch.zeros(9)), None
    other.norm.half()
    del other.kept
    other.register_buffer("new", torch.zeros(3))
    with pytest.raises(FishError) as caught:
        log.restore(other)
    for line in (
        "missing from the model: scale",
        "not in the log: extra.weight",
        "up.bias: float32 [8] in the log, float32 [9] in the model",
        "norm.weight: float32 [8] in the log, float16 [8] in the model",
        "buffer kept: float32 [3, 2] in the log, none in the model",
        "buffer new: none in the log, float32 [3] in the model",
    ):
        assert line in str(caught.value)


# --- models that are not attached -------------------------------------------------------------------------------------


def test_a_plain_model_gets_weights_and_buffers_and_nothing_else(tmp_path: Path) -> None:
    through = Training(A).run(2)
    with CheckpointLog(tmp_path) as log:
        through.commit(log, 2)
        first = through.state()
        change(through, B)
        through.run(2).commit(log, 4)
    plain = Net().eval()
    plain.up.weight.requires_grad_(False)
    before = through.state()["rng"]
    for at, state in ((None, through.state()), (1, first), (2, through.state())):
        found = log.restore(plain, at=at)
        assert found.tuning is None
        assert not differences(sorted_by_name(plain.state_dict()), state["model"])
    assert not differences(through.state()["rng"], before)
    assert not plain.up.weight.requires_grad
    assert plain.up.bias.requires_grad
    with pytest.raises(FishError, match="restore one first"):
        log.commit(fishmask.attach(plain, A))


# --- refusals ---------------------------------------------------------------------------------------------------------


class Custom(torch.optim.SGD):
    """An optimizer whose options cannot be kept."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["chooser"] = print


def detached(training: Training) -> fishmask.Tuning:
    training.tuning.detach()
    return training.tuning


COMMITS: dict[str, tuple[Callable[[CheckpointLog, Training], Any], type[Exception], str]] = {
    "a model": (lambda log, t: log.commit(t.model), TypeError, "takes the Tuning"),
    "a detached tuning": (lambda log, t: log.commit(detached(t), t.optimizer), FishError, "no longer attached"),
    "another's optimizer": (
        lambda log, t: log.commit(t.tuning, Training().optimizer), ValueError, "the optimizer lacks",
    ),
    "more than the mask": (
        lambda log, t: log.commit(
            t.tuning, torch.optim.SGD([*t.tuning.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
        ),
        ValueError, "trains 1 parameters outside the mask",
    ),
    "a set": (lambda log, t: t.commit(log, seen={3}), TypeError, "state['seen'] is of type set"),
    "an option": (lambda log, t: log.commit(t.tuning, Custom(t.tuning.parameters())), TypeError, "'chooser'"),
    "a fraction of a step": (lambda log, t: t.commit(log, 1.5), TypeError, "whole number, got 1.5"),
    "a step in words": (lambda log, t: t.commit(log, "3"), TypeError, "whole number, got '3'"),
    "a tensor of steps": (lambda log, t: t.commit(log, torch.tensor([1, 2])), TypeError, ""),
    "a changed base": (lambda log, t: other_base(t).commit(log), FishError, "the base is gone"),
}  # fmt: skip


def other_base(training: Training) -> Training:
    with torch.no_grad():
        training.model.turned += 1
    return training


@pytest.mark.parametrize("how", ["first", "later", "async"])
@pytest.mark.parametrize("name", COMMITS)
def test_a_refused_commit_leaves_no_trace(name: str, how: str, tmp_path: Path) -> None:
    call, error, text = COMMITS[name]
    training, log = Training(A), CheckpointLog(tmp_path / "log")
    if how == "later":
        training.commit(log, 1)
        change(training, B)
    before = content(log.path)
    if how == "async":
        log.commit = log.commit_async
    with pytest.raises(error) as caught:
        call(log, training)
    assert text in str(caught.value)
    assert {name: data for name, data in content(log.path).items() if name != "lock"} == {
        name: data for name, data in before.items() if name != "lock"
    }
    if how == "later":
        assert [commit.step for commit in log.commits] == [1]
    log.close()
    fresh = Training(A)
    with CheckpointLog(tmp_path / "log") as log:
        if how == "later":
            fresh.restore(log)
        fresh.commit(log)


def test_a_commit_that_is_refused_for_its_base_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FishError, match="the base is gone"):
        other_base(Training(A)).commit(CheckpointLog(tmp_path / "log"))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("step", [3, np.int64(3), torch.tensor(3), True])
def test_steps_are_whole_numbers_of_any_type(step: Any, tmp_path: Path) -> None:
    with CheckpointLog(tmp_path) as log:
        assert Training().commit(log, step).step == log.commits[0].step == int(step)


def test_a_log_with_commits_must_be_restored_first(tmp_path: Path) -> None:
    with CheckpointLog(tmp_path) as log:
        Training().commit(log)
        before = content(tmp_path)
        for training in (Training(), Training(A)):
            with pytest.raises(FishError, match="holds commits already: restore one first"):
                training.commit(log)
        assert content(tmp_path) == before
    with pytest.raises(FishError, match="holds commits already"):
        Training().commit(CheckpointLog(tmp_path))
    assert content(tmp_path) == before


def aside(make: Callable[[], Any]) -> Any:
    """Make something without a trace in the generators."""
    state, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        made = make()
    random.setstate(state)
    np.random.set_state(legacy)
    return made


RESTORES: dict[str, tuple[Callable[[CheckpointLog, Training], Any], type[Exception], str]] = {
    "optimizer of a plain model": (
        lambda log, t: log.restore(aside(Net), t.optimizer), ValueError, "only be restored with an attached model",
    ),
    "state of a plain model": (
        lambda log, t: log.restore(aside(Net), state={"scheduler": t.scheduler}), ValueError, "attached model",
    ),
    "more groups": (
        lambda log, t: log.restore(t.model, two_groups(t.tuning)), ValueError, "has 2 parameter groups, the commit's",
    ),
    "another's optimizer": (
        lambda log, t: log.restore(t.model, aside(Training).optimizer), ValueError, "the optimizer lacks",
    ),
    "more than the mask": (
        lambda log, t: log.restore(t.model, torch.optim.SGD([*t.tuning.parameters(), nn.Parameter(torch.ones(2))])),
        ValueError, "trains 1 parameters outside the mask",
    ),
    "state that is not there": (
        lambda log, t: log.restore(t.model, state={"scaler": t.scheduler}), ValueError, "holds no state of scaler",
    ),
    "a plain value": (
        lambda log, t: log.restore(t.model, state={"position": 3}), ValueError, "position has none",
    ),
    "no such commit": (lambda log, t: log.restore(t.model, at=7), FishError, "holds no commit 7; it holds 1, 2"),
    "commit 0": (lambda log, t: log.restore(t.model, at=0), FishError, "holds no commit 0; it holds 1, 2"),
    "a detached tuning": (lambda log, t: log.restore(detached(t)), FishError, "no longer attached"),
    "an empty log": (
        lambda log, t: CheckpointLog(log.path / "none").restore(t.model), FishError, "there is no such folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mask", [A, B], ids=["mask of the commit", "another mask"])
@pytest.mark.parametrize("name", RESTORES)
def test_a_refused_restore_changes_nothing(name: str, mask: Mask, tmp_path: Path) -> None:
    call, error, text = RESTORES[name]
    with CheckpointLog(tmp_path) as log:
        through = Training(A, schedule=SCHEDULERS["step"]).run(1)
        through.commit(log, position=3)
        through.run(1).commit(log, position=4)
    training = Training(mask, schedule=SCHEDULERS["step"], seed=4).run(1)
    before, files = training.state(), content(tmp_path)
    with pytest.raises(error) as caught:
        call(CheckpointLog(tmp_path), training)
    assert text in str(caught.value)
    assert content(tmp_path) == files
    assert not differences(training.state(), before)


@pytest.mark.parametrize("option", ["keep_last", "keep_every"])
def test_retention_is_a_number(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        CheckpointLog(tmp_path, **{option: 0})


# --- in the background ------------------------------------------------------------------------------------------------


class Held:
    """A disk that waits to be told, and counts who writes at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: BaseException | None = None) -> None:
        self.go, self.writing, self.most, self.fail = threading.Event(), 0, 0, fail
        self.real = fishmask.folder.publish
        monkeypatch.setattr(fishmask.folder, "publish", self.publish)

    def publish(self, path: Path, parts: Any) -> None:
        if not path.name.startswith("commit"):
            return self.real(path, parts)
        self.writing += 1
        self.most = max(self.most, self.writing)
        try:
            assert self.go.wait(20)
            if self.fail:
                raise self.fail
            return self.real(path, parts)
        finally:
            self.writing -= 1


def test_a_commit_in_the_background_holds_the_state_of_its_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Held(monkeypatch)
    through = Training(A, OPTIMIZERS["adamw"], SCHEDULERS["multi step"]).run(3)
    given = {"list": [1], "tensor": torch.ones(2), "array": np.ones(2), "dict": {"a": [0]}}
    with CheckpointLog(tmp_path) as log:
        future = log.commit_async(
            through.tuning, through.optimizer, step=3, state={"scheduler": through.scheduler, "given": given}
        )
        stopped = through.state()
        through.run(2)
        with torch.no_grad():
            through.tuning.values.fill_(9)
            through.model.norm.running_mean.fill_(9)
            for state in through.optimizer.state.values():
                for moment in state.values():
                    moment.fill_(9)
        through.optimizer.param_groups[0].update(lr=9.0, betas=(0.5, 0.5))
        through.scheduler.milestones.clear()
        given["list"].append(2), given["tensor"].zero_(), given["array"].fill(0), given["dict"]["a"].append(1)
        change(through, B)
        assert not future.done()
        assert names(tmp_path, "commit") == []
        disk.go.set()
        assert future.result(20).step == 3
    again = Training(C, OPTIMIZERS["adamw"], SCHEDULERS["multi step"], seed=4)
    found = again.restore(CheckpointLog(tmp_path))
    assert not differences(again.state(), stopped)
    assert same(found.state["given"], {"list": [1], "tensor": torch.ones(2), "array": np.ones(2), "dict": {"a": [0]}})


def test_lbfgs_in_the_background_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Held(monkeypatch)
    through = Training(A, OPTIMIZERS["lbfgs"]).run(2)
    with CheckpointLog(tmp_path) as log:
        log.commit_async(through.tuning, through.optimizer)
        stopped = through.state()
        through.run(2)
        disk.go.set()
    again = Training(A, OPTIMIZERS["lbfgs"], seed=4)
    again.restore(CheckpointLog(tmp_path))
    assert not differences(again.state(), stopped)


def test_at_most_one_commit_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, through = Held(monkeypatch), Training(A)
    with CheckpointLog(tmp_path) as log:
        first = log.commit_async(through.tuning, step=1)
        caller = threading.Thread(target=lambda: log.commit_async(through.tuning, step=2))
        caller.start()
        caller.join(0.2)
        assert caller.is_alive()  # waits for the first
        disk.go.set()
        caller.join(20)
        assert first.done()
        for step in range(3, 8):
            log.commit_async(through.tuning, step=step)
        log.commit(through.tuning, step=8)
    assert disk.most == 1
    assert [commit.step for commit in log.commits] == list(range(1, 9))


@pytest.mark.parametrize("call", ["wait", "commit", "commit_async", "restore", "reinstate", "compact", "close", "exit"])
def test_an_error_in_the_background_surfaces_once(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through = Training(A)
    log = CheckpointLog(tmp_path)
    through.commit(log, 1)
    disk = Held(monkeypatch, OSError(28, "No space left on device"))
    disk.go.set()
    future = log.commit_async(through.tuning, step=2)
    calls: dict[str, Callable[[], Any]] = {
        "wait": log.wait,
        "commit": lambda: log.commit(through.tuning, step=3),
        "commit_async": lambda: log.commit_async(through.tuning, step=3),
        "restore": lambda: log.restore(through.model),
        "reinstate": lambda: log.reinstate(1),
        "compact": log.compact,
        "close": log.close,
        "exit": lambda: log.__exit__(None, None, None),
    }
    with pytest.raises(OSError, match="No space left"):
        calls[call]()
    assert isinstance(future.exception(), OSError)
    assert [commit.step for commit in log.commits] == [1]
    disk.fail = None
    log.wait()
    assert log.commit(through.tuning, step=4).number == 2  # as if it had never been tried
    log.close()
    assert [commit.step for commit in log.commits] == [1, 4]
    assert log.verify() == []


def test_close_waits_and_the_log_can_be_used_again(tmp_path: Path) -> None:
    through = Training(A)
    log = CheckpointLog(tmp_path)
    future = log.commit_async(through.tuning, step=1)
    log.close()
    log.close()
    assert future.done()
    with CheckpointLog(tmp_path) as other:
        other.restore(Training(A).model)
    through.commit(log, 2)
    log.close()
    assert [commit.step for commit in log.commits] == [1, 2]


def test_a_log_that_another_went_on_with_meanwhile_is_not_gone_on_with(tmp_path: Path) -> None:
    through = Training(A)
    log = CheckpointLog(tmp_path)
    through.commit(log, 1)
    log.close()
    with CheckpointLog(tmp_path) as other:
        again = Training(A, seed=4)
        again.restore(other)
        again.run(1).commit(other, 2)
        other.compact()
    before = content(tmp_path)
    for attempt in (log.commit, log.commit_async):
        with pytest.raises(FishError, match="restore"):
            attempt(through.tuning, step=3)
        with CheckpointLog(tmp_path) as other:  # the refusal has let go of the log
            Training(A).restore(other)
            other._claim()
    assert content(tmp_path) == before
    log.close()
    through.restore(log)
    through.commit(log, 4)
    log.close()
    assert log.verify() == []
