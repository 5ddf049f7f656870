"""What tells a model or a loss from another of the same name: configuration, and code with all that it refers to."""

import dis
import functools
import hashlib
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fishmask.errors import FishError
from fishmask.fingerprint import tensor_hash

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.Size)
_TOLD_BY_MODULES = (*_PLAIN, types.FunctionType, types.BuiltinFunctionType, functools.partial)
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # where a configuration was found, and who wrote it
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return SHA-256 (hex) over names and contents of tensors, in their order."""
    sha = hashlib.sha256()
    for name, tensor in named:
        sha.update(f"{name}\t{tensor_hash(tensor)}\n".encode())
    return sha.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return SHA-256 (hex) over names and contents of a model's parameters and buffers."""
    return tensors_digest((*model.named_parameters(), *model.named_buffers()))


def structure_digest(model: nn.Module) -> str:
    """Return SHA-256 (hex) over what a model is made of besides its weights.

    That are the classes of its modules, what they print of themselves, and their configurations where they have one.
    What a module keeps in attributes of its own without printing it is not seen.
    """
    lines = [f"{name}\t{type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()]
    lines.append(_ADDRESS.sub("", repr(model)))
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            found[id(config)] = config
    for config in found.values():
        facts = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
        lines.append(_ADDRESS.sub("", json.dumps(facts, sort_keys=True, default=str)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def loss_digest(loss: Callable[..., Any]) -> str:
    """Return SHA-256 (hex) over a loss: its code, its defaults, what it is bound to and what it refers to.

    Functions and globals of the loss's own module are followed; those of others, which are libraries, are known by
    name.

    Args:
        loss: A function, a method, a `functools.partial`, or an object with ``__call__``.

    Raises:
        FishError: Something that it holds has no content that could be compared, such as an open file.
    """
    sha = hashlib.sha256()
    try:
        for line in _lines(loss, "loss", getattr(_function(loss), "__module__", None), {}):
            sha.update(f"{line}\n".encode())
    except _Unknown as reason:
        raise FishError(
            f"the loss cannot be told from another one, so it cannot be scored with a folder: {reason}; write it as a "
            "function that uses numbers, texts, tensors, modules and other functions only, or leave out folder="
        ) from None
    return sha.hexdigest()


class _Unknown(Exception):
    """There is no telling what a value is."""


def _function(value: Any) -> Any:
    """Return the function or the class whose module is the loss's own."""
    while isinstance(value, functools.partial):
        value = value.func
    return value


def _lines(value: Any, place: str, home: str | None, seen: dict[int, tuple[int, Any]]) -> Iterator[str]:
    """Describe a value line by line; ``seen`` numbers what was described before and keeps it alive."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}"
        return
    if not isinstance(value, tuple):  # equal ones may be one object here and two there
        seen[id(value)] = len(seen), value
    again = functools.partial(_lines, home=home, seen=seen)
    if isinstance(value, Tensor):
        yield f"tensor {tensor_hash(value)}"
    elif isinstance(value, nn.Module):
        yield f"module {structure_digest(value)} {weights_digest(value)}"
        for module in value.modules():
            yield from again(type(module), place)
            for name, held in sorted(vars(module).items()):  # a `CrossEntropyLoss` does not print its options
                if name != "training" and not name.startswith("_") and isinstance(held, _TOLD_BY_MODULES):
                    yield name
                    yield from again(held, f"{place}.{name}")
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"array {value.dtype.str} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        yield f"{type(value).__name__} {value.__name__}"
    elif isinstance(value, types.FunctionType):
        yield from _function_lines(value, place, home, seen)
    elif isinstance(value, types.MethodType):
        yield from again(value.__func__, place)
        yield from again(value.__self__, f"{place}'s object")
    elif isinstance(value, functools.partial):
        yield "partial"
        for part in (value.func, value.args, value.keywords):
            yield from again(part, f"{place}'s arguments")
    elif isinstance(value, type):
        yield f"class {value.__module__}.{value.__qualname__}"
        if value.__module__ == home:
            yield from again(value.__bases__, place)
            for name, member in sorted(vars(value).items()):
                if isinstance(member, staticmethod | classmethod):
                    member = member.__func__
                if isinstance(member, (types.FunctionType, *_PLAIN)) and name not in ("__doc__", "__firstlineno__"):
                    yield name
                    yield from again(member, f"{place}.{name}")
    elif isinstance(value, tuple | list):
        yield f"{type(value).__qualname__} {len(value)}"
        for item in value:
            yield from again(item, place)
    elif isinstance(value, Mapping):
        yield f"{type(value).__qualname__} {len(value)}"
        for key, item in value.items():
            yield from again(key, place)
            yield from again(item, f"{place}[{key!r}]")
    elif isinstance(value, set | frozenset) and all(isinstance(item, _PLAIN) for item in value):
        yield f"{type(value).__name__} {sorted(map(repr, value))}"
    elif hasattr(value, "__dict__") and not _made_in_c(type(value)):
        yield "object"
        yield from again(type(value), place)
        yield from again(vars(value), place)
    else:
        raise _Unknown(f"{place} holds a {type(value).__qualname__}")


def _function_lines(
    function: types.FunctionType, place: str, home: str | None, seen: dict[int, tuple[int, Any]]
) -> Iterator[str]:
    """Describe a function; one of a library is known by its name."""
    if function.__module__ != home:
        yield f"function {function.__module__}.{function.__qualname__}"
        if function.__closure__ is None:  # one made by a library's factory is more than its name
            return
    again = functools.partial(_lines, home=home, seen=seen)
    yield "function"
    names: list[str] = []
    yield from _code_lines(function.__code__, names)
    yield from again(function.__defaults__, f"{place}'s defaults")
    yield from again(function.__kwdefaults__, f"{place}'s defaults")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held = cell.cell_contents
        except ValueError:  # not assigned yet
            held = None
        yield from again(held, f"{name} in {place}")
    if function.__module__ == home:
        for name in sorted({name for name in names if name in function.__globals__}):
            yield name
            yield from again(function.__globals__[name], f"{name} in {place}")


def _code_lines(code: types.CodeType, names: list[str]) -> Iterator[str]:
    """Describe code, whatever line it is on, and collect the names that it uses."""
    names += [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    yield f"code {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_argcount}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_lines(constant, names)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _made_in_c(kind: type) -> bool:
    """Whether objects of a class hold more than Python can see."""
    return kind.__basicsize__ > object.__basicsize__ + 16  # two pointers: attributes and weak references
