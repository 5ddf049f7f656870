"""`fishmask score` of language models, in passes, planned, interrupted and resumed."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fishmask import FishError, fisher
from fishmask.cli_score import bytes_named
from fishmask.data import encode, read_examples
from fishmask.hub import load_language_model
from fishmask.scorefile import read_scores, write_scores
from tests import tiny
from tests.cases import LLAMA
from tests.test_cli import answer, call, refusal


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bfloat16 Llama in shards, a tokenizer, and a table of texts."""
    folder = tmp_path_factory.mktemp("cli_score")
    tiny.model_folder(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).bfloat16()
    model.save_pretrained(folder / "model", max_shard_size="2KB")
    tiny.table(folder / "texts.tsv", rows=12)
    return folder


def score(place, *options):
    return ("score", place / "model", place / "texts.tsv", "--task", "lm", "--batch-size", 4, *options)


def test_a_language_model_is_scored_by_its_own_tokens(place, tmp_path):
    """In bfloat16, read from shards, each text labelled with itself; padding counts for nothing."""
    assert len(list((place / "model").glob("model-*.safetensors"))) > 1
    call(*score(place, "-o", tmp_path / "s.st"))
    loaded = load_language_model(str(place / "model"))
    assert loaded.model.dtype == torch.bfloat16 and loaded.head == ()
    encoded = encode(read_examples(place / "texts.tsv", "text"), loaded.tokenizer, 128)
    batches = [
        {"input_ids": b["input_ids"], "labels": b["input_ids"].where(b["attention_mask"] == 1, -100)}
        | {"attention_mask": b["attention_mask"]}
        for b in encoded.sample(12, 4, 0)
    ]
    expected = fisher(loaded.model, batches, examples=12)
    found = load_file(tmp_path / "s.st")
    assert found.keys() == expected.keys() and "lm_head.weight" not in found  # it is tied
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sum(int(score.count_nonzero()) for score in found.values()) > 0


def test_passes_and_a_work_folder_change_no_bit(place, tmp_path):
    call(*score(place, "-o", tmp_path / "plain.st"))
    options = ("--memory", "4KB", "--work", tmp_path / "work", "-o", tmp_path / "passes.st")
    told = call(*score(place, *options)).stderr
    assert "passes" in told and "each over 12 examples in 3 batches" in told
    assert (tmp_path / "plain.st").read_bytes() == (tmp_path / "passes.st").read_bytes()
    assert not (tmp_path / "work").exists()


def test_an_interrupted_command_goes_on(monkeypatch, place, tmp_path):
    """The scores cannot be written where the second pass ends; afterwards they can."""
    import fishmask.score_folder as module

    options = ("--memory", "4KB", "--work", tmp_path / "work", "-o", tmp_path / "s.st")
    plain, turns = module.replace_file, iter(range(100))

    def full(path, parts):
        if path.name.startswith("scores-") and next(turns) == 1:
            raise OSError(28, "No space left on device", str(path))
        plain(path, parts)

    monkeypatch.setattr(module, "replace_file", full)
    result = call(*score(place, *options), code=1)
    assert "No space left on device" in result.stderr
    monkeypatch.undo()
    finished = list((tmp_path / "work").glob("scores-*.safetensors"))
    assert len(finished) == 1 and not (tmp_path / "s.st").exists()
    plan = answer(*score(place, *options, "--dry-run"))
    assert 0 < plan["done"] < plan["entries"]
    call(*score(place, *options))
    call(*score(place, "-o", tmp_path / "plain.st"))
    assert (tmp_path / "plain.st").read_bytes() == (tmp_path / "s.st").read_bytes()


def test_an_output_in_the_work_folder_is_refused(place, tmp_path):
    """The folder is deleted at the end, and nothing is worth scoring for that."""
    for output in ("scores-rte.safetensors", "sums.safetensors", "deep/s.st", "../work/s.st"):
        told = refusal(*score(place, "--work", tmp_path / "work", "-o", tmp_path / "work" / output), code=2)
        assert "is in the work folder" in told
    assert not (tmp_path / "work").exists()


def test_a_dry_run_prints_the_plan_alone(place, tmp_path):
    shown = call(*score(place, "--dry-run", "-o", tmp_path / "s.st", "--sums", "cpu", "--examples", 6))
    assert "LlamaForCausalLM" in shown.stdout and shown.stderr == ""
    assert "each over 6 examples in 2 batches" in shown.stdout
    told = answer(*score(place, "--dry-run", "-o", tmp_path / "s.st", "--memory", "0.004MB"))
    assert told["dtype"] == "bfloat16" and len(told["passes"]) > 1 and told["sums_bytes"] <= 4000
    assert not (tmp_path / "s.st").exists()


def test_misuse_is_refused(place, tmp_path):
    assert "expected a size such as 8GB" in refusal(*score(place, "--memory", "much"), code=2)
    assert "is too little" in refusal(*score(place, "--memory", "1KB"), code=2)
    assert "are for fisher and absolute" in refusal(*score(place, "--method", "snip", "--work", tmp_path), code=2)
    assert "--batch-size must be at least 1, got 0" in refusal(*score(place, "--batch-size", 0), code=2)
    assert "--max-length must be at least 1, got 0" in refusal(*score(place, "--max-length", 0), code=2)
    assert "--pair is for labelled texts" in refusal(*score(place, "--pair", "text"), code=2)
    assert [bytes_named(size, "--memory") for size in ("12", "1.5kb", "2 GB")] == [12, 1500, 2_000_000_000]
    tiny.model_folder(tmp_path / "bert")
    with pytest.raises(FishError, match=r"lacks .* weights of a model that predicts the next token"):
        load_language_model(str(tmp_path / "bert"))


def test_the_scores_file_is_written_whole_or_not_at_all(tmp_path):
    """Tensor by tensor: one that fails leaves the file as it was."""
    write_scores(tmp_path / "s.st", {"b": torch.ones(2, 3).double(), "a": torch.zeros(0)}, head=["b"], about={})
    before = (tmp_path / "s.st").read_bytes()
    found, head = read_scores(tmp_path / "s.st")
    assert list(found) == ["b", "a"] and head == ["b"] and found["b"].dtype == torch.float32
    assert torch.equal(found["b"], torch.ones(2, 3))
    with pytest.raises(NotImplementedError):
        write_scores(tmp_path / "s.st", {"a": torch.ones(2), "b": torch.ones(2, device="meta")}, head=[], about={})
    assert (tmp_path / "s.st").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s.st"]
