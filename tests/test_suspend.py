"""Training that is interrupted, with the base in the model meanwhile, against training that is not."""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fishmask
from fishmask import FishError, Mask
from tests.cases import BERT, GPT2, Case, case, hf, tokens
from tests.dense import loss_of
from tests.test_attach import clustered

BF16 = Case(
    "bert in bfloat16",
    lambda: hf("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3)().bfloat16(),
    tokens("class"),
)
DROPPING = Case("gpt2 with dropout", hf("GPT2LMHeadModel", "GPT2Config", **GPT2), tokens("next"))
CASES = (case("mlp"), case("conv"), DROPPING, case("torch-encoder"), BF16)
STEPS = 4


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def backward(model: nn.Module, data: Case, seed: int) -> None:
    torch.manual_seed(seed)  # the same dropout
    loss_of(model, data.batch(4, seed)).backward()


Interrupt = Callable[[fishmask.Tuning, dict[str, Tensor], Case], None]


def suspend(tuning: fishmask.Tuning, base: dict[str, Tensor], data: Case) -> None:
    tuning.suspend()
    assert tuning.suspended and not tuning.attached
    assert_equal(state_of(tuning.model), base)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tuning.model.modules())
    tuning.resume()


def use_the_base(tuning: fishmask.Tuning, base: dict[str, Tensor], data: Case) -> None:
    """Run the base in train mode, which moves the statistics of BatchNorm."""
    with tuning.disabled():
        assert_equal(state_of(tuning.model), base)
        loss_of(tuning.model, data.batch(4, 77))
        with tuning.disabled():
            pass
        with torch.no_grad():
            loss_of(tuning.model, data.batch(4, 78))


def train_another(tuning: fishmask.Tuning, base: dict[str, Tensor], data: Case) -> None:
    tuning.suspend()
    other = fishmask.attach(tuning.model, Mask.random(tuning.model, 0.1, seed=9))
    optimizer = adam(other.parameters())
    with pytest.raises(FishError, match="attached by another Tuning"):
        tuning.resume()
    backward(tuning.model, data, 80)
    optimizer.step()
    other.revert()
    assert_equal(state_of(tuning.model), base)
    tuning.resume()


INTERRUPTS: dict[str, Interrupt] = {"suspend": suspend, "disabled": use_the_base, "another": train_another}


def run(data: Case, interrupt: Interrupt | None, seed: int = 0) -> tuple[fishmask.Tuning, torch.optim.Optimizer]:
    """Train four steps with a change of mask in the middle, interrupted at about half of all places."""
    model = data.make().train()
    base, coin = state_of(model), random.Random(seed)
    tuning = fishmask.attach(model, clustered(model))
    optimizer = adam(tuning.parameters())

    def place() -> None:
        if interrupt is not None and coin.random() < 0.5:
            interrupt(tuning, base, data)

    for step in range(STEPS):
        if step == STEPS // 2:
            tuning.set_mask(Mask.random(model, 0.1, seed=3), optimizer)
        place()
        backward(model, data, step)
        place()
        optimizer.step()
        place()
        optimizer.zero_grad()
    return tuning, optimizer


def assert_same_training(one: Any, other: Any) -> None:
    (mine, optimizer), (right, reference) = one, other
    assert torch.equal(mine.values, right.values)
    assert_equal(state_of(mine.model), state_of(right.model))
    found, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert found.keys() == expected.keys()
    for key, state in expected.items():
        assert all(torch.equal(found[key][name], value) for name, value in state.items())
    mine.revert()
    right.revert()
    assert_equal(state_of(mine.model), state_of(right.model))


@pytest.mark.parametrize("how", INTERRUPTS)
@pytest.mark.parametrize("data", CASES, ids=str)
def test_interrupted_training_equals_training_bit_for_bit(data: Case, how: str) -> None:
    assert_same_training(run(data, INTERRUPTS[how]), run(data, None))


def test_the_cases_cover_the_general_path_and_buffers() -> None:
    tuning, _ = run(case("torch-encoder"), None)
    assert tuning.general
    model = case("conv").make().train()
    before = state_of(model)
    loss_of(model, case("conv").batch(4, 0))
    assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items())


def trained(data: Case, steps: int = 2) -> tuple[fishmask.Tuning, torch.optim.Optimizer]:
    model = data.make().train()
    tuning = fishmask.attach(model, clustered(model))
    optimizer = adam(tuning.parameters())
    for step in range(steps):
        backward(model, data, step)
        optimizer.step()
        optimizer.zero_grad()
    return tuning, optimizer


def test_a_tuning_does_not_resume_on_another_base() -> None:
    tuning, _ = trained(case("mlp"))
    after = state_of(tuning.model)
    tuning.suspend()
    name, indices = next(iter(tuning.mask.indices.items()))
    weight = tuning.model.get_parameter(name)
    with torch.no_grad():
        kept = weight.view(-1)[indices[0]].clone()
        weight.view(-1)[indices[0]] += 1
    before = state_of(tuning.model)
    with pytest.raises(FishError, match=rf"no longer the base of this Tuning: other weights in {name}\. Undo"):
        tuning.resume()
    assert tuning.suspended
    assert_equal(state_of(tuning.model), before)
    with torch.no_grad():
        weight.view(-1)[indices[0]] = kept
    tuning.resume()
    assert_equal(state_of(tuning.model), after)


def test_statistics_that_others_move_meanwhile_do_not_leak_in() -> None:
    tuning, _ = trained(case("conv"), steps=0)  # nothing of the base has changed yet
    base = state_of(tuning.model)
    with tuning.disabled():
        loss_of(tuning.model, case("conv").batch(4, 0))
    assert_equal(state_of(tuning.model), base)
    tuning.suspend()
    loss_of(tuning.model, case("conv").batch(4, 0))
    tuning.resume()
    assert_equal(state_of(tuning.model), base)


def test_rebase_follows_a_conversion() -> None:
    tuning, optimizer = trained(case("mlp"))
    model, values = tuning.model, tuning.values.clone()
    base = case("mlp").make().half()
    backward(model, case("mlp"), 5)
    grads = [p.grad.clone() for p in tuning.parameters()]
    identities = [id(p) for p in tuning.parameters()]
    tuning.suspend()
    model.half()
    with pytest.raises(FishError, match=r"other weights in .*call rebase\(\) before resume"):
        tuning.resume()
    tuning.rebase()
    assert_equal(state_of(model), state_of(base))
    tuning.resume()
    assert [id(p) for p in tuning.parameters()] == identities
    assert torch.equal(tuning.values, values)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(tuning.parameters(), grads, strict=True))
    for name, p in tuning.named_parameters():
        now = model.get_parameter(name).detach().view(-1)[tuning.mask.indices[name]]
        assert now.dtype == torch.float16 and torch.equal(now, p.detach().half())
    optimizer.step()
    assert not torch.equal(tuning.values, values)
    tuning.revert()
    assert_equal(state_of(model), state_of(base))


def test_a_conversion_and_back_needs_no_rebase() -> None:
    tuning, _ = trained(case("mlp"))
    after = state_of(tuning.model)
    tuning.suspend()
    tuning.model.double().float()
    tuning.resume()
    assert_equal(state_of(tuning.model), after)


def test_rebase_is_for_suspended_tunings() -> None:
    tuning, _ = trained(case("mlp"))
    with pytest.raises(FishError, match=r"call suspend\(\) before moving"):
        tuning.rebase()
    with pytest.raises(FishError, match="not suspended"):
        tuning.resume()
    tuning.suspend()
    with pytest.raises(FishError, match=r"suspended, and its model is the base: call resume\(\)"):
        tuning.suspend()


def test_step_hooks_survive() -> None:
    tuning, optimizer = trained(case("mlp"))
    counted = []
    handle = tuning.on_step(counted.append)
    tuning.suspend()
    tuning.resume()
    backward(tuning.model, case("mlp"), 5)
    optimizer.step()
    assert counted == [optimizer]
    optimizer.zero_grad()
    handle.remove()
    backward(tuning.model, case("mlp"), 6)
    optimizer.step()
    assert len(counted) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tuning: pickle.loads(pickle.dumps(tuning))])
def test_copies_of_a_suspended_tuning_resume(copied: Any) -> None:
    tuning, _ = trained(case("conv"))
    after = state_of(tuning.model)
    tuning.suspend()
    base = state_of(tuning.model)
    twin = copied(tuning)
    assert twin.suspended and twin.model is not tuning.model
    assert_equal(state_of(twin.model), base)
    twin.resume()
    assert_equal(state_of(twin.model), after)
    assert_equal(state_of(tuning.model), base)
    backward(twin.model, case("conv"), 5)
    optimizer = adam(twin.parameters())
    optimizer.step()
    assert not torch.equal(twin.values, tuning.values)
    twin.revert()
    assert_equal(state_of(twin.model), base)


@pytest.mark.parametrize("data", [case("mlp"), case("torch-encoder")], ids=str)
def test_forwards_inside_disabled_lead_to_no_value(data: Case) -> None:
    tuning, _ = trained(data)
    with tuning.disabled():
        assert not loss_of(tuning.model, data.batch(4, 0)).requires_grad
    assert loss_of(tuning.model, data.batch(4, 0)).requires_grad


def test_an_exception_inside_disabled_leaves_training_as_it_was() -> None:
    tuning, optimizer = trained(case("torch-encoder"))
    after = state_of(tuning.model)
    with pytest.raises(KeyError), tuning.disabled():
        raise KeyError
    assert_equal(state_of(tuning.model), after)
    backward(tuning.model, case("torch-encoder"), 5)
    optimizer.step()
    reference, other = trained(case("torch-encoder"))
    backward(reference.model, case("torch-encoder"), 5)
    other.step()
    assert torch.equal(tuning.values, reference.values)


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_scores_inside_are_the_base_s(engine: Any) -> None:
    data = case("bert")
    tuning, _ = trained(data)
    batches = [data.batch(4, 3)]
    expected = fishmask.fisher(data.make(), batches, examples=4, engine=engine)
    with tuning.disabled():
        found = fishmask.fisher(tuning.model, batches, examples=4, engine=engine)
    tuned = fishmask.fisher(tuning.model, batches, examples=4, engine=engine)
    tuning.suspend()
    suspended = fishmask.fisher(tuning.model, batches, examples=4, engine=engine)
    for name, score in expected.items():
        assert torch.equal(found[name], score) and torch.equal(suspended[name], score)
    assert not all(torch.equal(tuned[name], score) for name, score in expected.items())


def test_what_needs_the_trained_model_is_refused_meanwhile(tmp_path: Path) -> None:
    tuning, optimizer = trained(case("mlp"))
    log = fishmask.CheckpointLog(tmp_path / "log")
    tuning.suspend()
    base = state_of(tuning.model)
    uses: tuple[Callable[[], Any], ...] = (
        lambda: fishmask.LocalRounds(tuning, every=1),
        lambda: tuning.set_mask(tuning.mask, optimizer),
        lambda: tuning.adopt(tuning.mask),
        lambda: tuning.disabled().__enter__(),
        tuning.delta,
        tuning.detach,
        tuning.write_back,
        tuning.read_back,
    )
    for use in uses:
        with pytest.raises(FishError, match=r"this Tuning is suspended, and its model is the base: call resume\(\)"):
            use()
    with pytest.raises(FishError, match="no longer attached to its model, so there is nothing to commit"):
        log.commit(tuning, optimizer, step=1)
    assert_equal(state_of(tuning.model), base)
    tuning.resume()
    assert tuning.delta().k == tuning.mask.k


def test_a_suspended_tuning_is_reverted_where_it_stands() -> None:
    tuning, optimizer = trained(case("mlp"))
    tuning.suspend()
    base = state_of(tuning.model)
    tuning.revert()
    assert not tuning.suspended
    assert_equal(state_of(tuning.model), base)
    with pytest.raises(FishError, match="no longer attached"):
        optimizer.step()
    with pytest.raises(FishError, match="not suspended"):
        tuning.resume()


def test_a_delta_of_the_values_gives_the_same_weights_and_goes_on() -> None:
    tuning, _ = trained(BF16)
    values, weights = tuning.delta("values"), tuning.delta()
    assert values.dtypes == ["float32"] and weights.dtypes == ["bfloat16"]
    assert torch.equal(torch.cat(list(values.values.values())), tuning.values)
    out = state_of(tuning.model)
    tuning.revert()
    for delta in (values, weights):
        delta.apply(tuning.model)
        assert_equal(state_of(tuning.model), out)
        delta.revert(tuning.model)


def test_a_delta_of_the_values_has_the_entries_of_earlier_masks_too() -> None:
    tuning, _ = run(BF16, None)
    delta = tuning.delta("values")
    assert delta.k > tuning.mask.k
    for name, p in tuning.named_parameters():
        places = torch.searchsorted(delta.mask.indices[name], tuning.mask.indices[name])
        assert torch.equal(delta.values[name][places], p.detach())


# --- mistakes of trainers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", ["zero_grad", "to zero", "by hand"])
def test_gradients_that_are_cleared_are_no_mistake(clear: str) -> None:
    tuning, optimizer = trained(case("mlp"))
    for step in range(3):
        for part in range(2):  # accumulated
            backward(tuning.model, case("mlp"), 10 * step + part)
        optimizer.step()
        if clear == "by hand":
            for p in tuning.parameters():
                p.grad = None
        else:
            optimizer.zero_grad(set_to_none=clear == "zero_grad")


def test_gradients_that_nobody_clears_are_refused_at_the_next_backward() -> None:
    tuning, optimizer = trained(case("mlp"))
    backward(tuning.model, case("mlp"), 5)
    optimizer.step()
    with pytest.raises(FishError, match=r"not cleared since the last step.*zero_grad.*fishmask\.FishModel\(model\)"):
        backward(tuning.model, case("mlp"), 6)


def test_gradients_that_nobody_clears_are_refused_after_a_pause_as_well() -> None:
    tuning, optimizer = trained(case("mlp"))
    backward(tuning.model, case("mlp"), 5)
    optimizer.step()
    tuning.suspend()
    tuning.resume()
    with pytest.raises(FishError, match="not cleared since the last step"):
        backward(tuning.model, case("mlp"), 6)


def test_an_optimizer_of_frozen_weights_is_refused() -> None:
    tuning, _ = trained(case("mlp"))
    wrong = torch.optim.SGD(tuning.model.parameters(), lr=0.1)
    wrong.step()  # nothing waits for it
    backward(tuning.model, case("mlp"), 5)
    with pytest.raises(FishError, match=r"nothing to train.*tuning\.parameters\(\)"):
        wrong.step()


def test_an_optimizer_of_something_else_may_step_in_between() -> None:
    tuning, _ = trained(case("mlp"))
    head = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    backward(tuning.model, case("mlp"), 5)
    before = head.weight.detach().clone()
    head(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


# --- inside disabled(), and interrupts --------------------------------------------------------------------------------


REFUSED: dict[str, Callable[[fishmask.Tuning, torch.optim.Optimizer], Any]] = {
    "step": lambda tuning, optimizer: optimizer.step(),
    "write_back": lambda tuning, _: tuning.write_back(),
    "read_back": lambda tuning, _: tuning.read_back(),
    "delta": lambda tuning, _: tuning.delta(),
    "set_mask": lambda tuning, _: tuning.set_mask(Mask.random(tuning.model, 0.2, seed=2)),
    "suspend": lambda tuning, _: tuning.suspend(),
    "detach": lambda tuning, _: tuning.detach(),
    "revert": lambda tuning, _: tuning.revert(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_inside_disabled_nothing_writes_or_reads_values(what: str) -> None:
    tuning, optimizer = trained(case("mlp"))
    present, values = state_of(tuning.model), tuning.values.clone()
    with tuning.disabled():
        base = state_of(tuning.model)
        with pytest.raises(FishError, match="only lent"):
            REFUSED[what](tuning, optimizer)
        assert_equal(state_of(tuning.model), base)
    assert_equal(state_of(tuning.model), present)
    assert torch.equal(tuning.values, values)
    tuning.revert()
    assert_equal(state_of(tuning.model), base)


@pytest.mark.parametrize("broken", ["restore", "_release"])
def test_an_interrupt_in_suspend_loses_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning, _ = trained(case("mlp"))
    present = state_of(tuning.model)
    owner = tuning.originals if broken == "restore" else tuning

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuning.suspend()
    assert tuning.suspended == (broken == "_release")
    if tuning.suspended:
        tuning._release()
        tuning.resume()
    assert_equal(state_of(tuning.model), present)
    tuning.suspend()
    tuning.resume()
    assert_equal(state_of(tuning.model), present)
    backward(tuning.model, case("mlp"), 3)
    assert all(values.grad is not None for values in tuning.parameters())


@pytest.mark.parametrize("broken", ["_wire", "write_back"])
def test_an_error_in_resume_leaves_it_suspended(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning, _ = trained(case("mlp"))
    present = state_of(tuning.model)
    tuning.suspend()
    base = state_of(tuning.model)

    def fail() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tuning, broken, fail)
        with pytest.raises(MemoryError):
            tuning.resume()
    assert tuning.suspended and not tuning.attached
    assert_equal(state_of(tuning.model), base)
    tuning.resume()
    assert_equal(state_of(tuning.model), present)


def test_hooks_do_not_pile_up() -> None:
    tuning, optimizer = trained(case("mlp"))
    for step in range(3):
        backward(tuning.model, case("mlp"), step)
        optimizer.step()
        tuning.suspend()
        tuning.resume()
        optimizer.zero_grad(set_to_none=False)
    assert sum(len(values._backward_hooks or ()) for values in tuning.parameters()) == 1


def test_a_weight_that_is_replaced_after_attach_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fishmask.attach(model, Mask.from_indices({"0.weight": [1], "1.weight": [0, 3]}))
    model[1] = nn.Linear(4, 2)
    with pytest.raises(FishError, match=r"not in the model any more: 1\.weight"):
        model(torch.ones(1, 4))
