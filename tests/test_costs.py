"""What plans are chosen by: built-in figures, measured ones, and what is told about both."""

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fishmask import Mask, attach, calibrate, costs
from fishmask.cli import app
from fishmask.costs import CPU, GPU, Costs, built_in, costs_for, forget, path_for, planned_for, store
from fishmask.explain import explain
from fishmask.hub import without_weights
from fishmask.plans import ProductPlan
from tests import tiny
from tests.cases import case

HERE = torch.device("cpu")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure few rounds, where the figures do not matter."""
    monkeypatch.setattr(calibrate, "_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "_ROUNDS", 1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep away from what the user has stored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs._stored.cache_clear()
    yield tmp_path
    costs._stored.cache_clear()


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["costs", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


# --- kept -------------------------------------------------------------------------------------------------------------


def test_nothing_is_stored_unless_asked_for(folder: Path, hasty: None) -> None:
    assert costs_for("cpu") == CPU == built_in(HERE)
    assert built_in(torch.device("cuda")) == GPU
    calibrate.calibrate("cpu")
    ProductPlan(torch.arange(3), (4, 4), device=HERE)
    call()
    assert not list(folder.iterdir())


def test_stored_figures_serve_until_they_are_forgotten(folder: Path) -> None:
    mine = replace(CPU, sampled=1e-6)
    path = store(mine, "cpu")
    assert path.is_relative_to(folder) and costs_for("cpu") == mine
    scattered = torch.arange(0, 64 * 64, 3)
    assert ProductPlan(scattered, (64, 64), device=HERE, costs=CPU).kind == "block"
    cheap = replace(mine, transpose=1e-6)
    store(cheap, HERE)
    assert ProductPlan(scattered, (64, 64), device=HERE).kind == "sampled"
    assert forget("cpu") and costs_for("cpu") == CPU and not forget("cpu")


def test_they_are_for_one_number_of_threads() -> None:
    threads = torch.get_num_threads()
    mine = replace(CPU, part=7.0)
    store(mine, "cpu")
    try:
        torch.set_num_threads(threads + 1)
        assert costs_for("cpu") == CPU
    finally:
        torch.set_num_threads(threads)
    assert costs_for("cpu") == mine


def other(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps(record | changes)


DAMAGE = {
    "empty": lambda record: "",
    "no JSON": lambda record: other(record)[:-20],
    "a list": lambda record: "[1]",
    "not text": lambda record: "\udcff",
    "another device": lambda record: other(record, device="Abacus"),
    "another version of PyTorch": lambda record: other(record, torch="1.0"),
    "a later format": lambda record: other(record, version=2),
    "a figure is missing": lambda record: other(record, costs={"read": 1.0}),
    "a figure is negative": lambda record: other(record, costs=record["costs"] | {"read": -1.0}),
    "a figure is not finite": lambda record: other(record, costs=record["costs"] | {"read": float("nan")}),
    "a figure is text": lambda record: other(record, costs=record["costs"] | {"read": "1"}),
    "a figure that must be there is null": lambda record: other(record, costs=record["costs"] | {"read": None}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_damaged_or_foreign_is_ignored_with_one_warning(name: str) -> None:
    path = store(replace(CPU, part=7.0), "cpu")
    text = DAMAGE[name](json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"(?s)are ignored: .*fishmask costs --calibrate") as told:
        assert costs_for("cpu") == CPU
    assert len(told) == 1
    assert costs_for("cpu") == CPU  # and not again


def test_an_unreadable_file_is_ignored_and_an_unwritable_folder_is_an_error(folder: Path) -> None:
    path = path_for(HERE)
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="are ignored"):
        assert costs_for("cpu") == CPU
    with pytest.raises(OSError):
        store(CPU, "cpu")


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert path_for(HERE).is_relative_to(Path.home() / ".cache" / "fishmask")


def test_who_has_no_home_has_the_built_in_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert costs_for("cpu") == CPU
    with pytest.raises(FileNotFoundError, match="set XDG_CACHE_HOME"):
        store(CPU, "cpu")


def test_a_model_without_data_stands_for_any_device() -> None:
    assert costs_for("meta") == CPU
    with planned_for("cuda"):
        assert costs_for("meta").sampled is None and costs_for("cpu") == CPU
    assert costs_for("meta") == CPU


# --- measured ---------------------------------------------------------------------------------------------------------


def test_calibration_takes_less_than_a_second_and_tells_the_cheap_from_the_dear() -> None:
    start = time.perf_counter(), time.process_time()
    found = calibrate.calibrate("cpu")
    assert min(time.perf_counter() - start[0], time.process_time() - start[1]) < 1.0
    known = {name: cost for name, cost in asdict(found).items() if cost is not None}
    assert {name for name, cost in asdict(CPU).items() if cost is not None} == set(known)
    assert all(cost > 0 for cost in known.values())
    # Orders of magnitude, which no load on the machine turns round.
    assert found.transpose is not None and found.multiply < found.transpose < found.part
    assert found.multiply < found.spread < found.part


def test_calibration_solves_for_what_was_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that follow the model of costs exactly give back its figures."""
    T, D, few = calibrate._TOKENS["cpu"], calibrate._WIDTH["cpu"], calibrate._NARROW
    true = Costs(
        multiply=0.02, read=0.3, gather=0.7, skip=0.1, part=33.0, scatter=5.0, spread=2.0, nonzero=0.04, transpose=0.9,
        sampled=0.2,
    )  # fmt: skip
    at, csr = (len(calibrate._scattered(D, share)) for share in (calibrate._SHARE, calibrate._CSR_SHARE))
    per_token = {
        "wide product": true.product(D, D),
        "narrow product": true.product(few, D),
        "wide copy": true.copy(D // 2, D),
        "narrow copy": true.copy(few, D),
        "small part": true.part * calibrate._MIDDLING / T,
        "scatter": true.scatter * D,
        "CSR product": 0.04 * csr + 2.0 * 2 * D,
        "empty CSR product": 2.0 * 2 * D,
        "sampled product": 0.2 * at + 0.9 * 2 * D,
        "transposition": 0.9 * D,
    }
    monkeypatch.setattr(calibrate, "_least_nanoseconds", lambda *_: {name: T * t for name, t in per_token.items()})
    found = asdict(calibrate.calibrate("cpu"))
    assert {name: cost for name, cost in found.items() if cost is not None} == pytest.approx(
        {name: cost for name, cost in asdict(true).items() if cost is not None}, rel=1e-6
    )
    assert set(calibrate._measurements(8, D, torch.float32, HERE)) == set(per_token)


def test_only_known_kinds_of_device_are_calibrated() -> None:
    with pytest.raises(ValueError, match="on cpu and cuda, but the device is meta"):
        calibrate.calibrate("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calibration_of_a_gpu_measures_the_kernels() -> None:
    calibrate.calibrate("cuda")  # compiles them
    start = time.perf_counter()
    found = calibrate.calibrate("cuda")
    assert time.perf_counter() - start < 1.0
    assert found.tile and found.square and found.grouped and found.sampled is None


# --- told -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv"])
def test_what_is_explained_is_what_is_attached(name: str) -> None:
    model = case(name).make()
    mask = Mask.random(model, density=0.1, seed=0)
    ways = {way.name: way for way in explain(model, mask)}
    assert not model.__dict__.get("_forward_hooks") and set(ways) == set(mask.indices)
    tuning = attach(model, mask)
    plans = {site.weight.values: site.plan for site in tuning._wiring._sites if hasattr(site, "plan")}
    of = {values: name for name, values in zip(mask.indices, tuning.parameters(), strict=True)}
    assert plans
    for values, plan in plans.items():
        way = ways[of[values]]
        assert way.nbytes == plan.nbytes and way.entries == len(values)
        if isinstance(plan, ProductPlan):
            assert way.kind == plan.kind and way.costs[way.kind] == plan.costs[plan.kind]
    assert {way.kind for way in ways.values()} >= {"sum"}
    assert (tuning.general == ()) or {ways[name].kind for name in tuning.general} <= {"dense"}


def test_explaining_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no such parameter"):
        explain(nn.Linear(3, 4), Mask.from_indices({"other": torch.tensor([1])}, shapes={"other": (3, 3)}))


def test_the_command_shows_measures_and_forgets(hasty: None) -> None:
    shown = json.loads(call("--device", "cpu", "--json").stdout)
    assert shown["file"] is None and shown["nanoseconds_per_token"] == asdict(CPU)
    measured = json.loads(call("--device", "cpu", "--calibrate", "--json").stdout)
    assert Path(measured["file"]).exists()
    again = json.loads(call("--device", "cpu", "--json").stdout)
    assert again == measured and again["nanoseconds_per_token"] == asdict(costs_for("cpu"))
    text = call("--device", "cpu").stdout
    assert "measured" in text and all(field.name in text for field in fields(Costs))
    assert json.loads(call("--device", "cpu", "--forget", "--json").stdout) == shown
    assert "opposites" in call("--calibrate", "--forget", code=2).stderr
    assert "go together" in call("--model", "m", code=2).stderr


def test_the_command_tells_the_way_of_each_layer(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    mask = Mask.random(without_weights(folder), density=0.1, seed=0)
    mask.save(tmp_path / "mask.st")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = json.loads(call("--device", "cpu", "--model", folder, "--mask", tmp_path / "mask.st", "--json").stdout)
    assert {layer["name"]: layer["entries"] for layer in told["layers"]} == {
        name: len(indices) for name, indices in mask.indices.items()
    }
    text = call("--device", "cpu", "--model", folder, "--mask", tmp_path / "mask.st").stdout
    assert "The way of each weight" in text and "lookup" in text
