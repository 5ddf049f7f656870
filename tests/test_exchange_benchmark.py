"""The benchmark of exchanges, on a tiny model: every method runs, and the bytes are those that its numbers come to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.exchange import DDP, FAST, GOALS, OURS, show, verdicts

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
METHODS = [OURS, FAST, "LocalRounds, int8", "LocalRounds, own masks", "sparse COO all-reduce", "PowerSGD, rank 4", DDP]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("exchange") / "exchange.jsonl"
    # At 1 Mbit/s the dense methods would take longer than is allowed.
    options = ["--models", "tiny", "--workers", "2", "--rates", "1", "--longest", "2", "--output", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.exchange", *options, "--methods", *METHODS],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_method_sends_what_its_numbers_come_to(lines: list[dict[str, Any]]) -> None:
    fastest = {line["method"]: line for line in lines if line["rate_mbit"] is None}
    assert list(fastest) == METHODS
    n, k = fastest[OURS]["n"], fastest[OURS]["k"]
    # The interface is the workers' own, or shared with whatever else is on this machine's loopback: bytes are no less.
    wanted = {OURS: 4 * k, FAST: 4 * k, "LocalRounds, int8": k, "LocalRounds, own masks": 4 * k}
    wanted |= {"sparse COO all-reduce": 12 * k, DDP: 4 * n}
    for method, least in wanted.items():
        assert fastest[method]["bytes"] >= least, method
        if fastest[method]["counted_on"] == "own interface":
            assert fastest[method]["bytes"] <= GOALS["of the ring"] * least + 6000, method


def test_what_takes_too_long_is_computed_and_says_so(lines: list[dict[str, Any]]) -> None:
    slow = {line["method"]: line for line in lines if line["rate_mbit"] == 1}
    if not slow:
        pytest.skip("no namespaces here, so no rate was set")
    assert {method for method, line in slow.items() if line["computed"]} == {DDP, "PowerSGD, rank 4"}
    fast = next(line for line in lines if line["method"] == DDP and line["rate_mbit"] is None)
    assert slow[DDP]["bytes"] is None
    assert slow[DDP]["seconds"] == pytest.approx(fast["bytes"] * 8 / 1e6)
    # At this rate the bytes are what takes the time, less the few that pass at once.
    coo = slow["sparse COO all-reduce"]
    assert coo["seconds"] >= (coo["bytes"] - 16_384) * 8 / 1e6


def test_a_goal_that_is_missed_is_told(lines: list[dict[str, Any]]) -> None:
    lines = [line for line in lines if line["rate_mbit"] is None]
    for line in lines:
        line |= {"bytes": 1.04 * line["ring_bytes"]} if line["method"] == OURS else {}
        line |= {"bytes": 1.06 * line["ring_bytes"] + 4096} if line["method"] == FAST else {}
    told = {text.partition(", LocalRounds, ")[2][:4] + text[:4] for text in verdicts(lines)}
    assert told == {"exacPASS", "fastFAIL"}
    assert show(lines).row_count == len(METHODS)
