"""Many deltas on one base: bits after any number of swaps, combinations, what is noticed, threads, torch.compile."""

import asyncio
import contextvars
import copy
import ctypes
import gc
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fishmask
from fishmask import Delta, FishError, Mask, Switch, attach, combine
from fishmask.fingerprint import raw_bits
from fishmask.quantized import weights
from tests.cases import case
from tests.quantized import KINDS, QUANTIZED, plain

ROOT = Path(__file__).parents[1]


def bits(model: nn.Module) -> dict[str, list[int]]:
    """Every number of a model as the integer it is stored as."""
    return {name: raw_bits(tensor).reshape(-1).tolist() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, seed: int, density: float = 0.2, buffers: bool = True) -> nn.Module:
    """A copy with other values at random entries, and other buffers."""
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, indices in Mask.random(tuned, density, seed).indices.items():
            p = tuned.get_parameter(name)
            places = torch.unravel_index(indices, p.shape)
            p[places] = torch.randn(len(indices), generator=g).to(p.dtype)
        for buffer in tuned.buffers() if buffers else ():
            buffer.add_(torch.rand(buffer.shape, generator=g) if buffer.is_floating_point() else seed + 1)
    return tuned


def switched(model: nn.Module, *names: str, **settings: float) -> tuple[Switch, dict[str | None, nn.Module]]:
    """A switch over a model with a delta of each name, and copies of the models that these make."""
    switch, tuned = Switch(model), {None: copy.deepcopy(model)}
    for seed, name in enumerate(names):
        tuned[name] = changed(tuned[None], seed, **settings)
        switch.add(name, Delta.between(tuned[None], tuned[name]))
    return switch, tuned


def channels_last() -> nn.Module:
    return case("conv").make().to(memory_format=torch.channels_last)


def sliced() -> nn.Module:
    """A weight that is a part of a larger tensor."""
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.randn(4, 6)[:, 1:4])
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "float32": case("mlp").make,
    "bfloat16, tied": lambda: case("gpt2").make().to(torch.bfloat16),
    "float16": lambda: case("bert").make().half(),
    "float64": lambda: case("mlp").make().double(),
    "BatchNorm": case("conv").make,
    "channels last": channels_last,
    "sliced": sliced,
}


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_swaps_gives_the_bits_of_each(name: str) -> None:
    model = MODELS[name]()
    switch, tuned = switched(model, "a", "b", "c")
    expected = {name: bits(m) for name, m in tuned.items()}
    stacked = copy.deepcopy(tuned[None])
    for part in ("c", "a"):
        switch.delta(part).apply(stacked)
    expected["c", "a"] = bits(stacked)
    assert len({str(found) for found in expected.values()}) == 5  # else the test tells nothing

    @settings(max_examples=15, deadline=None)
    @given(order=st.lists(st.sampled_from([*expected]), max_size=8))
    def swap(order: list[str | tuple[str, ...] | None]) -> None:
        for wanted in order:
            switch.use(wanted)
            assert bits(model) == expected[wanted]

    swap()
    switch.check()
    switch.use(None)
    assert bits(model) == expected[None]


def test_deltas_may_come_and_go_while_another_is_in_use() -> None:
    model = case("conv").make()
    switch, tuned = switched(model, "a", "b")
    switch.use("a")
    switch.remove("b")
    later = changed(tuned[None], 7)
    switch.add("later", Delta.between(tuned[None], later))  # checks the base, which is not in the weights
    assert bits(model) == bits(tuned["a"])
    switch.use("later")
    assert bits(model) == bits(later)
    assert (switch.names, switch.active) == (("a", "later"), "later")
    switch.use(None)
    assert bits(model) == bits(tuned[None])


def test_the_same_entries_are_kept_once_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = case("mlp").make()
    mask = Mask.random(model, 0.3, seed=0)
    switch, expected = Switch(model), {}
    for name, value in (("a", 1.0), ("b", 2.0)):
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, indices in mask.indices.items():
                tuned.get_parameter(parameter).view(-1)[indices] = value
        switch.add(name, Delta.between(model, tuned))
        expected[name] = bits(tuned)
    (a, b) = (switch._held[name].writes for name in ("a", "b"))
    assert all(a[name].positions is b[name].positions and a[name].base is b[name].base for name in mask.indices)
    switch.use("a")
    written: list[int] = []
    put = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *args: (written.append(args[0].data_ptr()), put(*args))[1])
    switch.use("b")
    own = [model.get_parameter(name).data_ptr() for name in mask.indices]
    assert set(own) <= set(written)
    assert bits(model) == expected["b"]


def test_a_swap_that_is_interrupted_leaves_what_was() -> None:
    model = case("bert").make()
    switch, tuned = switched(model, "a", "b")
    put, calls = torch.Tensor.index_copy_, []

    def interrupted(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return put(*args)

    for before, after in ((None, "a"), ("a", "b"), ("b", None)):
        switch.use(before)
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "index_copy_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                switch.use(after)
        assert switch.active == before
        assert bits(model) == bits(tuned[before])
        switch.use(after)
        assert bits(model) == bits(tuned[after])


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = case("mlp").make()
        switch = Switch(model)
    plain = case("mlp").make()
    tuned = changed(plain, 0)
    switch.add("a", Delta.between(plain, tuned))
    with torch.inference_mode():
        switch.use("a")
        assert bits(model) == bits(tuned)
        switch.use(None)
        assert bits(model) == bits(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights(kind: str) -> None:
    """Entries act beside them; a switch takes them out again, and a combination is that of the dequantized numbers."""
    model = plain().eval()
    KINDS[kind](model, QUANTIZED)
    mask = Mask.random(weights(model), 0.1, seed=0)
    x = torch.arange(12).view(3, 4)
    with torch.no_grad():
        base, switch, outputs = model(x), Switch(model), {}
        for name, seed in (("a", 1), ("b", 2)):
            tuning = attach(model, mask)
            with torch.no_grad():
                tuning.values.add_(torch.randn(mask.k, generator=torch.Generator().manual_seed(seed)))
            outputs[name] = model(x)
            delta = tuning.delta()
            tuning.revert()
            switch.add(name, delta)
        for name in ("a", "b", None, "b", "a", None):
            switch.use(name)
            assert torch.equal(model(x), base if name is None else outputs[name])
            switch.check()
        both = combine(model, [switch.delta("a"), switch.delta("b")], [0.5, 0.5], overlap="sum")
        switch.use({"a": 0.5, "b": 0.5}, overlap="sum")
        mixed = model(x)
        switch.use(None)
        both.apply(model)
        assert torch.equal(model(x), mixed)
        both.revert(model)
        assert torch.equal(model(x), base)
        fresh = plain().eval()
        KINDS[kind](fresh, QUANTIZED)
        other = Switch(fresh)
        other.add("a", switch.delta("a"))
        assert torch.equal(fresh(x), base)
        other.use("a")
        assert torch.equal(fresh(x), outputs["a"])


# --- combinations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["sum", "mean", "last"])
def test_a_weighted_combination_is_what_combine_gives(overlap: str) -> None:
    model = case("gpt2").make().to(torch.bfloat16)
    switch, tuned = switched(model, "a", "b", "c")
    weights = {"a": 0.5, "c": -0.25, "b": 2.0}
    deltas = [switch.delta(name) for name in weights]
    expected = copy.deepcopy(model)
    combine(expected, deltas, list(weights.values()), overlap=overlap).apply(expected)
    switch.use("b")  # the base need not be in the weights
    switch.use(weights, overlap=overlap)
    assert bits(model) == bits(expected)
    again = switch.active
    switch.use(None)
    assert bits(model) == bits(tuned[None])
    switch.use(again)
    assert bits(model) == bits(expected)


def test_a_combination_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    switch, _ = switched(case("mlp").make(), "a", "b")
    computed = []
    compute = Switch._combination
    monkeypatch.setattr(Switch, "_combination", lambda *args: (computed.append(1), compute(*args))[1])
    for _ in range(3):
        switch.use({"a": 0.5, "b": 0.5}, overlap="sum")
        switch.use(None)
    assert len(computed) == 1
    for n in range(20):
        switch.use({"a": 0.5, "b": n / 20}, overlap="sum")
    assert len(switch._combined) == 8


def test_a_combination_of_a_name_that_was_given_away_is_not_used() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    switch.use(["a", "b"])
    with pytest.raises(FishError, match="'b' is in use"):
        switch.remove("b")
    switch.use(None)
    switch.remove("b")
    assert not switch._combined
    other = changed(tuned[None], 9)
    switch.add("b", Delta.between(tuned[None], other))
    switch.use(["a", "b"])
    expected = copy.deepcopy(tuned[None])
    switch.delta("a").apply(expected)
    switch.delta("b").apply(expected)
    assert bits(model) == bits(expected)
    stale = dict(switch._combined)  # as another thread may have put it there just now
    switch.use(None)
    switch.remove("b")
    switch.add("b", Delta.between(tuned[None], tuned["b"]))
    switch._combined.update(stale)
    switch.use(["a", "b"])
    assert bits(model) != bits(expected)


def test_combinations_that_make_no_sense() -> None:
    model = case("conv").make()
    switch, tuned = switched(model, "a", "b")
    with pytest.raises(FishError, match="other contents of the same buffer"):
        switch.use({"a": 0.5, "b": 0.5}, overlap="sum")
    with pytest.raises(ValueError, match="there is no delta 'd'; there are: a, b"):
        switch.use(["a", "d"])
    with pytest.raises(ValueError, match="got 0 deltas"):
        switch.use([])
    with pytest.raises(ValueError, match=r"finite numbers, got \[inf\]"):
        switch.use({"a": float("inf")})
    plain, _ = switched(case("mlp").make(), "a", "b")
    with pytest.raises(FishError, match="Say what becomes of them"):
        plain.use({"a": 0.5, "b": 0.5})
    assert switch.active is None
    assert bits(model) == bits(tuned[None])


# --- misuse, and changes by others ------------------------------------------------------------------------------------


def test_names_are_checked() -> None:
    switch, tuned = switched(case("mlp").make(), "a")
    delta = switch.delta("a")
    with pytest.raises(ValueError, match="a delta 'a' already"):
        switch.add("a", delta)
    for call in (switch.use, switch.remove, switch.delta):
        with pytest.raises(ValueError, match="there is no delta 'b'; there are: a"):
            call("b")
    switch.use("a")
    with pytest.raises(FishError, match="'a' is in use: use"):
        switch.remove("a")
    other = changed(case("mlp").make(), 3)
    with pytest.raises(FishError, match="the delta does not fit this model"):
        switch.add("c", Delta.between(other, changed(other, 4)))
    assert switch.names == ("a",)
    assert bits(switch.model) == bits(tuned["a"])


@pytest.mark.parametrize("in_use", [None, "a"])
def test_a_change_by_others_is_noticed(in_use: str | None) -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    switch.use(in_use)
    name, write = next(iter(switch._held["a"].writes.items()))
    entry = torch.unravel_index(switch._held["a"].entries[name][0][0], write.place.tensor.shape)
    with torch.no_grad():
        before = write.place.tensor[entry].clone()
        write.place.tensor[entry] += 1
    for call in (lambda: switch.use("a" if in_use is None else None), switch.check):
        with pytest.raises(FishError, match=rf"changed by others: {name}; .*undo that change"):
            call()
    assert switch.active == in_use
    with torch.no_grad():
        write.place.tensor[entry] = before
    switch.check()
    switch.use("b")
    assert bits(model) == bits(tuned["b"])


def test_a_change_behind_the_back_of_pytorch_is_found_on_demand() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a")
    switch.use("a")
    model.load_state_dict(changed(model, 5, density=1.0).state_dict(), assign=False)
    model[0].weight.data = model[0].weight.data  # no version counts this
    with pytest.raises(FishError, match="changed by others"):
        switch.use(None, verify=True)
    weight = dict(model.named_parameters())["0.weight"]
    model.load_state_dict(tuned["a"].state_dict())
    switch.check()
    before = weight.detach().clone()
    weight.data.mul_(2)
    with pytest.raises(FishError, match=r"changed by others: 0.weight"):
        switch.use(None, verify=True)
    weight.data.copy_(before)
    switch.use(None, verify=True)
    assert bits(model) == bits(tuned[None])


def test_batch_norm_in_training_does_not_stop_a_swap() -> None:
    model = case("conv").make()
    switch, tuned = switched(model, "a", "b")
    switch.use("a")
    model.train()(torch.randn(4, 3, 6, 6))
    with pytest.raises(FishError, match=r"changed by others: norm\."):
        switch.check()
    switch.use("b")
    assert bits(model) == bits(tuned["b"])
    switch.use(None)
    assert bits(model) == bits(tuned[None])


def test_weights_that_are_moved_are_followed() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    switch.use("a")
    old = switch._held["a"].writes["0.weight"].place
    for p in model.parameters():
        p.data = p.data.clone()  # as .to(device) does
    switch.use("b")
    assert switch._held["a"].writes["0.weight"].place is not old
    assert bits(model) == bits(tuned["b"])
    model.load_state_dict(copy.deepcopy(tuned["b"]).state_dict(), assign=True)
    switch.use(None)
    assert bits(model) == bits(tuned[None])
    for p in model.parameters():
        p.data = p.data + 1
    with pytest.raises(FishError, match=r"changed by others: .*call rebase\(\), else undo"):
        switch.use("a")
    moved = copy.deepcopy(model)
    switch.rebase()
    switch.use("a")
    expected = copy.deepcopy(moved)
    switch.delta("a").apply(expected, check_base=False)
    assert bits(model) == bits(expected)
    switch.use(None)
    assert bits(model) == bits(moved)


def test_weights_that_are_converted_need_a_rebase() -> None:
    model = case("mlp").make()
    switch, _ = switched(model, "a")
    switch.use("a")
    with pytest.raises(FishError, match="'a' is in use"):
        switch.rebase()
    switch.use(None)
    model.half()
    with pytest.raises(FishError, match=r"converted by others: .*rebase\(\)"):
        switch.use("a")
    base = bits(model)
    switch.rebase()
    expected = copy.deepcopy(model)
    switch.delta("a").apply(expected, check_base=False)
    switch.use("a")
    assert bits(model) == bits(expected)
    switch.use(None)
    assert bits(model) == base


def test_applied_deltas_and_a_switch() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    delta = Delta.between(tuned[None], changed(tuned[None], 8))
    delta.apply(model)
    for call in (lambda: switch.use("a"), lambda: switch.add("c", delta)):
        with pytest.raises(FishError, match=r"other deltas are applied to this model: revert\(\)"):
            call()
    delta.revert(model)
    switch.use("a")
    delta.apply(model)  # on top of what is in use, its base known
    expected = copy.deepcopy(tuned["a"])
    delta.apply(expected, check_base=False)
    assert bits(model) == bits(expected)
    with pytest.raises(FishError, match="other deltas are applied"):
        switch.use(None)
    with pytest.raises(FishError, match="deltas are applied to it"):
        combine(model, [delta], [1])
    delta.revert(model)
    assert bits(model) == bits(tuned["a"])
    other = Switch(model)
    for call in (lambda: other.add("d", delta), lambda: other.use(None, verify=True) or other.add("d", delta)):
        with pytest.raises(FishError, match="other deltas are applied"):
            call()
    switch.use(None)
    other.add("d", delta)
    other.use("d")
    with pytest.raises(FishError, match="other deltas are applied"):
        switch.use("b")
    other.use(None)
    switch.use("b")
    assert bits(model) == bits(tuned["b"])


def test_training_and_a_switch() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a")
    mask = Mask.random(model, 0.5, seed=3)
    tuning = attach(model, mask)
    with pytest.raises(FishError, match="being trained in place"):
        switch.use("a")
    with pytest.raises(FishError, match="being trained in place"):
        switch.add("b", switch.delta("a"))
    with tuning.disabled():
        switch.add("b", switch.delta("a"))
    with torch.no_grad():
        tuning.values.add_(1)
    tuning.suspend()
    switch.use("b")
    assert bits(model) == bits(tuned["a"])
    switch.use(None)
    tuning.resume()
    tuning.detach()  # the trained weights stay
    with pytest.raises(FishError, match=r"changed by others: .*; if they are the base now, call rebase\(\)"):
        switch.use("a")


def test_release_leaves_what_is_in_use_and_lets_go_of_the_model() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    with switch.using("b"):
        pass
    switch.use("a")
    switch.release()
    Switch(model).add("free", Delta.between(tuned["a"], tuned["b"]))
    assert (switch.names, switch.active, bits(model)) == ((), None, bits(tuned["a"]))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    delta = Delta.between(tuned["a"], changed(tuned["a"], 1))
    delta.apply(model)
    delta.revert(model)
    switch.add("c", delta)
    with switch.using("c"):
        pass
    switch.use("c")
    seen = weakref.ref(model)
    del model, switch, tuned
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("in_use", [None, "a", ["a", "b"]])
@pytest.mark.parametrize("by", ["copy", "pickle"])
def test_a_copy_goes_its_own_way(by: str, in_use: str | list[str] | None) -> None:
    model = case("conv").make()
    switch, tuned = switched(model, "a", "b")
    with switch.using("b"):
        pass
    switch.use(in_use)
    with_it = bits(model)
    pair = (model, switch)
    other_model, other = copy.deepcopy(pair) if by == "copy" else pickle.loads(pickle.dumps(pair))
    assert other.model is other_model
    assert other.active == switch.active
    switch.use("b")
    assert bits(other_model) == with_it
    other.use("a")
    assert bits(other_model) == bits(tuned["a"])
    other.use(None)
    assert bits(other_model) == bits(tuned[None])
    assert bits(model) == bits(tuned["b"])
    x = case("conv").batch(2, 0)[0]
    with other.using("b"):
        assert torch.equal(other_model(x), tuned["b"](x))


# --- requests in threads ----------------------------------------------------------------------------------------------


def in_threads(*calls: Callable[[], object], timeout: float = 60) -> list[object]:
    """Run each call in a thread of its own; results in order. A thread that hangs fails the test."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result(timeout) for future in futures]


@pytest.fixture
def served() -> Iterator[tuple[Switch, dict[str | None, Tensor], Tensor]]:
    """A switch over a small BERT, its outputs with each delta, and the input."""
    torch.set_num_threads(1)
    model = case("bert").make()
    switch, tuned = switched(model, "a", "b", "c", buffers=False)
    ids = case("bert").batch(2, 0)["input_ids"]
    with torch.no_grad():
        outputs = {name: m(input_ids=ids).logits for name, m in tuned.items()}
    yield switch, outputs, ids


def test_every_output_is_the_one_of_a_single_thread(served: tuple[Switch, dict[str | None, Tensor], Tensor]) -> None:
    switch, outputs, ids = served
    names = [None, "a", "b", "c"]
    swaps = []
    write = switch._turns._change
    switch._turns._change = lambda wanted: (swaps.append(wanted.spec), write(wanted))[1]

    def client(seed: int) -> int:
        choose = random.Random(seed)
        with torch.no_grad():
            for _ in range(25):
                name = choose.choice(names)
                with switch.using(name):
                    for _ in range(choose.randint(1, 3)):
                        assert torch.equal(switch.model(input_ids=ids).logits, outputs[name])
        return 1

    def outside() -> int:
        with torch.no_grad():
            for _ in range(25):
                assert torch.equal(switch.model(input_ids=ids).logits, outputs[None])
        return 1

    with switch.using(None):
        pass
    assert sum(in_threads(*(lambda seed=seed: client(seed) for seed in range(6)), outside, outside)) == 8
    assert len(swaps) > 10
    switch.use(None)
    switch.check()


def test_the_same_delta_is_used_together_and_a_change_waits() -> None:
    switch, _ = switched(case("mlp").make(), "a", "b")
    together, go_on = threading.Barrier(3), threading.Event()
    order = []

    def with_a() -> None:
        with switch.using("a"):
            together.wait(30)  # all three are inside at once
            go_on.wait(30)
            order.append(switch.active)

    def with_b() -> None:
        together.wait(30)
        threading.Timer(0.05, go_on.set).start()
        with switch.using("b"):
            order.append(switch.active)

    in_threads(with_a, with_a, with_b)
    assert order == ["a", "a", "b"]


def test_nobody_starves() -> None:
    """Two threads keep one delta in use without a gap; others get their turns all the same."""
    switch, _ = switched(case("mlp").make(), "a", "b", "c")
    stop = threading.Event()
    inside = [threading.Event(), threading.Event()]

    def hostile(me: int) -> int:
        rounds = 0
        while not stop.is_set():
            with switch.using("a"):
                inside[me].set()
                inside[1 - me].wait(0.01)  # so that one always is inside
                inside[1 - me].clear()
                rounds += 1
        return rounds

    def meek(name: str) -> float:
        start = time.perf_counter()
        for _ in range(10):
            with switch.using(name):
                assert switch.active == name
        return time.perf_counter() - start

    with ThreadPoolExecutor(4) as pool:
        attackers = [pool.submit(hostile, me) for me in range(2)]
        victims = [pool.submit(meek, name) for name in ("b", "c")]
        try:
            for victim in victims:
                victim.result(20)
        finally:
            stop.set()
        assert all(attacker.result(20) > 10 for attacker in attackers)


def test_first_come_first_served() -> None:
    switch, _ = switched(case("mlp").make(), "a", "b", "c")
    order: list[str] = []
    started = threading.Event()
    finish = threading.Event()

    def first() -> None:
        with switch.using("a"):
            started.set()
            finish.wait(30)

    def request(name: str) -> None:
        with switch.using(name):
            order.append(name)

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(first)]
        started.wait(30)
        for place, name in enumerate("bacb"):
            futures.append(pool.submit(request, name))
            while len(switch._turns._queue) <= place:
                time.sleep(0.001)
        finish.set()
        for future in futures:
            future.result(30)
    # The second b goes in with the first; the a comes after it, though a was in use when it came.
    assert order == ["b", "b", "a", "c"]


def test_blocks_within_blocks() -> None:
    switch, tuned = switched(case("mlp").make(), "a", "b")
    x = torch.randn(2, 5)
    with switch.using("a"):
        with switch.using("a"):
            assert torch.equal(switch.model(x), tuned["a"](x))
        with pytest.raises(FishError, match=r"using\('b'\) inside a block or a forward with 'a'"), switch.using("b"):
            pass
        with pytest.raises(FishError, match=r"use\(\) inside using\(\)"):
            switch.use("b")
        with pytest.raises(ValueError, match="there is no delta 'd'"), switch.using("d"):
            pass
        assert torch.equal(switch.model(x), tuned["a"](x))
        switch.check()
        switch.add("c", switch.delta("b"))
    with switch.using("b"):
        assert torch.equal(switch.model(x), tuned["b"](x))
    assert switch.active == "b"
    assert torch.equal(switch.model(x), tuned[None](x))  # outside: what use() chose last
    assert switch.active is None
    with switch.using("b"):
        pass
    switch.remove("b")  # it is in the weights still, and nobody needs it
    assert bits(switch.model) == bits(tuned[None])


class Failing(nn.Module):
    """Raises what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x + self.w


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_ends_the_turn(error: BaseException) -> None:
    model = Failing()
    switch, tuned = switched(model, "a", density=1.0)
    model.error = error
    with pytest.raises(type(error)), switch.using("a"):
        model(torch.zeros(3))
    with pytest.raises(type(error)):  # a turn of its own; after an interrupt PyTorch calls no hook
        model(torch.zeros(3))
    model.error = None
    switch.use("a")
    assert torch.equal(model(torch.zeros(3)), tuned["a"].w)
    with pytest.raises(type(error)):
        model.error = error
        model(torch.zeros(3))
    model.error = None

    def elsewhere() -> Tensor:
        with switch.using(None):
            return model(torch.zeros(3))

    assert torch.equal(in_threads(elsewhere)[0], torch.zeros(3))
    assert not switch._turns._holders


def test_who_waits_for_a_forward_that_is_interrupted_goes_on() -> None:
    model = Failing()
    switch, _ = switched(model, "a", density=1.0)
    with switch.using("a"):  # from now on forwards take turns
        pass
    waiting = threading.Thread(target=lambda: switch.use("a"))

    class Interrupt(BaseException):
        """Raised in the forward once somebody waits for its end."""

    def wait(module: nn.Module, args: object) -> None:
        waiting.start()
        while not switch._turns._queue:
            time.sleep(0.01)
        raise Interrupt

    handle = model.register_forward_pre_hook(wait)
    with pytest.raises(Interrupt):
        model(torch.zeros(3))
    handle.remove()
    waiting.join(timeout=30)
    assert not waiting.is_alive() and switch.active == "a"


def test_a_change_that_fails_lets_the_next_one_go_on() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    started, finish = threading.Event(), threading.Event()

    def first() -> None:
        with switch.using("a"):
            started.set()
            finish.wait(30)

    def failing() -> str:
        write = switch._turns._change
        switch._turns._change = lambda wanted: (_ for _ in ()).throw(FishError("no"))
        try:
            with switch.using("b"):
                return "entered"
        except FishError as error:
            return str(error)
        finally:
            switch._turns._change = write

    def last() -> str:
        while not switch._turns._queue:
            time.sleep(0.001)
        threading.Timer(0.05, finish.set).start()
        with switch.using("a"):
            return "entered"

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(first)]
        started.wait(30)
        futures += [pool.submit(failing), pool.submit(last)]
        assert [future.result(30) for future in futures] == [None, "no", "entered"]
    switch.use(None)
    assert bits(model) == bits(tuned[None])


@pytest.mark.parametrize("place", [0, 1])
def test_one_that_is_interrupted_in_the_queue_holds_nobody_up(place: int) -> None:
    switch, _ = switched(case("mlp").make(), "a", "b", "c")
    entered, started, finish = [], threading.Event(), threading.Event()
    threads: list[int] = []

    def first() -> None:
        with switch.using("a"):
            started.set()
            finish.wait(30)

    def request(name: str) -> None:
        threads.append(threading.get_ident())
        try:
            with switch.using(name):
                entered.append(name)
        except InterruptedError:
            entered.append("interrupted")

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(first)]
        started.wait(30)
        for waiting, name in enumerate(("b", "b", "c")):
            futures.append(pool.submit(request, name))
            while len(switch._turns._queue) <= waiting:
                time.sleep(0.001)
        # It reaches the thread once that wakes up: at the head of the queue, or let in by the head.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threads[place]), ctypes.py_object(InterruptedError))
        finish.set()
        for future in futures:
            future.result(30)
    assert sorted(entered) == ["b", "c", "interrupted"]
    assert not switch._turns._holders
    assert not switch._turns._queue


def test_generate_is_one_request() -> None:
    model = case("gpt2").make()
    switch, tuned = switched(model, "a", "b", density=0.5)
    ids = case("gpt2").batch(2, 0)["input_ids"][:, :3]
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = {name: m.generate(ids, **settings) for name, m in tuned.items()}
    assert not torch.equal(expected["a"], expected["b"])

    def request(name: str) -> None:
        for _ in range(3):
            with switch.using(name):
                assert torch.equal(model.generate(ids, **settings), expected[name])

    in_threads(*(lambda name=name: request(name) for name in ("a", "b", "a", "b")))


def test_asyncio() -> None:
    model = case("mlp").make()
    switch, tuned = switched(model, "a", "b")
    x = torch.randn(2, 5)

    def request(name: str) -> bool:
        with switch.using(name):
            return torch.equal(model(x), tuned[name](x))

    async def serve() -> list[bool]:
        found = await asyncio.gather(*(asyncio.to_thread(request, name) for name in "abbaab"))
        with switch.using("a"):  # a turn holds in the threads that it waits for
            found.append(torch.equal(await asyncio.to_thread(model, x), tuned["a"](x)))
        return found

    async def across_an_await() -> None:
        async def hold() -> None:
            with switch.using("a"):
                await asyncio.sleep(0.05)

        async def other() -> None:
            await asyncio.sleep(0)
            with switch.using("b"):
                pass

        await asyncio.gather(hold(), other())

    assert all(asyncio.run(serve()))
    with pytest.raises(FishError, match=r"waiting for it would never end: .*asyncio.to_thread\(\)"):
        asyncio.run(across_an_await())
    assert contextvars.copy_context().run(switch._turns.held) is None


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 1


without_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "aot_eager") for kind in ("module", "in place", "sequential", "inner")),
        pytest.param("module", "inductor", marks=without_compiler),
    ],
)
@pytest.mark.parametrize("served_before", [False, True], ids=["served later", "served before"])
def test_a_compiled_model_is_compiled_once(kind: str, backend: str, served_before: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = case("mlp" if kind == "sequential" else "sequence").make()
    switch, tuned = switched(model, "a", "b")
    whole = Wrapper(model) if kind == "inner" else model
    if served_before:  # its hooks are there when it is compiled
        with switch.using("a"):
            pass
        switch.use(None)
    if kind == "in place":
        whole.compile(backend=backend, fullgraph=True)
        compiled: Callable[[Tensor], Tensor] = whole
    else:
        compiled = torch.compile(whole, backend=backend, fullgraph=True)
    x = torch.randn(2, 6, 5)
    with torch.no_grad():
        compiled(x)
        for name in ("a", "b", None, "a", None, "b"):
            expected = tuned[name](x) + (kind == "inner")
            switch.use(name)
            torch.testing.assert_close(compiled(x), expected)
            switch.use(None)
            with switch.using(name):
                torch.testing.assert_close(compiled(x), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    if kind in ("module", "in place"):  # its forward outside a block takes a turn too
        with torch.no_grad(), switch.using("a"):
            pass
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), tuned[None](x))
        assert switch.active is None
    torch._dynamo.reset()


# --- the page, and the benchmark --------------------------------------------------------------------------------------


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, many, generate, several, split = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.DOTALL
    )
    case_of = case("gpt2")
    model = case_of.make()
    tuned = {name: changed(model, seed, 0.5) for seed, name in enumerate(("reviews", "news"))}
    for name, other in tuned.items():
        Delta.between(model, other).save(f"{name}.safetensors")
    requests = [{"input_ids": case_of.batch(1, seed)["input_ids"]} for seed in range(8)]
    tasks = ["reviews", "news"] * 4
    prompt = requests[0] | {"attention_mask": torch.ones_like(requests[0]["input_ids"])}
    prompt = {name: values[:, :3] for name, values in prompt.items()}
    scope = {"fishmask": fishmask, "torch": torch, "ThreadPoolExecutor": ThreadPoolExecutor, "model": model}
    scope |= {"requests": requests, "request": requests[0], "tasks": tasks, "prompt": prompt}
    scope["collate"] = lambda rows: {"input_ids": torch.cat([row["input_ids"] for row in rows])}
    with torch.no_grad():
        exec(first, scope)
        for name in tuned:
            assert torch.equal(scope[name], tuned[name](**requests[0]).logits)
        assert bits(model) == bits(case_of.make())
        exec(many, scope)
        expected = [tuned[task](**request).logits for task, request in zip(tasks, requests, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(scope["answers"], expected, strict=True))
        exec(generate, scope)
        assert torch.equal(scope["tokens"], tuned["reviews"].generate(**prompt, max_new_tokens=8))
        exec(several, scope)
        assert torch.isfinite(scope["mixed"]).all() and scope["switch"].active.overlap == "mean"
        exec(split, scope)
        for found, wanted in zip(scope["answers"], expected, strict=True):
            torch.testing.assert_close(found, wanted[0])


@pytest.mark.slow
def test_the_benchmark_runs_every_method_and_the_table_shows_them(tmp_path: Path) -> None:
    output = tmp_path / "switch.jsonl"
    options = ["--models", "tiny", "--rounds", "1", "--folder", str(tmp_path), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.switch", *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line["method"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert {"Switch", "LoRA r=8", "LoRA r=8, merged", "SHiRA", "Supertuning", "whole state dict"} < lines.keys()
    assert lines["Switch"]["base_entries_changed"] == 0 < lines["LoRA r=8, merged"]["base_entries_changed"]
    ours, whole = lines["Switch"], lines["whole state dict"]
    assert ours["entries"] == int(0.005 * ours["n"]) and whole["entries"] == ours["n"]
    assert 16 * ours["entries"] <= ours["memory_bytes"] < 0.1 * whole["memory_bytes"]
    assert "PASS: tiny: the base comes back bit for bit" in done.stdout
