"""`qpipe inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qpipe.cli.options import ConfigArgument, JsonOption, PluginsOption, RunArgument, SetOption, split_names
from qpipe.cli.output import print_json, print_table

app = typer.Typer(help="Look at a plan, a run or a packed checkpoint.", no_args_is_help=True)


@app.command()
def plan(
    config: ConfigArgument = None,
    plugins: PluginsOption = "",
    set_: SetOption = None,
    show_config: Annotated[bool, typer.Option("--config", help="Print the resolved configuration too.")] = False,
    show_sites: Annotated[bool, typer.Option("--sites", help="List every site that a rule could name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what would be quantized, and how, and count the activations by their role. Trains nothing."""
    from qpipe.config import dump, resolve
    from qpipe.launching.worker import quiet_libraries

    quiet_libraries()
    from qpipe.stages import plan_run

    resolved = resolve(config, set_ or [], split_names(plugins))
    if show_sites:
        from qpipe.stages import sites_of

        _print_sites(sites_of(resolved), as_json)
        return
    run = plan_run(resolved)
    role = run.instruments.map.role
    rows = [{"site": name, "role": role(name), **_site(site)} for name, site in run.plan.sites.items()]
    if as_json:
        print_json({"config": resolved.model_dump(mode="json"), "sites": rows} if show_config else rows)
        return
    if show_config:
        typer.echo(dump(resolved))
    columns = ("site", "quantizer", "bits", "granularity", "options")
    print_table(columns, [[*(row[c] for c in columns[:-1]), _pairs(row["options"])] for row in rows])
    counts = Counter(row["role"] for row in rows)
    weights = counts.pop("weight", 0)
    typer.echo(f"{len(rows)} sites: {weights} weights, {counts.total()} activations")
    if counts:
        typer.echo("")
        print_table(("activation", "sites"), counts.items())


def _print_sites(sites: Mapping[str, Any], as_json: bool) -> None:
    """Every site with the module it belongs to; needs no rule to be right."""
    rows = [{"site": name, "module": s.module_type, "shape": list(s.shape)} for name, s in sites.items()]
    if as_json:
        print_json(rows)
        return
    print_table(("site", "module", "shape"), [[r["site"], r["module"], r["shape"] or ""] for r in rows])
    typer.echo(f"{len(rows)} sites")


def _site(site: Any) -> dict[str, Any]:
    options = site.options.model_dump(mode="json", exclude={"bits", "granularity"})
    return {"quantizer": site.quantizer, "bits": site.bits, "granularity": site.granularity, "options": options}


def _pairs(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items() if value is not None)


@app.command()
def run(directory: RunArgument, as_json: JsonOption = False) -> None:
    """Summarize a run directory."""
    from qpipe.cli.run_summary import summarize

    summary = summarize(directory)
    if as_json:
        print_json(summary)
        return
    for section, values in summary.items():
        print_table((section, ""), values.items())


@app.command()
def checkpoint(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed checkpoint.", exists=True, file_okay=False)],
    as_json: JsonOption = False,
) -> None:
    """List the tensors of a packed checkpoint."""
    from qpipe.export.inspect import describe

    rows = describe(directory)
    if as_json:
        print_json(rows)
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(columns, [[row.get(column) for column in columns] for row in rows])


@app.command()
def sensitivity(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CONFIG", help="Run directory, or YAML configuration.", exists=True)
    ],
    bits: Annotated[str, typer.Option(help="Widths to try, with commas.")] = "2,3,4,8",
    examples: Annotated[int, typer.Option(min=1, help="Training examples to measure the loss on.")] = 512,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", metavar="PATTERN", help="Weights to measure. Default: all quantized ones."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Choose widths that fit: 3.2bit per weight, or 12MB.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the chosen plan (quantization.plan).")] = None,
    format: Annotated[
        str | None, typer.Option(help="Exporter whose file is to fit. Default: the configured export.format.")
    ] = None,
    plugins: PluginsOption = "",
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what quantizing each weight alone costs, and choose a width for each.

    The cost is the increase of the loss on training data with everything else in full precision. With --budget, the
    widths with the smallest sum of increases that fit are chosen, and --out writes them as quantization rules.
    """
    from qpipe.cli.sensitivity import Request, inspect_sensitivity

    if out is not None and budget is None:
        raise typer.BadParameter("--out writes a chosen plan; give a --budget too")
    if source.is_dir() and (plugins or set_):
        raise typer.BadParameter("--plugins and --set belong to a configuration; a run keeps its own")
    request = Request(source, bits, examples, tuple(sites or ()), budget, out, format)
    inspect_sensitivity(request, split_names(plugins), set_ or [], as_json)
