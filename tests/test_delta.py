"""Deltas: bits through files, the base check, stacking and reverting, size."""

import copy
import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fishmask import FishError, Mask
from fishmask.applied import _history
from fishmask.delta import Delta, load
from fishmask.fingerprint import Base, fingerprint, raw_bits, tensor_hash
from fishmask.hub import ADAPTER_FILE, adapter_folder
from tests.cases import CASES, Case, case

INTEGERS = {torch.float64: "i8", torch.float32: "i4", torch.bfloat16: "i2", torch.float16: "i2"}
INTEGERS |= {torch.float8_e4m3fn: "u1", torch.float8_e5m2: "u1"}


def bits(state: nn.Module | dict[str, Tensor]) -> dict[str, list[int]]:
    """Every number of a model or state dict as the integer it is stored as."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: raw_bits(tensor).reshape(-1).tolist() for name, tensor in state.items()}


def changed(model: nn.Module, density: float = 0.2, seed: int = 0, names: str | list[str] = ()) -> nn.Module:
    """Return a copy of a model with other values at random entries of some parameters."""
    tuned = copy.deepcopy(model)
    parameters = dict(tuned.named_parameters())
    mask = Mask.random({n: p for n, p in parameters.items() if not names or n in names}, density, seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, indices in mask.indices.items():
            parameters[name].view(-1)[indices] = torch.randn(len(indices), generator=g).to(parameters[name].dtype)
    return tuned


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return case("mlp").make().to(dtype)


# --- through files ----------------------------------------------------------------------------------------------------


@st.composite
def state_pairs(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two states of arbitrary bits: NaN payloads, both zeros, subnormals; 0-d, empty, strided; equal to all new."""
    pair: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for i in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(INTEGERS)))
        shape = draw(st.sampled_from([(), (0,), (1,), (3, 2), (2, 0), (5,), (2, 2, 2)]))
        size, width = math.prod(shape), dtype.itemsize
        some = st.binary(min_size=size * width, max_size=size * width)
        first = draw(some)
        second = draw(st.sampled_from([first, draw(some)]))
        strided = len(shape) == 2 and draw(st.booleans())
        for state, raw in zip(pair, (first, second), strict=True):
            integers = np.frombuffer(raw, INTEGERS[dtype]).copy()
            tensor = torch.from_numpy(integers).view(dtype).view(shape)
            state[f"p{i}"] = tensor.t().contiguous().t() if strided else tensor
    return pair


@settings(max_examples=250, deadline=None)
@given(pair=state_pairs(), indices=st.sampled_from(["coded", "raw"]))
def test_a_delta_carries_every_bit(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], indices: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, tuned = pair
    path = tmp_path_factory.getbasetemp() / "delta"
    Delta.between(base, tuned).save(path, indices=indices)
    model = nn.Module()
    for name, tensor in base.items():
        model.register_parameter(name, nn.Parameter(tensor.clone()))
    delta = load(model, path)
    assert bits(dict(model.named_parameters())) == bits(tuned)
    delta.revert(model)
    assert bits(dict(model.named_parameters())) == bits(base)


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_between_save_load_apply_revert_on_every_model(chosen: Case, tmp_path: Path) -> None:
    base = chosen.make()
    tuned = changed(base)
    with torch.no_grad():
        for buffer in tuned.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.5)
    delta = Delta.between(base, tuned, base_name="tiny", base_revision="1")
    delta.save(tmp_path / "delta")
    model = chosen.make()
    loaded = load(model, tmp_path / "delta")
    assert bits(model) == bits(tuned)
    assert (loaded.base_name, loaded.base_revision, loaded.k) == ("tiny", "1", delta.k)
    assert loaded.mask == delta.mask
    assert loaded.mask.shapes == {name: p.shape for name, p in base.named_parameters()}
    loaded.revert(model)
    assert bits(model) == bits(base)


def test_a_state_dict_gives_the_same_model_as_the_module() -> None:
    base = case("conv").make()
    tuned = changed(base)
    tuned.norm.running_mean += 1
    tuned.norm.num_batches_tracked += 3
    for delta in (Delta.between(base, tuned), Delta.between(base.state_dict(), tuned.state_dict())):
        model = copy.deepcopy(base)
        delta.apply(model)
        assert bits(model) == bits(tuned)
        delta.revert(model)
        assert bits(model) == bits(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_may_be_stored_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = mlp()
    tuned = changed(base)
    delta = Delta.between(base, tuned)
    delta.save(tmp_path / "delta", values_dtype=dtype)
    back = Delta.load(tmp_path / "delta")
    assert back.dtypes == [str(dtype).removeprefix("torch.")]
    assert delta.dtypes == ["float32"]
    back.apply(base)
    for name, p in base.named_parameters():
        i = delta.mask.indices.get(name, torch.tensor([], dtype=torch.int64))
        assert torch.equal(p.view(-1)[i], tuned.get_parameter(name).view(-1)[i].to(dtype).float())


def test_conversion_refuses_overflow_by_name(tmp_path: Path) -> None:
    base = {"fine": torch.zeros(2), "large": torch.zeros(2), "inf": torch.zeros(2)}
    tuned = {"fine": torch.ones(2), "large": torch.tensor([1.0, 7e4]), "inf": torch.tensor([1.0, float("inf")])}
    delta = Delta.between(base, tuned)
    with pytest.raises(ValueError, match=r"beyond the range of float16 in: large$"):
        delta.save(tmp_path / "delta", values_dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    delta.save(tmp_path / "delta", values_dtype=torch.bfloat16)


def test_an_adapter_on_the_hub_is_found_whatever_is_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = mlp(), changed(mlp())
    place = tmp_path / "models--some--tiny-v1.0"
    for folder in ("refs", f"snapshots/{'a' * 40}/task"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    for folder in (".", "task"):
        Delta.between(base, tuned).save(place / "snapshots" / ("a" * 40) / folder / ADAPTER_FILE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load(base, "some/tiny-v1.0")
    assert bits(base) == bits(tuned)
    with pytest.raises(FishError, match=r"cannot find an adapter at 'some/tiny-v2\.0': .*or a name on the hub"):
        load(base, "some/tiny-v2.0")
    with pytest.raises(FileNotFoundError):
        load(base, "some/tiny.safetensors")
    with pytest.raises(FishError, match="has no subfolder missing; it has adapters in subfolders: task"):
        adapter_folder(place / "snapshots" / ("a" * 40), subfolder="missing")


def test_save_refuses_unknown_options(tmp_path: Path) -> None:
    delta = Delta.between({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"one of float32, bfloat16, float16; got torch.float64"):
        delta.save(tmp_path / "d", values_dtype=torch.float64)
    with pytest.raises(ValueError, match="'coded' or 'raw', got 'plain'"):
        delta.save(tmp_path / "d", indices="plain")


@pytest.mark.parametrize("indices", ["coded", "raw"])
def test_a_dtype_that_the_format_lacks_is_refused(indices: str, tmp_path: Path) -> None:
    delta = Delta.between(*({"w": torch.tensor([x]).to(torch.float8_e5m2fnuz)} for x in (0.0, 1.0)))
    with pytest.raises(
        ValueError, match=r"torch.float8_e5m2fnuz cannot be saved; the file format knows float64, float32"
    ):
        delta.save(tmp_path / "delta", indices=indices)


def test_summary_names_base_values_and_layers() -> None:
    base = case("conv").make()
    tuned = changed(base)
    tuned.norm.running_mean += 1
    text = Delta.between(base, tuned, base_name="tiny", base_revision="v2").summary()
    for part in ("base tiny at v2", "float32", "1 whole buffers", "stem"):
        assert part in text
    assert "base='tiny'" in repr(Delta.between(base, tuned, base_name="tiny"))


# --- made by hand -----------------------------------------------------------------------------------------------------


def parts() -> tuple[nn.Module, Mask, dict[str, Tensor], dict[str, str]]:
    model = mlp()
    mask = Mask.from_indices({"0.weight": [1, 4], "2.bias": [0, 1, 2]}, model)
    values = {"0.weight": torch.ones(2), "2.bias": torch.zeros(3)}
    return model, mask, values, fingerprint(model.named_parameters(), mask)


def test_the_parts_of_a_delta_must_fit_each_other() -> None:
    _, mask, values, base = parts()
    Delta(mask, values, base=base)
    with pytest.raises(ValueError, match=r"one of them lacks: 2\.bias"):
        Delta(mask, {"0.weight": values["0.weight"]}, base=base)
    with pytest.raises(ValueError, match=r"one of them lacks: new"):
        Delta(mask, values | {"new": torch.ones(1)}, base=base)
    with pytest.raises(ValueError, match=r"values of 2\.bias must have shape \(3,\), got \(2,\)"):
        Delta(mask, values | {"2.bias": torch.ones(2)}, base=base)
    with pytest.raises(TypeError, match=r"values of 2\.bias must be floating-point, got torch.int64"):
        Delta(mask, values | {"2.bias": torch.tensor([1, 2, 3])}, base=base)
    with pytest.raises(ValueError, match=r"wrong or missing: 0\.bias, 2\.weight$"):
        Delta(mask, values, base={"0.weight": base["0.weight"]})
    with pytest.raises(ValueError, match="with_shapes"):
        Delta(Mask.from_indices(mask.indices), values, base=base)


def test_a_delta_keeps_its_own_values() -> None:
    model, mask, values, base = parts()
    delta = Delta(mask, values, base=base)
    values["0.weight"].fill_(7)
    delta.apply(model)
    assert model[0].weight.view(-1)[[1, 4]].tolist() == [1, 1]


def test_requires_grad_stays_as_it_was() -> None:
    model, mask, values, base = parts()
    model[0].weight.requires_grad_(False)
    delta = Delta(mask, values, base=base)
    delta.apply(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    delta.revert(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


# --- the base check ---------------------------------------------------------------------------------------------------


def unfit(delta: Delta, model: nn.Module, **options: bool) -> str:
    """Return the refusal, having checked that it changed nothing."""
    before = bits(model)
    with pytest.raises(FishError) as caught:
        delta.apply(model, **options)
    assert bits(model) == before
    with pytest.raises(FishError, match="not applied"):
        delta.revert(model)
    return str(caught.value)


def test_other_weights_are_refused_by_name() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base, names=["0.weight"]))
    outside = next(i for i in range(40) if i not in delta.mask.indices["0.weight"])
    with torch.no_grad():
        base[0].weight.view(-1)[outside] += 1e-7
        base[2].bias[0] = -base[2].bias[0]
    message = unfit(delta, base)
    assert "other weights: 0.weight, 2.bias" in message
    assert "check_base=False applies" in message
    delta.apply(base, check_base=False)
    assert torch.equal(base[0].weight.view(-1)[delta.mask.indices["0.weight"]], delta.values["0.weight"])


def test_another_dtype_of_the_base_is_refused_and_explained() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base))
    assert "in every parameter: another base, or the same in another dtype" in unfit(delta, base.bfloat16())
    delta.apply(base, check_base=False)
    delta.revert(base)


def test_all_that_is_wrong_comes_in_one_message() -> None:
    def model(renamed: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = {"same": nn.Linear(3, 3), "small": nn.Linear(3, 2), "old": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}
        if renamed:
            layers["new"] = layers.pop("old")
            layers["small"] = nn.Linear(3, 1)
            layers["idle"] = nn.Linear(1, 2)
            nn.init.zeros_(layers["same"].bias)
        return nn.ModuleDict(layers)

    tuned = model(False)
    with torch.no_grad():
        for name in ("same", "small", "old"):
            tuned[name].weight[0, 0] += 1
    delta = Delta.between(model(False), tuned)
    message = unfit(delta, model(True))
    for part in (
        "missing from the model: old.weight",
        "missing from the model: old.bias",
        "other shape: small.weight is [1, 3], the delta expects [2, 3]",
        "other shape: idle.weight is [2, 1], the delta expects [2, 2]",
        "unknown to the delta: new.weight, new.bias",
        "other weights: same.bias",
    ):
        assert part in message
    assert "check_base=False" not in message
    without = unfit(delta, model(True), check_base=False)
    assert "old.weight" in without
    assert "small.weight" in without
    assert "idle" not in without
    assert "new" not in without


def test_a_parameter_taken_whole_may_start_from_anything() -> None:
    base = mlp()
    tuned = copy.deepcopy(base)
    nn.init.normal_(tuned[2].weight)
    nn.init.normal_(tuned[2].bias)
    delta = Delta.between(base, tuned)
    nn.init.normal_(base[2].weight)
    nn.init.normal_(base[2].bias)
    delta.apply(base)
    assert bits(base) == bits(tuned)


def test_a_tied_parameter_is_found_under_any_name() -> None:
    model = case("gpt2").make()
    canonical, alias = "transformer.wte.weight", "lm_head.weight"
    mask = Mask.from_indices({canonical: [0, 5]}, model)
    base = fingerprint(model.named_parameters(), mask)
    renamed = {alias if name == canonical else name: p.shape for name, p in model.named_parameters()}
    delta = Delta(
        Mask.from_indices({alias: [0, 5]}, renamed),
        {alias: torch.tensor([1.0, 2.0])},
        base={alias if name == canonical else name: text for name, text in base.items()},
    )
    before = bits(model)
    delta.apply(model)
    assert model.lm_head.weight.view(-1)[[0, 5]].tolist() == [1.0, 2.0]
    delta.revert(model)
    assert bits(model) == before


def test_two_names_of_one_tied_parameter_are_refused() -> None:
    model = case("gpt2").make()
    untied = {name: t.clone() for name, t in model.state_dict().items()}
    tuned = {name: t.clone() for name, t in untied.items()}
    tuned["lm_head.weight"][0, 0] = 5
    tuned["transformer.wte.weight"][0, 0] = 6
    message = unfit(Delta.between(untied, tuned), model)
    assert "one tied parameter in this model: transformer.wte.weight, lm_head.weight" in message


def test_values_beyond_the_range_of_the_weights_are_refused() -> None:
    base = mlp()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].bias[0] = 1e6
    assert "range of its dtype: 0.bias" in unfit(Delta.between(base, tuned), base.half(), check_base=False)


def test_a_model_without_memory_is_refused() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base))
    with pytest.raises(FishError, match="meta device"):
        delta.apply(copy.deepcopy(base).to("meta"))


def test_the_whole_fingerprint_counts_where_the_short_ones_agree() -> None:
    model, mask, values, base = parts()
    almost = Delta(mask, values, base=Base(Base.of(base).short, "0" * 64))
    assert "other weights in every parameter" in unfit(almost, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints_see_dtype_shape_and_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, dtype=dtype)
    strided = torch.arange(6).to(dtype).view(3, 2).t()
    assert tensor_hash(strided) == tensor_hash(strided.contiguous())
    assert tensor_hash(tensor[0, 0]) != tensor_hash(tensor[0, :1])
    different = [tensor, -tensor, tensor.view(3, 2), tensor[:0], tensor[0, 0], tensor.to(torch.int64), strided]
    assert len({tensor_hash(t) for t in different}) == len(different)
    assert tensor_hash(nn.Parameter(tensor)) == tensor_hash(tensor)


def test_fingerprints_read_one_tensor_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def temporaries():
        for i in range(4):
            tensor = torch.full((3,), float(i))
            assert sum(ref() is not None for ref in alive) <= 1  # at most the one before, still in the caller's hands
            alive.append(weakref.ref(tensor))
            yield f"p{i}", tensor

    assert len(fingerprint(temporaries(), Mask.from_indices({}))) == 4


# --- stacking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_stacked_deltas_revert_in_any_order(dtype: torch.dtype, data: st.DataObject) -> None:
    base = case("conv").make().to(dtype)
    tuned = [changed(base, density=0.5, seed=seed) for seed in range(4)]
    for i, model in enumerate(tuned):
        if i % 2:
            model.norm.running_mean.fill_(i)
    deltas = [Delta.between(base, model) for model in tuned]
    model, stack = copy.deepcopy(base), []
    for _ in range(data.draw(st.integers(1, 10))):
        step = data.draw(st.integers(0, 3))
        if step in stack:
            deltas[step].revert(model)
            stack.remove(step)
        else:
            deltas[step].apply(model)
            stack.append(step)
        assert bits(model) == bits(laid_over(base, [deltas[i] for i in stack]))
    for step in data.draw(st.permutations(stack)):
        deltas[step].revert(model)
    assert bits(model) == bits(base)


def laid_over(base: nn.Module, deltas: list[Delta]) -> dict[str, Tensor]:
    """The state that a stack of deltas must give, oldest first."""
    state = {name: t.clone() for name, t in base.state_dict().items()}
    for delta in deltas:
        for name, indices in delta.mask.indices.items():
            state[name].view(-1)[indices] = delta.values[name]
        state |= {name: buffer.clone() for name, buffer in delta.buffers.items()}
    return state


def test_a_delta_made_on_top_of_another_fits_there_and_only_there() -> None:
    base = mlp()
    first, second = changed(base, seed=1), None
    second = changed(first, seed=2)
    below, above = Delta.between(base, first), Delta.between(first, second)
    model = copy.deepcopy(base)
    unfit(above, model)
    below.apply(model)
    above.apply(model)
    assert bits(model) == bits(second)
    below.revert(model)
    above.revert(model)
    assert bits(model) == bits(base)


def test_the_base_below_other_deltas_is_checked() -> None:
    base = mlp()
    first, second = Delta.between(base, changed(base, seed=1)), Delta.between(base, changed(base, seed=2))
    model = copy.deepcopy(base)
    outside = next(i for i in range(40) if i not in {*first.mask.indices["0.weight"].tolist()})
    with torch.no_grad():
        model[0].weight.view(-1)[outside] += 1
    first.apply(model, check_base=False)
    with pytest.raises(FishError, match=r"other weights: 0\.weight"):
        second.apply(model)


def test_a_delta_applies_once() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base))
    delta.apply(base)
    with pytest.raises(FishError, match="applied to this model already"):
        delta.apply(base)


def test_revert_knows_the_model() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base))
    delta.apply(base)
    with pytest.raises(FishError, match="not applied to this model"):
        delta.revert(copy.deepcopy(base))
    delta.revert(base)
    with pytest.raises(FishError, match="not applied to this model"):
        delta.revert(base)


@pytest.mark.parametrize("how", ["entry", "dtype", "replaced"])
def test_weights_changed_by_others_are_not_reverted(how: str) -> None:
    base = mlp()
    delta = Delta.between(base, changed(base, names=["0.weight", "2.weight"]))
    delta.apply(base)
    with torch.no_grad():
        if how == "entry":
            base[2].weight.view(-1)[delta.mask.indices["2.weight"][-1]] += 1
        elif how == "dtype":
            base[2].bfloat16()
        else:
            base[2] = nn.Linear(1, 1)
    before = bits(base)
    with pytest.raises(FishError, match=r"changed after the delta was applied: 2\.weight;"):
        delta.revert(base)
    assert bits(base) == before


def test_a_change_of_dtype_is_seen_though_the_bits_agree() -> None:
    base = mlp(torch.bfloat16)
    tuned = copy.deepcopy(base)
    nn.init.zeros_(tuned[0].weight)
    delta = Delta.between(base, tuned)
    delta.apply(base)
    base.half()
    with pytest.raises(FishError, match=r"changed after the delta was applied: 0\.weight;"):
        delta.revert(base)


def test_changes_at_other_entries_survive_a_revert() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base, names=["0.weight"]))
    delta.apply(base)
    with torch.no_grad():
        base[2].bias += 1
    expected = base[2].bias.clone()
    delta.revert(base)
    assert torch.equal(base[2].bias, expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_non_contiguous_weights_are_written_in_row_major_order(
    deterministic: bool, request: pytest.FixtureRequest
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    base = copy.deepcopy(model.state_dict())
    tuned = {name: t.clone(memory_format=torch.contiguous_format) for name, t in base.items()}
    tuned["weight"][1, 0] = 9
    assert not model.weight.is_contiguous()
    delta = Delta.between(base, tuned)
    assert delta.mask.indices["weight"].tolist() == [3]
    delta.apply(model)
    assert model.weight[1, 0] == 9
    assert not model.weight.is_contiguous()
    delta.revert(model)
    assert bits(model) == bits(base)


def test_the_memory_of_a_delta_goes_with_the_model() -> None:
    base = mlp()
    delta = Delta.between(base, changed(base))
    delta.apply(base)
    assert base in _history
    ref = weakref.ref(base)
    del base
    gc.collect()
    assert ref() is None


def test_buffers_outside_the_state_dict_are_not_part_of_a_delta() -> None:
    base = mlp()
    base.register_buffer("cache", torch.zeros(2), persistent=False)
    tuned = changed(base)
    tuned.cache += 1
    assert Delta.between(base, tuned).buffers == {}


def test_buffers_of_other_models_are_refused() -> None:
    a, b = case("conv").make(), case("conv").make()
    b.norm.register_buffer("extra", torch.ones(2))
    with pytest.raises(ValueError, match=r"not of one model.*norm\.extra is only in the second"):
        Delta.between(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_everything_is_the_same(tmp_path: Path) -> None:
    base = mlp()
    tuned = changed(base)
    delta = Delta.between(copy.deepcopy(base).cuda(), copy.deepcopy(tuned).cuda())
    assert delta.mask == Mask.between(base, tuned)
    delta.save(tmp_path / "delta")
    model = copy.deepcopy(base).cuda()
    loaded = load(model, tmp_path / "delta")
    assert bits(model) == bits(tuned)
    model.cpu()
    loaded.revert(model)
    assert bits(model) == bits(base)


# --- size -------------------------------------------------------------------------------------------------------------


def minilm_shapes() -> dict[str, tuple[int, ...]]:
    """The 105 parameters of MiniLM with a head, by shape: 22.7 million entries."""
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (30522, 384),
        "bert.embeddings.position_embeddings.weight": (512, 384),
        "bert.embeddings.token_type_embeddings.weight": (2, 384),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (384,)

    norm("bert.embeddings.LayerNorm")
    for i in range(6):
        layer = f"bert.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", 384, 384)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 1536, 384)
        linear(f"{layer}.output.dense", 384, 1536)
        norm(f"{layer}.output.LayerNorm")
    linear("bert.pooler.dense", 384, 384)
    linear("classifier", 1, 384)
    return shapes


def entropy_bytes(n: int, k: int) -> float:
    """log2 C(n, k) / 8."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


def full_size_delta(mask: Mask) -> Delta:
    g = torch.Generator().manual_seed(0)
    values = {name: torch.randn(len(i), generator=g) for name, i in mask.indices.items()}
    hashes = {name: f"{torch.randint(2**62, (), generator=g).item():064x}"[::-1] for name in mask.shapes}
    whole = [name for name, i in mask.indices.items() if len(i) == mask.shapes[name].numel()]
    base = {name: text for name, text in hashes.items() if name not in whole}
    return Delta(mask, values, base=base, base_name="sentence-transformers/all-MiniLM-L6-v2", base_revision="0" * 40)


@pytest.mark.parametrize("density", [0.0002, 0.001, 0.005, 0.02, 0.1])
def test_random_masks_cost_little_more_than_their_entropy(density: float, tmp_path: Path) -> None:
    shapes = minilm_shapes()
    mask = Mask.random({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, density, seed=0)
    assert len(shapes) == 105
    assert 22.7e6 < mask.n < 22.8e6
    delta = full_size_delta(mask)
    for dtype in (torch.float32, torch.bfloat16):
        delta.save(tmp_path / "delta", values_dtype=dtype)
        size = (tmp_path / "delta").stat().st_size
        assert size <= 1.10 * (mask.k * dtype.itemsize + entropy_bytes(mask.n, mask.k))


def test_clustered_masks_cost_less_than_the_entropy_of_random_ones(tmp_path: Path) -> None:
    # The squared gradients of a linear layer are close to an outer product: entries cluster in rows and columns.
    g = torch.Generator().manual_seed(0)

    def scores(shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=g)
        for axis, size in enumerate(shape):
            noise += 1.5 * torch.randn([size if i == axis else 1 for i in range(len(shape))], generator=g)
        return noise

    shapes = {name: shape for name, shape in minilm_shapes().items() if "embeddings" not in name}
    mask = Mask.from_scores({name: scores(shape) for name, shape in shapes.items()}, 0.005)
    full_size_delta(mask).save(tmp_path / "delta")
    assert (tmp_path / "delta").stat().st_size < 4 * mask.k + entropy_bytes(mask.n, mask.k)


def test_an_absolute_path_that_is_missing_is_no_name_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError):
        load(nn.Linear(1, 1), "/missing")
