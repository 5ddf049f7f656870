"""Measure what the steps of a plan cost on a device, in well under a second."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask import kernels
from fishmask.costs import Costs, built_in
from fishmask.parts import Sampled, silence_csr_warning

_SECONDS = 0.5  # for rounds of all measurements, one after the other
_ROUNDS = 5  # at least
_TOKENS = {"cpu": 512, "cuda": 4096}
_WIDTH = {"cpu": 768, "cuda": 4096}  # rows and columns of the weight
_NARROW = 16  # rows or columns, where the size of the product does not count
_SHARE = 0.005  # of the entries, in sampled products
_CSR_SHARE = 0.05  # in CSR products, where fewer could not be told from the layout
_EXAMPLE = 64  # tokens of an example that is scored
_MIDDLING = 1024  # tokens that share the cost of starting a part
_LEAST = 1e-3  # of the built-in figure: what is too cheap to be told from noise must not be free


def calibrate(device: torch.device | str) -> Costs:
    """Measure what things cost on a device.

    Everything is measured in rounds for half a second, and of each the least time counts: whatever else the machine
    does only ever adds to it. On a CPU in float32, on a GPU in bfloat16. Nothing is stored: `fishmask.costs.store`
    does that.

    Args:
        device: The device; its number of threads is that which PyTorch has at the moment.

    Returns:
        The costs. Those of the Triton kernels are there only on a GPU with Triton.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA GPU.
    """
    device = torch.device(device)
    if device.type not in _TOKENS:
        raise ValueError(f"plans can be calibrated on cpu and cuda, but the device is {device}")
    T, D = _TOKENS[device.type], _WIDTH[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    least = _least_nanoseconds(_measurements(T, D, dtype, device), device)
    found = {name: nanoseconds / T for name, nanoseconds in least.items()}
    # Two unknowns from two products, likewise from two copies and two CSR products.
    wide, narrow = found["wide product"], found["narrow product"]
    multiply = (wide - narrow * 2 * D / (D + _NARROW)) / (D * D - 2 * D * D * _NARROW / (D + _NARROW))
    gather = (found["wide copy"] - found["narrow copy"]) / (D // 2 - _NARROW)
    csr = (found["CSR product"] - found["empty CSR product"]) / len(_scattered(D, _CSR_SHARE))
    costs = {
        "multiply": multiply,
        "read": (wide - multiply * D * D) / (2 * D),
        "gather": gather,
        "skip": (found["narrow copy"] - gather * _NARROW) / D,
        "part": least["small part"] / _MIDDLING,
        "scatter": found["scatter"] / D,
        "spread": found["empty CSR product"] / (2 * D),
        "nonzero": csr,
    }
    if "sampled product" in found:
        costs["transpose"] = found["transposition"] / D
        costs["sampled"] = (found["sampled product"] - 2 * found["transposition"]) / len(_scattered(D, _SHARE))
    if "tiles" in found:
        costs["tile"] = found["tiles"] / (D * D)
        costs["square"], costs["grouped"] = found["squares"] / (D * D), found["grouped squares"] / (D * D)
    known = built_in(device)
    return Costs(**{name: max(cost, _LEAST * (getattr(known, name) or 0.0)) for name, cost in costs.items()})


def _measurements(T: int, D: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; every name but "small part" is for T tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def operand(tokens: int, columns: int) -> Tensor:
        return torch.randn(tokens, columns, generator=generator, device=device, dtype=dtype)

    a, b, few, small = operand(T, D), operand(T, D), operand(T, _NARROW), operand(_NARROW, D)
    half = torch.arange(0, D, 2, dtype=torch.int32, device=device)
    some = torch.arange(0, D, D // _NARROW, dtype=torch.int32, device=device)
    every = torch.arange(D, dtype=torch.int32, device=device)
    position = torch.arange(_NARROW, dtype=torch.int32, device=device)
    silence_csr_warning()
    sampled_at, csr_at = ((indices // D, indices % D) for indices in (_scattered(D, _SHARE), _scattered(D, _CSR_SHARE)))

    def small_part() -> Tensor:
        block = small.index_select(1, some).t() @ small.index_select(1, some)
        return torch.cat([block.flatten().index_select(0, position).float()]).index_select(0, position)

    wide: dict[str, Callable[[], object]] = {
        "wide product": lambda: a.t() @ b,
        "narrow product": lambda: few.t() @ b,
        "wide copy": lambda: a.index_select(1, half),
        "narrow copy": lambda: a.index_select(1, some),
        "small part": small_part,
        "scatter": lambda: a.index_add(1, every, b),
        "CSR product": _csr_product(*csr_at, a),
        "empty CSR product": _csr_product(csr_at[0][:1], csr_at[1][:1], a),
    }
    if device.type == "cpu":
        sampled = Sampled(*sampled_at, (D, D), device, built_in(device))
        wide["sampled product"] = lambda: sampled.product(a, b)
        wide["transposition"] = lambda: [part.t().contiguous() for part in a.split(sampled.chunk)]
    elif kernels.available(device):
        every_tile = torch.arange(0, D, min(kernels.TILE))
        tiles = kernels.tiles_of(
            every_tile.repeat_interleave(len(every_tile)), every_tile.repeat(len(every_tile)), (D, D), device
        )
        bounds = torch.arange(0, T + 1, _EXAMPLE, dtype=torch.int32, device=device)
        scores = torch.zeros(D, D, device=device)
        wide["tiles"] = lambda: kernels.masked_gradient(a, b, tiles)
        wide["squares"] = lambda: _squares(a, b, scores)
        wide["grouped squares"] = lambda: kernels.add_powers_(a, b, bounds, scores)
    return wide


def _scattered(D: int, share: float) -> Tensor:
    """Return flat indices of entries of a weight [D, D], spread evenly over rows and columns."""
    return torch.arange(0, D * D, round(1 / share) + 1)


def _csr_product(row: Tensor, column: Tensor, x: Tensor) -> Callable[[], object]:
    """Return the product of a sparse matrix with an operand, brought into its layout and back, as `SidePlan` does."""
    D = x.shape[1]
    starts = F.pad(torch.bincount(row, minlength=D).cumsum(0), (1, 0))
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    index = (starts.to(x.device, torch.int32), column.to(x.device, torch.int32))
    values = torch.ones(len(row), dtype=dtype, device=x.device)
    sparse = torch.sparse_csr_tensor(*index, values, size=(D, D), check_invariants=False)
    return lambda: x + (sparse @ x.t().to(dtype)).t().to(x.dtype)


def _squares(a: Tensor, b: Tensor, scores: Tensor) -> None:
    """Score as `rules.Product` does without the kernel."""
    for left, right in zip(a.split(_EXAMPLE), b.split(_EXAMPLE), strict=True):
        gradient = left.float().t() @ right.float()
        scores.addcmul_(gradient, gradient)


def _least_nanoseconds(measurements: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    # Of one thread the system knows how long it really ran.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[str, list[int]] = {name: [] for name in measurements}
    for measure in measurements.values():  # kernels are loaded, and those of Triton compiled
        measure()
    end = time.perf_counter() + _SECONDS
    while len(next(iter(times.values()))) < _ROUNDS or time.perf_counter() < end:
        for name, measure in measurements.items():
            wait()
            start = clock()
            measure()
            wait()
            times[name].append(clock() - start)
    return {name: float(min(taken)) for name, taken in times.items()}
