"""Many tasks from one model, side by side: this package's Switch, PEFT's adapters, and whole state dicts.

    python -m benchmarks.switch [--rounds 2] [--models minilm large] [--output results/switch.jsonl]

The models are MiniLM and a BERT of the size of BERT-large (350M entries, random weights), in float32 and in eval mode.
Each method gets two adapters as files: two random masks of 0.5 % with the head; LoRA r=8 on all linear layers; PEFT's
two sparse methods at about the mask's count of entries; whole models. All methods take turns in one process, round by
round after one to warm up, and every figure is a median over the rounds.

- First load: from the file (in the page cache) to weights that are in use. A Switch hashes the base to know that the
  delta belongs to it; "trusted" leaves that out.
- Switch: from one adapter that is loaded to the other.
- Back: to what the base gives. In the end the base's weights are compared with those of the beginning, bit for bit.
- Forward: one batch of one example of 32 tokens, with an adapter in use.
- Memory: what one more adapter takes, with all that its library keeps for it.

"LoRA r=8, merged" pays for a forward as quick as the base's with a merge and an unmerge at each switch.
"""

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

import fishmask
from benchmarks.checkpoints import make_model, size_of
from benchmarks.record import add_options, quiet, report, verdict
from benchmarks.step import make_batch
from fishmask.fingerprint import fingerprint, raw_bits
from fishmask.measure import environment

DENSITY = 0.005
NAMES = ("a", "b")
MOST, PATIENCE = 10, 1.0  # how often something is repeated in a round, and the seconds after which it is not again
OURS, ONE_MASK = "Switch", "Switch, deltas of one mask"
LORA, MERGED, WHOLE = "LoRA r=8", "LoRA r=8, merged", "whole state dict"
GOALS = {"slower forward": 0.02}  # than the base's


def twin(model: nn.Module, weights: nn.Module | None = None) -> nn.Module:
    """Copy a model; with the weights of another one, which are not copied, where nobody writes to them."""
    shared = {} if weights is None else {id(p): p for p in weights.parameters()}
    return copy.deepcopy(model, dict(shared))


_hashed: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def hashes(base: nn.Module, mask: fishmask.Mask) -> dict[str, str]:
    """Hash a base once for all masks, which take the same parameters whole."""
    if base not in _hashed:
        _hashed[base] = fingerprint(base.named_parameters(), mask)
    return _hashed[base]


def tuned_values(model: nn.Module, mask: fishmask.Mask, seed: int) -> dict[str, Tensor]:
    """Make values for a mask near the model's own, as training does."""
    g = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return {
        name: parameters[name].detach().view(-1)[i] + 1e-3 * torch.randn(len(i), generator=g)
        for name, i in mask.indices.items()
    }


class Contender(ABC):
    """A way to have several adapters on one model."""

    model: nn.Module
    entries: int  # of one adapter
    first = "first load"

    def __init__(self, base: nn.Module, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Return where an adapter is."""
        return self.folder / name

    @abstractmethod
    def load(self, name: str) -> None:
        """Bring an adapter from its file into use."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Forget one, with the base in use."""

    @abstractmethod
    def use(self, name: str) -> None:
        """Switch to one that is loaded."""

    @abstractmethod
    def back(self) -> None:
        """Have the base again."""

    @abstractmethod
    def memory(self) -> int:
        """Count the bytes that one more adapter takes."""


class Ours(Contender):
    """A Switch; the base is its own copy."""

    seeds = (1, 2)

    def __init__(self, base: nn.Module, folder: Path) -> None:
        super().__init__(base, folder)
        self.model = twin(base)
        self.switch = fishmask.Switch(self.model)
        for name, seed in zip(NAMES, self.seeds, strict=True):
            mask = fishmask.Mask.random(base, DENSITY, seed=seed, keep="classifier")
            self.entries = mask.k
            values = tuned_values(base, mask, ord(name))
            fishmask.Delta(mask, values, base=hashes(base, mask)).save(self.path(name))

    @override
    def load(self, name: str) -> None:
        self._load(name, check_base=True)

    def trusted(self, name: str) -> None:
        """Load without a hash of the base."""
        self._load(name, check_base=False)

    def _load(self, name: str, check_base: bool) -> None:
        self.switch.add(name, fishmask.Delta.load(self.path(name)), check_base=check_base)
        self.switch.use(name)

    @override
    def drop(self, name: str) -> None:
        self.switch.use(None)
        self.switch.remove(name)

    @override
    def use(self, name: str) -> None:
        self.switch.use(name)

    @override
    def back(self) -> None:
        self.switch.use(None)

    @override
    def memory(self) -> int:
        held = self.switch._held[NAMES[0]]
        pairs = [(w.positions, w.bits, w.base) for w in held.writes.values()]
        return storage([t for triple in pairs for t in triple], list(self.switch.delta(NAMES[0]).values.values()))


class OneMask(Ours):
    """A Switch whose deltas have the same entries, as tasks have that are trained with one mask."""

    seeds = (1, 1)


class Peft(Contender):
    """An adapter of PEFT."""

    writes = False  # to the base's weights

    def __init__(self, base: nn.Module, folder: Path) -> None:
        super().__init__(base, folder)
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            made = get_peft_model(twin(base, base), self.config_for(base), adapter_name=name)
            trained = [p for p in made.parameters() if p.requires_grad]
            with torch.no_grad():
                for p in trained:
                    p.add_(1e-3 * torch.randn_like(p))
            self.entries = sum(p.numel() for p in trained)
            made.save_pretrained(str(folder))
            del made
        own = twin(base, None if self.writes else base)
        self.model = PeftModel.from_pretrained(own, str(self.path("a")), adapter_name="first")
        self.model.eval()
        self._back = False

    @abstractmethod
    def config_for(self, base: nn.Module) -> Any:
        """Return PEFT's config."""

    @override
    def load(self, name: str) -> None:
        self.model.load_adapter(str(self.path(name)), name)
        self.use(name)

    @override
    def drop(self, name: str) -> None:
        self.back()
        self.model.delete_adapter(name)

    @override
    def use(self, name: str) -> None:
        if self._back:
            self.model.base_model.enable_adapter_layers()
            self._back = False
        self.model.set_adapter(name)

    @override
    def back(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self._back = True

    @override
    def memory(self) -> int:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        own = [t for name, t in tensors if NAMES[0] in name.split(".")]
        return storage(own)


def linear() -> dict[str, Any]:
    return {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["classifier"]}


class Lora(Peft):
    """LoRA beside the weights."""

    @override
    def config_for(self, base: nn.Module) -> Any:
        return LoraConfig(r=8, **linear())


class Merged(Lora):
    """LoRA in the weights, merged anew at each switch."""

    writes, merged = True, False

    @override
    def use(self, name: str) -> None:
        self.back()
        self.model.set_adapter(name)
        self.model.merge_adapter()
        self.merged = True

    @override
    def back(self) -> None:
        if self.merged:
            self.model.unmerge_adapter()
            self.merged = False


class Shira(Peft):
    """SHiRA; its rank is what gives about the mask's count of entries."""

    @override
    def config_for(self, base: nn.Module) -> Any:
        layers = [m for m in base.bert.modules() if isinstance(m, nn.Linear)]
        of_rank_one = sum(m.in_features + m.out_features for m in layers)
        return ShiraConfig(r=max(1, round(DENSITY * count(base) / of_rank_one)), random_seed=0, **linear())


class Supertuning(Peft):
    """Supertuning; its sparsity is what gives about the mask's count of entries."""

    @override
    def config_for(self, base: nn.Module) -> Any:
        layers = [m for m in base.bert.modules() if isinstance(m, nn.Linear)]
        in_linear = sum(m.weight.numel() for m in layers)
        return SupertuningConfig(sparsity=1 - DENSITY * count(base) / in_linear, **linear())


class Whole(Contender):
    """State dicts of whole models, kept in memory."""

    def __init__(self, base: nn.Module, folder: Path) -> None:
        super().__init__(base, folder)
        self.model = twin(base)
        self.base = base.state_dict()
        self.entries = count(base)
        self.states: dict[str, dict[str, Tensor]] = {}
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            save_file({n: t + 1e-3 if t.is_floating_point() else t for n, t in self.base.items()}, self.path(name))

    @override
    def load(self, name: str) -> None:
        self.states[name] = load_file(self.path(name))
        self.use(name)

    @override
    def drop(self, name: str) -> None:
        self.back()
        del self.states[name]

    @override
    def use(self, name: str) -> None:
        self.model.load_state_dict(self.states[name])

    @override
    def back(self) -> None:
        self.model.load_state_dict(self.base)

    @override
    def memory(self) -> int:
        return storage(list(self.states["a"].values()))


CONTENDERS: dict[str, type[Contender]] = {
    OURS: Ours,
    ONE_MASK: OneMask,
    LORA: Lora,
    MERGED: Merged,
    "SHiRA": Shira,
    "Supertuning": Supertuning,
    WHOLE: Whole,
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def storage(*groups: list[Tensor]) -> int:
    """Count the bytes of tensors, each block of memory once."""
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for group in groups for t in group}
    return sum(blocks.values())


def differing(before: Path, contender: Contender) -> int:
    """Count the entries of the base that are not what a file says."""
    now, total = dict(contender.model.named_parameters()), 0
    with safe_open(before, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            spelled = [name, *(f"base_model.model.{n}" for n in (name, _layered(name)))]
            found = next((now[n] for n in spelled if n in now), None)  # a head is another module in PEFT
            if found is not None:
                total += int((raw_bits(found) != raw_bits(file.get_tensor(name))).sum())
    return total


def _layered(name: str) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.base_layer.{last}"


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def measure_once(contender: Contender, batch: dict[str, Tensor], took: defaultdict[str, list[float]]) -> None:
    """Measure one method once; afterwards its base is in use, and nothing is loaded."""
    first, second = NAMES
    gc.collect()
    took["load"].append(seconds(contender.load, first))
    if isinstance(contender, Ours):
        took["trusted"].append(seconds(contender.trusted, second))
    else:
        took["load"].append(seconds(contender.load, second))
    for _ in repeats():
        took["switch"] += [seconds(contender.use, first), seconds(contender.use, second)]
    with torch.inference_mode():
        contender.model(**batch)
        for _ in repeats():
            took["forward"].append(seconds(lambda: contender.model(**batch)))
    for _ in repeats():
        took["back"].append(seconds(contender.back))
        contender.use(first)
    if isinstance(contender, Ours):
        with contender.switch.using(first):  # the first of all sets things up
            pass
        for _ in repeats():
            took["using"].append(seconds(_nothing, contender.switch))
        contender.switch.use(None)
        with torch.inference_mode():
            for _ in repeats():
                took["base_forward"].append(seconds(lambda: contender.model(**batch)))
    took["memory"] = [contender.memory()]
    for name in NAMES:
        contender.use(name)
        contender.drop(name)


def repeats() -> Iterator[int]:
    """Count until there are enough measurements, or no time for more."""
    begin = time.perf_counter()
    for turn in range(MOST):
        yield turn
        if time.perf_counter() - begin > PATIENCE:
            return


def _nothing(switch: fishmask.Switch) -> None:
    """Serve a request that asks for nothing, with what is in use."""
    with switch.using(NAMES[0]):
        pass


def measure(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Measure all methods on one model; return one record for each."""
    base = make_model(name).eval().requires_grad_(False)
    batch = {n: t for n, t in make_batch(1, 32, 0).items() if n != "labels"}
    if name == "tiny":
        batch["input_ids"] %= base.config.vocab_size
    save_file(dict(base.named_parameters()), before := folder / "before")
    ready = {}
    for method, kind in CONTENDERS.items():
        (own := folder / kind.__name__).mkdir(parents=True)
        ready[method] = kind(base, own)
    clocks: dict[str, defaultdict[str, list[float]]] = {}
    loads = [os.getloadavg()[0]]
    for turn in range(rounds + 1):
        if turn <= 1:  # the first is to warm up
            clocks = {method: defaultdict(list) for method in ready}
        for method, contender in ready.items():
            measure_once(contender, batch, clocks[method])
        loads.append(os.getloadavg()[0])
    about = {"benchmark": "switch", "model": name, "n": count(base), "density": DENSITY, "rounds": rounds}
    lines = []
    for method, contender in ready.items():
        took = clocks[method]
        record: dict[str, Any] = {**about, "method": method, "entries": contender.entries}
        record |= {"file_bytes": size_of(contender.path("a")), "memory_bytes": took.pop("memory")[0]}
        record |= {"base_entries_changed": differing(before, contender)}
        for part, times in took.items():
            record |= {f"{part}_seconds": statistics.median(times), f"{part}_seconds_all": times}
        lines.append({**record, "load_average": loads, **environment()})
    return lines


def show(lines: list[dict[str, Any]]) -> Table:
    """Lay the methods of one model out as a table."""
    ours = lines[0]
    table = Table(title=f"{ours['model']}: {ours['n']:,} entries, {ours['entries']:,} masked; medians, milliseconds")
    columns = (
        "method",
        "entries",
        "MB file",
        "MB memory",
        "first load",
        "switch",
        "÷ ours",
        "back",
        "forward",
        "÷ base",
    )
    for column in (*columns, "base changed"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        loaded = f"{1e3 * line['load_seconds']:,.1f}"
        if "trusted_seconds" in line:
            loaded += f" / {1e3 * line['trusted_seconds']:,.1f}"
        table.add_row(
            line["method"],
            f"{line['entries']:,}",
            f"{line['file_bytes'] / 1e6:.2f}",
            f"{line['memory_bytes'] / 1e6:.2f}",
            loaded,
            f"{1e3 * line['switch_seconds']:,.2f}",
            f"{line['switch_seconds'] / ours['switch_seconds']:.1f}",
            f"{1e3 * line['back_seconds']:,.2f}",
            f"{1e3 * line['forward_seconds']:,.1f}",
            f"{line['forward_seconds'] / ours['base_forward_seconds']:.2f}",
            f"{line['base_entries_changed']:,}",
        )
    return table


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Compare what was measured on one model with what is to be reached."""
    by_name = {line["method"]: line for line in lines}
    ours = by_name[OURS]
    slower = ours["forward_seconds"] / ours["base_forward_seconds"] - 1
    told = [
        f"{verdict(ours['base_entries_changed'] == 0)}: {ours['model']}: the base comes back bit for bit",
        f"{verdict(slower <= GOALS['slower forward'])}: {ours['model']}: a forward takes {slower:.1%} longer than the "
        f"base's (at most {GOALS['slower forward']:.0%})",
        f"{ours['model']}: using() with what is in use already takes {1e6 * ours['using_seconds']:.1f} µs",
    ]
    for name in (MERGED, WHOLE):
        ratio = by_name[name]["switch_seconds"] / ours["switch_seconds"]
        told.append(f"{verdict(ratio > 1)}: {ours['model']}: a switch is {ratio:.1f} x quicker than {name}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="after one to warm up")
    add_options(parser)
    args = parser.parse_args()
    quiet(args.threads)
    console = Console(width=150)
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            lines = measure(name, args.rounds, Path(folder))
        report(console, show(lines), verdicts(lines), lines, args.output)


if __name__ == "__main__":
    main()
