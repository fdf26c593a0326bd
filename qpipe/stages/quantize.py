"""Quantize: a fine-tuned model becomes a packed one without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpipe.config import PtqConfig, RunConfig
from qpipe.data.loading import find_task, load_data
from qpipe.engine.accelerate import AccelerateEngine
from qpipe.errors import ConfigError
from qpipe.host import Host, load_plugins, report_error
from qpipe.run import Run
from qpipe.rundir import require_unquantized
from qpipe.stages.build import build
from qpipe.stages.calibrate import calibrate
from qpipe.stages.casting import cast
from qpipe.stages.evaluate import evaluate
from qpipe.stages.execute import conclude, record_start, timed
from qpipe.stages.initialize import initialize, require_data
from qpipe.stages.prepare import prepare
from qpipe.stages.ranges import initialize_ranges
from qpipe.stages.self_check import self_check
from qpipe.stages.teacher_fit import require_own_labels
from qpipe.stages.trained import alone


def quantize(config: RunConfig) -> Run:
    """Build, prepare, initialise, calibrate, evaluate, export and verify, on this process.

    Leaves a run directory like that of a training, with no steps in it.

    Args:
        config: resolved configuration; `model` is a model that was fine-tuned for the task.

    Raises:
        QpipeError: something in the configuration, the model or the data is wrong.
    """
    config, host = _for_quantization(config)
    run: Run | None = None
    try:
        seconds: dict[str, float] = {}
        with timed(seconds, "build"):
            require_unquantized(Path(config.out))
            run = _prepared(config, host)
        record_start(run)
        with timed(seconds, "evaluate"), unquantized(run):
            run.results["teacher"] = evaluate(run)
        with timed(seconds, "quantize"):
            _set_up(run)
        with timed(seconds, "evaluate"):
            run.results["evaluation"] = evaluate(run)
        run.results["steps"] = 0
        conclude(run, seconds)
    except BaseException as error:
        report_error(host, run, error)
        raise
    return run


def quantized_model(config: RunConfig) -> Run:
    """The model as `quantize` makes it, on this process; nothing is evaluated or written.

    Raises:
        QpipeError: something in the configuration, the model or the data is wrong.
    """
    run = _prepared(*_for_quantization(config), required=False)
    if run.plan.sites:
        _set_up(run)
    return run


def _for_quantization(config: RunConfig) -> tuple[RunConfig, Host]:
    config = alone(config)
    if config.quantization.ptq is None:
        changed = config.quantization.model_copy(update={"ptq": PtqConfig()})
        config = config.model_copy(update={"quantization": changed})
    host = load_plugins(config.plugins)
    refuse_teachers(host)
    return config, host


def _prepared(config: RunConfig, host: Host, required: bool = True) -> Run:
    """The model with its quantizers in place; `required`: an empty plan is an error."""
    engine = AccelerateEngine(config.engine)
    data = load_data(config, find_task(host.collect("qpipe_tasks"), config.task))
    require_own_labels(config, data)
    run = build(config, host, engine, data=data, strict=True)
    prepare(run)
    if required and not run.plan.sites:
        raise ConfigError("nothing is planned to be quantized; give a preset (--set quantization.preset=w4) or rules")
    require_data(run)
    cast(run.student, run)
    engine.serve(run.student)
    return run


def _set_up(run: Run) -> None:
    initialize(run)
    initialize_ranges(run)
    calibrate(run)
    self_check(run)


def refuse_teachers(host: Host) -> None:
    """Refuse plugins that learn from a teacher, since nothing is learned here.

    Raises:
        ConfigError: as said.
    """
    for name, plugin in host.plugins.items():
        if plugin.needs_teacher:
            raise ConfigError(
                f"plugin {name!r} trains with a teacher, and `qpipe quantize` trains nothing; leave it out"
            )


@contextmanager
def unquantized(run: Run) -> Iterator[None]:
    """Within, no quantizer acts."""
    run.instruments.context.enabled = False
    try:
        yield
    finally:
        run.instruments.context.enabled = True
