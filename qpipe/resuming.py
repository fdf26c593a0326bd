"""What a run that goes on has to share with the one that was started."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpipe import rundir
from qpipe.config import INDIFFERENT, RunConfig
from qpipe.errors import ConfigError


def as_run(config: RunConfig, device: str, precision: str) -> dict[str, Any]:
    """The values of a configuration, with what `auto` and a missing GPU made of them on this machine.

    Args:
        config: resolved configuration.
        device: kind of device that the processes use, such as `cpu`.
        precision: type in which they compute.
    """
    engine = config.engine.model_copy(update={"cpu": device == "cpu", "precision": precision})
    values: dict[str, Any] = config.model_copy(update={"engine": engine}).model_dump(mode="json")
    return values


def changes_since_checkpoint(out: Path, config: RunConfig, device: str) -> list[str]:
    """What `config` would change in the run whose newest checkpoint is in `out`, in words; nothing without one.

    The run directory may have been moved, or be named in another way, so `out` itself does not count.

    Args:
        out: the run directory.
        config: resolved configuration.
        device: as in `as_run`.
    """
    progress = newest_progress(out)
    if progress is None or "config" not in progress:
        return []
    precision = config.engine.precision
    now = as_run(config, device, progress["precision"] if precision == "auto" else precision)
    return compared({**progress["config"], "out": now["out"]}, now)


def refuse_changes(out: Path, changes: Iterable[str]) -> None:
    """Refuse to go on with a run under another configuration, once it has a checkpoint.

    Args:
        out: the run directory.
        changes: as `differences` words them.

    Raises:
        ConfigError: a key that decides the result was changed.
    """
    decisive = [change for change in changes if not change.startswith(INDIFFERENT)]
    if decisive and newest_progress(out) is not None:
        raise ConfigError(
            f"--resume cannot change what was started: {'; '.join(decisive)}. Leave that out to go on with {out}, or "
            f"start another run with another --out (model.name={out / 'model'} starts from a finished run's weights)"
        )


def newest_progress(out: Path) -> dict[str, Any] | None:
    """Where the newest checkpoint of a run stands (`step`, `world_size`, ...), None if there is no readable one."""
    for path in sorted((out / rundir.CHECKPOINTS_NAME).glob("step-*/progress.json"), reverse=True):
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        return found
    return None


def saved_processes(out: Path, nodes: int) -> int | None:
    """Processes per machine that a run has to go on with; None if it may have any number.

    Raises:
        ConfigError: its processes cannot be spread over this number of machines.
    """
    progress = newest_progress(out) or newest_progress(out / "teacher")
    if progress is None:
        return None
    count = int(progress["world_size"])
    if count % nodes:
        raise ConfigError(
            f"{out} was trained by {count} processes, which {nodes} machines cannot share equally; "
            "resume on as many machines as before"
        )
    return count // nodes


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for each value that differs, in the order of the configuration."""
    return compared(old.model_dump(mode="json"), new.model_dump(mode="json"))


def compared(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`differences` of configurations as mappings. Plugins act in their order, which counts too."""
    before, after = _flatten(old), _flatten(new)
    order = [list(values.get("plugins", ())) for values in (old, new)]
    if order[0] != order[1] and sorted(order[0]) == sorted(order[1]):
        before["order of plugins"], after["order of plugins"] = order
    missing = object()

    def show(value: Any) -> str:
        return "not set" if value is missing else json.dumps(value)

    keys = dict.fromkeys([*before, *after])
    pairs = ((key, before.get(key, missing), after.get(key, missing)) for key in keys)
    return [f"{key}: {show(a)} -> {show(b)}" for key, a, b in pairs if a != b]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    if not value and prefix:
        return {prefix: {}}
    return {
        k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }
