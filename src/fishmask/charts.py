"""Charts of runs, as PNG and SVG: scores against a swept number, layers of the masks, learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fishmask.errors import FishError
from fishmask.records import Record, Result, identity, is_number, task_order
from fishmask.rows import method_rows, sweep_rows, text_of
from fishmask.tables import layer_groups, layer_shares

CAPTIONS = {
    "density": "Test score against density, mean and standard deviation over seeds",
    "examples": "Test score against the number of examples scored, mean and standard deviation over seeds",
    "layers": "Share of each mask's entries by layer, mean over tasks and seeds",
    "curves": "Validation score and training loss against the step, one line per seed, at the chosen settings",
}
INK = "#333333"  # text and axes; the HTML page replaces it by the colour of its text
_COLOURS = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd",
    "#2f7f6f", "#a03d7a",
)  # fmt: skip
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X<>"
_STYLE = {
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.fonttype": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "grid.alpha": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def write_charts(results: Sequence[Result], curves: Mapping[Any, Sequence[Record]], folder: Path) -> list[str]:
    """Write the charts that the results allow, each as PNG and SVG; the same results give the same bytes.

    Args:
        results: What ``select_settings`` returned.
        curves: The evaluations of runs by ``identity``; of the runs at the chosen settings, these are drawn.
        folder: An existing folder; charts of an earlier report in it are replaced or removed.

    Returns:
        The names, without suffix, of the charts written; all are keys of ``CAPTIONS``.

    Raises:
        FishError: matplotlib is not installed.
    """
    matplotlib = need_matplotlib()
    written = []
    for name in CAPTIONS:
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            if name == "layers":
                figure = _draw_layers(results)
            else:
                figure = _draw_curves(results, curves) if name == "curves" else _draw_sweep(results, name)
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
                path = (folder / name).with_suffix(suffix)
                path.unlink(missing_ok=True)
                if figure is not None:
                    figure.savefig(path, dpi=150, metadata=metadata)
        written += [name] if figure is not None else []
    return written


def need_matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        FishError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise FishError("a report draws charts and needs matplotlib: pip install 'fishmask[plot]'") from error
    return matplotlib


def _panels(count: int, across: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` axes of the given size in inches, so many across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(5.0, across * width), down * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)


def _draw_sweep(results: Sequence[Result], field: str) -> Any:
    """Draw one panel per task: score against a number of the recipe; None where it is not swept."""
    rows, values, tasks = sweep_rows(results, field)
    if not rows:
        return None
    values = [value for value in values if value is not None]
    levels = [row for row in method_rows(results) if field == "density" and row.first.density is None]
    figure, panels = _panels(len(tasks), 3, 3.6, 3.2 + 0.08 * len(rows))
    handles: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=True):
        for i, row in enumerate(rows):
            found = {value: summary for value in values if (summary := row.scores([task], value))}
            shift = 1.25 ** ((i + 0.5) / len(rows) - 0.5)  # a little apart, so that error bars do not hide each other
            places, means = [shift * value for value in found], [100 * summary.mean for summary in found.values()]
            spreads = [100 * (summary.spread or 0) for summary in found.values()]
            look = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
            handles[row.label] = axes.errorbar(places, means, yerr=spreads, capsize=3, **look)
        for i, row in enumerate(levels, len(rows)):
            if (level := row.scores([task])) is not None:
                look = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _LINES[1 + i % 3]}
                handles[row.label] = axes.axhline(100 * level.mean, **look)
        along = "entries trained" if field == "density" else "examples scored"
        axes.set(xscale="log", title=task, xlabel=along, ylabel="test score, %")
        axes.set_xticks(values, [text_of(value, field) for value in values])
        axes.minorticks_off()
    _legend(figure, handles)
    return figure


def _draw_layers(results: Sequence[Result]) -> Any:
    """Draw one bar per method, stacked by layer; None without masks."""
    from matplotlib import colormaps

    bars = {row.label: layer_shares(row.results.values()) for row in method_rows(results)}
    bars = {name: shares for name, shares in bars.items() if shares}
    if not bars:
        return None
    figure, (axes,) = _panels(1, 1, 9.0, 1.6 + 0.36 * len(bars))
    outside = {"embeddings": "#b07aa1", "pooler": "#999999", "head": "#cccccc"}
    groups = layer_groups(results)
    inside = [group for group in groups if group not in outside]
    colours = {g: colormaps["viridis"](i / max(len(inside) - 1, 1)) for i, g in enumerate(inside)} | outside
    left = [0.0] * len(bars)
    handles = {}
    for group in groups:
        widths = [100 * shares.get(group, 0.0) for shares in bars.values()]
        handles[group] = axes.barh(range(len(bars)), widths, left=left, color=colours[group], height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set(xlim=(0, 100), ylim=(len(bars) - 0.5, -0.5), xlabel="share of the mask, %")
    axes.grid(visible=False)
    figure.legend(list(handles.values()), list(handles), loc="outside right center")
    return figure


def _draw_curves(results: Sequence[Result], curves: Mapping[Any, Sequence[Record]]) -> Any:
    """Draw validation score and training loss of each task against the step; None without logs."""
    from matplotlib.ticker import MaxNLocator

    logs = [
        (result.task, row.label, i, curves[identity(record)])
        for i, row in enumerate(method_rows(results))
        for result in row.results.values()
        for record in result.records
        if curves.get(identity(record))
    ]
    if not logs:
        return None
    tasks = sorted({log[0] for log in logs}, key=task_order)
    figure, panels = _panels(2 * len(tasks), 2, 5.0, 2.8)
    handles: dict[str, Any] = {}
    for task, label, nth, points in logs:
        # Logs of other programs may lack the task's score; then the metric that says most by itself.
        score = next((name for name in ("score", "accuracy", "pearson", "mcc") if name in points[-1]), "score")
        for i, (name, factor) in enumerate(((score, 100), ("train_loss", 1))):
            shown = [(point["step"], factor * point[name]) for point in points if is_number(point.get(name))]
            look = {"color": _COLOURS[nth % len(_COLOURS)], "linestyle": _LINES[nth // len(_COLOURS) % len(_LINES)]}
            axes = panels[2 * tasks.index(task) + i]
            (handles[label],) = axes.plot([x for x, _ in shown], [y for _, y in shown], marker=".", **look)
            axes.set(title=task, xlabel="step", ylabel="training loss" if i else f"validation {name}, %")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _legend(figure, handles)
    return figure
