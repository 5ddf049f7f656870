"""The folder of a scoring that can be killed and go on: finished passes, and the sums of the one under way.

- ``about.json``: what is scored. Another scoring is refused.
- ``scores-N.safetensors``: the scores that a pass has finished; N counts the parameters before its first one.
- ``sums.safetensors``: the sums of the pass under way after a number of examples, saved from time to time.

Each file is written whole or not at all, so whatever is found after a crash counts.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.fingerprint import tensor_hash
from fishmask.publish import Lock, leftovers, make_folder, remove, replace_file
from fishmask.scorefile import score_bytes

SAVING = 0.03  # the share of the time that may go into saving sums
_ABOUT, _SUMS, _FORMAT = "about.json", "sums.safetensors", "fishmask-scoring-1"


class Progress(NamedTuple):
    """How far a pass has come: examples done, the engine that it uses, and the digests of the batches so far."""

    examples: int
    engine: str
    batches: list[str]


class ScoreFolder:
    """A folder that is being written by one scoring.

    Args:
        path: The folder; it is made if it is missing.
        about: What is scored, as plain data; it must be what an earlier scoring in this folder had.

    Attributes:
        done: The finished scores, mapped, by parameter name.
        batches: The digests of the batches that the finished passes, or the one under way, have seen.

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
            for file in sorted(path.glob("scores-*.safetensors")):
                metadata, tensors = _read(file)
                self.done |= tensors
                self.batches = json.loads(metadata["batches"])
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
        metadata, tensors = _read(self._path / _SUMS)
        if list(tensors) != list(totals):
            return None
        for name, tensor in tensors.items():
            totals[name].copy_(tensor)
        return Progress(int(metadata["examples"]), metadata["engine"], json.loads(metadata["batches"]))

    def under_way(self) -> list[str]:
        """Name the parameters whose sums were saved in the midst of a pass."""
        file = self._path / _SUMS
        names = list(_read(file)[1]) if file.exists() else []
        return [] if set(names) & set(self.done) else names

    def save(self, totals: Mapping[str, Tensor], progress: Progress) -> None:
        """Save sums in the midst of a pass, unless that would take too much of the time."""
        now = time.monotonic()
        if now - self._saved < self._took / SAVING:
            return
        replace_file(self._path / _SUMS, score_bytes(totals, _metadata(progress, totals)))
        self._saved = time.monotonic()
        self._took = self._saved - now

    def finish(self, totals: Mapping[str, Tensor], progress: Progress) -> None:
        """Keep the scores of a finished pass."""
        file = self._path / f"scores-{len(self.done):06}.safetensors"
        replace_file(file, score_bytes(totals, _metadata(progress, totals)))
        remove(self._path / _SUMS)
        self.done |= _read(file)[1]
        self.batches = progress.batches
        self._saved = time.monotonic()

    def close(self) -> None:
        """Let another scoring go on here."""
        self._lock.release()


def clear(path: Path) -> None:
    """Delete what a scoring left in its folder, and the folder if nothing else is in it."""
    for file in (*path.glob("scores-*.safetensors"), path / _SUMS, path / _ABOUT, path / "lock"):
        remove(file)
    if not any(path.iterdir()):
        path.rmdir()


def weights_digest(model: nn.Module) -> str:
    """Return SHA-256 (hex) over names and contents of a model's parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sha.update(f"{name}\t{tensor_hash(tensor)}\n".encode())
    return sha.hexdigest()


def _metadata(progress: Progress, totals: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "names": json.dumps(list(totals)),
        "examples": str(progress.examples),
        "engine": progress.engine,
        "batches": json.dumps(progress.batches),
    }


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map a file of this folder; its tensors come in the order of the parameters."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return metadata, {name: opened.get_tensor(name) for name in json.loads(metadata["names"])}
    except (SafetensorError, KeyError, ValueError) as error:
        raise FishError(f"{file} is damaged ({error}); delete it, and its pass is done again") from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
