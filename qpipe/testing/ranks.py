"""The server that `run_distributed` forks its processes from: imports take most of the time of a short test.

It loads the libraries once, then answers one request after another over the socket that it was given: which function to
call, and the environment of each process. It ends when the other end of the socket is closed, and its children with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from qpipe.launching.worker import end_rank, end_with_launcher

PRELOADED = (
    "deepspeed",
    "accelerate",
    "datasets",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "qpipe.testing.gradients",
    "qpipe.stages.execute",
)

START = multiprocessing.get_context("fork") if sys.platform == "linux" else multiprocessing.get_context("spawn")
"""Elsewhere libraries of the system do not survive a fork, and ranks import everything themselves."""


def serve(channel: socket.socket) -> None:
    """Answer requests, JSON objects of one line each, until the channel is closed."""
    for name in PRELOADED:
        import_module(name)
    with channel.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            print(json.dumps(run(channel, **json.loads(line))), file=lines, flush=True)


def run(
    channel: socket.socket,
    call: Mapping[str, Any],
    environments: Sequence[Mapping[str, str]],
    folder: str,
    timeout: float,
) -> str | None:
    """Call a function in forked processes, one for each environment; what went wrong, if anything did.

    The first process that fails ends the others, as under torchrun, and so does the end of whoever asked.
    """
    ranks = [START.Process(target=_rank, args=(call, e, folder, os.getpid())) for e in environments]
    for rank in ranks:
        rank.start()
    error = _join(ranks, channel, timeout)
    for rank in ranks:
        rank.kill()
        rank.join()
    return error


def _join(ranks: Sequence[BaseProcess], channel: socket.socket, timeout: float) -> str | None:
    end, running = time.monotonic() + timeout, dict(enumerate(ranks))
    while running:
        ready = wait([channel, *(rank.sentinel for rank in running.values())], max(0.0, end - time.monotonic()))
        if not ready:
            return f"they took longer than {timeout:.0f} s"
        if channel in ready:  # closed: nothing is sent while an answer is awaited
            return "nobody waits for them any more"
        ended = {number: rank.exitcode for number, rank in running.items()}
        for number, status in ended.items():
            if status:
                return f"rank {number} ended with status {status}"
            if status == 0:
                del running[number]
    return None


def _rank(call: Mapping[str, Any], environment: Mapping[str, str], folder: str, server: int) -> None:
    end_with_launcher(server)
    with Path(folder, "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(call["cwd"])
    sys.path[:] = [*sys.path, *(p for p in call["path"] if p not in sys.path)]
    module, _, name = call["function"].partition(":")
    result = getattr(import_module(module), name)(**call["arguments"])
    if environment.get("RANK", "0") == "0":
        Path(folder, "result.json").write_text(json.dumps(result))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    end_rank()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
