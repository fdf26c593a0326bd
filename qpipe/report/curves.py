"""Curves of variants: metric over bit width, relative step size and power-of-two steps, several runs in one figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import ConfigError
from qpipe.report.inputs import VariantPoint, Variants
from qpipe.report.plots import DASHES, GRID, INK, SERIES, STYLE, inline_svg, literal, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRINTED = {
    INK: "#22272e",
    GRID: "#dde1e6",
    **dict(zip(SERIES, ("#2f6db3", "#c2581f", "#34845a", "#8152ab", "#8d7210", "#5c6b78"), strict=True)),
}
"""Colours on white paper, those of the report's light mode."""

PANELS = {"bits": "bits", "step": "step size / trained step size", "pow2": "steps"}
SCOPES = {False: "weights", True: "weights and activations"}
FORMATS = (".svg", ".png", ".pdf")


def label(point: VariantPoint) -> str:
    """The value of a point as text: `4`, `full precision`, `0.94`, `power of two`."""
    if point.variant == "bits":
        return "full precision" if point.value is None else f"{point.value:g}"
    return {"pow2": "power of two", "trained": "as trained"}.get(point.variant) or f"{point.value:.4g}"


def _points(variants: Variants, kind: str, together: bool) -> list[VariantPoint]:
    return [p for p in variants.points if p.variant == kind and p.activations == together]


def _curve(variants: Variants, kind: str, together: bool, end: float) -> tuple[list[float], list[float]]:
    """Positions and values of one panel's curve: full precision is at the end, powers of two at 1."""
    points = _points(variants, kind, together)
    if not points:
        return [], []
    pairs = [(p.value if p.value is not None else end, p.metrics[variants.metric]) for p in points]
    if kind == "pow2":
        pairs = [(0.0, _trained(variants)), (1.0, pairs[0][1])]
    return [x for x, _ in sorted(pairs)], [y for _, y in sorted(pairs)]


def _trained(variants: Variants) -> float:
    return next(p.metrics[variants.metric] for p in variants.points if p.variant == "trained")


def _panel(panel: Axes, runs: Mapping[str, Variants], kind: str, together: bool, colours: Mapping[str, str]) -> None:
    shown = [p for variants in runs.values() for p in _points(variants, kind, together)]
    end = max((p.value for p in shown if p.value is not None), default=0.0) + 1
    for number, (name, variants) in enumerate(runs.items()):
        x, y = _curve(variants, kind, together, end)
        colour = colours[SERIES[number % len(SERIES)]]
        dashes = DASHES[number // len(SERIES) % len(DASHES)]
        panel.plot(x, y, marker="o", markersize=3, color=colour, linestyle=dashes, label=literal(name, 40))
        trained = {"bits": variants.bits, "step": 1.0, "pow2": 0.0}[kind]
        if x and trained is not None:
            panel.plot([trained], [_trained(variants)], marker="*", markersize=11, color=colour, linestyle="none")
    if kind == "bits":
        ticks = {end if p.value is None else p.value: "full" if p.value is None else f"{p.value:g}" for p in shown}
        panel.set_xticks(list(ticks), list(ticks.values()))
    elif kind == "pow2":
        panel.set_xticks([0, 1], ["as trained", "power of two"])
        panel.set_xlim(-0.4, 1.4)
    panel.set_xlabel(PANELS[kind])


def _draw(runs: Mapping[str, Variants], colours: Mapping[str, str]) -> Figure:
    present = [p for variants in runs.values() for p in variants.points]
    kinds = [kind for kind in PANELS if any(p.variant == kind for p in present)]
    scopes = [together for together in SCOPES if any(p.activations == together for p in present if p.variant in kinds)]
    figure, axes = new_figure(0.6 + 2.9 * len(kinds), 0.5 + 2.5 * len(scopes), len(scopes), len(kinds))
    metric = next(iter(runs.values())).metric
    for index, panel in enumerate(axes):
        row, column = divmod(index, len(kinds))
        if column:
            panel.sharey(axes[row * len(kinds)])
        else:
            panel.set_ylabel(literal(metric))
        _panel(panel, runs, kinds[column], scopes[row], colours)
        panel.set_title(SCOPES[scopes[row]], loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


@styled
def variant_curves(runs: Mapping[str, Variants]) -> str:
    """The figure as SVG for the report.

    Args:
        runs: sweeps with at least one point beside the trained one, by the name to show. Stars are the models as
            trained.
    """
    return inline_svg(_draw(runs, {colour: colour for colour in PRINTED}), "variants", "Metrics of variants")


def save_curves(runs: Mapping[str, Variants], path: Path) -> None:
    """Write the figure of `variant_curves` to a file.

    Raises:
        ConfigError: the file's ending is none of `.svg`, `.png` and `.pdf`.
    """
    require_format(path)
    import matplotlib

    defaults: Any = matplotlib.rcParamsDefault
    style: Any = {key: PRINTED.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with matplotlib.rc_context({**defaults, **style, "backend": "agg"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(runs, PRINTED).savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def require_format(path: Path) -> None:
    """Refuse a file name whose format cannot be drawn.

    Raises:
        ConfigError: its ending is none of `.svg`, `.png` and `.pdf`.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"figures are written as {', '.join(FORMATS)}, not {path.suffix or 'without an ending'!r}")
