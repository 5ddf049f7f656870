"""Masks: every way to make one, set algebra, identity, files."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fishmask import FishError, Mask
from tests.cases import case

SHAPES = {"a.weight": (4, 5), "a.bias": (5,), "b.weight": (3,)}


def scores() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=g) for name, shape in SHAPES.items()}


def entries(mask: Mask) -> set[tuple[str, int]]:
    return {(name, i) for name, indices in mask.indices.items() for i in indices.tolist()}


def subsets() -> st.SearchStrategy[Mask]:
    full = [(name, i) for name, shape in SHAPES.items() for i in range(int(np.prod(shape)))]

    def make(places: set[tuple[str, int]]) -> Mask:
        return Mask.from_indices({n: [i for m, i in places if m == n] for n in SHAPES}, SHAPES)

    return st.sets(st.sampled_from(full)).map(make)


def test_from_scores_takes_the_largest_of_all_parameters_together() -> None:
    given_scores = scores()
    mask = Mask.from_scores(given_scores, 0.25)
    flat = torch.cat([score.reshape(-1) for score in given_scores.values()])
    threshold = flat.sort(descending=True).values[6]
    assert (mask.k, mask.n, mask.density) == (7, 28, 0.25)
    assert entries(mask) == {
        (name, i) for name, s in given_scores.items() for i, x in enumerate(s.reshape(-1)) if x >= threshold
    }
    assert mask.shapes == SHAPES


def test_keep_is_inside_the_budget_and_exclude_outside_the_choice() -> None:
    mask = Mask.from_scores(scores(), 0.5, keep="b", exclude="bias")
    assert mask.k == 14
    assert mask.indices["b.weight"].tolist() == [0, 1, 2]
    assert "a.bias" not in mask.indices
    expected = scores()["a.weight"].reshape(-1).topk(11).indices.sort().values
    assert torch.equal(mask.indices["a.weight"], expected)


def test_keep_alone_may_spend_the_budget() -> None:
    mask = Mask.from_scores(scores(), 3 / 28, keep="b.weight")
    assert entries(mask) == {("b.weight", i) for i in range(3)}
    with pytest.raises(ValueError, match="keep takes 20 entries"):
        Mask.from_scores(scores(), 0.25, keep="a.weight")


def test_magnitude_ranks_by_absolute_weight() -> None:
    model = case("mlp").make()
    weights = {name: p.detach().abs() for name, p in model.named_parameters()}
    assert Mask.magnitude(model, 0.3, keep="2.bias") == Mask.from_scores(weights, 0.3, keep="2.bias")
    assert Mask.magnitude({"w": torch.tensor([-3.0, 1.0, 2.0])}, 0.34).indices["w"].tolist() == [0]


def test_random_depends_on_the_seed_alone() -> None:
    model = case("bert").make()
    mask = Mask.random(model, 0.05, seed=1, keep="classifier", exclude="embeddings")
    assert mask == Mask.random(model, 0.05, seed=1, keep="classifier", exclude="embeddings")
    assert mask != Mask.random(model, 0.05, seed=2, keep="classifier", exclude="embeddings")
    n = sum(p.numel() for p in model.parameters())
    assert (mask.k, mask.n) == (int(0.05 * n), n)
    assert len(mask.indices["classifier.weight"]) == model.classifier.weight.numel()
    assert not any("embeddings" in name for name in mask.indices)


def test_biases_are_told_by_the_last_part_of_the_name() -> None:
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(4, 2, add_bias_kv=True), "r": nn.LSTM(2, 2), "l": nn.Linear(2, 2)}
    )
    mask = Mask.biases(model, keep="l.weight")
    expected = {"a.in_proj_bias", "a.out_proj.bias", "a.bias_k", "a.bias_v", "r.bias_ih_l0", "r.bias_hh_l0", "l.bias"}
    assert set(mask.indices) == expected | {"l.weight"}
    assert all(len(mask.indices[name]) == mask.shapes[name].numel() for name in mask.indices)


def test_a_relative_attention_bias_table_is_not_a_bias() -> None:
    t5 = case("t5").make()
    assert any("relative_attention_bias.weight" in name for name, _ in t5.named_parameters())
    with pytest.raises(ValueError, match="no bias parameters"):
        Mask.biases(t5)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda i: torch.tensor(i, dtype=torch.uint8)])
def test_from_indices_takes_lists_arrays_and_tensors(kind: Callable[[list[int]], object]) -> None:
    mask = Mask.from_indices({"w": kind([7, 2, 5])}, {"w": (2, 4), "v": (3,)})
    assert mask.indices["w"].tolist() == [2, 5, 7]
    assert mask.indices["w"].dtype == torch.int64
    assert (mask.k, mask.n) == (3, 11)


def test_from_indices_accepts_nothing_at_all() -> None:
    mask = Mask.from_indices({"w": []}, {"w": (2,)})
    assert (mask.k, mask.n, mask.density, dict(mask.indices)) == (0, 2, 0.0, {})


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ({"w": [0.5]}, TypeError, "indices of w must be whole numbers, got float64"),
        ({"w": torch.tensor([True])}, TypeError, "indices of w must be whole numbers, got bool"),
        ({"w": [[1, 2]]}, ValueError, "indices of w must be flat"),
        ({"w": [3, -1]}, ValueError, "indices of w must not be negative, got -1"),
        ({"w": [4, 1, 4]}, ValueError, "indices of w must not repeat; 4 does"),
        ({"w": [8]}, ValueError, r"index 8 is beyond the entries of w, whose shape is \[2, 4\]"),
        ({"w": [1], "x": [0]}, ValueError, "not in shapes: x"),
    ],
)
def test_from_indices_refuses_what_is_no_choice(
    indices: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Mask.from_indices(indices, {"w": (2, 4)})


def test_shapes_may_come_later() -> None:
    mask = Mask.from_indices({"weight": [3]})
    for unknown in (lambda: mask.n, lambda: mask.density):
        with pytest.raises(FishError, match="pass shapes="):
            unknown()
    model = nn.Linear(2, 2)
    assert mask.with_shapes(model).n == 6
    assert mask.with_shapes(dict(model.named_parameters())).shapes == {"weight": (2, 2), "bias": (2,)}
    with pytest.raises(ValueError, match="index 3 is beyond"):
        mask.with_shapes(nn.Linear(2, 1))


def test_from_dense_takes_booleans_only() -> None:
    dense = {"w": torch.tensor([[True, False], [False, True]]).t(), "v": torch.tensor(False)}
    mask = Mask.from_dense(dense)
    assert (entries(mask), mask.n) == ({("w", 0), ("w", 3)}, 5)
    with pytest.raises(TypeError, match=r"v \(torch.float32\)"):
        Mask.from_dense(dense | {"v": torch.tensor(1.0)})


def test_between_sees_every_bit() -> None:
    quiet, payload = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = {"w": torch.stack([torch.tensor(0.0), quiet, quiet, torch.tensor(1.0)]), "count": torch.tensor(3)}
    b = {"w": torch.stack([torch.tensor(-0.0), quiet, payload, torch.tensor(1.0)]), "count": torch.tensor(4)}
    assert entries(Mask.between(a, b)) == {("w", 0), ("w", 2)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_between_works_in_every_float_dtype(dtype: torch.dtype) -> None:
    a = torch.arange(6).view(2, 3).to(dtype)
    b = a.clone()
    b.view(-1)[4] = 0
    assert entries(Mask.between({"w": a.t()}, {"w": b.t()})) == {("w", 3)}


def test_between_counts_a_tied_tensor_once() -> None:
    base, tuned = case("gpt2").make(), case("gpt2").make()
    with torch.no_grad():
        tuned.lm_head.weight[0, 0] += 1
    by_model, by_state = Mask.between(base, tuned), Mask.between(base.state_dict(), tuned.state_dict())
    assert entries(by_model) == entries(by_state) == {("transformer.wte.weight", 0)}
    assert "lm_head.weight" not in by_state.shapes
    untied = {name: t.clone() for name, t in tuned.state_dict().items()}
    assert entries(Mask.between(base.state_dict(), untied)) == {("transformer.wte.weight", 0), ("lm_head.weight", 0)}


def test_between_lists_all_disagreements() -> None:
    a = {"x": torch.ones(2), "y": torch.ones(2), "z": torch.ones(2)}
    b = {"y": torch.ones(3), "z": torch.ones(2, dtype=torch.float16), "new": torch.ones(1)}
    with pytest.raises(ValueError) as caught:
        Mask.between(a, b)
    for part in ("x is only in the first", "new is only in the second", "y is float32 [2]", "z is float32 [2] in"):
        assert part in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(a=subsets(), b=subsets())
def test_algebra_is_that_of_sets(a: Mask, b: Mask) -> None:
    for mask, expected in (
        (a | b, entries(a) | entries(b)),
        (a & b, entries(a) & entries(b)),
        (a - b, entries(a) - entries(b)),
    ):
        assert entries(mask) == expected
        assert all((indices.diff() > 0).all() for indices in mask.indices.values())
        assert mask.shapes == SHAPES
    assert (a == b) == (entries(a) == entries(b)) == (a.digest == b.digest)
    assert a.overlap(b) == (len(entries(a) & entries(b)) / a.k if a.k else 0.0)


@settings(max_examples=100, deadline=None)
@given(mask=subsets(), parts=st.integers(1, 9), how=st.sampled_from(["interleaved", "contiguous"]))
def test_split_is_disjoint_even_and_complete(mask: Mask, parts: int, how: str) -> None:
    pieces = mask.split(parts, how=how)
    assert len(pieces) == parts
    assert max(p.k for p in pieces) - min(p.k for p in pieces) <= 1
    assert sum(p.k for p in pieces) == mask.k
    assert set().union(*map(entries, pieces)) == entries(mask)
    order = sorted(entries(mask))
    runs = [sorted(entries(p)) for p in pieces]
    if how == "interleaved":
        assert runs == [order[i::parts] for i in range(parts)]
    else:
        assert [entry for run in runs for entry in run] == order


def test_split_refuses_nonsense() -> None:
    mask = Mask.from_indices({"w": [1]})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mask.split(0)
    with pytest.raises(ValueError, match="'interleaved' or 'contiguous', got 'random'"):
        mask.split(2, how="random")


def test_algebra_merges_shapes_and_refuses_conflicts() -> None:
    a, b = Mask.from_indices({"w": [1]}, {"w": (4,)}), Mask.from_indices({"v": [0]}, {"v": (2,)})
    assert (a | b).shapes == {"w": (4,), "v": (2,)}
    with pytest.raises(ValueError, match=r"shapes differ: w \(4,\) and \(2, 2\)"):
        a | Mask.from_indices({"w": [1]}, {"w": (2, 2)})
    with pytest.raises(ValueError, match="index 9 is beyond"):
        a | Mask.from_indices({"w": [9]})
    with pytest.raises(TypeError):
        a | {"w": [1]}


def test_identity_is_the_choice_and_not_shapes_or_order() -> None:
    known = Mask.from_indices({"w": [3, 1], "v": [0]}, {"v": (2,), "w": (2, 2), "unused": (5,)})
    bare = Mask.from_indices({"v": [0], "w": [1, 3]})
    assert known == bare
    assert hash(known) == hash(bare)
    assert len({known, bare}) == 1
    assert known != Mask.from_indices({"w": [1, 3], "u": [0]})
    assert known != "w"


def test_digests_do_not_run_together() -> None:
    masks = [{"ab": [1]}, {"a": [1]}, {"a": [1], "b": [1]}, {"b": [1]}, {"a": [1, 98]}, {}]
    assert len({Mask.from_indices(indices).digest for indices in masks}) == len(masks)


def test_digest_is_fixed_for_ever() -> None:
    # Stored in files: a change here makes old files unreadable.
    assert (
        Mask.from_indices({"b": [0, 7], "a": [2]}).digest
        == "ca14ffedbc95ba69189678964ce48ca0fae037999710c7fcafbda8c790203b93"
    )


def test_copies_are_equal() -> None:
    mask = Mask.from_scores(scores(), 0.3)
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        assert twin == mask
        assert (twin.shapes, twin.n) == (mask.shapes, mask.n)


def test_a_mask_cannot_be_changed() -> None:
    mask = Mask.from_scores(scores(), 0.3)
    with pytest.raises(TypeError):
        mask.indices["a.weight"] = torch.tensor([0])
    with pytest.raises(AttributeError):
        mask.k = 3


def test_summary_counts_by_layer() -> None:
    mask = Mask.random(case("bert").make(), 0.2, seed=0, exclude="embeddings")
    groups = {layer: (chosen, size) for layer, chosen, size in mask.groups()}
    assert list(groups)[:3] == [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense", "classifier"} <= set(groups)
    assert sum(chosen for chosen, _ in groups.values()) == mask.k
    assert sum(size for _, size in groups.values()) == mask.n
    text = mask.summary()
    chosen, size = groups["bert.encoder.layer.1"]
    row = next(line for line in text.splitlines() if line.startswith("bert.encoder.layer.1 "))
    assert row.split()[1:3] == [str(chosen), f"{chosen / mask.k:.2%}"]
    assert f"{chosen / size:.3%}" in row
    assert "embeddings" not in text
    assert f"{mask.k:,} of {mask.n:,} entries" in text
    assert f"k={mask.k}" in repr(mask)


def test_summary_without_shapes() -> None:
    assert Mask.from_indices({"x.0.weight": [5]}).summary().splitlines()[1].split()[:2] == ["x.0", "1"]
    assert Mask.from_indices({}).summary().startswith("0 entries")


@settings(max_examples=60, deadline=None)
@given(mask=subsets(), known=st.booleans())
def test_files_give_the_mask_back(tmp_path_factory: pytest.TempPathFactory, mask: Mask, known: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "mask.safetensors"
    mask = mask if known else Mask.from_indices(mask.indices)
    mask.save(path)
    back = Mask.load(path)
    assert back == mask
    assert back.shapes == mask.shapes
    assert entries(back) == entries(mask)


def test_a_delta_is_not_loaded_as_a_mask(tmp_path: Path) -> None:
    from fishmask.delta import Delta

    Delta.between({"w": torch.zeros(2)}, {"w": torch.ones(2)}).save(tmp_path / "d")
    with pytest.raises(FishError, match=r"d holds a delta, not a mask"):
        Mask.load(tmp_path / "d")


def test_a_missing_file_is_reported_by_python(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Mask.load(tmp_path / "nowhere")


def test_nothing_to_choose_from_and_a_density_that_is_no_number():
    with pytest.raises(ValueError, match="no entries to choose from"):
        Mask.from_scores({}, 0.5)
    with pytest.raises(TypeError, match="density is a number"):
        Mask.from_scores({"w": torch.ones(3)}, "0.5")
