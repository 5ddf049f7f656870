"""The command ``fishmask costs``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fishmask.cli_mask import Json, device_named
from fishmask.console import print_json, print_table, working


def costs(
    device: Annotated[str, typer.Option(help="Whose costs: cpu, cuda; auto means the GPU when there is one.")] = "auto",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure them now, and choose plans by them.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Go back to the built-in ones.")] = False,
    model: Annotated[str | None, typer.Option(help="With --mask: a model, whose weights are not loaded.")] = None,
    mask: Annotated[Path | None, typer.Option(help="With --model: tell which way each layer takes.")] = None,
    json: Json = False,
) -> None:
    """Show what the steps of a training plan cost on a device, and which way each layer takes.

    Example: fishmask costs --model bert-base-uncased --mask mask.safetensors
    """
    import torch

    from fishmask.calibrate import calibrate as measure
    from fishmask.costs import built_in, costs_for, path_for, store
    from fishmask.costs import forget as remove

    if calibrate and forget:
        raise ValueError("--calibrate and --forget are opposites: give one of them")
    if (model is None) != (mask is None):
        raise ValueError("--model and --mask go together: give both or none")
    place = torch.device(device_named(device))
    if calibrate:
        with working("measuring"):
            store(measure(place), place)
    elif forget:
        remove(place)
    found, path = costs_for(place), path_for(place)
    result: dict[str, Any] = {"device": str(place), "file": str(path) if path.exists() else None}
    result["nanoseconds_per_token"] = asdict(found)
    if model is not None and mask is not None:
        result["layers"] = _layers(model, mask, place)
    if json:
        print_json(result)
        return
    title = f"Costs on {place}, {'measured' if result['file'] else 'built in'}"
    plain = asdict(built_in(place))
    rows = [[name, _figure(cost), _figure(plain[name])] for name, cost in asdict(found).items()]
    print_table(title, ["ns per token", "cost", "built in"], rows, result["file"] or "")
    if "layers" in result:
        _print_layers(result["layers"])


def _layers(model: str, mask: Path, place: Any) -> list[dict[str, Any]]:
    from fishmask.costs import planned_for
    from fishmask.explain import explain
    from fishmask.hub import without_weights
    from fishmask.run import read_mask

    with planned_for(place):
        return [asdict(way) for way in explain(without_weights(model), read_mask(mask))]


def _print_layers(layers: list[dict[str, Any]]) -> None:
    """Print the ways of weights; biases and norms are summed, whatever their entries."""
    rows = []
    for layer in layers:
        costs = dict(sorted(layer["costs"].items(), key=lambda item: item[1]))
        others = [f"{way} {cost:,.0f}" for way, cost in costs.items() if way != layer["kind"]]
        chosen = f"{costs[layer['kind']]:,.0f}" if costs else ""
        if layer["kind"] != "sum":
            rows.append([layer["name"], layer["entries"], layer["kind"], layer["layout"], chosen, ", ".join(others)])
    columns = ["parameter", "entries", "way", "of", "ns", "instead"]
    print_table("The way of each weight", columns, rows, "ns: what a token is thought to cost, and other ways instead")


def _figure(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.3g}"
