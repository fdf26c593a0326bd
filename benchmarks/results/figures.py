"""Curves of a table with variants: every row of a setting in one figure, means over the seeds."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.results.record import Measured, read_expected
from benchmarks.results.table import ROOT, Table
from qpipe.report.curves import save_curves
from qpipe.report.inputs import VariantPoint, Variants

FIGURES = ROOT / "docs" / "figures"


def as_variants(measured: Measured) -> Variants:
    """The recorded points as `variants.json` has them."""
    metric = next(iter(measured.metrics))
    points = [_point(name, statistics.mean(values), metric) for name, values in measured.points.items()]
    return Variants(metric=metric, examples=0, sites=[], points=points)


def _point(name: str, value: float, metric: str) -> VariantPoint:
    variant, _, at = name.partition("=")
    return VariantPoint(variant=variant, value=None if at in ("", "full") else float(at), metrics={metric: value})


def figure_name(table: Table, setting: str) -> str:
    """File name of a setting's figure."""
    return f"{table.name}-{setting}.svg"


def draw(table: Table, folder: Path = FIGURES) -> None:
    """Write the figure of every setting that has been measured."""
    recorded = {table.rows[row].title: read_expected(table.expected(row)) for row in table.rows}
    for setting in table.settings:
        runs = {title: entry[setting] for title, entry in recorded.items() if setting in entry}
        curves = {title: as_variants(measured) for title, measured in runs.items() if measured.points}
        if curves:
            save_curves(curves, folder / figure_name(table, setting))
