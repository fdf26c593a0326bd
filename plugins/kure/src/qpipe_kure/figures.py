"""Figures 1 to 3 of Shkolnik et al. (NeurIPS 2020) as inline SVG.

1, 2 and 3 (c) are drawn from the formulas in `qpipe_kure.sensitivity`; 3 (a) and (b), which are measurements, from what
runs have left.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qpipe_kure import sensitivity as s

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BITS = 4
SAMPLES = 10_000
SPREAD = 3**0.5
"""Half width of the uniform distribution with variance 1."""
INK = "#a1b2c1"
"""Stands in for the colour of the page's text, which matplotlib cannot name."""
COLOURS = ("#2f6fab", "#b0413e", "#34845a", "#8d7210")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qpipe-kure",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "backend": "agg",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def _svg(draw: Any, name: str, label: str, width: float, height: float, columns: int = 1) -> str:
    """Draw into panels and return SVG for a page: no prolog, namespaces or metadata, ids made unique by `name`."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    defaults: Any = matplotlib.rcParamsDefault
    with matplotlib.rc_context({**defaults, **STYLE}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>kure-{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", text, count=1)
    style = f'role="img" aria-label="{label}" style="width:{72 * width:.0f}pt;max-width:100%;height:auto"'
    return text.replace("<svg", f"<svg {style}", 1).replace(INK, "currentColor").strip()


def error_and_curvature() -> str:
    """Figure 1: simulated and analytic error over the step, and the second derivative, for both distributions."""
    generator = np.random.default_rng(0)
    normal = partial(s.mse_normal, bits=BITS)
    uniform, bend = partial(s.mse_uniform, bits=BITS, a=SPREAD), partial(s.curvature_uniform, bits=BITS, a=SPREAD)
    wide, flat = generator.normal(size=SAMPLES), generator.uniform(-SPREAD, SPREAD, SAMPLES)
    cases: tuple[tuple[str, s.Error, s.Error, s.Array, float], ...] = (
        ("normal", normal, partial(s.curvature_normal, bits=BITS), wide, s.best_step(normal, 1.0)),
        ("uniform", uniform, bend, flat, s.best_step_uniform(BITS, SPREAD)),
    )

    def draw(*panels: Axes) -> None:
        for panel, (title, error, curvature, samples, best) in zip(panels, cases, strict=True):
            steps = np.linspace(0.05, 0.6, 221)
            panel.plot(steps[::8], s.simulate(samples, steps[::8], BITS), ".", color=COLOURS[3], label="simulation")
            panel.plot(steps, error(steps), color=COLOURS[0], label="error")
            panel.axvline(best, color=INK, linestyle=":", linewidth=0.8)
            panel.set(title=title, xlabel="step size", ylabel="mean squared error", ylim=(0, 0.2))
            other = panel.twinx()
            values = np.abs(curvature(steps))
            other.plot(steps, values, color=COLOURS[1], linestyle="--", label="second derivative")
            other.set(ylabel="|second derivative|", ylim=(0, 80))
            handles = [a.get_legend_handles_labels() for a in (panel, other)]
            panel.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper right")

    return _svg(draw, "curvature", "error and its second derivative over the step size", 8, 3, 2)


def least_error() -> str:
    """Figure 2: the error at the best step over the bits, for distributions of variance 1."""
    bits = np.arange(2, 9)
    normal = [float(e(s.best_step(e, 2.0 ** (4 - b)))) for b in bits for e in [partial(s.mse_normal, bits=int(b))]]
    uniform = [float(s.mse_uniform(s.best_step_uniform(int(b), SPREAD), int(b), SPREAD)) for b in bits]

    def draw(panel: Axes) -> None:
        panel.semilogy(bits, normal, "o-", color=COLOURS[0], markersize=3, label="normal")
        panel.semilogy(bits, uniform, "s-", color=COLOURS[1], markersize=3, label="uniform")
        panel.set(xlabel="bits", ylabel="smallest mean squared error")
        panel.legend()

    return _svg(draw, "least", "smallest error over the bits", 4, 2.6)


def standardized(histogram: Mapping[str, Any]) -> tuple[s.Array, s.Array]:
    """Density and edges of a histogram in units of its deviation about its mean, so that its variance is 1.

    Args:
        histogram: `edges` and `counts`; the density is constant within a bin.
    """
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"], dtype=np.float64)
    share, low, high = counts / counts.sum(), edges[:-1], edges[1:]
    mean = float((share * (low + high) / 2).sum())
    second = float((share * (low**2 + low * high + high**2) / 3).sum())
    unit = (edges - mean) / (second - mean**2) ** 0.5
    return share / np.diff(unit), unit


def distributions(weights: Mapping[str, Mapping[str, Any]]) -> str:
    """Figure 3a: how the weights of one layer are distributed in several runs, over a uniform and a normal density.

    Args:
        weights: histograms (`edges`, `counts`) by label.
    """
    x = np.linspace(-4, 4, 401)

    def draw(panel: Axes) -> None:
        panel.plot(x, np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5, color=COLOURS[0], label="normal")
        panel.plot([-SPREAD, -SPREAD, SPREAD, SPREAD], [0, *[0.5 / SPREAD] * 2, 0], color=COLOURS[1], label="uniform")
        for number, (label, histogram) in enumerate(weights.items(), 2):
            density, edges = standardized(histogram)
            panel.stairs(density, edges, color=COLOURS[number % len(COLOURS)], linestyle="--", label=label)
        panel.set(xlabel="weight / standard deviation", ylabel="density", xlim=(-4, 4), ylim=(0, None))
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return _svg(draw, "distribution", "distribution of the weights of one layer", 7, 3)


def metric_over_bits(metric: str, runs: Mapping[str, Mapping[int, float]]) -> str:
    """Figure 3b: a metric over the bits of the weights, for runs with several targets.

    Args:
        metric: its name.
        runs: values by bits, by label.
    """

    def draw(panel: Axes) -> None:
        for number, (label, values) in enumerate(runs.items()):
            bits = sorted(values)
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(bits, [values[b] for b in bits], "o-", color=colour, markersize=3, label=label)
        panel.set(xlabel="bits", ylabel=metric, xticks=sorted({b for values in runs.values() for b in values}))
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return _svg(draw, "bits", "metric over the bits of the weights", 7, 3)


def sensitivity_curves(weights: Mapping[str, Mapping[str, Any]]) -> str:
    """Figure 3c: error added by a wrong step, for both distributions and for weights of the run, in their variances.

    Args:
        weights: histograms (`edges`, `counts`) by label.
    """
    curves: dict[str, tuple[s.Error, float]] = {
        "normal": (partial(s.mse_normal, bits=BITS), 1.0),
        "uniform": (partial(s.mse_uniform, bits=BITS, a=SPREAD), 1.0),
    }
    for label, histogram in weights.items():
        edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"], dtype=np.float64)
        # Cells of one bin's width: a step so small that everything is clipped to 0 leaves the mean square.
        square = float(s.mse_histogram(edges, counts, 1e-12 * float(np.ptp(edges)), BITS))
        unit = edges / square**0.5
        curves[label] = (partial(s.mse_histogram, unit, counts, bits=BITS), float(np.abs(unit).max()) / 8)
    ratios = np.linspace(-0.3, 0.3, 121)

    def draw(panel: Axes) -> None:
        for number, (label, (error, largest)) in enumerate(curves.items()):
            best = s.best_step(error, largest)
            style = "-" if number < 2 else "--"
            added = s.gamma(error, best, ratios * best)
            panel.plot(1 + ratios, added, color=COLOURS[number % len(COLOURS)], linestyle=style, label=label)
        panel.set(xlabel="step size / best step size", ylabel="added error / variance")
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return _svg(draw, "gamma", "error added by a wrong step size", 7, 3)
