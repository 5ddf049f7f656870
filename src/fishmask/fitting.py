"""Whether a mask can be attached to a model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishmask.mask import Mask
from fishmask.params import aliases
from fishmask.quantized import QuantizedWeight, foreign

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fit(mask: Mask, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Mask:
    """Return ``mask`` under canonical names and with the model's shapes, or raise with everything that is wrong."""
    if mask.k == 0:
        raise ValueError("the mask has no entries, so there is nothing to train")
    canonical = aliases(model)
    shapes_only = all(p.is_meta for p in parameters.values())  # to be run without data, which tells sizes
    faults = []
    for name, indices in mask.indices.items():
        p = parameters.get(canonical.get(name, ""))
        if p is None:
            other = foreign(dict(model.named_modules()).get(name.rpartition(".")[0]))
            faults.append(f"{name}: {other or 'the model has no such parameter'}")
        elif isinstance(p, QuantizedWeight) and (reason := p.unfit()) is not None:
            faults.append(f"{name}: {reason}")
        elif name in mask.shapes and tuple(mask.shapes[name]) != tuple(p.shape):
            faults.append(f"{name}: shape {tuple(mask.shapes[name])} in the mask, {tuple(p.shape)} in the model")
        elif int(indices[-1]) >= p.numel():
            faults.append(f"{name}: index {int(indices[-1])} in the mask, {p.numel()} entries in the model")
        elif p.dtype not in _DTYPES or (p.is_meta and not shapes_only) or p.is_inference():
            made = " made in inference mode" if p.is_inference() else ""
            faults.append(f"{name}: {p.dtype} on {p.device}{made}; must be float32, bfloat16 or float16, in memory")
    faults += [
        f"{path}: max_norm rewrites the embedding's rows in each forward, so entries outside the mask would move"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    empty = [name for name, p in parameters.items() if p.is_meta and not shapes_only and name not in mask.indices]
    if empty:
        faults.append(
            f"{', '.join(empty[:3])}{' and more' if len(empty) > 3 else ''}: on the meta device, not in memory"
        )
    if faults:
        raise ValueError("the mask does not fit the model: " + "; ".join(faults))
    chosen: dict[str, Tensor] = {}
    for name, indices in mask.indices.items():  # the same memory, save where a tied parameter goes by two names
        known = chosen.get(canonical[name])
        chosen[canonical[name]] = indices if known is None else torch.cat([known, indices]).unique()
    fitting = Mask(chosen, {name: p.shape for name, p in parameters.items()})
    devices = {parameters[name].device for name in fitting.indices}
    if len(devices) > 1:
        raise ValueError(f"the masked weights are on several devices ({', '.join(map(str, devices))}); put them on one")
    return fitting
