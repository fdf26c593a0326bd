"""`qpipe evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpipe.cli.options import JsonOption, split_names
from qpipe.cli.output import print_json, print_table

if TYPE_CHECKING:
    from qpipe.stages.sweep import Sweep

BITS = "2,3,4,5,6,8"
RATIOS = "0.7:1.3:11"


def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories.", exists=True, file_okay=False)
    ],
    variants: Annotated[
        str, typer.Option(help="Evaluate variants of the trained model too, with commas: bits, step, pow2.")
    ] = "",
    bits: Annotated[
        str | None, typer.Option(help="Widths of the variant `bits`, with commas.", show_default=BITS)
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            help="Step sizes of the variant `step` relative to the trained ones: FIRST:LAST:COUNT, or a list.",
            show_default=RATIOS,
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", metavar="PATTERN", help="Weights to vary. Default: all quantized ones but embeddings."),
    ] = None,
    activations: Annotated[
        bool, typer.Option("--activations", help="Also vary the quantized activations together with the weights.")
    ] = False,
    open_ended: Annotated[
        bool,
        typer.Option(
            "--open-ended", help="Variant `step`: count steps from the lowest level, with as many as it takes."
        ),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="File for the curves, .svg, .png or .pdf. Default: variants.svg in the first run."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the trained model of one or more runs.

    With --variants, also when its weights are quantized to other bits from their full-precision master copies, with
    steps that are too small or large, or with power-of-two steps. Writes variants.json into each run, for the report.
    """
    sweep = _sweep(variants, bits or BITS, ratios or RATIOS, sites, activations, open_ended) if variants else None
    if sweep is None and any((figure, bits, ratios, activations, sites, open_ended)):
        raise typer.BadParameter(
            "--bits, --ratios, --figure, --sites, --activations and --open-ended belong to --variants"
        )
    kinds = split_names(variants, "--variants")
    for option, value, kind in (("--bits", bits, "bits"), ("--ratios", ratios, "step")):
        if sweep is not None and value is not None and kind not in kinds:
            raise typer.BadParameter(f"{option} belongs to the variant `{kind}`")
    if len({run.resolve() for run in runs}) < len(runs):
        raise typer.BadParameter("a run is named twice")
    from qpipe.launching.worker import quiet_libraries

    quiet_libraries()
    _require_evaluable(runs[1:])  # the first is, when it is loaded
    if sweep is None:
        _plain(runs, as_json)
    else:
        _variants(runs, sweep, figure or runs[0] / "variants.svg", as_json)


def _require_evaluable(runs: list[Path]) -> None:
    """Refuse what shows without loading a model, so that no evaluation is lost because of a later run."""
    from qpipe.host import load_plugins
    from qpipe.stages.trained import read_config, require_trained

    for run in runs:
        load_plugins(read_config(run).plugins)
        require_trained(run)


def _plain(runs: list[Path], as_json: bool) -> None:
    from qpipe.stages import evaluate_run

    found = {str(run): evaluate_run(run) for run in runs}
    if as_json:
        print_json(found if len(runs) > 1 else found[str(runs[0])])
        return
    names = dict.fromkeys(name for metrics in found.values() for name in metrics)
    heads = [str(run) for run in runs] if len(runs) > 1 else ["value"]
    print_table(("metric", *heads), [[name, *(metrics.get(name) for metrics in found.values())] for name in names])


def _variants(runs: list[Path], sweep: Sweep, figure: Path, as_json: bool) -> None:
    from qpipe.files import require_writable
    from qpipe.report.curves import label, require_format, save_curves
    from qpipe.report.inputs import VariantPoint, Variants
    from qpipe.report.robustness import table
    from qpipe.stages.sweep import check_sweep, sweep_run

    require_format(figure)
    require_writable(figure, "--figure")
    for run in runs[1:]:  # each is loaded once more; the first is checked when it is loaded to be evaluated
        check_sweep(run, sweep)
    found: dict[str, Any] = {}
    for run in runs:

        def told(point: Any, run: Path = run) -> None:
            shown = VariantPoint(**vars(point))
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in point.metrics.items())
            typer.echo(f"{run}: {point.variant} {label(shown)}: {numbers}", err=True)

        found[str(run)] = sweep_run(run, sweep, [other for other in runs if other != run], told)
    sweeps = {name: Variants(**document) for name, document in found.items()}
    save_curves(sweeps, figure)
    if as_json:
        print_json(found)
        return
    rows = [[r["variant"], r["value"], r["scope"], *(r["metrics"].get(name) for name in sweeps)] for r in table(sweeps)]
    metric = next(iter(sweeps.values())).metric
    print_table(("varied", "", "sites", *(f"{metric} of {name}" for name in sweeps)), rows)
    for name, variants in sweeps.items():
        if variants.fixed:
            typer.echo(f"{name}: the width of {len(variants.fixed)} weights is fixed, such as {variants.fixed[0]}")
    typer.echo(f"figure: {figure}")


def _sweep(
    variants: str, bits: str, ratios: str, sites: list[str] | None, activations: bool, open_ended: bool
) -> Sweep:
    from qpipe.stages.sweep import Sweep

    kinds, widths, steps = tuple(split_names(variants, "--variants")), parse_bits(bits), parse_ratios(ratios)
    return Sweep(kinds, widths, steps, tuple(sites or ()), activations, open_ended)


def parse_bits(text: str) -> tuple[int, ...]:
    """`2,3,4` as numbers, sorted and each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"bits are whole numbers with commas, such as 2,3,4, not {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def parse_ratios(text: str) -> tuple[float, ...]:
    """`FIRST:LAST:COUNT` as evenly spaced numbers, or numbers with commas."""
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, count = text.split(":")
        low, high, number = float(first), float(last), int(count)
    except ValueError:
        raise typer.BadParameter(f"ratios are FIRST:LAST:COUNT or a list, such as 0.7:1.3:11, not {text!r}") from None
    if number < 2:
        raise typer.BadParameter(f"{number} ratios make no curve; write FIRST:LAST:COUNT with a COUNT of 2 or more")
    return tuple(round(low + (high - low) * index / (number - 1), 6) for index in range(number))
