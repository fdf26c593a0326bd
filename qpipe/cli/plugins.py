"""`qpipe plugins`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qpipe.cli.options import JsonOption
from qpipe.cli.output import print_json, print_table

app = typer.Typer(help="List, show, check and write plugins.", no_args_is_help=True)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the installed plugins without importing them."""
    from qpipe.discovery import installed

    infos = [(i.name, i.distribution, i.version, i.target) for i in installed().values()]
    columns = ("name", "distribution", "version", "target")
    if as_json:
        print_json([dict(zip(columns, info, strict=True)) for info in infos])
    elif infos:
        print_table(columns, infos)
    else:
        typer.echo("no plugin is installed; write one with `qpipe plugins new NAME`")


@app.command()
def show(name: Annotated[str, typer.Argument(help="Plugin name.")], as_json: JsonOption = False) -> None:
    """Show what a plugin does: its hooks and options. Imports it."""
    from qpipe.cli.plugin_info import describe, find

    description = describe(find(name))
    if as_json:
        print_json(description)
        return
    typer.echo(f"{name}  {description['distribution']} {description['version']}  {description['target']}")
    if description["summary"]:
        typer.echo(description["summary"])
    typer.echo("hooks: " + (", ".join(description["hooks"]) or "none"))
    if description["needs_teacher"]:
        typer.echo("needs a teacher")
    if description["quantizers"]:
        print_table(("quantizer", "at", "what it does"), description["quantizers"])
    schema = description["options"]
    required = schema.get("required", ())
    rows = [_option_row(name, key, value, key in required) for key, value in schema.get("properties", {}).items()]
    if rows:
        print_table(("option", "type", "default", "description"), rows)
    else:
        typer.echo("no options")


def _option_row(plugin: str, key: str, schema: dict[str, Any], required: bool) -> tuple[str, str, str, str]:
    import json

    default = "required" if required else json.dumps(schema["default"]) if "default" in schema else "made anew"
    return f"{plugin}.{key}", _type(schema), default, schema.get("description", "")


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type(part) for part in schema["anyOf"])
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema]
    return " ".join([schema.get("type", schema.get("$ref", "any").rpartition("/")[2]), *bounds])


@app.command()
def check() -> None:
    """Import every installed plugin; name each one that fails, and why. Exit code 1 if any does."""
    from qpipe.cli.plugin_info import check as check_plugin
    from qpipe.discovery import installed
    from qpipe.errors import QpipeError

    failed = 0
    infos = installed()
    for info in infos.values():
        try:
            hooks = check_plugin(info)
        except QpipeError as error:
            failed += 1
            typer.echo("FAIL  " + str(error).replace("\n", "\n      "))
        else:
            typer.echo(f"ok    {info.name} ({info.distribution} {info.version}): {', '.join(hooks)}")
    typer.echo(f"{len(infos)} plugins, {failed} failed" if infos else "no plugin is installed")
    if failed:
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Plugin name, such as my-penalty.")],
    directory: Annotated[Path, typer.Option("--dir", help="Folder to make the plugin's folder in.")] = Path("."),
) -> None:
    """Write a working plugin to start from: package, test and README."""
    from qpipe.cli.scaffold import render
    from qpipe.files import require_writable_folder

    require_writable_folder(directory, "--dir")
    folder = render(name, directory)
    typer.echo(f"wrote {folder}")
    typer.echo(f"next:  pip install -e {folder} && pytest {folder} && qpipe launch --plugins {name}")
