"""What a run that goes on has to share with the one that was started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpipe import rundir
from qpipe.config import INDIFFERENT, RunConfig
from qpipe.data.locate import locate
from qpipe.errors import ConfigError
from qpipe.files import sha256


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


LARGE = 2**28
"""Bytes from which on the files of an input are counted and measured, and not read."""


def input_files(config: RunConfig) -> dict[str, Any]:
    """What a run reads besides its own model, as a later start can compare it.

    Returns:
        By key, such as `data.train`: the number of files, their bytes, and where these are not many a hash of all; None
        for what is not on this machine, such as a name on the hub.
    """
    named = {
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        "teacher.name": config.teacher.name,
        "engine.config_file": config.engine.config_file,
    }
    return {key: _summary(Path(locate(value))) for key, value in named.items() if value is not None}


def _summary(path: Path) -> dict[str, Any] | None:
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    if not files:
        return None
    size = sum(file.stat().st_size for file in files)
    names = [file.relative_to(path).as_posix() for file in files]
    text = None if size > LARGE else "".join(f"{n}:{sha256(f)};" for n, f in zip(names, files, strict=True))
    return {"files": len(files), "bytes": size, "sha256": text and hashlib.sha256(text.encode()).hexdigest()}


def refuse_changed_files(out: Path, config: RunConfig) -> None:
    """Refuse to go on with a run after what it reads has changed: its order, length and best metric would be others.

    Args:
        out: the run directory.
        config: resolved configuration.

    Raises:
        ConfigError: files are others than when the newest checkpoint was written.
    """
    before = (newest_progress(out) or {}).get("inputs", {})
    now = input_files(config)
    values = config.model_dump()
    changed = [
        f"{key} ({values[key.partition('.')[0]][key.partition('.')[2]]})"
        for key in now
        if key in before and now[key] != before[key]
    ]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} has changed since the checkpoint in {out} was written; put back what was there to "
            "go on, or start anew with another --out"
        )


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
