"""`qpipe train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    held: Annotated[bool, typer.Option("--held", hidden=True, help="The launcher holds the run directory.")] = False,
) -> None:
    """Run one process of a training run.

    This is what `launch` starts on every device.
    """
    from qpipe.launching.worker import run_worker

    run_worker(config, resume, held)
