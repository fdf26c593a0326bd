"""The configuration of a launch, and the checks that need no worker."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qpipe import rundir
from qpipe.config import RunConfig, default_recipe, dump, resolve
from qpipe.config.overrides import apply_overrides
from qpipe.errors import ConfigError
from qpipe.launching.topology import Topology
from qpipe.quant.presets import preset_rules


def configuration(
    source: Path | None,
    overrides: Iterable[str],
    plugins: Iterable[str],
    out: Path | None,
    resume: bool,
    node_rank: int,
) -> tuple[RunConfig, RunConfig | None]:
    """Resolve what to run.

    With `resume` and no `source` the run directory's own configuration is the source.

    Returns:
        The configuration, and the one saved in the run directory (None for a new run).

    Raises:
        ConfigError: a key or value is not allowed, or there is nothing to resume.
    """
    overrides = list(overrides)
    if not resume:
        config = resolve(source, overrides, plugins)
        return (_with_out(config, out) if out is not None else config), None
    named = resolve(source, overrides, plugins).out if source else apply_overrides(default_recipe(), overrides)["out"]
    directory = out or Path(str(named))
    saved = _saved_path(directory, node_rank)
    if source is None and saved is None:
        raise ConfigError(
            f"--resume: {directory} holds no {rundir.CONFIG_NAME}; give its CONFIG, or --out with the run"
        )
    config = _with_out(resolve(source or saved, overrides, plugins), directory)
    return config, resolve(saved) if saved else None


def _with_out(config: RunConfig, out: Path) -> RunConfig:
    """Not by an override, which would read a folder called 20261122 as a number."""
    return config.model_copy(update={"out": str(out)})


def _saved_path(out: Path, node_rank: int) -> Path | None:
    for path in (rundir.config_path(out, 0), rundir.config_path(out, node_rank)):
        if path.is_file():
            return path
    return None


def with_device(config: RunConfig, cpu: bool) -> RunConfig:
    """The configuration with `engine.cpu` as the processes will run."""
    if config.engine.cpu == cpu:
        return config
    return config.model_copy(update={"engine": config.engine.model_copy(update={"cpu": cpu})})


def check(config: RunConfig, processes: int = 0) -> None:
    """Find what would fail in every worker, before there are any.

    Args:
        config: resolved configuration.
        processes: how many there will be in all; 0 if only the hostfile says.

    Raises:
        ConfigError: the extra DeepSpeed configuration is missing, not JSON or contradicts the rest, a preset is
            unknown, or the batch cannot be shared out.
        PluginError: a plugin is missing, does not load, or its options are wrong.
    """
    if config.engine.config_file is not None:
        from qpipe.engine.deepspeed import merge_config_file

        merge_config_file({"zero_optimization": {}}, config.engine)
    preset_rules(config.quantization.preset)
    if processes:
        config.train.micro_batch_size(processes)
    from qpipe.host import load_plugins

    load_plugins(config.plugins, builtins=False)


def launch(config: RunConfig, topology: Topology, env: dict[str, str], resume: bool) -> None:
    """Take the run directory, write the configuration and run the workers to their end.

    Raises:
        ConfigError: the directory is in use, or there is nothing to resume.
        WorkerError: a worker failed.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    from contextlib import nullcontext

    from qpipe.files import write_text
    from qpipe.launching.start import start

    out = Path(config.out)
    path = rundir.config_path(out, topology.node_rank)
    # Machines may share the directory, so the first one, which also starts the rendezvous, holds it for all.
    main = topology.node_rank == 0
    with rundir.Lock(out) if main else nullcontext():
        if main:
            check_directory(out, resume)
            rundir.clear_errors(out)
        with rundir.results_aside(out, resume) if main else nullcontext():
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, dump(config))
            start(topology, env, path, resume)


def check_directory(out: Path, resume: bool) -> None:
    """Refuse to start over a run, or to resume where there is none.

    Raises:
        ConfigError: as said.
    """
    if resume:
        rundir.require_resumable(out)
    else:
        rundir.require_unused(out)
