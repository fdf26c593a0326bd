"""The report's section on what quantization does where: ablation, outliers, token ranges, attention and noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpipe.report.document import render
from qpipe.report.inputs import ANALYSIS_FOLDER, read_json

MAPS = 3
"""Outlier maps and range plots that are shown: of the sites with most outliers, or the widest ranges."""


def read_part(run_dir: Path, part: str) -> Any:
    """What `qpipe analyze` wrote about one part, or None."""
    return read_json(Path(run_dir) / ANALYSIS_FOLDER / f"{part}.json")


def analysis(run_dir: Path) -> str | None:
    """Figures and tables of every part that was measured; None where none was."""
    from qpipe.report import analysis_plots as plots

    ablation, noise = read_part(run_dir, "ablation"), read_part(run_dir, "noise")
    outliers, ranges = read_part(run_dir, "outliers"), read_part(run_dir, "ranges")
    attention = read_part(run_dir, "attention")
    if not any((ablation, noise, outliers, ranges, attention)):
        return None
    worst = _most_outliers(outliers["sites"]) if outliers else []
    widest = _widest(ranges["sites"]) if ranges else []
    return render(
        "analysis.html.j2",
        ablation=ablation,
        ablation_plot=plots.ablation_bars(ablation) if ablation else "",
        outliers=outliers,
        outlier_rows=worst,
        outlier_plots=[plots.outlier_map(name, site) for name, site in worst[:MAPS] if site["count"]],
        range_plots=[plots.token_ranges(name, site, ranges["tokens"]) for name, site in widest[:MAPS]],
        attention=attention,
        attention_plot=plots.attention_maps(attention) if attention else "",
        noise=noise,
        noise_plot=plots.noise_points(noise["sites"]) if noise else "",
    )


def _most_outliers(sites: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(sites.items(), key=lambda item: -item[1]["share"])


def _widest(sites: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Sites by their widest token's range over their median token's: those that one range per tensor fits worst."""

    def unevenness(site: Mapping[str, Any]) -> float:
        spans = sorted(h - low for lows, highs in zip(site["low"], site["high"], strict=True)
                       for low, h in zip(lows, highs, strict=True))  # fmt: skip
        middle = spans[len(spans) // 2]
        return spans[-1] / middle if middle > 0 else 0.0

    return sorted(sites.items(), key=lambda item: -unevenness(item[1]))
