"""Commands that take a finished run: `export`, `verify`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpipe.cli.options import RunArgument
from qpipe.cli.output import console


def export(
    run: RunArgument,
    format: Annotated[str | None, typer.Option(help="Exporter. Default: the run's export.format.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: RUN/export.")] = None,
) -> None:
    """Write the packed checkpoint of a run."""
    from qpipe.launching.worker import quiet_libraries

    quiet_libraries()
    from qpipe.stages import export_run

    typer.echo(str(export_run(run, format, out)))


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed checkpoint.", exists=True, file_okay=False)],
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the checkpoint run Python code, or a program, that lies in it."),
    ] = False,
) -> None:
    """Prove that a packed checkpoint is the trained model.

    Reloads it in a fresh process without qpipe, and compares weights, logits and the metric. Activations of native
    checkpoints, which no other program quantizes, are quantized by qpipe. A `program.pt2` beside them is code.
    """
    from qpipe.export.verify import verify as verify_directory

    result = verify_directory(directory, trust_remote_code=trust_remote_code)
    for line in result.lines():
        typer.echo(line)
    if not result.passed:
        raise typer.Exit(1)


def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: RUN/report.html.")] = None,
) -> None:
    """Print the result of a run, and write a self-contained HTML report of it."""
    from qpipe.files import require_writable
    from qpipe.report import results_table, write_report

    if out is not None:
        require_writable(out, "--out")
    path = write_report(run, out)
    if (run / "results.json").is_file():
        console().print(results_table(run))
    typer.echo(f"report: {path}")
