"""`qpipe launch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qpipe.cli.options import ConfigArgument, PluginsOption, SetOption, split_names

if TYPE_CHECKING:
    from qpipe.config import RunConfig
    from qpipe.launching.topology import Topology


def launch(
    config: ConfigArgument = None,
    plugins: PluginsOption = "",
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs per machine.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPU processes per machine.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines in all.")] = 1,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Number of this machine, from 0.")] = None,
    rendezvous: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Machines for DeepSpeed's launcher, by ssh.")] = None,
    zero: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage (engine.zero).")] = None,
    engine: Annotated[Literal["deepspeed", "accelerate"] | None, typer.Option(help="Engine (engine.name).")] = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run directory (out).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run directory.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and do nothing.")] = False,
) -> None:
    """Train on the GPUs or CPUs of one or more machines.

    Without CONFIG the built-in recipe runs. With --resume and no CONFIG, the configuration of the run directory does.
    Without --gpus and --cpus: all GPUs, or 2 CPU processes where there are none.
    """
    _check_usage(gpus, cpus, nodes, node_rank, rendezvous, hostfile, zero, engine)
    from qpipe import resuming
    from qpipe.launching import prepare, topology

    rank = node_rank or 0
    overrides = [*(set_ or []), *_engine_overrides(zero, engine)]
    resolved, saved = prepare.configuration(config, overrides, split_names(plugins), out, resume, rank)
    directory = Path(resolved.out)
    if resume and hostfile is None:
        gpus, cpus = _as_before(directory, nodes, gpus, cpus, (saved or resolved).engine.cpu)
    prefer_cpu = (saved or resolved).engine.cpu
    where = topology.choose(gpus, cpus, nodes, rank, rendezvous, hostfile, prefer_cpu, dry_run)
    chosen = cpus is not None or prefer_cpu or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if where.cpu and not chosen and (idle := topology.nvidia_devices()):
        typer.echo(f"warning: this torch cannot use {', '.join(idle)}; `qpipe doctor` says more", err=True)
    final = prepare.with_device(resolved, where.cpu)
    prepare.check(final, where.processes * where.nodes)
    # The directory may have been moved, or named in another way.
    before = saved.model_copy(update={"out": final.out}) if saved else final
    changes = resuming.differences(before, final)
    resuming.refuse_changes(directory, changes)
    if resume and not changes and (directory / "results.json").is_file():
        print_result(directory, "already complete")
        return
    if final.train.trackers:
        from qpipe.engine.tracking import require_installed

        require_installed(final.train.trackers)
    if changes:
        typer.echo("changed since the run was started: " + "; ".join(changes), err=True)
    env = topology.environment(where)
    if dry_run:
        _show(final, where, env, resume)
    else:
        _run(final, where, env, resume)


def _check_usage(
    gpus: int | None,
    cpus: int | None,
    nodes: int,
    node_rank: int | None,
    rendezvous: str | None,
    hostfile: Path | None,
    zero: int | None,
    engine: str | None,
) -> None:
    if gpus is not None and cpus is not None:
        raise typer.BadParameter("give --gpus or --cpus, not both")
    if hostfile is not None and (nodes > 1 or node_rank is not None):
        raise typer.BadParameter("--hostfile names the machines; leave out --nodes and --node-rank")
    if hostfile is None and nodes > 1 and (node_rank is None or rendezvous is None):
        raise typer.BadParameter("--nodes above 1 needs --node-rank (of this machine) and --rendezvous HOST:PORT")
    if node_rank is not None and node_rank >= nodes:
        raise typer.BadParameter(f"--node-rank {node_rank}: the last of {nodes} machines has number {nodes - 1}")
    if zero is not None and engine == "accelerate":
        raise typer.BadParameter("--zero belongs to the engine deepspeed; leave out --zero or --engine accelerate")


def _as_before(
    out: Path, nodes: int, gpus: int | None, cpus: int | None, on_cpus: bool
) -> tuple[int | None, int | None]:
    """GPUs and CPU processes per machine of a run that goes on: those of its checkpoint.

    Raises:
        ConfigError: another number was asked for.
    """
    from qpipe import resuming
    from qpipe.errors import ConfigError

    count = resuming.saved_processes(out, nodes)
    if count is None:
        return gpus, cpus
    asked = gpus if gpus is not None else cpus
    if asked is not None and asked != count:
        raise ConfigError(
            f"{out} was trained by {count} process{'es' if count != 1 else ''} per machine, and goes on bit for bit "
            f"only with as many, not with {asked}; leave out --gpus and --cpus"
        )
    if asked is not None:
        return gpus, cpus
    return (None, count) if on_cpus else (count, None)


def print_result(out: Path, state: str) -> None:
    """The result of a run that has ended, where it is, and what can be done with it."""
    from qpipe.cli.output import console
    from qpipe.report.table import results_table

    console().print(results_table(out))
    export = out / "export"
    typer.echo(f"{state}: {export if export.is_dir() else out / 'model'}")
    typer.echo(f"next: qpipe report {out}")


def _engine_overrides(zero: int | None, engine: str | None) -> list[str]:
    return [*([f"engine.zero={zero}"] if zero is not None else []), *([f"engine.name={engine}"] if engine else [])]


def _show(config: RunConfig, where: Topology, env: dict[str, str], resume: bool) -> None:
    from qpipe import rundir
    from qpipe.config import dump
    from qpipe.launching import command

    path = rundir.config_path(Path(config.out), where.node_rank)
    typer.echo(command.shell_script(command.command(where, path, resume), env, path, dump(config)))


def _run(config: RunConfig, where: Topology, env: dict[str, str], resume: bool) -> None:
    from qpipe.launching import prepare
    from qpipe.launching.start import Interrupted

    kind = "CPU" if where.cpu else "GPU"
    count = f"{where.processes} {kind} process{'es' if where.processes != 1 else ''}"
    per = " per machine" if where.nodes > 1 or where.hostfile else ""
    typer.echo(
        f"run directory {config.out}, {count if where.processes else 'processes from the hostfile'}{per}", err=True
    )
    try:
        prepare.launch(config, where, env, resume)
    except Interrupted as stopped:
        typer.echo(f"{stopped}; continue with: qpipe launch --out {config.out} --resume", err=True)
        raise typer.Exit(128 + stopped.number) from None
    if where.node_rank == 0 and (Path(config.out) / "results.json").is_file():
        export = Path(config.out) / "export"
        print_result(Path(config.out), "exported and verified" if export.is_dir() else "trained")
