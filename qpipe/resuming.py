"""What a run that goes on has to share with the one that was started."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpipe import rundir
from qpipe.config import INDIFFERENT, RunConfig, resolve
from qpipe.errors import ConfigError


def changes_since_start(out: Path, config: RunConfig) -> list[str]:
    """What `config` would change in the run that was started in `out`; nothing where no run was.

    Its directory may have been moved, or be named in another way, so `out` itself does not count.

    Raises:
        ConfigError: the saved configuration is damaged.
    """
    saved = out / rundir.CONFIG_NAME
    if not saved.is_file():
        return []
    return differences(resolve(saved).model_copy(update={"out": config.out}), config)


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
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
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
