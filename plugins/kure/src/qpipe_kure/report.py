"""Sections of the HTML report: kurtosis before and after training, and what a wrong step size costs."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from qpipe import CheckpointError, ReportSection

FILE = "kure.json"
"""What a run leaves in its directory: options, and kurtosis before training."""

VARIANTS = "variants.json"
"""What `qpipe evaluate --variants` leaves there."""

BAR = 260
ROW = 20
LABEL = 300


def read(path: Path) -> Any:
    """Content of a JSON file, None if there is none.

    Raises:
        CheckpointError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); write it again by repeating the run") from error


def after_training(run_dir: Path) -> dict[str, float]:
    """Kurtosis of the exported weights by module path; empty before the export."""
    entries = read(run_dir / "tensors.json") or []
    return {
        entry["name"].removesuffix(":weight").removesuffix(".weight"): entry["kurtosis"]
        for entry in entries
        if entry.get("kurtosis") is not None
    }


def sections(run_dir: Path) -> list[ReportSection]:
    """The report sections of a run directory; none if the run has not started."""
    found = section(run_dir)
    return [found, sensitivity_section(run_dir)] if found is not None else []


def sensitivity_section(run_dir: Path) -> ReportSection:
    """Figures 1 to 3 of the paper: 1, 2 and 3 (c) from its formulas, 3 (a) and (b) from what runs have left."""
    from qpipe_kure import figures

    html = (
        f"<p>Why weights without tails: what the mean squared error of a {figures.BITS}-bit quantizer does when its "
        "step size is wrong (Shkolnik et al., NeurIPS 2020, figures 1 to 3; the signs of equation 10 are corrected). "
        "Distributions have variance 1.</p>"
        f"<figure>{figures.error_and_curvature()}<figcaption>Figure 1, from the formulas. Error and its curvature over "
        "the step size; dotted: the best step. That of the uniform distribution falls to 1/2 where nothing is clipped "
        "any more, just beyond the best step, and equation 5 does not hold further on.</figcaption></figure>"
        f"<figure>{figures.least_error()}<figcaption>Figure 2, from the formulas. Error at the best step: smaller for "
        "the uniform distribution at every width.</figcaption></figure>"
        f"<figure>{figures.distributions(one_layer(run_dir))}<figcaption>Figure 3 (a). Weights of one layer, the "
        "regularized one with the largest kurtosis before training, after training; of this run and of those that it "
        "was compared with.</figcaption></figure>"
        f"{_over_bits(run_dir)}"
        f"<figure>{figures.sensitivity_curves(extreme_weights(run_dir))}<figcaption>Figure 3 (c), from the formulas. "
        "Error added by a wrong step. A uniform distribution pays less than a normal one for steps that are much too "
        "large, and more for steps that are too small, which clip it; the theorem of the paper compares the curvatures "
        "where clipping has just ended. Dashed: weights of this run, from their histograms after training."
        "</figcaption></figure>"
    )
    return ReportSection("Sensitivity to the step size", html, order=61)


def _over_bits(run_dir: Path) -> str:
    """Figure 3 (b), or how to get it."""
    from qpipe_kure import figures

    metric, runs = bits_of_runs(run_dir)
    if not runs:
        command = f"qpipe evaluate {escape(run_dir.resolve().name)} OTHER-RUN ... --variants bits"
        return (
            "<p>Figure 3 (b), the metric at other widths, is here once they are evaluated, with runs of other targets "
            f"or without: <code>{command}</code>.</p>"
        )
    caption = "Figure 3 (b). Weights alone at other widths, full precision left out; of the same runs."
    return f"<figure>{figures.metric_over_bits(metric, runs)}<figcaption>{caption}</figcaption></figure>"


def beside(run_dir: Path) -> dict[str, Path]:
    """This run and those that `qpipe evaluate` compared it with, by a label with their targets."""
    others = (read(run_dir / VARIANTS) or {}).get("compared", [])
    folders = [run_dir.resolve(), *(path for other in others if (path := Path(other)).is_dir())]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    labels = [f"{_short(name, 24)} ({_target(folder)})" for name, folder in zip(names, folders, strict=True)]
    return dict(zip(_distinct(labels), folders, strict=True))


def _target(run_dir: Path) -> str:
    record = read(run_dir / FILE)
    return "without" if record is None else f"target {record['options']['target']:g}"


def one_layer(run_dir: Path) -> dict[str, Any]:
    """Histograms after training of the layer whose regularized weight had the largest kurtosis before it, by run."""
    chosen = [w for w in read(run_dir / FILE)["weights"] if not w["left_out"]]
    name = max(chosen, key=lambda w: w["kurtosis"])["name"]
    found = {}
    for label, folder in beside(run_dir).items():
        for entry in read(folder / "tensors.json") or []:
            if entry["name"].removesuffix(".weight") == name and entry.get("kurtosis") and entry.get("histogram"):
                found[f"{label}, kurtosis {entry['kurtosis']:.2f}"] = entry["histogram"]
    return found


def bits_of_runs(run_dir: Path) -> tuple[str, dict[str, dict[int, float]]]:
    """The metric, and its values by the bits of the weights, by run; empty where no run has them.

    Runs that were measured otherwise than the first one, on other examples or by another metric, are left out.
    """
    metric, measured, found = "", None, {}
    for label, folder in beside(run_dir).items():
        record = read(folder / VARIANTS) or {"points": []}
        points = [p for p in record["points"] if p["variant"] == "bits" and not p["activations"] and p["value"]]
        how = record.get("metric"), record.get("examples")
        if points and measured in (None, how):
            metric, measured = record["metric"], how
            found[label] = {int(p["value"]): p["metrics"][metric] for p in points}
    return metric, found


def extreme_weights(run_dir: Path) -> dict[str, Any]:
    """Histograms of the regularized weights with the smallest and the largest kurtosis after training, by label."""
    record, entries = read(run_dir / FILE), read(run_dir / "tensors.json") or []
    chosen = {w["name"] for w in record["weights"] if not w["left_out"]}
    usable = [
        (entry["kurtosis"], entry["name"], entry["histogram"])
        for entry in entries
        if entry["name"].removesuffix(".weight") in chosen and entry.get("kurtosis") and entry.get("histogram")
    ]
    ends = sorted(usable, key=lambda entry: entry[0])
    ends = [ends[0], ends[-1]] if len(ends) > 1 else ends
    labels = _distinct([f"{_short(name)} (kurtosis {value:.2f})" for value, name, _ in ends])
    return {label: histogram for label, (*_, histogram) in zip(labels, ends, strict=True)}


def _short(name: str, length: int = 36) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _distinct(labels: list[str]) -> list[str]:
    """The labels, numbered from 1 where two are equal: what was cut off may have told them apart."""
    if len(set(labels)) == len(labels):
        return labels
    return [f"{number}: {label}" for number, label in enumerate(labels, 1)]


def section(run_dir: Path) -> ReportSection | None:
    """The report section of a run directory; None if the run has not started."""
    record = read(run_dir / FILE)
    if record is None:
        return None
    after = after_training(run_dir)
    rows = [(w["name"], w["kurtosis"], after.get(w["name"]), w["left_out"]) for w in record["weights"]]
    target = record["options"]["target"]
    intro = (
        f"<p>Kurtosis of the weights before and after training; the target is {target:g}. "
        "A uniform distribution has 1.8, a normal one 3, and outliers raise it without bound.</p>"
    )
    return ReportSection("Kurtosis regularization", intro + chart(rows, target) + html_table(rows), order=60)


def _position(value: float, top: float) -> float:
    """Bar length on a logarithmic axis from 1, the smallest kurtosis there is."""
    return BAR * min(1.0, math.log(max(value, 1.0)) / math.log(top))


def chart(rows: list[tuple[str, float | None, float | None, str]], target: float) -> str:
    """Two bars per weight on a logarithmic axis, and a line at the target, as inline SVG."""
    values = [v for _, before, after, _ in rows for v in (before, after) if v is not None]
    top = max([*values, target, 2.0]) * 1.05
    height = ROW * len(rows) + 24
    line = LABEL + _position(target, top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LABEL + BAR + 80} {height}" role="img" '
        f'aria-label="kurtosis of each weight before and after training" font-size="11" font-family="sans-serif" '
        f'style="max-width:100%;height:auto">'
    ]
    for number, (name, before, after, left_out) in enumerate(rows):
        y = ROW * number
        shown = name if len(name) <= 48 else "…" + name[-47:]
        parts.append(f'<text x="{LABEL - 6}" y="{y + 13}" text-anchor="end" fill="currentColor">{escape(shown)}</text>')
        for value, offset, colour in ((before, 2, "#9aa5b1"), (after, 10, "#2f6fab")):
            if value is None:
                continue
            opacity = 0.4 if left_out else 1
            parts.append(
                f'<rect x="{LABEL}" y="{y + offset}" width="{_position(value, top):.1f}" height="7" fill="{colour}" '
                f'opacity="{opacity}"><title>{escape(name)}: {value:.4g}</title></rect>'
            )
    parts.append(f'<line x1="{line:.1f}" x2="{line:.1f}" y1="0" y2="{height - 20}" stroke="#b0413e"/>')
    parts.append(
        f'<text x="{LABEL}" y="{height - 6}" fill="currentColor">grey: before, blue: after, pale: not regularized, '
        f"red line: target {target:g}; logarithmic axis from 1 to {top:.3g}</text></svg>"
    )
    return "".join(parts)


def html_table(rows: list[tuple[str, float | None, float | None, str]]) -> str:
    """The numbers behind the chart."""

    def cell(value: float | None) -> str:
        return "<td></td>" if value is None else f"<td>{value:.4g}</td>"

    body = "".join(
        f"<tr><td>{escape(name)}</td>{cell(before)}{cell(after)}<td>{escape(left_out)}</td></tr>"
        for name, before, after, left_out in rows
    )
    head = "<tr><th>weight</th><th>before</th><th>after</th><th>left out because</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
