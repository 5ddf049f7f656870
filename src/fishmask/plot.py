"""A picture of a mask: which layers it chose, and what kinds of parameters."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fishmask.errors import FishError
from fishmask.mask import Mask

_NORM = r"norm|\bln_|\bbn\d"
# The first kind whose words occur in the parts of a parameter's name wins; the order is the order of the columns.
_KINDS: tuple[tuple[str, str], ...] = (
    ("embedding", r"embed|wte|wpe|shared\b"),
    ("query", r"\b(query|q_proj|q_lin|q)\b"),
    ("key", r"\b(key|k_proj|k_lin|k)\b"),
    ("value", r"\b(value|v_proj|v_lin|v)\b"),
    ("q, k, v together", r"c_attn|in_proj|qkv|query_key_value"),
    ("attention out", r"(attention|attn|self_attn)\.(output\.dense|dense|c_proj|o_proj|out_lin|out_proj|proj|to_out)"),
    ("FFN in", r"intermediate|c_fc|fc1|linear1|up_proj|gate_proj|ffn\.lin1|mlp\.0|\bwi\b|wi_\d"),
    ("FFN out", r"output\.dense|mlp\.c_proj|fc2|linear2|down_proj|ffn\.lin2|mlp\.\d|\bwo\b"),
    ("convolution", r"conv"),
)
_COLUMNS = (*(kind for kind, _ in _KINDS), "norm", "bias", "other weight")


def rows_of(names: Iterable[str]) -> dict[str, str]:
    """Return the row of each parameter: the path of its numbered layer, or of the outermost module that has none."""
    names = list(names)
    first = Counter(name.partition(".")[0] for name in names)
    # The body of a transformers model sits under one name ("bert", "model"), which says nothing.
    body = next((part for part, count in first.items() if count > 0.8 * len(names)), "")
    bare = {name: name.removeprefix(f"{body}.") if body and not body.isdigit() else name for name in names}
    return {name: _row(path.split(".")[:-1] or [path]) for name, path in bare.items()}


def _row(modules: list[str]) -> str:
    numbered = next((i for i, part in enumerate(modules) if part.isdigit()), 0)
    return ".".join(modules[: numbered + 1])


def kind_of(name: str, dimensions: int) -> str:
    """Return the column of a parameter: what kind it is, by its name, else by its shape."""
    if name.rpartition(".")[2].endswith("bias") and not _matches(_NORM, name):
        return "bias"
    if dimensions == 1 or _matches(_NORM, name):
        return "norm"
    if dimensions >= 4:
        return "convolution"
    return next((kind for kind, words in _KINDS if _matches(words, name)), "other weight")


def _matches(words: str, name: str) -> bool:
    return re.search(words, name, re.IGNORECASE) is not None


def plot_mask(mask: Mask, path: str | Path, title: str = "") -> None:
    """Draw how dense a mask is in every layer and kind of parameter, and how the entries are shared out.

    Rows are layers in the model's order, columns are kinds of parameters; the colour is the share of those entries that
    the mask chose, on a logarithmic scale. The bars on the right show each row's share of all chosen entries.

    Args:
        mask: A mask that knows the model's shapes.
        path: The picture; its suffix (.png, .svg, .pdf) decides the format.
        title: A line above the picture; by default the number of entries.

    Raises:
        ValueError: The suffix is none of these.
        FishError: matplotlib is not installed, or the mask knows no shapes.

    Example:
        >>> plot_mask(mask, "mask.png")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a picture ends in .png, .svg or .pdf")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FishError("drawing needs matplotlib: pip install 'fishmask[plot]'") from error
    title = title or f"{mask.k:,} of {mask.n:,} entries chosen ({mask.density:.3%})"
    chosen, sizes = _count(mask)
    rows = list(dict.fromkeys(row for row, _ in sizes))
    columns = [kind for kind in _COLUMNS if any(c == kind for _, c in sizes)]
    figure = Figure(figsize=(2.6 + 0.95 * len(columns) + 3, 1.9 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid, bars = figure.subplots(1, 2, width_ratios=[0.95 * len(columns) + 1, 2.6], sharey=True)
    _draw_grid(figure, grid, rows, columns, chosen, sizes)
    _draw_bars(bars, rows, chosen, mask.k)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _count(mask: Mask) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Count the chosen entries and all entries of every cell."""
    chosen: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    rows = rows_of(mask.shapes)
    for name, shape in mask.shapes.items():
        cell = rows[name], kind_of(name, len(shape))
        sizes[cell] += shape.numel()
        chosen[cell] += len(mask.indices.get(name, ()))
    return chosen, sizes


def _draw_grid(figure: Any, axes: Any, rows: list[str], columns: list[str], chosen: Any, sizes: Any) -> None:
    """Draw the cells: white where the model has no such parameter, grey where nothing was chosen."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    density = np.full((len(rows), len(columns)), np.nan)
    for (row, column), size in sizes.items():
        density[rows.index(row), columns.index(column)] = chosen[row, column] / size
    positive = density[density > 0]
    # Two decades at least, so that an even mask does not look uneven.
    low = min(positive.min(), positive.max() / 100) if positive.size else 1e-4
    norm = LogNorm(low, max(positive.max(initial=low), low * 10))
    axes.imshow(np.where(np.isnan(density), np.nan, 1), cmap="Greys", vmin=0, vmax=8, aspect="auto")
    image = axes.imshow(np.where(density > 0, density, np.nan), cmap="viridis", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(density):
        if not np.isnan(value):
            dark = value > 0 and norm(value) < 0.55
            axes.text(j, i, _percent(value), ha="center", va="center", size=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, shrink=0.8, format=FuncFormatter(_tick))
    bar.minorticks_off()
    bar.set_label("share of the entries that the mask chose")


def _draw_bars(axes: Any, rows: list[str], chosen: Any, k: int) -> None:
    shares = [sum(count for (row, _), count in chosen.items() if row == name) / max(k, 1) for name in rows]
    axes.barh(range(len(rows)), shares, color="#4c72b0", height=0.7)
    for i, share in enumerate(shares):
        axes.text(share, i, f" {share:.1%}", va="center", size=8)
    axes.set_xlim(0, max(shares, default=1) * 1.3 or 1)
    axes.set_title("share of the mask", fontsize=10)
    axes.set_xticks([])
    axes.tick_params(which="both", length=0, labelleft=False)
    axes.spines[:].set_visible(False)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%" if share else "–"


def _tick(value: float, _: int) -> str:
    return f"{100 * value:g}%"
