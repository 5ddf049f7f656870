"""The scores file: safetensors of one float32 tensor per parameter, with what they are in the metadata."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fishmask.errors import FishError
from fishmask.fingerprint import raw_bytes
from fishmask.publish import replace_file


def write_scores(path: Path, scores: Mapping[str, Tensor], *, head: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write scores, one tensor after the other; the path holds all of them or what it held before.

    Args:
        path: The file.
        scores: Scores by parameter name.
        head: Names of the parameters of a new head, to be kept whole by default.
        about: How the scores were made, as plain data.
    """
    # Readers sort the tensors; the order of the parameters breaks ties between scores, so it is kept beside them.
    texts = {"names": list(scores), "head": list(head), "about": dict(about)}
    metadata = {"format": "fishmask-scores"} | {name: json.dumps(value) for name, value in texts.items()}
    replace_file(path, score_bytes(scores, metadata))


def score_bytes(scores: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file of float32 tensors, each made when its turn comes."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, score in scores.items():
        start, end = end, end + 4 * score.numel()
        head[name] = {"dtype": "F32", "shape": list(score.shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for score in scores.values():
        yield raw_bytes(score.to(torch.float32))


def read_scores(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read scores and the names of the head's parameters.

    The tensors are mapped: their bytes are read from the file when they are used, and the system may drop them again.

    Raises:
        FishError: The file is not a scores file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "fishmask-scores":
                raise FishError(f"{path}: not a scores file; expected one written by `fishmask score`")
            names = json.loads(metadata["names"])
            return {name: file.get_tensor(name) for name in names}, json.loads(metadata["head"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise FishError(f"{path}: not a readable scores file ({error}); score again") from error
