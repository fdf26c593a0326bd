"""Figures of the report's section on where quantization acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qpipe.report.plots import GRID, INK, SERIES, inline_svg, literal, new_figure, styled

LABELLED = 40
"""Tokens that a figure can name along an axis."""


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
    """The mean map over the heads of each layer, four layers a row."""
    maps = attention["maps"]
    rows = -(-len(maps) // 4)
    figure, axes = new_figure(7.2, 1.9 * rows, rows, 4)
    for number, (panel, heads) in enumerate(zip(axes, maps, strict=False)):
        size = len(heads[0])
        mean = [[sum(head[i][j] for head in heads) / len(heads) for j in range(size)] for i in range(size)]
        panel.pcolormesh(mean, cmap="Blues", vmin=0)
        panel.invert_yaxis()
        panel.grid(visible=False)
        panel.set_title(f"layer {number}", loc="left")
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in axes[len(maps) :]:
        panel.set_axis_off()
    return inline_svg(figure, "attention", "Attention of the first example, mean over heads, by layer")


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
