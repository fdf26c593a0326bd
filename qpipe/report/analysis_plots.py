"""Figures of the report's section on where quantization acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qpipe.report.plots import GRID, INK, SERIES, inline_svg, literal, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED = 40
"""Tokens that a figure can name along an axis."""
WIDTH = 7.2
"""Of a figure, in inches."""
SMALLEST = 5.0
"""Type of tokens that stand along a map, in points: none is smaller where two maps stand side by side."""


@styled
def ablation_bars(ablation: Mapping[str, Any]) -> str:
    """The metric without each group (dots) and with it alone (circles), beside all and none quantized (lines)."""
    groups = ablation["groups"]
    figure, (panel,) = new_figure(7.2, 0.9 + 0.22 * len(groups))
    places = range(len(groups))
    panel.plot([g["without"] for g in groups], places, "o", color=SERIES[0], label="all quantized but this group")
    panel.plot(
        [g["alone"] for g in groups], places, "o", mfc="none", color=SERIES[1], label="only this group quantized"
    )
    panel.axvline(ablation["quantized"], color=SERIES[0], linewidth=1, linestyle="--", label="all quantized")
    panel.axvline(ablation["full_precision"], color=SERIES[1], linewidth=1, linestyle=":", label="none quantized")
    panel.set_yticks(list(places), [literal(g["group"], 46) for g in groups])
    panel.set_ylim(len(groups) - 0.5, -0.5)
    panel.set_xlabel(literal(ablation["metric"]))
    panel.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return inline_svg(figure, "ablation", "Metric without each group of sites, and with each alone")


@styled
def outlier_map(name: str, site: Mapping[str, Any]) -> str:
    """Dimension over token position of every outlier, with lines between examples."""
    figure, (panel,) = new_figure(7.2, 2.2)
    panel.plot([p[0] for p in site["points"]], [p[1] for p in site["points"]], "s", color=SERIES[0], markersize=2)
    for start in site["boundaries"][1:]:
        panel.axvline(start - 0.5, color=GRID, linewidth=0.6)
    panel.set_ylim(-1, site["width"])
    panel.set_ylabel("dimension")
    panel.set_xlabel("token, over all examples")
    panel.set_title(literal(name, 70), loc="left")
    return inline_svg(figure, f"outliers-{_word(name)}", f"Outliers of {name} by token and dimension")


@styled
def token_ranges(name: str, site: Mapping[str, Any], tokens: Sequence[Sequence[str]]) -> str:
    """Least to largest value of every token of the first example."""
    low, high = site["low"][0], site["high"][0]
    figure, (panel,) = new_figure(7.2, 2.2)
    panel.vlines(range(len(low)), low, high, color=SERIES[0], linewidth=2)
    if tokens and tokens[0] and len(tokens[0]) <= LABELLED:
        panel.set_xticks(range(len(low)), [literal(token, 14) for token in tokens[0]], rotation=90)
    panel.set_ylabel("values")
    panel.set_title(literal(name, 70), loc="left")
    return inline_svg(figure, f"ranges-{_word(name)}", f"Range of every token at {name}")


@styled
def attention_maps(attention: Mapping[str, Any]) -> str:
    """The mean map over the heads of each layer."""
    means = [np.mean(heads, axis=0) for heads in attention["maps"]]
    titles = [f"layer {number}" for number in range(len(means))]
    label = "Attention of the first example, mean over heads, by layer"
    return _maps(means, titles, attention["tokens"], "attention", label)


@styled
def attention_heads(attention: Mapping[str, Any], layer: int) -> str:
    """The map of every head of a layer."""
    maps = [np.array(head) for head in attention["maps"][layer]]
    titles = [f"head {number}" for number in range(len(maps))]
    label = f"Attention of the first example in layer {layer}, by head"
    return _maps(maps, titles, attention["tokens"], f"attention-{layer}", label)


def _maps(maps: Sequence[np.ndarray], titles: Sequence[str], tokens: Sequence[str], name: str, label: str) -> str:
    """Maps side by side in the same colours, on the outer axes the tokens, or their numbers where names are too many.

    Each is an image within the SVG: drawn as rectangles, the heads of a model would make a file of many megabytes.
    """
    named = tokens[: len(maps[0])] if len(tokens) <= LABELLED else []
    columns, type_size = _columns(len(named))
    rows = -(-len(maps) // columns)
    figure, axes = new_figure(WIDTH, 1.2 + rows * (WIDTH - 0.4) / columns, rows, columns)
    top = max(float(values.max()) for values in maps)
    drawn: Any = None
    for number, (panel, values) in enumerate(zip(axes, maps, strict=False)):
        drawn = panel.imshow(values, cmap="Blues", vmin=0, vmax=top, interpolation="none")
        panel.grid(visible=False)
        panel.set_title(titles[number], loc="left")
        outer = {"y": number % columns == 0, "x": number + columns >= len(maps)}
        _name_tokens(panel, outer, named, type_size)
    for panel in axes[len(maps) :]:
        panel.set_axis_off()
    above: dict[str, Any] = {"location": "top", "shrink": 0.5, "aspect": 40, "pad": 0.05 / rows}
    figure.colorbar(drawn, ax=axes, label="part of a token's attention", **above)
    figure.supylabel("token", fontsize=9)
    figure.supxlabel("token that it attends to", fontsize=9)
    return inline_svg(figure, name, label)


def _name_tokens(panel: Axes, outer: Mapping[str, bool], tokens: Sequence[str], size: float) -> None:
    """Ticks on the outer axes of a map, a token each; without tokens they are numbers."""
    for name, axis in (("x", panel.xaxis), ("y", panel.yaxis)):
        if not outer[name]:
            axis.set_ticks([])
        elif tokens:
            names = [literal(token, 14) for token in tokens]
            axis.set_ticks(range(len(tokens)), names, fontsize=size, rotation=90 if name == "x" else 0)


def _columns(named: int) -> tuple[int, float]:
    """How many maps stand side by side so that so many tokens can be read along one, and the size of their type."""
    for columns in (4, 3, 2):
        room = 72 * (WIDTH / columns - 0.5)
        if named * SMALLEST <= room or columns == 2:
            break
    return columns, min(7.0, room / max(named, 1))


@styled
def noise_points(sites: Mapping[str, float | None]) -> str:
    """SQNR of every site, in the order of the plan."""
    figure, (panel,) = new_figure(7.2, 2.4)
    for colour, weights in ((SERIES[0], True), (SERIES[1], False)):
        points = [
            (n, v) for n, (k, v) in enumerate(sites.items(), 1) if v is not None and k.endswith(":weight") == weights
        ]
        panel.plot([p[0] for p in points], [p[1] for p in points], "o", color=colour, markersize=4,
                   label="weights" if weights else "activations")  # fmt: skip
    panel.axhline(0, color=INK, linewidth=0.6)
    panel.set_ylabel("SQNR (dB)")
    panel.set_xlabel("number of the site in the table below")
    panel.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return inline_svg(figure, "noise", "SQNR of every quantized site")


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
