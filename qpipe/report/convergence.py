"""The report's section on convergence: distance to the teacher, curvature, landscape, curves, of all runs compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from qpipe.report.document import render
from qpipe.report.inputs import ANALYSIS_FOLDER, COMPARED_FILE, read_json

PARTS = ("curves", "layers", "ranking", "hessian", "landscape")
HEADS = 2
"""Attention heads whose maps are shown: those whose order the runs kept most differently."""

Results = Mapping[str, Mapping[str, Any]]


def read_runs(run_dir: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What was measured about a run and those it is compared with, by name; and what of these cannot be shown.

    A part of another run is shown where it was measured with the settings of this run's, and against the same teacher.
    """
    own = {part: read_part(run_dir, part) for part in PARTS}
    own = {part: value for part, value in own.items() if value is not None}
    runs: dict[str, dict[str, Any]] = {Path(run_dir).resolve().name: own}
    left_out = []
    compared = read_json(Path(run_dir) / ANALYSIS_FOLDER / COMPARED_FILE) or {}
    for other in dict.fromkeys(run for part in own for run in compared.get(part, ())):
        name = Path(other).name if Path(other).name not in runs else other
        asked = [part for part in own if other in compared.get(part, ())]
        found = {part: read_part(Path(other), part) for part in asked}
        alike = {p: v for p, v in found.items() if v is not None and v["settings"] == own[p]["settings"]}
        fitting = {p: v for p, v in alike.items() if _teacher(v) == _teacher(own[p])}
        left_out += [f"{part} of {name}" for part in asked if part not in alike]
        left_out += [f"{part} of {name}, whose teacher is another" for part in alike if part not in fitting]
        runs[name] = fitting
    return runs, left_out


def read_part(run_dir: Path, part: str) -> Any:
    """What `qpipe analyze` wrote about one part, or None."""
    return read_json(Path(run_dir) / ANALYSIS_FOLDER / f"{part}.json")


def _teacher(found: Mapping[str, Any]) -> str | None:
    """Hash of the teacher's weights that a part was measured against; None for a part that needs none."""
    mark = found.get("models", {}).get("teacher")
    return mark and str(mark["digest"])


def _of(results: Results, part: str) -> dict[str, Any]:
    return {name: parts[part] for name, parts in results.items() if part in parts}


def last_error(layers: Mapping[str, Any]) -> float:
    """Squared error of the last hidden state, as a part of the teacher's power."""
    hidden = layers["hidden_states"]
    return float(hidden["mse"][-1] / hidden["power"][-1])


def mean_of_heads(values: Sequence[Sequence[float]]) -> float:
    """Mean over layers and heads."""
    return fmean(value for layer in values for value in layer)


def largest_eigenvalue(hessian: Mapping[str, Any]) -> float:
    """Magnitude of the largest eigenvalue, mean over batches."""
    return fmean(abs(batch[0]["value"]) for batch in hessian["batches"])


def rise(landscape: Mapping[str, Any]) -> float | None:
    """Mean loss on the landscape's border, above that of the model; None where a loss there is not finite."""
    losses = landscape["losses"]
    border = [*losses[0], *losses[-1], *(row[at] for row in losses[1:-1] for at in (0, -1))]
    middle = losses[len(losses) // 2][len(losses) // 2]
    return None if None in border or middle is None else float(fmean(border) - middle)


def last_metric(curves: Mapping[str, Any]) -> float | None:
    """The first metric at the last evaluation."""
    series = next(iter(curves["evaluation"].values()), None)
    return None if series is None else float(series[-1][1])


COLUMNS: tuple[tuple[str, str, Callable[[Any], float | None]], ...] = (
    ("curves", "metric at the end", last_metric),
    ("layers", "relative error of the last layer", last_error),
    ("ranking", "ranking loss", lambda found: mean_of_heads(found["loss"])),
    ("ranking", "cover length", lambda found: mean_of_heads(found["cover"])),
    ("hessian", "largest |eigenvalue|", largest_eigenvalue),
    ("landscape", "rise of the loss", rise),
)


def summary_rows(results: Results) -> tuple[list[str], list[list[Any]]]:
    """One number of each part that was measured, as columns and a row for each run."""
    columns = [column for column in COLUMNS if any(column[0] in parts for parts in results.values())]
    rows = [
        [name, *(number(parts[part]) if part in parts else None for part, _, number in columns)]
        for name, parts in results.items()
    ]
    return [title for _, title, _ in columns], rows


def most_different_heads(ranking: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Layer and head, from 0, where the largest and the smallest ranking loss of the runs are farthest apart.

    Of one run: where its loss is largest.
    """
    tables = [found["loss"] for found in ranking.values()]
    spread = {
        (layer, head): max(t[layer][head] for t in tables) - (min(t[layer][head] for t in tables) if tables[1:] else 0)
        for layer, row in enumerate(tables[0])
        for head in range(len(row))
    }
    return sorted(spread, key=lambda place: -spread[place])[:HEADS]


def convergence(run_dir: Path) -> str | None:
    """Figures and numbers of every part that was measured; None where none was."""
    from qpipe.report import convergence_plots as plots

    runs, left_out = read_runs(run_dir)
    if not any(runs.values()):
        return None
    curves, layers, ranking = _of(runs, "curves"), _of(runs, "layers"), _of(runs, "ranking")
    hessian, landscape = _of(runs, "hessian"), _of(runs, "landscape")
    alike = {name: r for name, r in ranking.items() if _maps(r) == _maps(next(iter(ranking.values())))}
    others = [name for name in ranking if name not in alike]
    columns, rows = summary_rows(runs)
    return render(
        "convergence.html.j2",
        columns=columns,
        rows=rows,
        left_out=left_out + [f"ranking of {name}, whose heads or layers of the teacher are others" for name in others],
        curves_plot=plots.curves(curves) if curves else "",
        layers=next(iter(layers.values()), None),
        layer_maps={name: found["layers"] for name, found in layers.items() if _skips(found.get("layers"))},
        layers_plot=plots.layer_errors(layers) if layers else "",
        ranking=next(iter(ranking.values()), None),
        ranking_plot=plots.ranking_losses(alike) if alike else "",
        maps_plot=plots.attention_beside_teacher(alike, most_different_heads(alike)) if alike else "",
        hessian=next(iter(hessian.values()), None),
        hessian_plot=plots.eigenvalues(hessian) if hessian else "",
        landscape=next(iter(landscape.values()), None),
        landscape_plot=plots.landscapes(landscape) if landscape else "",
    )


def _maps(ranking: Mapping[str, Any]) -> tuple[list[int], list[int] | None]:
    """Heads of each layer, and the teacher's layer beside each: what maps in one figure have in common."""
    return [len(layer) for layer in ranking["loss"]], ranking.get("teacher_layers")


def _skips(layers: list[int] | None) -> bool:
    """True if layers are compared with others than those of the same number."""
    return layers is not None and layers != list(range(1, len(layers) + 1))
