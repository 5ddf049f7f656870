"""The scores file: safetensors of one float32 tensor per parameter, with what they are in the metadata."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fishmask.errors import FishError


def write_scores(path: Path, scores: Mapping[str, Tensor], *, head: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write scores.

    Args:
        path: The file.
        scores: Scores by parameter name.
        head: Names of the parameters of a new head, to be kept whole by default.
        about: How the scores were made, as plain data.
    """
    # safetensors sorts its tensors; the order of the parameters breaks ties between scores, so it is kept beside them.
    texts = {"names": list(scores), "head": list(head), "about": dict(about)}
    metadata = {"format": "fishmask-scores"} | {name: json.dumps(value) for name, value in texts.items()}
    save_file({name: score.float().cpu().contiguous() for name, score in scores.items()}, path, metadata)


def read_scores(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read scores and the names of the head's parameters.

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
