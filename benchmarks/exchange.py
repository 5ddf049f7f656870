"""What workers send to each other, side by side: fishmask, DDP, dense local SGD, PowerSGD, and sparse COO tensors.

    python -m benchmarks.exchange [--models minilm large] [--workers 2 4] [--output results/exchange.jsonl]

The bytes are those that each worker's network interface counts, headers and acknowledgements included; nothing but the
exchange is on it. Every worker has a network namespace of its own and a cable to a bridge between them, whose rate
is limited in both directions; without the right to make them (root, or `unshare -rn` before the command) the bytes are
counted on the loopback interface, and no rate is set. First the cables are as fast as the machine and take packets as
large as the loopback interface does; then they have the packets of Ethernet (1500 bytes) and 100 and 10 Mbit/s.

What is compared is 30 steps: one round of `LocalRounds` or of dense local SGD, one sum of sparse tensors, or 30 steps
of DDP, of which one is measured and counted 30 times. Models have the size of MiniLM and BERT-large. It is the exchange
alone: no model runs, gradients are made up, and DDP has no backward pass to hide its exchange behind, as none could
hide minutes. Seconds are the time from a common start until the last worker is done, with all that the method computes
for its exchange. What would take too long is not run: its seconds are then computed from the bytes and the rate, and
are marked so.
"""

import argparse
import ctypes
import gc
import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

import fishmask
from benchmarks.network import Link, Sent, Worker, Workers, able, isolate
from benchmarks.record import quiet, report, verdict
from fishmask.measure import environment
from fishmask.merge import Mode
from fishmask.payload import Payload

DENSITY = 0.005
SEED = 0
EVERY = 30  # steps that are compared
LOOPBACK = Link(None, 65_535)
ETHERNET = 1500
SHAPES = {
    "tiny": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
PRELOAD = ["fishmask", "transformers.models.bert.modeling_bert", "torch.nn.parallel", "torch.distributed.algorithms"]
MEMORY = 12  # bytes that a worker takes for every entry of the model, at most: with PowerSGD
REPEATS, ENOUGH = 3, 2.0  # an exchange is measured so often, or until so many seconds are spent
GOALS = {"of the ring": 1.05, "more bytes": 4096, "times quicker": 20.0}  # what is to be reached
GOAL_LINK = (4, 100)  # workers and Mbit/s of the last of them
HEADERS = 66  # bytes of every packet: 14 of Ethernet, 20 of IP, 32 of TCP with timestamps
OURS, FAST, DDP = "LocalRounds, exact", "LocalRounds, fast", "DDP"


def empty_model(name: str) -> BertForSequenceClassification:
    """Make a model without memory for its weights."""
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_labels=2, **SHAPES[name]))


def make_mask(name: str, times: int = 1) -> fishmask.Mask:
    """Choose at random, ``times`` as many entries as the density says: the exchange depends on nothing but k."""
    return fishmask.Mask.random(empty_model(name), times * DENSITY, seed=SEED)


@cache
def _numbers(rank: int) -> Tensor:
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(SEED + rank))


def pattern(count: int, rank: int) -> Tensor:
    """Make up numbers that differ between workers, quickly: random ones, which repeat."""
    some = _numbers(rank)
    return some.repeat(-(-count // len(some)))[:count].clone()


# --- the methods ------------------------------------------------------------------------------------------------------


class Exchange:
    """What a worker does to exchange.

    Attributes:
        steps: How many steps of training one exchange serves.
    """

    steps = EVERY

    def train(self) -> None:
        """Train up to the exchange, where that is of consequence; not timed, but what it sends is counted."""

    def run(self) -> None:
        """Exchange, once."""
        raise NotImplementedError

    def result(self) -> Tensor:
        """Return something that must be equal on all workers after it."""
        raise NotImplementedError


class Rounds(Exchange):
    """A round of `LocalRounds`."""

    def __init__(
        self, worker: Worker, name: str, *, mode: Mode = "exact", payload: Payload = "float32", own: bool = False
    ) -> None:
        model = empty_model(name).to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        if own:
            mask = make_mask(name, worker.size).split(worker.size)[worker.rank]
            self.tuning = fishmask.attach(model, mask)
            self.rounds = fishmask.LocalRounds(
                self.tuning, every=EVERY, masks="own", denominator="holders", mode=mode, payload=payload
            )
        else:
            self.tuning = fishmask.attach(model, make_mask(name))
            self.rounds = fishmask.LocalRounds(self.tuning, every=EVERY, mode=mode, payload=payload)
        self.optimizer = torch.optim.SGD(self.tuning.parameters(), lr=0.01)
        for p in self.tuning.parameters():
            p.grad = pattern(p.numel(), worker.rank)
        self.left = EVERY - 1  # steps before the first exchange: all of them, to count that they send nothing

    def train(self) -> None:
        """Take the local steps."""
        for _ in range(self.left):
            self.optimizer.step()
        self.left = 1  # later exchanges are of as many bytes after one step as after thirty

    def run(self) -> None:
        """Do a round."""
        self.rounds.round()

    def result(self) -> Tensor:
        """Copy some of the model's weights, own and others' entries."""
        return some_of(self.tuning.model.parameters())


class Given(torch.autograd.Function):
    """Stands for a model: one parameter gets a gradient that was made up."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rank: int) -> Tensor:
        """Return zero, whatever the parameter."""
        ctx.shape, ctx.rank = parameter.shape, rank
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient."""
        return pattern(ctx.shape.numel(), ctx.rank).view(ctx.shape), None


class Stand(nn.Module):
    """Parameters that take no memory, as nothing ever reads or writes them; each gets its gradient."""

    def __init__(self, sizes: Iterable[torch.Size], rank: int) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.empty(size)) for size in sizes)
        self.rank = rank

    def forward(self) -> Tensor:
        """Return a sum that has all parameters in its graph."""
        return torch.stack([Given.apply(p, self.rank) for p in self.values]).sum()


class PerStep(Exchange):
    """DDP, of all parameters or of one vector of k values for each; with PowerSGD's hook if it is given a rank."""

    steps = 1

    def __init__(self, worker: Worker, name: str, *, masked: bool = False, low_rank: int | None = None) -> None:
        sizes = [torch.Size([len(i)]) for i in make_mask(name).indices.values()] if masked else shapes(name)
        # init_sync would send the weights once, which is no part of a step.
        self.module = DistributedDataParallel(Stand(sizes, worker.rank), gradient_as_bucket_view=True, init_sync=False)
        if low_rank is not None:
            state = PowerSGDState(None, matrix_approximation_rank=low_rank, start_powerSGD_iter=2)
            self.module.register_comm_hook(state, _in_turn)
        for _ in range(1 if low_rank is None else 3):  # DDP lays its buckets out anew after the first
            self.run()

    def run(self) -> None:
        """Do a backward pass, in which DDP exchanges."""
        self.module.zero_grad()
        self.module().backward()

    def result(self) -> Tensor:
        """Copy some of the mean gradients."""
        return some_of(p.grad for p in self.module.parameters() if p.grad is not None)


def _in_turn(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Leave out the dense steps that PowerSGD begins with, and then take one bucket after the other.

    With several under way at once, workers on gloo sum them in orders that differ, and hang or abort.
    """
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    if state.iter >= state.start_powerSGD_iter:
        done.set_result(powerSGD_hook(state, bucket).wait())
    else:
        state.maybe_increase_iter(bucket)
        done.set_result(bucket.buffer())
    return done


class DenseRounds(Exchange):
    """Local SGD on all weights: torch's PeriodicModelAverager, called after each of 30 steps."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.values = [nn.Parameter(pattern(size.numel(), worker.rank).view(size)) for size in shapes(name)]
        for p in self.values:
            p.grad = torch.zeros(()).expand(p.shape)  # it averages what has a gradient, and does not read it
        self.averager = PeriodicModelAverager(period=EVERY)

    def run(self) -> None:
        """Call the averager as 30 steps do; one of them exchanges."""
        for _ in range(EVERY):
            self.averager.average_parameters(self.values)

    def result(self) -> Tensor:
        """Copy some of the mean weights."""
        return some_of(p.detach() for p in self.values)


class Coordinates(Exchange):
    """The same k entries as a sparse COO tensor over all n, summed by torch's all_reduce."""

    def __init__(self, worker: Worker, name: str) -> None:
        mask, start, parts = make_mask(name), 0, []
        for parameter, shape in mask.shapes.items():
            if parameter in mask.indices:
                parts.append(mask.indices[parameter] + start)
            start += shape.numel()
        self.values = pattern(mask.k, worker.rank)
        self.mine = torch.sparse_coo_tensor(torch.cat(parts)[None], self.values, (start,), is_coalesced=True)
        self.sum = self.mine

    def run(self) -> None:
        """Sum."""
        self.sum = self.mine.clone()
        dist.all_reduce(self.sum)

    def result(self) -> Tensor:
        """Return the values of the sum."""
        return self.sum.coalesce().values()


def shapes(name: str) -> list[torch.Size]:
    return [p.shape for p in empty_model(name).parameters()]


def some_of(tensors: Iterable[Tensor]) -> Tensor:
    """Copy the first elements of all tensors: enough to tell that workers got something else."""
    return torch.cat([tensor.detach().reshape(-1)[:1024] for tensor in tensors])


class Way(NamedTuple):
    """A method as it is measured.

    Attributes:
        make: Its class.
        options: Of its class.
        width: Bytes of one entry in the least that a ring all-reduce sends; None where that is no measure.
        merged: "all" entries, the "masked" ones, or those of the masks of all workers ("union").
    """

    make: type[Exchange]
    options: dict[str, Any]
    width: int | None
    merged: str


WAYS = {
    OURS: Way(Rounds, {}, 4, "masked"),
    FAST: Way(Rounds, {"mode": "fast"}, 4, "masked"),
    "LocalRounds, bfloat16": Way(Rounds, {"payload": "bfloat16"}, 2, "masked"),
    "LocalRounds, int8": Way(Rounds, {"payload": "int8"}, 1, "masked"),
    "LocalRounds, own masks": Way(Rounds, {"own": True}, 4, "union"),
    "DDP of the k values": Way(PerStep, {"masked": True}, 4, "masked"),
    "sparse COO all-reduce": Way(Coordinates, {}, 4, "masked"),
    "PowerSGD, rank 1": Way(PerStep, {"low_rank": 1}, None, "all"),
    "PowerSGD, rank 4": Way(PerStep, {"low_rank": 4}, None, "all"),
    "dense local SGD": Way(DenseRounds, {}, 4, "all"),
    DDP: Way(PerStep, {}, 4, "all"),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def prepare(worker: Worker, name: str, way: Way) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    worker.kept = way.make(worker, name, **way.options)


def train(worker: Worker) -> None:
    worker.kept.train()


def exchange(worker: Worker, start: float) -> float:
    """Exchange at a time of the monotonic clock, which is one for all processes; return when it was done."""
    time.sleep(max(0.0, start - time.monotonic()))
    worker.kept.run()
    return time.monotonic()


def result(worker: Worker) -> Tensor:
    return worker.kept.result()


def drop(worker: Worker) -> None:
    """Make room for the next method."""
    worker.kept = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(workers: Workers, method: str) -> tuple[list[float], list[Sent]]:
    """Exchange some times; return the seconds of each, and what every worker has sent in all of them."""
    seconds: list[float] = []
    before = workers.sent()
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < ENOUGH):
        workers.all(train)
        start = time.monotonic() + 0.05
        seconds.append(max(workers.all(exchange, start)) - start)
    sent = [after.since(first) for after, first in zip(workers.sent(), before, strict=True)]
    results = workers.all(result)
    if not bool(results[0].any()) or any(not torch.equal(results[0], other) for other in results[1:]):
        raise SystemExit(f"{method}: the workers did not get one result")
    return seconds, sent


def run(
    name: str, size: int, methods: list[str], rates: list[int], longest: float, apart: bool
) -> Iterator[dict[str, Any]]:
    """Measure methods on one model with so many workers; yield a record for each and each link."""
    mask = make_mask(name)
    links = [LOOPBACK, *(Link(rate, ETHERNET) for rate in rates if apart)]
    about = {"benchmark": "exchange", "model": name, "n": mask.n, "k": mask.k, "density": DENSITY, "workers": size}
    with Workers(size, apart=apart, preload=PRELOAD) as workers:
        for method in methods:
            way = WAYS[method]
            workers.all(prepare, name, way)
            entries = {"all": mask.n, "masked": mask.k, "union": make_mask(name, size).k}[way.merged]
            least = None if way.width is None else 2 * (size - 1) / size * entries * way.width
            fastest: dict[str, Any] = {}
            for link in links:
                line: dict[str, Any] = {**about, "method": method, "steps": way.make.steps, "every": EVERY}
                line |= {"entries": entries, "ring_bytes": least, "rate_mbit": link.rate, "mtu": link.mtu}
                line |= {"counted_on": "own interface" if apart else "loopback interface, shared"}
                expected = fastest["bytes"] * 8 / link.rate / 1e6 if link.rate else 0.0
                # The goal is a ratio to DDP, which may take longer there: BERT-large takes 161 seconds for a step.
                if expected > longest * (6 if method == DDP and (size, link.rate) == GOAL_LINK else 1):
                    line |= {"bytes": None, "packets": None, "seconds": expected, "computed": True}
                else:
                    if apart:
                        workers.connect(link)
                    seconds, sent = measure(workers, method)
                    line |= {
                        "bytes": statistics.mean(one.bytes for one in sent) / len(seconds),
                        "packets": statistics.mean(one.packets for one in sent) / len(seconds),
                        "bytes_of_workers": [one.bytes / len(seconds) for one in sent],
                        "seconds": statistics.median(seconds),
                        "seconds_all": seconds,
                        "computed": False,
                    }
                fastest = fastest or line
                yield {**line, "seed": SEED, "load": os.getloadavg()[0], **environment()}
            if apart:
                workers.connect(LOOPBACK)
            workers.all(drop)


# --- telling ----------------------------------------------------------------------------------------------------------


def times(line: dict[str, Any]) -> float:
    """Count the exchanges of 30 steps."""
    return line["every"] / line["steps"]


def check_memory(models: list[str], workers: list[int]) -> None:
    """End before anything is started where the largest model would not fit."""
    needed = max(make_mask(name).n for name in models) * max(workers) * MEMORY
    line = next(s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    if needed > available:
        raise SystemExit(
            f"{max(workers)} workers need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: take "
            "fewer --workers or smaller --models"
        )


def show(lines: list[dict[str, Any]]) -> Table:
    """Lay what was measured on one model with one number of workers out as a table."""
    first = lines[0]
    rates = sorted({line["rate_mbit"] for line in lines if line["rate_mbit"]}, reverse=True)
    table = Table(
        title=f"{first['model']}: {first['n']:,} entries, {first['k']:,} masked; {first['workers']} workers; "
        f"{EVERY} steps",
        caption="Bytes that a worker sends, with packets as large as loopback's, and over 2(W-1)/W of the entries "
        "merged; on Ethernet's packets. * computed from the bytes, not run",
    )
    columns = ("method", "MB", "÷ ring", "over ring", "Ethernet MB", "÷ ring", "s, no limit")
    for column in (*columns, *(part for rate in rates for part in (f"s, {rate} Mbit/s", "÷ ours"))):
        table.add_column(column, justify="left" if column == "method" else "right")
    by_key = {(line["method"], line["rate_mbit"]): line for line in lines}
    for method in dict.fromkeys(line["method"] for line in lines):
        fast = by_key[method, None]
        ring, count = fast["ring_bytes"], times(fast)
        cells = [f"{fast['bytes'] * count / 1e6:,.3f}"]
        cells += ["", ""] if ring is None else [f"{fast['bytes'] / ring:.4f}", f"{fast['bytes'] - ring:,.0f}"]
        framed = next((by_key[method, rate] for rate in rates if not by_key[method, rate]["computed"]), None)
        cells.append("" if framed is None else f"{framed['bytes'] * count / 1e6:,.3f}")
        cells.append("" if framed is None or ring is None else f"{framed['bytes'] / ring:.4f}")
        cells.append(f"{fast['seconds'] * count:,.3f}")
        for rate in rates:
            line, ours = by_key[method, rate], by_key[OURS, rate]
            mark = "*" if line["computed"] else ""
            cells.append(f"{line['seconds'] * count:,.3f}{mark}")
            cells.append(f"{line['seconds'] * count / ours['seconds']:,.1f}{mark}")
        table.add_row(method, *cells)
    return table


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Compare what was measured on one model with one number of workers with what is to be reached."""
    told = []
    about = f"{lines[0]['model']}, {lines[0]['workers']} workers"
    by_key = {(line["method"], line["rate_mbit"]): line for line in lines}
    mine = [line for line in lines if line["method"] in (OURS, FAST) and not line["computed"]]
    for line in {(line["method"], line["mtu"]): line for line in reversed(mine)}.values():
        allowed = GOALS["of the ring"] * line["ring_bytes"] + GOALS["more bytes"]
        stream = line["bytes"] - HEADERS * line["packets"]
        told.append(
            f"{verdict(line['bytes'] <= allowed)}: {about}, {line['method']}, packets of {line['mtu']:,} bytes: "
            f"{line['bytes']:,.0f} bytes per worker and round, {line['bytes'] / line['ring_bytes']:.4f} x the ring "
            f"limit (at most {allowed:,.0f}: {GOALS['of the ring']} x and {GOALS['more bytes']:,} bytes); without the "
            f"headers and acknowledgements of TCP {stream:,.0f} bytes, {stream / line['ring_bytes']:.4f} x"
        )
    for line in mine:
        if (rate := line["rate_mbit"]) is None:
            continue
        dense = by_key[DDP, rate]
        ratio = dense["seconds"] * times(dense) / (line["seconds"] * times(line))
        how = "computed from DDP's bytes" if dense["computed"] else "one step of DDP was measured"
        goal = verdict(ratio >= GOALS["times quicker"]) if (line["workers"], rate) == GOAL_LINK else "no goal"
        told.append(
            f"{goal}: {about}, {line['method']}, {rate} Mbit/s: {ratio:,.0f} x less time in communication than DDP "
            f"({how}; the goal is {GOALS['times quicker']:g} x with {GOAL_LINK[0]} workers on {GOAL_LINK[1]} Mbit/s)"
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=["minilm", "large"], help="tiny: a check")
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--methods", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="besides ours and DDP")
    parser.add_argument("--rates", nargs="*", type=int, default=[100, 10], help="Mbit/s of each worker's cable")
    parser.add_argument(
        "--longest", type=float, default=30.0, help="seconds of one exchange above which it is computed and not run"
    )
    parser.add_argument("--loopback", action="store_true", help="make no namespaces; count on the loopback interface")
    parser.add_argument("--output", type=Path, help="append a JSON line per model, workers, method and link")
    args = parser.parse_args()
    quiet(1)
    console = Console(width=170)
    methods = [method for method in WAYS if method in (OURS, DDP, *args.methods)]
    check_memory(args.models, args.workers)
    apart = not args.loopback and able()
    if apart:
        isolate()
    else:
        console.print(
            "no namespaces: bytes are those of the loopback interface, which all workers share, and no rate is set"
        )
    for name in args.models:
        for size in args.workers:
            lines = list(run(name, size, methods, args.rates, args.longest, apart))
            report(console, show(lines), verdicts(lines), lines, args.output)


if __name__ == "__main__":
    main()
