"""Every script in examples/ runs as a user runs it: a process of its own, in an empty folder, without a network."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if not path.name.startswith("_"))
PATIENCE = 300.0  # seconds: an example takes some ten, and this only ends one that hangs


def described(script: Path) -> str:
    """Return the docstring of a script, its lines without indentation."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert text, f"{script.name} does not say what it shows"
    return text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example(script: Path, tmp_path: Path) -> None:
    """It succeeds, and its last line is one that its docstring promises."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    assert lines, "it prints nothing"
    promised = [line.strip() for line in described(script).splitlines()]
    assert lines[-1].strip() in promised, f"its docstring has no such line: {lines[-1]}"


def test_the_list_is_complete() -> None:
    """examples/README.md names every script, and no other."""
    rows = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    listed = [row.split("`")[1] for row in rows if row.startswith("- `")]
    assert sorted(listed) == [script.name for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_short_enough_to_copy(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 100
