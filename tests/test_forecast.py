"""The forecast of a step's memory, beside what real steps take."""

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    T5Config,
)
from typer.testing import CliRunner

import fishmask
from benchmarks.models import FLOOR, OURS, goals
from fishmask import FishError, Mask, attach, forecast
from fishmask.cli import app
from fishmask.empty import empty_model, prepared, recompute, tokens
from fishmask.forecast import PARTS, account, optimizer_state, size_text
from fishmask.ledger import Ledger
from fishmask.stand_in import StandIn
from tests.tiny import model_folder

B, S = 4, 32
CONFIGS = {
    "bert": BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=500
    ),
    "bert without dropout": BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=500,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    ),
    "llama": LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=500, architectures=["LlamaForCausalLM"],
    ),
}  # fmt: skip


def real(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    family = LlamaForCausalLM if name == "llama" else BertForSequenceClassification
    return family._from_config(CONFIGS[name], dtype=dtype).train()


def batch_for(model: Any) -> dict[str, Tensor]:
    made = tokens(model, B, S)
    return made | {"input_ids": torch.randint(1, 500, (B, S), generator=torch.Generator().manual_seed(0))}


def allocated(work: Any) -> int:
    """Return the most bytes that PyTorch's allocator has given out during some work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def held(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --- beside real steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["floor", "full", "lora:4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_without_data_keeps_what_a_step_with_data_keeps(name: str, method: str) -> None:
    model = real(name)
    ledger = Ledger(granule=64)
    account(model, batch_for(model), ledger, method=method, mask=None, optimizer="adamw")
    most, parts = ledger.parts("workspace", since="forward")
    told = forecast(CONFIGS[name], batch=(B, S), method=method)
    assert told.parts == {part: parts.get(part, 0) for part in PARTS}
    known = {part: size for part, size in most.items() if part != "workspace"}
    assert {part: told.most[part] for part in known} == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_forecast_for_a_mask_is_within_a_tenth_of_what_the_allocator_gives_out(
    name: str, dtype: torch.dtype
) -> None:
    model = real(name, dtype)
    mask = Mask.random(model, 0.02, seed=0)
    told = forecast(CONFIGS[name], batch=(B, S), mask=mask, dtype=dtype)
    tuning = attach(model, mask)
    optimizer = torch.optim.AdamW(tuning.parameters(), fused=True)
    batch = batch_for(model)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    standing = held([*model.parameters(), *model.buffers(), tuning.values, *state]) + told.parts["masks"]
    measured = standing + allocated(step)
    assert abs(told.peak / measured - 1) < 0.1
    assert told.trained == mask.k and told.parts["values"] == pytest.approx(4 * mask.k, abs=64)
    assert told.most["gradients"] == pytest.approx(4 * mask.k, rel=0.2)  # each parameter's own, rounded up
    assert told.parts["optimizer"] == pytest.approx(8 * mask.k, rel=0.2)


def test_masks_and_plans_are_what_an_attached_model_holds_of_them() -> None:
    model = real("bert")
    mask = Mask.random(model, 0.05, seed=0)
    told = forecast(CONFIGS["bert"], batch=(B, S), mask=mask)
    known = attach(model, mask).memory()
    expected = known["indices"] + known["originals"] + known["plans"]  # indices: the memory of the mask that was given
    assert told.parts["masks"] == pytest.approx(expected, rel=0.1)
    assert told.host == 8 * mask.k


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointing_keeps_less_and_is_told_right(name: str) -> None:
    model = real(name)
    recompute(model)
    ledger = Ledger(granule=64)
    account(model, batch_for(model), ledger, method="full", mask=None, optimizer="sgd")
    told = forecast(CONFIGS[name], batch=(B, S), method="full", optimizer="sgd", checkpointing=True)
    without = forecast(CONFIGS[name], batch=(B, S), method="full", optimizer="sgd")
    assert told.most["activations"] == ledger.parts("workspace", since="forward")[0]["activations"]
    assert told.most["activations"] < 0.5 * without.most["activations"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_the_state_is_as_large_as_that_of_the_real_optimizer(optimizer: Any) -> None:
    values = [nn.Parameter(torch.zeros(count)) for count in (7, 5000, 4096, 12_801)]
    for p in values:
        p.grad = torch.ones_like(p)
    if optimizer == "adamw8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        made: Any = bitsandbytes.optim.AdamW8bit(values)
    else:
        made = (torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW)(values, lr=0.1)
    made.step()
    # Not the tables of 256 numbers that all tensors share, nor the counts of steps.
    kept = {"exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"}
    state = [t for of in made.state.values() for key, t in of.items() if key in kept]
    assert sum(t.nbytes for t in optimizer_state(values, optimizer)) == sum(t.nbytes for t in state)


# --- what stands in for a device --------------------------------------------------------------------------------------


def saved(device: str, dtype: torch.dtype, dropout: float, mask: bool, length: int) -> int:
    """Count the bytes that attention keeps for its backward, on the meta device."""
    ledger = Ledger(host=False)
    q, k, v = (torch.zeros(2, 4, length, 16, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    chosen = torch.ones(2, 1, length, length, device="meta", dtype=torch.bool) if mask else None
    ledger.hold([t for t in (q, k, v, chosen) if t is not None], "inputs")
    with ledger, StandIn(device):
        ledger.begin("forward")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=chosen, dropout_p=dropout)
        ledger.hold([out], "inputs")
        ledger.keep("saved")
        ledger.begin("backward")
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape
    return ledger.parts("rest")[0].get("saved", 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_keeps_no_pairs_of_positions_where_the_device_does_not(device: str, dtype: torch.dtype) -> None:
    short, long = (saved(device, dtype, 0.0, False, length) for length in (64, 128))
    assert short < long <= 2.5 * short
    # A mask is kept as a bias; a GPU drops out without keeping what.
    assert saved(device, dtype, 0.0, True, 128) > long
    pairs = 2 * 4 * 128 * 128 * dtype.itemsize
    assert (saved(device, dtype, 0.1, False, 128) >= pairs) == (device == "cpu")


def test_dropout_of_a_gpu_keeps_one_byte_for_an_entry() -> None:
    x = torch.zeros(100, device="meta", requires_grad=True)
    for device, size in (("cpu", 400), ("cuda", 100)):
        ledger = Ledger(host=False)
        with ledger, StandIn(device):
            ledger.begin("forward")
            y = F.dropout(x, 0.5)
            ledger.hold([x, y], "own")
            ledger.keep("saved")
        assert ledger.parts("rest")[0]["saved"] == size


def test_a_model_that_looks_for_padding_is_told_that_there_is_none() -> None:
    config = DebertaV2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=500,
        relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32,
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification._from_config(config).train()
    ledger = Ledger(granule=64)
    account(model, tokens(model, B, S), ledger, method="full", mask=None, optimizer="adamw")
    told = forecast(config, batch=(B, S), method="full")
    assert told.peak == pytest.approx(sum(ledger.parts("workspace", since="forward")[1].values()), rel=0.02)


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_a_block_is_counted_once_and_until_its_last_tensor_is_gone() -> None:
    ledger = Ledger(granule=64)
    with ledger:
        ledger.begin("first")
        a = torch.zeros(100)  # 400 bytes: 448
        view = a.view(10, 10)[3:]
        ledger.keep("kept")
        ledger.begin("second")
        b = a + 1
        del a
        c = torch.zeros(10)
        del b, view
        d = torch.zeros(1000)
        del c, d
    most, at_peak = ledger.parts("rest")
    assert most == {"kept": 448, "rest": 4032 + 64}
    assert at_peak == {"kept": 0, "rest": 4032 + 64}
    assert ledger.parts("rest", since="second")[0]["kept"] == 448


def test_a_sparse_tensor_is_its_parts_and_a_copy_that_stands_for_the_host_is_none() -> None:
    ledger = Ledger()
    there = torch.arange(50)
    with ledger:
        ledger.begin("all")
        places, numbers = torch.tensor([[0, 1], [1, 0]]), torch.ones(2)
        sparse = torch.sparse_coo_tensor(places, numbers, (2, 2), check_invariants=False)
        twin = there.to("meta")
        ledger.keep("kept")
    kept = ledger.parts("rest")[0]["kept"]
    assert kept == 32 + 8 + 400
    del twin, sparse
    assert there.sum() == 1225


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_in_memory_is_not_touched_and_any_module_will_do() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 3))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            loss = F.cross_entropy(self.inner(x) * self.frozen, y)
            return type("Output", (), {"loss": loss})()

    model = Whole().eval()
    before = copy.deepcopy(model.state_dict())
    batch = {"x": torch.randn(8, 20), "y": torch.zeros(8, dtype=torch.int64)}
    told = forecast(model, batch=batch, density=0.1)
    assert told.n == 1206 and told.trained == 120 and told.batch == ()
    assert told.parts["weights"] == sum(-(-p.nbytes // 64) * 64 for p in model.parameters())
    assert not model.training and not model.frozen.requires_grad and model.inner[0].weight.requires_grad
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_folder_is_read_without_its_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    told = forecast(str(folder), batch=(2, 8), method="full")
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    assert forecast(folder, batch=(2, 8), method="full") == told
    assert told.dtype == "float32" and told.parts["weights"] == told.most["weights"] > 4 * told.n


def test_a_model_of_seven_billion_is_told_what_its_full_training_needs() -> None:
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    told = forecast(config, batch=(1, 128), method="full", dtype=torch.bfloat16, device="cuda")
    assert told.n == 6_738_415_616
    assert told.parts["weights"] + told.most["gradients"] + told.parts["optimizer"] == pytest.approx(
        8 * told.n, rel=1e-4
    )
    assert told.peak > 8 * told.n
    assert size_text(told.peak) in str(told) and "GiB" in size_text(told.peak)


def test_more_entries_examples_and_tokens_take_more() -> None:
    def peak(**options: Any) -> int:
        return forecast(CONFIGS["llama"], **{"batch": (B, S), "density": 0.01, **options}).peak

    assert peak(density=0.2) > peak() and peak(batch=(2 * B, S)) > peak() and peak(batch=(B, 2 * S)) > peak()
    assert peak(dtype=torch.bfloat16) < peak()


@pytest.mark.parametrize("method", ["fish", "full", "floor", "lora:2"])
def test_random_numbers_go_on_as_if_nothing_had_been_forecast(method: str) -> None:
    states = [
        (torch.get_rng_state().tolist(), random.getstate(), forecast(CONFIGS["bert"], batch=(2, 8), method=method))
        for _ in range(2)
    ]
    assert states[0] == states[1]
    assert states[1][:2] == (torch.get_rng_state().tolist(), random.getstate())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lora"}, "method must be"),
        ({"method": "lora:0"}, "method must be"),
        ({"method": "full", "density": 0.1}, "for method 'fish'"),
        ({"density": 0.1, "mask": Mask.from_indices({"classifier.bias": [0]})}, "not both"),
        ({"optimizer": "lion"}, "optimizer must be"),
        ({"device": "tpu"}, "device must be"),
        ({"batch": (0, 8)}, "at least one example"),
        ({"batch": (2, 4000)}, "512 positions, got 4000"),
    ],
)
def test_what_cannot_be_forecast_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        forecast(CONFIGS["bert"], **{"batch": (2, 8), **options})


def test_models_that_cannot_be_forecast_are_refused() -> None:
    model = real("bert")
    tuning = attach(model, Mask.from_indices({"classifier.bias": [0]}))
    with pytest.raises(FishError, match="attached"):
        forecast(model, batch=(2, 8))
    tuning.revert()
    with pytest.raises(TypeError, match="got int"):
        forecast(3, batch=(2, 8))
    with pytest.raises(FishError, match="cannot load"):
        forecast("no/such/folder/at/all", batch=(2, 8))
    quantized = copy.deepcopy(CONFIGS["llama"])
    quantized.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(FishError, match="quantized"):
        forecast(quantized, batch=(2, 8))
    with pytest.raises(ValueError, match="mapping of tensors"):
        forecast(nn.Linear(2, 2), batch=(2, 8))

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.inner(x)
            return type("Output", (), {"loss": y[y > 0].nonzero().sum()})()

    with pytest.raises(FishError, match="depends on its data"):
        forecast(Choosing(), batch={"x": torch.randn(3, 4)}, density=0.5)


DISTILBERT = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=40)


def test_what_fails_without_data_is_one_error_that_says_what_to_do() -> None:
    small: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40,
    }  # fmt: skip
    mixture = MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"])
    with pytest.raises(FishError, match=r"MixtralForCausalLM in float32.*BF16.*another dtype"):
        forecast(mixture, batch=(2, 8))
    assert forecast(mixture, batch=(2, 8), dtype=torch.bfloat16).trained > 0
    bare = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    with pytest.raises(FishError, match=r"T5ForSequenceClassification.*decoder_start_token_id"):
        forecast(bare, batch=(2, 8))
    with pytest.raises(FishError, match=r"PEFT makes no LoRA of DistilBertForSequenceClassification"):
        forecast(DISTILBERT, batch=(2, 8), method="lora:8")


def test_a_goal_is_said_to_be_reached_only_where_the_lines_show_it() -> None:
    def lines(**ours: float) -> list[dict[str, Any]]:
        about = {"device": "cpu", "fits": True}
        made = {"seconds": 1.04, "allocated_bytes": 100, "predicted_bytes": 105, **ours}
        return [{**about, "method": FLOOR, "seconds": 1.0}, {**about, "method": OURS, **made}]

    assert [reached for reached, _ in goals(lines())] == [True, True]
    assert [reached for reached, _ in goals(lines(seconds=1.06))] == [False, True]
    assert goals(lines(predicted_bytes=80))[1] == (False, "forecasts at most 20.0% off the peak (at most 10 %)")
    assert goals([line | {"fits": False} for line in lines()]) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_the_same(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path / "model"))
    run = CliRunner().invoke(app, ["plan", folder, "--batch", "4x8", "--density", "0.01", "--dtype", "bf16", "--json"])
    assert run.exit_code == 0, run.output
    told = forecast(folder, batch=(4, 8), density=0.01, dtype=torch.bfloat16)
    assert json.loads(run.stdout) == json.loads(json.dumps(told.record()))
    mask = Mask.random(empty_model(folder), 0.03, seed=1)
    mask.save(tmp_path / "mask.safetensors")
    given = ["plan", folder, "--batch", "4x8", "--mask", str(tmp_path / "mask.safetensors"), "--compare"]
    run = CliRunner().invoke(app, [*given, "--device", "cuda", "--gradient-checkpointing"])
    assert run.exit_code == 0, run.output
    for expected in ("LoRA r=16", "full", "saved activations", f"{mask.k:,}", size_text(8 * mask.k)):
        assert expected in run.output
    run = CliRunner().invoke(app, ["plan", folder, "--batch", "4by8"])
    assert run.exit_code == 2 and "16x128" in run.output


def test_a_rival_that_cannot_be_made_is_left_out_with_a_note(tmp_path: Path) -> None:
    DISTILBERT.save_pretrained(tmp_path)
    given = ["plan", str(tmp_path), "--batch", "2x8", "--compare"]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    assert "LoRA" not in run.stdout and "full" in run.stdout and "mask" in run.stdout
    assert "LoRA r=16 is left out: PEFT makes no LoRA" in run.stderr
    run = CliRunner().invoke(app, [*given, "--json"])
    assert [one["method"] for one in json.loads(run.stdout)] == ["fish", "full"]


def test_lora_is_that_of_peft() -> None:
    ours = prepared(real("bert"), "lora:4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(real("bert"), LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert fishmask.forecast is forecast
