"""The file: damage of every kind, the page that describes it, index coding, atomic replacement."""

import hashlib
import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fishmask import FishError, Mask, container
from fishmask.delta import Delta

PAGE = Path(__file__).parents[1] / "docs" / "format.md"


def small_delta() -> Delta:
    """Mixed dtypes, an untouched parameter, one taken whole, one empty, a buffer, names beyond ASCII."""
    g = torch.Generator().manual_seed(0)
    base = {
        "a.weight": torch.randn(6, 50, generator=g),
        "b.weight": torch.randn(3, 4, generator=g).bfloat16(),
        "tête": torch.randn(3, generator=g),
        "frozen": torch.randn(2, generator=g),
        "scalar": torch.randn((), generator=g),
        "none": torch.empty(0),
        "count": torch.tensor(3),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["a.weight"].view(-1)[[0, 7, 8, 280]] = torch.tensor([1.0, -2.0, 3.5, float("nan")])
    tuned["b.weight"].view(-1)[[5, 11]] = torch.tensor([1.0, 2.0]).bfloat16()
    tuned["tête"] += 1
    tuned["count"] += 1
    return Delta.between(base, tuned, base_name="some/base", base_revision="abc")


def files(folder: Path) -> dict[str, bytes]:
    delta = small_delta()
    delta.save(folder / "coded")
    delta.save(folder / "raw", indices="raw")
    delta.mask.save(folder / "mask")
    return {name: (folder / name).read_bytes() for name in ("coded", "raw", "mask")}


def load(path: Path) -> object:
    return Mask.load(path) if path.name == "mask" else Delta.load(path)


@pytest.mark.parametrize(("letters", "level"), [(60_000, 19), (70_000, 3)])
def test_a_long_description_is_not_compressed_for_long(letters, level, monkeypatch):
    levels, compress = [], container.compress
    monkeypatch.setattr(container, "compress", lambda data, level: levels.append(level) or compress(data, level))
    description = {"log": "x" * letters}
    assert container.serialise("mask", container.Content({}, description, {}))[0]
    assert levels == [level]


def signed(data: bytes) -> bytes:
    """Make the digest right again."""
    digest = hashlib.sha256(data[:35] + b"0" * 64 + data[99:]).hexdigest()
    return data[:35] + digest.encode() + data[99:]


def rebuilt(data: bytes, header: dict[str, object]) -> bytes:
    """Put another header in front of the data."""
    (size,) = struct.unpack_from("<Q", data)
    text = json.dumps(header, separators=(",", ":")).encode()
    return signed(struct.pack("<Q", len(text)) + text + data[8 + size :])


def header_of(data: bytes) -> dict[str, dict[str, object]]:
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size])


@pytest.fixture(params=["coded", "raw", "mask"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bytes]:
    return tmp_path / request.param, files(tmp_path)[request.param]


def refused(path: Path, data: bytes | None = None) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FishError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_found(file: tuple[Path, bytes]) -> None:
    path, data = file
    with path.open("r+b", buffering=0) as handle:
        for place, byte in enumerate(data):
            for value in (byte ^ 0x01, byte ^ 0x20, byte ^ 0xFF, byte):
                handle.seek(place)
                handle.write(bytes([value]))
                if value != byte:
                    refused(path)
    load(path)


def test_every_truncation_is_found(file: tuple[Path, bytes]) -> None:
    path, data = file
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        refused(path)


def test_appended_bytes_are_found(file: tuple[Path, bytes]) -> None:
    path, data = file
    for tail in (b"\0", b" ", data):
        refused(path, data + tail)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_well_signed_file_full_of_nonsense_is_refused_or_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(["coded", "raw", "mask"]))
    broken = bytearray(_cached(folder)[name])
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(99, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = folder / name
    path.write_bytes(signed(bytes(broken)))
    try:
        load(path)
    except FishError as error:
        assert str(path) in str(error)


_FILES: dict[str, bytes] = {}


def _cached(folder: Path) -> dict[str, bytes]:
    if not _FILES:
        _FILES.update(files(folder))
    return _FILES


def test_other_files_are_no_fishmask_files(tmp_path: Path) -> None:
    other = safetensors.torch.save({"w": torch.zeros(100)}, {"format": "pt"})
    for data in (b"", b"\0" * 7, b"\0" * 300, b"PK\3\4" + b"x" * 300, other):
        assert "is not a fishmask file" in refused(tmp_path / "delta", data)


def test_an_absurd_header_length_is_refused(file: tuple[Path, bytes]) -> None:
    path, data = file
    for size in (0, 1, 89, len(data), 2**63, 2**64 - 1):
        refused(path, signed(struct.pack("<Q", size) + data[8:]))


def test_a_newer_version_asks_for_an_upgrade(file: tuple[Path, bytes]) -> None:
    path, data = file
    header = header_of(data)
    header["__metadata__"]["version"] = "2"
    assert "newer than this fishmask reads (1); upgrade" in refused(path, rebuilt(data, header))


def test_another_kind_is_named(file: tuple[Path, bytes]) -> None:
    path, data = file
    header = header_of(data)
    header["__metadata__"]["kind"] = "log"
    assert "holds a log, not a" in refused(path, rebuilt(data, header))


@pytest.mark.parametrize("key", ["format", "version", "kind", "mask"])
def test_missing_metadata_is_refused(file: tuple[Path, bytes], key: str) -> None:
    path, data = file
    header = header_of(data)
    del header["__metadata__"][key]
    assert "faulty program" in refused(path, rebuilt(data, header))


def test_another_mask_than_the_header_names_is_refused(file: tuple[Path, bytes]) -> None:
    path, data = file
    header = header_of(data)
    header["__metadata__"]["mask"] = "0" * 64
    assert "parts disagree" in refused(path, rebuilt(data, header))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1]},
        {"shape": [2**62, 2**62]},
        {"dtype": "F4"},
        {"data_offsets": [-4, 4]},
        {"data_offsets": [8, 4]},
        {"data_offsets": [0, 10**12]},
        {"data_offsets": "all"},
    ],
)
def test_impossible_tensors_are_refused(file: tuple[Path, bytes], change: dict[str, object]) -> None:
    path, data = file
    header = header_of(data)
    header["parameters"] |= change
    refused(path, rebuilt(data, header))


def test_offsets_are_not_counted_from_the_end(file: tuple[Path, bytes]) -> None:
    path, data = file
    header = header_of(data)
    total = len(data) - 8 - struct.unpack_from("<Q", data)[0]
    first = next(t for name, t in header.items() if name != "__metadata__" and t["data_offsets"][0] == 0)
    first["data_offsets"] = [offset - total for offset in first["data_offsets"]]
    refused(path, rebuilt(data, header))


@pytest.mark.parametrize(
    "change",
    [
        {"names": [1, 2, 3, 4, 5, 6]},
        {"names": ["a.weight"]},
        {"shapes": [[1]] * 6},
        {"shapes": None},
        {"fingerprints": "abc"},
        {"fingerprints": "-" * 36},
        {"k": 3},
        {"planes": [[1]]},
        {"dtypes": ["F32"] * 6},
    ],
    ids=str,
)
def test_impossible_descriptions_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "coded"
    small_delta().save(path)
    content = container.read(path, "delta")
    container.write(path, "delta", content._replace(description=content.description | change))
    assert "faulty program" in refused(path)


def test_a_frame_that_promises_too_much_is_refused_unopened(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    packed = container.bytes_tensor(bomb)
    with pytest.raises(ValueError, match="16777216 bytes where at most 10 were expected"):
        container.decode_indices(packed, [len(bomb)], 10, {"w": 100})


# --- the page ---------------------------------------------------------------------------------------------------------


def read_by_the_page(data: bytes) -> tuple[dict, dict, dict[str, list[int]], dict[str, bytes], dict[str, bytes]]:
    """Read a file with what docs/format.md says, and nothing of fishmask."""
    assert data[8:35] == b'{"__metadata__":{"digest":"'
    assert data[35:99].decode() == hashlib.sha256(data[:35] + b"0" * 64 + data[99:]).hexdigest()
    scope: dict[str, object] = {"json": json, "np": np, "zstandard": zstandard, "data": data}
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    about_start, about_end = header["parameters"]["data_offsets"]
    about = json.loads(zstandard.decompress(data[8 + size + about_start : 8 + size + about_end]))
    body = {n: data[8 + size :][slice(*t["data_offsets"])] for n, t in header.items() if n != "__metadata__"}
    indices: dict[str, list[int]] = {}
    values: dict[str, bytes] = {}
    if "indices" in header:
        exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], scope)  # the page's own example
        places = scope["places"].tolist()
        sizes = [math.prod(shape) for shape in about["shapes"]] if "shapes" in about else about["sizes"]
        start, used = 0, dict.fromkeys(body, 0)
        for i, (name, entries) in enumerate(zip(about["names"], sizes, strict=True)):
            if own := [place - start for place in places if start <= place < start + entries]:
                indices[name] = own
                if "dtypes" in about:
                    source = f"values/{about['dtypes'][i]}"
                    width = len(own) * {"F32": 4, "BF16": 2}[about["dtypes"][i]]
                    values[name] = body[source][used[source] : used[source] + width]
                    used[source] += width
            start += entries
    else:
        for name in body:
            if name.startswith("indices/"):
                assert header[name]["dtype"] == "I32"
                indices[name[8:]] = np.frombuffer(body[name], "<i4").tolist()
                values[name[8:]] = body["values/" + name[8:]]
    return header["__metadata__"], about, indices, values, {n[8:]: b for n, b in body.items() if n[:8] == "buffers/"}


def test_the_page_suffices_to_read_a_file(file: tuple[Path, bytes]) -> None:
    path, data = file
    delta = small_delta()
    metadata, about, indices, values, buffers = read_by_the_page(data)
    kind = "mask" if path.name == "mask" else "delta"
    assert (metadata["format"], metadata["version"], metadata["kind"]) == ("fishmask", "1", kind)
    assert indices == {name: i.tolist() for name, i in delta.mask.indices.items()}
    assert dict(zip(about["names"], map(tuple, about["shapes"]), strict=True)) == delta.mask.shapes
    assert about["k"] == delta.k == 9
    sha = hashlib.sha256()
    for name in sorted(indices):
        raw = name.encode()
        sha.update(struct.pack("<Q", len(raw)) + raw + struct.pack("<Q", len(indices[name])))
        sha.update(struct.pack(f"<{len(indices[name])}q", *indices[name]))
    assert metadata["mask"] == sha.hexdigest() == delta.mask.digest
    if path.name == "mask":
        return
    assert values == {name: held.view(torch.uint8).numpy().tobytes() for name, held in delta.values.items()}
    assert buffers == {"count": struct.pack("<q", 4)}
    assert (metadata["base_name"], metadata["base_revision"]) == ("some/base", "abc")
    hashes = page_hashes()
    assert about["fingerprints"] == "".join(hashes.get(name, "------")[:6] for name in about["names"])
    lines = "".join(f"{name}\t{hashes[name]}\n" for name in sorted(hashes))
    assert metadata["base"] == hashlib.sha256(lines.encode()).hexdigest()


def page_hashes() -> dict[str, str]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 50, generator=g), torch.randn(3, 4, generator=g).bfloat16()
    torch.randn(3, generator=g)  # "tête" is taken whole
    frozen, scalar = torch.randn(2, generator=g), torch.randn((), generator=g)
    raw = {
        "a.weight": b"float32 [6, 50]\n" + a.numpy().tobytes(),
        "b.weight": b"bfloat16 [3, 4]\n" + b.view(torch.int16).numpy().tobytes(),
        "frozen": b"float32 [2]\n" + frozen.numpy().tobytes(),
        "scalar": b"float32 []\n" + scalar.numpy().tobytes(),
        "none": b"float32 [0]\n",
    }
    return {name: hashlib.sha256(text).hexdigest() for name, text in raw.items()}


def test_the_page_reads_a_mask_without_shapes(tmp_path: Path) -> None:
    Mask.from_indices({"w": [2, 900], "v": [70_000]}).save(tmp_path / "mask")
    _, about, indices, _, _ = read_by_the_page((tmp_path / "mask").read_bytes())
    assert indices == {"w": [2, 900], "v": [70_000]}
    assert "shapes" not in about


def test_raw_files_need_nothing_but_safetensors(tmp_path: Path) -> None:
    delta = small_delta()
    delta.save(tmp_path / "raw", indices="raw")
    tensors = safetensors.torch.load_file(tmp_path / "raw")
    for name, indices in delta.mask.indices.items():
        assert torch.equal(tensors[f"indices/{name}"].long(), indices)
        assert torch.equal(tensors[f"values/{name}"].view(torch.uint8), delta.values[name].view(torch.uint8))


def test_coded_files_open_with_safetensors(tmp_path: Path) -> None:
    small_delta().save(tmp_path / "coded")
    with safetensors.safe_open(tmp_path / "coded", "pt") as file:
        assert file.metadata()["kind"] == "delta"
        assert set(file.keys()) == {"parameters", "indices", "values/F32", "values/BF16", "buffers/count"}


def test_the_page_is_one_page() -> None:
    assert len(PAGE.read_text().splitlines()) <= 110


# --- index coding -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_coded_indices_come_back(data: st.DataObject) -> None:
    sizes = data.draw(
        st.dictionaries(st.text(max_size=3), st.sampled_from([0, 1, 3, 300, 70_000, 2**33, 2**45]), max_size=4)
    )
    indices = {}
    for name, size in sizes.items():
        if size and (
            own := data.draw(st.sets(st.integers(0, size - 1) | st.integers(0, min(size, 6) - 1), max_size=9))
        ):
            indices[name] = torch.tensor(sorted(own))
    packed, lengths = container.encode_indices(indices, sizes)
    k = sum(map(len, indices.values()))
    back = container.decode_indices(packed, lengths, k, sizes)
    assert {n: i.tolist() for n, i in back.items()} == {n: i.tolist() for n, i in indices.items()}


def test_planes_of_zeros_cost_nothing() -> None:
    assert container.encode_indices({"w": torch.arange(1000)}, {"w": 1000})[1] == []
    every_256th = torch.arange(0, 256 * 300, 257)
    lengths = container.encode_indices({"w": every_256th}, {"w": 256 * 300})[1]
    assert lengths[0] == 0
    assert len(lengths) == 2


@pytest.mark.parametrize("k", [-1, 1, 3, 101])
def test_another_count_of_indices_is_refused(k: int) -> None:
    packed, lengths = container.encode_indices({"w": torch.tensor([5, 9])}, {"w": 100})
    with pytest.raises(ValueError):
        container.decode_indices(packed, lengths, k, {"w": 100})


def test_places_beyond_the_end_are_refused() -> None:
    packed, lengths = container.encode_indices({"w": torch.tensor([5, 99])}, {"w": 100})
    with pytest.raises(ValueError, match="out of range"):
        container.decode_indices(packed, lengths, 2, {"w": 99})
    planes = [zstandard.compress(bytes([255] * 2))] * 8  # two gaps of 2^64 - 1: their sum runs over
    with pytest.raises(ValueError, match="out of range"):
        container.decode_indices(container.bytes_tensor(b"".join(planes)), [*map(len, planes)], 2, {"w": 99})


def test_places_that_run_backwards_are_refused() -> None:
    gaps = np.array([5, -3], dtype="<i8").view(np.uint8).reshape(2, 8)
    planes = [zstandard.compress(gaps[:, j].tobytes()) for j in range(8)]
    with pytest.raises(ValueError, match="out of range"):
        container.decode_indices(container.bytes_tensor(b"".join(planes)), [*map(len, planes)], 2, {"w": 99})


def test_planes_are_single_frames_with_a_checksum() -> None:
    packed, (length,) = container.encode_indices({"w": torch.tensor([5, 9])}, {"w": 100})
    data = packed.numpy().tobytes()
    assert zstandard.get_frame_parameters(data).has_checksum
    with pytest.raises(ValueError):
        container.decode_indices(container.bytes_tensor(data + b"more"), [length + 4], 2, {"w": 100})


def test_raw_indices_are_wide_only_where_needed() -> None:
    assert container.narrow(torch.tensor([0, 2**31 - 1])).dtype == torch.int32
    assert container.narrow(torch.tensor([0, 2**31])).dtype == torch.int64


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["fsync", "write", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "delta"
    small_delta().save(path)
    before = path.read_bytes()

    def full(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    def half(handle: int, data: memoryview) -> int:
        write(handle, data[:10])
        return full()

    write = os.write
    owner, name, broken = {
        "fsync": (os, "fsync", full),
        "write": (os, "write", half),
        "replace": (Path, "replace", full),
    }[fault]
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(OSError, match="No space left"):
        small_delta().mask.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


def test_the_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        target = Path(f"/proc/self/fd/{handle}").readlink()
        events.append("folder" if target.is_dir() else f"file of {target.stat().st_size}")
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    small_delta().save(tmp_path / "delta")
    assert events == [f"file of {(tmp_path / 'delta').stat().st_size}", "rename", "folder"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        small_delta().save(tmp_path / "delta")
    finally:
        os.umask(before)
    assert (tmp_path / "delta").stat().st_mode & 0o777 == 0o640


def test_equal_deltas_make_equal_files(tmp_path: Path) -> None:
    small_delta().save(tmp_path / "one")
    small_delta().save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tensors_lie_aligned(tmp_path: Path) -> None:
    for data in files(tmp_path).values():
        (size,) = struct.unpack_from("<Q", data)
        assert size % 8 == 0
        widths = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8, "U8": 1}
        tensors = [t for name, t in header_of(data).items() if name != "__metadata__"]
        assert all(t["data_offsets"][0] % widths[t["dtype"]] == 0 for t in tensors)
