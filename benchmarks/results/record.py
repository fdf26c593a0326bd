"""The numbers of a row: read from its runs, kept beside its recipe, and compared with later runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from benchmarks.results.cell import Cell
from benchmarks.results.table import Table
from qpipe.analysis.curves import curves
from qpipe.config import read_yaml, yaml_text
from qpipe.report.inputs import Results, Variants, read_json

HEADER = "# Measured by `make results`, which compares later runs with it. One entry per setting of the table.\n"


class Measured(BaseModel):
    """What the seeds of a row gave in one setting. Lists have one entry per seed."""

    model_config = ConfigDict(extra="forbid")

    cells: list[str]
    metrics: dict[str, list[float]]
    reloaded: dict[str, list[float]] = {}
    file_megabytes: float | None = None
    full_precision_megabytes: float | None = None
    bits_per_weight: float | None = None
    points: dict[str, list[float]] = {}
    tolerance: float

    def mean(self, metric: str) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.metrics[metric])


def point_name(variant: str, value: float | None) -> str:
    """`bits=3`, `step=0.9`, `bits=full`, `pow2`, `trained`."""
    if variant == "bits":
        return "bits=full" if value is None else f"bits={value:g}"
    return variant if value is None or variant == "pow2" else f"{variant}={value:g}"


def is_done(cell: Cell, runs: Path) -> bool:
    """Whether the run of a cell is finished, variants and the model that others start from included."""
    folder = cell.folder(runs)
    parts = [folder / "results.json"]
    parts += [folder / "variants.json"] if cell.sweep is not None else []
    parts += [cell.model(runs)] if cell.transform is not None else []
    return all(part.exists() for part in parts)


def measure(table: Table, row: str, setting: str, runs: Path) -> Measured | None:
    """Read a row's runs in one setting; None unless every seed's is finished."""
    cells = [Cell(table, row, setting, seed) for seed in range(table.settings[setting].seeds)]
    if not all(is_done(cell, runs) for cell in cells):
        return None
    results = [Results(**read_json(cell.folder(runs) / "results.json")) for cell in cells]
    evaluations = [result.evaluation or {} for result in results]
    names = table.metrics or tuple(evaluations[0])[:1]
    if table.rows[row].evaluation == "last-logged":  # of another model than the one that is exported
        evaluations = [_last_logged(cell.folder(runs)) for cell in cells]
        results = [result.model_copy(update={"reloaded": None}) for result in results]
    size = results[0].size
    sweeps = [read_json(cell.folder(runs) / "variants.json") for cell in cells] if cells[0].sweep else []
    return Measured(
        cells=[cell.digest for cell in cells],
        metrics={name: [round(metrics[name], 5) for metrics in evaluations] for name in names},
        reloaded={n: [round(r.reloaded[n], 5) for r in results if r.reloaded] for n in names if results[0].reloaded},
        file_megabytes=_megabytes(size.file_bytes if size else None),
        full_precision_megabytes=_megabytes(size.full_precision_bytes if size else None),
        bits_per_weight=round(size.bits_per_weight, 3) if size and size.bits_per_weight else None,
        points=_points([Variants(**sweep) for sweep in sweeps]),
        tolerance=table.tolerance,
    )


def _last_logged(folder: Path) -> dict[str, float]:
    return {name: points[-1][1] for name, points in curves(folder)["evaluation"].items()}


def _megabytes(size: float | None) -> float | None:
    return None if size is None else round(size / 1e6, 3)


def _points(sweeps: list[Variants]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for sweep in sweeps:
        for point in sweep.points:
            name = point_name(point.variant, point.value)
            found.setdefault(name, []).append(round(point.metrics[sweep.metric], 5))
    return found


def read_expected(path: Path) -> dict[str, Measured]:
    """The recorded numbers of a row by setting; none if there is no file."""
    if not path.is_file():
        return {}
    return {name: Measured(**entry) for name, entry in read_yaml(path.read_text(), str(path)).items()}


def write_expected(path: Path, measured: dict[str, Measured]) -> None:
    """Write the recorded numbers of a row."""
    document: dict[str, Any] = {k: m.model_dump(exclude_none=True) for k, m in measured.items()}
    document = {k: {name: value for name, value in m.items() if value != {}} for k, m in document.items()}
    path.write_text(HEADER + yaml_text(document, width=120, default_flow_style=None))


def differences(measured: Measured, expected: Measured) -> list[str]:
    """What lies further from the recorded numbers than their tolerance, in words.

    Variants may also lie as far as two standard deviations of their recorded seeds: where they have lost most of the
    accuracy, what is left of it depends on chance.
    """
    found = []
    for name in sorted(expected.metrics.keys() & measured.metrics.keys()):
        found += _difference(name, measured.metrics[name], expected.metrics[name], expected.tolerance)
    for name in sorted(expected.points.keys() & measured.points.keys()):
        seeds = expected.points[name]
        spread = 2 * statistics.stdev(seeds) if len(seeds) > 1 else 0.0
        found += _difference(name, measured.points[name], seeds, max(expected.tolerance, spread))
    return found


def _difference(name: str, now: Sequence[float], before: Sequence[float], tolerance: float) -> list[str]:
    means = statistics.mean(now), statistics.mean(before)
    close = abs(means[0] - means[1]) <= tolerance
    return [] if close else [f"{name} {means[0]:.4f}, recorded {means[1]:.4f} ± {tolerance:g}"]
