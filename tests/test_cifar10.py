"""The from-scratch experiment on synthetic images: networks, augmentation, both forms of decay, resuming, plans."""

import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import cifar10, from_scratch
from experiments.cifar10 import PLANS, run_plan, table
from experiments.from_scratch import Config, Images, _rng, accuracy, run, settle_statistics
from experiments.images import TrainingImages, normalised, read_images
from experiments.masked_sgd import MOMENTUM, WEIGHT_DECAY, Whole, decay_multiplier
from experiments.resnet import resnet9, resnet34
from fishmask import CheckpointLog, FishError, Mask

TINY = Config(
    model="resnet9", width=2, density=0.1, lr=0.2, epochs=4, peak=1, images=40, batch=10, examples=20, seed=3
)  # fmt: skip
CPU = torch.device("cpu")


def pictures(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = torch.randint(0, 200, (count, 32, 32, 3), generator=generator)
    return (pixels + 5 * labels[:, None, None, None]).to(torch.uint8), labels


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(TrainingImages(*pictures(40), CPU), pictures(30, seed=1))


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "count"), [(resnet34, 21_282_122), (resnet9, 6_573_120)])
def test_networks_have_as_many_parameters_as_the_originals(make, count):
    model = make().eval()
    assert sum(p.numel() for p in model.parameters()) == count
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet34_keeps_its_pooling_and_halves_three_times():
    model, sizes = resnet34().eval(), []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sizes == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


def test_resnet9_divides_its_logits_by_eight():
    model = resnet9(4).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = model[:-2](x)
        assert torch.equal(model(x), features @ model.linear.weight.T / 8)


def test_settled_statistics_are_those_of_the_images(images):
    model = resnet9(2)
    batches = list(images.training.batches(20, np.random.default_rng(0)))
    settle_statistics(model, iter(batches), 2)
    convolution, norm, _ = model.prep
    with torch.no_grad():
        means = torch.stack([convolution(x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    assert (norm.momentum, norm.training) == (0.1, False)


# --- images -----------------------------------------------------------------------------------------------------------


def test_augmented_images_are_crops_flipped_or_not_with_one_hole():
    pixels, labels = pictures(4)
    padded = normalised(torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")))
    crops = {
        (i, top, left, flip): crop.flip(-1) if flip else crop
        for i in range(4)
        for top in range(9)
        for left in range(9)
        for flip in (0, 1)
        for crop in [padded[i, :, top : top + 32, left : left + 32]]
    }
    training, seen = TrainingImages(pixels, labels, CPU), set()
    for seed in range(8):
        ((batch, told),) = training.batches(4, np.random.default_rng(seed))
        assert sorted(told.tolist()) == labels.tolist()
        for image, label in zip(batch, told, strict=True):
            hole = (image == 0).all(0)
            rows, columns = hole.any(1).nonzero().view(-1), hole.any(0).nonzero().view(-1)
            assert len(rows) == len(columns) == 8 and hole.sum() == 64
            assert rows[-1] - rows[0] == columns[-1] - columns[0] == 7
            found = [key for key, crop in crops.items() if torch.equal(image[:, ~hole], crop[:, ~hole])]
            assert len(found) == 1 and labels[found[0][0]] == label
            seen.add(found[0][1:])
    assert len({flip for _, _, flip in seen}) == 2 and len(seen) > 20


def test_augmentation_is_decided_by_its_generator_and_drops_the_rest(images):
    def epoch(seed):
        return [(x.clone(), y) for x, y in images.training.batches(15, np.random.default_rng(seed))]

    once, again, other = epoch(0), epoch(0), epoch(1)
    assert [len(y) for _, y in once] == [15, 15]
    assert all(torch.equal(a, b) for one, two in zip(once, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(once[0][0], other[0][0])


@pytest.fixture
def file(tmp_path):
    """Thirty JPEG images of three classes in turn, each of one brightness; the last six are the test part."""
    from PIL import Image

    encoded = []
    for brightness in range(30):
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), 8 * brightness, np.uint8)).save(buffer, "JPEG", quality=95)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    labels, split = np.arange(30, dtype=np.uint8) % 10, (np.arange(30) >= 24).astype(np.uint8)
    offsets = np.cumsum([0, *map(len, encoded)])
    np.savez(tmp_path / "images.npz", jpeg=np.concatenate(encoded), offsets=offsets, labels=labels, split=split)
    return tmp_path / "images.npz"


def test_images_are_read_by_part_and_by_class(file):
    pixels, labels = read_images(file, "test")
    assert labels.tolist() == [4, 5, 6, 7, 8, 9]
    assert pixels[:, 0, 0, 0].tolist() == [8 * i for i in range(24, 30)]
    pixels, labels = read_images(file, "train", 20)  # two of each class: the first twenty
    assert labels.tolist() == [*range(10), *range(10)]
    assert pixels[:, 5, 5, 2].tolist() == [8 * i for i in range(20)]


@pytest.mark.parametrize(
    ("count", "told"), [(30, "fewer than 3 of the classes"), (15, "multiple of 10"), (0, "multiple of 10")]
)
def test_numbers_of_images_that_cannot_be(file, count, told):
    with pytest.raises(ValueError, match=told):
        read_images(file, "train", count)


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    with pytest.raises(FishError, match="lacks jpeg, offsets, split"):
        read_images(tmp_path / "other.npz", "train")


# --- the two forms of decay -------------------------------------------------------------------------------------------


def test_whole_training_is_masked_gradients_and_decay_and_stale_momentum_everywhere(tmp_path):
    """Against Nesterov's recursion written out in float64, with a change of mask halfway."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    rng = np.random.default_rng(0)
    first = Mask.from_indices({"weight": [0, 4, 7]}, shapes=model)
    training = Whole(model, tmp_path, first)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    started = {name: w.copy() for name, w in weights.items()}
    velocities = {name: np.zeros_like(w) for name, w in weights.items()}
    kept = {"weight": [0, 4, 7], "bias": []}
    rates = [0.1 * (1 + step % 5) for step in range(40)]
    for step, rate in enumerate(rates):
        if step == 20:
            training.set_mask(Mask.from_indices({"weight": [4, 8], "bias": [1]}, shapes=model))
            kept = {"weight": [4, 8], "bias": [1]}
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(rng.normal(size=p.shape))
            gradient = np.zeros(p.numel())
            gradient[kept[name]] = p.grad.numpy().ravel()[kept[name]]
            gradient = gradient.reshape(p.shape) + WEIGHT_DECAY * weights[name]
            velocities[name] = MOMENTUM * velocities[name] + gradient
            weights[name] = weights[name] - rate * (gradient + MOMENTUM * velocities[name])
        training.optimizer.param_groups[0]["lr"] = rate
        training.mask_gradients()
        training.optimizer.step()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), weights[name], rtol=1e-12)
    factor = decay_multiplier(rates)
    assert factor < 0.99
    never = [i for i in range(15) if i not in (0, 4, 7, 8)]
    np.testing.assert_allclose(weights["weight"].ravel()[never], factor * started["weight"].ravel()[never], rtol=1e-12)
    assert training.multiplier() == pytest.approx(factor, rel=1e-12)


def test_a_weight_without_gradient_shrinks_as_the_recursion_says():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    rates = replace(TINY, lr=10.0).rates()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(weight.detach()) == pytest.approx(decay_multiplier(rates), rel=1e-13)
    assert decay_multiplier(rates) < 0.9


def final_state(folder) -> dict[str, torch.Tensor]:
    model = resnet9(TINY.width)
    with CheckpointLog(folder) as log:
        log.restore(model)
    return model.state_dict()


@pytest.mark.parametrize(("method", "refresh"), [("fish", "never"), ("fish", "epoch"), ("random", "epoch")])
def test_masked_decay_leaves_every_other_entry_as_it_was(images, tmp_path, method, refresh):
    config = replace(TINY, method=method, refresh=refresh)
    record = run(config, images, tmp_path)
    with CheckpointLog(tmp_path) as log:
        masks = [log.mask(at=commit.number) for commit in log.commits]
    assert len(masks) == config.epochs + 1
    assert len(set(masks)) == (config.epochs if refresh == "epoch" else 1)  # the first two commits share theirs
    touched = masks[0]
    for mask in masks[1:]:
        touched = touched | mask
    torch.manual_seed(config.seed)
    base, trained = resnet9(config.width), final_state(tmp_path)
    changed = Mask.between({n: p.detach() for n, p in base.named_parameters()}, {n: trained[n] for n in touched.shapes})
    assert changed.k > 0.9 * masks[0].k
    assert (changed - touched).k == 0
    assert record["masked"] == masks[0].k == int(0.1 * record["entries"])
    assert masks[0].indices["linear.weight"].numel() == 160  # the head is trained whole
    assert record["multiplier"] is record["multiplier_expected"] is None


@pytest.mark.parametrize(("refresh", "chosen"), [("never", [0]), ("epoch", [0, 1, 2, 3])])
def test_a_mask_is_chosen_once_or_before_every_epoch(images, tmp_path, monkeypatch, refresh, chosen):
    asked = []

    def choose(config, model, images, epoch):
        asked.append(epoch)
        return Mask.random(model, config.density, epoch)

    monkeypatch.setattr(from_scratch, "choose", choose)
    run(replace(TINY, refresh=refresh), images, tmp_path)
    assert asked == chosen


@pytest.mark.parametrize("refresh", ["never", "epoch"])
def test_leak_shrinks_all_that_is_never_masked(images, tmp_path, refresh):
    config = replace(TINY, decay="leak", refresh=refresh, lr=2.0)
    record = run(config, images, tmp_path)
    assert record["multiplier"] == pytest.approx(record["multiplier_expected"], rel=1e-5)
    assert record["multiplier"] < 0.98


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["never", "epoch"])
def test_a_run_cut_short_goes_on_as_if_nothing_had_happened(images, tmp_path, monkeypatch, refresh):
    config = replace(TINY, refresh=refresh)
    whole = run(config, images, tmp_path / "whole")
    train_epoch = from_scratch.train_epoch

    def killed(config, model, training, images, epoch, rates):
        loss = train_epoch(config, model, training, images, epoch, rates)
        if epoch == 2:
            raise KeyboardInterrupt
        return loss

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(from_scratch, "train_epoch", killed)
        run(config, images, tmp_path / "cut")
    told: list[str] = []
    resumed = run(config, images, tmp_path / "cut", told.append)
    assert [line.partition(",")[0] for line in told] == ["epoch 3 of 4", "epoch 4 of 4"]
    assert resumed["loss"] == whole["loss"]
    assert resumed["accuracy"] == whole["accuracy"]
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(FishError, match="log of another run"):
        run(replace(config, seed=4), images, tmp_path / "cut")


def test_a_commit_costs_less_than_a_full_checkpoint_and_a_record_is_json(images, tmp_path):
    dense = replace(TINY, method="dense", density=1.0)
    full, sparse = run(dense, images, tmp_path / "full"), run(TINY, images, tmp_path / "log")
    for record in (full, sparse):
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert len(record["save_bytes"]) == len(record["save_seconds"]) == TINY.epochs + 1
        assert len(record["loss"]) == TINY.epochs and not record["diverged"]
    assert full["masked"] == full["entries"]
    assert sum(sparse["save_bytes"][1:]) < 0.4 * sum(full["save_bytes"][1:])
    checkpoint = torch.load(tmp_path / "full" / "full.pt")
    assert checkpoint["step"] == 16 and len(checkpoint["optimizer"]["state"]) == len(list(resnet9(2).parameters()))


def test_training_whose_loss_is_not_finite_ends_and_says_so(images, tmp_path):
    record = run(replace(TINY, method="dense", density=1.0, lr=1e30), images, tmp_path)
    assert record["diverged"] and record["loss"][-1] is None and len(record["loss"]) < TINY.epochs
    json.dumps(record, allow_nan=False)


def test_accuracy_counts_right_answers_in_eval_mode(images):
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.one_hot((self.norm(x).mean((1, 2, 3)) > 0).long(), 10).float()

    model = Brightness()
    pixels = torch.full((1203, 32, 32, 3), 10, dtype=torch.uint8)
    pixels[:400] = 240
    labels = torch.zeros(1203, dtype=torch.int64)
    labels[:401] = 1
    assert accuracy(TINY, model, (pixels, labels)) == 1202 / 1203
    assert torch.equal(model.norm.running_mean, torch.zeros(3))


def test_every_purpose_of_every_epoch_has_its_own_random_numbers():
    drawn = {
        _rng(replace(TINY, seed=seed), epoch, purpose).random()
        for seed in range(3) for epoch in range(3) for purpose in range(3)
    }  # fmt: skip
    assert len(drawn) == 27


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    rates = TINY.rates()  # four steps an epoch
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert rates[4:] == pytest.approx([0.2 * (12 - step) / 12 for step in range(1, 13)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "snip"}, "method must be one of dense, fish, random, got 'snip'"),
        ({"method": "dense"}, "density must be 1"),
        ({"peak": 4}, "peak must be between 0 and the number of epochs, 4"),
        ({"batch": 41}, "batch must be from 1 to the number of images, 40"),
        ({"examples": 41}, "41 examples cannot be scored"),
        ({"images": 50}, "says 50 images, but there are 40"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(images, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        run(replace(TINY, **change), images, tmp_path / "log")
    assert not (tmp_path / "log").exists()


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_plans_hold_runs_that_can_be_run_once_each(name):
    configs = list(PLANS[name]())
    for config in configs:
        config.check()
    assert len(set(configs)) == len(configs) > 0


def test_the_paper_plan_has_every_cell_with_three_seeds():
    configs = list(PLANS["paper"]())
    cells = {(c.method, c.density, c.refresh, c.decay) for c in configs}
    assert len(cells) == 1 + 2 * 3 * 2 * 2
    assert len(configs) == len(cells) * 5 * 3
    assert {(c.model, c.images, c.epochs, c.batch) for c in configs} == {("resnet34", 50_000, 100, 512)}


def test_a_plan_skips_what_has_a_record(images, tmp_path):
    results, told = tmp_path / "folder" / "results.jsonl", []
    plan = [replace(TINY, epochs=2, seed=seed) for seed in (0, 1)]
    run_plan(plan, results, lambda count: images, told.append)
    assert [json.loads(line)["config"] for line in results.read_text().splitlines()] == [asdict(c) for c in plan]
    told.clear()
    run_plan([*plan, replace(plan[0], method="random")], results, lambda count: images, told.append)
    assert told[0].startswith("run 3 of 3") and len(told) == 2
    assert len(results.read_text().splitlines()) == 3


def test_the_table_has_means_over_seeds_of_planned_runs_alone(tmp_path, monkeypatch):
    plan = [replace(TINY, decay=decay, seed=seed) for decay in ("leak", "masked") for seed in (1, 2)]
    monkeypatch.setitem(cifar10.PLANS, "tiny", lambda: iter(plan))
    measured = {"diverged": False, "multiplier": 0.25, "save_bytes": [9e9, 2e6, 4e6], "save_seconds": [9, 0.002, 0.004]}
    failed = {"diverged": True, "multiplier": None, "save_bytes": [9e9], "save_seconds": [9]}
    lines = [
        {"config": asdict(plan[0]), "accuracy": 0.5, **measured},
        {"config": asdict(replace(plan[0], seed=9)), "accuracy": 0.9, **measured},  # not planned
        {"config": asdict(plan[2]), "accuracy": 0.1, **failed},
        {"config": asdict(plan[1]), "accuracy": 0.6, **measured},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    *rows, between, caption = table("tiny", path).splitlines()[2:]
    assert rows == [
        "| fish | no | 10.0% | leak | 0.2 | 55.0 ± 7.1 (2) | 0.25 | 3.000 MB | 3.0 ms |",
        "| fish | no | 10.0% | masked | 0.2 | 10.0 (1, 1 diverged) |  |  |  |",
    ]
    assert not between and caption.startswith("ResNet-9 of width 2, 40 training images, 4 epochs, 16 steps of 10, ")


def test_the_command_runs_one_configuration(file, tmp_path, monkeypatch, capsys):
    options = "--model resnet9 --width 2 --density 0.1 --epochs 2 --peak 1 --images 20 --batch 10 --examples 20"
    where = ["cifar10", str(file), "--log", str(tmp_path / "log"), "--results", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr("sys.argv", [*where, *options.split()])
    cifar10.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy")
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["config"] == asdict(replace(TINY, lr=0.4, epochs=2, images=20, seed=0))
    for wrong, told in (
        (["--plan", "paper", "--lr", "1"], "leave out"),
        (["--decay", "leak", "--log", "x"], "other runs"),
    ):
        monkeypatch.setattr("sys.argv", ["cifar10", str(file), *wrong])
        with pytest.raises(SystemExit):
            cifar10.main()
        assert told in capsys.readouterr().err
