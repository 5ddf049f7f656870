"""``fishmask rounds``: its sums against numbers worked out by hand, and logs that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fishmask.cli import app

START = {"workers": 4, "entries": 100, "union": 100, "of": 5000, "dense_bytes": 20000, "every": 10, "masks": "shared"}


def round_line(number: int, **other: Any) -> dict[str, Any]:
    line = {
        "number": number, "step": 10 * number, "steps": 10, "participants": 4, "payload_bytes": 600, "other_bytes": 400,
        "wait_seconds": 0.25, "wire_seconds": 0.5, "digest": f"{number:064x}",
    }  # fmt: skip
    return line | other


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def summary(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["rounds", str(path), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_the_sums_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    lines = [round_line(1), round_line(2, participants=3), round_line(3, step=24, steps=4, payload_bytes=200)]
    facts = summary(write(tmp_path / "log", {"rounds": START}, *lines))
    assert facts == {
        "workers": 4,
        "entries": 100,
        "of": 5000,
        "every": 10,
        "masks": "shared",
        "rounds": 3,
        "steps": 24,
        "fewest_participants": 3,
        "payload_bytes": 1400,
        "other_bytes": 1200,
        # A ring sends 2 · 3/4 · 20,000 = 30,000 bytes: 24 times for every step, 3 times for every round.
        "ddp_bytes": 720000,
        "dense_local_sgd_bytes": 90000,
        "less_than_ddp": 276.9,
        "less_than_dense_local_sgd": 34.6,
        "wire_seconds": 1.5,
        "wait_seconds": 0.75,
        "digest": f"{3:064x}",
    }


def test_a_round_done_again_by_other_workers_counts_by_their_number(tmp_path: Path) -> None:
    again = {"rounds": {**START, "workers": 2}}
    facts = summary(
        write(tmp_path / "log", {"rounds": START}, round_line(1), round_line(2), again, round_line(2, step=20))
    )
    assert (facts["rounds"], facts["workers"], facts["steps"]) == (2, 2, 20)
    assert facts["payload_bytes"] == 1800
    # 2 · 3/4 · 20,000 twice, then 2 · 1/2 · 20,000.
    assert (facts["ddp_bytes"], facts["dense_local_sgd_bytes"]) == (800000, 80000)


def test_a_worker_alone_sends_nothing(tmp_path: Path) -> None:
    alone = round_line(1, payload_bytes=0, other_bytes=0, participants=1)
    facts = summary(write(tmp_path / "log", {"rounds": {**START, "workers": 1}}, alone))
    assert (facts["ddp_bytes"], facts["less_than_ddp"], facts["less_than_dense_local_sgd"]) == (0, None, None)


def test_a_training_that_has_just_begun_has_no_round(tmp_path: Path) -> None:
    facts = summary(write(tmp_path / "log", {"rounds": START}))
    assert (facts["rounds"], facts["steps"], facts["digest"], facts["less_than_ddp"]) == (0, 0, None, None)


def test_the_table_says_the_same(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["rounds", str(write(tmp_path / "log", {"rounds": START}, round_line(1)))])
    assert result.exit_code == 0, result.output
    assert "less_than_ddp" in result.output or "less than ddp" in result.output.lower()


BROKEN = {
    "empty": b"",
    "no JSON": b"a log\n",
    "torn": json.dumps({"rounds": START}).encode() + b'\n{"number": 1, "st',
    "no start": json.dumps(round_line(1)).encode(),
    "a number": b"5\n",
    "a text": b'"rounds"\n',
    "a list": b'["rounds"]\n',
    "no text": b"\xff\xfe\x00",
    "a start of something else": b'{"rounds": {"workers": 3}}\n',
    "a start that is none": b'{"rounds": 3}\n',
    "half a round": json.dumps({"rounds": START}).encode() + b'\n{"digest": "00"}\n',
    "a round of something else": json.dumps({"rounds": START}).encode() + b'\n{"digest": 1, "number": "one"}\n',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_log_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(content)
    result = CliRunner().invoke(app, ["rounds", str(path), "--json"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "rounds.jsonl is no log of rounds" in "".join(result.stderr.split("\n")).replace("  ", " ")
    assert "Traceback" not in result.stderr


def test_a_missing_log_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["rounds", str(tmp_path / "none")])
    assert result.exit_code != 0
    assert "none" in result.output
    assert "Traceback" not in result.output
