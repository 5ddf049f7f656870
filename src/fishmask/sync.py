"""Weight sync: a model in training sends its entries to copies of it that serve.

Which entries train is known beforehand, so their indices travel once and every update after that is k values in the
dtype of the weights. Nothing is compared with a snapshot. ``docs/weight_sync.md`` is the guide.
"""

import secrets
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fishmask.attach import Tuning
from fishmask.checkpoint_names import checkpoint_names
from fishmask.errors import FishError
from fishmask.fingerprint import fingerprint
from fishmask.mask import Mask
from fishmask.originals import persistent_buffers
from fishmask.params import take
from fishmask.receiver import Receiver
from fishmask.sync_message import Message, broadcast, cut

__all__ = ["Message", "Receiver", "Sender", "broadcast", "checkpoint_names"]

CHUNK = 64 << 20  # bytes
_REACH = 1 << 31  # entries that an int32 index tells apart


class Sender:
    """Makes the messages that keep other copies of a model equal to the one in training.

    The first update has the indices of the mask and what identifies the base; every later one the values. After
    ``set_mask`` the next update announces the new mask, together with the last values of all entries that were trained
    before and are no more; so receivers are right whatever was trained between two updates.

    Args:
        source: A ``Tuning``; or what has one: a ``FishModel``, whose active adapter is meant, or ``LocalRounds``.
        checkpoint: Where the names of the base's parameters come from: see ``checkpoint_names``; or those names by
            canonical name. By default what ``save_pretrained`` would write.
        chunk_bytes: Most bytes of tensors in one message, and of values and indices in one list of ``patches``.

    Raises:
        TypeError: ``source`` has no tuning.
        ValueError: ``chunk_bytes`` is too small for one entry, or ``checkpoint`` gives one name twice.
        FishError: No adapter is in training, or there is no such checkpoint.

    Example:
        >>> tuning = fishmask.attach(model, mask)
        >>> sender = fishmask.sync.Sender(tuning)
        >>> for message in sender.update():
        ...     connection.send_bytes(message.to_bytes())
    """

    def __init__(
        self,
        source: Any,
        *,
        checkpoint: Mapping[str, str] | str | PathLike[str] | None = None,
        chunk_bytes: int = CHUNK,
    ) -> None:
        if not isinstance(source, Tuning) and not hasattr(source, "tuning"):
            raise TypeError(f"a Sender takes a Tuning, a FishModel or LocalRounds, got {type(source).__name__}")
        tuning = source if isinstance(source, Tuning) else source.tuning
        if tuning is None:
            raise FishError("no adapter of this model is in training: make one active that is trainable")
        if chunk_bytes < 16:
            raise ValueError(f"chunk_bytes must be at least 16, got {chunk_bytes}")
        self._source, self.tuning = source, tuning
        self.chunk_bytes = chunk_bytes
        given = isinstance(checkpoint, Mapping)
        self._names = dict(checkpoint) if given else checkpoint_names(tuning.model, checkpoint)  # type: ignore[arg-type]
        if len(set(self._names.values())) < len(self._names):
            raise ValueError(
                "checkpoint gives several parameters one name; a tied parameter goes by its canonical name"
            )
        self._stream = secrets.token_hex(8)
        self._number = -1  # of the last update
        self._makes: str | None = None  # messages or patches
        self._buffers: set[str] = set()
        self._mask: Mask | None = None  # the one that was announced, under canonical names
        self._known: tuple[object, object] | None = None  # what it was made of
        self._indices: dict[str, Tensor] = {}  # int32, on the device of the weights
        self._settled: dict[str, Tensor] = {}

    def update(self) -> list[Message]:
        """Return the messages of the next update: all receivers take all of them, in this order.

        Sharded weights are gathered, so all ranks call it together and get the same messages but for their stream.

        Raises:
            FishError: The model is not attached, an entry's parameter has no name in the checkpoint, or a tensor is
                too large for int32 indices.
        """
        self._serve("messages")
        fresh = self._refresh()
        messages = self._messages(self._number + 1, start=self._number < 0, indices=fresh)
        self._known = self.tuning.mask, self.tuning._adopted
        self._number += 1
        return messages

    def welcome(self) -> list[Message]:
        """Return what brings a copy that holds the base to where the others are; it then takes the next updates.

        Also for a receiver that has lost a message: it goes back to its base and from there to the present.

        Raises:
            FishError: There was no update yet, or as for ``update``.
        """
        self._serve("messages")
        if self._number < 0:
            raise FishError("there was no update yet: the first update() begins at the base")
        if self._changed():
            raise FishError("the mask has changed since the last update: call update() first")
        return self._messages(self._number, start=True, indices=True)

    def on_step(self, deliver: Callable[[list[Message]], None], every: int = 1) -> RemovableHandle:
        """Call ``deliver(messages)`` with an update after every ``every``-th step of the optimizer.

        With ``LocalRounds`` make the rounds first and take their ``every``: updates then follow the rounds.

        Returns:
            A handle whose ``remove()`` ends it; so does ``detach``.

        Raises:
            ValueError: ``every`` is no number of steps.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is a number of steps of at least 1, got {every!r}")
        steps = 0

        def stepped(optimizer: Optimizer) -> None:
            nonlocal steps
            steps += 1
            if steps % every == 0:
                deliver(self.update())

        return self.tuning.on_step(stepped)

    def patches(self) -> list[list[dict[str, Any]]]:
        """Return the next update as vLLM's sparse weight update takes it, in lists of bounded size.

        Each patch has the fields of vLLM's ``SparseWeightPatch``: ``name`` in the checkpoint, ``indices`` (int32, flat
        into the whole tensor of the checkpoint, unique), ``values`` (absolute, in the weight's dtype) and
        ``full_shape``. Both tensors are contiguous, as NCCL sends them by their memory. The first update, and the one
        after a change of mask, also has the entries that were trained before.

        Raises:
            FishError: A value is NaN, by which vLLM marks what does not change; training has changed buffers, which
                have no patch; or as for ``update``.
        """
        self._serve("patches")
        fresh = self._refresh()
        if buffers := self.tuning.originals.changed_buffers(self.tuning.model):
            raise FishError(f"a patch is for a parameter, and training has changed buffers: {', '.join(buffers)}")
        entries = dict(self._indices)
        for name, indices in self._settled.items() if fresh else ():
            entries[name] = torch.cat([entries[name], indices]).sort().values if name in entries else indices
        values = self._taken(entries)
        if wrong := [self._names[name] for name, own in values.items() if bool(own.isnan().any())]:
            raise FishError(f"values are NaN, by which vLLM marks what does not change: {', '.join(wrong)}")
        self._known = self.tuning.mask, self.tuning._adopted
        lists: list[list[dict[str, Any]]] = [[]]
        room = self.chunk_bytes
        for name, indices in entries.items():
            begin, width = 0, 4 + values[name].element_size()
            while begin < len(indices):
                if room < width:
                    lists.append([])
                    room = self.chunk_bytes
                piece = slice(begin, begin + room // width)
                patch = {"name": self._names[name], "indices": indices[piece], "values": values[name][piece]}
                lists[-1].append({**patch, "full_shape": tuple(self.tuning.mask.shapes[name])})
                begin, room = begin + len(patch["indices"]), room - len(patch["indices"]) * width
        return lists

    # --- inside -------------------------------------------------------------------------------------------------------

    def _serve(self, what: str) -> None:
        """Refuse what cannot be made now, or not by a sender that makes something else already."""
        if not isinstance(self._source, Tuning) and self._source.tuning is not self.tuning:
            raise FishError(
                "the adapter that this Sender was made for is not the one in training any more: make it active again "
                "with set_adapter(), or make a Sender for the one that is"
            )
        self.tuning._check_attached()
        if what != (self._makes or what):
            raise FishError(f"this Sender makes {self._makes} already, each with what is new: make another for {what}")
        self._makes = what

    def _changed(self) -> bool:
        """Whether something else is trained than the last update announced."""
        # Both are made anew with every change.
        return (
            self._known is None or self._known[0] is not self.tuning.mask or self._known[1] is not self.tuning._adopted
        )

    def _refresh(self) -> bool:
        """Take up what is trained now; tell whether it is something else than before."""
        if not self._changed():
            return False
        tuning = self.tuning
        mask = tuning.mask
        if tuning._adopted:  # entries that other workers train
            mask = mask | Mask.from_indices(tuning._adopted, shapes=mask.shapes)
        settled = Mask.from_indices(tuning.originals.indices, shapes=mask.shapes) - mask
        if nameless := [name for name in (mask | settled).indices if name not in self._names]:
            raise FishError(
                f"the checkpoint does not hold these parameters as they are: {', '.join(nameless)}. Leave them out of "
                "the mask (exclude=), or serve what save_pretrained writes of this model"
            )
        device = tuning.values.device
        indices = {name: narrowed(name, own, mask.shapes[name], device) for name, own in mask.indices.items()}
        old = {name: narrowed(name, own, mask.shapes[name], device) for name, own in settled.indices.items()}
        self._mask, self._indices, self._settled = mask, indices, old
        return True

    def _taken(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights at these entries, contiguous and in their own dtype."""
        self.tuning._write_changes()
        parameters = self.tuning.settled_parameters()
        return {name: take(parameters[name], indices.long()) for name, indices in entries.items()}

    def _messages(self, number: int, *, start: bool, indices: bool) -> list[Message]:
        vectors, layout = {}, None
        if indices:
            layout = self._layout(start)
            vectors["indices"] = torch.cat(list(self._indices.values()))
            if self._settled:
                vectors["settled_indices"] = torch.cat(list(self._settled.values()))
                vectors |= by_dtype("settled", self._taken(self._settled))
        vectors |= by_dtype("values", self._taken(self._indices))
        model = self.tuning.model
        self._buffers |= self.tuning.originals.changed_buffers(model).keys()
        buffers = persistent_buffers(model)
        vectors |= {f"buffers/{name}": buffers[name].detach().reshape(-1).clone() for name in sorted(self._buffers)}
        facts = {"stream": self._stream, "update": number, "start": start}
        return cut(facts, layout, vectors, self.chunk_bytes)

    def _layout(self, start: bool) -> dict[str, Any]:
        assert self._mask is not None
        parameters, shapes = self.tuning.settled_parameters(), self._mask.shapes
        named = {self._names[name]: own for name, own in self._mask.indices.items()}
        layout: dict[str, Any] = {
            "mask": Mask.from_indices(named).digest,
            "entries": {self._names[name]: len(own) for name, own in self._indices.items()},
            "settled": {self._names[name]: len(own) for name, own in self._settled.items()},
            "shapes": {self._names[n]: list(shapes[n]) for n in (*self._indices, *self._settled)},
            "dtypes": {self._names[n]: str(parameters[n].dtype)[6:] for n in (*self._indices, *self._settled)},
        }
        if start:
            # What is replaced whole, such as a new head, may be anything before.
            whole = self._mask | Mask.from_indices(self.tuning.originals.indices, shapes=shapes)
            named_base = ((n, base) for n, base in self.tuning.originals.base(self.tuning.model) if n in self._names)
            layout["base"] = {self._names[name]: known for name, known in fingerprint(named_base, whole).items()}
        return layout


def narrowed(name: str, indices: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return flat indices of a tensor as int32 on a device.

    Raises:
        FishError: The tensor has more entries than int32 tells apart.
    """
    if shape.numel() > _REACH:
        raise FishError(
            f"{name} has {shape.numel():,} entries, and indices are sent as int32, which reaches {_REACH:,}: leave it "
            "out of the mask (exclude=)"
        )
    return indices.to(device=device, dtype=torch.int32)


def by_dtype(kind: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the values of all parameters of one dtype, in their order."""
    joined: dict[str, list[Tensor]] = {}
    for own in values.values():
        joined.setdefault(f"{kind}/{str(own.dtype)[6:]}", []).append(own)
    return {name: torch.cat(parts) for name, parts in joined.items()}
