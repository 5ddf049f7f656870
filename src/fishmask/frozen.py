"""The frozen part of a model below a mask: what runs in it, what it gives for a batch, whether it stays as it is."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fishmask.compute import evaluating
from fishmask.errors import FishError
from fishmask.fingerprint import tensor_hash
from fishmask.states import KEY_BYTES

Named = Mapping[str, Any]  # the arguments of a forward by their names


class Reached(Exception):
    """The end of the prefix: what it passes on."""


class Frozen:
    """The frozen part of a model: everything that runs until the last block below the mask is done."""

    def __init__(self, model: nn.Module, owner: nn.Module, chain: str, blocks: list[nn.Module], lowest: int) -> None:
        self._model, self._owner, self._chain, self._lowest = model, owner, chain, lowest
        self._first, self._last = blocks[0], blocks[lowest - 1]
        self._blocks = blocks[:lowest]
        self.modules: list[nn.Module] = []
        self.embeddings: nn.Module | None = None

    def look(self, named: Named) -> None:
        """Run one example, and remember what ran and what came out."""
        path = self._chain.split(".")
        above = {id(self._model.get_submodule(".".join(path[:i]))) for i in range(len(path) + 1)}
        ran: dict[int, nn.Module] = {}
        outputs: list[tuple[nn.Module, Any]] = []  # until the first block begins
        entering: list[Any] = []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) not in above:
                ran[id(module)] = module
                if not entering:
                    outputs.append((module, output))

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(args[0] if args else next(iter(kwargs.values())))

        hooks = [register_module_forward_hook(leave), self._first.register_forward_pre_hook(enter, with_kwargs=True)]
        try:
            states = self.run(named)
        finally:
            for hook in hooks:
                hook.remove()
        for block in self._blocks:
            ran |= {id(module): module for module in block.modules()}
        self.modules = list(ran.values())
        self.state_dtype, self.device, self._shape = states.dtype, states.device, states.shape[1:]
        self.by_token = states.dim() > 1 and states.shape[1] == tokens_in(named)
        # The outermost module whose output enters the first block as it is need not run either.
        whole = [module for module, output in outputs if output is entering[0] and output.shape == states.shape]
        self.embeddings = whole[-1] if whole else None
        self.dtype = entering[0].dtype
        own: dict[int, Tensor] = {id(p): p for module in self.modules for p in module.parameters()}
        own |= {id(b): b for module in self.modules for b in module.buffers()}
        names = {id(t): name for name, t in (*self._model.named_parameters(), *self._model.named_buffers())}
        self._tensors = {names[key]: tensor for key, tensor in own.items()}
        self._above = {f"{name}." if (name := ".".join(path[:i])) else "" for i in range(len(path) + 1)}
        self._seen = self._versions()

    def run(self, named: Named) -> Tensor:
        """Run a batch up to the mask, without dropout and gradients, and return its states [examples, ...]."""
        own = vars(self._last).get("forward")
        forward = self._last.forward

        def reach(*args: Any, **kwargs: Any) -> Any:
            raise Reached(forward(*args, **kwargs))

        try:
            with evaluating(self._owner), torch.no_grad():
                self._last.forward = reach
                self._owner.forward(**named)
        except Reached as reached:
            output = reached.args[0]
        else:
            raise FishError(f"a forward of {type(self._owner).__name__} does not come by {self._chain}")
        finally:
            if own is None:
                del self._last.forward
            else:
                self._last.forward = own
        self._tuple = isinstance(output, tuple)
        if self._tuple and not any(other is not None for other in output[1:]):
            output = output[0]
        if not isinstance(output, Tensor):
            raise FishError(
                f"the blocks of {self._chain} were expected to pass on one tensor; got {type(output).__name__}, of "
                "which a prefix cache does not know what to keep"
            )
        return output

    def wrap(self, state: Tensor) -> Any:
        """Return a state as a block returns it."""
        return (state,) if self._tuple else state

    def state_shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of one example's state in a batch of so many tokens."""
        return (width, *self._shape[1:]) if self.by_token else tuple(self._shape)

    def ignores_padding(self, named: Named, mask: Tensor) -> bool | None:
        """Tell whether an example's states are the same, but for rounding, without padding and with other padding.

        The first half of the batch's longest example is run alone, and once more with the other half behind it as
        padding, so nothing is wider than the batch. None where no example has two tokens to tell by.
        """
        count, width = mask.shape
        row = int((mask != 0).sum(1).argmax())
        one, present = rows_of(named, [row], count), (mask[row] != 0).nonzero().flatten().tolist()
        if len(present) < 2:
            return None
        begin, end = present[0], present[len(present) // 2]
        short = {
            name: value[:, :end] if isinstance(value, Tensor) and value.shape[:2] == (1, width) else value
            for name, value in one.items()
        }
        long = {**one, "attention_mask": one["attention_mask"].clone()}
        long["attention_mask"][:, end:] = 0
        for name, value in one.items():
            is_tokens = isinstance(value, Tensor) and value.shape[:2] == (1, width) and name != "attention_mask"
            if is_tokens and begin:  # other padding on the left
                long[name] = value.clone()
                long[name][:, :begin] = value[:, begin : begin + 1]
        weights = {tensor.dtype for tensor in self._tensors.values() if tensor.is_floating_point()}
        exactly = torch.autocast(self.device.type, enabled=False) if weights == {torch.float32} else nullcontext()
        with exactly:  # autocast would round more than need be
            alone, beside = (self.run(x)[0, begin:end].float().flatten(1) for x in (short, long))
        rounding = max(torch.finfo(dtype).eps for dtype in (*weights, self.state_dtype)) ** 0.5
        return bool(((alone - beside).norm(dim=1) <= rounding * alone.norm(dim=1)).all())

    def check(self, masked: Mapping[str, Tensor]) -> None:
        """Refuse weights that have changed since the first forward, or have come to learn."""
        if any(tensor.requires_grad for tensor in self._tensors.values()):
            self.check_frozen(masked)
        if self._versions() != self._seen:
            raise FishError(
                "weights or buffers below the mask have changed since this cache was begun (loaded, moved or written), "
                "so its states are no longer theirs: make a new PrefixCache"
            )

    def check_frozen(self, masked: Mapping[str, Tensor]) -> None:
        """Refuse masked entries, and anything else that learns, in what runs below the mask."""
        learning = [name for name, tensor in self._tensors.items() if tensor.requires_grad or name in masked]
        # A parameter of the model itself, or of another module around the blocks, may be used anywhere.
        learning += [name for name in masked if f"{name.rpartition('.')[0]}.".removeprefix(".") in self._above]
        if learning:
            raise FishError(
                f"a prefix cache needs everything below {self._chain}.{self._lowest} frozen, but these learn: "
                f"{', '.join(dict.fromkeys(learning))}. Leave them out of the mask with exclude or a step_budget"
            )

    def identity(self) -> dict[str, Any]:
        """Return what the states depend on besides the examples."""
        hashes = {name: tensor_hash(tensor) for name, tensor in sorted(self._tensors.items())}
        config: Any = getattr(self._owner, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        settings = {name: value for name, value in settings.items() if name not in _OF_THE_HEAD}
        settings["attention"] = getattr(config, "_attn_implementation", None)
        return {
            "blocks": f"{self._chain}[:{self._lowest}]",
            "model": type(self._owner).__name__,
            "weights": _short(hashes),
            "config": _short(settings),
            "versions": {name: version(name) for name in ("torch", "transformers") if find_spec(name)},
        }

    def _versions(self) -> list[Any]:
        """Return what changes when a tensor below the mask is written or moved."""
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors.values()]


# What a config says of the head, of its labels and of where it comes from.
_OF_THE_HEAD = frozenset(
    ("_name_or_path", "architectures", "id2label", "label2id", "num_labels", "problem_type", "transformers_version")
)


def _short(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=KEY_BYTES).hexdigest()


def inputs_of(model: nn.Module, chain: str) -> nn.Module:
    """Return the part of a model whose inputs decide the states: without the head, for a model that names its base."""
    base = getattr(model, "base_model", None)
    blocks = model.get_submodule(chain)
    if isinstance(base, nn.Module) and any(module is blocks for module in base.modules()):
        return base
    return model


def _first(named: Named) -> Tensor:
    """Return the input that tells how many examples there are, and how many tokens."""
    for name in ("attention_mask", "input_ids", "inputs_embeds", *named):
        if isinstance(value := named.get(name), Tensor) and value.dim():
            return value
    raise FishError("a prefix cache needs a tensor among the model's inputs, whose first dimension is the examples")


def examples_in(named: Named) -> int:
    """Return the number of examples of a batch."""
    return _first(named).shape[0]


def tokens_in(named: Named) -> int:
    """Return the width of a batch, padding included; 0 if its inputs have none."""
    first = _first(named)
    return first.shape[1] if first.dim() > 1 else 0


def rows_of(named: Named, rows: list[int], count: int) -> dict[str, Any]:
    """Return the arguments for some of the examples."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
        for name, value in named.items()
    }
