"""The settings of an adapter: what they choose, and what their file holds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig

import fishmask
from fishmask import FishConfig, FishError, Mask, scores
from tests.cases import case


def test_round_trip(tmp_path: Path) -> None:
    config = FishConfig(
        task_type="SEQ_CLS", density=0.01, score="snip", examples=7, labels="sampled", keep=["classifier"],
        exclude=["embeddings"], among="layers", engine="loop", seed=3, revision="abc", base_model_name_or_path="a/b",
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    assert FishConfig.from_pretrained(str(tmp_path)) == FishConfig.of_folder(tmp_path) == config
    assert isinstance(config, PeftConfig) and config.peft_type == "FISH"
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"].startswith("FISH") and content["density"] == 0.01 and "in_use" not in content


def test_settings_of_a_newer_version_are_ignored_with_a_warning(tmp_path: Path) -> None:
    FishConfig(density=0.25).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
    with pytest.warns(UserWarning, match="unknown settings of an adapter are ignored: colour"):
        assert FishConfig.of_folder(tmp_path).density == 0.25


def test_a_folder_without_a_config_gives_the_defaults(tmp_path: Path) -> None:
    assert FishConfig.of_folder(tmp_path) == FishConfig()


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(FishError, match=r"adapter_config\.json is damaged"):
        FishConfig.of_folder(tmp_path)


def test_a_config_of_another_method_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(ValueError, match="of type LORA, not FISH: load it with peft"):
        FishConfig.of_folder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"density": 0.0}, r"share in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"share in \(0, 1\], got 1.5"),
        ({"density": "abc"}, r"share in \(0, 1\], got 'abc'"),
        ({"density": None}, r"share in \(0, 1\], got None"),
        ({"density": True}, r"share in \(0, 1\], got True"),
        ({"density": float("nan")}, r"share in \(0, 1\], got nan"),
        ({"examples": 0}, "at least 1, got 0"),
        ({"examples": "many"}, "examples must be a whole number of at least 1, got 'many'"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"keep": 5}, "keep must be a list of names or patterns, got 5"),
        ({"keep": ["classifier", 5]}, "keep must be a list of names"),
        ({"exclude": None}, "exclude must be a list of names or patterns, got None"),
        ({"score": ["fisher"]}, "score must be one of fisher"),
        ({"score": "best"}, "score must be one of fisher, .*, got 'best'"),
        ({"labels": "own"}, "labels must be one of"),
        ({"among": "heads"}, "among must be one of"),
        ({"block": "16"}, "block must be 'rows', 'columns', or height and width"),
        ({"block": (16, 16)}, "block must be text such as"),
        ({"block": "rows", "score": "biases"}, "takes none"),
        ({"engine": "gpu"}, "engine must be one of"),
        ({"task_type": "COOKING"}, "Invalid task type"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FishConfig(**settings)


def test_what_is_chosen() -> None:
    bert = case("bert")
    model, batches = bert.make(), [bert.batch(4, seed) for seed in range(3)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    head = ["classifier"]
    for settings, expected in (
        ({"score": "random", "seed": 5}, Mask.random(model, 0.2, 5)),
        ({"score": "magnitude"}, Mask.magnitude(model, 0.2)),
        ({"score": "biases"}, Mask.biases(model)),
        ({"score": "random", "task_type": "SEQ_CLS"}, Mask.random(model, 0.2, 0, keep=head)),
        ({"score": "random", "task_type": "SEQ_CLS", "keep": []}, Mask.random(model, 0.2, 0)),
        ({"score": "random", "task_type": "CAUSAL_LM"}, Mask.random(model, 0.2, 0)),
        ({"score": "random", "exclude": "embeddings"}, Mask.random(model, 0.2, 0, exclude=["embeddings"])),
        ({"score": "random", "block": "2x2"}, Mask.random(model, 0.2, 0, block=(2, 2))),
        ({"score": "magnitude", "block": "rows"}, Mask.magnitude(model, 0.2, block="rows")),
        (
            {"score": "fisher", "examples": 8, "block": "columns"},
            Mask.from_scores(scores(model, batches, examples=8), 0.2, block="columns"),
        ),
        ({"score": "fisher", "examples": 8}, Mask.from_scores(scores(model, batches, examples=8), 0.2)),
        (
            {"score": "snip", "keep": "classifier", "examples": 12},
            Mask.from_scores(scores(model, batches, method="snip", examples=12), 0.2, keep=head),
        ),
    ):
        assert FishConfig(density=0.2, **settings).choose(model, batches) == expected, settings
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    among = FishConfig(density=0.05, score="random", among="layers").choose(model)
    assert all(".layer." in name and model.get_parameter(name).dim() == 2 for name in among.indices)


def test_what_cannot_be_chosen_is_said_before_the_scoring() -> None:
    model = case("bert").make()

    def never() -> Any:
        raise AssertionError("scored")
        yield

    with pytest.raises(ValueError, match="pass batches"):
        FishConfig().choose(model)
    for settings in ({"keep": ["clasifier"]}, {"exclude": ["embedings"]}):
        with pytest.raises(ValueError, match=r"matches no parameter \(close names"):
            FishConfig(**settings).choose(model, never())


def test_configs_in_use_are_no_prompts_and_others_are_not_for_peft() -> None:
    from fishmask import get_fish_model

    config = FishConfig(density=0.2, score="random")
    with pytest.raises(FishError, match="get_fish_model"):
        config.is_prompt_learning  # noqa: B018
    get_fish_model(case("mlp").make(), config)
    assert config.is_prompt_learning is False and config.is_adaption_prompt is False


_WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import fishmask
assert not {"transformers", "triton", "fishmask.fish_model"} & sys.modules.keys()
assert set(fishmask.__all__) < set(dir(fishmask)) and not hasattr(fishmask, "FishModels")
for name in ("FishConfig", "FishModel", "get_fish_model"):
    try:
        exec(f"from fishmask import {name}")
    except fishmask.FishError as error:
        print(error)
"""


def test_without_peft_the_names_that_need_it_say_so() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_PEFT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["adapters with PEFT's verbs need peft: pip install 'fishmask[peft]'"] * 3


def test_dir_names_what_is_imported_later_too() -> None:
    assert set(fishmask.__all__) < set(dir(fishmask))
    assert [getattr(fishmask, name).__name__ for name in ("FishConfig", "get_fish_model")] == [
        "FishConfig",
        "get_fish_model",
    ]
    with pytest.raises(AttributeError, match="no attribute 'FishModels'"):
        fishmask.FishModels  # noqa: B018
