"""The stages in a row, and entry points for finished runs."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from qpipe.config import RunConfig, dump
from qpipe.data.loading import TaskData, find_task, load_data
from qpipe.engine import connect
from qpipe.engine.base import Engine
from qpipe.engine.tracking import require_installed
from qpipe.errors import CheckpointError, ConfigError, FormatError
from qpipe.export.folder import refuse_foreign
from qpipe.export.inspect import sizes
from qpipe.export.verify import verify
from qpipe.files import disk_errors, write_json, write_text
from qpipe.host import Host, load_plugins, report_error
from qpipe.resuming import changes_since_checkpoint, refuse_changes
from qpipe.run import Run
from qpipe.rundir import require_checkpoint, require_unused
from qpipe.stages import checkpoint
from qpipe.stages.attention import require_attention
from qpipe.stages.build import build
from qpipe.stages.calibrate import calibrate
from qpipe.stages.evaluate import evaluate
from qpipe.stages.export import export
from qpipe.stages.initialize import initialize, needs_data, require_data
from qpipe.stages.input_files import refuse_changed_files
from qpipe.stages.prepare import prepare, refuse_unexportable, wrap
from qpipe.stages.ranges import initialize_ranges
from qpipe.stages.recomputing import recompute
from qpipe.stages.self_check import self_check
from qpipe.stages.signal_cache import require_folder
from qpipe.stages.teacher import ensure_teacher, is_needed, require_fine_tunable, stand_in
from qpipe.stages.teaching import placement, require_cacheable, wanted_signals
from qpipe.stages.train import collect_losses, total_steps, train
from qpipe.stages.trained import alone, read_results, restore, save_float
from qpipe.types import Site

logger = logging.getLogger("qpipe.stages")

ABOUT_EXPORT = {"reloaded", "verified", "size"}
"""Results of a run that are about the files of its export."""

UNVERIFIED = "results-unverified.json"
"""What a run has measured whose export could not be verified."""

UNDECIDED = 10**9
"""Optimizer steps of a training whose length nobody knows yet: more than any has, so that every phase fits."""


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Say that a stage begins, and add the time spent in it to `seconds[name]`."""
    logger.info("stage: %s", name)
    started = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 2)


def execute(config: RunConfig, resume: bool = False) -> Run:
    """Run every stage: build, prepare, calibrate, train, evaluate, export, verify.

    Args:
        config: resolved configuration.
        resume: go on from the newest checkpoint in `config.out`.

    Raises:
        QpipeError: something in the configuration, the data or a plugin is wrong, `config.out` holds a run that is not
            to be resumed, or the run failed.
    """
    require_installed(config.train.trackers)
    host = load_plugins(config.plugins)
    seconds: dict[str, float] = {}
    run: Run | None = None
    try:
        run = assemble(config, host, seconds, resume)
        run.results["seconds"] = seconds
        started = resume and bool(checkpoint.steps(run.out))
        record_start(run, config)
        with timed(seconds, "calibrate"):
            if not started:
                calibrate(run)
                self_check(run)
        with timed(seconds, "train"):
            train(run, resume=resume)
        conclude(run, seconds)
    except BaseException as error:
        report_error(host, run, error)
        raise
    return run


def assemble(config: RunConfig, host: Host, seconds: dict[str, float], resume: bool = False) -> Run:
    """Teacher, build, prepare and wrap: everything before the first batch."""
    # Teacher and data are known by the configuration as it was given; only the training goes on as it began.
    begun = checkpoint.as_begun(config) if resume else config
    with timed(seconds, "build"):
        engine = connect(begun.engine)
        refuse_used(config, engine, resume)
        require_shared(Path(config.out), engine)
        if config.teacher.cache is not None:
            require_folder(Path(config.teacher.cache).expanduser())
        original = load_data(config, find_task(host.collect("qpipe_tasks"), config.task))
    data = original
    if host.is_used("qpipe_training_data"):
        with timed(seconds, "data"):
            data = training_data(config, host, engine, original)
    teacher: str | None = None
    teacher_metrics: dict[str, float] = {}
    rehearsal = cache(lambda: rehearse(config, engine, data))
    begins = not (resume and checkpoint.steps(Path(config.out)))
    if is_needed(config, host):
        with timed(seconds, "teacher"):
            teacher, teacher_metrics = ensure_teacher(config, host, original, rehearsal)
    if begins and needs_data(config.quantization.ptq):
        rehearsal()
    with timed(seconds, "build"):
        run = build(begun, host, engine, teacher, data)
        if teacher_metrics:
            run.results["teacher"] = teacher_metrics
        run.total_steps = total_steps(run)
        prepare(run)
    if begins:
        if needs_data(config.quantization.ptq):
            with timed(seconds, "initialize"):
                initialize(run)
        with timed(seconds, "calibrate"):
            initialize_ranges(run)
    with timed(seconds, "build"):
        wrap(run)
    return run


def training_data(config: RunConfig, host: Host, engine: Engine, data: TaskData) -> TaskData:
    """What a plugin makes of the data; the data as they are if none makes anything of them. Collective.

    What only the changed data can tell, the length of the training above all, is checked when they are there.

    Raises:
        QpipeError: a plugin cannot do with these data what it was asked to, or, found before it begins, the rest of
            the configuration does not fit.
    """
    require_fine_tunable(config, host, data)
    rehearse(config, engine, data, config.train.max_steps or UNDECIDED)
    task = find_task(host.collect("qpipe_tasks"), config.task)
    changed = host.hook.qpipe_training_data(config=config, task=task, data=data, engine=engine)
    return data if changed is None else changed


def refuse_used(config: RunConfig, engine: Engine, resume: bool) -> None:
    """Refuse to start over a run, or to go on with one as another.

    Raises:
        ConfigError: the run directory holds one, and it is not to be resumed, or was started with values that decide
            the result and are others now; or its folder `export` holds other files, which would be replaced.
    """
    problem, out = None, Path(config.out)
    if engine.rank == 0:
        try:
            if resume:
                require_checkpoint(out)
                refuse_changes(out, changes_since_checkpoint(out, config, engine.device.type))
                refuse_changed_files(out, config)
            else:
                require_unused(out)
            refuse_foreign(out / "export")
        except (ConfigError, FormatError, OSError, ValueError) as error:  # the other processes wait for the answer
            problem = str(error)
    problem = engine.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)


SEEN_WITHIN = 60.0
"""Seconds within which a network file system shows what another machine has written."""


def require_shared(out: Path, engine: Engine) -> None:
    """Refuse a run directory that is not one and the same for all processes: their checkpoints would not be whole.

    Raises:
        ConfigError: processes on other machines have a directory of their own.
    """
    if engine.world_size == 1:
        return
    note, text = out / ".shared", None
    if engine.rank == 0:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            text = uuid.uuid4().hex
            write_text(note, text)
    text = engine.broadcast_object(text)
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := note.is_file() and note.read_text() == text) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = sorted({host for host in engine.gather_objects("" if seen else socket.gethostname()) if host})
    if engine.rank == 0:
        note.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"run directory {out}: {', '.join(blind)} cannot see what the first machine writes there; choose an --out "
            "on storage that all machines share"
        )


def rehearse(config: RunConfig, engine: Engine, data: TaskData, steps: int | None = None) -> None:
    """Prepare the run as if all it needs were there already, so that what is wrong shows before anything long begins.

    The run's own model stands in for a teacher that is to be fine-tuned.

    Args:
        config: resolved configuration.
        engine: connected.
        data: what the run trains on, or what a plugin has yet to change.
        steps: optimizer steps of the training, where the data do not decide them yet.

    Raises:
        QpipeError: rules, options, plugins or export format do not fit the model.
    """
    log = logging.getLogger("qpipe")
    level = log.level
    log.setLevel(logging.WARNING)  # plugins tell what they do when it is done
    try:
        host = load_plugins(config.plugins)
        teacher = stand_in(config, data) if is_needed(config, host) else None
        run = build(without_compiling(config), host, engine, teacher, data)
        run.total_steps = total_steps(run) if steps is None else steps
        prepare(run)
        recompute(run)
        require_data(run, decided=steps is None)
        wanted = wanted_signals(run)
        if config.teacher.cache is not None:
            require_cacheable(run, wanted.teacher)
        if run.teacher is not None:
            placement(run)
        require_attention(run, wanted)
        collect_losses(run)
    finally:
        log.setLevel(level)


def without_compiling(config: RunConfig) -> RunConfig:
    """The same run, which compiles only what it is told to: a rehearsal is too short for compiling to pay."""
    if config.quantization.compile != "auto":
        return config
    return config.model_copy(update={"quantization": config.quantization.model_copy(update={"compile": "off"})})


def record_start(run: Run, config: RunConfig | None = None) -> None:
    """Write configuration and plan into the run directory, in place of those of an attempt that came to nothing.

    Args:
        run: prepared.
        config: as it was given, where the run has another, such as one with the precision that it began with.
    """
    if run.engine.rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        write_text(run.out / "config.yaml", dump(config or run.config))
        write_text(run.out / "plan.json", run.plan.dumps())
    run.engine.barrier()


def conclude(run: Run, seconds: dict[str, float]) -> None:
    """Save the trained model, export, verify, and write `results.json`. Without a plan there is nothing to export."""
    save_float(run, run.out / "model")
    folder: Path | None = None
    if run.plan.sites:
        with timed(seconds, "export"):
            folder = export(run)
    run.engine.leave()  # verification is process 0's work, and may take longer than the others could wait
    if run.engine.rank != 0:
        return
    run.results["seconds"] = seconds
    doubtful = run.out / UNVERIFIED
    kept = f"what was measured is kept in {doubtful}"
    if folder is not None:
        write_json(doubtful, run.results)  # `results.json` would say that the run is complete
        with timed(seconds, "verify"):
            # A program that this process has just written is no stranger's code.
            try:
                result = verify(folder, trust_remote_code=run.config.model.trust_remote_code, run_program=True)
            except OSError as error:  # such as a full disk of temporary files
                raise CheckpointError(f"the export could not be verified: {error}; {kept}") from error
        run.results["reloaded"] = result.metrics
        run.results["verified"] = result.passed
        run.results["size"] = sizes(folder)
        if not result.passed:
            write_json(doubtful, run.results)
            raise CheckpointError("\n".join(["the export does not verify:", *result.lines(), kept]))
    write_json(run.out / "results.json", run.results)
    doubtful.unlink(missing_ok=True)


def plan_run(config: RunConfig) -> Run:
    """A run with its plan made, on one process and without training: what `inspect plan` shows.

    Raises:
        QpipeError: model, rules or plugins are wrong.
    """
    lonely = alone(config)
    run = build(lonely, load_plugins(config.plugins), connect(lonely.engine))
    prepare(run)
    return run


def sites_of(config: RunConfig) -> Mapping[str, Site]:
    """Every site of the configured model, without making a plan; so it also helps where a rule is wrong."""
    lonely = alone(config)
    return build(lonely, load_plugins(config.plugins), connect(lonely.engine)).instruments.sites


def evaluate_run(run_dir: Path) -> dict[str, float]:
    """Metrics of a trained run's quantized model, computed on this process."""
    return evaluate(restore(Path(run_dir)))


def export_run(run_dir: Path, format: str | None = None, out: Path | None = None) -> Path:
    """Export a trained run again, for example in another format.

    Results about the run's own export, if that is replaced, go with it: nobody has verified the new one.

    Raises:
        FormatError: the format cannot hold the run, or the folder holds something else.
        QpipeError: see `restore`.
    """
    own = Path(run_dir) / "export"
    refuse_foreign(out or own)
    run = restore(Path(run_dir))
    refuse_unexportable(run, format)
    run.results |= read_results(Path(run_dir))
    run.results["evaluation"] = evaluate(run)
    folder = export(run, format, out)
    if folder.resolve() == own.resolve() and run.results.keys() & ABOUT_EXPORT:
        kept = {name: value for name, value in run.results.items() if name not in ABOUT_EXPORT}
        write_json(Path(run_dir) / "results.json", {**kept, "size": sizes(folder)})
    return folder
