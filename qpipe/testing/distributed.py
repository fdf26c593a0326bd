"""Running a function in several CPU processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qpipe.launching.topology import free_port

SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}
"""Of every process, beside the environment of this one."""


def run_distributed(function: str, world_size: int = 2, timeout: float = 600, **arguments: Any) -> Any:
    """Call `module:function(**arguments)` in `world_size` gloo processes and return what rank 0 returned.

    The processes are forked from one that has torch, DeepSpeed, transformers and qpipe loaded, and no plugin.
    The first call starts it; it ends with the calling process.

    Args:
        function: importable as `package.module:name`.
        world_size: number of processes, one thread each.
        timeout: seconds.
        arguments: JSON-able; so must the result be.

    Raises:
        RuntimeError: a process failed; holds the end of its output.
    """
    return call_apart(function, environments_of(world_size), timeout, arguments)


def environments_of(world_size: int) -> list[dict[str, str]]:
    """The variables by which torch.distributed finds a group of processes on this machine, for each of them."""
    group = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group, **place} for rank in range(world_size)]


def call_apart(
    function: str, variables: Sequence[Mapping[str, str]], timeout: float, arguments: Mapping[str, Any]
) -> Any:
    """Call a function in one process for each set of environment variables; what the first one (of rank 0) returned.

    Raises:
        RuntimeError: a process failed; holds the end of its output.
    """
    call = {"function": function, "arguments": arguments, "path": sys.path, "cwd": str(Path.cwd())}
    environments = [{**os.environ, **SETTINGS, **v} for v in variables]
    with tempfile.TemporaryDirectory(prefix="qpipe-distributed-") as scratch:
        request = {"call": call, "environments": environments, "folder": scratch, "timeout": timeout}
        error = _ask(json.dumps(request))
        result, log = Path(scratch, "result.json"), Path(scratch, "log")
        if error is not None or not result.is_file():
            output = log.read_text(errors="replace")[-8000:] if log.is_file() else ""
            reason = error or "rank 0 ended early"
            raise RuntimeError(f"{function} failed in {len(variables)} processes, as {reason}:\n{output}")
        return json.loads(result.read_text())


def _ask(request: str) -> Any:
    server, channel = _server(os.getpid())
    if server.poll() is not None:
        _server.cache_clear()
        server, channel = _server(os.getpid())
    try:
        channel.sendall(f"{request}\n".encode())
        with channel.makefile(encoding="utf-8") as lines:
            answer = lines.readline()
    except BaseException:  # such as Ctrl-C: the answer still to come belongs to no later request
        server.kill()
        server.wait()
        raise
    if not answer:
        raise RuntimeError("the process that ranks are forked from has ended; its output is above")
    return json.loads(answer)


@cache
def _server(_asking: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The server of one process and the channel to it; it ends when the channel is closed."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "qpipe.testing.ranks", str(theirs.fileno())]
    environment = {**os.environ, **SETTINGS}
    server = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    theirs.close()
    return server, ours
