import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import fishmask
import fishmask.fingerprint
from fishmask import Delta, FishError, Mask, export_delta, import_delta
from fishmask.cli import app
from fishmask.fingerprint import raw_bits
from fishmask.peft_files import KINDS
from tests import tiny
from tests.cases import case

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

QUERY, VALUE = (f"bert.encoder.layer.{i}.attention.self.{part}.weight" for i, part in ((0, "query"), (1, "value")))
UP, DOWN = (f"bert.encoder.layer.0.{part}.dense.weight" for part in ("intermediate", "output"))
NORM = "bert.embeddings.LayerNorm.bias"
HEAD = ("classifier.weight", "classifier.bias")
WORDS = "bert.embeddings.word_embeddings.weight"


def bert(dtype: torch.dtype = torch.float32) -> Any:
    return case("bert").make().to(dtype)


def chosen(counts: dict[str, int], dtype: torch.dtype = torch.float32) -> Delta:
    """Choose so many entries of some parameters at random; their values differ a little from the base's."""
    generator = torch.Generator().manual_seed(7)
    base = bert(dtype)
    indices, values = {}, {}
    for name, count in counts.items():
        flat = base.get_parameter(name).detach().view(-1)
        indices[name] = torch.randperm(len(flat), generator=generator)[:count].sort().values
        noise = torch.randn(count, generator=generator) / 4
        values[name] = (flat[indices[name]].float() * (1 + noise) + noise / 8).to(dtype)
    mask = Mask.from_indices(indices, base)
    return Delta(mask, values, base=fishmask.delta.fingerprint(base.named_parameters(), mask), base_name="tiny")


def whole(names: tuple[str, ...] = HEAD) -> dict[str, int]:
    return {name: bert().get_parameter(name).numel() for name in names}


def bits(model: nn.Module | dict[str, Tensor]) -> dict[str, Any]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: raw_bits(tensor).tolist() for name, tensor in state.items()}


def differing(first: nn.Module, second: nn.Module) -> int:
    """Count the entries whose bits differ."""
    other = second.state_dict()
    return sum(int((raw_bits(t) != raw_bits(other[name])).sum()) for name, t in first.state_dict().items())


def applied(delta: Delta, dtype: torch.dtype = torch.float32) -> Any:
    model = bert(dtype)
    delta.apply(model)
    return model


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    logits: Tensor = model(**case("bert").batch(6, 1)).logits
    return logits


# --- PEFT -------------------------------------------------------------------------------------------------------------

FITTING = {
    "shira": {QUERY: 32, VALUE: 32, UP: 48, DOWN: 48},  # r = 2: 2 × (8 + 8) and 2 × (8 + 16)
    "supertuning": {QUERY: 19, VALUE: 19, UP: 38, DOWN: 38},  # 19/64 and 38/128 both round down from one share
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", KINDS)
def test_peft_computes_with_an_exported_delta_what_fishmask_does(to: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    delta = chosen(FITTING[to] | whole(), dtype)
    done = export_delta(delta, to, tmp_path / "adapter", base=bert(dtype))
    assert (done.entries, done.padded) == (delta.k, 0)
    adapted = peft.PeftModel.from_pretrained(bert(dtype), tmp_path / "adapter").eval()
    wanted = outputs(applied(delta, dtype))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(outputs(adapted), wanted, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(outputs(bert(dtype)), wanted, rtol=0.1, atol=0.1)
    with adapted.disable_adapter():
        assert torch.equal(outputs(adapted), outputs(bert(dtype)))
    # PEFT's own merge gives the weights that we said it would: all but the inexact ones are the delta's.
    assert differing(adapted.merge_and_unload(), applied(delta, dtype)) == done.inexact < delta.k / 4


@pytest.mark.parametrize(
    ("to", "entry_bytes", "counts", "needed"),
    [("shira", 12, (30, 31, 45, 40), (32, 32, 48, 48)), ("supertuning", 8, (10, 11, 20, 22), (11, 11, 22, 22))],
)
def test_counts_that_do_not_fit_are_refused_or_padded(
    to: Any, entry_bytes: int, counts: tuple[int, ...], needed: tuple[int, ...], tmp_path: Path
) -> None:
    names = (QUERY, VALUE, UP, DOWN)
    delta = chosen(dict(zip(names, counts, strict=True)))
    with pytest.raises(FishError, match="one setting for all layers") as refused:
        export_delta(delta, to, tmp_path / "adapter", base=bert())
    for name, has, wanted in zip(names, counts, needed, strict=True):
        assert f"{name} has {has} entries, needs {wanted}" in str(refused.value)
    assert not (tmp_path / "adapter").exists()
    done = export_delta(delta, to, tmp_path / "adapter", base=bert(), pad=True)
    assert (done.entries, done.padded) == (delta.k, sum(needed) - delta.k)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == entry_bytes * sum(needed)
    adapted = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(adapted), outputs(applied(delta)), rtol=1e-6, atol=1e-6)
    back = import_delta(tmp_path / "adapter", base=bert())
    assert (delta.mask - back.mask).k == 0
    assert differing(applied(back), applied(delta)) == done.inexact < delta.k / 4
    assert back.base_name == "tiny"


@pytest.mark.parametrize("to", KINDS)
def test_what_is_no_linear_weight_is_refused_or_stored_whole(to: Any, tmp_path: Path) -> None:
    delta = chosen({QUERY: 10, NORM: 3, WORDS: 9, UP: 8, UP.replace("weight", "bias"): 2} | whole())
    with pytest.raises(FishError, match="these do not fit") as refused:
        export_delta(delta, to, tmp_path / "adapter", base=bert())
    for part in (f"{NORM} (3 of its entries; LayerNorm", f"{WORDS} (9 of", "intermediate.dense.bias (2", f"{UP} (8"):
        assert part in str(refused.value)
    assert QUERY not in str(refused.value)
    done = export_delta(delta, to, tmp_path / "adapter", base=bert(), pad=True)
    model = bert()
    stored = ("bert.embeddings.LayerNorm", "bert.embeddings.word_embeddings", UP.removesuffix(".weight"), "classifier")
    assert done.padded >= sum(p.numel() for path in stored for p in model.get_submodule(path).parameters()) - delta.k
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(adapted), outputs(applied(delta)), rtol=1e-6, atol=1e-6)
    with adapted.disable_adapter():
        assert torch.equal(outputs(adapted), outputs(bert()))
    assert differing(applied(import_delta(tmp_path / "adapter", base=bert())), applied(delta)) == done.inexact < 5


def test_one_dense_layer_does_not_make_all_layers_large(tmp_path: Path) -> None:
    delta = chosen({QUERY: 2, VALUE: 2, UP: 3, DOWN: 127})
    done = export_delta(delta, "supertuning", tmp_path / "adapter", base=bert(), pad=True)
    assert done.padded < 20  # the dense layer is stored whole: its last entry and eight of its bias
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == [
        DOWN.removesuffix(".weight")
    ]
    adapted = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(adapted), outputs(applied(delta)), rtol=1e-6, atol=1e-6)


class Namesakes(nn.Module):
    """A head whose name is the end of another module's, as in DistilBERT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.pre_head, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pre_head(self.body(x)).tanh())


def test_modules_whose_names_end_alike_are_refused_or_stored_too(tmp_path: Path) -> None:
    base, tuned = Namesakes(), Namesakes()
    with torch.no_grad():
        tuned.body.weight.view(-1)[:12] += 1
        for p in tuned.head.parameters():
            p += 1
    delta = Delta.between(base, tuned)
    with pytest.raises(FishError, match="pre_head for head"):
        export_delta(delta, "shira", tmp_path, base=base)
    export_delta(delta, "shira", tmp_path, base=base, pad=True)
    adapted = peft.PeftModel.from_pretrained(Namesakes(), tmp_path).eval()
    x = torch.randn(5, 6)
    torch.testing.assert_close(adapted(x), tuned(x))


def test_buffers_of_modules_stored_whole_go_along(tmp_path: Path) -> None:
    base, tuned = case("conv").make(), case("conv").make()
    with torch.no_grad():
        tuned.head.weight.view(-1)[:11] += 1
        tuned.norm.weight += 1
        tuned.norm.running_mean += 1
    delta = Delta.between(base, tuned)
    with pytest.raises(FishError, match=r"norm.running_mean \(8 of its entries; BatchNorm2d, not whole\)"):
        export_delta(delta, "supertuning", tmp_path, base=base)
    export_delta(delta, "supertuning", tmp_path, base=base, pad=True)
    adapted = peft.PeftModel.from_pretrained(case("conv").make(), tmp_path).eval()
    images = case("conv").batch(4, 0)[0]
    torch.testing.assert_close(adapted(images), tuned(images))
    back = case("conv").make()
    import_delta(tmp_path, base=base).apply(back)
    assert bits(back) == bits(tuned)


def test_tied_weights_and_deltas_of_heads_alone_are_refused(tmp_path: Path) -> None:
    base, tuned = case("gpt2").make(), case("gpt2").make()
    with torch.no_grad():
        tuned.get_parameter("transformer.wte.weight")[3] += 1
    with pytest.raises(FishError, match=r"transformer.wte.weight \(8 of its entries; tied"):
        export_delta(Delta.between(base, tuned), "shira", tmp_path, base=base, pad=True)
    with pytest.raises(FishError, match=r"needs at least one nn\.Linear layer"):
        export_delta(chosen(whole()), "shira", tmp_path, base=bert())
    with pytest.raises(FishError, match="no setting at which any of these layers fits"):
        export_delta(chosen({DOWN: 127}), "shira", tmp_path, base=bert(), pad=True)


CONFIGS: dict[str, Callable[..., Any]] = {
    "shira": lambda **common: peft.ShiraConfig(r=1, random_seed=3, **common),
    "supertuning": lambda **common: peft.SupertuningConfig(sparsity=0.7, **common),
}


def trained_by_peft(kind: str, folder: Path) -> Any:
    """Train a few steps with the real method and save what PEFT saves."""
    torch.manual_seed(0)
    common = {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"]}
    model = peft.get_peft_model(bert(), CONFIGS[kind](**common))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for seed in range(4):
        model(**case("bert").batch(8, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_trained_becomes_a_delta(kind: str, tmp_path: Path) -> None:
    model = trained_by_peft(kind, tmp_path)
    delta = import_delta(tmp_path, base=bert())
    imported = applied(delta)
    torch.testing.assert_close(outputs(imported), outputs(model), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs(bert()), outputs(model), atol=0.1)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trained = sum(t.numel() for name, t in stored.items() if t.is_floating_point())
    assert delta.k == trained
    if kind == "shira":  # and back again: the same adapter, but for the order of its modules
        export_delta(delta, "shira", tmp_path / "again", base=bert())
        again = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert stored.keys() == again.keys()
        assert all(torch.equal(again[name], t) for name, t in stored.items() if "indices" in name)


def broken(tensors: dict[str, Tensor], folder: Path, kind: str = "SHIRA", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
    return folder


LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        (torch.tensor([[0, 8], [0, 0]]), torch.ones(2), "out of range for a weight of shape"),
        (torch.tensor([[0, -1], [0, 0]]), torch.ones(2), "out of range"),
        (torch.tensor([[0, 0], [0, 8]]), torch.ones(2), "out of range"),  # the flat index would be in range
        (torch.tensor([[1, 1], [2, 2]]), torch.ones(2), "must not repeat"),
        (torch.tensor([[1, 2], [2, 2]]), torch.ones(3), "has 2 indices and 3 values"),
        (torch.tensor([1, 2]), torch.ones(2), r"shape \[2\], expected \[2, entries\]"),
        (torch.tensor([[1.5], [2.0]]), torch.ones(1), "not whole numbers"),
        (None, torch.ones(1), "no indices for bert.encoder"),
    ],
)
def test_faulty_shira_files_are_refused_by_name(
    indices: Tensor | None, values: Tensor, message: str, tmp_path: Path
) -> None:
    tensors = {f"{LAYER}.shira_weight": values} | ({} if indices is None else {f"{LAYER}.shira_indices": indices})
    with pytest.raises(
        FishError, match=rf"adapter_model.safetensors (is damaged, or not for this base|has).*{message}"
    ):
        import_delta(broken(tensors, tmp_path), base=bert())


def test_float_indices_as_on_windows_are_read(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.shira_weight": torch.ones(1), f"{LAYER}.shira_indices": torch.tensor([[1.0], [2.0]])}
    assert import_delta(broken(tensors, tmp_path), base=bert()).mask.indices[QUERY].tolist() == [10]


def test_other_faulty_adapters_are_refused(tmp_path: Path) -> None:
    good = {f"{LAYER}.supertuning_values": torch.ones(1), f"{LAYER}.supertuning_indices": torch.tensor([3])}
    other = {name.replace("query", "nobody"): tensor for name, tensor in good.items()}
    assert import_delta(broken(good, tmp_path, "SUPERTUNING"), base=bert()).k == 1
    low_rank = good | {f"{LAYER}.supertuning_lora_A.weight": torch.ones(1, 8)}
    far = good | {f"{LAYER}.supertuning_indices": torch.tensor([64])}
    for tensors, kind, message in (
        (low_rank, "SUPERTUNING", "low-rank part"),
        (far, "SUPERTUNING", "index 64 is out of range"),
        (other, "SUPERTUNING", "has no matrix bert.encoder.layer.0.attention.self.nobody.weight"),
        (good, "LORA", "describes a LORA adapter; expected SHIRA or SUPERTUNING"),
    ):
        with pytest.raises(FishError, match=message):
            import_delta(broken(tensors, tmp_path, kind), base=bert())
    with pytest.raises(FishError, match="holds a supertuning adapter, not a shira one"):
        import_delta(broken(good, tmp_path, "SUPERTUNING"), base=bert(), origin="shira")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FishError, match=r"adapter_config.json is damaged"):
        import_delta(tmp_path, base=bert())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SHIRA"}')
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FishError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"):
        import_delta(tmp_path, base=bert())


# --- composable-sft ---------------------------------------------------------------------------------------------------


def their_encoding(dense: Tensor) -> dict[str, Any]:
    """Write a difference as composable-sft does, one entry at a time."""
    sizes, found = list(dense.shape), []
    for place in dense.nonzero().tolist():
        flat, scale = 0, 1
        for at, size in zip(place, sizes, strict=True):
            flat, scale = flat + at * scale, scale * size
        found.append((np.int64(flat), float(dense[tuple(place)])))
    found.sort()
    places = [flat for flat, _ in found]
    steps: list[Any] = [int(b - a) for a, b in itertools.pairwise(places)]
    values = torch.tensor([value for _, value in found], dtype=dense.dtype)
    return {"size": dense.shape, "index_steps": places[:1] + steps, "values": values}


def their_model(file: Path, model: Any) -> Any:
    """Add a file to a model as composable-sft does, one entry at a time."""
    content = torch.load(file)
    with torch.no_grad():
        for name, coded in content["diffs"].items():
            flat, weight = 0, model.get_parameter(name)
            for step, value in zip(coded["index_steps"], coded["values"].tolist(), strict=True):
                flat, rest, place = flat + step, flat + step, []
                for size in coded["size"]:
                    place.append(rest % size)
                    rest //= size
                weight[tuple(place)] += value
        for name, tensor in content["abs"].items():
            model.get_parameter(name).copy_(tensor)
    return model


def test_composable_sft_reads_what_we_write(tmp_path: Path) -> None:
    delta = chosen({QUERY: 11, UP: 29, NORM: 3} | whole())
    done = export_delta(delta, "composable", tmp_path, base=bert())
    theirs = their_model(tmp_path / "pytorch_diff.bin", bert())
    tuned = applied(delta)
    assert differing(theirs, tuned) == done.inexact < 5
    torch.testing.assert_close(outputs(theirs), outputs(tuned), rtol=1e-6, atol=1e-6)
    content = torch.load(tmp_path / "pytorch_diff.bin")
    assert (set(content["abs"]), set(content["diffs"])) == (set(HEAD), {QUERY, UP, NORM})


@pytest.mark.parametrize("names", [("diffs", "abs"), ("body", "head")])
def test_we_read_what_composable_sft_writes(names: tuple[str, str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    diffs = {}
    for name in (QUERY, UP, NORM, "bert.embeddings.position_embeddings.weight"):
        shape = bert().get_parameter(name).shape
        diffs[name] = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.2)
    heads = {name: torch.randn(bert().get_parameter(name).shape, generator=generator) for name in HEAD}
    content = {names[0]: {name: their_encoding(dense) for name, dense in diffs.items()}, names[1]: heads}
    torch.save(content, tmp_path / "pytorch_diff.bin")
    delta = import_delta(tmp_path, base=bert())
    expected = bert()
    with torch.no_grad():
        for name, dense in diffs.items():
            expected.get_parameter(name).add_(dense)
        for name, tensor in heads.items():
            expected.get_parameter(name).copy_(tensor)
    assert bits(applied(delta)) == bits(expected)
    assert delta.k == sum(int(dense.count_nonzero()) for dense in diffs.values()) + sum(whole().values())


def test_tensors_that_are_not_coded_are_read_too(tmp_path: Path) -> None:
    dense = torch.zeros(8, 8)
    dense[2, 3] = 1
    content = {"diffs": {QUERY: dense, VALUE: dense.to_sparse()}, "abs": {NORM: their_encoding(torch.ones(8))}}
    torch.save(content | {"block_sparses": {}}, tmp_path / "pytorch_diff.bin")
    delta = import_delta(tmp_path / "pytorch_diff.bin", base=bert())
    assert {name: len(flat) for name, flat in delta.mask.indices.items()} == {QUERY: 1, VALUE: 1, NORM: 8}
    assert delta.values[NORM].tolist() == [1.0] * 8


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


def coded(steps: list[Any], values: Any = None, size: tuple[int, ...] = (8, 8)) -> dict[str, Any]:
    values = torch.ones(len(steps)) if values is None else values
    return {"size": torch.Size(size), "index_steps": steps, "values": values}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"diffs": {QUERY: coded([3, 61])}}, "out of range for its shape"),
        ({"diffs": {QUERY: coded([3, 0])}}, "or repeat"),
        ({"diffs": {QUERY: coded([-1])}}, "out of range"),
        ({"diffs": {QUERY: coded([1], torch.ones(2))}}, "has 1 indices and 2 values"),
        ({"diffs": {QUERY: coded([1], size=(4, 16))}}, r"has shape \[4, 16\], expected \[8, 8\]"),
        ({"diffs": {QUERY: coded(["x"])}}, "is damaged"),
        ({"diffs": {QUERY: {"size": torch.Size([8, 8])}}}, "is damaged"),
        ({"diffs": {"nobody": coded([1])}}, "no parameters of these names: nobody"),
        ({"diffs": {NORM: coded([1], size=(8,))}, "abs": {NORM: torch.ones(8)}}, "both changed and replaced"),
        ({"diffs": {}, "abs": {}}, "neither 'diffs' nor 'abs'"),
        ({"diffs": {QUERY: coded([1])}, "block_sparses": {"x": 1}}, "block-sparse layers"),
        ({"diffs": {QUERY: coded([1], torch.ones(1, dtype=torch.complex64))}}, f"{QUERY} are torch.complex64"),
        ({"diffs": {QUERY: torch.ones(8, 8, dtype=torch.complex64)}}, f"{QUERY} are torch.complex64"),
        ({"diffs": {}, "abs": {NORM: torch.ones(8, dtype=torch.complex64)}}, f"{NORM} are torch.complex64"),
        ({"diffs": {QUERY: coded([1], [1.0])}}, f"{QUERY} are list, expected a tensor"),
        ({"diffs": {QUERY: 5}}, "is damaged"),
        ({"diffs": {QUERY: Hostile()}}, "holds more than tensors"),
        ([1], "holds a list"),
    ],
)
def test_faulty_composable_files_are_refused_by_name(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "pytorch_diff.bin")
    with pytest.raises(FishError, match=rf"pytorch_diff.bin.*{message}"):
        import_delta(tmp_path, base=bert())
    assert "never" not in capsys.readouterr().out


def test_buffers_and_huge_tensors_are_refused_for_composable_sft(tmp_path: Path) -> None:
    base, tuned = case("conv").make(), case("conv").make()
    tuned.norm.running_mean += 1
    with pytest.raises(FishError, match=r"parameters only; the delta has buffers: norm.running_mean"):
        export_delta(Delta.between(base, tuned), "composable", tmp_path, base=base)
    huge = {"w": torch.zeros(1, dtype=torch.bfloat16).expand(2**31)}
    mask = Mask.from_indices({"w": [5]}, huge)
    delta = Delta(mask, {"w": torch.ones(1)}, base={"w": "0" * 64})
    with pytest.raises(FishError, match="counts entries in 32 bits; these tensors have more: w"):
        export_delta(delta, "composable", tmp_path, base=huge, check_base=False)
    assert not list(tmp_path.iterdir())


# --- whole tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["dense", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_tensors_go_out_and_come_back(to: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    delta = chosen({QUERY: 11, NORM: 3} | whole(), dtype)
    path = tmp_path / "change.safetensors"
    done = export_delta(delta, to, path, base=bert(dtype))
    tensors, base, tuned = load_file(path), bert(dtype).state_dict(), applied(delta, dtype).state_dict()
    assert tensors.keys() == delta.mask.indices.keys()
    for name, tensor in tensors.items():
        expected = tuned[name].float() - base[name].float() if to == "dense" else tuned[name]
        assert torch.equal(tensor, expected)
    assert done.padded == sum(t.numel() for t in tensors.values()) - delta.k
    back = applied(import_delta(path, base=bert(dtype)), dtype)
    assert differing(back, applied(delta, dtype)) == done.inexact < 3
    # A file of somebody else does not say which of the two it is.
    save_file(tensors, path)
    with pytest.raises(ValueError, match="origin must be 'dense'"):
        import_delta(path, base=bert(dtype))
    assert import_delta(path, base=bert(dtype), origin=to).mask.indices.keys() == delta.mask.indices.keys()


def test_tensors_may_bring_a_new_head_and_differences_may_not(tmp_path: Path) -> None:
    save_file({"new.weight": torch.ones(3, 2), NORM: torch.zeros(8)}, tmp_path / "t.safetensors")
    delta = import_delta(tmp_path / "t.safetensors", base=bert(), origin="tensors")
    assert (len(delta.mask.indices["new.weight"]), len(delta.mask.indices[NORM])) == (6, 8)
    with pytest.raises(FishError, match=r"lacks or has in another shape: new.weight"):
        import_delta(tmp_path / "t.safetensors", base=bert(), origin="dense")
    with pytest.raises(FishError, match=r"these have none: new.weight"):
        export_delta(delta, "dense", tmp_path / "d.safetensors", base=bert())
    export_delta(delta, "tensors", tmp_path / "d.safetensors", base=bert())
    assert torch.equal(load_file(tmp_path / "d.safetensors")["new.weight"], torch.ones(3, 2))


class Scaled(nn.Module):
    """A parameter without dimensions, and tied matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(()))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("to", ["composable", "dense", "tensors"])
def test_scalars_and_other_names_of_tied_parameters(to: Any, tmp_path: Path) -> None:
    base = Scaled()
    shapes = {"scale": torch.Size([]), "second.weight": (4, 4), "first.bias": (4,), "second.bias": (4,)}
    mask = Mask.from_indices({"scale": [0], "second.weight": [3, 5]}, shapes)
    hashes = {name: fishmask.fingerprint.tensor_hash(base.get_parameter(name)) for name in [*shapes][1:]}
    delta = Delta(mask, {"scale": torch.tensor([3.0]), "second.weight": torch.ones(2)}, base=hashes)
    tuned = Scaled()
    delta.apply(tuned)
    path = tmp_path if to == "composable" else tmp_path / "change.safetensors"
    export_delta(delta, to, path, base=base)
    back = import_delta(path, base=base)
    assert {name: flat.tolist() for name, flat in back.mask.indices.items()} == {"scale": [0], "first.weight": [3, 5]}
    model = Scaled()
    back.apply(model)
    assert bits(model) == bits(tuned)


# --- merged models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one file", "shards", "pickle"])
def test_a_merged_folder_is_what_applying_and_saving_gives(form: str, tmp_path: Path) -> None:
    base, delta = bert(), chosen({QUERY: 11, WORDS: 5, NORM: 3} | whole())
    base.save_pretrained(tmp_path / "base", max_shard_size="3KB" if form == "shards" else "5GB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("the base")
    if form == "pickle":
        torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
        (tmp_path / "base" / "model.safetensors").unlink()
    done = export_delta(delta, "merged", tmp_path / "merged", base=tmp_path / "base")
    applied(delta).save_pretrained(tmp_path / "reference")
    shards = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    if form == "shards":
        assert shards == sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
        assert len(shards) > 2
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert index == json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text()) | {
            "metadata": {"total_size": index["metadata"]["total_size"]}
        }
    else:
        assert shards == ["model.safetensors"]
    written = {n: t for shard in shards for n, t in load_file(tmp_path / "merged" / shard).items()}
    assert bits(written) == bits(load_file(tmp_path / "reference" / "model.safetensors"))
    assert done.bytes == sum((tmp_path / "merged" / shard).stat().st_size for shard in shards)
    assert {path.name for path in (tmp_path / "merged").iterdir()} - set(shards) - {"model.safetensors.index.json"} == {
        "config.json", "tokenizer.json"
    }  # fmt: skip
    assert torch.equal(outputs(type(base).from_pretrained(tmp_path / "merged").eval()), outputs(applied(delta)))


def test_a_new_head_and_another_beginning_of_names(tmp_path: Path) -> None:
    tuned, delta = applied(chosen({QUERY: 11} | whole())), chosen({QUERY: 11} | whole())
    tuned.bert.save_pretrained(tmp_path / "unused")
    bert().bert.save_pretrained(tmp_path / "base")
    tuned.config.save_pretrained(tmp_path / "like")
    options: dict[str, Any] = {"base": tmp_path / "base", "rename": {"": "bert."}}
    with pytest.raises(FishError, match=r"like='.*absent' has no config\.json"):
        export_delta(delta, "merged", tmp_path / "merged", like=tmp_path / "absent", **options)
    assert not (tmp_path / "merged").exists()
    export_delta(delta, "merged", tmp_path / "merged", like=tmp_path / "like", **options)
    merged = type(tuned).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(outputs(merged), outputs(tuned))


def test_a_merged_folder_within_the_base_is_no_part_of_itself(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "words.txt").write_text("a b")
    for place in ("merged", "more/merged"):
        export_delta(chosen({QUERY: 11}), "merged", tmp_path / place, base=tmp_path)
        written = {str(path.relative_to(tmp_path / place)) for path in (tmp_path / place).rglob("*") if path.is_file()}
        assert written == {"model.safetensors", "config.json", "more/words.txt"}
        shutil.rmtree(tmp_path / place)


def test_a_second_copy_of_a_tied_tensor_follows(tmp_path: Path) -> None:
    base, tuned = case("gpt2").make(), case("gpt2").make()
    with torch.no_grad():
        tuned.get_parameter("transformer.wte.weight")[3] += 1
    save_file({name: t.detach().clone() for name, t in base.state_dict().items()}, tmp_path / "model.safetensors")
    export_delta(Delta.between(base, tuned), "merged", tmp_path / "merged", base=tmp_path / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert bits(merged) == bits(tuned)
    assert merged.keys() == base.state_dict().keys()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    delta = chosen({QUERY: 11})
    other = bert()
    nn.init.zeros_(other.get_parameter(UP))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FishError, match=rf"other weights, or the same in another dtype: {UP}"):
        export_delta(delta, "merged", tmp_path / "merged", base=tmp_path / "other")
    with pytest.raises(FishError, match=rf"missing from .*other: {QUERY}"):
        export_delta(
            delta,
            "merged",
            tmp_path / "merged",
            base=tmp_path / "other",
            rename={"bert.": "roberta."},
            check_base=False,
        )
    assert not (tmp_path / "merged").exists()
    export_delta(delta, "merged", tmp_path / "merged", base=tmp_path / "other", check_base=False)
    with pytest.raises(FishError, match="holds a model or an adapter already"):
        export_delta(delta, "merged", tmp_path / "merged", base=tmp_path / "other", check_base=False)
    for to in ("shira", "composable", "dense"):
        with pytest.raises(FishError, match="other weights"):
            export_delta(delta, to, tmp_path / "out", base=other)  # type: ignore[arg-type]
    large = Delta(delta.mask, {QUERY: torch.full((11,), 1e39, dtype=torch.float64)}, base=delta.base)
    with pytest.raises(FishError, match=f"beyond the range of its dtype: {QUERY}"):
        export_delta(large, "dense", tmp_path / "out", base=bert())
    assert not (tmp_path / "out").exists()


def test_misuse_is_refused(tmp_path: Path) -> None:
    delta = chosen({QUERY: 11})
    with pytest.raises(ValueError, match="to must be one of shira, supertuning"):
        export_delta(delta, "lora", tmp_path, base=bert())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="origin must be one of auto, shira"):
        import_delta(tmp_path, base=bert(), origin="lora")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass the model itself as the base"):
        export_delta(delta, "shira", tmp_path, base=bert().state_dict())
    with pytest.raises(TypeError, match="pass a folder or a name on the hub"):
        export_delta(delta, "merged", tmp_path, base=bert())
    with pytest.raises(ValueError, match="rename does not apply"):
        export_delta(delta, "shira", tmp_path, base=bert(), rename={"bert.": ""})
    for to in ("composable", "dense", "tensors", "merged"):
        with pytest.raises(ValueError, match=f"pad is for shira and supertuning.*apply to {to}"):
            export_delta(delta, to, tmp_path / "out", base=bert(), pad=True)  # type: ignore[arg-type]
    for to in ("shira", "composable", "dense"):
        with pytest.raises(ValueError, match=f"like is for merged models.*apply to {to}"):
            export_delta(delta, to, tmp_path / "out", base=bert(), like=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        import_delta(tmp_path / "absent", base=bert())
    with pytest.raises(FishError, match=r"is nothing known; expected adapter_config\.json or pytorch_diff\.bin"):
        import_delta(tmp_path, base=bert())


_PROBE = """
import sys
import fishmask
from fishmask.measure import peak_memory_bytes
fishmask.export_delta(fishmask.Delta.load(sys.argv[2]), "merged", sys.argv[1] + "/out", base=sys.argv[1])
before = peak_memory_bytes()
fishmask.export_delta(fishmask.Delta.load(sys.argv[4]), "merged", sys.argv[3] + "/out", base=sys.argv[3])
print(peak_memory_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak before is not known elsewhere")
def test_merging_takes_no_more_memory_for_a_larger_model(tmp_path: Path) -> None:
    arguments, size = [], 0
    for name, rows in (("small", 2), ("large", 2**13)):
        base = {"w": torch.zeros(rows, 2**12), "v": torch.zeros(3)}
        (tmp_path / name).mkdir()
        save_file(base, tmp_path / name / "model.safetensors")
        tuned = base | {"w": torch.zeros(rows, 2**12).index_fill_(1, torch.tensor([1]), 1)}
        fishmask.between(base, tuned).save(tmp_path / f"{name}.delta")
        arguments += [str(tmp_path / name), str(tmp_path / f"{name}.delta")]
        size = 4 * base["w"].numel()
    run = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=True)
    assert int(run.stdout) < size / 2, f"{int(run.stdout):,} bytes more for a model of {size:,}"
    merged = load_file(tmp_path / "large" / "out" / "model.safetensors")["w"]
    assert merged.sum() == merged[:, 1].sum() == len(merged)


# --- the command line and the page ------------------------------------------------------------------------------------


def answer(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *(() if code else ("--json",)))])
    assert result.exit_code == code, result.output
    return result.stderr if code else json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model without a head, and the folder of a training run on it."""
    from fishmask.hub import load_for_training

    folder = tmp_path_factory.mktemp("formats")
    tiny.model_folder(folder / "model")
    loaded = load_for_training(str(folder / "model"), ("bad", "good"))
    base = Mask.from_indices({}, loaded.model)
    weights = {n: p for n, p in loaded.model.named_parameters() if n.endswith("attention.self.query.weight")}
    indices = {n: torch.arange(0, p.numel(), 7) for n, p in weights.items()}
    indices |= {n: torch.arange(loaded.model.get_parameter(n).numel()) for n in loaded.head}
    mask = Mask.from_indices(indices, base.shapes)
    values = {n: loaded.model.get_parameter(n).detach().view(-1)[i] + 0.5 for n, i in mask.indices.items()}
    (folder / "run").mkdir()
    hashes = fishmask.delta.fingerprint(loaded.model.named_parameters(), mask)
    Delta(mask, values, base=hashes, base_name="model").save(folder / "run" / "delta.safetensors")
    loaded.model.config.architectures = ["BertForSequenceClassification"]
    loaded.model.config.save_pretrained(folder / "run")
    return folder


def whole_model(folder: Path) -> dict[str, Any]:
    return bits(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("to", ["shira", "supertuning", "composable", "tensors", "dense"])
def test_the_commands_convert_there_and_back(to: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / ("change.safetensors" if to in ("tensors", "dense") else "change")
    base = ("--base", place / "model")
    command = ("delta", "export", place / "run", "--to", to, *base, "-o", out)
    if to == "dense":  # the new head has no difference from a base without it
        assert "these have none: classifier" in answer(*command, code=1)
        return
    done = answer(*command, *(["--pad"] if to in KINDS else []))
    assert done["entries"] == Delta.load(place / "run" / "delta.safetensors").k
    answer("delta", "import", out, *base, "--like", place / "run", "-o", tmp_path / "back")
    assert answer("delta", "verify", tmp_path / "back", *base)["fits_base"] is True
    for folder in (place / "run", tmp_path / "back"):
        answer("delta", "apply", place / "model", folder, "-o", tmp_path / f"{folder.name}-model")
    assert whole_model(tmp_path / "back-model") == whole_model(tmp_path / "run-model")


def test_the_merged_model_of_the_command_line_is_what_apply_writes(place: Path, tmp_path: Path) -> None:
    answer("delta", "apply", place / "model", place / "run", "-o", tmp_path / "applied")
    answer("delta", "export", place / "run", "--to", "merged", "--base", place / "model", "-o", tmp_path / "merged")
    assert whole_model(tmp_path / "merged") == whole_model(tmp_path / "applied")
    between = answer("delta", "between", place / "model", tmp_path / "merged", "-o", tmp_path / "again")
    assert (between["entries"], between["changed_left_out"]) == (Delta.load(place / "run" / "delta.safetensors").k, 0)
    assert answer("delta", "verify", tmp_path / "again", "--base", place / "model")["fits_base"] is True
    half = answer("delta", "between", place / "model", tmp_path / "merged", "--k", 70, "-o", tmp_path / "half")
    assert (half["entries"], half["changed_left_out"]) == (70, between["entries"] - 70)
    assert "OLD=NEW" in answer("delta", "between", place / "model", tmp_path / "merged", "--rename", "x", code=2)


@pytest.mark.parametrize("command", ["export", "import"])
def test_the_commands_explain_themselves_with_an_example(command: str) -> None:
    text = " ".join(CliRunner().invoke(app, ["delta", command, "--help"]).stdout.split())
    assert f"Example: fishmask delta {command}" in text


DOCS = Path(__file__).parents[1] / "docs" / "formats.md"


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    applied(chosen(FITTING["shira"])).save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"model": base}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, scope)
    assert scope["delta"].k == chosen(FITTING["shira"]).k
    assert {"adapter", "merged", "sft"} <= {path.name for path in tmp_path.iterdir()}


def test_the_page_says_how_many_bytes_an_entry_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512, bias=False))
    mask = Mask.random(base, density=7 * 1024 / 512**2, seed=0)  # r = 7
    values = {name: base.get_parameter(name).detach().view(-1)[i] * 1.5 for name, i in mask.indices.items()}
    delta = Delta(mask, values, base=fishmask.delta.fingerprint(base.named_parameters(), mask))
    rows = re.findall(r"^\| `(\w+)`: .*\| ([\d.]+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in rows] == ["shira", "supertuning", "composable", "dense", "tensors"]
    for name, promised in rows:
        done = export_delta(delta, name, tmp_path / name, base=base)  # type: ignore[arg-type]
        assert done.bytes / delta.k == pytest.approx(float(promised), rel=0.03), name
    delta.save(tmp_path / "delta")
    (own,) = re.findall(r"\(format.md\) takes ([\d.]+)", DOCS.read_text(encoding="utf-8"))
    assert (tmp_path / "delta").stat().st_size / delta.k == pytest.approx(float(own), rel=0.03)
