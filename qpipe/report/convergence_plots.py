"""Figures of the report's section on convergence; each takes results by the name of their run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qpipe.report.plots import DASHES, GRID, SERIES, inline_svg, literal, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 3
"""Metrics that are drawn."""
NAMED = 16
"""Tokens that an axis can name."""

Runs = Mapping[str, Any]
NONE: Mapping[str, Any] = {"mse": []}
"""What an older version has measured of a kind of tensor that it did not know."""


def line(number: int) -> dict[str, Any]:
    """Colour and dashes of the run of that number."""
    return {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[number // len(SERIES) % len(DASHES)]}


def _named(figure: Figure, panel: Axes, runs: Runs) -> None:
    if len(runs) > 1:
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _positive(panel: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > 30:
        panel.set_yscale("log")


@styled
def curves(runs: Runs) -> str:
    """Metrics at evaluations and the training loss, over optimizer steps."""
    names = list(dict.fromkeys(name for found in runs.values() for name in found["evaluation"]))[:PANELS]
    drawn = [*(("evaluation", name) for name in names), ("training", "loss")]
    figure, axes = new_figure(2.6 * len(drawn), 2.6, 1, len(drawn))
    for panel, (kind, name) in zip(axes, drawn, strict=True):
        values = []
        for number, (run, found) in enumerate(runs.items()):
            points = found[kind].get(name, [])
            values += [p[1] for p in points]
            marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) <= 12 else {}
            panel.plot([p[0] for p in points], [p[1] for p in points], label=literal(run, 40), **line(number), **marker)
        panel.set_title("training loss" if kind == "training" else literal(name, 30), loc="left")
        panel.set_xlabel("optimizer step")
        if kind == "training":
            _positive(panel, values)
    _named(figure, axes[0], runs)
    return inline_svg(figure, "convergence", "Metrics and training loss over optimizer steps")


@styled
def layer_errors(runs: Runs) -> str:
    """Squared error to the teacher by layer: hidden states, attention outputs before and after residual and norm."""
    from matplotlib.ticker import MaxNLocator

    shown = [
        ("hidden_states", "hidden states", 0),
        ("attention_output", "attention outputs", 1),
        ("ffn_input", "with residual and norm", 1),
    ]
    errors_of = {kind: {run: found.get(kind, NONE)["mse"] for run, found in runs.items()} for kind, _, _ in shown}
    shown = [entry for entry in shown if any(errors_of[entry[0]].values())]
    figure, axes = new_figure(3.6 * len(shown), 2.6, 1, len(shown))
    for panel, (kind, title, first) in zip(axes, shown, strict=True):
        for number, (run, errors) in enumerate(errors_of[kind].items()):
            panel.plot(range(first, first + len(errors)), errors, "o", markersize=4, label=literal(run, 40),
                       **line(number))  # fmt: skip
        _positive(panel, [value for errors in errors_of[kind].values() for value in errors])
        panel.set_title(title, loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("layer")
        panel.set_ylabel("mean squared error")
    _named(figure, axes[0], runs)
    return inline_svg(figure, "layer-errors", "Squared error to the teacher by layer")


@styled
def ranking_losses(runs: Runs) -> str:
    """Ranking loss of every head, layer after layer."""
    figure, (panel,) = new_figure(7.2, 2.6)
    values = []
    for number, (run, found) in enumerate(runs.items()):
        losses = [value for layer in found["loss"] for value in layer]
        values += losses
        panel.plot(range(len(losses)), losses, "o", markersize=3, label=literal(run, 40), color=line(number)["color"])
    at = 0
    ticks = {}
    for layer, heads in enumerate(next(iter(runs.values()))["loss"], 1):
        ticks[at] = str(layer)
        at += len(heads)
        panel.axvline(at - 0.5, color=GRID, linewidth=0.6)
    panel.grid(visible=False, axis="x")
    panel.set_xticks(list(ticks), list(ticks.values()), ha="left")
    _positive(panel, values)
    panel.set_xlabel("layer, and its heads")
    panel.set_ylabel("ranking loss")
    _named(figure, panel, runs)
    return inline_svg(figure, "ranking", "Ranking loss of every attention head")


@styled
def attention_beside_teacher(runs: Runs, heads: Sequence[tuple[int, int]]) -> str:
    """Attention maps of one example: the teacher's, then each run's; a row for each head."""
    first = next(iter(runs.values()))
    columns = [("teacher", first["teacher_maps"]), *((run, found["maps"]) for run, found in runs.items())]
    figure, axes = new_figure(max(3.6, 1.9 * len(columns)), 0.3 + 1.9 * len(heads), len(heads), len(columns))
    tokens = first["tokens"]
    for index, panel in enumerate(axes):
        row, column = divmod(index, len(columns))
        layer, head = heads[row]
        name, maps = columns[column]
        top = max(value for line_ in first["teacher_maps"][layer][head] for value in line_)
        panel.pcolormesh(np.array(maps[layer][head]), cmap="Blues", vmin=0, vmax=top)
        panel.invert_yaxis()
        panel.grid(visible=False)
        panel.set_xticks([])
        panel.set_yticks([])
        if row == 0:
            panel.set_title(literal(name, 24), loc="left")
        if column == 0:
            panel.set_ylabel(f"layer {layer + 1}, head {head + 1}")
            if 0 < len(tokens) <= NAMED:
                panel.set_yticks([i + 0.5 for i in range(len(tokens))], [literal(t, 10) for t in tokens], fontsize=6)
        if row == len(heads) - 1 and 0 < len(tokens) <= NAMED:
            places = [i + 0.5 for i in range(len(tokens))]
            panel.set_xticks(places, [literal(t, 10) for t in tokens], rotation=90, fontsize=6)
    return inline_svg(figure, "maps", "Attention maps of the teacher and of each run")


@styled
def eigenvalues(runs: Runs) -> str:
    """Density of the Hessian's largest eigenvalues over batches, negative and positive ones, and each as a tick."""
    figure, axes = new_figure(7.2, 2.6, 1, 2)
    for panel, sign, title in zip(axes, (-1, 1), ("negative eigenvalues", "positive eigenvalues"), strict=True):
        met = 0
        for number, (run, found) in enumerate(runs.items()):
            every = np.array([entry["value"] for batch in found["batches"] for entry in batch])
            values = every[every * sign > 0]
            met += len(values)
            style = line(number)
            panel.plot(values, np.zeros(len(values)), "|", color=style["color"], markersize=9)
            x, density = _density(values)
            panel.plot(x, density * len(values) / len(every), label=literal(run, 40), **style)
        panel.set_title(title if met else f"no {title}", loc="left")
        panel.set_xlabel("eigenvalue")
    axes[0].set_ylabel("density")
    _named(figure, axes[0], runs)
    return inline_svg(figure, "eigenvalues", "Largest eigenvalues of the Hessian over batches")


def _density(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A kernel density estimate; nothing where there are too few values."""
    if len(set(values.tolist())) < 3:
        return np.array([]), np.array([])
    from scipy.stats import gaussian_kde

    margin = 0.2 * float(np.ptp(values))
    x = np.linspace(values.min() - margin, values.max() + margin, 120)
    return x, gaussian_kde(values)(x)


@styled
def landscapes(runs: Runs) -> str:
    """Loss above the model's on the plane, one panel for each run, all with the same colours and contours."""
    grids = {}
    for run, found in runs.items():
        losses = np.array(found["losses"], dtype=float)
        grids[run] = losses - losses[len(losses) // 2, len(losses) // 2]
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    levels = np.linspace(low, high if high > low else low + 1e-6, 12)
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    figure, axes = new_figure(0.8 + 2.5 * columns, 2.5 * rows, rows, columns)
    drawn: Any = None
    for panel, (run, grid) in zip(axes, grids.items(), strict=False):
        places = runs[run]["offsets"]
        drawn = panel.contourf(places, places, np.ma.masked_invalid(grid.T), levels, cmap="Blues")
        panel.contour(places, places, np.ma.masked_invalid(grid.T), levels, colors=GRID, linewidths=0.6)
        panel.grid(visible=False)
        panel.set_aspect("equal")
        panel.set_title(literal(run, 30), loc="left")
    for panel in axes[len(grids) :]:
        panel.set_axis_off()
    figure.colorbar(drawn, ax=axes, label="loss above the model's")
    return inline_svg(figure, "landscape", "Loss on a plane through the weights of each run")
