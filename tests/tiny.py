"""A tiny BERT as a local model folder, and tables that it can learn."""

import random
from functools import partial
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

GOOD = ("bright", "calm", "fine", "glad", "kind", "warm")
BAD = ("angry", "bleak", "cold", "grim", "harsh", "sour")
OTHER = ("a", "the", "is", "day", "house", "river")
WORDS = (*GOOD, *BAD, *OTHER)


def model_folder(folder: Path) -> Path:
    """Write a BERT of two layers without a head, and a tokenizer that knows the words above."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    tokenizer.save_pretrained(folder)
    # Larger first weights and less dropout than usual: a model so small has to learn within a second.
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.1, hidden_dropout_prob=0.05, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def _sentence(generator: random.Random, word: str) -> str:
    words = [word, *generator.choices(OTHER, k=generator.randint(1, 5))]
    generator.shuffle(words)
    return " ".join(words)


def _row(generator: random.Random, kind: str) -> tuple[str, str]:
    good = generator.random() < 0.5
    sentence = _sentence(generator, generator.choice(GOOD if good else BAD))
    if kind == "ratings":
        return sentence, f"{(1 if good else -1) * generator.uniform(1, 2):.2f}"
    return sentence, "good" if good else "bad"


def table(path: Path, kind: str = "classes", rows: int = 48, seed: int = 0) -> Path:
    """Write a .tsv of sentences with a class or a rating."""
    make = partial(_row, random.Random(seed), kind)
    lines = ["text\tlabel", *("\t".join(make()) for _ in range(rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
