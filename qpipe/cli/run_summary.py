"""What a run directory holds, read from its files alone."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from qpipe.config import resolve
from qpipe.errors import ConfigError
from qpipe.launching import failures
from qpipe.rundir import CHECKPOINTS_NAME, CONFIG_NAME, RESULTS_NAME


def summarize(out: Path) -> dict[str, dict[str, Any]]:
    """Sections of a run: `run`, `last metrics`, `results`, `failure`; those without content are left out.

    Raises:
        ConfigError: the directory holds no run, or a file of it is damaged.
    """
    if not (out / CONFIG_NAME).is_file():
        raise ConfigError(f"{out} is not a run directory: it holds no {CONFIG_NAME}")
    sections = {
        "run": _run(out),
        "last metrics": last_values(out / "metrics.jsonl"),
        "results": _flat(_read_json(out / "results.json")),
        "failure": _failure(out),
    }
    return {title: values for title, values in sections.items() if values}


def _run(out: Path) -> dict[str, Any]:
    config = resolve(out / CONFIG_NAME)
    checkpoints = sorted(p.name for p in (out / CHECKPOINTS_NAME).glob("*") if not p.name.startswith("."))
    export = out / "export"
    size = sum(p.stat().st_size for p in export.rglob("*") if p.is_file()) if export.is_dir() else None
    return {
        "model": config.model.name,
        "task": config.task,
        "plugins": ", ".join(config.plugins) or "none",
        "engine": config.engine.name + (f", ZeRO {config.engine.zero}" if config.engine.name == "deepspeed" else ""),
        "seed": config.seed,
        "checkpoints": ", ".join(checkpoints) or "none",
        "export": f"{size / 1e6:.2f} MB" if size is not None else "none",
        "report": "report.html" if (out / "report.html").is_file() else "none",
    }


def last_values(path: Path) -> dict[str, Any]:
    """The last value of each key in a file of JSON lines.

    A half-written last line is ignored, since a run may be under way.

    Raises:
        ConfigError: a line before the last one is not a JSON object.
    """
    if not path.is_file():
        return {}
    values: dict[str, Any] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            values.update(json.loads(line))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number} is not a JSON object: {error}") from error
    return _flat(values)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: _readable(prefix, value)}
    return {
        k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _readable(key: str, value: Any) -> Any:
    """A date for a time, and lists of numbers without their last digits."""
    if key == "time" and isinstance(value, float | int):
        return datetime.fromtimestamp(value).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    if isinstance(value, list):
        return ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return value


def _failure(out: Path) -> dict[str, Any]:
    failure = failures.first(out)
    results = out / RESULTS_NAME
    # A later start that was no launch, which removes these, may have come to its end.
    if failure and results.is_file() and results.stat().st_mtime > failure.time:
        return {}
    return {"rank": failure.rank, "error": failure.type, "message": failure.message} if failure else {}
