"""Launching for real, with workers whose training is replaced; see `fake_stages`."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qpipe import rundir
from qpipe.config import resolve
from qpipe.launching import prepare
from qpipe.launching import start as starting
from qpipe.launching.failures import WorkerError

pytestmark = pytest.mark.distributed


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def start(config_file, tmp_path, fake_stages):
    """Start a launcher of two workers, each of which writes its process id and waits."""
    out = tmp_path / "run"
    env = fake_stages("(out / f'pid-{rank}').write_text(str(os.getpid()))\ntime.sleep(120)")
    command = [sys.executable, "-m", "qpipe.cli", "launch", str(config_file), "--cpus", "2", "--out", str(out)]
    launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: all((out / f"pid-{r}").exists() and (out / f"pid-{r}").read_text() for r in (0, 1)))
        yield launcher, [int((out / f"pid-{rank}").read_text()) for rank in (0, 1)]
    finally:
        launcher.kill()
        launcher.wait()


def test_workers_get_the_configuration_and_their_ranks(process, config_file, tmp_path, fake_stages):
    out = tmp_path / "run"
    body = (
        "(out / f'rank-{rank}').write_text(f'{os.environ[\"WORLD_SIZE\"]} {resume} {config.engine.cpu} {config.seed}')"
    )
    result = process("launch", config_file, "--cpus", 2, "--set", "seed=7", "--out", out, env=fake_stages(body))
    assert result.returncode == 0, result.stderr
    assert [(out / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 False True 7"] * 2
    assert resolve(out / "config.yaml").seed == 7
    assert not (out / "errors").exists()


def test_a_finished_run_is_no_failure_where_the_interpreter_could_not_end(process, config_file, tmp_path, fake_stages):
    """What is left of a sharded model's process group can abort the process after its last line.

    Threads finish first, and those of a pool that wait for work are no reason to wait.
    """
    out = tmp_path / "run"
    body = """
import atexit, threading
class Left:
    def __del__(self):
        os.abort()
sys.left = Left()
atexit.register((out / f"exit-{rank}").touch)
from concurrent.futures import ThreadPoolExecutor
sys.pool = ThreadPoolExecutor(1)
sys.pool.submit(int).result()
threading.Thread(target=lambda: (time.sleep(0.5), (out / f"thread-{rank}").touch())).start()
print("trained")"""
    result = process("launch", config_file, "--cpus", 2, "--out", out, env=fake_stages(body))
    assert result.returncode == 0, result.stderr
    assert "trained" in result.stdout
    assert all((out / f"{what}-{rank}").exists() for what in ("exit", "thread") for rank in (0, 1))


def test_a_directory_that_the_launcher_holds_is_not_locked_again(process, config_file, tmp_path, fake_stages):
    """DeepSpeed's launcher, which a hostfile needs, gives its workers no mark in the environment."""
    out = tmp_path / "run"
    config, _ = prepare.configuration(config_file, [], [], out, False, 0)
    path = tmp_path / "resolved.yaml"
    path.write_text(prepare.dump(config))
    env = {**fake_stages("(out / 'trained').touch()"), "RANK": "0"}
    with rundir.Lock(out):
        refused = process("train", path, env=env)
        assert refused.returncode == 1 and "is in use by process" in refused.stderr
        assert not (out / "trained").exists() and not (out / "errors").exists()
        held = process("train", path, "--held", env=env)
    assert held.returncode == 0 and (out / "trained").exists(), held.stderr


def test_first_failing_rank_is_one_message(process, config_file, tmp_path, fake_stages):
    body = """
from qpipe.errors import TrainingError
if rank == 0:
    time.sleep(60)
error = TrainingError("loss is not finite at step 3")
error.add_note("raised by plugin 'x' 1.0 in hook qpipe_losses")
raise error
"""
    result = process("launch", config_file, "--cpus", 2, "--out", tmp_path / "run", env=fake_stages(body))
    assert result.returncode == 1
    _, *message = result.stderr.splitlines()  # the first line says where the run is
    assert message == [
        "error: rank 1: loss is not finite at step 3",
        "  raised by plugin 'x' 1.0 in hook qpipe_losses",
    ]


def test_unforeseen_error_points_to_its_traceback(process, config_file, tmp_path, fake_stages):
    out = tmp_path / "run"
    env = fake_stages("raise ZeroDivisionError('oops')")
    result = process("launch", config_file, "--cpus", 1, "--out", out, env=env)
    assert result.returncode == 1
    assert "error: rank 0: ZeroDivisionError: oops" in result.stderr and "Traceback" not in result.stderr
    assert str(out / "errors/rank-0.json") in result.stderr
    assert "ZeroDivisionError" in (out / "errors/rank-0.json").read_text()
    # the run may be continued, and an earlier failure is not shown again
    again = process("launch", "--resume", "--cpus", 1, "--out", out, env={**env, "QPIPE_TRACEBACK": "1"})
    assert again.returncode == 1 and "in execute" in again.stderr


def test_killed_worker_is_named(process, config_file, tmp_path, fake_stages):
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)"
    result = process("launch", config_file, "--cpus", 2, "--out", tmp_path / "run", env=fake_stages(body))
    assert result.returncode == 1
    assert "error: rank 1 was killed by SIGKILL; often the system ran out of memory" in result.stderr
    assert "rank 0" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_workers(start, number, code):
    launcher, workers = start
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert err.splitlines()[-1].startswith(f"stopped by {number.name}; continue with: qpipe launch --out ")
    assert "Traceback" not in err and not any(map(alive, workers))


def test_workers_end_with_a_launcher_that_is_killed(start):
    launcher, workers = start
    os.kill(launcher.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, workers)), seconds=10)


def test_directory_of_a_live_run_is_refused(start, process, config_file, tmp_path):
    launcher, _ = start
    result = process("launch", config_file, "--cpus", 1, "--out", tmp_path / "run", "--resume")
    assert result.returncode == 1
    assert f"in use by process {launcher.pid} on " in result.stderr


def test_train_alone_prints_one_message(process, config_file, fake_stages):
    env = {**fake_stages("from qpipe.errors import DataError\nraise DataError('no rows')"), "RANK": "0"}
    result = process("train", config_file, env=env, cwd=config_file.parent)
    assert result.returncode == 1
    assert result.stderr == "error: no rows\n"


RUNNER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); \
time.sleep(120)", sys.argv[1]])
time.sleep(120)
"""
"""As DeepSpeed's launcher on one machine: it starts another process, and ends by a signal without telling that one."""


def test_a_signal_reaches_what_the_launcher_of_deepspeed_has_started(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    note = tmp_path / "pid"
    monkeypatch.setattr(starting.command, "command", lambda *given: [sys.executable, "-c", RUNNER, str(note)])

    def stop():
        wait_for(lambda: note.exists() and note.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(starting.Interrupted):
        starting._deepspeed(SimpleNamespace(hostfile=tmp_path / "hosts"), {}, tmp_path / "config.yaml", False)
    assert not alive(int(note.read_text()))


def test_a_launcher_that_hides_the_end_of_its_workers(tmp_path, monkeypatch):
    """DeepSpeed's ends with 0 where a signal killed what it had started."""
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    monkeypatch.setattr(starting.command, "command", lambda *given: [sys.executable, "-c", "pass"])
    where = SimpleNamespace(hostfile=tmp_path / "hosts")
    with pytest.raises(WorkerError, match="the workers failed without a message"):
        starting._deepspeed(where, {}, tmp_path / "config.yaml", False)
    (tmp_path / "results.json").write_text("{}")
    starting._deepspeed(where, {}, tmp_path / "config.yaml", False)
