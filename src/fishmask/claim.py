"""A folder of runs that belongs to one process at a time, to one base and to one set of data."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from fishmask.errors import FishError
from fishmask.publish import Lock, replace_file


@contextmanager
def claimed(folder: Path, inputs: Mapping[str, str]) -> Iterator[None]:
    """Hold a folder, made when missing, against other processes and against other inputs.

    Args:
        folder: The folder.
        inputs: What the runs depend on by name, such as the digest of the data of a task. They are written to
            ``inputs.json`` and compared when the folder is claimed again.

    Raises:
        FishError: Another process holds the folder, or an input is not what it was. Nothing has been changed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / "lock")
    lock.acquire()
    try:
        path = folder / "inputs.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        other = sorted(name for name, digest in inputs.items() if known.get(name, digest) != digest)
        if other:
            raise FishError(
                f"{folder} holds runs with another {', another '.join(other)}; name another folder for these"
            )
        replace_file(path, [json.dumps({**known, **inputs}, indent=2).encode(), b"\n"])
        yield
    finally:
        lock.release()


def digest_of_model(base: str) -> str:
    """Return the digest of a model folder's configuration and weights, or the name of a model on the hub."""
    folder = Path(base)
    if not folder.is_dir():
        return base
    digest = sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def digest_of(content: object) -> str:
    """Return the digest of anything that JSON can write."""
    return sha256(json.dumps(content).encode()).hexdigest()
