"""A pointer finds its commit under whatever number it has now, and no other."""

from pathlib import Path

import pytest
from torch import nn

from fishmask import CheckpointLog, FishError, Mask, Tuning, attach
from fishmask.pointer import Pointer


@pytest.fixture
def tuning() -> Tuning:
    model = nn.Linear(3, 2)
    return attach(model, Mask.random(model, 0.5, seed=0))


def test_a_pointer_follows_its_commit_and_is_not_led_to_another(tuning: Tuning, tmp_path: Path) -> None:
    with CheckpointLog(tmp_path / "log") as log:
        first, second = (log.commit(tuning, step=1) for _ in range(2))  # as a rule within one second
        kept = Pointer.to(first, log)
        gone = Pointer.to(second, log)._replace(time=kept.time)
        assert kept.find(log) == 1
        log.delete(2)
        assert gone.find(log) is None
        with pytest.raises(FishError, match=r"names commit 2 of .*log has no such commit"):
            gone.found(log, tmp_path / "file")
        log.compact()
        assert log.numbers == [3]
        assert kept.find(log) == 3


def test_a_file_is_read_as_it_was_written(tuning: Tuning, tmp_path: Path) -> None:
    with CheckpointLog(tmp_path / "log") as log:
        written = Pointer.to(log.commit(tuning, step=7), log)
    path = tmp_path / "file"
    assert Pointer.read(path) is None
    written.write(path)
    found = Pointer.read(path)
    assert found == written and written.same(found) and found.find(log) == 1
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FishError, match="damaged"):
        Pointer.read(path)
    path.write_bytes(b"another")
    assert Pointer.read(path) is None
