"""Training in place against dense training with masked gradients."""

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fishmask
from fishmask.mask import Mask
from tests.cases import CASES, Case
from tests.dense import DenseTraining, assert_only_masked_moved, base_of, distance, loss_of

STEPS = 4


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    # A large eps: Adam divides by the gradient's size, so rounding in tiny gradients would dominate the comparison.
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, eps=1e-2)


def clustered(model: nn.Module, seed: int = 0) -> Mask:
    """A mask as Fisher scores give it: outer products, so that a few rows and columns hold most entries."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, p in model.named_parameters():
        score = torch.rand(p.shape, generator=generator) + 0.01
        for dim in range(p.dim()):
            shape = [-1 if d == dim else 1 for d in range(p.dim())]
            score = score * torch.rand(p.shape[dim], generator=generator).pow(6).view(shape)
        scores[name] = score
    return Mask.from_scores(scores, 0.1)


def vectors(model: nn.Module) -> Mask:
    """All biases and norm weights, and nothing else."""
    return Mask.from_dense({name: torch.full(p.shape, p.dim() == 1) for name, p in model.named_parameters()})


MASKS: dict[str, Callable[[nn.Module], Mask]] = {
    "random": lambda model: Mask.random(model, 0.2, seed=1),
    "sparse": lambda model: Mask.random(model, 0.03, seed=2),
    "clustered": clustered,
    "vectors": lambda model: vectors(model),
    "all": lambda model: Mask.random(model, 1.0, seed=0),
}


def train(
    case: Case, mask_of: Callable[[nn.Module], Mask], make: Any = sgd, steps: int = STEPS
) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Mask]:
    model, reference = case.make().train(), case.make().train()
    mask, base = mask_of(model), base_of(model)
    dense = DenseTraining(reference, mask, make)
    tuning = fishmask.attach(model, mask)
    optimizer = make(tuning.parameters())
    for step in range(steps):
        batch = case.batch(4, step)
        torch.manual_seed(step)  # the same dropout for both
        dense.backward(loss_of(reference, batch))
        dense.step()
        torch.manual_seed(step)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, reference, base, mask


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory_equals_dense_training_with_masked_gradients(case: Case, kind: str) -> None:
    model, reference, base, mask = train(case, MASKS[kind])
    assert distance(reference, model, base) < 1e-4
    assert_only_masked_moved(base, model, mask)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adam_trajectory_equals_dense_training(case: Case) -> None:
    model, reference, base, mask = train(case, clustered, adam)
    assert distance(reference, model, base) < 1e-3
    assert_only_masked_moved(base, model, mask)


OPTIMIZERS: dict[str, Any] = {
    "fused adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0, eps=1e-2, fused=True),
    "foreach adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0, eps=1e-2, foreach=True),
    "fused sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, fused=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01, eps=1e-2),
    "fused adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01, eps=1e-2, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, eps=1e-2),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01, eps=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_weights(name: str) -> None:
    model, reference, base, mask = train(case("mlp"), clustered, OPTIMIZERS[name])
    assert distance(reference, model, base) < 1e-3
    assert_only_masked_moved(base, model, mask)


class Pair:
    """An attached model and its dense reference, stepped together."""

    def __init__(self, case: Case, mask: Mask | None = None, make: Any = sgd, prepare: Any = None) -> None:
        self.case, self.model, self.reference = case, case.make().train(), case.make().train()
        for model in (self.model, self.reference):
            if prepare is not None:
                prepare(model)
        self.base = base_of(self.model)
        self.mask = mask or clustered(self.model)
        self.dense = DenseTraining(self.reference, self.mask, make)
        self.tuning = fishmask.attach(self.model, self.mask)
        self.optimizer = make(self.tuning.parameters())

    def step(self, seed: int, backward: Any = None, before_step: Any = None) -> None:
        """Do one step on both; `backward(model, batch)` and `before_step(parameters)` replace the plain ones."""
        batch = self.case.batch(4, seed)
        backward = backward or (lambda model, batch: loss_of(model, batch).backward())
        torch.manual_seed(seed)
        backward(self.reference, batch)
        self.dense.backward(torch.zeros((), requires_grad=True))  # applies the mask to the gradients
        torch.manual_seed(seed)
        backward(self.model, batch)
        if before_step is not None:
            before_step(list(self.reference.parameters()))
            before_step(list(self.tuning.parameters()))
        self.dense.step()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, tolerance: float = 1e-4) -> None:
        assert distance(self.reference, self.model, self.base) < tolerance
        assert_only_masked_moved(self.base, self.model, self.mask)


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


some_models = pytest.mark.parametrize("name", ["bert-padded", "gpt2", "conv", "llama"])


@some_models
def test_gradient_accumulation(name: str) -> None:
    pair = Pair(case(name))

    def backward(model: nn.Module, batch: Any) -> None:
        for seed in range(3):
            (loss_of(model, pair.case.batch(2, 10 + seed)) / 3).backward()
        loss_of(model, batch).backward()

    for seed in range(STEPS):
        pair.step(seed, backward)
    pair.check()


@some_models
def test_clip_grad_norm(name: str) -> None:
    pair = Pair(case(name))
    norms = []
    for seed in range(STEPS):
        pair.step(seed, before_step=lambda ps: norms.append(torch.nn.utils.clip_grad_norm_(ps, 0.01)))
    pair.check()
    torch.testing.assert_close(norms[0::2], norms[1::2], rtol=1e-4, atol=0)
    assert norms[0] > 0.01


@pytest.mark.parametrize("name", ["bert-padded", "gpt2", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(name: str, dtype: torch.dtype) -> None:
    pair = Pair(case(name))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    other = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed in range(STEPS):
        batch = pair.case.batch(4, seed)
        for model, use in ((pair.reference, other), (pair.model, scaler)):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, batch)
            use.scale(loss).backward()
        pair.dense.backward(torch.zeros((), requires_grad=True))
        other.step(pair.dense.optimizer)
        scaler.step(pair.optimizer)
        for use, optimizer in ((other, pair.dense.optimizer), (scaler, pair.optimizer)):
            use.update()
            optimizer.zero_grad()
    pair.check(tolerance=0.05)  # half precision rounds; float32 agrees to 1e-4 above


def test_grad_scaler_skips_an_overflowing_step() -> None:
    pair = Pair(case("mlp"))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss_of(pair.model, pair.case.batch(4, 0)) * torch.inf).backward()
    scaler.step(pair.optimizer)
    scaler.update()
    for name, p in base_of(pair.model).items():
        assert torch.equal(p, pair.base[name])
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "bert-padded", "conv", "llama"])
def test_half_precision_weights_follow_float32_values(name: str, dtype: torch.dtype) -> None:
    model = case(name).make().to(dtype).train()
    base, mask = base_of(model), clustered(model)
    tuning = fishmask.attach(model, mask)
    assert all(p.dtype == torch.float32 for p in tuning.parameters())
    optimizer = sgd(tuning.parameters())
    gradients = []
    for seed in range(STEPS):
        batch = case(name).batch(4, seed)
        if isinstance(batch, tuple):
            batch = (batch[0].to(dtype) if batch[0].is_floating_point() else batch[0], batch[1])
        loss_of(model, batch).backward()
        gradients.append([p.grad.clone() for p in tuning.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    assert_only_masked_moved(base, model, mask)
    # The weights are the rounded float32 values, which are what the optimizer makes of the gradients.
    weights = dict(model.named_parameters())
    for name_, values in tuning.named_parameters():
        assert torch.equal(weights[name_].detach().take(mask.indices[name_]), values.detach().to(dtype))
    replay = [base[n].take(mask.indices[n]).float().requires_grad_() for n, _ in tuning.named_parameters()]
    again = sgd(replay)
    for grads in gradients:
        for p, grad in zip(replay, grads, strict=True):
            p.grad = grad
        again.step()
    for p, values in zip(replay, tuning.parameters(), strict=True):
        assert torch.equal(p, values)


def test_half_precision_keeps_updates_too_small_for_the_weight() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    tuning = fishmask.attach(model, Mask.random(model, 1.0, seed=0))
    before = tuning.values.clone()
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1e-5)
    for _ in range(3):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (before - tuning.values > 2e-5).all()


@pytest.mark.parametrize("name", ["bert-padded", "gpt2", "llama", "vit", "t5"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    pair = Pair(case(name), prepare=prepare)
    # No masked entry below the blocks: reentrant checkpointing then needs an input that requires grad.
    for seed in range(STEPS):
        pair.step(seed)
    pair.check()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_reentrant_checkpointing_without_masked_embeddings() -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    mask = Mask.from_indices({name: range(40)})
    pair = Pair(
        case("bert-padded"), mask, prepare=lambda model: model.gradient_checkpointing_enable({"use_reentrant": True})
    )
    for seed in range(STEPS):
        pair.step(seed)
    pair.check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["mlp", "conv", "bert-padded", "gpt2", "llama", "vit"])
def test_torch_compile(name: str) -> None:
    torch.compiler.reset()

    def prepare(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    pair = Pair(case(name), prepare=prepare)
    # One graph: nothing of ours breaks it.
    compiled = torch.compile(pair.model, backend="aot_eager", fullgraph=name in ("mlp", "conv", "vit"))

    def backward(model: nn.Module, batch: Any) -> None:
        loss_of(compiled if model is pair.model else model, batch).backward()

    for seed in range(STEPS):
        pair.step(seed, backward)
    pair.check()
    torch.compiler.reset()


def test_tied_parameters_appear_once() -> None:
    model = case("gpt2").make().train()
    mask = Mask.from_indices({"lm_head.weight": [0, 5, 9]})  # the alias of transformer.wte.weight
    tuning = fishmask.attach(model, mask)
    assert [name for name, _ in tuning.named_parameters()] == ["transformer.wte.weight"]
    both = Mask.from_indices({"lm_head.weight": [0, 5], "transformer.wte.weight": [5, 9]})
    tuning.set_mask(both)
    assert tuning.mask == Mask.from_indices({"transformer.wte.weight": [0, 5, 9]})


@pytest.mark.parametrize("make", [sgd, adam], ids=["sgd", "adam"])
def test_mask_change_carries_optimizer_state(make: Any) -> None:
    pair = Pair(case("bert-padded"), make=make)
    for seed in range(STEPS):
        pair.step(seed)
    first, second = pair.mask, clustered(pair.model, seed=1)
    assert 0 < first.overlap(second) < 1
    pair.tuning.set_mask(second, pair.optimizer)
    # The reference: entries that left get no more updates, new ones start with zero state.
    for name, p in pair.dense.parameters.items():
        mask = pair.dense.mask[name]
        fresh = torch.zeros_like(mask)
        if name in second.indices:
            fresh.view(-1)[second.indices[name]] = True
        for key, state in pair.dense.optimizer.state[p].items():
            if key != "step" and state is not None:
                state[~(mask & fresh)] = 0
        pair.dense.mask[name] = fresh
    between = base_of(pair.model)
    for seed in range(STEPS, 2 * STEPS):
        pair.step(seed)
    assert_only_masked_moved(between, pair.model, second)
    assert_only_masked_moved(pair.base, pair.model, first | second)
    if make is sgd:  # Adam counts steps per parameter: a parameter that is new in the mask starts its count anew
        assert distance(pair.reference, pair.model, pair.base) < 1e-4
    pair.tuning.revert()
    for name, p in base_of(pair.model).items():
        assert torch.equal(p, pair.base[name])


def test_mask_change_carries_adam_state_exactly_within_a_parameter() -> None:
    model = nn.Linear(3, 2)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0, 2, 5]}))
    optimizer = adam(tuning.parameters())
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    (old,) = tuning.parameters()
    state = optimizer.state[old]
    tuning.set_mask(Mask.from_indices({"weight": [2, 3, 5], "bias": [1]}), optimizer)
    values = dict(tuning.named_parameters())
    new = optimizer.state[values["weight"]]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(new[key], torch.stack([state[key][1], torch.zeros(()), state[key][2]]))
    assert new["step"] == state["step"] == 1
    assert torch.equal(values["weight"].grad, torch.stack([old.grad[1], torch.zeros(()), old.grad[2]]))
    assert values["bias"] not in optimizer.state
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in tuning.parameters()]


def test_stepping_an_optimizer_of_a_former_mask_is_refused() -> None:
    model = nn.Linear(3, 2)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0]}))
    optimizer = sgd(tuning.parameters())
    tuning.set_mask(Mask.from_indices({"weight": [1]}))
    with pytest.raises(fishmask.FishError, match="no longer attached"):
        optimizer.step()


@pytest.mark.parametrize("what", ["foreign", "lbfgs", "mask"])
def test_refused_mask_change_changes_nothing(what: str) -> None:
    model = nn.Linear(3, 2)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0, 4]}))
    optimizer: torch.optim.Optimizer = sgd(tuning.parameters())
    mask = Mask.from_indices({"weight": [1]})
    if what == "foreign":
        optimizer = sgd([nn.Parameter(torch.zeros(2))])
    elif what == "lbfgs":
        optimizer = torch.optim.LBFGS(tuning.parameters(), max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    else:
        mask = Mask.from_indices({"nothing": [1]})
    values = list(tuning.parameters())
    with pytest.raises(ValueError, match=r"lacks 1 of|L?BFGS keeps state|no such parameter"):
        tuning.set_mask(mask, optimizer)
    assert all(a is b for a, b in zip(values, tuning.parameters(), strict=True))
    assert tuning.mask == Mask.from_indices({"weight": [0, 4]})


def test_lbfgs_trains_the_values_of_a_mask_set_before_its_first_step() -> None:
    model = nn.Linear(3, 2)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0, 1, 2]}))
    optimizer = torch.optim.LBFGS(tuning.parameters())
    tuning.set_mask(Mask.from_indices({"weight": [4], "bias": [0, 1]}), optimizer)
    before = tuning.values.clone()
    optimizer.step(lambda: differentiated(model(torch.ones(1, 3)).square().sum()))
    assert (tuning.values != before).all()


def differentiated(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


@pytest.mark.parametrize("change", ["shape", "gone"])
def test_a_buffer_of_another_shape_is_told(change: str) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("history", torch.zeros(2))
    model.register_buffer("strided", torch.arange(2.0)[::2])
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0]}))
    tuning.delta()
    if change == "shape":
        model.history = torch.zeros(3)
    else:
        del model.history
    for refused in (tuning.delta, tuning.revert):
        with pytest.raises(fishmask.FishError, match="buffer history"):
            refused()


def test_lbfgs_sees_its_trial_values() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
    tuning = fishmask.attach(model, Mask.random(model, 1.0, seed=0))
    optimizer = torch.optim.LBFGS(tuning.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(8, 1)], 1), y).solution.flatten()
    torch.testing.assert_close(
        torch.cat([model.weight.detach().flatten(), model.bias.detach()]), solution, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_attaching_changes_no_class_name_or_key(case_: Case) -> None:
    model = case_.make().train()
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (type(p), id(p)) for name, p in model.named_parameters()}
    keys, batch = list(model.state_dict()), case_.batch(3, 0)
    torch.manual_seed(0)
    loss = loss_of(model, batch)
    tuning = fishmask.attach(model, clustered(model))
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: (type(p), id(p)) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    torch.manual_seed(0)
    assert torch.equal(loss_of(model, batch), loss)
    assert sum(p.numel() for p in tuning.parameters()) == tuning.mask.k


def test_state_dict_follows_training_and_load_state_dict_is_trained_on() -> None:
    pair = Pair(case("bert-padded"))
    pair.step(0)
    saved = copy.deepcopy(pair.model.state_dict())
    optimizer_state = copy.deepcopy(pair.optimizer.state_dict())
    pair.step(1)
    pair.step(2)
    final = base_of(pair.model)
    # Go back and do the two steps again: the same weights must come out.
    for assign in (False, True):
        pair.model.load_state_dict(saved, assign=assign)
        pair.optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        for seed in (1, 2):
            torch.manual_seed(seed)
            loss_of(pair.model, pair.case.batch(4, seed)).backward()
            pair.optimizer.step()
            pair.optimizer.zero_grad()
        for name, p in base_of(pair.model).items():
            assert torch.equal(p, final[name]), name


def by_pickle(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["bert-padded", "gpt2", "torch-encoder", "conv"])
def test_a_copy_trains_on_by_itself(name: str, duplicate: Any) -> None:
    pair = Pair(case(name))
    pair.step(0)
    model, tuning = duplicate((pair.model, pair.tuning))
    assert tuning.model is model
    before = base_of(model)
    pair.step(1)
    pair.step(2)
    for key, p in base_of(model).items():
        assert torch.equal(p, before[key]), key  # training the original leaves the copy alone
    optimizer = sgd(tuning.parameters())
    for momentum, values in zip(optimizer.param_groups[0]["params"], pair.tuning.parameters(), strict=True):
        assert momentum is not values
    fresh = Pair(case(name))
    fresh.step(0)
    fresh.optimizer.state.clear()
    for seed in (1, 2):
        for m, o in ((model, optimizer), (fresh.model, fresh.optimizer)):
            torch.manual_seed(seed)
            loss_of(m, pair.case.batch(4, seed)).backward()
            o.step()
            o.zero_grad()
    for key, p in base_of(model).items():
        assert torch.equal(p, base_of(fresh.model)[key]), key
    tuning.revert()
    for key, p in base_of(model).items():
        assert torch.equal(p, pair.base[key]), key
    pair.check(tolerance=10)  # only that the original's unmasked entries stayed


def test_a_copy_of_the_model_alone_is_independent() -> None:
    pair = Pair(case("bert-padded"))
    pair.step(0)
    copied = copy.deepcopy(pair.model)
    before = base_of(copied)
    with torch.no_grad():
        batch = pair.case.batch(4, 9)
        assert torch.equal(loss_of(copied.eval(), batch), loss_of(pair.model.eval(), batch))
    pair.model.train()
    pair.step(1)
    for key, p in base_of(copied).items():
        assert torch.equal(p, before[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv", "bert-padded", "gpt2"])
def test_revert_restores_every_bit_and_flag(name: str, dtype: torch.dtype) -> None:
    model = case(name).make().to(dtype).train()
    frozen = next(model.parameters()).requires_grad_(False)
    with torch.no_grad():
        list(model.parameters())[-1].flatten()[0] = -0.0
    base = {key: value.clone() for key, value in model.state_dict().items()}
    tuning = fishmask.attach(model, clustered(model))
    optimizer = sgd(tuning.parameters())
    for seed in range(2):
        batch = case(name).batch(4, seed)
        if isinstance(batch, tuple) and batch[0].is_floating_point():
            batch = (batch[0].to(dtype), batch[1])
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(value, base[key]) for key, value in model.state_dict().items())
    tuning.revert()
    for key, value in model.state_dict().items():
        assert torch.equal(value.flatten().view(torch.uint8), base[key].flatten().view(torch.uint8)), key
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_detach_keeps_the_trained_weights() -> None:
    pair = Pair(case("mlp"))
    pair.step(0)
    trained = base_of(pair.model)
    pair.tuning.detach()
    assert all(torch.equal(p, trained[key]) for key, p in base_of(pair.model).items())
    assert all(p.requires_grad for p in pair.model.parameters())
    loss_of(pair.model, pair.case.batch(4, 1)).backward()
    assert all(p.grad is not None for p in pair.model.parameters())
    with pytest.raises(fishmask.FishError, match="no longer attached"):
        pair.optimizer.step()
    with pytest.raises(fishmask.FishError, match="no longer attached"):
        pair.tuning.detach()
    with pytest.raises(fishmask.FishError, match="no longer attached"):
        pair.tuning.set_mask(pair.mask)
    pair.tuning.revert()
    assert all(torch.equal(p, pair.base[key]) for key, p in base_of(pair.model).items())


def test_decoupled_weight_decay_reaches_masked_entries_only() -> None:
    model = nn.Linear(4, 4)
    base, mask = base_of(model), Mask.from_indices({"weight": [0, 7, 9]})
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1, weight_decay=0.5)
    (model(torch.zeros(2, 4)) * 0).sum().backward()
    optimizer.step()
    assert_only_masked_moved(base, model, mask)
    expected = base["weight"].flatten()[[0, 7, 9]] * (1 - 0.1 * 0.5)
    torch.testing.assert_close(model.weight.detach().flatten()[[0, 7, 9]], expected)


class Foreign(nn.Module):
    """Weights used outside their own module, in every way the watch must find."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.embedding(ids))
        weight = self.embedding.weight
        if self.kind == "linear":
            return nn.functional.linear(x, weight)
        if self.kind == "transpose":
            return x @ weight.T
        if self.kind == "before":
            return self.mix(x + self.mix.weight.sum(0)) @ weight.t()
        return torch.stack([weight.sum(), self.mix.weight.norm()]).sum() + torch.cat([weight, weight])[:9] @ x[0, 0]


@pytest.mark.parametrize("kind", ["linear", "transpose", "before", "list"])
def test_weights_used_outside_their_module(kind: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Foreign(kind)

    foreign = Case("foreign", make, lambda b, seed: (torch.arange(b * 2).view(b, 2) % 9, torch.zeros(1)))
    pair = Pair(foreign, Mask.random(make(), 0.4, seed=0))
    backward = lambda model, batch: model(batch[0]).square().mean().backward()  # noqa: E731
    for seed in range(STEPS):
        pair.step(seed, backward)
    pair.check()


@pytest.mark.parametrize("first", [0, 2])
def test_a_use_that_comes_late_or_within_a_forward_of_its_own(first: int) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(3, 3), nn.Linear(3, 2), 0

        def forward(self, x: Tensor, inner: bool = False) -> Tensor:
            if inner:
                return self.a(x)
            self.calls += 1
            h = self(x, inner=True).relu()  # ends a forward of this very model
            if self.calls > first:
                h = nn.functional.linear(h, self.a.weight, self.a.bias)
            return self.b(h)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Late()

    def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)

    pair = Pair(Case("late", make, batch), Mask.random(make(), 0.6, seed=0))
    if first:
        with pytest.warns(UserWarning, match=r"a.weight is used outside its own module, which was not so at first"):
            for seed in range(2 * STEPS):
                pair.step(seed)
        return
    for seed in range(2 * STEPS):
        pair.step(seed)
    pair.check()


def test_gradients_from_before_attaching_do_not_count() -> None:
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    model(x)[0].sum().backward()
    expected = model.weight_ih_l0.grad.flatten()[[0, 5, 9]].clone()
    tuning = fishmask.attach(model, Mask.from_indices({"weight_ih_l0": [0, 5, 9]}))
    model(x)[0].sum().backward()
    torch.testing.assert_close(next(tuning.parameters()).grad, expected)


def test_hooks_on_the_values_see_the_general_path() -> None:
    model = nn.LSTM(3, 4)
    tuning = fishmask.attach(model, Mask.from_indices({"weight_ih_l0": [0, 5, 9]}))
    (values,), seen = tuning.parameters(), []
    values.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model(torch.randn(5, 2, 3))[0].sum().backward()
    assert len(seen) == 1 and seen[0].shape == (3,)


@pytest.mark.parametrize("change", ["other weights", "half and back", "one entry", "removed"])
def test_revert_and_delta_are_refused_when_the_base_is_gone(change: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tuning = fishmask.attach(model, Mask.from_indices({"0.weight": [0, 4]}))
    if change == "other weights":
        model.load_state_dict(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict())
    elif change == "half and back":
        model.half().float()
    elif change == "one entry":
        model[1].weight.data[0, 0] += 1e-3
    else:
        del model[1]
    for refused in (tuning.revert, tuning.delta):
        with pytest.raises(fishmask.FishError, match="base is gone"):
            refused()
    tuning.detach()


def test_an_average_of_an_attached_model_is_a_plain_model() -> None:
    model = nn.Linear(4, 2)
    tuning = fishmask.attach(model, Mask.from_indices({"weight": [0, 1]}))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    weight = average.module.weight.detach().clone()
    average(torch.ones(1, 4))
    fishmask.attach(average.module, Mask.from_indices({"bias": [0]})).revert()
    assert torch.equal(average.module.weight, weight)


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    class Interrupted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(2, 2), Interrupted(2, 2))
    tuning = fishmask.attach(model, Mask.from_indices({"0.weight": [0]}))
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 2))
    tuning.detach()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_threads_may_run_the_same_attached_model() -> None:
    model = case("bert").make()
    fishmask.attach(model, clustered(model))
    batch = case("bert").batch(4, 0)
    expected = loss_of(model, batch)
    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda _: loss_of(model, batch), range(16)))
    for loss in losses:
        torch.testing.assert_close(loss, expected)


def test_attaching_in_inference_mode_and_a_part_of_an_attached_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.inference_mode():
        tuning = fishmask.attach(model, Mask.from_indices({"0.weight": [0]}))
    model(torch.ones(1, 2)).sum().backward()
    assert next(tuning.parameters()).grad is not None
    with pytest.raises(fishmask.FishError, match="attached already"):
        fishmask.attach(model[1], Mask.from_indices({"weight": [0]}))
    with torch.inference_mode():
        made = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="inference mode"):
        fishmask.attach(made, Mask.from_indices({"weight": [0]}))
    with pytest.raises(ValueError, match="max_norm"):
        fishmask.attach(nn.Embedding(4, 2, max_norm=1.0), Mask.from_indices({"weight": [0]}))


def test_mask_change_with_named_groups_and_fused_momentum() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tuning = fishmask.attach(model, Mask.from_indices({"0.weight": [0, 1], "0.bias": [0]}))
    optimizer = torch.optim.SGD(tuning.named_parameters(), lr=0.1, momentum=0.9, fused=True)
    for mask in ({"0.weight": [1, 2], "1.weight": [0]}, {"1.weight": [0, 1], "1.bias": [1]}):
        model(torch.ones(3, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tuning.set_mask(Mask.from_indices(mask), optimizer)
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in tuning.named_parameters()]
    model(torch.ones(3, 2)).square().sum().backward()
    optimizer.step()


def test_user_hooks_and_keyword_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.a.register_forward_hook(lambda module, args, output: output * 3)
            self.b.register_forward_pre_hook(
                lambda module, args, kwargs: ((), {"input": kwargs["input"] + 1}), with_kwargs=True
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=self.a(x).relu_())

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    hooked = Case("hooked", make, lambda b, seed: (torch.randn(b, 3), torch.randn(b, 2)))
    pair = Pair(hooked, Mask.random(make(), 0.5, seed=0))
    for seed in range(STEPS):
        torch.manual_seed(seed)
        pair.step(seed)
    pair.check()


def test_nothing_is_kept_below_the_lowest_masked_layer() -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    tuning = fishmask.attach(model, Mask.from_indices({"2.weight": [3]}))
    hidden = model[:2](torch.randn(5, 6))
    assert not hidden.requires_grad
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model[2:](hidden).sum().backward()
    assert [tuple(t.shape) for t in kept] == [(5, 1), (6, 6)]  # one column of one input, and the weight above
    assert all(p.grad is not None for p in tuning.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_second_derivatives_are_refused_not_wrong() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    tuning = fishmask.attach(model, Mask.random(model, 0.5, seed=0))
    grads = torch.autograd.grad(model(torch.randn(5, 3)).sum(), list(tuning.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        sum(g.square().sum() for g in grads).backward()


def test_values_are_views_of_one_vector() -> None:
    model = case("bert").make()
    tuning = fishmask.attach(model, clustered(model))
    assert tuning.values.shape == (tuning.mask.k,)
    with torch.no_grad():
        tuning.values.zero_()
    assert all((p == 0).all() for p in tuning.parameters())
    model(**case("bert").batch(2, 0))
    for name, indices in tuning.mask.indices.items():
        assert (model.get_parameter(name).detach().take(indices) == 0).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask.from_indices({"weight": [99]}), "index 99"),
        (Mask.from_indices({"other.weight": [0], "gone": [1]}), "other.weight.*gone"),
        (Mask.from_dense({"weight": torch.ones(2, 3, dtype=torch.bool)}), r"shape \(2, 3\) in the mask, \(3, 2\)"),
        (Mask.from_indices({}), "no entries"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_any_change(mask: Mask, message: str) -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=message):
        fishmask.attach(model, mask)
    assert all(p.requires_grad for p in model.parameters())
    assert not model._forward_hooks


def test_refusals_name_what_to_do() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="float64"):
        fishmask.attach(nn.Linear(2, 3).double(), Mask.from_indices({"weight": [0]}))
    fishmask.attach(model, Mask.from_indices({"weight": [0]}))
    with pytest.raises(fishmask.FishError, match="attached already"):
        fishmask.attach(model, Mask.from_indices({"bias": [0]}))
    model.to(torch.bfloat16)
    with pytest.raises(fishmask.FishError, match="while attached"):
        model(torch.zeros(1, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["conv", "bert-padded", "gpt2", "t5", "torch-encoder"])
def test_the_delta_file_gives_the_trained_model_again(name: str, tmp_path: Path) -> None:
    pair = Pair(case(name))
    for seed in range(2):
        pair.step(seed)
    pair.tuning.delta().save(tmp_path / "delta.safetensors")
    fresh = case(name).make()
    delta = fishmask.load(fresh, tmp_path / "delta.safetensors")
    for key, value in pair.model.state_dict().items():  # BatchNorm's running statistics too
        assert torch.equal(fresh.state_dict()[key], value), key
    delta.revert(fresh)
    for key, value in base_of(fresh).items():
        assert torch.equal(value, pair.base[key]), key


def test_deltas_are_kept_away_from_an_attached_model() -> None:
    model, mask = nn.Linear(2, 3), Mask.from_indices({"weight": [0]})
    tuning = fishmask.attach(model, mask)
    delta = tuning.delta()
    with pytest.raises(fishmask.FishError, match="trained in place"):
        delta.apply(model)
    tuning.detach()
    delta.apply(model)
    tuning = fishmask.attach(model, mask)
    with pytest.raises(fishmask.FishError, match="trained in place"):
        delta.revert(model)
    tuning.revert()
    delta.revert(model)


def test_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        test_non_contiguous_weights()
        pair = Pair(case("bert-padded"))
        pair.step(0)
        pair.check()
    finally:
        torch.use_deterministic_algorithms(False)


def test_non_contiguous_weights() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    base, mask = base_of(model), Mask.random(model, 0.3, seed=0)
    tuning = fishmask.attach(model, mask)
    optimizer = sgd(tuning.parameters())
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert_only_masked_moved(base, model, mask)
    tuning.revert()
    assert torch.equal(model.weight.detach(), base["weight"])
