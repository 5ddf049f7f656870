"""The prefix cache: what is served is what would be computed, and nothing else is ever served."""

import copy
import json
import pickle
from contextlib import nullcontext
from functools import cache as once
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishmask import FishError, Mask, PrefixCache, attach, fisher, states
from fishmask.compute import chain_of, run, step_costs
from fishmask.states import LINE_BYTES, FolderStates, MemoryStates
from tests.cases import BERT, GPT2, LLAMA, case, generator, hf, tokens

SEQ_BERT = {**BERT, "num_hidden_layers": 4}
MODELS = {
    "bert": hf("BertForSequenceClassification", "BertConfig", **SEQ_BERT, num_labels=3),
    "tags": hf("BertForTokenClassification", "BertConfig", **SEQ_BERT, num_labels=4),
    "gpt2": hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 4}),
    "llama": hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 4}),
    "roberta": hf("RobertaForSequenceClassification", "RobertaConfig", **{**SEQ_BERT, "pad_token_id": 0}, num_labels=3),
}
BATCHES = {"bert": tokens("class", True), "tags": tokens("tag", True), "gpt2": tokens("next", True)}
BATCHES |= {"llama": tokens("next", True), "roberta": tokens("class", True)}
ROOM = 10**7


def masked(model: nn.Module, lowest: int, batch=None) -> Mask:
    """Return a mask with some entries of every weight at a block or above."""
    places = step_costs(model, batch).places
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Mask.from_indices({n: range(0, sizes[n], 3) for n, place in places.items() if place >= lowest}, model)


@once
def mask_for(name: str, lowest: int) -> Mask:
    return masked(MODELS[name](), lowest, BATCHES[name](2, 0))


def start(name: str = "bert", lowest: int = 2):
    """Return an attached model and a batch of five for it."""
    return attach(MODELS[name](), mask_for(name, lowest)), BATCHES[name](5, 0)


def frozen_part(model: nn.Module, lowest: int) -> list[nn.Module]:
    """Return all modules below a block of a chain, the embeddings included, and none around it."""
    path, blocks = chain_of(model)
    above = {path, *(".".join(path.split(".")[:i]) for i in range(len(path.split("."))))}
    before = [m for name, m in model.named_modules() if "emb" in name or name.endswith((".wte", ".wpe", ".drop"))]
    assert before and not above & {name for name, m in model.named_modules() if m in before}
    return [*before, *(module for block in blocks[:lowest] for module in block.modules())]


def gradients(tuning) -> Tensor:
    found = torch.cat([values.grad for values in tuning.parameters()])
    for values in tuning.parameters():
        values.grad = None
    return found


def one_step(tuning, batch) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the values."""
    loss = tuning.model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(tuning)


def train(name: str, lowest: int, cached: bool, folder=None, **options):
    """Train three epochs on batches of two widths, with dropout above the mask; return losses and values."""
    tuning, _ = start(name, lowest)
    batches = [BATCHES[name](4, 1), BATCHES[name](3, 2)]
    rows = [
        {key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    torch.manual_seed(5)
    losses = []
    with PrefixCache(tuning, folder, limit_bytes=ROOM, **options) if cached else nullcontext() as cache:
        for epoch in range(3):
            order = torch.randperm(len(rows), generator=generator(epoch)).tolist()
            for first in (0, 4):
                batch = {key: torch.stack([rows[i][key] for i in order[first : first + 4]]) for key in rows[0]}
                width = int(batch["attention_mask"].sum(1).max())  # padded to the longest
                batch = {
                    key: value[:, :width].contiguous() if value.dim() > 1 else value for key, value in batch.items()
                }
                tuning.model.train()
                if not cached:
                    for module in frozen_part(tuning.model, lowest):
                        module.training = False
                loss = tuning.model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
    return torch.stack(losses), tuning.values.clone(), cache


@pytest.mark.parametrize(("name", "lowest"), [*((name, 1) for name in MODELS), ("bert", 4), ("llama", 4)])
def test_training_is_the_same_as_without_a_cache_and_dropout_below(name, lowest, tmp_path):
    losses, values, _ = train(name, lowest, cached=False)
    for folder in (None, tmp_path / "states")[: 2 if (name, lowest) == ("bert", 1) else 1]:
        served, reached, cache = train(name, lowest, True, folder)
        torch.testing.assert_close(served, losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reached, values, rtol=1e-4, atol=1e-5)
        assert (cache.computed, cache.served) == (7, 14) and 0 < cache.nbytes < ROOM


@pytest.mark.parametrize("name", ["bert", "tags", "gpt2", "llama"])
def test_a_batch_of_the_same_shape_gives_the_same_bits(name):
    tuning, batch = start(name)
    tuning.model.train()
    for module in frozen_part(tuning.model, 2):
        module.training = False
    with torch.random.fork_rng():
        expected = one_step(tuning, batch)
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        for _ in range(3):
            with torch.random.fork_rng():
                found = one_step(tuning, batch)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (cache.computed, cache.served) == (5, 10)


@pytest.mark.parametrize("name", ["vit", "mixtral", "torch-encoder", "bert-masked-lm"])
def test_other_models_are_served_too(name):
    model, batch = case(name).make(), case(name).batch(4, 0)
    tuning = attach(model, masked(model, 1, batch))

    def step():
        output = run(model, batch)
        loss = output.loss if hasattr(output, "loss") else F.cross_entropy(output, batch[1])
        loss.backward()
        return loss.detach(), gradients(tuning)

    expected = step()
    with PrefixCache(model, limit_bytes=ROOM) as cache:
        found = [step(), step()]
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))
    assert (cache.computed, cache.served) == (4, 4)


@pytest.mark.parametrize("folder", [None, "states"])
def test_what_is_served_is_not_run_and_only_what_is_missing_is_computed(folder, tmp_path):
    tuning, batch = start()
    bert, seen = tuning.model.bert, []
    for module in (bert.embeddings.word_embeddings, bert.encoder.layer[1].output.dense):
        module.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    below = {key: value[:3] for key, value in batch.items()}
    expected = one_step(tuning, batch)[1]
    with PrefixCache(tuning, None if folder is None else tmp_path / folder, limit_bytes=ROOM) as cache:
        one_step(tuning, below)
        seen.clear()
        one_step(tuning, below)
        assert seen == []
        torch.testing.assert_close(one_step(tuning, batch)[1], expected, rtol=1e-5, atol=1e-6)
        assert seen == [2, 2]
        with torch.no_grad():
            tuning.model(**batch)  # an evaluation is served as well
        assert seen == [2, 2]
    one_step(tuning, batch)
    assert seen[2:] == [5, 5]
    assert (cache.computed, cache.served) == (5, 3 + 3 + 5)


def test_an_example_is_known_at_any_width_but_not_with_other_tokens():
    tuning, batch = start()
    wide = {key: F.pad(value, (0, 4)) if value.dim() > 1 else value for key, value in batch.items()}
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 0] += 1
    types = {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}
    with PrefixCache(tuning, limit_bytes=ROOM) as cache, torch.no_grad():
        tuning.model(**batch)
        expected = tuning.model(**batch).logits
        torch.testing.assert_close(tuning.model(**wide).logits, expected)
        tuning.model(**{**batch, "labels": 2 - batch["labels"]})  # what the head alone looks at
        assert cache.computed == 5
        tuning.model(**other)
        assert cache.computed == 6
        tuning.model(**types)
        assert cache.computed == 11


def test_padding_on_the_left_counts_as_another_place():
    tuning, batch = start("gpt2")
    ids, mask = batch["input_ids"][:, :4].clamp(min=1), torch.ones(5, 4, dtype=torch.long)

    def at(left, right):
        return {"input_ids": F.pad(ids, (left, right)), "attention_mask": F.pad(mask, (left, right))}

    pads = [(0, 0), (0, 2), (2, 0), (2, 1)]
    plain = [tuning.model(**at(left, right)).logits[:, left : left + 4] for left, right in pads]
    with PrefixCache(tuning, limit_bytes=ROOM) as cache, torch.no_grad():
        found = [tuning.model(**at(left, right)).logits[:, left : left + 4] for left, right in pads]
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[0], plain[2], atol=1e-3)  # its positions are those of the columns
    assert (cache.computed, cache.served) == (10, 10)


def convolved(ids: Tensor, width: int) -> dict[str, Tensor]:
    """Return a batch of ids [examples, tokens] padded to a width, as a model that convolves over tokens takes it."""
    right = (0, width - ids.shape[1])
    return {"input_ids": F.pad(ids, right), "attention_mask": F.pad(torch.ones_like(ids), right)}


@pytest.mark.parametrize("first", [4, 1])
def test_padding_that_reaches_other_tokens_is_kept_and_told(first):
    sizes = {**SEQ_BERT, "embedding_size": 8, "head_ratio": 1, "conv_kernel_size": 5}
    model = hf("ConvBertForSequenceClassification", "ConvBertConfig", **sizes)()
    ids = torch.randint(3, 20, (2, 4), generator=generator(0))
    batches = [convolved(ids[:, :first], first), *(convolved(ids, width) for width in (4, 7, 4, 7))]
    tuning = attach(model, masked(model, 2, batches[1]))
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        assert not torch.allclose(expected[1], expected[2], atol=1e-4)  # the same tokens, and other states
        # One token alone tells nothing, so it is kept as a whole row, and asked again at the next batch.
        with (
            PrefixCache(tuning, limit_bytes=ROOM) as cache,
            pytest.warns(UserWarning, match="reaches other tokens") as told,
        ):
            found = [model(**batch).logits for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and len(told) == 1
    assert cache.served == (4 if first == 1 else 6)


def test_what_is_behind_the_padding_does_not_matter_in_other_models():
    for name in MODELS:
        tuning, batch = start(name)
        given = {key: value for key, value in batch.items() if key != "labels"}
        given["input_ids"] = given["input_ids"].clamp(min=3)  # padding that says something
        with PrefixCache(tuning, limit_bytes=ROOM) as cache, torch.no_grad():
            tuning.model(**given)
            tuning.model(**{key: F.pad(value, (0, 3)) for key, value in given.items()})
        assert cache.served == 5, name


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_the_limit_is_kept_and_the_rest_computed_as_usual(kind, tmp_path):
    tuning, batch = start()
    expected = one_step(tuning, batch)
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        needed = cache.estimate(batch, 5)
        assert needed == PrefixCache(start()[0], limit_bytes=1).estimate(batch, 5)  # before its `with` block
        assert needed == round(32 * int(batch["attention_mask"].sum()) + 5 * LINE_BYTES)  # 8 floats for a token
        assert (cache.nbytes, cache.computed, cache.served) == (0, 0, 0)
        one_step(tuning, batch)
        assert cache.nbytes == needed
    limit, folder = needed // 2, tmp_path / "states" if kind == "folder" else None
    with PrefixCache(tuning, folder, limit_bytes=limit) as small:
        for _ in range(3):
            torch.testing.assert_close(one_step(tuning, batch), expected, rtol=1e-5, atol=1e-6)
            assert 0 < small.nbytes <= limit
        if folder is not None:
            assert sum(path.stat().st_size for path in folder.glob("*.bin")) == small.nbytes
        assert 5 < small.computed < 15 and small.computed + small.served == 15
    if folder is not None:
        with (
            PrefixCache(tuning, folder, limit_bytes=10) as smaller,
            pytest.raises(FishError, match=rf"holds {small.nbytes:,} bytes of states, more than limit_bytes=10: allow"),
        ):
            smaller.fill([batch])
    assert f"of {limit / 1e6:,.0f} MB, {small.served / 15:.1%} of 15 examples served" in repr(small)


def test_states_in_another_dtype_are_served_alike_from_the_first():
    tuning, batch = start()
    exact = one_step(tuning, batch)[1]
    with PrefixCache(tuning, limit_bytes=ROOM, dtype=torch.bfloat16) as cache:
        found = [one_step(tuning, batch)[1] for _ in range(2)]
        assert cache.nbytes == 16 * int(batch["attention_mask"].sum()) + 5 * LINE_BYTES
    assert torch.equal(*found) and not torch.equal(found[0], exact)
    torch.testing.assert_close(found[0], exact, rtol=0.2, atol=0.05)


def test_a_folder_serves_a_later_training_of_the_same_prefix(tmp_path):
    tuning, batch = start()
    expected = one_step(tuning, batch)[1]
    with PrefixCache(tuning, tmp_path / "states", limit_bytes=ROOM) as cache:
        one_step(tuning, batch)
        with pytest.raises(FishError, match="this model has a prefix cache in use already"):
            PrefixCache(tuning, limit_bytes=ROOM).__enter__()
        other, _ = start()
        with (
            PrefixCache(other, tmp_path / "states", limit_bytes=ROOM),
            pytest.raises(FishError, match="being written by another process"),
        ):
            one_step(other, batch)
    again, _ = start()
    with torch.no_grad():
        again.model.classifier.weight += 1
        again.model.bert.encoder.layer[2].output.dense.weight[0, 1] += 1  # above the states
    with PrefixCache(again, tmp_path / "states", limit_bytes=ROOM) as cache:
        one_step(again, batch)
        assert (cache.computed, cache.served) == (0, 5)
    with PrefixCache(tuning, tmp_path / "states", limit_bytes=ROOM) as cache:
        assert torch.equal(one_step(tuning, batch)[1], expected) and cache.computed == 0


@pytest.mark.parametrize("other", ["weights", "lowest", "dtype", "config"])
def test_a_folder_of_another_prefix_is_refused(other, tmp_path):
    tuning, batch = start()
    with PrefixCache(tuning, tmp_path / "states", limit_bytes=ROOM) as cache:
        cache.fill([batch])
    again, _ = start(lowest=3 if other == "lowest" else 2)
    if other == "weights":
        with torch.no_grad():
            again.model.bert.encoder.layer[1].output.dense.bias[3] += 1e-6
    if other == "config":
        again.model.config.layer_norm_eps = 1e-3
    dtype = torch.float16 if other == "dtype" else None
    words = {"weights": "weights", "lowest": "blocks, weights", "dtype": "dtype", "config": "config"}[other]
    with (
        PrefixCache(again, tmp_path / "states", limit_bytes=ROOM, dtype=dtype) as cache,
        pytest.raises(FishError, match=rf"states of another prefix \(other {words}\)"),
    ):
        cache.fill([batch])
    assert not tuning.model.bert._forward_pre_hooks


def test_a_torn_or_damaged_entry_is_computed_again(tmp_path):
    folder = tmp_path / "states"
    tuning, batch = start()
    expected = one_step(tuning, batch)

    def served() -> tuple[int, int]:
        with PrefixCache(tuning, folder, limit_bytes=ROOM) as cache:
            found = one_step(tuning, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        return cache.computed, cache.served

    assert served() == (5, 0) and served() == (0, 5)
    states, index = (folder / "states.bin").read_bytes(), (folder / "index.bin").read_bytes()
    lengths = (batch["attention_mask"].sum(1) * 32).tolist()
    (folder / "states.bin").write_bytes(states[: sum(lengths[:2]) + 3])  # killed while it wrote the third
    assert served() == (3, 2)
    (folder / "index.bin").write_bytes(index[: 2 * LINE_BYTES + 7])  # and while it wrote the third's line
    assert served() == (3, 2)
    torn = bytearray((folder / "index.bin").read_bytes())
    torn[3 * LINE_BYTES + 2] ^= 1  # in a key
    (folder / "index.bin").write_bytes(torn)
    assert served() == (2, 3)
    damaged = bytearray((folder / "states.bin").read_bytes())
    damaged[5] ^= 1  # a bit of the first
    (folder / "states.bin").write_bytes(damaged)
    assert served()[1] == 0 and served() == (0, 5)


def test_a_folder_that_is_none_is_refused(tmp_path):
    store = FolderStates(tmp_path / "states", 1000, {"of": "this"})
    assert store.add(b"k" * 16, memoryview(b"abc")) and not store.add(b"l" * 16, memoryview(bytes(990)))
    store.close()
    (tmp_path / "states" / "prefix.json").write_text("[]")
    with pytest.raises(FishError, match=r"prefix.json is damaged"):
        FolderStates(tmp_path / "states", 1000, {"of": "this"})
    (tmp_path / "states" / "prefix.json").unlink()
    with pytest.raises(FishError, match=r"has states but no prefix.json"):
        FolderStates(tmp_path / "states", 1000, {"of": "this"})
    (tmp_path / "states" / "prefix.json").write_text(json.dumps({"of": "this"}))
    store, into = FolderStates(tmp_path / "states", 1000, {"of": "this"}), bytearray(3)
    assert store.read(b"k" * 16, memoryview(into)) and into == b"abc"
    assert not store.read(b"k" * 16, memoryview(bytearray(2))) and not store.read(b"l" * 16, memoryview(bytearray(3)))
    store.close()
    memory = MemoryStates(30)
    assert not memory.add(b"k" * 16, memoryview(b"abc")) and memory.nbytes == 0


def test_a_full_disk_ends_the_keeping_and_not_the_training(tmp_path, monkeypatch):
    tuning, batch = start()
    expected, whole = one_step(tuning, batch), states._write_whole

    def full(file, offset, data):
        if file.name.endswith("index.bin") and offset == 2 * LINE_BYTES:  # the third
            whole(file, offset, data[:3])
            raise OSError(28, "No space left on device")
        whole(file, offset, data)

    monkeypatch.setattr(states, "_write_whole", full)
    with PrefixCache(tuning, tmp_path / "states", limit_bytes=ROOM) as cache:
        with pytest.warns(UserWarning, match="No space left on device.*computed in every forward") as told:
            for _ in range(3):
                torch.testing.assert_close(one_step(tuning, batch), expected, rtol=1e-5, atol=1e-6)
        assert (cache.computed, cache.served) == (5 + 3 + 3, 2 + 2) and len(told) == 1
        sizes = sum(path.stat().st_size for path in (tmp_path / "states").glob("*.bin"))
        assert sizes == cache.nbytes
    monkeypatch.undo()
    with PrefixCache(tuning, tmp_path / "states", limit_bytes=ROOM) as again:
        torch.testing.assert_close(one_step(tuning, batch), expected, rtol=1e-5, atol=1e-6)
        assert (again.computed, again.served) == (3, 2)


def test_what_is_unfrozen_below_is_refused():
    tuning, batch = start()
    layer = tuning.model.bert.encoder.layer[1].output.dense
    with PrefixCache(tuning, limit_bytes=ROOM):
        one_step(tuning, batch)
        layer.requires_grad_(True)
        with pytest.raises(FishError, match=r"these learn: bert.encoder.layer.1.output.dense.weight, bert.*bias\."):
            tuning.model(**batch)
        layer.requires_grad_(False)
        one_step(tuning, batch)


def test_other_weights_below_end_the_cache():
    tuning, batch = start()
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        one_step(tuning, batch)
        with tuning.disabled(), torch.no_grad():
            tuning.model(**batch)  # the base is the same below
        with torch.no_grad():
            tuning.model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
        with pytest.raises(FishError, match="below the mask have changed since this cache was begun"):
            tuning.model(**batch)
    assert not tuning.model.bert._forward_pre_hooks and cache.served == 5
    tuning.model(**batch)


def test_the_mask_may_change_above_but_not_reach_below():
    tuning, batch = start()
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        one_step(tuning, batch)
        tuning.set_mask(mask_for("bert", 3))
        one_step(tuning, batch)
        assert cache.served == 5
        tuning.set_mask(mask_for("bert", 1))
        with pytest.raises(FishError, match=r"now has entries in bert.encoder.layer.1, .* enters bert.encoder.layer.2"):
            tuning.model(**batch)


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("bert", "bert.encoder.layer.0.output.dense.bias", r"entries in bert.encoder.layer.0, so there is no frozen"),
        ("bert", "bert.embeddings.LayerNorm.bias", r"below bert.encoder.layer.4 frozen, but these learn: bert.embedd"),
        ("gpt2", "transformer.wte.weight", r"these learn: transformer.wte.weight"),
    ],
)
def test_a_mask_below_is_refused(name, entries, message):
    model, batch = MODELS[name](), BATCHES[name](2, 0)
    tuning = attach(model, Mask.from_indices({entries: [0]}))
    with pytest.raises(FishError, match=message), PrefixCache(tuning, limit_bytes=ROOM):
        model(**batch)
    assert not any(m._forward_pre_hooks for m in chain_of(model)[1]) and "forward" not in vars(chain_of(model)[1][0])


def test_a_masked_parameter_of_the_model_itself_is_refused():
    encoder = case("torch-encoder")
    model = encoder.make()
    attach(model, Mask.from_indices({"place": [0]}))
    with PrefixCache(model, limit_bytes=ROOM), pytest.raises(FishError, match=r"these learn: place\. Leave them out"):
        run(model, encoder.batch(2, 0))


def test_what_cannot_be_served_is_refused():
    model = MODELS["bert"]()
    with pytest.raises(FishError, match=r"call fishmask.attach"):
        PrefixCache(model, limit_bytes=ROOM)
    tuning, batch = start()
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="limit_bytes must be a positive whole number"):
            PrefixCache(tuning, limit_bytes=wrong)
    cache = PrefixCache(tuning, limit_bytes=ROOM)
    with pytest.raises(FishError, match="enter its `with` block first"):
        cache.fill([batch])
    with cache, pytest.raises(FishError, match="in use already"), cache:
        pass
    embedded = {"inputs_embeds": torch.randn(5, 7, 8, requires_grad=True), "labels": batch["labels"]}
    with cache, pytest.raises(FishError, match="inputs that do not learn, but inputs_embeds"):
        tuning.model(**embedded)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 2, "vocab_size": 20}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16}
    bart = hf("BartForConditionalGeneration", "BartConfig", **sizes)()
    attach(bart, Mask.from_indices({"model.decoder.layers.2.fc1.bias": [0]}))
    with pytest.raises(FishError, match=r"models of one stack of blocks, but this one takes decoder_input_ids"):
        PrefixCache(bart, limit_bytes=ROOM)
    with cache, pytest.raises(FishError, match="this one takes encoder_hidden_states"):
        tuning.model.bert(batch["input_ids"], encoder_hidden_states=torch.zeros(5, 7, 8))
    turned = case("torch-encoder-positions-first")
    encoder = turned.make()
    attach(encoder, masked(encoder, 1, turned.batch(4, 0)))
    with PrefixCache(encoder, limit_bytes=ROOM), pytest.raises(FishError, match=r"first dimension is the 4 examples"):
        run(encoder, turned.batch(4, 0))


class OptimizedModule(nn.Module):
    """Named as what ``torch.compile`` makes, which takes seconds to import."""


def test_a_compiled_model_is_refused(monkeypatch):
    tuning, batch = start()
    tuning.model.extra = OptimizedModule()
    with pytest.raises(FishError, match="a compiled model has no prefix cache"), PrefixCache(tuning, limit_bytes=ROOM):
        pass
    del tuning.model.extra
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with PrefixCache(tuning, limit_bytes=ROOM), pytest.raises(FishError, match="a compiled model has no prefix cache"):
        tuning.model(**batch)


def test_a_loss_that_depends_on_padding_is_refused_unless_padding_is_kept():
    tuning, batch = start("tags")
    careless = {**batch, "labels": batch["labels"].clamp(min=0)}  # padding counts as tag 0
    expected = one_step(tuning, careless)
    with PrefixCache(tuning, limit_bytes=ROOM), pytest.raises(FishError, match=r"depends on what .* makes of padding"):
        one_step(tuning, careless)
    for values in tuning.parameters():
        values.grad = None
    with PrefixCache(tuning, limit_bytes=ROOM, trim=False) as cache:
        for _ in range(2):
            assert torch.equal(one_step(tuning, careless)[1], expected[1])
        assert cache.served == 5


def test_what_only_the_lower_blocks_have_is_computed_as_usual():
    tuning, batch = start()
    expected = tuning.model(**batch, output_hidden_states=True).hidden_states
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        one_step(tuning, batch)
        found = tuning.model(**batch, output_hidden_states=True).hidden_states
        tuning.model.config.output_hidden_states = True
        again = tuning.model(**batch).hidden_states
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, found, again, strict=True))
        tuning.model.train()
        here = [tuning.model(**batch).hidden_states for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(here[0][:3], expected[:3], strict=True))  # no dropout below ...
        assert not torch.equal(here[0][4], here[1][4])  # ... but above
        assert cache.served == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_are_generated_as_usual(name):
    tuning, batch = start(name)
    given = {"input_ids": batch["input_ids"][:, :3].clamp(min=3), "attention_mask": torch.ones(5, 3, dtype=torch.long)}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = tuning.model.generate(**given, **options)
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        with torch.no_grad():
            assert tuning.model(**given).past_key_values is None  # of the lower blocks there would be nothing in it
        assert torch.equal(tuning.model.generate(**given, **options), expected)
        assert cache.computed == 5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_gets_along(name, reentrant):
    tuning, batch = start(name)
    tuning.model.train()
    for module in tuning.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    full = {key: value for key, value in batch.items() if key != "attention_mask"}  # no padding: nothing else asks
    full["labels"] = full["labels"].clamp(min=0)
    expected = one_step(tuning, full)
    tuning.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        for _ in range(2):
            torch.testing.assert_close(one_step(tuning, full), expected, rtol=1e-5, atol=1e-6)
    assert (cache.computed, cache.served) == (5, 5)


def test_autocast_has_states_of_its_own():
    tuning, batch = start("llama")

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            return tuning.model(**batch).loss.detach()

    plain, half = tuning.model(**batch).loss.detach(), cast()
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        assert [cast() for _ in range(2)] == [half, half] != [plain, plain]
        assert tuning.model(**batch).loss == plain and cache.computed == 10


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_whatever_happens(error):
    tuning, batch = start()
    model = tuning.model.train()
    modules = [(vars(module).get("forward"), module.training) for module in model.modules()]
    copies = []

    def stop(*_):
        raise error

    with PrefixCache(tuning, limit_bytes=ROOM):
        model(**batch)
        copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        handle = model.bert.encoder.layer[3].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(**batch)
        handle.remove()
        model(**batch)  # a loop that has caught it may go on
        assert [(vars(module).get("forward"), module.training) for module in model.modules()] == modules
    assert [(vars(module).get("forward"), module.training) for module in model.modules()] == modules
    for copied in copies:
        seen = []
        copied.eval().bert.encoder.layer[0].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert torch.equal(copied(**batch).logits, model.eval()(**batch).logits) and seen
        model.train()


def test_gradients_add_up_and_a_trainer_s_own_arguments_do_not_matter():
    tuning, batch = start("llama")
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    for half in halves:
        tuning.model(**half).loss.backward()
    expected = gradients(tuning)
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        for epoch in range(2):
            for half in halves:
                tuning.model(**half).loss.backward()
            assert torch.equal(gradients(tuning), expected), epoch
            tuning.model(**halves[0], num_items_in_batch=torch.tensor(7 + epoch))
        assert cache.computed == 5


def test_filling_computes_whole_batches_and_trains_nothing():
    tuning, batch = start()
    two = {key: value[:2] for key, value in batch.items()}
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        cache.fill([two, batch])
        assert cache.computed == 2 + 5 and cache.served == 0  # the second as a whole, for the same bits as ever
        cache.fill([batch])
        assert cache.computed == 7
        one_step(tuning, batch)
        assert (cache.computed, cache.served) == (7, 5)
        assert all(values.grad is None for values in tuning.parameters())


def test_scores_and_costs_are_those_of_the_whole_model():
    tuning, batch = start()
    expected = fisher(tuning.model, [batch], examples=5), step_costs(tuning.model, batch)
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        one_step(tuning, batch)
        found = fisher(tuning.model, [batch], examples=5), step_costs(tuning.model, batch)
        one_step(tuning, batch)
        assert (cache.computed, cache.served) == (5, 5)
    assert found[1] == expected[1]
    assert all(torch.equal(found[0][name], scores) for name, scores in expected[0].items())


def test_a_model_that_is_let_go_runs_whole_again():
    tuning, batch = start()
    expected = tuning.model(**batch).logits
    with PrefixCache(tuning, limit_bytes=ROOM) as cache:
        one_step(tuning, batch)
        tuning.suspend()
        assert torch.equal(tuning.model(**batch).logits, expected)
        tuning.resume()
        one_step(tuning, batch)
        assert (cache.computed, cache.served) == (5, 5)
        tuning.detach()
        tuning.model(**batch).loss.backward()
        assert tuning.model.bert.encoder.layer[0].output.dense.weight.grad.any() and cache.served == 5


def test_a_forward_that_never_comes_by_the_blocks_is_refused():
    tuning, batch = start()
    tuning.model.bert.encoder.forward = lambda x, **_: SimpleNamespace(last_hidden_state=x, past_key_values=None)
    with PrefixCache(tuning, limit_bytes=ROOM), pytest.raises(FishError, match=r"does not come by bert.encoder.layer"):
        tuning.model(**batch)
