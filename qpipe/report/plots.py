"""Plots as inline SVG. Colours are CSS variables of the page, so that they follow its light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from qpipe.report.inputs import TensorStatistics, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib accepts as colours and that nothing else produces; `inline_svg` turns them into variables.
INK, GRID = "#a1b2c1", "#a1b2c2"
SERIES = [f"#a1b2d{i}" for i in range(1, 7)]
_VARIABLES = {INK: "--ink", GRID: "--grid", **{c: f"--series-{i}" for i, c in enumerate(SERIES, start=1)}}
DASHES = ["-", "--", ":", "-."]
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qpipe",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """An empty figure of that size in inches, and its panels row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """SVG to be put into HTML: no prolog, metadata or namespaces, ids made unique by `name`, colours of the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)  # a hash of the content, the same for equal images
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    points = 72 * figure.get_size_inches()[0]
    text = text.replace(
        "<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}" style="width:{points:.0f}pt"', 1
    )
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def literal(name: str, length: int = 52) -> str:
    """A name as matplotlib text: no formulas, and the end of what is too long."""
    return (name if len(name) <= length else "…" + name[1 - length :]).replace("$", r"\$")


def styled(draw: Any) -> Any:
    """Draw and write within the style: matplotlib reads part of it only when it writes."""

    def wrapper(*args: Any, **kwargs: Any) -> str:
        import matplotlib

        defaults: Any = matplotlib.rcParamsDefault
        style: Any = {**defaults, **STYLE, "backend": "agg"}
        with matplotlib.rc_context(style):
            return str(draw(*args, **kwargs))

    return wrapper


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [p[0] for p in points], [p[1] for p in points]


def _log_if_wide(axes: Axes, values: Sequence[float], ratio: float) -> None:
    if values and min(values) > 0 and max(values) / min(values) > ratio:
        axes.set_yscale("log")


@styled
def loss_curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Training loss and its parts over optimizer steps, with the learning rate beneath.

    Args:
        rows: rows of kind `train`.
        names: keys to draw; the first one is drawn strongest.
    """
    figure, (loss, rate) = new_figure(7.2, 3.9, rows=2, heights=(3, 1))
    shown: list[float] = []
    for i, name in enumerate(names):
        steps, values = _series(rows, name)
        shown += values
        style: dict[str, Any] = {
            "color": SERIES[i % len(SERIES)],
            "linestyle": DASHES[i // len(SERIES) % len(DASHES)],
        }
        loss.plot(steps, values, label=literal(name), linewidth=1.8 if i == 0 else 1.1, **style, **_marker(steps))
    _log_if_wide(loss, shown, 100)
    loss.set_ylabel("loss")
    if len(names) > 1:
        loss.legend(ncols=min(4, len(names)), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    steps, values = _series(rows, "lr")
    rate.plot(steps, values, color=INK, linewidth=1, **_marker(steps))
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return inline_svg(figure, "loss", "Training loss and learning rate over optimizer steps")


def _marker(steps: Sequence[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(steps) <= 12 else {}


@styled
def metric_curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str], reference: Mapping[str, float]) -> str:
    """Evaluation metrics over optimizer steps, one panel each.

    Args:
        rows: rows of kind `eval`.
        names: metrics to draw.
        reference: values of the full-precision model, drawn as dashed lines.
    """
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure, axes = new_figure(2.4 * columns if columns > 1 else 4.0, 2.3 * height, height, columns)
    for panel, name in zip(axes, names, strict=False):
        steps, values = _series(rows, name)
        panel.plot(steps, values, color=SERIES[0], **_marker(steps))
        if name in reference:
            panel.axhline(reference[name], color=SERIES[1], linestyle="--", linewidth=1)
        panel.set_title(literal(name, 30), loc="left")
        panel.set_xlabel("optimizer step")
        panel.margins(y=0.15)
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    return inline_svg(figure, "metrics", "Evaluation metrics over optimizer steps")


@styled
def tensor_errors(tensors: Sequence[TensorStatistics]) -> str:
    """SQNR and kurtosis of every quantized weight, by its number in the table."""
    figure, (error, tails) = new_figure(7.2, 4.4, rows=2)
    for i, bits in enumerate(sorted({t.bits for t in tensors})):
        of_bits = [(n, t) for n, t in enumerate(tensors, start=1) if t.bits == bits]
        style: dict[str, Any] = {
            "color": SERIES[i % len(SERIES)],
            "linestyle": "none",
            "marker": "os^Dv"[i % 5],
            "markersize": 4,
        }
        for panel, key in ((error, "sqnr_db"), (tails, "kurtosis")):
            points = [(n, getattr(t, key)) for n, t in of_bits if getattr(t, key) is not None]
            panel.plot([p[0] for p in points], [p[1] for p in points], label=f"{bits:g} bits", **style)
    error.set_ylabel("SQNR (dB)")
    error.legend(ncols=6, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handletextpad=0.1)
    for level, name in ((1.8, "uniform"), (3.0, "normal")):
        tails.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        tails.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), fontsize=7, va="center", xytext=(3, 0),
            textcoords="offset points",
        )  # fmt: skip
    _log_if_wide(tails, [t.kurtosis for t in tensors if t.kurtosis is not None], 10)
    tails.set_ylabel("kurtosis")
    tails.set_xlabel("number of the weight in the table below")
    for panel in (error, tails):
        panel.set_xlim(0, len(tensors) + 1)
        panel.locator_params(axis="x", integer=True)
    return inline_svg(figure, "errors", "SQNR and kurtosis of every quantized weight")


@styled
def histograms(tensors: Sequence[TensorStatistics]) -> str:
    """Weight histograms on a logarithmic scale, two panels a row."""
    height = -(-len(tensors) // 2)
    figure, axes = new_figure(7.2, 1.75 * height, height, 2)
    for panel, tensor in zip(axes, tensors, strict=False):
        if tensor.histogram is None:
            continue
        panel.stairs(tensor.histogram.counts, tensor.histogram.edges, fill=True, color=SERIES[0])
        panel.set_yscale("log")
        panel.set_ylim(bottom=0.7)
        # Minor ticks of logarithmic axes are most of the time it takes to draw this figure.
        panel.minorticks_off()
        panel.locator_params(axis="x", nbins=5)
        panel.set_title(literal(tensor.name), loc="left", fontsize=8)
    for panel in axes[len(tensors) :]:
        panel.set_axis_off()
    figure.supylabel("weights per bin", fontsize=9)
    return inline_svg(figure, "histograms", "Histograms of the weights with the lowest SQNR")


def sparkline(tensor: TensorStatistics, width: int = 112, height: int = 26) -> str:
    """The histogram of one weight as a small SVG, linear scale."""
    if tensor.histogram is None or not any(tensor.histogram.counts):
        return ""
    counts = tensor.histogram.counts
    top, step = max(counts), width / len(counts)
    path = "".join(f"V{height - height * n / top:.1f}H{(i + 1) * step:.1f}" for i, n in enumerate(counts))
    return (
        f'<svg class="spark" role="img" aria-label="histogram" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><path d="M0 {height}{path}V{height}Z"/></svg>'
    )


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of rows that hold numbers, in order of appearance, without time and step."""
    names = dict.fromkeys(key for row in rows for key in numbers(row))
    return [name for name in names if name not in ("time", "step")]
