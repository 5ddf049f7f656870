"""The page on a log's files suffices: a reader made from it alone, without fishmask, finds the same model."""

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from fishmask import CheckpointLog, container, tree
from tests.test_log import Training, change, scattered

DOCS = Path(__file__).parents[1] / "docs"
PAGE, OUTER = ((DOCS / name).read_text(encoding="utf-8") for name in ("checkpoint_format.md", "format.md"))
NUMBERS = {"F32": "<f4", "I64": "<i8", "U8": "u1"}


class File:
    """One file of a log: `digest`, `metadata`, `about` (the description) and `tensors`."""

    def __init__(self, folder: Path, kind: str, number: str, digest: str | None = None) -> None:
        data = (folder / f"{kind}-{int(number):08d}.safetensors").read_bytes()
        self.digest = data[35:99].decode()
        assert hashlib.sha256(data[:35] + b"0" * 64 + data[99:]).hexdigest() == self.digest
        assert digest in (None, self.digest)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        self.metadata = header.pop("__metadata__")
        assert (self.metadata["kind"], self.metadata["number"]) == (kind, number)
        self.tensors = {}
        for name, entry in header.items():
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            self.tensors[name] = np.frombuffer(data[start:end], NUMBERS[entry["dtype"]]).reshape(entry["shape"])
        self.about = json.loads(zstandard.decompress(self.tensors["parameters"].tobytes()))

    def below(self, prefix: str) -> dict[str, Any]:
        return {name[len(prefix) :]: held.copy() for name, held in self.tensors.items() if name.startswith(prefix)}

    def indices(self, tensor: str, coded: dict[str, Any]) -> dict[str, Any]:
        """Decode `tensor`, whose `k` and `planes` are in `coded`."""
        gaps, start = np.zeros(coded["k"], dtype=np.int64), 0
        for j, length in enumerate(coded["planes"]):
            if length:
                plane = zstandard.decompress(self.tensors[tensor][start : start + length].tobytes())
                gaps += np.frombuffer(plane, dtype=np.uint8).astype(np.int64) << 8 * j
                start += length
        places, found, start = np.cumsum(gaps + 1) - 1, {}, 0
        for name, shape in zip(self.about["names"], self.about["shapes"], strict=True):
            end = start + math.prod(shape)
            found[name] = places[(places >= start) & (places < end)] - start
            start = end
        return {name: index for name, index in found.items() if len(index)}

    def state(self, key: str) -> Any:
        data = zstandard.decompress(self.tensors["state"].tobytes())
        assert len(data) == self.about["state_bytes"]
        rest = memoryview(data)

        def value(packed: Any) -> Any:
            nonlocal rest
            if isinstance(packed, list):
                return [value(item) for item in packed]
            if not isinstance(packed, dict):
                return packed
            tag, content = next(iter(packed.items()), ("", None))
            if tag in ("!tensor", "!array", "!scalar"):
                dtype, size = np.dtype(content[0]), math.prod(content[1])
                taken, rest = rest[: size * dtype.itemsize], rest[size * dtype.itemsize :]
                return np.frombuffer(taken, dtype).reshape(content[1])
            if tag == "!bytes":
                taken, rest = rest[:content], rest[content:]
                return bytes(taken)
            if tag in ("!dict", "!counter"):
                return {value(name): value(item) for name, item in content}
            plain = {"!tuple": tuple, "!float": lambda text: struct.unpack("<d", bytes.fromhex(text))[0]}
            plain["!int"] = lambda text: int(text, 16)
            if tag in plain:
                return plain[tag](value(content))
            return {name: value(item) for name, item in packed.items()}

        found = value(self.about[key])
        assert not rest
        return found


def model_of(folder: Path) -> tuple[dict[str, Any], File]:
    number = max(int(path.name[7:-12]) for path in folder.glob("commit-*.safetensors"))
    commit = File(folder, "commit", str(number))
    chain = [File(folder, "segment", commit.metadata["segment"], commit.metadata["segment_digest"])]
    while "segment" in (metadata := chain[0].metadata):
        chain.insert(0, File(folder, "segment", metadata["segment"], metadata["segment_digest"]))
    base = File(folder, "base", metadata["base"], metadata["base_digest"])
    weights = base.below("weights/")
    for segment in chain:
        values = segment.below("values/")
        if segment.about["sealed"]["k"]:
            dtypes = dict(zip(segment.about["names"], segment.about["sealed"]["dtypes"], strict=True))
        for name, index in segment.indices("sealed", segment.about["sealed"]).items():
            taken, values[dtypes[name]] = np.split(values[dtypes[name]], [len(index)])
            weights[name].reshape(-1)[index] = taken
        assert all(not len(left) for left in values.values())
    values = commit.tensors["values"]
    for name, index in chain[-1].indices("indices", chain[-1].about).items():
        taken, values = np.split(values, [len(index)])
        weights[name].reshape(-1)[index] = taken
    assert not len(values)
    return weights | base.below("buffers/") | commit.state("state")["buffers"], commit


def test_a_reader_made_from_the_page_finds_the_model(tmp_path: Path) -> None:
    training = Training(scattered(1))
    extra = {"n": 1 << 20_000, "pair": (1, float("-inf")), "by": {3: b"xy"}, "list": [np.float64(0.5), {}]}
    with CheckpointLog(tmp_path) as log:
        for seed in (2, 3, 4):
            training.run(2).commit(log, seed, extra=extra)
            change(training, scattered(seed, 0.2))
        log.commit(training.run(1).tuning, training.optimizer, step=9, state={"extra": extra})
    found, commit = model_of(tmp_path)
    whole = training.model.state_dict()
    assert found.keys() == whole.keys() - {"again.weight"}  # another name of up.weight, which `aliases` tells
    assert {name: held.tobytes() for name, held in found.items()} == {
        name: whole[name].contiguous().numpy().tobytes() for name in found
    }
    assert (commit.metadata["step"], commit.metadata["mask"]) == ("9", training.tuning.mask.digest)
    held = commit.state("state")
    assert held["state"]["extra"] == extra
    moments = [training.optimizer.state[p]["exp_avg"].numpy() for p in training.tuning.parameters()]
    assert np.array_equal(commit.tensors["optimizer/exp_avg"], np.concatenate(moments))
    (group,) = held["optimizer"]["groups"]
    places = [place for first, count in group["members"] for place in range(first, first + count)]
    assert sorted(places) == list(range(len(moments)))
    assert held["optimizer"]["scalars"]["step"].tolist() == [
        float(training.optimizer.state[p]["step"]) for p in training.tuning.parameters()
    ]


def test_the_page_names_all_that_states_are_written_with() -> None:
    code = Path(tree.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'"(!\w+)"', code)) == set(re.findall(r"`(!\w+)`", PAGE))


@pytest.mark.parametrize("kind", ["base", "segment", "commit"])
def test_the_page_names_all_metadata_and_tensors(kind: str, tmp_path: Path) -> None:
    training = Training(scattered(1))
    with CheckpointLog(tmp_path) as log:
        training.run(1).commit(log)
        change(training, scattered(2))
        training.run(1).commit(log)
    path = sorted(tmp_path.glob(f"{kind}-*.safetensors"))[-1]
    content = container.read(path, kind)
    named = set(re.findall(r"`(\w+)(?:/\w+)?`", PAGE + OUTER))
    assert {name.split("/")[0] for name in content.tensors} <= named
    assert content.metadata.keys() <= named
    assert content.description.keys() <= named
