"""Writing files so that a killed process never leaves half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpipe.errors import CheckpointError


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
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EEXIST
)  # fmt: skip
"""The last two: a file is where a folder should be."""


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
    except (OSError, RuntimeError) as error:
        if not _is_disk_problem(error):
            raise
        free = shutil.disk_usage(_existing(folder)).free / 2**20
        # What torch's zip writer says of a full disk is about its own insides.
        reason = str(error) if isinstance(error, OSError) else "a file could not be written to its end"
        raise CheckpointError(
            f"cannot write to {folder}: {reason}. {free:.0f} MiB are free there; make room, or {advice}. What was "
            "saved before is untouched"
        ) from error


def _is_disk_problem(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_PROBLEMS
    # torch.save reports a failed write as a RuntimeError of its zip writer.
    return "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
