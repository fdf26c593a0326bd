"""What a run reads besides its model's weights, and whether it is still what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpipe.config import RunConfig
from qpipe.data.images import PROCESSOR_FILES
from qpipe.data.locate import locate
from qpipe.errors import ConfigError
from qpipe.files import sha256
from qpipe.resuming import newest_progress
from qpipe.stages.teacher_fit import TOKENIZER_FILES

MORE = ("merges.txt", "added_tokens.json", "special_tokens_map.json")
"""What a tokenizer has besides the files by which it is known."""
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
    found = {key: _summary(Path(locate(value))) for key, value in named.items() if value is not None}
    tokenizer = Path(locate(config.model.tokenizer or config.model.name))
    # Those beside the model only: runs may lie below it, with tokenizers of their own.
    for key, patterns in (("model.tokenizer", (*TOKENIZER_FILES, *MORE)), ("model.processor", PROCESSOR_FILES)):
        files = {file for pattern in patterns for file in tokenizer.glob(pattern)}
        found[key] = _summarized(files, tokenizer)
    return found


def _summary(path: Path) -> dict[str, Any] | None:
    return _summarized(path.rglob("*"), path) if path.is_dir() else _summarized([path], path.parent)


def _summarized(paths: Iterable[Path], base: Path) -> dict[str, Any] | None:
    files = [path for path in paths if path.is_file()]
    if not files:
        return None
    size = sum(file.stat().st_size for file in files)
    return {"files": len(files), "bytes": size, "sha256": None if size > LARGE else _digest(files, base)}


def content_hash(path: Path, below: bool = False) -> str | None:
    """Hash of a file, or of the files in a folder; None for what is not here, such as a name on the hub.

    Args:
        path: of the file or folder.
        below: whether files in folders of the folder count, as they do for data.
    """
    found = (path.rglob("*") if below else path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.is_file()]
    return _digest(files, path if path.is_dir() else path.parent) if files else None


def _digest(files: Iterable[Path], base: Path) -> str:
    hashes = {file.relative_to(base).as_posix(): sha256(file) for file in sorted(files)}
    return hashlib.sha256("".join(f"{name}:{digest};" for name, digest in hashes.items()).encode()).hexdigest()


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
    values["model"]["tokenizer"] = values["model"]["processor"] = config.model.tokenizer or config.model.name
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
