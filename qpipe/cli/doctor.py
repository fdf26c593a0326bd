"""`qpipe doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qpipe.cli.options import JsonOption
from qpipe.cli.output import print_json, print_table


def doctor(
    out: Annotated[Path, typer.Option(help="Folder that runs will be written to.")] = Path("."),
    as_json: JsonOption = False,
) -> None:
    """Look at packages, devices, compilers, memory and disk. Exit code 1 if training is impossible."""
    from qpipe.doctor import examine

    findings = examine(out)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(("", "found", "status"), [(f.topic, f.found, f.status) for f in findings])
        advice = [f for f in findings if f.advice]
        for finding in advice:
            typer.echo(f"{finding.status}: {finding.topic}: {finding.found}\n  -> {finding.advice}")
        if not advice:
            typer.echo("no problems found")
    if any(finding.status == "fatal" for finding in findings):
        raise typer.Exit(1)
