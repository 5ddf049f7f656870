import subprocess
import sys

import pytest

from fishmask.claim import claimed, digest_of, digest_of_model
from fishmask.errors import FishError

HOLD = """
import sys
from pathlib import Path
from fishmask.claim import claimed
with claimed(Path(sys.argv[1]), {}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_and_free_again_when_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FishError, match="written by another process"), claimed(tmp_path / "runs", {"a": "1"}):
            pass
        assert "a" not in (tmp_path / "runs" / "inputs.json").read_text()
        other.kill()
        other.wait()
    with claimed(tmp_path / "runs", {"a": "1"}):
        pass


def test_other_inputs_of_the_same_name_are_refused_and_new_ones_added(tmp_path):
    with claimed(tmp_path, {"model a": "1", "data of RTE": "2"}):
        pass
    before = (tmp_path / "inputs.json").read_bytes()
    with (
        pytest.raises(FishError, match="runs with another data of RTE, another model a; name another folder"),
        claimed(tmp_path, {"model a": "3", "data of RTE": "4", "data of CoLA": "5"}),
    ):
        pass
    assert (tmp_path / "inputs.json").read_bytes() == before
    for _ in range(2):
        with claimed(tmp_path, {"model a": "1", "data of CoLA": "5"}):
            pass
    with pytest.raises(FishError, match="another data of CoLA"), claimed(tmp_path, {"data of CoLA": "6"}):
        pass


def test_a_model_is_known_by_its_weights_and_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = digest_of_model(str(tmp_path))
    (tmp_path / "README.md").write_text("about")
    assert digest_of_model(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert digest_of_model(str(tmp_path)) != first
    assert digest_of_model("org/name") == "org/name"
    assert digest_of([["a"], 1]) == digest_of([["a"], 1]) != digest_of([["a"], 2])
