"""The model that is analyzed: a finished run, or one that is quantized as `qpipe quantize` would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qpipe.config import RunConfig, resolve
from qpipe.errors import ConfigError
from qpipe.run import Run
from qpipe.rundir import CONFIG_NAME
from qpipe.stages.execute import record_start
from qpipe.stages.quantize import quantized_model
from qpipe.stages.trained import restore


def load(source: Path | RunConfig) -> Run:
    """A finished run, or a model with the quantizers of a configuration in place, calibrated, on this process.

    Args:
        source: run directory; or what to quantize, whose `out` gets configuration and plan.

    Raises:
        ConfigError: `out` holds the analysis of another configuration.
        QpipeError: the run has not ended, or something that the configuration names is wrong.
    """
    if isinstance(source, Path):
        return restore(source)
    written = Path(source.out) / CONFIG_NAME
    if written.is_file() and resolve(written) != source:
        raise ConfigError(f"{source.out} holds results of another configuration; choose another --out or remove it")
    run = quantized_model(source)
    run.config = source
    record_start(run)
    return run


def loader(source: Path | RunConfig) -> tuple[Path, Callable[[], Run]]:
    """The run directory of what is analyzed, and what loads it.

    A run is loaded when a part needs it; a model at once, so that `out` is known to be its own.

    Raises:
        QpipeError: see `load`.
    """
    if isinstance(source, Path):
        return source, lambda: load(source)
    run = load(source)
    return run.out, lambda: run
