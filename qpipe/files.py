"""Writing files so that a killed process never leaves half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qpipe.errors import CheckpointError, ConfigError


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path.parent):
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, so that a rename afterwards publishes complete files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


DISK_PROBLEMS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EEXIST,
    errno.EISDIR,
)  # fmt: skip
"""The last three: a file is where a folder should be, or the other way round."""


@contextmanager
def disk_errors(folder: Path, advice: str = "choose another folder with --out") -> Iterator[None]:
    """Turn a full or unwritable disk into an error that says how much room there is.

    Args:
        folder: what is written to.
        advice: how to have something else written to.

    Raises:
        CheckpointError: the disk is full, or writing is not allowed, or the folder is none.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_problem(error):
            raise
        free = shutil.disk_usage(existing_folder(folder)).free / 2**20
        # What torch's zip writer and safetensors say of a full disk is about their own insides.
        reason = str(error) if isinstance(error, OSError) else "a file could not be written to its end"
        raise CheckpointError(
            f"cannot write to {folder}: {reason}. {free:.0f} MiB are free there; make room, or {advice}. What was "
            "saved before is untouched"
        ) from error


def is_disk_problem(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or that something may not or cannot be written there."""
    if isinstance(error, OSError):
        return error.errno in DISK_PROBLEMS
    if isinstance(error, SafetensorError):
        return is_full(error)
    # torch.save reports a failed write as a RuntimeError of its zip writer.
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error))


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and ("os error 28" in str(error) or "No space left" in str(error))


def existing_folder(path: Path) -> Path:
    """The nearest of a path and its parents that is there, and can be seen."""
    while not os.path.exists(path) and path != path.parent:  # where pathlib raises in a folder that one may not enter
        path = path.parent
    return path


def require_writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
        path: of the file, whose folders may be missing yet.
        option: what the message calls it, such as `--out`.

    Raises:
        ConfigError: it is a folder, or a file cannot be made where it would be.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path} is a folder; name a file, such as {path / 'result'}{path.suffix}")
    _try_file_in(path.parent, f"{option} {path}")


def require_writable_folder(path: Path, option: str) -> None:
    """Refuse a folder that could not be filled, before the work whose result it is to hold.

    Args:
        path: of the folder, which may be missing yet.
        option: what the message calls it, such as `--out`.

    Raises:
        ConfigError: it is a file, or no file can be made in it.
    """
    _try_file_in(path, f"{option} {path}")


def _try_file_in(folder: Path, what: str) -> None:
    there = existing_folder(folder.absolute())
    if not there.is_dir():
        raise ConfigError(f"{what} cannot be written: {there} is a file, not a folder; choose another path")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{what} cannot be written: {error}; choose another path, or allow writing there") from error
