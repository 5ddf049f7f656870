"""Supervised fine-tuning with TRL's SFTTrainer, which takes a FishModel as it takes a PeftModel.

A tiny Llama, made on the spot with a tokenizer of its own, learns a few sentences. The last line:

    generated after reloading: the river is cold
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fishmask

SENTENCES = ["the river is cold", "a house is warm", "night was good"]
MARKS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

vocabulary = dict.fromkeys([*MARKS.values(), *" ".join(SENTENCES).split()])
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **MARKS)


def base() -> LlamaForCausalLM:
    """Make the model that a real script would load."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes))


config = fishmask.FishConfig(task_type="CAUSAL_LM", density=0.1, score="random")
model = fishmask.get_fish_model(base(), config)
model.print_trainable_parameters()
args = SFTConfig(
    "run",
    max_steps=60,
    per_device_train_batch_size=6,
    learning_rate=3e-2,
    max_length=16,
    bf16=False,
    logging_steps=20,
    save_steps=30,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
data = Dataset.from_list([{"text": sentence} for sentence in SENTENCES * 8])
trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.save_model("adapter")

fresh = base().eval()
fishmask.load(fresh, "adapter")
begin = tokenizer("the", return_tensors="pt", return_token_type_ids=False)
written = fresh.generate(**begin, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print("generated after reloading:", tokenizer.decode(written[0], skip_special_tokens=True))
