"""Scoring in several passes, with sums off the device, planned, killed and resumed."""

import pytest
import torch
from torch import nn

from fishmask import FishError, fisher
from fishmask.fisher import scores
from fishmask.params import canonical_parameters
from fishmask.passes import Footprint, groups
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
        from fishmask.engine_batched import BatchedEngine
        from fishmask.guards import left_as_found, require_gradients
        from fishmask.likelihoods import Likelihood

        with left_as_found(model):
            require_gradients(model, False)
            engine = BatchedEngine(model, canonical_parameters(model), Likelihood(), sums)
            with Footprint() as footprint:
                engine.add(batch, 0)
        peaks.append(footprint.peak)
    assert peaks[1] < 0.5 * peaks[0]


def test_passes_need_the_same_batches_each_time():
    c = case("bert")
    memory = largest(c.make())
    with pytest.raises(ValueError, match=r"passes, but batches is an iterator"):
        fisher(c.make(), iter([c.batch(3, 0)]), examples=3, memory=memory)

    class Shuffled:
        seed = 0

        def __iter__(self):
            self.seed += 1
            return iter([c.batch(3, self.seed)])

    with pytest.raises(FishError, match="batch 0 is not what it was in an earlier pass"):
        fisher(c.make(), Shuffled(), examples=3, memory=memory)

    class Fewer(Shuffled):
        def __iter__(self):
            self.seed += 1
            return iter([c.batch(3, 0)] * (2 if self.seed == 1 else 1))

    with pytest.raises(FishError, match="has 1 batches, but an earlier pass took 2"):
        fisher(c.make(), Fewer(), examples=6, memory=memory)


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
        found = fisher(c.make(), [c.batch(3, 0)], examples=3, sums="cpu", memory=largest(c.make()))
    assert_close(found, reference(c, c.batch(3, 0), 3, "given"))


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
