"""`docs/cli.md`: every command with its arguments and options, as `--help` gives them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from reference_text import table

from qpipe.cli import app

INTRODUCTION = """# Command line

`qpipe COMMAND --help` prints the same. A problem is one message on stderr and exit code 1, wrong usage exit code 2;
`QPIPE_TRACEBACK=1` shows the traceback instead."""


def commands(command: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    """Every command below a group, with its context, depth first."""
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        inner = type(context)(child, info_name=name, parent=context)
        if hasattr(child, "list_commands"):
            yield from commands(child, inner)
        else:
            yield child, inner


def page(root: Path) -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    context = group.make_context("qpipe", [], resilient_parsing=True)
    parts = [INTRODUCTION]
    for command, inner in commands(group, context):
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        text = inspect.cleandoc(command.help or "")
        parts.append(f"\n## `{inner.command_path}`\n\n{text}\n\n```text\n{usage}\n```\n")
        rows = [(f"`{record[0]}`", record[1]) for record in _records(command, inner)]
        parts.append(table(("option", "meaning"), rows))
    return "\n".join(parts) + "\n"


def _records(command: Any, context: Any) -> Iterator[tuple[str, str]]:
    for parameter in command.get_params(context):
        if parameter.name == "help":
            continue
        record = parameter.get_help_record(context)
        if record is not None:
            yield record
