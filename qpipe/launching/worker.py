"""What each process of a run does."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from qpipe.errors import QpipeError
from qpipe.launching import failures
from qpipe.launching.start import LAUNCHER_VARIABLE
from qpipe.rundir import Lock

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_worker(config_path: Path, resume: bool, held: bool = False) -> None:
    """Train as one rank. Failures are written to `errors/rank-N.json` in the run directory.

    Args:
        config_path: the configuration.
        resume: continue from the last checkpoint.
        held: a launcher that leaves no mark in the environment holds the run directory.

    Raises:
        QpipeError: the run failed in a foreseen way and this process is the only one.
    """
    launched = LAUNCHER_VARIABLE in os.environ
    if launched:
        end_with_launcher(int(os.environ[LAUNCHER_VARIABLE]))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher reports the interruption
    out = config_path.parent if launched else None
    quiet_libraries()
    show_log()
    try:
        from qpipe.config import resolve

        config = resolve(config_path)
        # qpipe's launcher holds the directory for its workers; other launchers know nothing of it.
        first = not launched and not held and os.environ.get("RANK", "0") == "0"
        with Lock(Path(config.out)) if first else nullcontext():
            out = out or Path(config.out)
            from qpipe.stages import execute

            execute(config, resume=resume)
    except Exception as error:
        _fail(out, error, quiet=launched)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_rank()
    _destroy_process_group()


def quiet_libraries() -> None:
    """Leave the output to the run's own lines: no bars and notices of libraries from every process at once.

    What the user has set in the environment stays.
    """
    for name, value in {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DS_BUILD_VERBOSE": "0"}.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def show_log() -> None:
    """Print what qpipe logs, from process 0, on the stream of the run's other lines."""
    if os.environ.get("RANK", "0") == "0":
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
        logging.getLogger("qpipe").setLevel(logging.INFO)
    else:
        logging.basicConfig(level=logging.ERROR, format="rank %(name)s: %(message)s")


def end_with_launcher(launcher: int) -> None:
    """Have the kernel end this process when the launcher ends, even by SIGKILL.

    Left alone, it would go on writing to a directory whose lock is free.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it ended before the request took effect
        os.kill(os.getpid(), signal.SIGKILL)


def _fail(out: Path | None, error: Exception, quiet: bool) -> None:
    """Record the error; print it where no launcher does; end without waiting for the other ranks."""
    if out is not None:
        try:
            failures.record(out, int(os.environ.get("RANK", "0")), error)
        except QpipeError as secondary:
            error.add_note(f"and the error could not be recorded: {secondary}")
            quiet = False
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not quiet:
        raise error
    if not quiet:
        _print(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group with work under way can block a normal exit for minutes, and the other ranks would wait with it.
    os._exit(1)


def _print(error: Exception) -> None:
    rank = os.environ.get("RANK", "0")
    if isinstance(error, QpipeError) and os.environ.get("QPIPE_TRACEBACK") != "1":
        print(f"error: rank {rank}: {failures.message_of(error)}", file=sys.stderr)
    else:
        traceback.print_exception(error)


def _destroy_process_group() -> None:
    """A process that ends while its group lives can abort after all work is done."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end_rank() -> NoReturn:
    """End this process, one of several, with status 0 after all its work; threads and exit handlers finish first.

    The interpreter is not taken apart. After sharded training the group's gloo threads outlive
    `destroy_process_group`, and such a process was seen to abort after its last line, so that the run counted as
    failed: probably a thread that let go of a tensor while the interpreter ended (pytorch/pytorch#179291).
    """
    _destroy_process_group()
    # As the interpreter does: threads finish, and idle ones of pools, which would wait for work forever, are told to.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
