"""A DeepSpeed build that was killed must not hang the next run."""

import fcntl
import os
import subprocess
import sys
import time

import pytest

from qpipe.engine import operators
from qpipe.engine.operators import build_lock

DIES = """
import os, sys
from pathlib import Path
from qpipe.engine.operators import build_lock
with build_lock(Path(sys.argv[1])):
    Path(sys.argv[1], "lock").touch()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_build_left_is_removed_at_once(tmp_path):
    killed = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert killed.returncode == -9 and (tmp_path / "lock").exists()
    started = time.monotonic()
    with build_lock(tmp_path):
        assert not (tmp_path / "lock").exists()
    assert time.monotonic() - started < 5


def test_an_old_lock_of_another_program_is_removed(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    old = time.time() - operators.FOREIGN_BUILD_SECONDS - 1
    os.utime(lock, (old, old))
    with build_lock(tmp_path):
        assert not lock.exists()


def test_a_fresh_lock_of_another_program_is_waited_for(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            lock.unlink()

    monkeypatch.setattr(operators.time, "sleep", sleep)
    with build_lock(tmp_path):
        assert len(waits) == 3


def test_the_lock_is_exclusive_and_free_afterwards(tmp_path):
    with build_lock(tmp_path), (tmp_path / "qpipe.lock").open("r+") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with build_lock(tmp_path):
        pass
