"""`run_distributed`: what comes back, and what ends it."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from qpipe.testing import distributed, ranks, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_rank_0_answers_for_a_group_of_processes():
    assert run_distributed("process_cases:total", world_size=3, of=[1, 2, 4]) == 7


def test_variables_of_the_moment_reach_the_processes(monkeypatch):
    monkeypatch.setenv("QPIPE_TEST_VARIABLE", "now")
    assert run_distributed("process_cases:variable", name="QPIPE_TEST_VARIABLE") == "now"


def test_a_rank_that_fails_ends_the_others_with_its_output():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 ended with status 1:.*ValueError: rank 1 has had enough"):
        run_distributed("process_cases:fail_on_rank_1", seconds=300)
    assert time.monotonic() - start < 200


def test_what_takes_too_long_is_ended():
    with pytest.raises(RuntimeError, match="they took longer than 1 s"):
        run_distributed("process_cases:fail_on_rank_1", world_size=1, timeout=1, seconds=300)


def test_a_server_that_has_ended_is_replaced():
    server, _ = distributed._server(os.getpid())
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    assert run_distributed("process_cases:total", of=[1, 2]) == 3


def test_a_server_that_ends_while_it_is_asked_is_an_error():
    with pytest.raises(RuntimeError, match="ranks are forked from has ended"):
        run_distributed("process_cases:end_server")


def test_an_interrupted_call_leaves_no_answer_to_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_distributed("process_cases:wait", seconds=300)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert run_distributed("process_cases:total", of=[1, 2]) == 3


def test_ranks_that_are_not_forked(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "START", multiprocessing.get_context("spawn"))
    _, ours = socket.socketpair()
    call = {"function": "process_cases:total", "arguments": {"of": [5]}, "path": sys.path, "cwd": str(tmp_path)}
    environments = [{**os.environ, **distributed.SETTINGS, **own} for own in distributed.environments_of(1)]
    error = ranks.run(ours, call, environments, str(tmp_path), 120)
    assert error is None, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "result.json").read_text()) == 5
