"""The report's section on variants: what the trained model does with other bits and step sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpipe.report.document import render
from qpipe.report.inputs import Variants, read_variants


def shown_runs(run_dir: Path, variants: Variants) -> tuple[dict[str, Variants], list[str]]:
    """The sweep of a run and of those it was compared with, by run directory, and the directories not shown: their
    sweep is gone, or another one; see `Variants.comparable`.
    """
    runs = {Path(run_dir).resolve().name: variants}
    gone = []
    for other in variants.compared:
        found = read_variants(Path(other))
        if found is None or not found.comparable(variants):
            gone.append(other)
            continue
        name = Path(other).name
        runs[name if name not in runs else other] = found
    return runs, gone


def table(runs: Mapping[str, Variants]) -> list[dict[str, Any]]:
    """Rows of `variant`, `value`, `scope` and, by run, the metric; in the order of the first run that has the point."""
    from qpipe.report.curves import SCOPES, label

    rows: dict[tuple[str, float | None, bool], dict[str, Any]] = {}
    for name, variants in runs.items():
        for point in variants.points:
            key = point.variant, point.value, point.activations
            row = rows.setdefault(
                key,
                {
                    "variant": {"step": "step size", "pow2": "steps", "trained": ""}.get(point.variant, point.variant),
                    "value": label(point),
                    "scope": "" if point.variant == "trained" else SCOPES[point.activations],
                    "metrics": {},
                },
            )
            row["metrics"][name] = point.metrics[variants.metric]
    return list(rows.values())


def robustness(run_dir: Path) -> str | None:
    """Curves and table; None where no sweep was made."""
    from qpipe.report import curves

    variants = read_variants(run_dir)
    if variants is None:
        return None
    runs, gone = shown_runs(run_dir, variants)
    return render(
        "robustness.html.j2",
        plot=curves.variant_curves(runs),
        runs=list(runs),
        rows=table(runs),
        variants=variants,
        gone=[os.path.basename(path) for path in gone],
    )
