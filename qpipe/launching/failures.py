"""What went wrong in a worker: one file per rank, and the first of them as one message."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qpipe.errors import QpipeError
from qpipe.files import disk_errors, write_json
from qpipe.rundir import ERRORS_NAME

OUTSIDE_SIGNALS = frozenset({signal.SIGKILL, signal.SIGBUS})
"""Signals that come from outside the program, so that they are a cause and never the consequence of a Python error."""


class WorkerError(QpipeError):
    """A worker failed; the message is that of the first one."""


@dataclass(frozen=True)
class Failure:
    """An exception of one rank.

    Attributes:
        rank: global rank.
        time: seconds since the epoch.
        type: class name of the exception.
        message: text of the exception.
        notes: what has been added to it, such as the plugin it came from.
        expected: True for a `QpipeError`, whose message is all that a user needs.
        traceback: formatted traceback.
        host: name of the machine.
    """

    rank: int
    time: float
    type: str
    message: str
    notes: list[str]
    expected: bool
    traceback: str
    host: str


def message_of(error: BaseException) -> str:
    """The text of an exception followed by its notes, one per line."""
    return "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])


def record(out: Path, rank: int, error: BaseException) -> Path:
    """Write `out/errors/rank-N.json`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    failure = Failure(
        rank,
        time.time(),
        type(error).__name__,
        str(error) or type(error).__name__,
        list(getattr(error, "__notes__", ())),
        isinstance(error, QpipeError),
        "".join(traceback.format_exception(error)),
        socket.gethostname(),
    )
    path = out / ERRORS_NAME / f"rank-{rank}.json"
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(failure))
    return path


def first(out: Path) -> Failure | None:
    """The earliest failure that the ranks of a run have recorded."""
    found = [Failure(**json.loads(path.read_text())) for path in sorted((out / ERRORS_NAME).glob("rank-*.json"))]
    return min(found, key=lambda failure: failure.time, default=None)


def summarize(out: Path, exit_codes: Mapping[int, int]) -> WorkerError:
    """One error for a failed run.

    A rank killed from outside makes the others fail too (a broken connection), and they may report first, so it comes
    before them; any other signal comes after a recorded exception.

    Args:
        out: the run directory.
        exit_codes: exit codes by rank as the launcher saw them; negative for signals. SIGTERM is what the launcher ends
            the remaining ranks with.
    """
    ended = {rank: signal.Signals(-code) for rank, code in exit_codes.items() if code < 0}
    killed = {rank: number for rank, number in ended.items() if number != signal.SIGTERM}
    outside = {rank: number for rank, number in killed.items() if number in OUTSIDE_SIGNALS}
    failure = first(out)
    if outside or (killed and failure is None):
        rank, number = next(iter((outside or killed).items()))
        return WorkerError(_signal_message(rank, number))
    if failure is None:
        codes = ", ".join(f"rank {rank}: {code}" for rank, code in exit_codes.items()) or "unknown"
        return WorkerError(
            f"the workers failed without a message (exit codes: {codes}); their output above may say more"
        )
    return _failure_error(out, failure, killed)


def _signal_message(rank: int, number: signal.Signals) -> str:
    if number == signal.SIGKILL:
        hint = (
            "often the system ran out of memory: see `dmesg`, or lower train.batch_size, raise train.accumulation, "
            "set train.activation_checkpointing=true, or use a higher --zero"
        )
    elif number == signal.SIGBUS:
        hint = "often /dev/shm is too small: see `qpipe doctor`"
    else:
        hint = "a native library crashed: run with PYTHONFAULTHANDLER=1 to see where"
    return f"rank {rank} was killed by {number.name}; {hint}. Continue from the last checkpoint with --resume"


def _failure_error(out: Path, failure: Failure, killed: Mapping[int, signal.Signals]) -> WorkerError:
    where = out / ERRORS_NAME / f"rank-{failure.rank}.json"
    kind = "" if failure.expected else f"{failure.type}: "
    error = WorkerError(f"rank {failure.rank}: {kind}{failure.message}")
    for note in failure.notes:
        error.add_note(note)
    if not failure.expected:
        error.add_note(f"this was not foreseen; the traceback is in {where}, and QPIPE_TRACEBACK=1 prints it")
    for rank, number in killed.items():
        error.add_note(f"rank {rank} was killed by {number.name}")
    if os.environ.get("QPIPE_TRACEBACK") == "1":
        error.add_note(failure.traceback)
    return error
