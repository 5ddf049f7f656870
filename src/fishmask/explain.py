"""Which way each layer of a model takes to its masked entries, and what each way is thought to cost."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from fishmask.fitting import fit
from fishmask.mask import Mask
from fishmask.params import placed
from fishmask.parts import Block, Sampled
from fishmask.plans import ConvolutionPlan, LookupPlan, ProductPlan
from fishmask.quantized import packed, weights
from fishmask.sites import Entry, site_for

DENSE = "dense"  # the general path: autograd makes the whole gradient


@dataclass(frozen=True)
class Way:
    """How the gradient of one parameter's entries is found.

    Attributes:
        name: The parameter.
        entries: How many of its entries are masked.
        kind: "block", "sampled", "split" or "tiles" for products; "convolution" and "lookup"; "sum" for biases and
            norms; "dense" where autograd makes the whole gradient.
        layout: Rows and columns of what is multiplied, or what else there is to say.
        costs: For products: what each way that there is would cost, in nanoseconds per token. The least is chosen,
            save that a split must save a tenth.
        nbytes: Bytes of the indices that the plan holds.
    """

    name: str
    entries: int
    kind: str
    layout: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0


def explain(model: nn.Module, mask: Mask) -> list[Way]:
    """Tell which way each layer takes to its masked entries, as `fishmask.attach` would.

    Args:
        model: The model; nothing about it changes. On the meta device the plans are those of the device that
            `fishmask.costs.planned_for` names.
        mask: The mask.

    Returns:
        One way per masked parameter, in the order of the model's modules. A parameter that turns out to be used
        outside its own module is moved to the general path by the first forwards, which cannot be seen beforehand.

    Raises:
        ValueError: The mask does not fit the model.
    """
    parameters = weights(model)
    fitting = fit(mask, model, parameters)
    names = {id(packed(parameters[name])): name for name in fitting.indices}
    ways: dict[str, Way] = {}
    for module in model.modules():
        owned = {attribute: names[id(p)] for attribute, p in module._parameters.items() if id(p) in names}
        if not owned:
            continue
        entries = {}
        for attribute, name in owned.items():
            flat, p = fitting.indices[name], parameters[name]
            entries[attribute] = Entry(p, flat, placed(flat, p), nn.Parameter(torch.zeros(len(flat))))
        site = site_for(module, entries)
        for attribute, name in owned.items():
            plan = getattr(site, "plan", None) if attribute == "weight" else None
            ways[name] = _way(name, len(fitting.indices[name]), plan, known=site is not None)
    return list(ways.values())


def _way(name: str, entries: int, plan: object, *, known: bool) -> Way:
    if isinstance(plan, ProductPlan):
        parts = " + ".join(_told(part) for part in plan.parts)
        layout = parts if plan.tiles is None else f"{len(plan.tiles.rows)} tiles"
        costs = {str(way): cost for way, cost in plan.costs.items() if math.isfinite(cost)}
        return Way(name, entries, plan.kind, layout, costs, plan.nbytes)
    if isinstance(plan, ConvolutionPlan):
        return Way(name, entries, "convolution", " × ".join(map(str, plan.shape)), {}, plan.nbytes)
    if isinstance(plan, LookupPlan):
        return Way(name, entries, "lookup", f"{plan.n_rows} rows", {}, plan.nbytes)
    return Way(name, entries, "sum" if known else DENSE)


def _told(part: Block | Sampled) -> str:
    size = f"{part.n_rows} × {part.n_columns}"
    if isinstance(part, Sampled):
        return f"{len(part.column_at)} of {size}"
    return size if len(part.pieces) == 1 else f"{size} in {len(part.pieces)} pieces"
