"""Weight sync: after every update a receiver's weights are the sender's, bit for bit, whatever was trained between."""

import contextlib
import copy
import json
import multiprocessing
import re
import sys
import threading
from collections.abc import Iterable
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fishmask
from fishmask import FishError, Mask, attach, sync_message
from fishmask.sync import Message, Receiver, Sender, broadcast, checkpoint_names
from fishmask.sync import narrowed as as_int32
from tests.cases import case, hf
from tests.quantized import numbers_of, quantized
from tests.team import Team

SMALL = 200  # bytes of a message: every update takes several
MOE = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 8, "vocab_size": 20, "num_local_experts": 2,
}  # fmt: skip


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        loss: Tensor = model(**batch).loss
        return loss
    return F.cross_entropy(model(batch[0]), batch[1])


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().reshape(-1).contiguous().view(torch.uint8) for name, t in model.state_dict().items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = bits(a), bits(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def deliver(receiver: Receiver, messages: Iterable[Message]) -> None:
    done = [receiver.take(Message.from_bytes(message.to_bytes())) for message in messages]
    assert done == [False] * (len(done) - 1) + [True]


class Training:
    """A model in training with its optimizer, and a copy of its base that follows."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, density: float = 0.05, seed: int = 0) -> None:
        self.case, self.density, self.steps = case(name), density, 0
        self.model = self.case.make().to(dtype).train()
        self.base = copy.deepcopy(self.model)
        self.tuning = attach(self.model, self.mask(seed))
        self.optimizer = torch.optim.AdamW(self.tuning.parameters(), lr=0.05)

    def mask(self, seed: int) -> Mask:
        return Mask.random(self.model, density=self.density, seed=seed)

    def step(self) -> None:
        self.steps += 1
        batch = self.case.batch(3, self.steps)
        if not isinstance(batch, dict):
            batch = (
                batch[0].to(next(self.model.parameters()).dtype) if batch[0].is_floating_point() else batch[0],
                batch[1],
            )
        loss_of(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def receiver(self) -> Receiver:
        return Receiver(copy.deepcopy(self.base))


# --- bit for bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mlp", torch.float32),
        ("conv", torch.float32),  # statistics of BatchNorm are buffers, which training changes
        ("gpt2", torch.float32),  # the head is the embedding
        ("llama", torch.bfloat16),
        ("bert", torch.float16),
        ("t5", torch.bfloat16),
    ],
)
def test_a_receiver_follows_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    training = Training(name, dtype)
    sender, receiver = Sender(training.tuning, chunk_bytes=SMALL), training.receiver()
    for step in range(12):
        training.step()
        if step in (3, 4, 8):  # at 3 and 4 with no update between: what only the mask of 3 trained counts too
            training.tuning.set_mask(training.mask(step), training.optimizer)
        if step != 3:
            deliver(receiver, sender.update())
            assert equal(receiver.model, training.model)
    assert receiver.update == 10
    training.tuning.revert()
    assert not equal(receiver.model, training.model)
    receiver.reset()
    assert equal(receiver.model, training.base)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_server_of_a_quantized_base_follows(kind: str) -> None:
    """Entries of quantized layers go beside them, on both ends."""
    model, served = quantized(kind), quantized(kind)
    tuning = attach(model, Mask.random(model, density=0.05, seed=0))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    sender, receiver = Sender(tuning), Receiver(served)
    ids = torch.arange(15).view(3, 5)
    for step in range(4):
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            tuning.set_mask(Mask.random(model, density=0.05, seed=1), optimizer)
        deliver(receiver, sender.update())
        ours, theirs = numbers_of(model), numbers_of(served)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            assert torch.equal(model(ids), served(ids))
    receiver.reset()
    with torch.no_grad():
        assert torch.equal(served(ids), quantized(kind)(ids)) and not torch.equal(served(ids), model(ids))


def test_the_index_travels_once_and_then_k_values() -> None:
    training = Training("llama", torch.bfloat16)
    sender = Sender(training.tuning)
    first, second = sender.update(), sender.update()
    k = training.tuning.mask.k
    assert sum(message.nbytes for message in first) == k * (4 + 2)
    assert [set(message.tensors) for message in second] == [{"values/bfloat16"}]
    assert sum(message.nbytes for message in second) == k * 2
    assert len(second[0].to_bytes()) < k * 2 + 500
    training.tuning.set_mask(training.mask(1))
    mask, third = training.tuning.mask, sender.update()
    left = (training.mask(0) - mask).k
    assert sum(message.nbytes for message in third) == (mask.k + left) * (4 + 2)
    assert sum(message.nbytes for message in sender.update()) == mask.k * 2


def test_messages_are_contiguous_and_of_bounded_size() -> None:
    training = Training("bert", density=0.2)
    messages = Sender(training.tuning, chunk_bytes=SMALL).update()
    assert len(messages) > 10
    for number, message in enumerate(messages):
        assert 0 < message.nbytes <= SMALL
        assert all(tensor.is_contiguous() and tensor.dim() == 1 for tensor in message.tensors.values())
        assert (message.facts["part"], message.facts["parts"]) == (number, len(messages))
        json.dumps(message.facts)


def test_restoring_a_checkpoint_of_another_history(tmp_path: Any) -> None:
    """Entries that the present mask does not have go back too."""
    training = Training("mlp", density=0.2)
    log = fishmask.CheckpointLog(tmp_path / "log")
    sender, receiver = Sender(training.tuning), training.receiver()
    for seed in range(3):
        training.tuning.set_mask(training.mask(seed), training.optimizer)
        log.commit(training.tuning, training.optimizer, step=seed)
        training.step()
        deliver(receiver, sender.update())
    log.restore(training.tuning, training.optimizer, at=1)
    deliver(receiver, sender.update())
    assert equal(receiver.model, training.model)


# --- what can go wrong on the way -------------------------------------------------------------------------------------


def test_a_message_lost_repeated_or_out_of_order_is_refused_and_changes_nothing() -> None:
    training = Training("bert", density=0.2)
    sender, receiver = Sender(training.tuning, chunk_bytes=SMALL), training.receiver()
    first = sender.update()
    with pytest.raises(FishError, match="expected part 0"):
        receiver.take(first[1])
    deliver(receiver, first)
    training.step()
    lost, kept = sender.update(), sender.update()
    before = copy.deepcopy(receiver.model)
    for wrong, reason in (
        (kept[0], "expected part 0 of update 1, got part 0 of update 2"),
        (lost[1], "expected part 0 of update 1, got part 1 of update 1"),
        (first[0], "update 0 is in the weights already"),
    ):
        with pytest.raises(FishError, match=reason):
            receiver.take(wrong)
    receiver.take(lost[0])
    for wrong, reason in (
        (lost[0], "expected part 1 of update 1, got part 0"),
        (lost[2], "expected part 1 of update 1, got part 2"),
        (kept[1], "got part 1 of update 2"),
    ):
        with pytest.raises(FishError, match=reason):
            receiver.take(wrong)
    assert equal(receiver.model, before)
    for message in (*lost[1:], *kept):  # none of the refusals has cost anything
        receiver.take(message)
    assert receiver.update == 2
    assert equal(receiver.model, training.model)


def test_a_damaged_message_is_refused() -> None:
    training = Training("mlp")
    sender, receiver = Sender(training.tuning), training.receiver()
    message = sender.update()[0]
    tensors = {name: tensor.clone() for name, tensor in message.tensors.items()}
    tensors["values/float32"][0] += 1
    for wrong in (replace(message, tensors=tensors), replace(message, facts={**message.facts, "update": 3})):
        with pytest.raises(FishError, match="damaged"):
            receiver.take(wrong)
    with pytest.raises(FishError, match="version"):
        receiver.take(replace(message, facts={**message.facts, "version": 99}))
    data = message.to_bytes()
    for cut in (b"", data[:5], data[:-1], b"{}" + data):
        with pytest.raises(FishError, match="not a message"):
            Message.from_bytes(cut)
    assert equal(receiver.model, training.base)


def test_welcome_brings_in_who_comes_late_or_has_lost_something() -> None:
    training = Training("conv", density=0.2)
    sender, faithful, lossy = Sender(training.tuning, chunk_bytes=SMALL), training.receiver(), training.receiver()
    with pytest.raises(FishError, match="no update yet"):
        sender.welcome()
    for step in range(6):
        training.step()
        if step == 3:
            training.tuning.set_mask(training.mask(7), training.optimizer)
        update = sender.update()
        deliver(faithful, update)
        if step < 2:
            deliver(lossy, update)
    with pytest.raises(FishError, match="expected part 0 of update 2"):
        lossy.take(update[0])
    late = training.receiver()
    with pytest.raises(FishError, match="has not begun"):
        late.take(update[0])
    welcome = sender.welcome()
    deliver(late, welcome)
    deliver(lossy, welcome)
    with pytest.raises(FishError, match="already"):
        faithful.take(welcome[0])
    training.step()
    update = sender.update()
    for receiver in (faithful, late, lossy):
        deliver(receiver, update)
        assert equal(receiver.model, training.model)
    training.tuning.set_mask(training.mask(8))
    with pytest.raises(FishError, match=r"call update\(\) first"):
        sender.welcome()


def test_a_new_sender_begins_at_the_base() -> None:
    """A training that is started anew goes on with the receivers that are there."""
    old, new = Training("mlp", density=0.3), Training("mlp", density=0.3, seed=5)
    receiver = old.receiver()
    old.step()
    deliver(receiver, Sender(old.tuning).update())
    sender = Sender(new.tuning)
    first, second = sender.update(), sender.update()
    with pytest.raises(FishError, match="has not begun with this sender"):
        receiver.take(second[0])
    deliver(receiver, first)
    assert equal(receiver.model, new.model)


def test_another_base_is_refused_by_name() -> None:
    training = Training("mlp")
    sender = Sender(training.tuning)
    first = sender.update()
    other = copy.deepcopy(training.base)
    with torch.no_grad():
        other[2].bias[0] += 1
    receiver = Receiver(other)
    with pytest.raises(FishError, match=r"not the sender's base: other weights, or none, in 2\.bias\. Load"):
        receiver.take(first[0])
    trusting = Receiver(copy.deepcopy(other), check_base=False)
    assert trusting.take(first[0])
    training.step()
    assert trusting.take(sender.update()[0])
    assert torch.equal(trusting.model[0].weight, training.model[0].weight)
    for model, reason in (
        (copy.deepcopy(training.base).half(), "float16 .* here, float32"),
        (nn.Sequential(nn.Linear(5, 9)), "no such parameter"),
    ):
        with pytest.raises(FishError, match=reason):
            Receiver(model).take(first[0])
    with pytest.raises(FishError, match="being trained"):
        Receiver(training.model)


def test_a_new_head_may_have_been_anything_before() -> None:
    """What is trained whole is not part of the base, as for a delta."""
    training = Training("bert")
    training.tuning.revert()
    tuning = attach(training.model, Mask.random(training.model, density=0.2, keep="classifier", seed=1))
    server = copy.deepcopy(training.base)
    nn.init.ones_(server.classifier.weight)
    deliver(Receiver(server), Sender(tuning).update())
    assert equal(server, training.model)
    with pytest.raises(ValueError, match="one name"):
        Sender(tuning, checkpoint={"classifier.weight": "a", "classifier.bias": "a"})


def test_tied_weights_that_are_not_tied_at_the_sender_are_refused() -> None:
    class Twins(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            if tied:
                self.b.weight = self.a.weight

    loose = Twins(tied=False)
    first = Sender(attach(loose, Mask.from_indices({"a.weight": [0], "b.weight": [1]}))).update()
    with pytest.raises(FishError, match="tied to another"):
        Receiver(Twins(tied=True), check_base=False).take(first[0])


def test_an_update_is_written_under_the_lock() -> None:
    training = Training("conv", density=0.3)
    before: list[nn.Module] = []
    after: list[nn.Module] = []

    class Lock:
        def __enter__(self) -> None:
            before.append(copy.deepcopy(receiver.model))

        def __exit__(self, *error: object) -> None:
            after.append(copy.deepcopy(receiver.model))

    sender, receiver = Sender(training.tuning, chunk_bytes=SMALL), Receiver(copy.deepcopy(training.base), lock=Lock())
    for known in (training.base, training.model):
        known = copy.deepcopy(known)
        training.step()
        deliver(receiver, sender.update())
        assert equal(before[-1], known) and equal(after[-1], training.model)
    assert len(before) == 2
    receiver.reset()
    assert equal(before[-1], training.model) and equal(after[-1], training.base)


def test_no_forward_sees_half_an_update() -> None:
    model = nn.Linear(1, 200, bias=False)
    nn.init.zeros_(model.weight)
    base = copy.deepcopy(model)
    tuning = attach(model, Mask.from_indices({"weight": torch.arange(200)}))
    sender, receiver = Sender(tuning, chunk_bytes=SMALL), Receiver(base)
    seen: list[Tensor] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set() or len(seen) < 5:
            with receiver.lock, torch.no_grad():
                halves = [receiver.model(torch.ones(1)) for _ in range(2)]
            seen.extend(halves)

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(1, 100):
        with torch.no_grad():
            tuning.values.fill_(number)
        deliver(receiver, sender.update())
    done.set()
    thread.join()
    assert all(len({*a.tolist(), *b.tolist()}) == 1 for a, b in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize("how", ["convert", "buffer", "shape", "move"])
def test_a_server_that_was_changed_in_part_is_not_half_written(how: str) -> None:
    """Layers before the changed one are not written either, by no kind of update and by no reset."""
    training = Training("conv", density=0.3)
    sender, receiver = Sender(training.tuning, chunk_bytes=SMALL), training.receiver()
    deliver(receiver, sender.update())
    training.step()
    plain = sender.update()
    training.tuning.set_mask(training.mask(1), training.optimizer)
    training.step()
    changing, welcome = sender.update(), sender.welcome()
    last = [module for module in receiver.model.modules() if isinstance(module, nn.Linear)][-1]
    kept = copy.deepcopy(receiver.model)
    if how == "convert":
        last.half()
    elif how == "shape":
        last.weight.data = last.weight.data.t().contiguous()
    elif how == "move":
        last.to("meta")
    else:
        next(module for module in receiver.model.modules() if isinstance(module, nn.BatchNorm2d)).double()
    before = copy.deepcopy(receiver.model)
    for update in (plain, welcome):
        with pytest.raises(FishError, match=r"converted, moved, added or removed: .*welcome\(\)"):
            deliver(receiver, update)
        receiver._staged = []
    with pytest.raises(FishError, match="converted, moved"):
        receiver.reset()
    now = receiver.model.state_dict()
    assert receiver.update == 0
    assert all(own.is_meta or torch.equal(own, now[name]) for name, own in before.state_dict().items())
    receiver.model = kept
    for update in (plain, changing):
        deliver(receiver, update)
    assert equal(receiver.model, training.model)


def signed(message: Message, *without: str, **facts: Any) -> Message:
    """Return a message with other facts, as a faulty program would make it: whole, with a digest that fits."""
    own = {name: fact for name, fact in (message.facts | facts).items() if name not in (*without, "digest")}
    return Message({**own, "digest": sync_message._digest(own, message.tensors)}, message.tensors)


def test_messages_of_faulty_programs_are_refused_and_change_nothing() -> None:
    training = Training("mlp", density=0.3)
    sender, receiver = Sender(training.tuning), training.receiver()
    (first,) = sender.update()
    layout, before = first.facts["layout"], copy.deepcopy(receiver.model)
    name = next(iter(layout["entries"]))
    for wrong, reason in (
        *(
            (signed(first, fact), f"{fact} is None, expected")
            for fact in ("stream", "update", "part", "parts", "start")
        ),
        (signed(first, parts=0), "part 0 of 0"),
        (signed(first, part=-1), "part -1 of 1"),
        (signed(first, part=True), "part is True, expected int"),
        (signed(first, update=-3), "of update -3"),
        (signed(first, "layout"), "has no layout"),
        (signed(first, layout=[1]), "its layout is a list"),
        *((signed(first, layout={**layout, part: None}), f"no {part}") for part in layout if part != "mask"),
        (signed(first, layout={**layout, "mask": 1}), "no digest of the mask"),
        (signed(first, layout={**layout, "entries": {**layout["entries"], name: "x"}}), f"{name} has 'x' entries"),
        (signed(first, layout={**layout, "entries": {**layout["entries"], name: 1}}), "indices came for"),
        (signed(first, layout={**layout, "shapes": {**layout["shapes"], name: 5}}), f"{name} has the shape 5"),
        (signed(first, layout={**layout, "dtypes": {}}), "a shape and a dtype"),
        (signed(replace(first, tensors={"values/float32": first.tensors["values/float32"]})), "0 indices came for"),
        (signed(replace(first, tensors={"indices": first.tensors["indices"]})), "0 values of float32"),
        (
            signed(replace(first, tensors=first.tensors | {"values/float32": first.tensors["values/float32"].half()})),
            "values of another dtype came",
        ),
        (replace(first, tensors=first.tensors | {"x": torch.tensor(1.0)}), "one dimension, and these have not: x"),
        (replace(first, facts=[]), "a dict, got a list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(FishError, match=reason):
            receiver.take(wrong)
    assert receiver.update is None and equal(receiver.model, before)
    deliver(receiver, [first])
    assert equal(receiver.model, training.model)


# --- from what, and under which names ---------------------------------------------------------------------------------


def test_from_a_fish_model() -> None:
    model = case("bert").make()
    base = copy.deepcopy(model)
    adapters = fishmask.get_fish_model(model, fishmask.FishConfig(density=0.05, score="random"))
    sender, receiver = Sender(adapters), Receiver(copy.deepcopy(base))
    with torch.no_grad():
        adapters.tuning.values.add_(1)  # by hand, and so not in the weights yet
    deliver(receiver, sender.update())
    assert equal(receiver.model, model) and not equal(receiver.model, base)
    adapters.add_adapter("other", fishmask.FishConfig(density=0.05, score="random", seed=1))
    adapters.set_adapter("other")
    with pytest.raises(FishError, match=r"set_adapter\(\)"):
        sender.update()
    adapters.set_adapter("default")
    deliver(receiver, sender.update())
    assert equal(receiver.model, model)
    adapters.set_adapter("default", inference_mode=True)
    with pytest.raises(FishError, match="no adapter of this model is in training"):
        Sender(adapters)
    with pytest.raises(TypeError, match="Linear"):
        Sender(nn.Linear(1, 1))


def test_the_base_that_disabled_lends_is_not_sent_as_trained() -> None:
    training = Training("mlp", density=0.3)
    sender, receiver = Sender(training.tuning), training.receiver()
    deliver(receiver, sender.update())
    training.step()
    with training.tuning.disabled():
        for make in (sender.update, sender.welcome):
            with pytest.raises(FishError, match=r"inside disabled\(\)"):
                make()
    deliver(receiver, sender.update())
    assert equal(receiver.model, training.model)


def test_the_next_update_after_every_nth_step() -> None:
    training = Training("mlp")
    receiver = training.receiver()
    sent: list[int] = []

    def send(messages: list[Message]) -> None:
        deliver(receiver, messages)
        sent.append(training.steps)

    sender = Sender(training.tuning)
    handle = sender.on_step(send, every=3)
    for _ in range(7):
        training.step()
        assert equal(receiver.model, training.model) == (training.steps % 3 == 0)
    handle.remove()
    training.step()
    training.step()
    assert sent == [3, 6]
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="at least 1"):
            sender.on_step(send, every=wrong)  # type: ignore[arg-type]


def test_in_a_trainer(tmp_path: Any) -> None:
    model = case("bert").make()
    adapters = fishmask.get_fish_model(model, fishmask.FishConfig(density=0.1, score="random"))
    receiver, batch = Receiver(case("bert").make()), case("bert").batch(16, 0)
    Sender(adapters).on_step(lambda messages: deliver(receiver, messages), every=2)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, gradient_accumulation_steps=2, learning_rate=0.01, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{name: values[i] for name, values in batch.items()} for i in range(16)]
    transformers.Trainer(adapters, args, train_dataset=rows).train()
    assert receiver.update == 1  # of four steps, not of eight passes
    assert equal(receiver.model, model) and not equal(receiver.model, case("bert").make())


def test_names_are_those_that_save_pretrained_writes(tmp_path: Any) -> None:
    for name in ("gpt2", "t5", "bert-masked-lm"):
        model = case(name).make()
        model.save_pretrained(tmp_path / name)
        written = load_file(tmp_path / name / "model.safetensors")
        names = checkpoint_names(model)
        assert names == checkpoint_names(model, tmp_path / name) == checkpoint_names(model, written)
        assert sorted(names.values()) == sorted(n for n in written if written[n].is_floating_point())
        assert all(torch.equal(model.get_parameter(own), written[there]) for own, there in names.items())


def test_names_in_a_checkpoint_of_the_base_alone_or_in_shards(tmp_path: Any) -> None:
    model = case("bert").make()
    model.bert.save_pretrained(tmp_path / "base", max_shard_size=2000)
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    names = checkpoint_names(model, tmp_path / "base")
    assert names["bert.pooler.dense.weight"] == "pooler.dense.weight" and "classifier.weight" not in names
    head = attach(model, Mask.from_indices({"classifier.weight": [0], "bert.pooler.dense.bias": [1]}))
    with pytest.raises(FishError, match=r"does not hold these parameters as they are: classifier\.weight\."):
        Sender(head, checkpoint=tmp_path / "base").update()
    head.set_mask(Mask.from_indices({"bert.pooler.dense.bias": [1]}))
    with pytest.raises(FishError, match=r"classifier\.weight"):  # it was trained, so it may have moved
        Sender(head, checkpoint=tmp_path / "base").update()
    head.revert()
    tuning = attach(model, Mask.from_indices({"bert.pooler.dense.bias": [1]}))
    receiver = Receiver(copy.deepcopy(model.bert))
    with torch.no_grad():
        tuning.values.fill_(3)
    deliver(receiver, Sender(tuning, checkpoint=tmp_path / "base").update())
    assert equal(receiver.model, model.bert)


def test_a_checkpoint_that_is_none(tmp_path: Any) -> None:
    model = case("mlp").make()
    with pytest.raises(FishError, match="neither a safetensors file nor a folder"):
        checkpoint_names(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FishError, match="is not a safetensors file"):
        checkpoint_names(model, tmp_path)
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FishError, match=r"none of the model's parameters: it has other\.weight"):
        checkpoint_names(model, tmp_path / "model.safetensors")


def test_weights_that_a_checkpoint_holds_in_another_form_are_refused() -> None:
    """Transformers joins the experts of a mixture when it reads them, and takes them apart when it writes them."""
    model = hf("MixtralForCausalLM", "MixtralConfig", **MOE)()
    names = checkpoint_names(model)
    assert "model.layers.0.mlp.experts.down_proj" not in names
    assert names["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    tuning = attach(model, Mask.from_indices({"model.layers.0.mlp.experts.down_proj": [0]}))
    with pytest.raises(FishError, match=r"experts\.down_proj.*exclude="):
        Sender(tuning).update()


def test_a_tensor_that_int32_cannot_index_is_refused() -> None:
    cpu = torch.device("cpu")
    assert as_int32("w", torch.tensor([2**31 - 1]), torch.Size([2**16, 2**15]), cpu).tolist() == [2**31 - 1]
    with pytest.raises(FishError, match=r"w has 2,147,483,649 entries.*exclude="):
        as_int32("w", torch.tensor([0]), torch.Size([2**31 + 1]), cpu)


# --- vLLM's patches ---------------------------------------------------------------------------------------------------


def load_patches(weights: dict[str, Tensor], patches: list[dict[str, Any]]) -> None:
    """Do to a checkpoint's tensors what vLLM does: a whole tensor of NaN, values set, written where it is a number."""
    for patch in patches:
        assert set(patch) == {"name", "indices", "values", "full_shape"}
        target, indices, values = weights[patch["name"]], patch["indices"], patch["values"]
        assert indices.dtype == torch.int32 and indices.dim() == values.dim() == 1 and len(indices) == len(values) > 0
        assert indices.is_contiguous() and values.is_contiguous() and not values.isnan().any()
        assert patch["full_shape"] == tuple(target.shape) and values.dtype == target.dtype
        assert len(indices.unique()) == len(indices)
        staged = torch.full((target.numel(),), float("nan"), dtype=values.dtype)
        staged[indices.long()] = values
        torch.where(staged.isnan(), target.view(-1), staged, out=target.view(-1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_patches_make_the_checkpoint_that_training_would_save(name: str, tmp_path: Any) -> None:
    training = Training(name, torch.bfloat16)
    training.base.save_pretrained(tmp_path / "base")
    served = load_file(tmp_path / "base" / "model.safetensors")
    sender = Sender(training.tuning, chunk_bytes=SMALL)
    for step in range(6):
        training.step()
        if step == 3:
            training.tuning.set_mask(training.mask(5), training.optimizer)
        lists = sender.patches()
        sizes = [sum(patch["indices"].nbytes + patch["values"].nbytes for patch in chunk) for chunk in lists]
        assert len(lists) > 1 and 0 < max(sizes) <= SMALL
        if step in (1, 5):
            assert sum(sizes) == training.tuning.mask.k * (4 + 2)
        for chunk in lists:
            load_patches(served, chunk)
        training.model.save_pretrained(tmp_path / "tuned")
        saved = load_file(tmp_path / "tuned" / "model.safetensors")
        assert saved.keys() == served.keys()
        assert all(torch.equal(saved[n].view(torch.int16), served[n].view(torch.int16)) for n in saved)


def test_what_patches_cannot_say_is_refused() -> None:
    training = Training("mlp")
    sender = Sender(training.tuning)
    with torch.no_grad():
        training.tuning.values[0] = float("nan")
    with pytest.raises(FishError, match="NaN"):
        sender.patches()
    with torch.no_grad():
        training.tuning.values[0] = 1
    assert len(sender.patches()) == 1
    with pytest.raises(FishError, match="makes patches already"):
        sender.update()
    statistics = Training("conv")
    statistics.step()
    with pytest.raises(FishError, match=r"buffers: .*norm\.running_mean"):
        Sender(statistics.tuning).patches()
    training.tuning.detach()
    with pytest.raises(FishError, match="no longer attached"):
        sender.patches()
    with pytest.raises(ValueError, match="chunk_bytes"):
        Sender(statistics.tuning, chunk_bytes=1)


# --- between processes ------------------------------------------------------------------------------------------------


def _follow(rank: int, size: int) -> str:
    """Rank 0 trains in bfloat16 and changes its mask; the others receive. All return what they have then."""
    training = Training("llama", torch.bfloat16)
    sender, receiver = Sender(training.tuning, chunk_bytes=SMALL), training.receiver()
    for step in range(20):
        if rank:
            done = [receiver.take(message) for message in broadcast()]
            assert done[-1] and not any(done[:-1])
        else:
            training.step()
            if step in (7, 13):
                training.tuning.set_mask(training.mask(step), training.optimizer)
            broadcast(sender.update())
    model = receiver.model if rank else training.model
    assert not equal(model, training.base)
    return repr(sorted((name, own.tolist()) for name, own in bits(model).items()))


def _follow_rounds(rank: int, size: int) -> bool:
    """Every worker trains a mask of its own; rank 0 sends what the rounds have merged."""
    training = Training("mlp", density=0.2)
    training.tuning.set_mask(training.mask(rank), training.optimizer)
    rounds = fishmask.LocalRounds(training.tuning, every=2, masks="own", denominator="holders", head="mean")
    receiver = training.receiver()
    with rounds:
        if rank == 0:
            Sender(rounds).on_step(lambda messages: deliver(receiver, messages), every=2)
        for step in range(8):
            training.steps = 100 * rank + step
            training.step()
            if rank == 0 and step % 2:
                assert equal(receiver.model, training.model)
    changed = Mask.between(training.base, training.model)
    assert (changed - training.mask(rank)).k > 0  # of the other worker
    return True


def _follow_shards(rank: int, size: int) -> bool:
    """FSDP2 spreads the model in training; the receiver's is whole."""
    from torch.distributed.fsdp import fully_shard

    model = case("gpt2").make()
    base = copy.deepcopy(model)
    mask, other = (Mask.random(model, density=0.1, seed=seed) for seed in (1, 2))
    mesh = dist.init_device_mesh("cpu", (size,))
    for block in (*model.transformer.h, model):
        fully_shard(block, mesh=mesh)
    tuning = attach(model, mask)
    sender, receiver = Sender(tuning, chunk_bytes=SMALL), Receiver(base)
    for number in range(4):
        with torch.no_grad():
            tuning.values.add_(number)
        if number == 2:
            tuning.set_mask(other)
        deliver(receiver, sender.update())
        full = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
        assert all(torch.equal(full[name], p) for name, p in receiver.model.named_parameters())
    return True


def _follow_the_page(rank: int, size: int) -> bool:
    training = Training("bert")
    scope = {
        "fishmask": fishmask, "rank": rank, "batches": [training.case.batch(3, step) for step in range(4)],
        "model": training.model, "optimizer": training.optimizer,
        "sender": Sender(training.tuning), "receiver": training.receiver(),
    }  # fmt: skip
    exec(page()[2], scope)
    assert rank == 0 or scope["receiver"].update == 3
    return True


def test_between_processes() -> None:
    with Team(2) as team:
        trained, received = team.run(_follow)
        assert trained == received
        for follow in (_follow_rounds, _follow_shards, _follow_the_page):
            assert team.run(follow) == [True, True]


# --- the page ---------------------------------------------------------------------------------------------------------


def page() -> list[str]:
    """Return the blocks of code of docs/weight_sync.md: trainer, server, torch.distributed, vLLM."""
    text = (Path(__file__).parents[1] / "docs" / "weight_sync.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_page_from_process_to_process() -> None:
    training, server = Training("bert"), copy.deepcopy(case("bert").make())
    batches = [training.case.batch(3, step) for step in range(4)]
    there, here = multiprocessing.Pipe(duplex=False)
    receiving = {
        "fishmask": fishmask, "torch": torch, "threading": threading, "contextlib": contextlib,
        "connection": there, "model": server, "request": batches[0],
    }  # fmt: skip
    exec(page()[1], receiving)
    assert receiving["output"].logits.shape == (3, 3)
    sending = {"fishmask": fishmask, "connection": here, "tuning": training.tuning, "optimizer": training.optimizer}
    exec(page()[0], {**sending, "model": training.model, "batches": batches})
    here.close()
    for thread in threading.enumerate():
        if "follow" in thread.name:
            thread.join(10)
    assert receiving["receiver"].update == 1
    assert equal(server, training.model)


def test_the_page_with_vllm(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for vLLM's classes, with their fields and calls."""
    training = Training("llama", torch.bfloat16)
    training.base.save_pretrained(tmp_path)
    served = load_file(tmp_path / "model.safetensors")
    patch = make_dataclass("SparseWeightPatch", ["name", "indices", "values", "full_shape"])
    calls: list[str] = []

    class Engine:
        client = SimpleNamespace(
            start_weight_update=lambda: calls.append("start"), finish_weight_update=lambda: calls.append("finish")
        )

        def send_weight_chunk(self, patches: list[Any]) -> None:
            assert all(isinstance(one, patch) for one in patches)
            load_patches(served, [vars(one) for one in patches])
            calls.append("chunk")

    where = "vllm.distributed.weight_transfer.sparse_nccl_engine"
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer", where):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[where], "SparseWeightPatch", patch, raising=False)
    training.step()
    exec(page()[3], {"fishmask": fishmask, "tuning": training.tuning, "folder": tmp_path, "engine": Engine()})
    assert calls == ["start", "chunk", "finish"]
    assert all(torch.equal(served[n], p) for n, p in training.model.named_parameters() if n in served)
