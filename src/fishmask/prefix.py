"""The prefix cache: what the frozen blocks below a mask give for an example, computed once and kept.

Nothing below the lowest masked block learns, and without dropout it gives the same for the same example in every epoch.
So the hidden states that enter the first block with entries are kept by example, and in later forwards neither the
embeddings nor the blocks below are run.
"""

import inspect
import sys
import warnings
from collections.abc import Iterable, Set
from contextlib import nullcontext, suppress
from functools import partial
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fishmask.attach import Tuning
from fishmask.batches import Batch, to_device
from fishmask.compute import chain_of, run
from fishmask.errors import FishError
from fishmask.fingerprint import element_bytes
from fishmask.frozen import Frozen, Reached, examples_in, inputs_of, rows_of, tokens_in
from fishmask.live import tuning_of
from fishmask.params import aliases
from fishmask.sites import Hook
from fishmask.states import KEY_BYTES, FolderStates, MemoryStates

# Arguments that the states do not depend on.
_NO_INPUTS = frozenset({"labels", "num_items_in_batch", "return_dict", "use_cache"})
_OTHER_STACK = ("encoder_", "decoder_")  # of a model whose two stacks have inputs and padding of their own
_PLAIN = (type(None), bool, int, float, str)
Span = tuple[int, int]  # the first token of an example that is no padding, and the one behind the last


class PrefixCache:
    """Hidden states of the blocks below a mask, kept by example while a ``with`` block lasts.

    Inside the block every forward of the model looks its examples up by their inputs; those that are there are not run
    through the frozen blocks again, those that are not are run once and kept while there is room. Everything below the
    mask is in eval mode meanwhile, so it has no dropout; blocks with entries and those above train as ever.

    What is served is the very state that was computed. In a batch of the same shape the output is the same bit for
    bit; where the same example was computed beside other ones, it differs by what rounding differs. Padding apart:
    see ``trim``.

    Args:
        model: An attached model, or its ``Tuning``. Its mask must leave at least the first block alone (see
            ``step_budget`` of ``Mask.from_scores``).
        folder: Where to keep the states; None for memory. A folder can be opened again by a later training of the same
            mask's prefix: the same weights below, the same versions of torch and transformers.
        limit_bytes: The most bytes to keep. When they are full, other examples are computed in every forward.
        dtype: The dtype to keep states in; by default their own, which is exact.
        trim: Leave out what stands at padding, by the ``attention_mask``, where no other token depends on it: that is
            tried on one example at first. Whatever is made of those places above must not matter then. In training
            that is checked now and then, by its gradient; in evaluation it cannot be: pass False for a model that
            looks at padding, such as one that takes the mean over all places.

    Attributes:
        lowest: The first block that is run; those below are served.
        served: How many examples came from the cache.
        computed: How many were computed.

    Raises:
        FishError: The model is not attached, is sharded, compiled, no chain of blocks or one with a decoder beside an
            encoder, or has masked entries below its second block.
        ValueError: The limit is no positive number.

    Example:
        >>> import transformers
        >>> from fishmask import Mask, attach
        >>> size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        >>> config = transformers.BertConfig(vocab_size=40, **size)
        >>> model = transformers.BertForSequenceClassification(config)
        >>> mask = Mask.from_indices({"bert.encoder.layer.1.output.dense.weight": [0, 5]})
        >>> tuning, ids = attach(model, mask), torch.ones(4, 7, dtype=torch.long)
        >>> with PrefixCache(tuning, limit_bytes=10**6) as cache:
        ...     for epoch in range(3):
        ...         model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        >>> cache.lowest, cache.computed, cache.served
        (1, 4, 8)
    """

    def __init__(
        self,
        model: nn.Module | Tuning,
        folder: str | PathLike[str] | None = None,
        *,
        limit_bytes: int,
        dtype: torch.dtype | None = None,
        trim: bool = True,
    ) -> None:
        if not isinstance(limit_bytes, int) or limit_bytes < 1:
            raise ValueError(f"limit_bytes must be a positive whole number of bytes; got {limit_bytes!r}")
        tuning = model if isinstance(model, Tuning) else tuning_of(model)
        if tuning is None or not tuning.attached:
            raise FishError("a prefix cache is for a model with a mask: call fishmask.attach(model, mask) first")
        if tuning.shards is not None:
            raise FishError("a model sharded by FSDP2 has no prefix cache: its ranks must run every block together")
        self._tuning, self._model = tuning, tuning.model
        self._chain, self._blocks = chain_of(self._model)
        self._owner = inputs_of(self._model, self._chain)
        self._parameters = inspect.signature(self._owner.forward).parameters
        _refuse_two_stacks(name for name in self._parameters if name.startswith("decoder_"))
        self._mask = tuning.mask
        self.lowest = self._lowest()
        if self.lowest == 0:
            raise FishError(
                f"the mask has entries in {self._chain}.0, so there is no frozen block below it: choose one with "
                "step_budget (Mask.from_scores), or leave the first blocks out with exclude"
            )
        self._folder = None if folder is None else Path(folder)
        self._limit, self._dtype, self._trim = limit_bytes, dtype, trim
        self._store: MemoryStates | FolderStates | None = None
        self._prefix: Frozen | None = None
        self._handles: list[RemovableHandle] = []
        self._trims: bool | None = None  # whether padding is left out; not known before a batch has some
        self._filling = False
        self._undo: list[tuple[nn.Module, Any]] = []  # what a forward has changed: (module, its own forward, if any)
        self._training: list[nn.Module] = []
        self._forwards = 0
        self._nbytes, self._full = 0, False
        self.served = self.computed = 0

    def __enter__(self) -> Self:
        if self._handles:
            raise FishError("this PrefixCache is in use already: leave its `with` block first")
        if any(_is_cache(hook) for hook in self._owner._forward_pre_hooks.values()):
            raise FishError("this model has a prefix cache in use already: leave its `with` block first")
        if any(type(module).__name__ == "OptimizedModule" for module in self._model.modules()):
            raise FishError("a compiled model has no prefix cache: the compiler would keep what one forward has found")
        self._handles = [
            self._owner.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            self._owner.register_forward_hook(Hook(self._after), always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restore()
        if isinstance(self._store, FolderStates):
            self._store.close()
            self._nbytes = self._store.nbytes
            self._store = self._prefix = None

    @property
    def nbytes(self) -> int:
        """Bytes kept, on disk or in memory."""
        return self._nbytes if self._store is None else self._store.nbytes

    def __repr__(self) -> str:
        seen = self.served + self.computed
        rate = f", {self.served / seen:.1%} of {seen:,} examples served" if seen else ""
        return (
            f"PrefixCache({self._chain}[:{self.lowest}] of {len(self._blocks)}, "
            f"{self.nbytes / 1e6:,.1f} of {self._limit / 1e6:,.0f} MB{rate})"
        )

    def estimate(self, batch: Batch, examples: int) -> int:
        """Return how many bytes so many examples like those of a batch would take; before the ``with`` block or in it.

        Args:
            batch: What the model takes.
            examples: How many there are in all.
        """
        with nullcontext() if self._handles else self:
            kept, self._store, computed = self._store, MemoryStates(sys.maxsize), self.computed
            try:
                self.fill([batch])
                return round(examples * self._store.nbytes / len(self._store))
            finally:
                self._store, self.computed = kept, computed

    def fill(self, batches: Iterable[Batch]) -> None:
        """Compute and keep the states of batches without training on them, until there is no more room.

        A training whose states were filled in beforehand, in an order of their own, gives the same numbers after an
        interruption as without one, whatever was kept when it stopped.

        Args:
            batches: What the model takes.

        Raises:
            FishError: The cache is not in use: this is for inside its ``with`` block.
        """
        if not self._handles:
            raise FishError("this PrefixCache is not in use: enter its `with` block first")
        device = next(self._model.parameters()).device
        self._filling = True
        try:
            for batch in batches:
                with torch.no_grad(), suppress(Reached):
                    run(self._model, to_device(batch, device))
                if self._full:
                    break
        finally:
            self._filling = False

    # --- one forward --------------------------------------------------------------------------------------------------

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the forward: find or compute the states, and put what serves them in the place of the blocks."""
        if torch.compiler.is_compiling():
            raise FishError("a compiled model has no prefix cache: leave the `with` block, or do not compile")
        self._restore()  # what an interrupt of the last forward has left: hooks behind a forward do not see those
        # The model is scored, or its layers are counted, or it is no more attached: all of it has to run.
        if self._tuning._paused or not self._tuning.attached:
            return None
        named = self._named(args, kwargs)
        _refuse_two_stacks(name for name, value in named.items() if value is not None and name.startswith(_OTHER_STACK))
        if learning := [name for name, value in named.items() if isinstance(value, Tensor) and value.requires_grad]:
            raise FishError(
                f"a prefix cache is for inputs that do not learn, but {', '.join(learning)} asks for a gradient"
            )
        self._check_mask()
        try:
            prefix = self._prefix or self._discover(named)
            prefix.check(self._mask.indices)
            self._training = [module for module in prefix.modules if module.training]
            for module in self._training:
                module.training = False
            if self._asks_for_more(named) and not self._filling:
                return None
            if "use_cache" in self._parameters:
                named["use_cache"] = False
            spans = self._spans(named, prefix)
            states = self._states(named, spans, prefix)
            if self._filling:
                raise Reached
            if torch.is_grad_enabled():
                self._prepare_gradient(states, spans)
            self._serve(states, prefix)
        except BaseException:
            self._restore()
            raise
        return (), named

    def _after(self, owner: nn.Module, args: Any, output: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for module, own in self._undo:
            if own is None:
                del module.forward
            else:
                module.forward = own
        for module in self._training:
            module.training = True
        self._undo, self._training = [], []

    def _put(self, module: nn.Module, forward: Any) -> None:
        self._undo.append((module, vars(module).get("forward")))
        module.forward = forward

    def _serve(self, states: Tensor, prefix: Frozen) -> None:
        """Have the frozen part give the states without being run: the last block below the mask returns them."""
        # NaN where the states of a layer below would be: should anything else use them, it shows.
        nothing = states.new_full((1,) * states.dim(), float("nan")).expand(states.shape)
        if prefix.embeddings is not None:
            self._put(prefix.embeddings, partial(_give, nothing.to(prefix.dtype)))
        for block in self._blocks[: self.lowest - 1]:
            self._put(block, partial(_give, prefix.wrap(nothing)))
        self._put(self._blocks[self.lowest - 1], partial(_give, prefix.wrap(states)))

    def _states(self, named: dict[str, Any], spans: list[Span], prefix: Frozen) -> Tensor:
        """Return the states of a batch, of which those that are missing are computed and kept."""
        keys, store = self._keys(named, spans), self._opened(prefix)
        missing = [row for row, key in enumerate(keys) if key not in store]
        if not missing and self._filling:
            raise Reached
        if not missing and (found := self._read(keys, spans, prefix, tokens_in(named))) is not None:
            self.served += len(keys)
            return found
        # To fill means whole batches, so that an example's state does not depend on what was there before.
        rows = missing if missing and not self._filling else list(range(len(keys)))
        fresh = prefix.run(named if len(rows) == len(keys) else rows_of(named, rows, len(keys)))
        if fresh.shape[0] != len(rows):
            raise FishError(
                f"the blocks of {self._chain} were expected to pass on states whose first dimension is the {len(rows)} "
                f"examples of the batch; got shape {list(fresh.shape)}"
            )
        if self._dtype is not None:
            fresh = fresh.to(self._dtype).to(fresh.dtype)  # as it will be served
        for place, row in enumerate(rows):
            if keys[row] not in store:
                self._full |= not store.add(keys[row], _bytes(self._trimmed(fresh[place], spans[row]), self._dtype))
        self.computed += len(rows)
        if len(rows) == len(keys):
            return fresh
        states = self._read(keys, spans, prefix, tokens_in(named), skipped=set(rows))
        if states is None:  # damaged on disk
            return prefix.run(named)
        states[rows] = fresh
        self.served += len(keys) - len(rows)
        return states

    def _read(
        self, keys: list[bytes], spans: list[Span], prefix: Frozen, width: int, skipped: Set[int] = frozenset()
    ) -> Tensor | None:
        """Read the states of a batch, zeros at padding; None where one of them is damaged."""
        assert self._store is not None
        states = torch.zeros(len(keys), *prefix.state_shape(width), dtype=self._dtype or prefix.state_dtype)
        for row, key in enumerate(keys):
            part = self._trimmed(states[row], spans[row])
            if row not in skipped and not self._store.read(key, _view(part)):
                return None
        return states.to(prefix.device, prefix.state_dtype)

    def _trimmed(self, state: Tensor, span: Span) -> Tensor:
        """Return what of an example's state [tokens, ...] is kept."""
        return state[span[0] : span[1]] if span[1] else state

    def _spans(self, named: dict[str, Any], prefix: Frozen) -> list[Span]:
        """Return where each example's tokens are; (0, 0) for all of them, where there is no 2-D ``attention_mask``."""
        mask = named.get("attention_mask")
        count = examples_in(named)
        by_row = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == count
        if not (self._trim and prefix.by_token and isinstance(mask, Tensor) and by_row):
            return [(0, 0)] * count
        if self._trims is None:
            self._trims = prefix.ignores_padding(named, mask)
            if self._trims is False:
                warnings.warn(
                    f"in {self._chain} what stands at padding reaches other tokens, so this PrefixCache keeps padding "
                    "too, and knows an example again only where it is padded alike",
                    stacklevel=2,
                )
        if not self._trims:
            return [(0, 0)] * count
        present = mask != 0
        first = present.int().argmax(1).tolist()
        behind = (mask.shape[1] - present.flip(1).int().argmax(1)).tolist()
        some = present.any(1).tolist()
        return [(a, b) if any_ else (0, mask.shape[1]) for a, b, any_ in zip(first, behind, some, strict=True)]

    def _keys(self, named: dict[str, Any], spans: list[Span]) -> list[bytes]:
        """Return a digest of each example's inputs, of what is at padding only its place."""
        kind = next(self._model.parameters()).device.type
        cast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
        common = blake2b(repr((cast, spans[0][1] > 0)).encode(), digest_size=KEY_BYTES)
        own: list[tuple[str, Tensor, bool]] = []
        mask = named.get("attention_mask")
        for name in sorted(named.keys() - _NO_INPUTS):
            value = named[name]
            if not isinstance(value, Tensor):
                common.update(f"{name}={value!r}".encode())
            elif value.dim() and value.shape[0] == len(spans):
                by_token = isinstance(mask, Tensor) and value.shape[:2] == mask.shape
                own.append((name, value.detach().cpu().contiguous(), by_token))
            else:
                common.update(f"{name} {list(value.shape)}".encode())
                common.update(element_bytes(value))
        keys = []
        for row, span in enumerate(spans):
            key = common.copy()
            key.update(repr(span[0]).encode())
            for name, value, by_token in own:
                part = value[row, span[0] : span[1]] if by_token and span[1] else value[row]
                key.update(f"{name} {value.dtype} {list(part.shape)}".encode())
                key.update(element_bytes(part))
            keys.append(key.digest())
        return keys

    def _prepare_gradient(self, states: Tensor, spans: list[Span]) -> None:
        """Have the states ask for a gradient where reentrant checkpointing needs it, or to look at that of padding."""
        self._forwards += 1
        padded = any(span[1] and span != (0, states.shape[1]) for span in spans)
        look = padded and self._forwards & (self._forwards - 1) == 0  # it costs a block's input gradient
        if look or _checkpoints_reentrantly(self._blocks):
            states.requires_grad_(True)
        if look:
            places = torch.arange(states.shape[1])
            start, end = (torch.tensor(ends)[:, None] for ends in zip(*spans, strict=True))
            padding = ((places < start) | (places >= end)).to(states.device)
            states.register_hook(partial(_expect_none, padding))

    # --- what it rests on ---------------------------------------------------------------------------------------------

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a forward by name."""
        names = [name for name, p in self._parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(names):
            raise FishError(f"{type(self._owner).__name__} takes arguments without names, so it has no prefix cache")
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _asks_for_more(self, named: dict[str, Any]) -> bool:
        """Whether a forward takes or returns what only the blocks below have: their states, a key-value cache."""
        if named.get("use_cache") or any(not isinstance(value, (Tensor, *_PLAIN)) for value in named.values()):
            return True
        config = getattr(self._owner, "config", None)
        wanted = ("output_hidden_states", "output_attentions", "output_router_logits")
        return any(named.get(name, getattr(config, name, False)) for name in wanted)

    def _lowest(self) -> int:
        """Return the first block with masked entries, or the number of blocks."""
        names = [name for name, canonical in aliases(self._model).items() if canonical in self._mask.indices]
        inside = [name.removeprefix(f"{self._chain}.") for name in names if name.startswith(f"{self._chain}.")]
        return min((int(name.split(".")[0]) for name in inside), default=len(self._blocks))

    def _check_mask(self) -> None:
        """Refuse a mask that has come to reach below."""
        if self._tuning.mask is self._mask:
            return
        self._mask = self._tuning.mask
        if (lowest := self._lowest()) < self.lowest:
            raise FishError(
                f"the mask now has entries in {self._chain}.{lowest}, but this cache holds what enters "
                f"{self._chain}.{self.lowest}: make a new PrefixCache after set_mask"
            )
        if self._prefix is not None:
            self._prefix.check_frozen(self._mask.indices)

    def _discover(self, named: dict[str, Any]) -> Frozen:
        """Run one example to see what runs below the mask; refuse if any of that learns."""
        prefix = Frozen(self._model, self._owner, self._chain, self._blocks, self.lowest)
        one = rows_of(named, [0], examples_in(named))
        if "use_cache" in self._parameters:
            one["use_cache"] = False
        prefix.look(one)
        prefix.check_frozen(self._mask.indices)
        self._prefix = prefix
        return prefix

    def _opened(self, prefix: Frozen) -> MemoryStates | FolderStates:
        if self._store is None and self._folder is not None:
            dtype = str(self._dtype or prefix.state_dtype)
            self._store = FolderStates(self._folder, self._limit, prefix.identity() | {"dtype": dtype})
        elif self._store is None:
            self._store = MemoryStates(self._limit)
        return self._store


def _give(output: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for the forward of a module that need not run."""
    return output


def _refuse_two_stacks(names: Iterable[str]) -> None:
    """Refuse inputs of an encoder beside a decoder: which of them a state depends on is not known."""
    if found := list(names):
        raise FishError(
            f"a prefix cache is for models of one stack of blocks, but this one takes {', '.join(found)}: train one "
            "with an encoder and a decoder without it"
        )


def _is_cache(hook: Any) -> bool:
    return isinstance(hook, Hook) and isinstance(getattr(hook._call, "__self__", None), PrefixCache)


def _bytes(state: Tensor, dtype: torch.dtype | None) -> memoryview:
    return element_bytes(state if dtype is None else state.to(dtype))


def _view(part: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, to be written."""
    return part.reshape(-1).view(torch.uint8).numpy().data


def _expect_none(padding: Tensor, grad: Tensor) -> None:
    """Refuse a loss that takes notice of what is at padding, where zeros are served."""
    if bool(grad[padding].any()):
        raise FishError(
            "the loss depends on what the model makes of padding, which a prefix cache does not keep: leave padding "
            "out of the loss (label -100, a mean by the attention mask), or keep it with PrefixCache(..., trim=False)"
        )


def _checkpoints_reentrantly(blocks: Iterable[nn.Module]) -> bool:
    """Whether a block checkpoints its activations in the old way, which needs an input that asks for a gradient."""
    functions = [vars(block).get("_gradient_checkpointing_func") for block in blocks if block.training]
    return any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions if f is not None)
