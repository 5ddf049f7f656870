"""The folder of a scoring that can be killed and go on: finished passes, and the sums of the one under way.

- ``about.json``: what is scored. Another scoring is refused.
- ``scores-N.safetensors``: the scores that a pass has finished; N is the first number that is free.
- ``sums.safetensors``: the sums of the pass under way after a number of examples, saved from time to time.

Each file is written whole or not at all, so whatever is found after a crash counts. Scores and sums have a digest of
all that they hold, which is compared whenever a file is found.
"""

import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fishmask.errors import FishError
from fishmask.identity import tensors_digest
from fishmask.publish import Lock, leftovers, make_folder, remove, replace_file
from fishmask.scorefile import score_bytes

SAVING = 0.03  # the share of the time that may go into saving sums
_ABOUT, _SUMS, _FORMAT = "about.json", "sums.safetensors", "fishmask-scoring-2"
_SCORES = re.compile(r"scores-\d{6}\.safetensors")


class Progress(NamedTuple):
    """How far a pass has come.

    Attributes:
        examples: How many examples are done.
        engine: The engine that it uses.
        batches: The digests of the batches so far.
        first: Mean and root mean square of what the model, or the loss, gives for each of the first examples.
    """

    examples: int
    engine: str
    batches: list[str]
    first: list[float]


class ScoreFolder:
    """A folder that is being written by one scoring.

    Args:
        path: The folder; it is made if it is missing.
        about: What is scored, as plain data; it must be what an earlier scoring in this folder had.

    Attributes:
        done: The finished scores, mapped, by parameter name.
        batches: The digests of the batches that the finished passes have seen.
        first: What these have found for the first examples, as in `Progress`.

    Raises:
        FishError: Another scoring is in the folder, or a file is damaged.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        make_folder(path)
        self._path, self._lock = path, Lock(path / "lock")
        self._lock.acquire()
        try:
            for temporary in leftovers(path):
                remove(temporary)
            self._claim({"format": _FORMAT, **about})
            self.done: dict[str, Tensor] = {}
            self.batches: list[str] = []
            self.first: list[float] = []
            for file in _finished(path):
                metadata, tensors = _verified(file)
                self.done |= tensors
                self.batches, self.first = json.loads(metadata["batches"]), json.loads(metadata["first"])
        except BaseException:
            self._lock.release()
            raise
        self._saved, self._took = time.monotonic(), 0.0

    def _claim(self, about: dict[str, Any]) -> None:
        """Say what is scored here, or compare with what an earlier scoring has said."""
        file = self._path / _ABOUT
        text = json.dumps(about, indent=2)
        if not file.exists():
            if any(self._path.glob("*.safetensors")):
                raise FishError(f"{self._path} holds other files; name a new folder for the scoring")
            replace_file(file, [text.encode()])
            return
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            differing = [key for key in {**earlier, **about} if earlier.get(key) != json.loads(text).get(key)]
        except (ValueError, AttributeError) as error:
            raise FishError(f"{file} is damaged ({error}); delete the folder and score again") from error
        if differing:
            told = ", ".join(
                f"{key} ({_short(earlier.get(key))} there, {_short(about.get(key))} now)" for key in differing
            )
            raise FishError(
                f"{self._path} holds the beginnings of another scoring: other {told}; go on with that one, delete the "
                "folder, or name another"
            )

    def resume(self, totals: Mapping[str, Tensor]) -> Progress | None:
        """Put the saved sums of a pass into ``totals``, if these are the parameters that were saved."""
        if not (self._path / _SUMS).exists():
            return None
        metadata, tensors = _verified(self._path / _SUMS)
        if list(tensors) != list(totals):
            return None
        for name, tensor in tensors.items():
            totals[name].copy_(tensor)
        batches, first = json.loads(metadata["batches"]), json.loads(metadata["first"])
        return Progress(int(metadata["examples"]), metadata["engine"], batches, first)

    def under_way(self) -> list[str]:
        """Name the parameters whose sums were saved in the midst of a pass."""
        file = self._path / _SUMS
        names = list(_verified(file)[1]) if file.exists() else []
        return [] if set(names) & set(self.done) else names

    def save(self, totals: Mapping[str, Tensor], progress: Progress) -> None:
        """Save sums in the midst of a pass, unless that would take too much of the time."""
        now = time.monotonic()
        if now - self._saved < self._took / SAVING:
            return
        _write(self._path / _SUMS, totals, progress)
        self._saved = time.monotonic()
        self._took = self._saved - now

    def finish(self, totals: Mapping[str, Tensor], progress: Progress) -> None:
        """Keep the scores of a finished pass."""
        files = (self._path / f"scores-{number:06}.safetensors" for number in itertools.count())
        file = next(file for file in files if not file.exists())
        _write(file, totals, progress)
        remove(self._path / _SUMS)
        self.done |= _read(file)[1]
        self.batches, self.first = progress.batches, progress.first
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Delete what the scoring has left here, and the folder if nothing else is in it; others may begin anew."""
        lock = self._path / "lock"
        for file in (*_finished(self._path), self._path / _SUMS, self._path / _ABOUT, lock):
            remove(file)
        self.close()
        remove(lock)  # where a file that is open cannot be deleted
        with contextlib.suppress(OSError):  # something else is in it, or somebody came at once
            self._path.rmdir()

    def close(self) -> None:
        """Let another scoring go on here."""
        self._lock.release()


def _finished(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("scores-*") if _SCORES.fullmatch(file.name))


def _write(file: Path, totals: Mapping[str, Tensor], progress: Progress) -> None:
    """Write sums or scores, and how far they are, with a digest of it all."""
    metadata = {
        "format": _FORMAT,
        "names": json.dumps(list(totals)),
        "examples": str(progress.examples),
        "engine": progress.engine,
        "batches": json.dumps(progress.batches),
        "first": json.dumps(progress.first),
    }
    replace_file(file, score_bytes(totals, {**metadata, "digest": _digest(metadata, totals)}))


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    told = json.dumps(dict(metadata), sort_keys=True)
    return hashlib.sha256(f"{told}\n{tensors_digest(tensors.items())}".encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map a file of this folder; its tensors come in the order of the parameters."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return metadata, {name: opened.get_tensor(name) for name in json.loads(metadata["names"])}
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise FishError(f"{file} is damaged ({error}); delete it, and its pass is done again") from error


def _verified(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map a file of this folder that was found, after comparing its digest."""
    metadata, tensors = _read(file)
    if metadata.pop("digest", None) != _digest(metadata, tensors):
        raise FishError(
            f"{file} is damaged: its content does not match its digest; delete it, and its pass is done again"
        )
    return metadata, tensors


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
