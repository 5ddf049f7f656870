"""A small training that is killed: the processes that train, and the one that kills them.

``python -m tests.kill kills FOLDER SEED COUNT`` kills children that train, each at a random moment, and has the next
one go on from the log. ``python -m tests.kill writers FOLDER COUNT`` has children write to one log at the same time.
Both print what they saw as JSON. They fork, so they are programs of their own, with a single thread.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishmask.folder
from fishmask import CheckpointLog, Mask

PERIOD = 4  # steps with one mask
STEPS = 40  # of a training that is killed

Tell = Callable[..., Any]


class Training:
    """Dropout, BatchNorm, AdamW, a schedule, another mask every PERIOD steps, data from three generators."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 4))
        self.tuning = fishmask.attach(self.model, self.mask(0))
        self.optimizer = torch.optim.AdamW(self.tuning.parameters(), lr=0.05, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=1000)
        self.step = 0

    def mask(self, step: int) -> Mask:
        return Mask.random(self.model, 0.2, seed=step // PERIOD)

    def advance(self) -> None:
        """Train one step."""
        if self.step % PERIOD == 0:
            self.tuning.set_mask(self.mask(self.step), self.optimizer)
        x = torch.randn(4, 6) * random.uniform(0.5, 2) + np.random.standard_normal()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), torch.randint(4, (4,))).backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def commit(self, log: CheckpointLog, behind: bool = False) -> Any:
        """Commit, or have it committed behind the training."""
        method = log.commit_async if behind else log.commit
        return method(self.tuning, self.optimizer, step=self.step, state={"schedule": self.schedule})

    def resume(self, log: CheckpointLog, at: int | None = None) -> "Training":
        """Go on from a commit; whatever these objects held before must not matter."""
        self.step = log.restore(self.tuning, self.optimizer, state={"schedule": self.schedule}, at=at).step
        return self

    def digest(self) -> str:
        """Hash all that the next steps depend on."""
        sha = hashlib.sha256()
        _feed(sha, [self.step, self.model.state_dict(), list(self.tuning.named_parameters()), self.tuning.mask.digest])
        _feed(sha, [self.optimizer.state_dict(), self.schedule.state_dict()])
        _feed(sha, [torch.get_rng_state(), str(random.getstate()), np.random.get_state()])
        return sha.hexdigest()


def digest_of(folder: Path, at: int | None = None) -> str:
    """Return the digest of what a commit brings back; the generators of this process stay as they are."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        return Training(seed=1).resume(CheckpointLog(folder), at).digest()
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        _feed(sha, sorted(value.items()))
    elif isinstance(value, list | tuple):
        sha.update(f"[{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(f"{value!r};".encode())


def references(steps: int) -> list[str]:
    """Return the digests before the first and after every step of a training that nothing interrupts."""
    training = Training()
    digests = [training.digest()]
    for _ in range(steps):
        training.advance()
        digests.append(training.digest())
    return digests


# --- children ---------------------------------------------------------------------------------------------------------


def fork(work: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    """Run ``work(tell, ...)`` in a child and return its process id and where to read what it tells, line by line."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        work(lambda *words: os.write(writing, (" ".join(map(str, words)) + "\n").encode()), *arguments)
        status = 0
    except BaseException as error:
        os.write(writing, f"error {error!r}\n".encode())
    finally:
        os._exit(status)


def train(tell: Tell, folder: Path) -> None:
    """Train to the end, from where the log stands, and tell what is promised: only then may it not be lost."""

    def done(step: int, commit: Future[Any]) -> None:
        if commit.exception() is None:
            tell("done", step)

    with CheckpointLog(folder, keep_last=2, keep_every=10) as log:
        training = Training(seed=1)
        training = training.resume(log) if log.numbers else Training()
        tell("resumed", training.step, training.digest())
        while training.step < STEPS:
            training.advance()
            tell("commit", training.step)
            if training.step % 3:
                training.commit(log)
                tell("done", training.step)
            else:
                training.commit(log, behind=True).add_done_callback(partial(done, training.step))
            if training.step % 5 == 0:
                log.wait()
                tell("compact", training.step)
                log.compact()
                tell("compacted", training.step)
        log.wait()
        tell("finished", training.digest())


def write(tell: Tell, folder: Path, start: int, seed: int) -> None:
    """Wait for the start, then train another model and commit ten times."""
    os.read(start, 1)
    training = Training(seed)
    with CheckpointLog(folder) as log:
        for _ in range(10):
            training.advance()
            training.commit(log)
            tell("done", training.step, training.digest())


# --- the one that kills -----------------------------------------------------------------------------------------------


def lines(reading: int) -> Iterator[list[str]]:
    """Yield the words of each line until the child is gone."""
    with os.fdopen(reading) as file:
        for line in file:
            yield line.split()


def written_in_place(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file as a program does that thinks of nothing."""
    with path.open("wb", buffering=0) as file:
        for part in parts:
            file.write(part)
            time.sleep(0.001)


def kill(folder: Path, seed: int, kills: int, faulty: int = 0) -> Counter[str]:
    """Kill that many children, and count what the next ones find; with a fault in the log, until one finds it."""
    if faulty:
        fishmask.folder.publish = written_in_place
    chance, seen = random.Random(seed), Counter[str]()
    expected = references(STEPS)
    promised = 0
    while seen["killed"] < kills:
        child, reading = fork(train, folder / str(seen["finished"]))
        moment = chance.choice(("resumed", "commit", "commit", "compact"))
        delay = chance.uniform(0, 0.05 if moment == "resumed" else 0.015)
        skipped, alive, doing = chance.randrange(5) if moment == "commit" else 0, True, ""
        for word, *rest in lines(reading):
            if word == moment and alive:
                skipped -= 1
                if skipped < 0:
                    time.sleep(delay)
                    os.kill(child, signal.SIGKILL)
                    alive = False
            if word == "resumed":
                step, digest = int(rest[0]), rest[1]
                seen["lost"] += step < promised
                seen["wrong"] += digest != expected[step]
                seen["later than promised"] += step > promised
            elif word == "done":
                promised = int(rest[0])
            elif word == "finished":
                seen["finished"] += 1
                seen["wrong"] += rest[0] != expected[STEPS]
                promised = 0
            elif word == "error":
                print(*rest, file=sys.stderr)
                seen["errors"] += 1
            doing = word
        os.waitpid(child, 0)
        if doing not in ("finished", "error"):
            seen["killed"] += 1
            seen[f"killed after {doing}"] += 1
        if seen["errors"]:
            break
    return seen


def compete(folder: Path, count: int) -> list[list[list[str]]]:
    """Let children loose on one log; return what each told."""
    start, loose = os.pipe()
    children = [fork(write, folder, start, seed) for seed in range(count)]
    os.write(loose, b"." * count)
    told = [list(lines(reading)) for _, reading in children]
    for child, _ in children:
        os.waitpid(child, 0)
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *numbers = sys.argv[1:]
    act = {"kills": kill, "writers": compete}[what]
    print(json.dumps(act(Path(where), *map(int, numbers))))
