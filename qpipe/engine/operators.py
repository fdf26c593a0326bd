"""Building DeepSpeed's operators so that a killed build cannot hang later runs.

torch guards a build with a lock *file*. A process killed while it compiles leaves the file behind, and every later
process waits for it forever. Here the build happens under `flock`, which the kernel frees with its holder, and what a
dead holder left is removed.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

logger = logging.getLogger("qpipe.engine")

FOREIGN_BUILD_SECONDS = 300
"""A lock file this old, of a process that does not use `flock`, was left behind: the build takes one or two minutes."""


@contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Hold a build folder alone, after removing what a dead holder left.

    Args:
        folder: torch's build folder of one operator; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "qpipe.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        died_building = os.fstat(descriptor).st_size > 0
        remove_stale(folder / "lock", died_building)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def remove_stale(lock: Path, died_building: bool) -> None:
    """Remove torch's lock file if its owner is dead; wait for one that may be alive.

    Args:
        lock: the file.
        died_building: True if the last holder of the `flock` did not finish.
    """
    told = False
    while lock.exists():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if died_building or age > FOREIGN_BUILD_SECONDS:
            logger.warning("removing %s, left by a build that was killed", lock)
            lock.unlink(missing_ok=True)
            return
        if not told:
            logger.warning("waiting for another process that builds %s", lock.parent.name)
            told = True
        time.sleep(1)


def build_cpu_operators() -> None:
    """Build the shared-memory communication that DeepSpeed uses between CPU processes, where it can be built."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    if not list(folder.glob("*.so")):
        logger.info("building a DeepSpeed operator: once on this machine, a minute or two")
    with build_lock(folder), redirect_stdout(io.StringIO()):
        builder.load(verbose=False)
