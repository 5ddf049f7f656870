"""Tiny models with batches for them, shared by the tests of scoring, masking, attaching and deltas.

Every model is made from a fixed seed and returned in eval mode. `Case.batch(B, seed)` gives what the model takes: a
Hugging Face dict with labels, or an (inputs, targets) tuple. Embeddings have rows that no batch uses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB, SEEN = 40, 30  # rows 30 to 39 of every embedding are never used
POSITIONS = 7


@dataclass(frozen=True)
class Case:
    """One model and its data; `engine` is what engine="auto" scores it with."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    engine: Literal["batched", "loop"] = "batched"

    def __str__(self) -> str:
        return self.name


class SequenceMLP(nn.Module):
    """Linear layers and a LayerNorm over [B, S, I], one class per position."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


class ConvNet(nn.Module):
    """Convolution, BatchNorm with running statistics, in-place ReLU, residual add, pooling."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups, bias=False)
        self.norm, self.short = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, stride=2, padding="valid")
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.2, 0.2)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = self.norm(self.conv(x))
        y += self.short(x)
        return self.head(F.relu(y, inplace=True).mean((-2, -1)))


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` over tokens with a learned position table; first position classifies."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=batch_first)
        self.batch_first = batch_first
        self.words, self.place = nn.Embedding(VOCAB, 8, padding_idx=0), nn.Parameter(torch.randn(1, POSITIONS, 8) / 2)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.place
        if self.batch_first:
            return self.head(self.encoder(x)[:, 0])
        return self.head(self.encoder(x.transpose(0, 1))[0])


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make the model from seed 0, in eval mode, with norms and biases away from their trivial start."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() < 2:
                        p.add_(torch.randn_like(p), alpha=0.1)
        return model.eval()

    return made


def hf(model_class: str, config_class: str, **settings: Any) -> Callable[[], nn.Module]:
    """Make a Hugging Face model with random weights from its class names and settings."""

    def make() -> nn.Module:
        config: PreTrainedConfig = getattr(transformers, config_class)(**settings)
        model: PreTrainedModel = getattr(transformers, model_class)(config)
        return model

    return seeded(make)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(*shape: int) -> Callable[[int, int], Any]:
    """Batches of normal inputs [B, *shape] with one of 3 classes each."""

    def batch(B: int, seed: int) -> Any:
        g = generator(seed)
        return torch.randn(B, *shape, generator=g), torch.randint(3, (B,), generator=g)

    return batch


def positions(B: int, seed: int) -> Any:
    g = generator(seed)
    return torch.randn(B, 6, 5, generator=g), torch.randint(4, (B, 6), generator=g)


def numbers(B: int, seed: int) -> Any:
    g = generator(seed)
    return torch.randn(B, 5, generator=g), torch.randn(B, 2, generator=g)


def word_classes(B: int, seed: int) -> Any:
    g = generator(seed)
    return torch.randint(SEEN, (B, POSITIONS), generator=g), torch.randint(3, (B,), generator=g)


def tokens(labels: str, padded: bool = False) -> Callable[[int, int], Any]:
    """Hugging Face batches of token ids; `labels` is "class", "tag", "mask", "next" or "answer"."""

    def batch(B: int, seed: int) -> Any:
        g = generator(seed)
        ids = torch.randint(1, SEEN, (B, POSITIONS), generator=g)
        lengths = torch.randint(2, POSITIONS + 1, (B,), generator=g) if padded else torch.full((B,), POSITIONS)
        real = torch.arange(POSITIONS) < lengths[:, None]
        ids = ids.where(real, 0)
        out = {"input_ids": ids}
        if padded:
            out["attention_mask"] = real.long()
        if labels == "class":
            out["labels"] = torch.randint(3, (B,), generator=g)
        elif labels == "tag":
            out["labels"] = torch.randint(4, (B, POSITIONS), generator=g).where(real, -100)
        elif labels == "mask":
            chosen = (torch.rand(B, POSITIONS, generator=g) < 0.4) & real
            out["labels"] = torch.randint(1, SEEN, ids.shape, generator=g).where(chosen, -100)
        elif labels == "next":
            out["labels"] = ids.where(real, -100)
        else:
            out["labels"] = torch.randint(1, SEEN, (B, 5), generator=g)
        return out

    return batch


def images(B: int, seed: int) -> Any:
    g = generator(seed)
    return {"pixel_values": torch.randn(B, 3, 8, 8, generator=g), "labels": torch.randint(3, (B,), generator=g)}


BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {k: v for k, v in BERT.items() if k != "max_position_embeddings"} | {"num_key_value_heads": 1}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"vocab_size": VOCAB, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
VIT = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": 3}

CASES = (
    Case("mlp", seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))), classes(5)),
    Case("sequence", seeded(SequenceMLP), positions),
    Case("regression", seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 2))), numbers),
    Case("conv", seeded(ConvNet), classes(3, 6, 6)),
    Case("grouped-conv", seeded(lambda: ConvNet(groups=4)), classes(3, 6, 6)),
    Case("bert", hf("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3), tokens("class")),
    Case("bert-padded", hf("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3), tokens("class", True)),
    Case("bert-masked-lm", hf("BertForMaskedLM", "BertConfig", **BERT), tokens("mask", True)),
    Case("bert-tokens", hf("BertForTokenClassification", "BertConfig", **BERT, num_labels=4), tokens("tag", True)),
    Case(
        "albert",
        hf("AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=6, num_labels=3),
        tokens("class"),
    ),
    Case("gpt2", hf("GPT2LMHeadModel", "GPT2Config", **GPT2), tokens("next")),
    Case("llama", hf("LlamaForCausalLM", "LlamaConfig", **LLAMA), tokens("next", True)),
    Case("vit", hf("ViTForImageClassification", "ViTConfig", **VIT), images),
    Case("t5", hf("T5ForConditionalGeneration", "T5Config", **T5), tokens("answer"), "loop"),
    Case(
        "mixtral",
        hf("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        tokens("next"),
        "loop",
    ),
    Case("torch-encoder", seeded(lambda: TorchEncoder(batch_first=True)), word_classes),
    Case("torch-encoder-positions-first", seeded(lambda: TorchEncoder(batch_first=False)), word_classes, "loop"),
)


def case(name: str) -> Case:
    """Return the case of that name."""
    return next(c for c in CASES if c.name == name)
