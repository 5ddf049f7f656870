"""The other end of weight sync: a model that follows one in training. Pure PyTorch; the reference for other engines."""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.fingerprint import tensor_hash
from fishmask.live import is_attached
from fishmask.mask import Mask
from fishmask.originals import Originals, persistent_buffers
from fishmask.params import aliases, put
from fishmask.quantized import weights
from fishmask.sync_message import Message, joined


@dataclass
class _Index:
    """Where the values of an update go: parameters of this model, in the order of the sender's."""

    entries: dict[str, Tensor] = field(default_factory=dict)  # canonical name -> sorted flat indices, int64, CPU
    settled: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)


class Receiver:
    """A model that takes the updates of a ``Sender``; after each its weights are the sender's, bit for bit.

    An update is collected message by message and written at once when it is complete, under ``lock``: run forwards
    under it, or in the thread that calls ``take``, and none ever sees half an update. A message that is damaged, lost,
    repeated or out of order is refused and changes nothing.

    Args:
        model: A copy of the sender's base, in the same dtypes and on its device for good; its parameters may go by
            other names where they are tied or where the checkpoint lacks the model's prefix.
        lock: Any context manager that can be entered again and again; by default a ``threading.RLock``.
        check_base: Compare hashes of all weights with the sender's base before the first update.

    Attributes:
        model: The model.
        lock: The lock.
        update: Number of the last complete update, or None before the first.

    Raises:
        FishError: The model is attached.

    Example:
        >>> receiver = fishmask.sync.Receiver(model)
        >>> receiver.take(fishmask.sync.Message.from_bytes(connection.recv_bytes()))
        >>> with receiver.lock:
        ...     output = model(**batch)
    """

    def __init__(
        self, model: nn.Module, *, lock: AbstractContextManager[Any] | None = None, check_base: bool = True
    ) -> None:
        if is_attached(model):
            raise FishError("this model is being trained: a receiver needs a copy of the base that nothing else writes")
        self.model, self.check_base = model, check_base
        self.lock: AbstractContextManager[Any] = threading.RLock() if lock is None else lock
        self.update: int | None = None
        self._stream: str | None = None
        self._index = _Index()
        self._staged: list[Message] = []
        self._originals = Originals(model)
        self._kinds = _kinds(model)

    def take(self, message: Message) -> bool:
        """Take the next message.

        Returns:
            Whether it completed an update, which is now in the weights.

        Raises:
            FishError: The message is refused, for the reason given; nothing has changed.
        """
        message.check()
        self._check_order(message.facts)
        staged = [*(self._staged if message.facts["part"] else ()), message]
        if message.facts["part"] + 1 < message.facts["parts"]:
            self._staged = staged
            return False
        self._write(staged[0].facts, joined(staged))
        self._staged = []
        return True

    def reset(self) -> None:
        """Give the model its base back, bit for bit, and wait for a sender's first update or ``welcome``.

        Raises:
            FishError: The model was converted, moved or taken apart since; nothing has changed.
        """
        self._check_model()
        with self.lock, torch.no_grad():
            self._originals.restore(self.model)
        self.update, self._stream, self._staged, self._index = None, None, [], _Index()

    def _check_order(self, facts: Mapping[str, Any]) -> None:
        stream, update, part, start = facts["stream"], facts["update"], facts["part"], facts["start"]
        if self._staged and part == len(self._staged):
            first = self._staged[0].facts
            if all(facts[name] == first[name] for name in ("stream", "update", "start", "parts")):
                return
        known = self._stream == stream and self.update is not None
        if known and update <= (self.update or 0):
            raise FishError(f"update {update} is in the weights already (the last one is {self.update})")
        if part == 0 and (start or (known and update == (self.update or 0) + 1 and not self._staged)):
            return
        if not known and not start and not self._staged:
            raise FishError("this receiver has not begun with this sender: it needs its first update, or welcome()")
        due = self._staged[0].facts["update"] if self._staged else (self.update or 0) + 1
        raise FishError(
            f"expected part {len(self._staged)} of update {due}, got part {part} of update {update}: have the missing "
            "messages sent again, or begin anew with the sender's welcome()"
        )

    @torch.no_grad()
    def _write(self, facts: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> None:
        """Check all of an update, then write it."""
        self._check_model()
        parameters, buffers = weights(self.model), persistent_buffers(self.model)
        index = self._index
        if layout := facts.get("layout"):
            index = self._read(layout, vectors)
            if facts["start"] and self.check_base:
                self._compare(layout["base"])
        values = _parted("values", index.entries, index.dtypes, vectors)
        settled = _parted("settled", index.settled, index.dtypes, vectors) if layout else {}
        sent = {name.removeprefix("buffers/"): own for name, own in vectors.items() if name.startswith("buffers/")}
        wrong = [n for n, own in sent.items() if n not in buffers or _content(buffers[n]) != _content(own)]
        if wrong:
            raise FishError(f"the model has no such buffers: {', '.join(wrong)}; the sender's is another kind of model")
        ready = [
            (name, entries[name].to(parameters[name].device), own.to(parameters[name].device))
            for entries, numbers in ((index.settled, settled), (index.entries, values))
            for name, own in numbers.items()
        ]
        if wrong := [name for name, _, own in ready if own.dtype != parameters[name].dtype]:
            raise FishError(f"values of another dtype came for {', '.join(wrong)}: the sender is a faulty program")
        with self.lock:
            if facts["start"]:
                self._originals.restore(self.model)
            for name, indices in (*index.settled.items(), *index.entries.items()) if layout else ():
                self._originals.remember(name, parameters[name], indices)
            for name, indices, own in ready:
                put(parameters[name], indices, own)
            for name, own in sent.items():
                buffers[name].copy_(own.view(buffers[name].shape))
        self._index, self._stream, self.update = index, facts["stream"], facts["update"]

    def _check_model(self) -> None:
        """Raise FishError unless all tensors are what they were: writing must not fail halfway."""
        here = _kinds(self.model)
        changed = [name for name in self._kinds | here if self._kinds.get(name) != here.get(name)]
        if changed:
            shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise FishError(
                "a receiver's model keeps its dtypes, shapes and devices, and these were converted, moved, added or "
                f"removed: {shown}. Make a Receiver of a copy of the base that is converted and moved already, and "
                "bring it in with the sender's welcome()"
            )

    def _read(self, layout: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> _Index:
        """Find the parameters of a layout in this model."""
        parameters, owners = weights(self.model), self._owners()
        faults = []
        for name, shape in layout["shapes"].items():
            own = parameters.get(owners.get(name, ""))
            if own is None:
                faults.append(f"{name}: the model has no such parameter")
            elif [str(own.dtype)[6:], *own.shape] != [layout["dtypes"][name], *shape]:
                here = f"{str(own.dtype)[6:]} {list(own.shape)}"
                faults.append(f"{name}: {here} here, {layout['dtypes'][name]} {shape} at the sender")
        found = [owners[name] for name in layout["shapes"] if name in owners]
        faults += [
            f"{name}: tied to another one here" for name in layout["shapes"] if found.count(owners.get(name, "")) > 1
        ]
        if faults:
            raise FishError(f"the sender's model is another one: {'; '.join(faults)}")
        split: dict[str, dict[str, Tensor]] = {}
        for kind, sent in (("entries", "indices"), ("settled", "settled_indices")):
            counts, vector = layout[kind], vectors.get(sent, torch.empty(0))
            if len(vector) != sum(counts.values()):
                raise FishError(
                    f"{len(vector)} {sent} came for {sum(counts.values())} entries: the sender is a faulty program"
                )
            split[kind] = dict(zip(counts, vector.cpu().long().split(list(counts.values())), strict=True))
        shapes = {name: torch.Size(shape) for name, shape in layout["shapes"].items()}
        try:
            masks = [Mask.from_indices(own, shapes=shapes) for own in split.values()]
        except ValueError as error:
            raise FishError(f"the sender's index is faulty: {error}") from error
        unsorted = any(
            not own.equal(mask.indices[n])
            for mask, kind in zip(masks, split.values(), strict=True)
            for n, own in kind.items()
        )
        if unsorted or masks[0].digest != layout["mask"]:
            raise FishError("the sender's index is not that of its mask: it was made by a faulty program")
        entries, settled = ({owners[name]: own for name, own in kind.items()} for kind in split.values())
        return _Index(entries, settled, {owners[name]: dtype for name, dtype in layout["dtypes"].items()})

    def _compare(self, base: Mapping[str, str]) -> None:
        """Raise FishError unless all weights below the updates are the sender's base."""
        owners = self._owners()
        here = {name: tensor_hash(tensor) for name, tensor in self._originals.base(self.model)}
        if differing := [name for name, known in base.items() if here.get(owners.get(name, "")) != known]:
            shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
            raise FishError(
                f"the model is not the sender's base: other weights, or none, in {shown}. Load the base that the "
                "sender was attached to, in its dtype; check_base=False follows on other weights"
            )

    def _owners(self) -> dict[str, str]:
        """Map every name that a checkpoint may have for a parameter to the canonical one."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        owners = aliases(self.model)
        return {name.removeprefix(prefix): owner for name, owner in owners.items()} | owners


def _parted(
    kind: str, entries: Mapping[str, Tensor], dtypes: Mapping[str, str], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return each parameter's part of the vectors that hold all parameters of one dtype."""
    parts: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(dtypes[name] for name in entries):
        names = [name for name in entries if dtypes[name] == dtype]
        vector, counts = vectors.get(f"{kind}/{dtype}"), [len(entries[name]) for name in names]
        if vector is None or len(vector) != sum(counts):
            have = 0 if vector is None else len(vector)
            raise FishError(f"{have} {kind} of {dtype} came for {sum(counts)} entries: the sender is a faulty program")
        parts |= zip(names, vector.split(counts), strict=True)
    return parts


def _content(tensor: Tensor) -> tuple[torch.dtype, int]:
    return tensor.dtype, tensor.numel()


def _kinds(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, torch.device]]:
    """Tell what each tensor of a model is, whatever it holds."""
    tensors = {**weights(model), **persistent_buffers(model)}
    return {name: (tensor.dtype, tensor.shape, tensor.device) for name, tensor in tensors.items()}
