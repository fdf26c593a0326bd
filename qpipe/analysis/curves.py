"""Curves: a run's metrics and losses over the steps of its training, as it has logged them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.errors import ConfigError
from qpipe.report.inputs import METRICS_FILE, numbers, read_metrics
from qpipe.types import Json

NOT_CURVES = ("time", "step", "lr", "grad_norm", "samples_per_second")


def curves(out: Path) -> dict[str, Json]:
    """Read `metrics.jsonl`; the run may still be going on.

    Returns:
        `training` and `evaluation`: by name, `[step, value]` in the order of steps.

    Raises:
        ConfigError: nothing has been logged.
    """
    rows = read_metrics(out / METRICS_FILE)
    if not rows:
        raise ConfigError(
            f"{out} has no {METRICS_FILE} with steps in it, so there is no curve; leave the part `curves` out"
        )
    return {name: _series([row for row in rows if row["kind"] == kind])
            for name, kind in (("training", "train"), ("evaluation", "eval"))}  # fmt: skip


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        for name, value in numbers(row).items():
            if name not in NOT_CURVES:
                found.setdefault(name, []).append([row["step"], value])
    return found
