"""Holding a run directory: who may write to it, and whether a run is there already."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from qpipe.errors import CheckpointError, ConfigError

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
ERRORS_NAME = "errors"
RESULTS_NAME = "results.json"


def config_path(out: Path, node_rank: int) -> Path:
    """The configuration that the workers of a machine read.

    Only machine 0 writes `config.yaml`, since machines may share the directory.
    """
    return out / (CONFIG_NAME if node_rank == 0 else f".node-{node_rank}.yaml")


TRAINED = (CHECKPOINTS_NAME, "metrics.jsonl", "model", "export", RESULTS_NAME)
"""What a run leaves once it has begun to train; a directory with a configuration alone holds nothing to lose."""


def require_unused(out: Path) -> None:
    """Refuse a directory that holds what a run has produced.

    Raises:
        ConfigError: there are checkpoints, metrics or results.
    """
    _refuse(out, TRAINED, "continue that run with --resume, ")


@contextmanager
def results_aside(out: Path, resume: bool) -> Iterator[None]:
    """Within, a run is not complete; the results of a finished one come back where it goes on in vain.

    A resumed run that is refused, or stopped, has still the model and the export that they were measured with. Its
    configuration comes back with them. Once there is another export they are out of date, and stay away.

    Args:
        out: the run directory.
        resume: whether the run goes on; what an earlier start has put aside belongs to no new one.
    """
    results, aside, config = out / RESULTS_NAME, out / f".{RESULTS_NAME}", out / CONFIG_NAME
    if not resume:
        aside.unlink(missing_ok=True)
    moved = results.is_file()
    before, text = _stamps(out), config.read_bytes() if moved and config.is_file() else None
    if moved:
        results.replace(aside)
    try:
        yield
    finally:
        if results.is_file() or (moved and _stamps(out) != before):
            aside.unlink(missing_ok=True)
        elif moved:
            aside.replace(results)
            if text is not None:
                config.write_bytes(text)


def _stamps(out: Path) -> list[tuple[int, int] | None]:
    """What tells whether an export, or the results of one that did not verify, took the place of others."""
    found = (out / "export", out / "results-unverified.json")
    return [(path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None for path in found]


def require_unquantized(out: Path) -> None:
    """Refuse a directory that holds a training, or a model that was quantized to the end.

    Raises:
        ConfigError: there are checkpoints, metrics or results. Without these, a model or export is what an interrupted
            quantization has left.
    """
    _refuse(out, (CHECKPOINTS_NAME, "metrics.jsonl", RESULTS_NAME))


def _refuse(out: Path, names: Iterable[str], advice: str = "") -> None:
    held = next((name for name in names if (out / name).exists()), None)
    if held is not None:
        raise ConfigError(
            f"run directory {out} is already in use: it holds {held}; {advice}choose another --out, or delete the "
            "directory"
        )


def require_resumable(out: Path) -> None:
    """Refuse to resume where there is no run.

    Raises:
        ConfigError: the directory holds neither a configuration nor a checkpoint; or see `require_checkpoint`.
    """
    if not (out / CONFIG_NAME).exists() and not (out / CHECKPOINTS_NAME).exists():
        raise ConfigError(
            f"nothing to resume in {out}: no {CONFIG_NAME} and no checkpoints; leave --resume out to start"
        )
    require_checkpoint(out)


def require_checkpoint(out: Path) -> None:
    """Refuse to resume what has no checkpoint to go on from, if that would train a finished model's run anew.

    Raises:
        ConfigError: the directory holds a trained or quantized model, and no checkpoint.
    """
    held = next((name for name in ("model", "export", RESULTS_NAME) if (out / name).exists()), None)
    if held is not None and next((out / CHECKPOINTS_NAME).glob("step-*"), None) is None:
        raise ConfigError(
            f"nothing to resume in {out}: it holds {held} and no checkpoint, and would be trained from the beginning; "
            "`qpipe export` writes a finished model again, and another --out starts another run"
        )


def clear_errors(out: Path) -> None:
    """Forget what an earlier attempt reported."""
    shutil.rmtree(out / ERRORS_NAME, ignore_errors=True)


class Lock:
    """Hold `out/.lock` while a run is under way.

    `flock` ties the lock to this process: the kernel frees it when the process ends, however it ends, so a lock never
    outlives a crash. The file's text only says who holds it.

    Raises:
        ConfigError: another process holds the directory; names its process id and host.
        CheckpointError: the directory cannot be made or written to.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Lock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"cannot use run directory {self._path.parent}: {error.strerror}; choose another --out"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._refuse_or_warn(error)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return self

    def _refuse_or_warn(self, error: OSError) -> None:
        """Some network file systems cannot lock; a run there must go on, and say that nothing guards it."""
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            print(
                f"warning: {self._path.parent} is not locked ({error.strerror}); use it once at a time", file=sys.stderr
            )
            return
        text = os.pread(self._descriptor or 0, 4096, 0).decode(errors="replace")
        self.__exit__(None, None, None)
        try:
            holder = json.loads(text)
            who = f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        raise ConfigError(
            f"run directory {self._path.parent} is in use by {who}; wait for it, stop it, or choose another --out"
        ) from error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
