"""The files of a log: damage of every kind, what is kept and what is cleared away, sizes, export."""

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fishmask
from fishmask import CheckpointLog, FishError, Mask, history
from tests import cases
from tests.test_log import (
    A,
    B,
    C,
    Net,
    Training,
    aside,
    change,
    check_same_history,
    content,
    differences,
    names,
    sorted_by_name,
)
from tests.test_tree import same, words

READERS: dict[str, Callable[[Path, int], Any]] = {
    "base": history.read_base,
    "segment": history.read_segment,
    "commit": history.read_commit,
}
FILES = ["base-00000001", "segment-00000001", "segment-00000002", "commit-00000001", "commit-00000002"]


def small() -> Net:
    return Net()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """A log of three commits in two segments, and the model at each of them."""
    folder = tmp_path_factory.mktemp("log")
    return folder, write(folder, 0)


def write(folder: Path, seed: int) -> dict[int, Any]:
    states = {}
    training = Training(A, seed=seed)
    with CheckpointLog(folder) as log:
        for number in (1, 2, 3):
            if number == 2:
                change(training, B)
            training.run(2).commit(log, number, position=number)
            states[number] = sorted_by_name(copy.deepcopy(training.model.state_dict()))
    return states


@pytest.fixture
def log(made: tuple[Path, dict[int, Any]], tmp_path: Path) -> tuple[Path, dict[int, Any]]:
    """A copy of it to be damaged."""
    shutil.copytree(made[0], tmp_path / "log")
    return tmp_path / "log", made[1]


def path_in(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def read(path: Path) -> None:
    kind, number = path.stem.split("-")
    READERS[kind](path.parent, int(number))


def survey(folder: Path, states: dict[int, Any]) -> tuple[list[int], dict[int, str]]:
    """Restore every commit: which came back as they were, and why the others did not. None comes back otherwise."""
    intact, refused = [], {}
    for number in CheckpointLog(folder).numbers:
        model = aside(Net)
        before = copy.deepcopy(model.state_dict())
        try:
            CheckpointLog(folder).restore(model, at=number)
        except FishError as error:
            refused[number] = str(error)
            assert same(dict(model.state_dict()), dict(before))
        else:
            intact.append(number)
            assert not differences(sorted_by_name(model.state_dict()), states[number])
    return intact, refused


def needing(name: str) -> list[int]:
    """The commits that need a file."""
    return {"base-00000001": [1, 2, 3], "segment-00000001": [1, 2, 3], "segment-00000002": [2, 3]}.get(
        name, [int(name[-1])]
    )


def check_found(folder: Path, states: dict[int, Any], name: str, wanted: str = "") -> None:
    """A bad file is found by every restore that needs it and by ``verify``, and named; the others come back."""
    intact, refused = survey(folder, states)
    present = CheckpointLog(folder).numbers
    bad = [number for number in needing(name) if number in present]
    assert list(refused) == bad
    assert intact == [number for number in present if number not in bad]
    assert all(f"{name}.safetensors" in text and wanted in text for text in refused.values())
    problems = CheckpointLog(folder).verify()
    assert any(f"{name}.safetensors" in problem.reason for problem in problems)
    assert {path_in(folder, f"commit-{number:08d}") for number in bad} <= {problem.path for problem in problems}


# --- damage -----------------------------------------------------------------------------------------------------------


def test_an_intact_log_is_sound(made: tuple[Path, dict[int, Any]]) -> None:
    folder, states = made
    assert survey(folder, states) == ([1, 2, 3], {})
    assert CheckpointLog(folder).verify() == []
    for name in FILES:
        read(path_in(folder, name))
    assert differences(states[1], states[2])
    assert differences(states[2], states[3])


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(log: tuple[Path, dict[int, Any]], name: str) -> None:
    folder, states = log
    path = path_in(folder, name)
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as handle:
        for place, byte in enumerate(data):
            handle.seek(place)
            handle.write(bytes([byte ^ (1 << place % 8)]))
            with pytest.raises(FishError) as caught:
                read(path)
            assert str(path) in str(caught.value)
            if place % 499 == 0:
                check_found(folder, states, name)
            handle.seek(place)
            handle.write(bytes([byte]))
    assert survey(folder, states) == ([1, 2, 3], {})


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_found(log: tuple[Path, dict[int, Any]], name: str) -> None:
    folder, states = log
    path = path_in(folder, name)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(FishError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        if length % 997 == 0:
            check_found(folder, states, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tail", [b"\0", b" ", b"twice"])
def test_appended_bytes_are_found(log: tuple[Path, dict[int, Any]], name: str, tail: bytes) -> None:
    folder, states = log
    path = path_in(folder, name)
    data = path.read_bytes()
    path.write_bytes(data + (data if tail == b"twice" else tail))
    check_found(folder, states, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(log: tuple[Path, dict[int, Any]], name: str) -> None:
    folder, states = log
    path_in(folder, name).unlink()
    if name.startswith("commit"):
        assert survey(folder, states)[1] == {}
        assert CheckpointLog(folder).verify() == []
        assert name[-1] not in map(str, CheckpointLog(folder).numbers)
    else:
        check_found(folder, states, name, "missing")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_log_is_found(log: tuple[Path, dict[int, Any]], name: str, tmp_path: Path) -> None:
    folder, states = log
    write(tmp_path / "other", 1)  # the same masks and numbers, another training
    shutil.copy(path_in(tmp_path / "other", name), path_in(folder, name))
    problems = CheckpointLog(folder).verify()
    intact, refused = survey(folder, states)
    assert list(refused) == needing(name)
    assert path_in(folder, f"commit-{needing(name)[0]:08d}") in {problem.path for problem in problems}
    assert intact == [number for number in (1, 2, 3) if number not in needing(name)]


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize("target", FILES)
def test_a_file_under_another_name_is_found(log: tuple[Path, dict[int, Any]], source: str, target: str) -> None:
    folder, states = log
    path_in(folder, target).write_bytes(path_in(folder, source).read_bytes())
    if source == target:
        assert survey(folder, states) == ([1, 2, 3], {})
    else:
        check_found(folder, states, target)


def test_a_commit_under_a_free_number_is_found(log: tuple[Path, dict[int, Any]]) -> None:
    folder, states = log
    shutil.copy(path_in(folder, "commit-00000001"), path_in(folder, "commit-00000009"))
    assert survey(folder, states)[0] == [1, 2, 3]
    with pytest.raises(FishError, match=r"commit-00000009.safetensors is another file under this name: .* is 1"):
        CheckpointLog(folder).restore(Net())
    assert [problem.path.name for problem in CheckpointLog(folder).verify()] == ["commit-00000009.safetensors"]


def test_other_files_in_the_folder_do_not_matter(log: tuple[Path, dict[int, Any]]) -> None:
    folder, states = log
    for name in ("commit-1.safetensors", "commit-00000009.safetensors.bak", "notes.txt", "Commit-00000009.safetensors"):
        (folder / name).write_text("x")
    (folder / "more").mkdir()
    assert survey(folder, states) == ([1, 2, 3], {})
    assert CheckpointLog(folder).verify() == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_well_signed_file_full_of_nonsense_is_refused_or_read(
    data: st.DataObject, made: tuple[Path, dict[int, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "nonsense"
    folder.mkdir(exist_ok=True)
    path = path_in(folder, data.draw(st.sampled_from(FILES)))
    broken = bytearray((made[0] / path.name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(99, len(broken) - 1))] = data.draw(st.integers(0, 255))
    digest = hashlib.sha256(broken[:35] + b"0" * 64 + broken[99:]).hexdigest()
    path.write_bytes(broken[:35] + digest.encode() + broken[99:])
    try:
        read(path)
    except FishError as error:
        assert str(path) in str(error)


# --- falling back -----------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_strict_restore_says_what_to_do(log: tuple[Path, dict[int, Any]]) -> None:
    folder, _ = log
    damage(path_in(folder, "commit-00000003"))
    for call in (CheckpointLog(folder).restore, lambda model: CheckpointLog(folder).mask()):
        with pytest.raises(FishError) as caught:
            call(Net())
        for text in (str(path_in(folder, "commit-00000003")), "is damaged", "at=2", "allow_older=True"):
            assert text in str(caught.value)
    with pytest.raises(FishError, match=r"commit-00000003.safetensors is damaged"):
        CheckpointLog(folder).restore(Net(), at=3, allow_older=True)


@pytest.mark.parametrize(
    ("damaged", "used"),
    [(["commit-00000003"], 2), (["commit-00000003", "commit-00000002"], 1), (["segment-00000002"], 1), ([], 3)],
    ids=str,
)
def test_an_older_commit_on_request(log: tuple[Path, dict[int, Any]], damaged: list[str], used: int) -> None:
    folder, states = log
    for name in damaged:
        damage(path_in(folder, name))
    training = Training(C, seed=9)
    with CheckpointLog(folder) as again:
        found = training.restore(again, allow_older=True)
        assert found.commit.number == found.step == found.state["position"] == used
        assert [problem.path.name for problem in found.skipped] == [
            f"commit-{number:08d}.safetensors" for number in range(3, used, -1)
        ]
        for problem in found.skipped:
            assert any(name in problem.reason for name in damaged)
        assert not differences(sorted_by_name(training.model.state_dict()), states[used])
        assert training.run(1).commit(again).number == 4  # no number is used twice
        end = training.state()
    other = Training(A, seed=8)
    assert other.restore(CheckpointLog(folder)).commit.number == 4
    assert not differences(other.state(), end)


def test_nothing_to_fall_back_to(log: tuple[Path, dict[int, Any]]) -> None:
    folder, _ = log
    damage(path_in(folder, "segment-00000001"))
    with pytest.raises(FishError, match="segment-00000001"):
        CheckpointLog(folder).restore(Net(), allow_older=True)


# --- raw bits through a commit ----------------------------------------------------------------------------------------


class Few(nn.Module):
    """Few parameters of every kind, in two dtypes or three; buffers of others."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(5, dtype=dtype))
        self.turned = nn.Parameter(torch.zeros(3, 2).T)
        self.strided = nn.Parameter(torch.zeros(4, 2, dtype=dtype)[:, 1])
        self.scalar = nn.Parameter(torch.zeros((), dtype=dtype))
        self.none = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
        self.other = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.tied = self.turned
        for kind in (torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float8_e4m3fn):
            self.register_buffer(f"b_{kind}".replace(".", "_"), torch.zeros(3, dtype=kind)[1:])


FEW = Mask.from_indices({"flat": [0, 2, 4], "turned": [0, 1, 5], "strided": [3], "scalar": [0]})
ELSE = Mask.from_indices({"flat": [0, 1], "turned": [2, 3], "strided": [0, 1, 2]})


def pour(tensors: Iterable[Tensor], draw: Callable[[Any], Any]) -> None:
    """Fill tensors with raw bits."""
    with torch.no_grad():
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            raw = b"".join(draw(words).to_bytes(8, "little") for _ in range(-(-size // 8)))[:size]
            if tensor.dtype == torch.bool:
                raw = bytes(byte & 1 for byte in raw)
            if size:
                tensor.copy_(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_bit_goes_through_a_commit(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("raw")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    model = Few(dtype)
    pour([*model.parameters(), *model.buffers()], data.draw)
    base = state_of(model)
    tuning = fishmask.attach(model, FEW)
    optimizer = torch.optim.Adam(tuning.parameters())
    states = []
    with CheckpointLog(folder, store_base=data.draw(st.booleans())) as log:
        for mask in (FEW, ELSE, FEW):
            if tuning.mask != mask:
                tuning.set_mask(mask, optimizer)
            with torch.no_grad():
                numbers = torch.tensor([data.draw(words) & 0xFFFFFFFF for _ in range(mask.k)], dtype=torch.uint32)
                tuning.values.copy_(numbers.view(torch.float32))
                tuning.write_back()
                for p in tuning.parameters():
                    optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": p.clone(), "exp_avg_sq": -p.clone()}
            pour(model.buffers(), data.draw)
            log.commit(tuning, optimizer)
            states.append((state_of(model), tuning.values.clone()))
    assert log.verify() == []
    for number, (state, values) in enumerate(states, 1):
        plain, trained = Few(dtype), Few(dtype)
        for other in (plain, trained):
            other.load_state_dict(base)
        CheckpointLog(folder).restore(plain, at=number)
        assert same(state_of(plain), state)
        again = fishmask.attach(trained, data.draw(st.sampled_from([FEW, ELSE])))
        its = torch.optim.Adam(again.parameters())
        CheckpointLog(folder).restore(trained, its, at=number)
        assert same(state_of(trained), state)
        assert same(again.values, values)
        for p in again.parameters():
            assert same(its.state[p]["exp_avg"], p.detach())
            assert same(its.state[p]["exp_avg_sq"], -p.detach())
        again.revert()
        assert same(state_of(trained), base)
    shutil.rmtree(folder)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, range(1, 11)),
        ({"keep_last": 1}, [10]),
        ({"keep_last": 3}, [8, 9, 10]),
        ({"keep_last": 20}, range(1, 11)),
        ({"keep_every": 4}, [4, 8, 10]),
        ({"keep_every": 5}, [5, 10]),
        ({"keep_last": 2, "keep_every": 3}, [3, 6, 9, 10]),
        ({"keep_every": 1}, range(1, 11)),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["commit", "commit_async"])
def test_retention(options: dict[str, int], kept: Any, how: str, tmp_path: Path) -> None:
    training, states = Training(A), {}
    with CheckpointLog(tmp_path, **options) as log:
        for number in range(1, 11):
            if number in (4, 8):
                change(training, (B, C)[number == 8])
            training.run(1)
            states[number] = sorted_by_name(copy.deepcopy(training.model.state_dict()))
            getattr(log, how)(training.tuning, training.optimizer, step=number)
        log.wait()
        assert [commit.step for commit in log.commits] == list(kept)
    assert survey(tmp_path, states) == (list(kept), {})
    assert log.verify() == []


def test_retention_after_going_back_keeps_the_newest(tmp_path: Path) -> None:
    training = Training(A)
    with CheckpointLog(tmp_path, keep_last=2) as log:
        for step in (1, 2):
            training.run(1).commit(log, step)
        training.restore(log, at=1)
        change(training, B)
        training.run(1).commit(log, 3)
        assert log.numbers == [2, 3]
        training.run(1).commit(log, 4)
        end = training.state()
    again = Training(C, seed=4)
    again.restore(CheckpointLog(tmp_path))
    assert not differences(again.state(), end)


def test_commits_are_listed_as_they_were_made(tmp_path: Path) -> None:
    assert CheckpointLog(tmp_path / "none").commits == []
    training, made = Training(A), []
    with CheckpointLog(tmp_path) as log:
        made += [training.commit(log, 10), log.commit_async(training.tuning, step=20).result()]
        change(training, B)
        made.append(training.commit(log, 30))
        assert log.commits == made
        assert repr(log) == f"CheckpointLog({str(tmp_path)!r}, 3 commits)"
    assert CheckpointLog(tmp_path).commits == made
    assert [(c.number, c.step, c.segment, c.mask) for c in made] == [
        (1, 10, 1, A.digest), (2, 20, 1, A.digest), (3, 30, 2, B.digest),
    ]  # fmt: skip
    for commit in made:
        assert commit.path == path_in(tmp_path, f"commit-{commit.number:08d}")
        assert commit.bytes == len(commit.path.read_bytes())
        assert commit.seconds > 0
        assert abs(time.time() - time.mktime(time.strptime(commit.time[:19], "%Y-%m-%dT%H:%M:%S"))) < 2 * 24 * 3600
        assert commit.time.endswith("+00:00")
    assert [CheckpointLog(tmp_path).mask(at) for at in (1, 2, 3, None)] == [A, A, B, B]
    assert CheckpointLog(tmp_path).mask().shapes == training.tuning.mask.shapes


# --- the janitor ------------------------------------------------------------------------------------------------------


def test_what_a_crash_left_goes_with_the_next_writer(log: tuple[Path, dict[int, Any]]) -> None:
    folder, states = log
    before = names(folder)
    for name in (".commit-00000004.safetensors.0123456789abcdef.tmp", ".base-00000002.safetensors.00.tmp"):
        (folder / name).write_bytes(b"half")
    training = Training(C)
    with CheckpointLog(folder) as other:  # a mask change whose commit never came
        training.restore(other)
        change(training, C)
        other._prepare(training.tuning, None, 0, None)
    shutil.copy(path_in(folder, "base-00000001"), path_in(folder, "base-00000002"))  # a halted compact
    reader = CheckpointLog(folder)
    reader.verify(), reader.commits, reader.mask(), reader.restore(Net()), reader.export(folder.parent / "out")
    assert "segment-00000003.safetensors" in names(folder)
    assert "base-00000002.safetensors" in names(folder)
    (folder / ".commit-00000004.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    again = Training(C)
    with CheckpointLog(folder) as writer:
        again.restore(writer)
        again.commit(writer)
    assert names(folder) == sorted([*before, "commit-00000004.safetensors"])
    assert survey(folder, {**states, 4: states[3]}) == ([1, 2, 3, 4], {})


def test_the_janitor_leaves_what_others_keep_in_the_folder(log: tuple[Path, dict[int, Any]]) -> None:
    folder, _ = log
    (folder / ".notes.tmp").write_bytes(b"mine")
    (folder / ".checkpoint-3.tmp").mkdir()
    (folder / ".commit-00000009.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    training = Training(C)
    with CheckpointLog(folder) as writer:
        training.restore(writer)
        training.commit(writer)
    assert [name for name in names(folder) if name.endswith(".tmp")] == [".checkpoint-3.tmp", ".notes.tmp"]


def test_a_training_goes_on_after_its_newest_commit_was_deleted(tmp_path: Path) -> None:
    training, log = Training(A), CheckpointLog(tmp_path)
    for step in (1, 2, 3):
        training.commit(log, step)
    log.close()
    log.delete(3)
    with log:
        assert training.commit(log, 4).step == 4
    assert [commit.step for commit in log.commits] == [1, 2, 4]
    assert log.verify() == []
    log.delete(log.numbers[-1])
    with CheckpointLog(tmp_path) as other:  # another one went on, and its commits have these numbers now
        again = Training(A)
        again.restore(other)
        again.commit(other, 5), again.commit(other, 6)
    with pytest.raises(FishError, match="restore one first"):
        training.commit(log, 7)
    log.close()


def test_another_segment_under_the_same_number_is_not_built_upon(tmp_path: Path) -> None:
    training, log = Training(A), CheckpointLog(tmp_path)
    training.commit(log, 1)
    change(training, B)
    training.commit(log, 2)
    log.close()
    other, again = CheckpointLog(tmp_path), Training(A)
    other.delete(2)
    with other:  # the janitor takes the segment of B, and that of C has its number then
        again.restore(other)
        change(again, C)
        again.commit(other, 2)
    assert log.numbers == [1, 2]
    with pytest.raises(FishError, match="restore one first"):
        training.commit(log, 3)
    log.close()
    assert log.verify() == []


@pytest.mark.parametrize("name", ["segment-00000001", "segment-00000002", "base-00000001", "commit-00000001"])
@pytest.mark.parametrize("how", ["missing", "damaged", "not a file of ours", "of another log"])
def test_the_janitor_takes_nothing_that_could_be_needed(
    log: tuple[Path, dict[int, Any]], name: str, how: str, tmp_path: Path
) -> None:
    folder, states = log
    path = path_in(folder, name)
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        damage(path)
    elif how == "of another log":
        write(tmp_path / "other", 1)
        shutil.copy(path_in(tmp_path / "other", name), path)
    else:
        path.write_bytes(b"nothing" * 50)
    before = names(folder)
    with CheckpointLog(folder) as writer, pytest.raises(FishError):
        writer._claim()
        writer.restore(Net(), at=1)  # what needs it is refused
        raise FishError("commit 1 is missing, and nothing else")
    assert names(folder) == before
    path.write_bytes(data)  # it is found again
    assert survey(folder, states) == ([1, 2, 3], {})


def test_the_janitor_waits_for_a_segment_that_is_missing(log: tuple[Path, dict[int, Any]]) -> None:
    folder, states = log
    path_in(folder, "commit-00000001").unlink()  # so that only the missing segment tells what it builds on
    data = path_in(folder, "segment-00000002").read_bytes()
    path_in(folder, "segment-00000002").unlink()
    before = names(folder)
    with CheckpointLog(folder) as writer, pytest.raises(FishError, match=r"segment-00000002.safetensors is missing"):
        writer.reinstate(2)
    assert names(folder) == before
    path_in(folder, "segment-00000002").write_bytes(data)
    assert survey(folder, states) == ([2, 3], {})


def test_branches_keep_their_segments(tmp_path: Path) -> None:
    training, states = Training(A), {}
    for start, masks in ((None, (A, B)), (1, (C, B)), (2, (A | B,)), (3, (B,))):
        with CheckpointLog(tmp_path) as log:  # opened anew each time
            if start:
                training.restore(log, at=start)
            for mask in masks:
                change(training, mask)
                number = training.run(1).commit(log).number
                states[number] = sorted_by_name(copy.deepcopy(training.model.state_dict()))
    assert survey(tmp_path, states) == (list(states), {})
    assert len(names(tmp_path, "segment")) == len(states)
    path_in(tmp_path, f"commit-{max(states):08d}").unlink()
    with CheckpointLog(tmp_path) as log:
        training.restore(log)
        training.commit(log)
    assert len(names(tmp_path, "segment")) == len(states) - 1


# --- compact ----------------------------------------------------------------------------------------------------------


def test_compact_folds_everything_into_a_new_base(log: tuple[Path, dict[int, Any]]) -> None:
    folder, states = log
    through = Training(C, seed=5)
    through.restore(CheckpointLog(folder))
    with CheckpointLog(folder) as writer:
        commit = writer.compact()
        assert (commit.number, commit.step) == (4, 3)
        assert writer.commits == [commit]
    assert names(folder) == ["base-00000002.safetensors", "commit-00000004.safetensors", "segment-00000003.safetensors"]
    assert survey(folder, {4: states[3]}) == ([4], {})
    assert CheckpointLog(folder).verify() == []
    again = Training(C, seed=6)
    assert again.restore(CheckpointLog(folder)).state == {"position": 3}
    assert not differences(again.state(), through.state())
    assert differences(again.run(2).state(), through.state())
    again.tuning.revert()
    weights = [name for name, _ in Net().named_parameters()]
    assert same({n: again.model.state_dict()[n] for n in weights}, {n: states[3][n] for n in weights})


def test_compact_twice_and_on(tmp_path: Path) -> None:
    training = Training(A)
    with CheckpointLog(tmp_path) as log:
        for mask in (A, B, C, A, B):
            change(training, mask)
            training.run(1).commit(log)
            end = training.state()
            log.compact()
            again = Training(C, seed=5)
            again.restore(CheckpointLog(tmp_path))
            assert not differences(again.state(), end)
            assert len(names(tmp_path)) == 3
    assert log.verify() == []


@pytest.mark.parametrize("later", [A, B, C, A | C], ids=["same", "the other", "a third", "two"])
@pytest.mark.parametrize("trained", [0, 1])
def test_a_live_training_goes_on_across_compact(later: Mask, trained: int, tmp_path: Path) -> None:
    training, apart = Training(A), CheckpointLog(tmp_path / "apart")
    with CheckpointLog(tmp_path / "log") as log, apart:
        training.run(1).commit(log)
        change(training, B)
        training.run(1).commit(log)
        training.run(trained)
        log.compact()
        states = {}
        for mask in (training.tuning.mask, later, A):
            if mask is not training.tuning.mask:
                change(training, mask)
            number = training.run(1).commit(log).number
            states[number] = training.state()
        assert len(names(log.path, "base")) == 1
        for number, state in states.items():
            again = Training(C, seed=5)
            again.restore(CheckpointLog(log.path), at=number)
            assert not differences(again.state(), state)
        for number in (*states, *reversed(states)):  # and back and forth in the same process
            training.restore(log, at=number)
            assert not differences(training.state(), states[number])
        change(training, C)
        training.run(1).commit(log)
        again.restore(CheckpointLog(log.path))
        check_same_history(again, training)
    assert log.verify() == []


def test_compact_after_going_back_does_not_mix_histories(tmp_path: Path) -> None:
    training = Training(A)
    with CheckpointLog(tmp_path) as log:
        training.run(1).commit(log)
        change(training, B)
        training.run(1).commit(log)
        newest = training.state()
        training.restore(log, at=1)
        log.compact()  # the newest, which is not where the training stands
        before = content(tmp_path)
        with pytest.raises(FishError, match="restore one first"):
            training.commit(log)
        assert content(tmp_path) == before
        training.restore(log)
        assert not differences(training.state(), newest)
        training.run(1).commit(log)
        again = Training(C, seed=5)
        again.restore(CheckpointLog(tmp_path))
        check_same_history(again, training)


def test_entries_that_go_back_to_the_base_of_old_after_compact(tmp_path: Path) -> None:
    training = Training(A)
    began = training.tuning.values.clone()
    with CheckpointLog(tmp_path) as log:
        training.run(1).commit(log)
        log.compact()  # the base of the log now has other bits there than the training remembers
        with torch.no_grad():
            training.tuning.values.copy_(began)
        change(training, B)
        training.commit(log)
        end = training.state()
    again = Training(C, seed=5)
    again.restore(CheckpointLog(tmp_path))
    assert not differences(again.state(), end)


@pytest.mark.parametrize("what", ["commit-00000003", "segment-00000001", "base-00000001"])
def test_compact_refuses_what_is_damaged(log: tuple[Path, dict[int, Any]], what: str) -> None:
    folder, _ = log
    damage(path_in(folder, what))
    before = names(folder)
    with CheckpointLog(folder) as writer, pytest.raises(FishError, match=what):
        writer.compact()
    assert names(folder) == before


def test_compact_needs_the_base(tmp_path: Path) -> None:
    with CheckpointLog(tmp_path, store_base=False) as log:
        Training(A).commit(log)
        before = names(tmp_path)
        with pytest.raises(FishError, match="does not store its base"):
            log.compact()
        assert names(tmp_path) == before
    for call in (CheckpointLog.compact, lambda log: log.reinstate(1), CheckpointLog.export):
        with (
            CheckpointLog(tmp_path / "none") as log,
            pytest.raises(FishError, match="holds no commits: there is no such"),
        ):
            call(*(log, tmp_path / "out")[: 1 + (call is CheckpointLog.export)])
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "out").exists()


def test_compact_of_narrow_weights(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return Net().bfloat16()

    training = Training(A, model=model)
    with CheckpointLog(tmp_path) as log:
        training.run(2).commit(log)
        end = training.state()
        log.compact()
        again = Training(A, model=model, seed=4)
        again.restore(CheckpointLog(tmp_path))
        assert not differences(again.state(), end)
        change(training, B)
        training.run(1).commit(log)
        end = training.state()
        again.restore(CheckpointLog(tmp_path))
        assert not differences(again.state(), end)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("store_base", [True, False])
@pytest.mark.parametrize("name", ["bert", "bert-masked-lm", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("quiet")
def test_an_export_loads_as_any_model_does(name: str, dtype: torch.dtype, store_base: bool, tmp_path: Path) -> None:
    case = cases.case(name)
    model = case.make().to(dtype)
    tuning = fishmask.attach(model, Mask.random(model, 0.1, seed=1))
    with CheckpointLog(tmp_path / "log", store_base=store_base) as log:
        for seed in (1, 2):
            tuning.set_mask(Mask.random(model, 0.1, seed=seed))
            with torch.no_grad():
                tuning.values.add_(torch.randn(tuning.mask.k))
            log.commit(tuning)
    tuning.write_back()
    base = None if store_base else case.make().to(dtype)
    before = None if base is None else copy.deepcopy(base.state_dict())
    path = CheckpointLog(tmp_path / "log").export(tmp_path / "out", model=base)
    if base is not None:
        assert same(dict(base.state_dict()), dict(before))
    exported = safetensors.torch.load_file(path)
    state = dict(model.state_dict())
    tied = {name for name, p in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    assert same(sorted_by_name(exported), sorted_by_name({n: t for n, t in state.items() if n not in tied}))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert same(dict(loaded.state_dict()), state)


def test_an_export_of_any_commit_is_the_state_dict_bit_for_bit(
    made: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    folder, states = made
    before = content(folder)
    for at, state in ((1, states[1]), (2, states[2]), (None, states[3])):
        exported = safetensors.torch.load_file(CheckpointLog(folder).export(tmp_path / "deep" / "er", at=at))
        assert not differences(sorted_by_name(exported), {n: t for n, t in state.items() if n != "again.weight"})
        model = Net()
        safetensors.torch.load_model(model, tmp_path / "deep" / "er" / "model.safetensors")
        assert not differences(sorted_by_name(model.state_dict()), state)
    assert names(tmp_path / "deep" / "er") == ["model.safetensors"]
    assert content(folder) == before


def test_an_export_without_a_stored_base_needs_the_model(tmp_path: Path) -> None:
    training = Training(A)
    with CheckpointLog(tmp_path / "log", store_base=False) as log:
        training.run(1).commit(log)
        with pytest.raises(FishError, match="does not store its base: pass the base model"):
            log.export(tmp_path / "out")
        torch.manual_seed(1)
        with pytest.raises(FishError, match="other weights"):
            log.export(tmp_path / "out", model=Net())
        with pytest.raises(FishError, match="other weights"):
            log.export(tmp_path / "out", model=training.model)
    assert not (tmp_path / "out").exists()


# --- sizes ------------------------------------------------------------------------------------------------------------


def bert(hidden: int, layers: int) -> nn.Module:
    settings = {**cases.BERT, "hidden_size": hidden, "num_hidden_layers": layers, "num_labels": 2}
    return cases.hf("BertForSequenceClassification", "BertConfig", **settings)().train()


@pytest.mark.parametrize(("hidden", "layers", "tensors"), [(128, 2, 41), (16, 24, 393)], ids=["tiny", "deep"])
@pytest.mark.parametrize("changed", [False, True], ids=["one mask", "mask changed"])
def test_a_commit_is_as_small_as_its_numbers(
    hidden: int, layers: int, tensors: int, changed: bool, tmp_path: Path
) -> None:
    model = bert(hidden, layers)
    assert len(list(model.parameters())) == tensors
    tuning = fishmask.attach(model, Mask.random(model, 0.05, seed=1))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    batch = cases.tokens("class")

    def step(seed: int) -> None:
        model(**{**batch(4, seed), "labels": torch.randint(2, (4,))}).loss.backward()
        optimizer.step(), optimizer.zero_grad(), scheduler.step()

    with CheckpointLog(tmp_path) as log:
        for seed in range(3):
            step(seed)
            if changed and seed == 1:
                tuning.set_mask(Mask.random(model, 0.05, seed=2), optimizer)
            log.commit(tuning, optimizer, step=seed, state={"scheduler": scheduler, "position": seed})
    moments = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert len(optimizer.state) > tensors * 0.7
    for commit in log.commits:
        assert commit.bytes <= 4 * tuning.mask.k + moments + 4096


# --- others at work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["restore", "mask", "export", "allow_older"])
def test_a_reader_finds_the_newer_commit_when_the_one_it_saw_is_gone(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, model = Training(A), aside(Net)
    writer, reader = CheckpointLog(tmp_path / "log", keep_last=1), CheckpointLog(tmp_path / "log")
    training.run(1).commit(writer)
    real, turns = history.read_all, iter([True, True, False])

    def slow(folder: Path, number: int) -> Any:
        if next(turns):  # a commit comes between listing and reading, twice
            training.run(1).commit(writer)
        return real(folder, number)

    monkeypatch.setattr(history, "read_all", slow)
    calls: dict[str, Callable[[], Any]] = {
        "restore": lambda: reader.restore(model).commit.number,
        "allow_older": lambda: len(reader.restore(model, allow_older=True).skipped) + 3,
        "mask": reader.mask,
        "export": lambda: reader.export(tmp_path / "out").name,
    }
    assert calls[call]() in (3, A, "model.safetensors")
    assert writer.numbers == [3]
    if call in ("restore", "allow_older"):
        assert not differences(sorted_by_name(model.state_dict()), training.state()["model"])
    writer.close()


def test_listing_and_verifying_while_commits_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, log = Training(A), CheckpointLog(tmp_path)
    made = [training.commit(log, step) for step in range(4)]
    log.close()
    for number in (1, 2):
        gone = path_in(tmp_path, f"commit-{number:08d}")
        real = history.numbered

        def before(folder: Path, kind: str, gone: Path = gone, real: Any = real) -> dict[int, Path]:
            listed = real(folder, kind)
            if kind == "commit":
                gone.unlink(missing_ok=True)
            return listed

        monkeypatch.setattr(history, "numbered", before)
        if number == 1:
            assert log.commits == made[1:]
        else:
            assert log.verify() == []


class Late(nn.Module):
    """Has a buffer more, or another one, in the middle of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("first", torch.zeros(2))


@pytest.mark.parametrize("shape", ["first", "second"])
def test_buffers_that_a_model_lacks_are_named_before_anything_changes(shape: str, tmp_path: Path) -> None:
    model, mask = Late(), Mask.from_indices({"layer.weight": [0, 4]})
    tuning = fishmask.attach(model, mask)
    with CheckpointLog(tmp_path) as log:
        log.commit(tuning)
        model.register_buffer(shape, torch.ones(4))
        log.commit(tuning)
        other, plain = Late(), Late()
        found = fishmask.attach(other, mask)
        for target in (plain, other, found):
            before = state_of(plain if target is plain else other)
            with pytest.raises(
                FishError, match=rf"buffer {shape}: .*float32 \[4\] in the (commit|log), .* in the model"
            ):
                log.restore(target)
            assert same(state_of(plain if target is plain else other), before)
