"""An attached model under DistributedDataParallel on real processes: what its gradient is, and what it moves."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import fishmask
from fishmask import Mask
from fishmask.data_parallel import Replica
from tests.replicas import assert_close, gradients, loss_of, moved, prepared, reference, share, trained_alone
from tests.team import Team, WorkerFailed, teams_of

SIZES = (2, 3)
# Linear and LayerNorm; convolution and BatchNorm; constant buffers; Conv1D and tied weights; attention's bare weights.
NAMES = ("sequence", "conv", "bert", "gpt2", "torch-encoder")
GENERAL = {"conv", "torch-encoder"}  # have parameters on the general path


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, Team]]:
    yield from teams_of(SIZES)


# --- what the workers do ----------------------------------------------------------------------------------------------


def wrapped(name: str, **settings: Any) -> tuple[fishmask.Tuning, DistributedDataParallel]:
    model, mask = prepared(name)
    tuning = fishmask.attach(model, mask)
    return tuning, DistributedDataParallel(Replica(tuning), **settings)


def step_gradients(rank: int, size: int, name: str, settings: dict[str, Any], steps: int) -> Any:
    tuning, ddp = wrapped(name, **settings)
    collectives = []
    for step in range(steps):
        tuning_grads = [values.grad for values in tuning.parameters()]
        assert step == 0 or all(grad is not None for grad in tuning_grads)
        for values in tuning.parameters():
            values.grad = None
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as log:
            loss_of(ddp, share(name, step, rank)).backward()
        collectives.append(moved(log.events()))
    return gradients(tuning), collectives, tuning.mask.k, tuning.general


# --- the gradient, and what it costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_all_examples_and_moves_k_values(teams: dict[int, Team], size: int, name: str) -> None:
    results = teams[size].run(step_gradients, name, {"forward_sync_buffers": False}, 3)
    wanted = reference(name, size, step=2)
    for found, collectives, k, general in results:
        assert_close(found, wanted)
        assert bool(general) == (name in GENERAL)
        first, second, third = collectives
        assert first == third == {"gloo:all_reduce": [k]}
        # Once, DDP tells the order in which gradients arrive: a number for each parameter, and how many there are.
        assert second == first | {"gloo:broadcast": second["gloo:broadcast"]}
        assert sum(second["gloo:broadcast"]) <= 2 * len(wanted) + 2
    for found, *_ in results[1:]:
        for parameter, gradient in found.items():
            np.testing.assert_array_equal(gradient, results[0][0][parameter])


def exact_parts(rank: int, size: int) -> Any:
    tuning, ddp = wrapped("sequence")
    with ddp.no_sync():
        loss_of(ddp, share("sequence", 0, rank)).backward()
    own = gradients(tuning)
    for values in tuning.parameters():
        values.grad = None
    loss_of(ddp, share("sequence", 0, rank)).backward()
    return own, gradients(tuning)


def test_the_mean_over_two_workers_is_exact(teams: dict[int, Team]) -> None:
    """Halves are exact in binary, and a sum of two has no order."""
    (first, mean), (second, other) = teams[2].run(exact_parts)
    for name, gradient in mean.items():
        np.testing.assert_array_equal(gradient, (first[name] + second[name]) / 2)
        np.testing.assert_array_equal(gradient, other[name])
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_the_mean_over_workers_is_the_gradient_of_the_concatenated_batch() -> None:
    """Ties the reference of these tests to one batch that holds the examples of all workers."""
    for name in ("sequence", "bert", "gpt2", "torch-encoder"):
        model, mask = prepared(name)
        model = model.double()
        parts = [share(name, 0, rank) for rank in range(3)]
        if isinstance(parts[0], dict):
            whole: Any = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        else:
            whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        loss_of(model, whole).backward()
        for parameter, gradient in reference(name, 3, 0).items():
            dense = model.get_parameter(parameter).grad.flatten()[mask.indices[parameter]]
            np.testing.assert_allclose(gradient, dense.numpy(), rtol=1e-9, atol=1e-12)


def written_bytes() -> int:
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text()).group(1))


def wide_network() -> tuple[nn.Module, Mask]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 16))
    return model, Mask.random(model, 0.05, seed=1)


def count_written(rank: int, size: int) -> tuple[list[int], int]:
    model, mask = wide_network()
    tuning = fishmask.attach(model, mask)
    ddp = DistributedDataParallel(Replica(tuning))
    counts = []
    for step in range(4):
        before = written_bytes()
        ddp(torch.randn(8, 256, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        counts.append(written_bytes() - before)
    return counts[2:], mask.k


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel counts")
def test_the_kernel_counts_no_more_than_the_values(teams: dict[int, Team]) -> None:
    for counts, k in teams[2].run(count_written):
        ring = 4 * k  # 2 (W - 1) / W values of four bytes
        for count in counts:
            assert ring <= count <= ring + 4096  # gloo's own messages besides


@pytest.mark.parametrize(
    "settings",
    [
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.001},
        {"find_unused_parameters": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("name", ["torch-encoder", "gpt2"])
def test_settings_of_ddp(teams: dict[int, Team], name: str, settings: dict[str, Any]) -> None:
    if settings.get("find_unused_parameters") and name in GENERAL:
        with pytest.raises(WorkerFailed, match=r"takes the values of these parameters for unused.*static_graph"):
            teams[2].run(step_gradients, name, settings, 1)
        return
    wanted = reference(name, 2, step=1)
    for found, *_ in teams[2].run(step_gradients, name, settings, 2):
        assert_close(found, wanted)


# --- training ---------------------------------------------------------------------------------------------------------


def train(rank: int, size: int, name: str, hook: str | None) -> Any:
    tuning, ddp = wrapped(name)
    if hook == "float16":
        ddp.register_comm_hook(None, fp16_compress_hook)
    elif hook == "power-sgd":
        ddp.register_comm_hook(PowerSGDState(None, start_powerSGD_iter=2), powerSGD_hook)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5, momentum=0.9)
    norms = []
    for step in range(3):
        with ddp.no_sync():
            loss_of(ddp, share(name, 2 * step, rank)).backward()
        loss_of(ddp, share(name, 2 * step + 1, rank)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(tuning.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    ddp.eval()
    weights = {n: t.numpy().copy() for n, t in tuning.model.state_dict().items()}
    return weights, norms, sorted(ddp.state_dict()), tuning.delta().mask.k


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_accumulation_and_clipping(teams: dict[int, Team], size: int, name: str) -> None:
    _, mask = prepared(name)
    wanted, norms = trained_alone(name, size)
    for weights, found, _, k in teams[size].run(train, name, None):
        assert k == mask.k
        np.testing.assert_allclose(found, norms, rtol=1e-4)
        for parameter, weight in wanted.items():
            np.testing.assert_allclose(weights[parameter], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hook", [None, "float16", "power-sgd"])
def test_workers_stay_equal_and_frozen_entries_stay_as_they_are(teams: dict[int, Team], hook: str | None) -> None:
    model, mask = prepared("conv")
    results = teams[3].run(train, "conv", hook)
    for weights, _, keys, k in results:
        assert k == mask.k
        assert keys == sorted(f"module.model.{name}" for name in model.state_dict())
        for name, p in model.named_parameters():
            np.testing.assert_array_equal(weights[name], results[0][0][name])
            changed = np.flatnonzero(weights[name].view("i4") != p.detach().numpy().view("i4"))
            assert set(changed) <= set(mask.indices[name].tolist())


def statistics(rank: int, size: int, settings: dict[str, Any]) -> Any:
    tuning, ddp = wrapped("conv", **settings)
    for step in range(2):
        ddp(share("conv", step, rank)[0])
    ddp.eval()
    before = {name: b.numpy().copy() for name, b in tuning.model.named_buffers()}
    ddp(share("conv", 2, rank)[0])
    return before, {name: b.numpy().copy() for name, b in tuning.model.named_buffers()}


def test_statistics_of_batch_norm_are_those_of_rank_0(teams: dict[int, Team]) -> None:
    model, _ = prepared("conv")
    for step in range(2):
        model(share("conv", step, 0)[0])
    wanted = {name: b.numpy() for name, b in model.named_buffers()}
    (own, synced), (other_own, other_synced) = teams[2].run(statistics, {})
    for name, buffer in wanted.items():
        np.testing.assert_array_equal(synced[name], buffer)
        np.testing.assert_array_equal(other_synced[name], buffer)
    assert not np.array_equal(own["norm.running_mean"], other_own["norm.running_mean"])
    (_, apart), (_, other_apart) = teams[2].run(statistics, {"forward_sync_buffers": False})
    assert not np.array_equal(apart["norm.running_mean"], other_apart["norm.running_mean"])


def start_and_step(rank: int, size: int) -> Any:
    tuning, _ = wrapped("bert")
    before = [values.detach().clone() for values in tuning.parameters()]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as log:
        DistributedDataParallel(Replica(tuning))
    assert all(torch.equal(a, b) for a, b in zip(before, tuning.parameters(), strict=True))
    return moved(log.events()), sum(p.numel() for p in tuning.model.parameters()), len(before), tuning.mask.k


def test_the_start_moves_values_and_checksums_alone(teams: dict[int, Team]) -> None:
    for collectives, n, parameters, k in teams[2].run(start_and_step):
        elements = sum(sum(counts) for counts in collectives.values())
        # The values once, 32 bytes for each of two handshakes, and the sizes of all parameters.
        assert k <= elements <= k + 2 * 32 + 16 * parameters + 64
        assert elements < n / 2


# --- what is refused --------------------------------------------------------------------------------------------------


def message_of(rank: int, size: int, fault: str) -> str:
    model, mask = prepared("conv")
    if fault == "weights" and rank == 1:
        with torch.no_grad():
            model.head.bias[0] += 1
    if fault == "mask" and rank == 1:
        mask = Mask.random(model, 0.3, seed=2)
    tuning = fishmask.attach(model, mask)
    x = share("conv", 0, rank)[0]
    try:
        if fault == "bare":
            DistributedDataParallel(model)(x)
        elif fault == "frozen":
            tuning.set_mask(Mask.from_indices({"stem.weight": [0, 5], "head.bias": [1]}))
            DistributedDataParallel(model)
        else:
            ddp = DistributedDataParallel(Replica(tuning))
            if fault == "set_mask":
                tuning.set_mask(mask)
            elif fault == "detach":
                tuning.detach()
            ddp(x)
    except (fishmask.FishError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "went through"


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("none", "went through"),
        ("weights", "HandshakeError: the workers do not train the same thing:\n  weights: head.bias"),
        ("mask", "HandshakeError: the workers do not train the same thing:\n  mask: "),
        ("set_mask", "FishError: the mask was changed or detached since this Replica was made"),
        ("detach", "FishError: the mask was changed or detached since this Replica was made"),
        ("bare", r"FishError: .*wrap the model as DistributedDataParallel\(fishmask.data_parallel.Replica\(tuning\)\)"),
        ("frozen", "RuntimeError: DistributedDataParallel is not needed when a module doesn't have any parameter"),
    ],
)
def test_faults_are_told_on_all_workers(teams: dict[int, Team], fault: str, wanted: str) -> None:
    for message in teams[2].run(message_of, fault):
        assert re.match(wanted, message), message


def after_set_mask(rank: int, size: int) -> Any:
    tuning, _ = wrapped("sequence")
    mask = Mask.random(tuning.model, 0.2, seed=5)
    tuning.set_mask(mask)
    ddp = DistributedDataParallel(Replica(tuning))
    loss_of(ddp, share("sequence", 0, rank)).backward()
    return gradients(tuning)


def test_another_mask_takes_another_replica(teams: dict[int, Team]) -> None:
    model, _ = prepared("sequence")
    mask = Mask.random(model, 0.2, seed=5)
    model = model.double()
    losses = [loss_of(model, share("sequence", 0, rank)) for rank in range(2)]
    (sum(losses) / 2).backward()
    wanted = {n: model.get_parameter(n).grad.flatten()[i].numpy() for n, i in mask.indices.items()}
    for found in teams[2].run(after_set_mask):
        assert_close(found, wanted)


def test_a_single_process_needs_no_group() -> None:
    model, mask = prepared("gpt2")
    tuning = fishmask.attach(model, mask)
    loss_of(Replica(tuning), share("gpt2", 0, 0)).backward()
    assert_close(gradients(tuning), reference("gpt2", 1, 0))
    with pytest.raises(TypeError, match="takes the Tuning"):
        Replica(model)
