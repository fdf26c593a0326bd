"""Bodies of the report's own sections. Each takes a run directory and returns HTML."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from qpipe.report import format as fmt
from qpipe.report.document import render
from qpipe.report.inputs import (
    METRICS_FILE,
    PlanEntry,
    Results,
    TensorStatistics,
    numbers,
    read_config,
    read_metrics,
    read_plan,
    read_results,
    read_tensors,
)
from qpipe.report.table import COLUMNS, result_rows, show

NOT_LOSSES = ("lr", "grad_norm", "samples_per_second", "time", "step")
LARGEST_METRIC_PANELS = 9
HISTOGRAM_PANELS = 6
_BLOCK = re.compile(r"(?<=\.)\d+(?=[.:])")


def missing(what: str, reason: str) -> str:
    """The note that stands in for something that is not in the run directory."""
    return render("missing.html.j2", what=what, reason=reason)


def result(run_dir: Path) -> str:
    """Metrics of teacher, quantized and packed model, size and time."""
    results = read_results(run_dir)
    if results is None:
        return missing("results.json", "the run has not been evaluated yet.")
    rows = []
    for row in result_rows(results):
        full, quantized = row["full_precision"], row["quantized"]
        compared = row["unit"] == "" and full is not None and quantized is not None
        difference = f"{quantized - full:+.4f}" if compared else ""
        rows.append({"name": row["quantity"], "cells": [show(row, c) for c in COLUMNS], "difference": difference})
    absent = [
        text
        for text, value in (
            ("full-precision teacher", results.teacher),
            ("quantized model", results.evaluation),
            ("packed checkpoint, reloaded", results.reloaded),
        )
        if value is None
    ]
    seconds = {k: v for k, v in (results.seconds or {}).items() if k != "total"}
    return render("result.html.j2", rows=rows, columns=list(COLUMNS.values()), absent=absent, seconds=seconds)


def training(run_dir: Path) -> str:
    """Curves of the loss, its parts, the learning rate and the evaluation metrics."""
    from qpipe.report import plots

    rows = read_metrics(Path(run_dir) / METRICS_FILE)
    if not rows:
        return missing(METRICS_FILE, "no training step has been logged.")
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    losses = [name for name in plots.metric_names(trained) if name not in NOT_LOSSES]
    losses.sort(key=lambda name: name != "loss")
    metrics = [name for name in plots.metric_names(evaluated) if name not in NOT_LOSSES[1:]]
    results = read_results(run_dir) or Results()
    reference = numbers(results.teacher)
    shown = metrics[:LARGEST_METRIC_PANELS]
    return render(
        "training.html.j2",
        loss_plot=plots.loss_curves(trained, losses) if losses else "",
        metric_plot=plots.metric_curves(evaluated, shown, reference) if shown else "",
        has_reference=any(name in reference for name in shown),
        metrics=metrics,
        left_out=metrics[LARGEST_METRIC_PANELS:],
        evaluated=evaluated[-20:],
        earlier=max(0, len(evaluated) - 20),
    )


def bits_grid(plan: list[PlanEntry]) -> tuple[int, dict[str, dict[int, str]], list[tuple[str, str]]]:
    """Bits by site within a block and block number.

    Returns:
        The number of blocks, a mapping from site names with the block number left out to `{block: bits}`, and the
        sites outside blocks with their bits.
    """
    rows: dict[str, dict[int, str]] = {}
    single: list[tuple[str, str]] = []
    for entry in plan:
        found = _BLOCK.search(entry.site)
        if found is None:
            single.append((entry.site, fmt.plain(entry.bits)))
            continue
        name = f"{entry.site[: found.start()]}*{entry.site[found.end() :]}"
        rows.setdefault(name, {})[int(found.group())] = fmt.plain(entry.bits)
    blocks = 1 + max((block for row in rows.values() for block in row), default=-1)
    return blocks, rows, single


def layers(run_dir: Path) -> str:
    """Which quantizer sits where: a summary, the bits of every layer, and the whole plan."""
    plan = read_plan(run_dir)
    if not plan:
        reason = "the plan is not written yet." if plan is None else "it lists no site: nothing is quantized."
        return missing("plan.json", reason)
    kinds = Counter((e.site.rpartition(":")[2], e.quantizer, fmt.plain(e.bits), e.granularity or "") for e in plan)
    blocks, grid, single = bits_grid(plan)
    return render("layers.html.j2", plan=plan, kinds=kinds, blocks=blocks, grid=grid, single=single)


def sizes(run_dir: Path) -> str:
    """Size of the packed checkpoint, and the files it consists of."""
    results = read_results(run_dir)
    size = results.size if results else None
    export = Path(run_dir) / "export"
    files: list[tuple[str, int]] | None = None
    if export.is_dir():
        files = [(p.relative_to(export).as_posix(), p.stat().st_size) for p in sorted(export.rglob("*")) if p.is_file()]
    relative = None
    if size is not None and size.file_bytes and size.full_precision_bytes:
        relative = size.file_bytes / size.full_precision_bytes
    return render("size.html.j2", size=size, files=files, relative=relative)


def _codes_used(tensor: TensorStatistics) -> str:
    if not tensor.code_counts:
        return fmt.MISSING
    return f"{len(tensor.code_counts)} of {2 ** round(tensor.bits)}"


def _zero_code(tensor: TensorStatistics) -> str:
    if not tensor.code_counts:
        return fmt.MISSING
    return f"{100 * tensor.code_counts.get('0', 0) / sum(tensor.code_counts.values()):.1f} %"


def weights(run_dir: Path) -> str:
    """Quantization error, kurtosis and histogram of every quantized weight."""
    from qpipe.report import plots

    tensors = read_tensors(run_dir)
    if not tensors:
        reason = "statistics are written at export." if tensors is None else "no weight is quantized."
        return missing("tensors.json", reason)
    highest = max((t.sqnr_db for t in tensors if t.sqnr_db is not None), default=0.0)
    rows: list[dict[str, Any]] = []
    for number, tensor in enumerate(tensors, start=1):
        positive = tensor.sqnr_db is not None and tensor.sqnr_db > 0
        share = 100 * (tensor.sqnr_db or 0.0) / highest if positive else 0.0
        rows.append(
            {
                "number": number,
                "tensor": tensor,
                "share": round(share, 1),
                "used": _codes_used(tensor),
                "zero": _zero_code(tensor),
                "spark": plots.sparkline(tensor),
            }
        )
    worst = sorted((t for t in tensors if t.sqnr_db is not None and t.histogram), key=lambda t: t.sqnr_db or 0.0)
    return render(
        "weights.html.j2",
        rows=rows,
        plot=plots.tensor_errors(tensors),
        histograms=plots.histograms(worst[:HISTOGRAM_PANELS]) if worst else "",
        shown=min(len(worst), HISTOGRAM_PANELS),
    )


def configuration(run_dir: Path) -> str:
    """The resolved configuration."""
    return render("configuration.html.j2", text=yaml.safe_dump(read_config(run_dir), sort_keys=False))
