"""Triton kernels against their twins and float64: in Triton's interpreter, as machine code, and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fishmask import kernels
from fishmask.kernels import (
    add_powers_,
    add_powers_twin_,
    available,
    count_tiles,
    masked_gradient,
    masked_gradient_twin,
    tiles_of,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# Rows, columns, tokens, share of the entries, size of a tile.
CASES = [
    (40, 50, 37, 0.1, (16, 16)),  # nothing divides anything, and some tiles are empty
    (32, 64, 1, 0.02, (32, 32)),
    (32, 32, 40, 1.0, (16, 32)),  # full tiles
    (70, 20, 65, None, (32, 16)),  # one entry
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, tokens, share, _ = case
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(tokens, n, generator=generator).to(device, dtype) for n in (rows, columns))
    chosen = torch.rand(rows * columns, generator=generator) < (share or 0.0)
    indices = chosen.nonzero().squeeze(1) if share else torch.tensor([rows * columns - 3])
    return a, b, indices


def far(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want.cpu()).norm() / want.cpu().norm())


def check_masked_gradient(case: Any, dtype: torch.dtype, device: str) -> None:
    rows, columns, _, share, size = case
    a, b, indices = operands(case, dtype, device)
    row, column = indices // columns, indices % columns
    tiles = tiles_of(row, column, (rows, columns), torch.device(device), size)
    grid = -(-rows // size[0]) * -(-columns // size[1])
    assert len(tiles.rows) == count_tiles(row, column, (rows, columns), size)
    assert len(tiles.rows) == (grid if share == 1.0 else 1) or 1 < len(tiles.rows) <= grid
    want = (a.double().t() @ b.double()).flatten()[indices.to(device)]
    for x, y in ((a, b), (a.t().contiguous().t(), b)):
        got = masked_gradient(x, y, tiles)
        assert got.dtype == torch.float32
        assert far(got, want) < 3e-7
    assert far(masked_gradient_twin(a, b, tiles), want) < 3e-7


def check_add_powers(dtype: torch.dtype, device: str, absolute: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 0, 33, 1, 64]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    left, right = (torch.randn(sum(lengths), n, generator=generator).to(device, dtype) for n in (150, 20))
    start = torch.rand(150, 20, generator=generator)
    want = start.double()
    for first, last in pairwise(offsets):
        gradient = left[first:last].cpu().double().t() @ right[first:last].cpu().double()
        want += gradient.abs() if absolute else gradient**2
    for function in (add_powers_, add_powers_twin_):
        for layout in (start.clone(), start.t().contiguous().t()):  # the second as where weights are stored [I, O]
            scores = layout.to(device)
            function(left, right, offsets.to(device, torch.int32), scores, absolute=absolute)
            assert far(scores, want) < 3e-7


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_masked_gradient_interpreted(case: Any, dtype: torch.dtype) -> None:
    assert available(torch.device("cpu"))
    check_masked_gradient(case, dtype, "cpu")


@interpreter
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_powers_interpreted(dtype: torch.dtype, absolute: bool) -> None:
    check_add_powers(dtype, "cpu", absolute)


@triton
@pytest.mark.skipif(INTERPRETED, reason="this is the run in the interpreter")
def test_kernels_agree_with_their_twins_in_the_interpreter() -> None:
    # In a process of its own: Triton reads the variable once, and other tests may have imported it.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
        cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    cases = len(CASES) * len(DTYPES) + 2 * len(DTYPES)
    assert f"{cases} passed" in done.stdout and " skipped" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins(dtype: torch.dtype) -> None:
    for case in CASES:
        check_masked_gradient(case, dtype, "cpu")
    check_add_powers(dtype, "cpu", absolute=False)
    check_add_powers(dtype, "cpu", absolute=True)


def test_operands_of_two_dtypes_meet_in_float32() -> None:
    a, b = torch.randn(9, 4), torch.randn(9, 4).bfloat16()
    tiles = tiles_of(torch.tensor([1]), torch.tensor([2]), (4, 4), a.device)
    assert far(masked_gradient(a, b, tiles), (a.double().t() @ b.double())[1, 2:3]) < 1e-6


@triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", ["masked_gradient", "add_powers"])
def test_kernels_compile_without_spilling(
    name: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed to compile for one, so what cannot run here is at least known to be machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from fishmask import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    size = kernels.TILE if name == "masked_gradient" else kernels.POWERS_TILE
    constants = {"ROWS": size[0], "COLUMNS": size[1], "TOKENS": kernels._TOKENS, "WIDEN": False}
    constants |= {"ENTRIES": kernels._ENTRIES} if name == "masked_gradient" else {"ABSOLUTE": False}
    pointers = {"a": "*bf16", "b": "*bf16", "left_operand": "*bf16", "right_operand": "*bf16", "out": "*fp32"}
    pointers |= {"scores": "*fp32"} | dict.fromkeys(
        ("tile_rows", "tile_columns", "starts", "places", "order", "offsets"), "*i32"
    )
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "i32")
        for argument in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(kernels._LAUNCH))
    assert compiled.metadata.shared <= 99 << 10  # the smallest of these architectures have no more for one block
    assert (" wgmma." if architecture == 90 else "mma.sync") in compiled.asm["ptx"].replace("\t", " ")
    dump = Path(sys.modules["triton"].__file__ or "").parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [dump, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    assert "REG:" in usage and "STACK:0" in usage and "LOCAL:0" in usage, usage


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    assert available(torch.device("cuda"))
    for case in [*CASES, (300, 200, 500, 0.01, kernels.TILE), (256, 384, 2048, 0.005, kernels.TILE)]:
        check_masked_gradient(case, dtype, "cuda")
    check_add_powers(dtype, "cuda", absolute=False)
    check_add_powers(dtype, "cuda", absolute=True)
