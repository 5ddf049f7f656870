"""Score a large decoder in bounded memory through the command line, kill it on the way, and select from the result.

    python -m benchmarks.scoring_scale                       # a Llama of 1.2 billion entries, 8 examples of 32 tokens
    python -m benchmarks.scoring_scale --cgroup /sys/fs/cgroup/memory/small     # within the limit of this cgroup

The model has random bfloat16 weights and the shape of Llama 3.2 1B; it is written to a folder as shards of 600 MB. Then
come, each as a process of its own: the plan; `fishmask score` with a work folder, killed by SIGKILL once it has saved
sums in the midst of a pass; the same command again, killed once a pass is finished; the same again, to the end; the
same without being killed, to compare the bits; and `fishmask mask select`. Memory is watched from outside, ten times a
second: what a process holds for itself (anonymous), and with the pages of mapped files, which the system may drop at
any time.

    python -m benchmarks.scoring_scale --part precision      # scores from bfloat16 weights against a float64 loop
    python -m benchmarks.scoring_scale --part prediction     # what a Llama 7B would take on one device

Appends one line to results/scoring_scale.jsonl.
"""

import argparse
import copy
import filecmp
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append
from benchmarks.scoring import load, make_batches, paper_loop
from fishmask import Mask, fisher
from fishmask.fisher import prepared
from fishmask.measure import environment

RESULTS = Path(__file__).parents[1] / "results" / "scoring_scale.jsonl"
SEED = 0
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

SHAPE_7B = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32}


def make_model(folder: Path, shape: dict[str, Any]) -> int:
    """Write a model with random weights in shards, a tokenizer of numbers, and a table of texts; return its entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16"))
    model.save_pretrained(folder, max_shard_size="600MB")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(shape["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="0").save_pretrained(folder)
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randint(1, shape["vocab_size"], (64, 512), generator=generator).tolist()
    lines = [json.dumps({"text": " ".join(map(str, row))}) for row in rows]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    for shard in folder.glob("*.safetensors"):  # so that the pages count for the process that will read them
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sum(p.numel() for p in model.parameters())


class Watched:
    """A command as a process of its own, its memory watched from outside.

    Attributes:
        output: Its stdout.
        facts: Seconds on the clock and of CPU, the most anonymous memory and the most with mapped pages, in bytes.
    """

    def __init__(
        self, arguments: list[Any], cgroup: Path | None, kill_when: Callable[[], bool] = lambda: False
    ) -> None:
        def enter() -> None:
            if cgroup is not None:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryFile() as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "fishmask", *map(str, arguments)], stdout=out, preexec_fn=enter
            )
            own = total = 0
            killed = False
            while child.poll() is None:
                found = memory(child.pid)
                own, total = max(own, found[0]), max(total, found[1])
                if not killed and kill_when():
                    killed = True
                    child.send_signal(signal.SIGKILL)
                time.sleep(0.1)
            out.seek(0)
            self.output = out.read().decode()
        if child.returncode != (-signal.SIGKILL if killed else 0):
            raise SystemExit(f"{arguments[0]} ended with {child.returncode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.facts = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(used, 1),
            "peak_anonymous_bytes": own,
            "peak_resident_bytes": total,
        }


def memory(pid: int) -> tuple[int, int]:
    """Return the anonymous and the resident bytes of a process; zeros when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    sizes = {line.split()[0].rstrip(":"): int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes.get("RssAnon", 0), sizes.get("VmRSS", 0)


def limit(cgroup: Path | None) -> int | None:
    """Return the limit of a memory cgroup in bytes."""
    files = [] if cgroup is None else [cgroup / "memory.limit_in_bytes", cgroup / "memory.max"]
    return next((int(file.read_text()) for file in files if file.exists()), None)


def main() -> None:
    """Run everything and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("run", "precision", "prediction"), default="run")
    parser.add_argument("--folder", type=Path, help="where to put the model and the scores; default: a temporary one")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--memory", default="1.1GB", help="for the running sums")
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--cgroup", type=Path, help="a memory cgroup with a limit for every process")
    args = parser.parse_args()
    if args.part == "run":
        with tempfile.TemporaryDirectory() as temporary:
            line = run(args, args.folder or Path(temporary))
    else:
        line = precision() if args.part == "precision" else prediction()
    line = {"part": args.part, "seed": SEED, **line, **environment()}
    append(RESULTS, [line])
    print(json.dumps(line, indent=2))


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, score, kill, go on, compare and select."""
    model, work = folder / "model", folder / "work"
    shape = {**SHAPE, "num_hidden_layers": args.layers, "vocab_size": args.vocabulary}
    entries = make_model(model, shape)
    torch.set_default_dtype(torch.float32)
    score = [
        *("score", model, model / "texts.jsonl", "--task", "lm", "--memory", args.memory, "--json"),
        *("--examples", args.examples, "--max-length", args.tokens, "--batch-size", args.batch_size),
    ]

    scored, undisturbed = folder / "scores.safetensors", folder / "undisturbed.safetensors"
    planned = Watched([*score, "--work", work, "--dry-run"], args.cgroup)
    killed = [
        Watched([*score, "--work", work, "-o", scored], args.cgroup, lambda found=found: any(work.glob(found))).facts
        for found in ("sums.safetensors", "scores-*.safetensors")
    ]
    resumed = Watched([*score, "--work", work, "-o", scored], args.cgroup)
    plain = Watched([*score, "--work", work, "-o", undisturbed], args.cgroup)
    same = filecmp.cmp(scored, undisturbed, shallow=False)
    undisturbed.unlink()
    select = ["mask", "select", scored, "--density", args.density, "-o", folder / "mask.safetensors", "--json"]
    selected = Watched(select, args.cgroup)
    return {
        "model": f"Llama, {args.layers} layers, {args.vocabulary:,} tokens, bfloat16",
        "entries": entries,
        "examples": args.examples,
        "tokens": args.tokens,
        "batch_size": args.batch_size,
        "memory": args.memory,
        "limit_bytes": limit(args.cgroup),
        "plan": json.loads(planned.output) | {"taken": planned.facts},
        "killed": killed,
        "resumed": resumed.facts,
        "undisturbed": plain.facts,
        "same_bits": same,
        # Without what comes before the first example: loading, and the plan.
        "cpu_seconds_per_example": (plain.facts["cpu_seconds"] - planned.facts["cpu_seconds"]) / args.examples,
        "select": selected.facts | {"density": args.density, "entries": json.loads(selected.output)["entries"]},
    }


def precision(examples: int = 32, tokens: int = 32, density: float = 0.005) -> dict[str, Any]:
    """Score MiniLM with bfloat16 weights, and compare with a loop in float64 on the same rounded weights."""
    half = load().bfloat16()
    exact, single = copy.deepcopy(half).double(), copy.deepcopy(half).float()
    batches = make_batches(half, examples, tokens, 8)
    truth = paper_loop(exact, batches)
    chosen = Mask.from_scores(truth, density)
    facts: dict[str, Any] = {}
    for name, model in (("bfloat16", half), ("float32", single)):
        found = fisher(model, batches, examples=examples)
        wrong = sum((found[n].double() - truth[n]).square().sum() for n in truth)
        facts[name] = {
            "relative_error": (wrong / sum(t.square().sum() for t in truth.values())).sqrt().item(),
            "overlap": Mask.from_scores(found, density).overlap(chosen),
        }
    shape = {"examples": examples, "tokens": tokens, "density": density}
    return {"model": "all-MiniLM-L6-v2, 2 classes", **shape, **facts}


def prediction(examples: int = 16, tokens: int = 128, layers: int = 32) -> dict[str, Any]:
    """Say what scoring a Llama 7B would take on one device; its layers are alike, so two of them tell of all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plans = []
    for count in (1, 2):
        with torch.device("meta"):
            config = LlamaConfig(**SHAPE_7B, num_hidden_layers=count, dtype="bfloat16")
            model = LlamaForCausalLM(config).bfloat16()
        model = model.to_empty(device="cpu").eval()
        generator = torch.Generator().manual_seed(SEED)
        for p in model.parameters():
            with torch.no_grad():
                p.fill_(1) if p.dim() == 1 else p.normal_(std=0.02, generator=generator)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no weights
        ids = torch.randint(SHAPE_7B["vocab_size"], (examples, tokens), generator=generator)
        with prepared(model, [{"input_ids": ids, "labels": ids}], examples=examples) as scoring:
            plans.append(scoring.plan())
    parts = ("entries", "weights_bytes", "sums_bytes", "working_bytes")
    one, two = ({part: getattr(plan, part) for part in parts} for plan in plans)
    whole = {part: one[part] + (layers - 1) * (two[part] - one[part]) for part in parts}
    total = sum(whole[part] for part in parts[1:])
    shape = {"examples_per_batch": examples, "tokens": tokens}
    return {"model": f"Llama 7B, {layers} layers, bfloat16", **shape, **whole, "device_bytes": total}


if __name__ == "__main__":
    main()
