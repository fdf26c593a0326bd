"""`qpipe analyze`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from qpipe.cli.options import JsonOption, PluginsOption, SetOption, split_names
from qpipe.cli.output import print_json, print_table

if TYPE_CHECKING:
    from qpipe.analysis.request import Request
    from qpipe.config import RunConfig

T = TypeVar("T")

ALL = "ablation,outliers,ranges,attention,noise"
COMPARED = "curves,layers,ranking"
SHOWN = 5


Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...|MODEL [CONFIG]",
        help="Run directories; or a fine-tuned model, folder or hub name, and a YAML configuration.",
    ),
]
Parts = Annotated[
    str | None,
    typer.Option(
        help=f"What to measure, with commas: {ALL}, layers, ranking, hessian, landscape, curves. Default: the first "
        f"five; of several runs {COMPARED}."
    ),
]
By = Annotated[
    Literal["role", "kind", "block", "site"] | None,
    typer.Option(
        help="Groups of the ablation: sites of a role, a name with any block, a block, or each.", show_default="role"
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="PATTERN",
        help="Activation sites of ablation (default: those quantized), outliers and ranges (default: also those that "
        "have a role).",
    ),
]
Examples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Examples that ablation and layers (default: all), hessian and landscape (default: 256) evaluate.",
    ),
]
Sequences = Annotated[
    int | None, typer.Option(min=1, help="Validation examples whose activations are looked at.", show_default="10")
]
Suggest = Annotated[
    Path | None, typer.Option(help="Write a plan with more bits for the groups that hurt, chosen by the ablation.")
]
WITHIN, BITS = 0.005, 16
Within = Annotated[
    float | None,
    typer.Option(min=0, help="Largest loss of the metric that the plan may have.", show_default=str(WITHIN)),
]
Bits = Annotated[
    int | None, typer.Option(min=2, max=16, help="Width of the sites that the plan picks.", show_default=str(BITS))
]
Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="RUN|MODEL", help="Full-precision model that layers and ranking compare with. Default: the run's."
    ),
]
LayerMap = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        help="The teacher's layers that layers and ranking compare with, from 1, with commas: one for each of the "
        "model's. Default: as the run learned, or kept its layers; else evenly spaced.",
    ),
]
Text = Annotated[str | None, typer.Option(help="Sentence whose attention maps ranking shows. Default: an example.")]
Eigenvalues = Annotated[
    int | None, typer.Option(min=1, help="Eigenvalues of the Hessian of each batch.", show_default="3")
]
NormWeight = Annotated[
    float | None,
    typer.Option(
        min=0, help="Factor of the sum of norms in the Hessian's loss; 0.01 in public code.", show_default="0"
    ),
]
Points = Annotated[
    int | None, typer.Option(min=3, help="Points of the landscape along each direction; odd.", show_default="11")
]
Filters = Annotated[
    Literal["rows", "columns"] | None,
    typer.Option(help="What of each weight the landscape's directions are scaled to.", show_default="rows"),
]
DEFAULT_OUT = "runs/analysis"
Out = Annotated[
    Path | None,
    typer.Option(
        help="Where results about a model go; those about a run go into it. Default: `out` of CONFIG or of --set, "
        f"else {DEFAULT_OUT}."
    ),
]


def analyze(
    sources: Sources,
    plugins: PluginsOption = "",
    set_: SetOption = None,
    parts: Parts = None,
    by: By = None,
    sites: Sites = None,
    examples: Examples = None,
    sequences: Sequences = None,
    suggest: Suggest = None,
    within: Within = None,
    bits: Bits = None,
    teacher: Teacher = None,
    layer_map: LayerMap = None,
    text: Text = None,
    eigenvalues: Eigenvalues = None,
    norm_weight: NormWeight = None,
    points: Points = None,
    filters: Filters = None,
    out: Out = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find out what quantization does to a model, where, and how runs converge.

    For a run, or for a model that is quantized as `qpipe quantize` would: the metric without each group of sites and
    with it alone, outliers and the dimensions and tokens that have them, ranges of tokens, attention, and quantization
    noise; the distance of each layer and each attention head to the teacher's, eigenvalues of the loss's Hessian, its
    landscape, and curves. Several runs are shown in the same figures. Writes analysis/*.json into each run directory,
    for `qpipe report`; goes on where it was interrupted.
    """
    _check_suggest(suggest, within, bits, sources)
    wanted = split_names(parts or (COMPARED if len(sources) > 1 and _is_run(sources[1]) else ALL), "--parts")
    inputs = _inputs(sources, set_ or [], split_names(plugins), out)
    from qpipe.launching.worker import quiet_libraries

    quiet_libraries()
    from qpipe.analysis.analyze import analyze_runs
    from qpipe.analysis.load import check, source_of

    planned = {} if suggest is None else {"within": WITHIN if within is None else within, "bits": bits or BITS}
    request = _request(
        wanted, by=by, sites=tuple(sites or ()), examples=examples, sequences=sequences, teacher=teacher, text=text,
        eigenvalues=eigenvalues, norm_weight=norm_weight, points=points, filters=filters,
        layer_map=_layers(layer_map), **planned,
    )  # fmt: skip
    check(inputs, request)
    found = analyze_runs(list(map(source_of, inputs)), request, again, lambda line: typer.echo(line, err=True), _track)
    if suggest is not None:
        ablation = next(iter(found.values()))["ablation"]
        _write(suggest, ablation, sources[0])
    if as_json:
        print_json(found if len(found) > 1 else next(iter(found.values())))
        return
    _print(found)
    if suggest is not None:
        typer.echo(f"suggested: {_outcome(ablation['suggestion'])}")
        typer.echo(f"plan: {suggest}; use it with --set quantization.plan={suggest}")
    typer.echo(f"next: qpipe report {next(iter(found))}")


def _request(parts: list[str], **options: Any) -> Request:
    """What to measure; options that were not given have the defaults of `Request`."""
    from qpipe.analysis.request import Request, require_used

    given = {key: value for key, value in options.items() if value not in (None, ())}
    request = Request(tuple(parts), **given)
    require_used(parts, given)
    return request


def _check_suggest(suggest: Path | None, within: float | None, bits: int | None, sources: list[str]) -> None:
    from qpipe.files import require_writable

    if suggest is not None:
        require_writable(suggest, "--suggest")
    if suggest is not None and len(sources) > 1 and _is_run(sources[1]):
        raise typer.BadParameter("--suggest makes a plan for one run; name one")
    if suggest is None and (within is not None or bits is not None):
        raise typer.BadParameter("--within and --bits belong to --suggest")


def _track(items: Sequence[T], what: str) -> Iterable[T]:
    """A progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


def _layers(text: str | None) -> tuple[int, ...] | None:
    from qpipe.errors import ConfigError

    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--layer-map {text!r} is no list of layers; give their numbers, from 1, with commas, such as 2,4,6"
        ) from error


def _is_run(source: str) -> bool:
    from qpipe.rundir import CONFIG_NAME

    return (Path(source) / CONFIG_NAME).is_file()


def _inputs(sources: list[str], overrides: list[str], plugins: list[str], out: Path | None) -> list[Path | RunConfig]:
    from qpipe.errors import ConfigError
    from qpipe.launching import prepare
    from qpipe.launching.quantize import configuration

    first, *rest = sources
    if not _is_run(first):
        if len(rest) > 1 or any(_is_run(source) for source in rest):
            raise ConfigError(
                f"{first} is no run directory: name runs only, or one model and at most a configuration file; "
                f"`qpipe quantize {first}` makes a run of a model"
            )
        resolved = configuration(first, Path(rest[0]) if rest else None, overrides, plugins, out, DEFAULT_OUT)
        prepare.check(resolved)
        return [resolved]
    other = next((source for source in rest if not _is_run(source)), None)
    if other is not None or overrides or plugins:
        raise ConfigError(
            f"{first} is a run, which is analyzed as it was trained: leave out configuration, --set and --plugins, or "
            f"name its model: {first}/model" + (f" ({other} is no run directory)" if other else "")
        )
    paths = [Path(source) for source in sources]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("a run is named twice; name each once")
    return list(paths)


def _print(results: dict[str, dict[str, Any]]) -> None:
    if len(results) == 1:
        _print_sites(next(iter(results.values())))
    from qpipe.report.convergence import summary_rows

    columns, rows = summary_rows(results)
    if columns:
        print_table(("run", *columns), rows)


def _print_sites(found: dict[str, Any]) -> None:
    from qpipe.report.analysis import most_outliers, widest

    ablation, outliers, ranges, noise = (found.get(part) for part in ("ablation", "outliers", "ranges", "noise"))
    if ablation:
        rows = [[g["group"], g["sites"], g["without"], g["alone"]] for g in ablation["groups"]]
        print_table((f"{ablation['metric']} of a group", "sites", "all quantized but it", "it alone quantized"), rows)
        typer.echo(f"all quantized {ablation['quantized']:.4f}, none {ablation['full_precision']:.4f}")
    if outliers:
        ranked = most_outliers(outliers["sites"])[:SHOWN]
        rows = [[name, s["count"], _named(s["dimensions"]), _named(s["tokens"])] for name, s in ranked]
        print_table(("site", "outliers", "dimensions", "tokens"), rows)
    if ranges:
        rows = [
            [w.name, f"{w.low:.3g}", f"{w.high:.3g}", w.token, f"{w.span:.3g}", f"{w.median:.3g}"]
            for w in widest(ranges)[:SHOWN]
        ]
        print_table(("site", "least value", "largest", "widest token", "its range", "median token's"), rows)
    if noise:
        least = sorted((v, k) for k, v in noise["sites"].items() if v is not None)[:SHOWN]
        print_table(("site", "SQNR, dB (least first)"), [[name, round(value, 1)] for value, name in least])


def _named(entries: list[list[Any]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count, _ in entries[:3])


def _write(path: Path, ablation: dict[str, Any], model: str) -> None:
    from qpipe.config import yaml_text
    from qpipe.files import write_text

    head = [f"Written by qpipe analyze {model} --suggest: {_outcome(ablation['suggestion'])}", _basis(ablation, model)]
    path.parent.mkdir(parents=True, exist_ok=True)
    rules = yaml_text({"quantization": {"rules": ablation["suggestion"]["rules"]}})
    write_text(path, "".join(f"# {line}\n" for line in head) + rules)


def _basis(ablation: dict[str, Any], model: str) -> str:
    """What the numbers of a suggestion were measured on, and where they hold."""
    measured = f"{ablation['metric']} on {ablation['examples']} validation examples"
    if _is_run(model):
        return f"{measured} of the run as it was trained; trained or quantized by this plan, the model has others."
    return f"{measured}; on these, `qpipe quantize` with this plan, and all else the same, gives the last number."


def _outcome(suggestion: dict[str, Any]) -> str:
    """What a suggestion comes to: the chosen groups with the metric after each, and whether that is near enough."""
    steps = "; ".join(f"{step['group']} {step['metric']:.4f}" for step in suggestion["chosen"])
    text = f"{suggestion['bits']} bits at {steps}" if steps else "no group"
    if suggestion["reached"]:
        return text if steps else "no group needs more bits"
    return f"{text}; no other group helps, and the loss is still more than {suggestion['within']:g}"
