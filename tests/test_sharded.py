"""An attached model whose base FSDP2 shards, on real processes, against DDP and against one process."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fishmask
from fishmask import LocalRounds, Mask, sharded
from fishmask.data_parallel import Replica
from tests.replicas import assert_close, gradients, loss_of, prepared, reference, share, trained_alone
from tests.team import Team, teams_of

SIZES = (2, 3)
NAMES = ("sequence", "conv", "bert", "gpt2", "torch-encoder")


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, Team]]:
    yield from teams_of(SIZES)


# --- what the workers do ----------------------------------------------------------------------------------------------


def shard(model: nn.Module, name: str, **settings: Any) -> nn.Module:
    """Shard the blocks of a model, then the rest of it; with an uneven number of rows for most parameters."""
    from torch.distributed.fsdp import fully_shard

    settings.setdefault("mesh", dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    blocks = {
        "sequence": lambda: [model.up, model.norm, model.down],
        "conv": lambda: [model.stem, model.conv, model.norm],
        "bert": lambda: model.bert.encoder.layer,
        "gpt2": lambda: model.transformer.h,
        "torch-encoder": lambda: model.encoder.layers,
    }
    for block in blocks[name]():
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def whole(model: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: (p.full_tensor() if sharded.is_sharded(p) else p).detach().numpy().copy()
        for name, p in model.named_parameters()
    }


def steps(tuning: fishmask.Tuning, ddp: nn.Module, optimizer: Any, name: str, rank: int, count: int) -> list[float]:
    """Train with two accumulated parts a step, and clipping."""
    norms = []
    for step in range(count):
        with ddp.no_sync():
            loss_of(ddp, share(name, 2 * step, rank)).backward()
        loss_of(ddp, share(name, 2 * step + 1, rank)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(tuning.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def train(rank: int, size: int, name: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Train for a while, sharded or not; return all that can be told of the model afterwards."""
    model, mask = prepared(name)
    if settings is not None:
        shard(model, name, **settings)
    tuning = fishmask.attach(model, mask)
    ddp = DistributedDataParallel(Replica(tuning))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5, momentum=0.9)
    norms = steps(tuning, ddp, optimizer, name, rank, 3)
    second = Mask.random(model, 0.3, seed=2)
    delta = tuning.delta()
    tuning.set_mask(second, optimizer)
    after = whole(model)
    ddp = DistributedDataParallel(Replica(tuning))
    norms += steps(tuning, ddp, optimizer, name, rank, 1)
    later, more = whole(model), tuning.delta()
    general = tuning.general
    tuning.revert()
    return {
        "norms": norms,
        "after": after,
        "later": later,
        "reverted": whole(model),
        "delta": {name: values.numpy() for name, values in delta.values.items()},
        "more": {name: values.numpy() for name, values in more.values.items()},
        "base": (delta.base, more.base),
        "masks": (delta.mask.digest, more.mask.digest),
        "values": [values.detach().numpy().copy() for values in tuning.parameters()],
        "general": general,
    }


def assert_near(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """To the last digits: where a matrix lies in memory decides the order of a product's sums."""
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_allclose(found[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view("i4")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_ddp_and_of_one_process(teams: dict[int, Team], size: int, name: str) -> None:
    model, mask = prepared(name)
    base = {n: p.detach().numpy() for n, p in model.named_parameters()}
    plain = teams[size].run(train, name, None)[0]
    kept = {"reshard_after_forward": name != "gpt2"}
    results = teams[size].run(train, name, kept)
    for result in results:
        for key in ("after", "later", "delta", "more"):
            assert_near(result[key], plain[key])
        np.testing.assert_allclose(result["norms"], plain["norms"], rtol=1e-5)
        for key in ("base", "masks", "general"):
            assert result[key] == plain[key]
        for a, b in zip(result["values"], results[0]["values"], strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
        for parameter, weight in base.items():
            np.testing.assert_array_equal(bits(result["reverted"][parameter]), bits(weight))
            frozen = np.delete(np.arange(weight.size), mask.indices.get(parameter, torch.empty(0)).long().numpy())
            np.testing.assert_array_equal(bits(result["after"][parameter]).flat[frozen], bits(weight).flat[frozen])
    if name in ("bert", "gpt2"):
        wanted, norms = trained_alone(name, size)
        np.testing.assert_allclose(results[0]["norms"][:3], norms, rtol=1e-4)
        for parameter, weight in wanted.items():
            np.testing.assert_allclose(results[0]["after"][parameter], weight, rtol=1e-3, atol=1e-5)


# --- the parts of it --------------------------------------------------------------------------------------------------


def parts(rank: int, size: int) -> None:
    """Write and read entries of sharded tensors, and compare with the whole ones."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (size,))
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3), (2,), (4, 2), (7, 5), (6, 1, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            dense = torch.randn(shape, generator=generator).to(dtype)
            dense.view(-1)[-1] = -0.0
            weight = distribute_tensor(dense.clone(), mesh, [Shard(0)])
            for k in (1, dense.numel() // 2, dense.numel()):
                indices = torch.randperm(dense.numel(), generator=generator)[:k].sort().values
                taken = fishmask.params.take(weight, indices)
                assert torch.equal(taken.view(torch.uint8), dense.view(-1)[indices].view(torch.uint8))
                values = torch.randn(k, generator=generator).to(dtype)
                fishmask.params.put(weight, indices, values)
                dense.view(-1)[indices] = values
                assert torch.equal(weight.full_tensor().view(torch.uint8), dense.view(torch.uint8))
            assert fishmask.fingerprint.tensor_hash(weight) == fishmask.fingerprint.tensor_hash(dense)
            assert fishmask.handshake.checksums({"w": weight}) == fishmask.handshake.checksums({"w": dense})


@pytest.mark.parametrize("size", SIZES)
def test_entries_of_sharded_tensors(teams: dict[int, Team], size: int) -> None:
    teams[size].run(parts)


class Largest(TorchDispatchMode):
    """Notes the largest number of elements of a float tensor that any operation on memory of this rank returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not sharded.is_sharded(tensor):
                self.elements = max(self.elements, tensor.nbytes)
        return out


def measured(rank: int, size: int) -> dict[str, int]:
    """Return the largest tensor (in bytes) of what happens outside layers, and what is left of gathered weights."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 128))
    mesh = dist.init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tuning = fishmask.attach(model, Mask.random(model, 0.02, seed=1))
    ddp = DistributedDataParallel(Replica(tuning))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    left = 0
    with Largest() as running:
        ddp(torch.ones(2, 64)).square().sum().backward()
        left += sum(p.untyped_storage().nbytes() for p in tuning.shards.whole.values())
    with Largest() as outside:
        optimizer.step()
        tuning.write_back()
        tuning.delta()
        state = model.state_dict()
        model.load_state_dict(state)
        tuning.read_back()
    left += sum(p.untyped_storage().nbytes() for p in tuning.shards.whole.values())
    return {"left": left, "outside": outside.elements, "running": running.elements, "weight": 4 * 96 * 128}


def test_no_rank_holds_more_than_its_shard_outside_a_layer(teams: dict[int, Team]) -> None:
    for told in teams[3].run(measured):
        assert told["left"] == 0
        assert told["running"] >= told["weight"]  # the measure sees a gathered weight
        assert told["outside"] <= -(-128 // 3) * 96 * 4


# --- how FSDP2 is used ------------------------------------------------------------------------------------------------


def low_precision(rank: int, size: int) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, mask = prepared("bert")
    base = whole(model)
    shard(model, "bert", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    tuning = fishmask.attach(model, mask)
    ddp = DistributedDataParallel(Replica(tuning))
    loss_of(ddp, share("bert", 0, rank)).backward()
    found = gradients(tuning)
    torch.optim.SGD(tuning.parameters(), lr=0.5).step()
    assert all(values.dtype == torch.float32 for values in tuning.parameters())
    return found, base, whole(model)


def test_mixed_precision_computes_low_and_keeps_float32(teams: dict[int, Team]) -> None:
    wanted = reference("bert", 2, 0)
    _, mask = prepared("bert")
    largest = max(np.abs(g).max() for g in wanted.values())
    for found, before, after in teams[2].run(low_precision):
        for name, gradient in wanted.items():
            np.testing.assert_allclose(found[name], gradient, atol=0.05 * largest)
        assert Mask.between(tensors(before), tensors(after)) - mask == Mask.between(tensors(before), tensors(before))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def stale(rank: int, size: int) -> None:
    """Change values while FSDP2 keeps gathered weights: the next forward must use the new ones."""
    model, mask = prepared("sequence")
    shard(model, "sequence", reshard_after_forward=False)
    tuning = fishmask.attach(model, mask)
    ddp = DistributedDataParallel(Replica(tuning))
    x = share("sequence", 0, rank)[0]
    with torch.no_grad():
        before = ddp(x)
        for values in tuning.parameters():
            values.add_(0.5)
        after = ddp(x)
        assert not torch.allclose(before, after)
    model.set_reshard_after_backward(False)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    loss_of(ddp, share("sequence", 0, rank)).backward()
    optimizer.step()
    plain, _ = prepared("sequence")
    plain.load_state_dict(tensors(whole(tuning.settled_parameters() and model)))
    with torch.no_grad():
        torch.testing.assert_close(ddp(x), plain(x))
        for values in tuning.parameters():
            values.add_(0.5)
    tuning.read_back()  # what was not written is gone
    with torch.no_grad():
        torch.testing.assert_close(ddp(x), plain(x))


def test_gathered_weights_never_go_stale(teams: dict[int, Team]) -> None:
    teams[2].run(stale)


class Borrowed(nn.Module):
    """Uses the weight of its embedding as that of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(10, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.up(self.words(ids)), self.words.weight)


def borrowed(rank: int, size: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Borrowed()
    dense = copy.deepcopy(model)
    mask = Mask.random(model, 0.5, seed=1)
    mesh = dist.init_device_mesh("cpu", (size,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tuning = fishmask.attach(model, mask)
    ids = torch.arange(5)
    DistributedDataParallel(Replica(tuning))(ids).square().sum().backward()
    dense(ids).square().sum().backward()
    wanted = {n: dense.get_parameter(n).grad.flatten()[i].numpy() for n, i in mask.indices.items()}
    assert_close(gradients(tuning), wanted)
    return tuning.general


def test_a_weight_that_is_used_outside_its_layer(teams: dict[int, Team]) -> None:
    assert teams[2].run(borrowed) == [("words.weight",)] * 2


def rounds_of_one_step(rank: int, size: int) -> Any:
    model, mask = prepared("sequence")
    shard(model, "sequence")
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    with LocalRounds(tuning, every=1) as rounds:
        for step in range(3):
            loss_of(model, share("sequence", step, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return whole(model), rounds.number


def test_a_round_after_every_step_is_a_mean_of_gradients(teams: dict[int, Team]) -> None:
    model, mask = prepared("sequence")
    tuning = fishmask.attach(model, mask)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    for step in range(3):
        for rank in range(3):
            (loss_of(model, share("sequence", step, rank)) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    for weights, number in teams[3].run(rounds_of_one_step):
        assert number == 3
        assert_near(weights, {name: p.detach().numpy() for name, p in model.named_parameters()})


# --- what is refused --------------------------------------------------------------------------------------------------


def message_of(rank: int, size: int, fault: str, folder: str) -> str:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    mask = Mask.random(model, 0.5, seed=rank if fault == "masks" else 0)
    mesh = dist.init_device_mesh("cpu", (size,))
    settings: dict[str, Any] = {"mesh": mesh}
    if fault == "2-D":
        settings["mesh"] = dist.init_device_mesh("cpu", (1, size), mesh_dim_names=("copies", "rows"))
    elif fault == "columns":
        settings["shard_placement_fn"] = lambda p: Shard(p.dim() - 1)
    elif fault in ("replicated", "by hand"):
        placement = Replicate() if fault == "replicated" else Shard(0)
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [placement]))
    if fault == "late":
        tuning = fishmask.attach(model, mask)
    if fault not in ("replicated", "by hand"):
        fully_shard(model, **settings)
    before = [p.requires_grad for p in model.parameters()]
    try:
        if fault == "late":
            model(torch.ones(2, 4))
        tuning = fishmask.attach(model, mask)
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
        if fault == "apart":
            LocalRounds(tuning, every=2)
        elif fault == "log":
            with fishmask.CheckpointLog(folder) as log:
                log.commit(tuning, step=0)
        elif fault == "frozen":
            with torch.no_grad():
                model[0].weight.to_local().add_(1.0 if rank == 1 else 0.0)
            tuning.delta()
        for _ in range(2):
            model(torch.ones(2, 4) * (rank + 1)).square().sum().backward()
            optimizer.step()
    except fishmask.FishError as error:
        if fault in ("2-D", "columns", "replicated", "by hand", "masks"):
            assert before == [p.requires_grad for p in model.parameters()]
        return f"{type(error).__name__}: {error}"
    return "went through"


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("2-D", "0.weight: (Replicate(), Shard(dim=0)) on a mesh of shape (1, 2)"),
        ("columns", "0.weight: Shard(dim=1)"),
        ("replicated", "0.weight: Replicate()"),
        ("by hand", "these parameters are sharded, but not by fully_shard on this model or within it: 0.weight"),
        ("late", "call fully_shard first, then attach"),
        ("masks", "HandshakeError: the workers do not train the same thing:\n  mask: "),
        ("none", "the ranks of a sharded model have different values, and each writes its own rows"),
        ("apart", "the ranks [0, 1] hold one sharded model together, so they cannot train apart"),
        ("log", "CheckpointLog takes no sharded model"),
        ("frozen", "the base is gone: what is listed was changed outside the mask"),
    ],
)
def test_faults_are_told_on_all_ranks(teams: dict[int, Team], fault: str, wanted: str, tmp_path: Any) -> None:
    for message in teams[2].run(message_of, fault, str(tmp_path / "log")):
        assert wanted in message


def rounds_between_copies(rank: int, size: int) -> Any:
    """Two copies of two ranks each: a mean of gradients within a copy, a round every second step between them."""
    model, mask = prepared("sequence")
    meshes = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows"))
    shard(model, "sequence", mesh=meshes["rows"])
    tuning = fishmask.attach(model, mask)
    rows = meshes["rows"].get_group()
    ddp = DistributedDataParallel(Replica(tuning, group=rows), process_group=rows)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    with LocalRounds(tuning, every=2, group=meshes["copies"].get_group()):
        for step in range(4):
            loss_of(ddp, share("sequence", 2 * step + rank // 2, rank % 2)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return whole(model)


def test_rounds_between_sharded_copies() -> None:
    copies = []
    for _ in range(2):
        model, mask = prepared("sequence")
        tuning = fishmask.attach(model, mask)
        copies.append((model, tuning, torch.optim.SGD(tuning.parameters(), lr=0.5)))
    for step in range(4):
        for number, (model, _, optimizer) in enumerate(copies):
            for rank in range(2):
                (loss_of(model, share("sequence", 2 * step + number, rank)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % 2:
            mean = (copies[0][1].values.detach() + copies[1][1].values.detach()) / 2
            with torch.no_grad():
                for _, tuning, _ in copies:
                    tuning.values.copy_(mean)
                    tuning.write_back()
    with Team(4) as team:
        for weights in team.run(rounds_between_copies):
            assert_near(weights, {name: p.detach().numpy() for name, p in copies[0][0].named_parameters()})


PAGE = Path(__file__).parent.parent / "docs" / "data_parallel.md"


def run_the_page(rank: int, size: int, number: int) -> int:
    """Run a block of the page."""
    whole_model, _ = prepared("bert")
    model = whole_model.bert if number else whole_model
    names: dict[str, Any] = {"fishmask": fishmask, "torch": torch, "model": model, "Replica": Replica}
    names |= {"mask": Mask.random(model, 0.3, seed=1), "batches": [share("bert", step, rank) for step in range(2)]}
    names |= {"mesh": dist.init_device_mesh("cpu", (size,)), "DistributedDataParallel": DistributedDataParallel}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number], names)
    return int(names["ddp"].module.values[0].numel() > 0) + int(names["tuning"].shards is not None)


@pytest.mark.parametrize("number", [0, 1])
def test_the_code_of_the_page_runs(teams: dict[int, Team], number: int) -> None:
    assert teams[2].run(run_the_page, number) == [1 + number] * 2
