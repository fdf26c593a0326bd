"""`qpipe quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpipe.cli.options import ConfigArgument, PluginsOption, SetOption, split_names


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Fine-tuned model: folder, hub name, or run directory.")
    ],
    config: ConfigArgument = None,
    plugins: PluginsOption = "",
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: `out` of --set or CONFIG, else runs/quantized.")
    ] = None,
) -> None:
    """Quantize a fine-tuned model without training, export and verify it.

    Task, data and plan come from CONFIG; without it from the run that MODEL belongs to, else from the built-in recipe.
    `quantization.ptq` says how ranges are chosen, and whether LAPQ, AdaRound or bias correction improve the weights.
    """
    from qpipe.launching import prepare
    from qpipe.launching.quantize import configuration

    resolved = configuration(model, config, set_ or [], split_names(plugins), out)
    prepare.check(resolved)

    from qpipe.launching.worker import quiet_libraries, show_log
    from qpipe.rundir import Lock, require_unquantized

    quiet_libraries()
    show_log()
    directory = Path(resolved.out)
    typer.echo(f"run directory {directory}", err=True)
    with Lock(directory):
        require_unquantized(directory)
        (directory / "config.yaml").unlink(missing_ok=True)  # of an attempt that came to nothing

        from qpipe.stages import quantize as run_stages

        run_stages(resolved)

    from qpipe.cli.launch import print_result

    print_result(directory, "exported and verified")
