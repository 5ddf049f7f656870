"""The commands ``fishmask checkpoints ...`` on logs of tiny models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import fishmask
from fishmask.cli import app


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).eval()


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])
    return result.exit_code, result.output


def as_json(*arguments: object) -> dict:
    code, output = call(*arguments, "--json")
    assert code == 0, output
    return json.loads(output)


@pytest.fixture
def trained(tmp_path: Path):
    """Make a log of four commits, with a change of mask after the second; return it and the state at each."""
    model = tiny_bert()
    tuning = fishmask.attach(model, fishmask.Mask.random(model, 0.05, seed=0, keep="classifier"))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1)
    states = {}
    with fishmask.CheckpointLog(tmp_path / "log") as log:
        for step in range(1, 5):
            if step == 3:
                tuning.set_mask(fishmask.Mask.random(model, 0.05, seed=1, keep="classifier"), optimizer)
            for p in tuning.parameters():
                p.grad = torch.full_like(p, float(step))
            optimizer.step()
            log.commit(tuning, optimizer, step=10 * step, state={"epoch": step})
            states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tmp_path / "log", states


def test_list_and_show(trained) -> None:
    log, _ = trained
    listed = as_json("list", log)
    assert [(row["number"], row["step"], row["segment"]) for row in listed] == [
        (1, 10, 1),
        (2, 20, 1),
        (3, 30, 2),
        (4, 40, 2),
    ]
    assert all(row["bytes"] == Path(row["path"]).stat().st_size for row in listed)
    assert len({row["mask"] for row in listed}) == 2
    code, output = call("list", log)
    assert code == 0
    assert "30" in output
    shown = as_json("show", log, "--at", 3)
    assert (shown["step"], shown["segments"], shown["state"]) == (30, [1, 2], ["epoch"])
    assert shown["optimizer"] == ["exp_avg", "exp_avg_sq"]
    assert shown["base_stored"] is True
    assert as_json("show", log)["commit"] == 4


def test_export_writes_a_folder_that_transformers_loads(trained, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    log, states = trained
    for at, arguments in ((2, ["--at", 2]), (4, [])):
        facts = as_json("export", log, "-o", tmp_path / "model", *arguments)
        assert facts["commit"] == at
        state = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in states[at].items())


def test_export_of_a_log_without_its_base_takes_the_base_from_a_folder(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    tuning = fishmask.attach(model, fishmask.Mask.random(model, 0.05, seed=0, keep="classifier"))
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(1)
    with fishmask.CheckpointLog(tmp_path / "log", store_base=False) as log:
        log.commit(tuning)
    code, output = call("export", tmp_path / "log", "-o", tmp_path / "model")
    assert code == 1
    assert "--base" in output
    as_json("export", tmp_path / "log", "-o", tmp_path / "model", "--base", tmp_path / "base")
    tuning.write_back()
    state = type(model).from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_restore_makes_an_earlier_commit_the_newest_and_keeps_the_others(trained) -> None:
    log, states = trained
    facts = as_json("restore", log, 1)
    assert facts["newest"] == 5
    assert [row["step"] for row in as_json("list", log)] == [10, 20, 30, 40, 10]
    model = tiny_bert()
    fishmask.CheckpointLog(log).restore(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in states[1].items())
    code, output = call("restore", log, 77)
    assert code == 1
    assert "1, 2, 3, 4, 5" in output


def test_compact_leaves_one_commit_of_the_same_model(trained) -> None:
    log, states = trained
    facts = as_json("compact", log)
    assert facts["bytes"] < facts["bytes_before"]
    assert [row["step"] for row in as_json("list", log)] == [40]
    model = tiny_bert()
    fishmask.CheckpointLog(log).restore(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in states[4].items())


def test_verify_names_the_damaged_file_and_exits_with_one(trained) -> None:
    log, _ = trained
    assert as_json("verify", log) == {
        "log": str(log),
        "intact": True,
        "commits": 4,
        "newest_intact_commit": 4,
        "problems": [],
    }
    path = log / "commit-00000004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, output = call("verify", log, "--json")
    assert code == 1
    facts = json.loads(output)
    assert (facts["intact"], facts["newest_intact_commit"]) == (False, 3)
    assert facts["problems"][0].startswith(path.name)


def test_list_goes_past_a_damaged_header(trained) -> None:
    log, _ = trained
    (log / "commit-00000002.safetensors").write_bytes(b"not a header")
    result = CliRunner().invoke(app, ["checkpoints", "list", str(log), "--json"])
    assert result.exit_code == 0
    assert [row["number"] for row in json.loads(result.stdout)] == [1, 3, 4]
    assert "damaged header: 2;" in result.stderr


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for command in ("list", "show", "verify", "compact", "export"):
        code, output = call(command, tmp_path / "absent")
        assert code == 1, command
        assert "absent" in output
    assert not (tmp_path / "absent").exists()
