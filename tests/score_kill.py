"""A scoring that is killed: ``python -m tests.score_kill FOLDER SEED`` kills it at random moments until it is done.

Each child kills itself with SIGKILL before a batch, before a file has its name, or before the name is durable. It
prints as JSON how often one was killed, how often one went on from saved sums, and whether the scores are to the bit
those of an undisturbed run. It forks, so it is a program of its own, with a single thread.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fishmask import fisher, publish, score_folder
from tests.cases import case

CASE = case("llama")
BATCHES = [CASE.batch(2, seed) for seed in range(4)]
MEMORY = 2048  # a few passes


class Batches:
    """Batches that are moments to die at."""

    def __iter__(self) -> Iterator[Any]:
        for batch in BATCHES:
            moment()
            yield batch


left = 0  # moments until the end


def moment() -> None:
    """Die if it is time."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def score(folder: Path, moments: int) -> None:
    """Score in a child that lives for so many moments."""
    global left
    left = moments
    score_folder.SAVING = 1e9  # save sums after every batch
    for name in ("_sync", "sync_directory"):
        plain = getattr(publish, name)
        setattr(publish, name, lambda at, plain=plain: (moment(), plain(at)))
    fisher(CASE.make(), Batches(), examples=8, memory=MEMORY, folder=folder)


def main(folder: Path, seed: int) -> None:
    """Kill children until one gets to the end."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    kills = resumed = 0
    while True:
        resumed += (folder / "sums.safetensors").exists()
        child = os.fork()
        if child == 0:
            score(folder, dice.randint(3, 25))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        dice.random()  # the parent's dice move on
        kills += 1
    found = fisher(CASE.make(), BATCHES, examples=8, memory=MEMORY, folder=folder)
    plain = fisher(CASE.make(), BATCHES, examples=8)
    same = list(found) == list(plain) and all(torch.equal(found[name], plain[name]) for name in plain)
    print(json.dumps({"status": status, "kills": kills, "resumed": resumed, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
