"""The DCP storage: bits kept in every dtype, damage and torn saves refused, real ranks that fail, die and reshard."""

import ast
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fishmask.dcp
import fishmask.dcp_metadata
from fishmask import FishError
from fishmask.dcp import Reader, Writer, plain_errors
from fishmask.dcp_metadata import DTYPES, METADATA

# DCP warns where there is no process group, which is what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dcp_logger, "disabled", True)  # it notes every call


def save(folder: Path, state: dict[str, Any], **options: Any) -> Any:
    with plain_errors():
        return dcp.save(state, storage_writer=Writer(folder), **options)


def load(folder: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    with plain_errors():
        dcp.load(state, storage_reader=Reader(folder), **options)
    return state


def bits(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return tensor.dtype, tuple(tensor.shape), plain.reshape(-1).view(torch.uint8).tolist()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("rank-*.data")
    return path


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the metadata and make its digest right again."""
    content = json.loads((folder / METADATA).read_bytes())
    change(content)
    sign(folder, json.dumps(content, separators=(",", ":")).encode())


def sign(folder: Path, data: bytes) -> None:
    """Write metadata with a digest that is right."""
    digest = hashlib.sha256(data[:11] + b"0" * 64 + data[75:]).hexdigest()
    (folder / METADATA).write_bytes(data[:11] + digest.encode() + data[75:])


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        high = 2 if dtype == torch.bool else 256  # any bits at all: NaN payloads, subnormals, minus zero
        raw = torch.randint(0, high, (6 * 5 * dtype.itemsize,), dtype=torch.uint8, generator=g)
        state[name] = raw.view(dtype).view(6, 5)
        state[f"{name} scalar"] = state[name][1, 2]
        state[f"{name} empty"] = state[name][:0]
        state[f"{name} strided"] = state[name].t()[1:4, ::2]
    number = torch.view_as_complex(torch.randn(4, 2, generator=g))
    state["conjugated"], state["negated"] = number.conj(), number.conj().imag
    state["channels last"] = torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last)
    state["parameter"] = torch.nn.Parameter(torch.randn(3, generator=g))
    state["negated one"] = number[:1].conj().imag  # contiguous, so that no copy settles it
    assert state["conjugated"].is_conj() and state["negated"].is_neg() and state["negated one"].is_neg()
    save(tmp_path, state)
    filler = {name: torch.empty_like(t.resolve_conj().resolve_neg()) for name, t in state.items()}
    loaded = load(tmp_path, filler)
    assert {name: bits(t) for name, t in loaded.items()} == {name: bits(t) for name, t in state.items()}


def test_a_tensor_is_cast_to_the_dtype_that_waits_for_it(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.tensor([1.0, 1 / 3])})
    assert torch.equal(load(tmp_path, {"w": torch.zeros(2).bfloat16()})["w"], torch.tensor([1.0, 1 / 3]).bfloat16())


OBJECTS = {"step": 7, "name": "tête", "none": None, "betas": (0.9, 0.999), "deep": {"words": ["a", "b"], "set": {1, 2}}}


def test_objects_come_back(tmp_path: Path) -> None:
    save(tmp_path, {**OBJECTS, "w": torch.ones(2)})
    expected = {"step": 0, "name": "", "none": 1, "betas": (), "deep": {"words": [], "set": set()}}
    assert load(tmp_path, {**expected, "w": torch.zeros(2)}) | {"w": None} == {**OBJECTS, "w": None}


def test_blank_is_the_saved_state_unfilled_and_can_be_filled(tmp_path: Path) -> None:
    state = {
        "values": {"a.weight": torch.arange(3.0), "a": {"weight.bias": torch.tensor(2)}},
        "list": [torch.ones(2), {"deep": torch.zeros(1, 2).half()}, 5],
        "step": 3,
    }
    save(tmp_path, state)
    blank = Reader(tmp_path).blank()
    assert blank["list"][1]["deep"].shape == (1, 2) and blank["list"][1]["deep"].dtype == torch.float16
    assert blank["step"] is None and blank["list"][2] is None
    loaded = load(tmp_path, blank)
    assert loaded["list"][2] == 5 and loaded["step"] == 3
    assert torch.equal(loaded["values"]["a.weight"], torch.arange(3.0))
    assert torch.equal(loaded["values"]["a"]["weight.bias"], torch.tensor(2))
    assert torch.equal(loaded["list"][0], torch.ones(2))
    save(tmp_path / "flat", {"w": torch.ones(2)}, planner=DefaultSavePlanner(flatten_state_dict=False))
    assert Reader(tmp_path / "flat").blank()["w"].shape == (2,)


def test_the_metadata_comes_back_as_the_planner_made_it(tmp_path: Path) -> None:
    saved = save(tmp_path, {"a": {"w": torch.ones(2, 3), "n": 1}})
    read = Reader(tmp_path).read_metadata()
    assert read.state_dict_metadata == saved.state_dict_metadata
    assert read.planner_data == saved.planner_data == {"a.w": ("a", "w"), "a.n": ("a", "n")}
    assert read.storage_data == saved.storage_data


def test_plan_caching_and_checkpoint_ids_are_as_with_other_writers(tmp_path: Path) -> None:
    writer, reader = Writer(tmp_path / "unused"), Reader(tmp_path / "unused")
    planner = DefaultSavePlanner(enable_plan_caching=True)
    for step in (1, 2):
        dcp.save(
            {"w": torch.full((2,), step)}, checkpoint_id=tmp_path / f"{step}", storage_writer=writer, planner=planner
        )
    for step in (1, 2):
        state = {"w": torch.zeros(2, dtype=torch.int64)}
        dcp.load(state, checkpoint_id=tmp_path / f"{step}", storage_reader=reader)
        assert state["w"].tolist() == [step, step]
    assert not (tmp_path / "unused").exists()
    assert not Writer.validate_checkpoint_id("s3://bucket/x") and Reader.validate_checkpoint_id(tmp_path)


def test_a_save_in_the_background_keeps_what_was_there_when_it_began(tmp_path: Path) -> None:
    state = {"values": {"w": torch.arange(1000.0)}, "steps": [1, 2]}
    future = dcp.async_save(state, storage_writer=Writer(tmp_path))
    state["values"]["w"].zero_()
    state["steps"].append(3)
    future.result()
    loaded = load(tmp_path, Reader(tmp_path).blank())
    assert torch.equal(loaded["values"]["w"], torch.arange(1000.0)) and loaded["steps"] == [1, 2]
    with pytest.raises(FishError, match="holds a checkpoint"), plain_errors():
        dcp.async_save(state, storage_writer=Writer(tmp_path)).result()


# --- damage -----------------------------------------------------------------------------------------------------------

SMALL = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "step": 12}


def refused(folder: Path, file: Path) -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.tensor(False), "step": 0}
    with pytest.raises(FishError) as caught:
        load(folder, state)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["data", "metadata"])
def test_every_flipped_byte_and_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, SMALL)
    file = data_file(tmp_path) if name == "data" else tmp_path / METADATA
    data = file.read_bytes()
    with file.open("r+b", buffering=0) as handle:
        for place, byte in enumerate(data):
            handle.seek(place)
            handle.write(bytes([byte ^ 1 << place % 8]))
            refused(tmp_path, file)
            handle.seek(place)
            handle.write(bytes([byte]))
    assert load(tmp_path, Reader(tmp_path).blank())["step"] == 12
    for tail in (b"\0", b" ", b"\n", data):
        file.write_bytes(data + tail)
        refused(tmp_path, file)
    for length in reversed(range(len(data))):
        os.truncate(file, length)
        refused(tmp_path, file)
    file.unlink()
    with pytest.raises(FishError, match=re.escape(str(tmp_path))):
        load(tmp_path, {"a": torch.zeros(2, 3)})


def test_a_part_is_read_and_verified_alone(tmp_path: Path) -> None:
    save(tmp_path, {"first": torch.ones(50), "second": torch.ones(50)})
    file = data_file(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[0] ^= 1
    file.write_bytes(damaged)
    assert torch.equal(load(tmp_path, {"second": torch.zeros(50)})["second"], torch.ones(50))
    first = torch.full((50,), 3.0)
    with pytest.raises(FishError, match="damaged: the item at byte 0 does not"):
        load(tmp_path, {"first": first})
    assert torch.equal(first, torch.full((50,), 3.0))


def test_verify_reads_every_byte_and_names_the_file(tmp_path: Path) -> None:
    save(tmp_path, SMALL)
    Reader(tmp_path).verify()
    file = data_file(tmp_path)
    data = file.read_bytes()
    for broken in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        file.write_bytes(broken)
        with pytest.raises(FishError, match=re.escape(str(file))):
            Reader(tmp_path).verify()


def test_a_file_of_another_save_does_not_fit(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"{step}", {"w": torch.full((4,), float(step))})
    data_file(tmp_path / "1").write_bytes(data_file(tmp_path / "2").read_bytes())
    with pytest.raises(FishError, match="does not match its digest"):
        load(tmp_path / "1", {"w": torch.zeros(4)})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_well_signed_metadata_full_of_nonsense_is_refused_or_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "nonsense"
    if not folder.exists():
        save(folder / "sound", SMALL)
    broken = bytearray((folder / "sound" / METADATA).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(75, len(broken) - 1))] = data.draw(st.integers(0, 255))
    sign(folder, bytes(broken))
    with contextlib.suppress(FishError):
        Reader(folder).read_metadata()


def test_metadata_of_other_programs_is_refused(tmp_path: Path) -> None:
    save(tmp_path, SMALL)
    sound = (tmp_path / METADATA).read_bytes()

    def outside(content: dict[str, Any]) -> None:
        content["files"][0]["name"] = "../secret"

    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "newer than this fishmask": lambda content: content.update(version=2),
        "this one is": lambda content: content.update(byteorder={"little": "big", "big": "little"}[sys.byteorder]),
        "format 'x'": lambda content: content.update(format="x"),
        "starts at byte 1,": lambda content: content["tensors"]["a"]["chunks"][0].update(start=1),
        "of 10000": lambda content: content["files"][0].update(bytes=10000),
        "bytes for torch.float64": lambda content: content["tensors"]["a"].update(dtype="float64"),
        "quint8": lambda content: content["tensors"]["a"].update(dtype="quint8"),
        "secret": outside,
    }
    for message, change in changes.items():
        (tmp_path / METADATA).write_bytes(sound)
        rewritten(tmp_path, change)
        with pytest.raises(FishError, match=message):
            Reader(tmp_path).read_metadata()


# --- saves that do not come about -------------------------------------------------------------------------------------


class FailingPlanner(DefaultSavePlanner):
    """Fails when it is asked for the item of a name."""

    def __init__(self, name: str, fail: Callable[[], None]) -> None:
        super().__init__()
        self.name, self.fail = name, fail

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == self.name:
            self.fail()
        return super().resolve_data(write_item)


def run_dry() -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, SMALL)
    before = files_of(tmp_path)
    with pytest.raises(FishError, match="never overwritten"):
        save(tmp_path, {"a": torch.zeros(1)})
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("moment", ["write", "finish", "publish"])
def test_two_saves_into_one_folder_at_a_time_make_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def overtaken() -> None:
        monkeypatch.undo()
        save(tmp_path, {"w": torch.zeros(3), "late": torch.zeros(3)})

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            overtaken()
            return function(*arguments, **options)

        return call

    if moment == "finish":
        monkeypatch.setattr(Writer, "finish", late(Writer.finish))
    if moment == "publish":
        monkeypatch.setattr(fishmask.dcp, "encode", late(fishmask.dcp.encode))
    planner = FailingPlanner("late", overtaken) if moment == "write" else None
    with pytest.raises(FishError, match="never overwritten"):
        save(tmp_path, {"w": torch.ones(3), "late": torch.ones(3)}, planner=planner)
    loaded = load(tmp_path, Reader(tmp_path).blank())
    assert torch.equal(loaded["w"], torch.zeros(3)) and torch.equal(loaded["late"], torch.zeros(3))


def test_a_failed_save_leaves_no_checkpoint_and_its_folder_can_be_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FishError, match="No space left"):
        save(tmp_path, SMALL, planner=FailingPlanner("b", run_dry))
    assert files_of(tmp_path) == {}
    with monkeypatch.context() as patch:  # every rank is done, the metadata fails
        patch.setattr(fishmask.dcp, "encode", lambda *arguments: run_dry())
        with pytest.raises(FishError, match="No space left"):
            save(tmp_path, SMALL)
    stray = data_file(tmp_path)
    (tmp_path / f".{stray.name}.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".other.tmp").write_text("mine")
    with pytest.raises(FishError, match="holds no checkpoint"):
        load(tmp_path, {"a": torch.zeros(2, 3)})
    save(tmp_path, SMALL)
    assert sorted(files_of(tmp_path)) == sorted([".other.tmp", METADATA, "notes.txt", data_file(tmp_path).name])
    assert data_file(tmp_path) != stray
    assert load(tmp_path, {"a": torch.zeros(2, 3)})["a"].tolist() == SMALL["a"].tolist()


def test_what_cannot_be_kept_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sparse CSR is in beta, quantized tensors are on their way out
        sparse = {"x": torch.eye(2).to_sparse(), "y": torch.eye(2).to_sparse_csr(), "z": torch.eye(2)}
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    with pytest.raises(FishError, match=r"cannot save x: torch.sparse_coo .*; y: torch.sparse_csr"):
        save(folder, sparse)
    with pytest.raises(FishError, match=r"torch\.quint8 has no plain bytes"):
        save(folder, {"q": quantized})
    with pytest.raises(ValueError, match="use_collectives=True"):
        dcp.save({"w": torch.ones(2)}, storage_writer=Writer(folder), use_collectives=False)
    assert not folder.exists()


def test_a_planner_that_contradicts_itself_makes_no_checkpoint(tmp_path: Path) -> None:
    class Halving(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            return super().resolve_data(write_item).half()

    class Shortening(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            return super().resolve_data(write_item)[:1]

    class Forgetting(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            plans[0].items.pop()
            return plans, metadata

    class Omitting(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            del metadata.state_dict_metadata["w"]
            return plans, metadata

    class Doubling(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            plans[0].items.append(plans[0].items[0])
            return plans, metadata

    class Partial(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.state_dict_metadata["w"].size = torch.Size([4])
            return plans, metadata

    class Chatty(DefaultSavePlanner):
        data: Any = frozenset({1, 2})

        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = self.data
            return plans, metadata

    class Chattier(Chatty):
        data = ((b"bytes", "w"),)

    class Chattiest(Chatty):
        data = MappingProxyType({"w": (b"bytes",)})

    planners = {
        Omitting: "wrote 2 items where the planner's metadata has 1",
        Doubling: "written twice",
        Halving: "had planned",
        Shortening: "had planned", Forgetting: "no rank wrote", Partial: "hold only a part of w",
        Chatty: "without pickle", Chattier: "without pickle",
        Chattiest: "without pickle",
    }  # fmt: skip
    for planner, message in planners.items():
        with pytest.raises(FishError, match=message):
            save(tmp_path, {"v": torch.ones(2), "w": torch.ones(2)}, planner=planner())
        assert not (tmp_path / METADATA).exists()


def test_a_planner_with_too_large_a_place_for_a_tensor_is_refused(tmp_path: Path) -> None:
    class Widening(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> Any:
            return torch.zeros(3, 2)

    save(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(FishError, match=r"\[3, 2\] places for \[2\] saved entries"):
        load(tmp_path, {"w": torch.zeros(2)}, planner=Widening())


def test_plain_errors_lets_an_interrupt_through() -> None:
    interrupt = CheckpointException("write", {0: (KeyboardInterrupt(), None), 1: (OSError("x"), None)})  # type: ignore[dict-item]
    with pytest.raises(CheckpointException), plain_errors():
        raise interrupt


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell what is synced")
def test_data_and_folders_are_durable_before_the_metadata_and_that_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[str] = []
    fsync, link = os.fsync, os.link

    def kind(path: str) -> str:
        return re.sub(r"\.[0-9a-f]{16}", "", re.sub(r"-[0-9a-f]{16}", "", os.path.relpath(path, tmp_path)))

    def recorded_fsync(handle: int) -> None:
        trace.append("sync " + kind(str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def recorded_link(source: Path, target: Path) -> None:
        trace.append("link " + kind(str(target)))
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    save(tmp_path / "run" / "step", SMALL)
    needed = [
        "sync .", "sync run",
        "sync run/step/.rank-00000.data.tmp", "link run/step/rank-00000.data", "sync run/step",
        "sync run/step/.metadata.json.tmp", "link run/step/metadata.json", "sync run/step",
    ]  # fmt: skip
    rest = iter(trace)
    assert all(event in rest for event in needed), trace  # in this order
    assert trace.count("link run/step/metadata.json") == 1


# --- pickle and size --------------------------------------------------------------------------------------------------


def test_nothing_is_pickled_or_unpickled_but_the_objects_by_the_planner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fishmask.dcp, fishmask.dcp_metadata):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not {"pickle", "cPickle", "dill", "marshal", "shelve"} & names
        assert not {"torch.load", "torch.save", "eval", "exec"} & calls

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pickled")

    with monkeypatch.context() as patch:
        for owner in (pickle, torch):
            for name in ("load", "loads", "dump", "dumps", "save", "Pickler", "Unpickler"):
                if hasattr(owner, name):
                    patch.setattr(owner, name, never)
        save(tmp_path, {"w": {"x": torch.ones(3)}})
        assert torch.equal(load(tmp_path, Reader(tmp_path).blank())["w"]["x"], torch.ones(3))
        with pytest.raises(FishError, match="pickled"):
            save(tmp_path / "object", {"n": 1})


def test_fewer_bytes_than_torchs_own_writer(tmp_path: Path) -> None:
    """The state of a mask on a model of many layers: k values and two moments of AdamW with its step."""
    state: dict[str, Any] = {"values": {}, "optimizer": {}}
    for i in range(50):
        name = f"encoder.layer.{i}.attention.weight"
        state["values"][name] = torch.randn(200)
        state["optimizer"][name] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones(200),
            "exp_avg_sq": torch.ones(200),
        }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"))
    save(tmp_path / "fish", state)
    ours, torchs = (sum(map(len, files_of(tmp_path / name).values())) for name in ("fish", "torch"))
    payload = 50 * (3 * 200 + 1) * 4
    assert len(data_file(tmp_path / "fish").read_bytes()) == payload
    assert payload < ours < torchs / 2
    assert (ours - payload) / 200 < 450 < 1500 < (torchs - payload) / 200  # beside the numbers, for each tensor


# --- ranks ------------------------------------------------------------------------------------------------------------

FULL = {
    "rows": torch.arange(35.0).view(7, 5),  # 4 and 3 rows at two ranks; 3, 3 and 1 at three
    "columns": torch.arange(24, dtype=torch.int64).view(2, 12),
    "few": torch.arange(2.0),  # the third of three ranks has none
    "same": torch.arange(9.0).bfloat16(),
    "old": torch.arange(8.0),
}


def sharded(rank: int, world: int, zero: bool = False) -> dict[str, Any]:
    """Return ``FULL`` spread over the ranks in several ways."""
    mesh = init_device_mesh("cpu", (world,))
    placements = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0), "same": Replicate()}
    state: dict[str, Any] = {}
    for name, placement in placements.items():
        full = torch.zeros_like(FULL[name]) if zero else FULL[name].clone()
        state[name] = distribute_tensor(full, mesh, [placement])
    state["plain"] = torch.zeros(3) if zero else torch.arange(3.0)
    state["step"] = 0 if zero else 5
    return state


def joined(rank: int, world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / f'rendezvous-{world}'}"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=world, rank=rank)


def message(act: Callable[[], Any]) -> str:
    """Return what a call complained of."""
    try:
        with plain_errors():
            act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def saving_rank(rank: int, folder: Path) -> None:
    """Save at two ranks: well, in the background, with a rank that fails, and with one that is killed."""
    joined(rank, 2, folder)
    told: dict[str, Any] = {}
    state = sharded(rank, 2)
    shard = LocalShard.from_tensor_and_offsets(FULL["old"][rank * 4 : rank * 4 + 4].clone(), [rank * 4], rank)
    dcp.save({**state, "old": init_from_local_shards([shard], 8)}, storage_writer=Writer(folder / "sound"))

    future = dcp.async_save(state, storage_writer=Writer(folder / "async"))
    state["rows"].to_local().zero_()
    future.result()
    state = sharded(rank, 2)

    planner = FailingPlanner("rows", run_dry) if rank == 1 else None
    told["failed"] = message(lambda: dcp.save(state, storage_writer=Writer(folder / "failed"), planner=planner))
    told["taken"] = message(lambda: dcp.save(state, storage_writer=Writer(folder / "sound")))
    told["apart"] = message(lambda: dcp.save(state, storage_writer=Writer(folder / f"apart-{rank}")))
    mixed = Reader(folder / ("sound" if rank else "async"))
    told["mixed"] = message(lambda: dcp.load(sharded(rank, 2, zero=True), storage_reader=mixed))

    (folder / "page").mkdir(exist_ok=True)
    run_page(folder / "page")

    (folder / f"saved-{rank}.json").write_text(json.dumps(told))
    planner = FailingPlanner("columns", lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else None
    told["killed"] = message(lambda: dcp.save(state, storage_writer=Writer(folder / "killed"), planner=planner))
    (folder / f"saved-{rank}.json").write_text(json.dumps(told))
    os._exit(0)  # the group is broken: leaving it in order would wait for the dead


def loading_rank(rank: int, folder: Path) -> None:
    """Load at three ranks what two have saved."""
    joined(rank, 3, folder)
    told: dict[str, Any] = {}
    state = sharded(rank, 3, zero=True)
    with plain_errors():
        dcp.load(state, storage_reader=Reader(folder / "sound"))
    for name in ("rows", "columns", "few", "same"):
        tensor = state[name]
        assert isinstance(tensor, DTensor)
        told[name] = list(tensor.to_local().shape)
        assert torch.equal(tensor.full_tensor(), FULL[name]), name
    assert torch.equal(state["plain"], torch.arange(3.0)) and state["step"] == 5
    # Two of three ranks have no row of a tensor of one.
    one = distribute_tensor(torch.arange(4.0).view(1, 4), init_device_mesh("cpu", (3,)), [Shard(0)])
    dcp.save({"one": one}, storage_writer=Writer(folder / "one"))
    (folder / f"loaded-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def run_ranks(target: Callable[[int, Path], None], world: int, folder: Path) -> list[int | None]:
    context = multiprocessing.get_context("forkserver")  # imports everything once, for all ranks
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=target, args=(rank, folder), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[int | None], list[dict[str, str]]]]:
    """What two ranks saved, how they ended, and what they were told."""
    folder = tmp_path_factory.mktemp("ranks")
    codes = run_ranks(saving_rank, 2, folder)
    yield folder, codes, [json.loads((folder / f"saved-{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_make_one_file_each(ranks: Any) -> None:
    folder, _, _ = ranks
    names = sorted(path.name[:10] for path in (folder / "sound").iterdir())
    assert names == ["metadata.j", "rank-00000", "rank-00001"]
    Reader(folder / "sound").verify()
    saved = Reader(folder / "sound").read_metadata()
    chunks = saved.state_dict_metadata["rows"].chunks  # type: ignore[union-attr]
    assert [(list(c.offsets), list(c.sizes)) for c in chunks] == [([0, 0], [4, 5]), ([4, 0], [3, 5])]
    sizes = [path.stat().st_size for path in (folder / "sound").glob("rank-*")]
    assert sum(sizes) < 3000  # what both ranks hold is saved once


def test_what_two_ranks_saved_loads_without_any(ranks: Any) -> None:
    folder, _, _ = ranks
    state = load(folder / "sound", Reader(folder / "sound").blank())
    for name, tensor in FULL.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    assert state["step"] == 5 and torch.equal(state["plain"], torch.arange(3.0))


def test_what_two_ranks_saved_in_the_background_is_what_there_was(ranks: Any) -> None:
    folder, _, _ = ranks
    assert torch.equal(load(folder / "async", {"rows": torch.zeros(7, 5)})["rows"], FULL["rows"])


def test_what_two_ranks_saved_loads_at_three(ranks: Any) -> None:
    folder, _, _ = ranks
    assert run_ranks(loading_rank, 3, folder) == [0, 0, 0]
    told = [json.loads((folder / f"loaded-{rank}.json").read_text()) for rank in range(3)]
    assert [t["rows"] for t in told] == [[3, 5], [3, 5], [1, 5]]
    assert [t["columns"] for t in told] == [[2, 4]] * 3
    assert [t["few"] for t in told] == [[1], [1], [0]]
    assert load(folder / "one", Reader(folder / "one").blank())["one"].tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_a_rank_that_fails_is_named_everywhere_and_makes_no_checkpoint(ranks: Any) -> None:
    folder, _, told = ranks
    for rank in range(2):
        assert told[rank]["failed"].startswith("FishError: rank 1: [Errno 28] No space left on device")
    assert not (folder / "failed" / METADATA).exists()
    with pytest.raises(FishError, match="holds no checkpoint"):
        load(folder / "failed", {"same": torch.zeros(9)})


def test_two_ranks_do_not_overwrite_a_checkpoint(ranks: Any) -> None:
    for said in ranks[2]:
        assert said["taken"].count("holds a checkpoint") == 2


def test_ranks_must_share_the_folder(ranks: Any) -> None:
    folder, _, told = ranks
    for said in told:
        assert "is missing: the folder of a checkpoint must be on storage that all ranks share" in said["apart"]
        assert "ranks [1] read another checkpoint than rank 0" in said["mixed"]
    assert not any((folder / f"apart-{rank}" / METADATA).exists() for rank in range(2))


def test_a_rank_killed_in_mid_save_leaves_nothing_that_loads(ranks: Any) -> None:
    folder, codes, told = ranks
    assert codes == [0, -signal.SIGKILL]
    assert told[0]["killed"] and "killed" not in told[1]
    killed = folder / "killed"
    left = sorted(path.name for path in killed.iterdir())
    assert any(name.startswith(".rank-00001") for name in left)  # it died while it wrote
    with pytest.raises(FishError, match="holds no checkpoint"):
        load(killed, {"same": torch.zeros(9)})
    Reader(folder / "sound").verify()  # the one before is untouched
    save(killed, {"same": FULL["same"]})
    assert len(list(killed.iterdir())) == 2 and not set(left) & set(files_of(killed))
    assert torch.equal(load(killed, {"same": torch.zeros(9).bfloat16()})["same"], FULL["same"])


# --- the page ---------------------------------------------------------------------------------------------------------


def run_page(folder: Path) -> dict[str, Any]:
    """Run all Python code of the page, with ``folder`` as the working directory, and return what it defines."""
    page = Path(__file__).parents[1] / "docs" / "dcp.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    os.chdir(folder)
    defined: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(blocks), str(page), "exec"), defined)
    return defined


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.putenv, ("FISHMASK_MALICE", "1")


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    harmless = run_page(tmp_path)["Harmless"]
    assert len(list((tmp_path / "run" / "step-3").glob("rank-*"))) == 1
    save(tmp_path / "good", {"n": {"a": [1, "x", torch.ones(2)]}})
    save(tmp_path / "bad", {"n": Malicious()})
    good = load(tmp_path / "good", Reader(tmp_path / "good").blank(), planner=harmless())
    assert good["n"]["a"][:2] == [1, "x"] and torch.equal(good["n"]["a"][2], torch.ones(2))
    with pytest.raises(FishError, match="Weights only load failed"):
        load(tmp_path / "bad", {"n": None}, planner=harmless())


def test_the_code_of_the_page_runs_at_two_ranks_that_share_the_work(ranks: Any) -> None:
    step = ranks[0] / "page" / "run" / "step-3"
    metadata = Reader(step).read_metadata()
    sizes = [path.stat().st_size for path in sorted(step.glob("rank-*"))]
    shared = sum(t.numel() * t.element_size() for t in leaves(Reader(step).blank()))
    assert len(sizes) == 2 and sum(sizes) == shared  # each number once, and no object
    assert min(sizes) > shared / 3
    assert all(len(tensor.chunks) == 1 for tensor in metadata.state_dict_metadata.values())  # type: ignore[union-attr]


def leaves(state: Any) -> Iterator[Tensor]:
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]
