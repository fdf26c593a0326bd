"""`qpipe analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qpipe.cli.options import ConfigArgument, JsonOption, PluginsOption, SetOption, split_names
from qpipe.cli.output import print_json, print_table

if TYPE_CHECKING:
    from qpipe.config import RunConfig

ALL = "ablation,outliers,ranges,attention,noise"
SHOWN = 5


ModelArgument = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run directory, or a fine-tuned model: folder or hub name.")
]
By = Annotated[
    Literal["role", "kind", "block", "site"],
    typer.Option(help="Groups of the ablation: sites of a role, a name with any block, a block, or each."),
]
Sites = Annotated[
    list[str] | None, typer.Option("--sites", metavar="PATTERN", help="Activation sites to look at. Default: all.")
]
Examples = Annotated[
    int | None, typer.Option(min=1, help="Validation examples that the ablation evaluates. Default: all.")
]
Sequences = Annotated[int, typer.Option(min=1, help="Validation examples whose activations are looked at.")]
Suggest = Annotated[
    Path | None, typer.Option(help="Write a plan with more bits for the groups that hurt, chosen by the ablation.")
]
Within = Annotated[float, typer.Option(min=0, help="Largest loss of the metric that the plan may have.")]
Bits = Annotated[int, typer.Option(min=2, max=16, help="Width of the sites that the plan picks.")]
Out = Annotated[Path, typer.Option(help="Where results about a model go; those about a run go into it.")]


def analyze(
    model: ModelArgument,
    config: ConfigArgument = None,
    plugins: PluginsOption = "",
    set_: SetOption = None,
    parts: Annotated[str, typer.Option(help="What to measure, with commas.")] = ALL,
    by: By = "role",
    sites: Sites = None,
    examples: Examples = None,
    sequences: Sequences = 10,
    suggest: Suggest = None,
    within: Within = 0.005,
    bits: Bits = 16,
    out: Out = Path("runs/analysis"),
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find out what quantization does to a model, and where.

    For a run, or for a model that is quantized as `qpipe quantize` would: the metric without each group of sites and
    with it alone, outliers and the dimensions and tokens that have them, ranges of tokens, attention, and quantization
    noise. Writes analysis/*.json into the run directory, for `qpipe report`; goes on where it was interrupted.
    """
    from qpipe.launching.worker import quiet_libraries

    source = _source(model, config, set_ or [], split_names(plugins), out)
    quiet_libraries()
    from qpipe.analysis.analyze import Request
    from qpipe.analysis.analyze import analyze as measure
    from qpipe.analysis.load import load

    allowed = within if suggest is not None else None
    request = Request(tuple(split_names(parts)), by, tuple(sites or ()), examples, sequences, allowed, bits)
    run = load(source)
    found = measure(run, request, again, lambda text: typer.echo(text, err=True))
    if suggest is not None:
        _write(suggest, found["ablation"]["suggestion"], model)
    if as_json:
        print_json(found)
        return
    _print(found)
    if suggest is not None:
        typer.echo(f"plan: {suggest}; use it with --set quantization.plan={suggest}")
    typer.echo(f"next: qpipe report {run.out}")


def _source(model: str, config: Path | None, overrides: list[str], plugins: list[str], out: Path) -> Path | RunConfig:
    from qpipe.errors import ConfigError
    from qpipe.launching import prepare
    from qpipe.launching.quantize import configuration
    from qpipe.rundir import CONFIG_NAME

    if (Path(model) / CONFIG_NAME).is_file():
        if config is not None or overrides or plugins:
            raise ConfigError(
                f"{model} is a run, which is analyzed as it was trained: leave out configuration, --set and --plugins, "
                f"or name its model: {model}/model"
            )
        return Path(model)
    resolved = configuration(model, config, overrides, plugins, out)
    prepare.check(resolved)
    return resolved


def _print(found: dict[str, Any]) -> None:
    ablation, outliers, noise = (found.get(part) for part in ("ablation", "outliers", "noise"))
    if ablation:
        rows = [[g["group"], g["sites"], g["without"], g["alone"]] for g in ablation["groups"]]
        print_table((f"{ablation['metric']} of a group", "sites", "all quantized but it", "it alone quantized"), rows)
        typer.echo(f"all quantized {ablation['quantized']:.4f}, none {ablation['full_precision']:.4f}")
    if outliers:
        ranked = sorted(outliers["sites"].items(), key=lambda item: -item[1]["share"])[:SHOWN]
        rows = [[name, s["count"], _named(s["dimensions"]), _named(s["tokens"])] for name, s in ranked]
        print_table(("site", "outliers", "dimensions", "tokens"), rows)
    if noise:
        least = sorted((v, k) for k, v in noise["sites"].items() if v is not None)[:SHOWN]
        print_table(("site", "SQNR, dB (least first)"), [[name, round(value, 1)] for value, name in least])


def _named(entries: list[list[Any]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count, _ in entries[:3])


def _write(path: Path, suggestion: dict[str, Any], model: str) -> None:
    from qpipe.config import yaml_text
    from qpipe.files import write_text

    steps = "; ".join(f"{step['group']} {step['metric']:.4f}" for step in suggestion["chosen"]) or "no group needed"
    head = f"# Written by qpipe analyze {model} --suggest: {suggestion['bits']} bits at {steps}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, head + yaml_text({"quantization": {"rules": suggestion["rules"]}}))
