"""The model that is analyzed: a finished run, or one that is quantized as `qpipe quantize` would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qpipe.analysis.request import NEEDS_TEACHER, Request
from qpipe.analysis.session import Source
from qpipe.analysis.teacher import reference_model
from qpipe.analysis.weights import Role
from qpipe.config import ModelConfig, RunConfig, resolve
from qpipe.data.locate import locate
from qpipe.errors import ConfigError
from qpipe.run import Run
from qpipe.rundir import CONFIG_NAME
from qpipe.stages.execute import record_start
from qpipe.stages.quantize import quantized_model
from qpipe.stages.trained import read_config, require_trained, restore


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


def check(given: Sequence[Path | RunConfig], request: Request) -> None:
    """Refuse runs that cannot be measured, before any of them is.

    Raises:
        CheckpointError: a run has not ended, and more than its curves is asked for.
        ConfigError: a run learned from no teacher, and is to be compared with it.
    """
    for out in (source for source in given if isinstance(source, Path)):
        if set(request.parts) - {"curves"}:
            require_trained(out)
        if set(request.parts) & set(NEEDS_TEACHER):
            reference_model(out, read_config(out), True, request.teacher)


def source_of(given: Path | RunConfig) -> Source:
    """The run directory of what is analyzed, what loads it, and where its weights are.

    A run is loaded when a part needs it; a model at once, so that `out` is known to be its own.

    Raises:
        QpipeError: see `load`.
    """
    if isinstance(given, Path):
        return Source(given, lambda: load(given), lambda role, teacher: _of_run(given, role, teacher))
    run = load(given)
    return Source(run.out, lambda: run, lambda role, teacher: _of_model(given, role, teacher))


def _of_run(out: Path, role: Role, teacher: str | None) -> str | None:
    """Where a model of a run that has ended is."""
    return str(out / "model") if role == "student" else _teacher(out, read_config(out), True, teacher)


def _of_model(config: RunConfig, role: Role, teacher: str | None) -> str | None:
    """Where a model is that is quantized for the analysis, or its teacher."""
    if role == "teacher":
        return _teacher(Path(config.out), config, False, teacher)
    return _where(config.model.model_copy(update={"name": locate(config.model.name)}))


def _teacher(out: Path, config: RunConfig, trained: bool, given: str | None) -> str | None:
    """See `reference_model`; None where it fails, so that loading the teacher says what is wrong."""
    try:
        return _where(reference_model(out, config, trained, given))
    except ConfigError:
        return None


def _where(model: ModelConfig) -> str | None:
    """Its folder or name on the hub; None for a revision there, whose files cannot be told from others."""
    return model.name if model.revision is None or Path(model.name).is_dir() else None
