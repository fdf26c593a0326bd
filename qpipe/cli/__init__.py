"""The command line. Modules here import nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import os
import sys

import typer

from qpipe.cli import analyze, doctor, evaluate, inspect, launch, plugins, quantize, runs, train
from qpipe.errors import QpipeError

# typer leaves the default of --help unset, and imports pydantic (0.15 s) to find that nothing is not a boolean.
NO_HELP = {"help": False, "plugins": {"help": False, "list": {"help": False}}}

app = typer.Typer(
    name="qpipe",
    help="Quantization-aware training on DeepSpeed and Accelerate, with plugins, ending in a packed checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,  # coloured help costs 0.1 s
    pretty_exceptions_enable=False,
    add_completion=False,  # its options do the same
    context_settings={"help_option_names": ["-h", "--help"], "default_map": NO_HELP},
)
app.command(name="launch")(launch.launch)
app.command(name="quantize")(quantize.quantize)
app.command(name="train")(train.train)
app.command(name="evaluate")(evaluate.evaluate)
app.command(name="analyze")(analyze.analyze)
app.command(name="export")(runs.export)
app.command(name="verify")(runs.verify)
app.add_typer(inspect.app, name="inspect")
app.add_typer(plugins.app, name="plugins")
app.command(name="report")(runs.report)
app.command(name="doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        from qpipe import __version__

        typer.echo(f"qpipe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line. A `QpipeError` is one message and exit code 1; wrong usage is exit code 2."""
    try:
        app()
    except QpipeError as error:
        if os.environ.get("QPIPE_TRACEBACK") == "1":
            raise
        show_error(error)
        sys.exit(1)


def show_error(error: BaseException) -> None:
    """Print an exception and its notes on stderr, without a traceback."""
    sys.stdout.flush()
    typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo(str(error) or type(error).__name__, err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(f"  {note}", err=True)
