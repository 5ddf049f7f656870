import pytest
import torch
from torch import nn

from fishmask.errors import FishError
from fishmask.mask import Mask
from fishmask.plot import kind_of, plot_mask, rows_of

KINDS = {
    "bert.embeddings.word_embeddings.weight": "embedding",
    "bert.embeddings.LayerNorm.bias": "norm",
    "bert.encoder.layer.3.attention.self.query.weight": "query",
    "bert.encoder.layer.3.attention.self.key.bias": "bias",
    "bert.encoder.layer.3.attention.output.dense.weight": "attention out",
    "bert.encoder.layer.3.attention.output.LayerNorm.weight": "norm",
    "bert.encoder.layer.3.intermediate.dense.weight": "FFN in",
    "bert.encoder.layer.3.output.dense.weight": "FFN out",
    "transformer.h.0.attn.c_attn.weight": "q, k, v together",
    "transformer.h.0.attn.c_proj.weight": "attention out",
    "transformer.h.0.mlp.c_proj.weight": "FFN out",
    "transformer.h.0.ln_1.bias": "norm",
    "transformer.wte.weight": "embedding",
    "model.layers.0.self_attn.o_proj.weight": "attention out",
    "model.layers.0.mlp.gate_proj.weight": "FFN in",
    "layer1.0.conv1.weight": "convolution",
    "classifier.weight": "other weight",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_kind_of_a_parameter_follows_from_its_name(name, kind):
    assert kind_of(name, dimensions=1 if kind in ("norm", "bias") else 2) == kind


def test_an_unnamed_convolution_is_told_by_its_shape():
    assert kind_of("0.weight", dimensions=4) == "convolution"


def test_a_vector_that_is_no_bias_belongs_to_a_norm():
    assert kind_of("1.weight", dimensions=1) == "norm"


def test_rows_are_numbered_layers_or_outer_modules():
    names = [f"bert.encoder.layer.{i}.output.dense.weight" for i in range(9)]
    rows = rows_of([*names, "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.bias", "classifier.weight"])
    assert list(dict.fromkeys(rows.values())) == [
        *(f"encoder.layer.{i}" for i in range(9)), "embeddings", "pooler", "classifier",
    ]  # fmt: skip
    assert rows_of(["layer1.0.conv1.weight", "layer2.1.bn1.bias", "fc.weight"]) == {
        "layer1.0.conv1.weight": "layer1.0",
        "layer2.1.bn1.bias": "layer2.1",
        "fc.weight": "fc",
    }
    assert rows_of(["0.weight", "0.bias", "2.weight"]) == {"0.weight": "0", "0.bias": "0", "2.weight": "2"}
    assert rows_of(["weight", "bias"]) == {"weight": "weight", "bias": "bias"}


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_decides_the_format(tmp_path, suffix, start):
    path = tmp_path / f"mask{suffix}"
    plot_mask(Mask.random(model(), 0.3, seed=0), path)
    assert path.read_bytes().startswith(start)


def test_the_picture_names_rows_columns_and_shares(tmp_path):
    mask = Mask.from_dense({n: torch.full(p.shape, n == "0.bias") for n, p in model().named_parameters()})
    plot_mask(mask, tmp_path / "mask.svg", title="Only one bias")
    drawn = (tmp_path / "mask.svg").read_text()
    for text in ("Only one bias", "convolution", "share of the mask", "100.0%", "0.0%"):
        assert f" {text} -->" in drawn


def test_an_even_mask_does_not_look_uneven(tmp_path):
    whole = Mask.from_dense({n: torch.ones_like(p, dtype=torch.bool) for n, p in model().named_parameters()})
    plot_mask(whole, tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg or \.pdf"):
        plot_mask(Mask.random(model(), 0.3, seed=0), tmp_path / "mask.bmp")


def test_a_mask_without_shapes_is_refused(tmp_path):
    with pytest.raises(FishError, match="shapes"):
        plot_mask(Mask.from_indices({"0.bias": [1]}), tmp_path / "mask.png")
