"""The report's section on what quantization does where: ablation, outliers, token ranges, attention and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpipe.report.document import render
from qpipe.report.inputs import ANALYSIS_FOLDER, read_json

PARTS = ("ablation", "noise", "outliers", "ranges", "attention")
"""Parts of `qpipe analyze` that the section shows."""
MAPS = 3
"""Outlier maps and range plots that are shown: of the sites with most outliers, or the widest ranges."""
HEADS = 16
"""Heads of a layer whose maps can be told apart side by side."""


def read_part(run_dir: Path, part: str) -> Any:
    """What `qpipe analyze` wrote about one part, or None."""
    return read_json(Path(run_dir) / ANALYSIS_FOLDER / f"{part}.json")


def read_parts(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """Those of `PARTS` that were measured on the weights of the newest of them, and names of those of other weights."""
    every = {part: value for part in PARTS if (value := read_part(run_dir, part)) is not None}
    if not every:
        return {}, []
    newest = max(every, key=lambda part: (Path(run_dir) / ANALYSIS_FOLDER / f"{part}.json").stat().st_mtime_ns)
    weights = {part: value.get("models", {}).get("student", {}).get("digest") for part, value in every.items()}
    old = [part for part in every if weights[part] != weights[newest] and None not in (weights[part], weights[newest])]
    return {part: value for part, value in every.items() if part not in old}, old


def analysis(run_dir: Path) -> str | None:
    """Figures and tables of every part that was measured; None where none was."""
    from qpipe.report import analysis_plots as plots

    found, old = read_parts(run_dir)
    if not found:
        return None
    shown: list[Any] = [found.get(part) for part in PARTS]
    ablation, noise, outliers, ranges, attention = shown
    worst = most_outliers(outliers["sites"]) if outliers else []
    uneven = widest(ranges) if ranges else []
    return render(
        "analysis.html.j2",
        old=old,
        ablation=ablation,
        ablation_plot=plots.ablation_bars(ablation) if ablation else "",
        outliers=outliers,
        outlier_rows=worst,
        outlier_plots=[plots.outlier_map(name, site) for name, site in worst[:MAPS] if site["count"]],
        range_rows=uneven,
        range_plots=[plots.token_ranges(w.name, ranges["sites"][w.name], ranges["tokens"]) for w in uneven[:MAPS]],
        attention=attention,
        attention_plot=plots.attention_maps(attention) if attention else "",
        head_plots=_heads(attention) if attention else [],
        noise=noise,
        noise_plot=plots.noise_points(noise["sites"]) if noise else "",
    )


def most_outliers(sites: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Sites with what they were found to have, those with the largest share of outliers first.

    A tensor that several sites receive, such as the input of query, key and value, is there once, under its first name.
    """
    return sorted(_first_of_each(sites, ("mean", "deviation", "points")), key=lambda item: -item[1]["share"])


def _first_of_each(sites: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, Any]]:
    """Of sites that have the same under these keys, the first."""
    first: dict[str, tuple[str, Any]] = {}
    for name, site in sites.items():
        first.setdefault(repr([site[key] for key in keys]), (name, site))
    return list(first.values())


@dataclass(frozen=True)
class Width:
    """Ranges of tokens at one site, over all examples.

    Attributes:
        name: of the site.
        low: least value.
        high: largest value.
        token: the one with the widest range; its number in its example where tokens have no names.
        span: that range's width.
        median: of the widths.
    """

    name: str
    low: float
    high: float
    token: str
    span: float
    median: float

    @property
    def unevenness(self) -> float:
        """How much wider the widest range is than the median one: what one range for all does not fit."""
        return self.span / self.median if self.median > 0 else 0.0


def widest(ranges: Mapping[str, Any]) -> list[Width]:
    """Ranges of tokens by site, those first that one range per tensor fits worst; of sites with the same, one.

    Args:
        ranges: `tokens`, the examples' tokens as text, and `sites` with `low` and `high` of each token.
    """
    distinct = _first_of_each(ranges["sites"], ("low", "high"))
    found = [_width(name, site, ranges["tokens"]) for name, site in distinct]
    return sorted(found, key=lambda width: -width.unevenness)


def _width(name: str, site: Mapping[str, Any], tokens: Sequence[Sequence[str]]) -> Width:
    spans = [
        (high - low, tokens[example][at] if tokens and tokens[example] else str(at))
        for example, (lows, highs) in enumerate(zip(site["low"], site["high"], strict=True))
        for at, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]
    span, token = max(spans, key=lambda entry: entry[0])
    low, high = min(map(min, site["low"])), max(map(max, site["high"]))
    return Width(name, low, high, token, span, sorted(entry[0] for entry in spans)[len(spans) // 2])


def _heads(attention: Mapping[str, Any]) -> list[str]:
    """A figure for each layer; none where there are too many heads."""
    from qpipe.report import analysis_plots as plots

    layers = attention["maps"]
    return [plots.attention_heads(attention, n) for n, heads in enumerate(layers) if 1 < len(heads) <= HEADS]
