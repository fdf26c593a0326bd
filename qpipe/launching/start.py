"""Handing over to torchrun or to DeepSpeed's launcher, and what comes back."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from qpipe.errors import ConfigError
from qpipe.launching import command, failures
from qpipe.launching.topology import Topology

LAUNCHER_VARIABLE = "QPIPE_LAUNCHER"
"""Process id of the launcher; tells workers to leave the printing of errors to it, and to end when it ends."""


class Interrupted(Exception):
    """The launcher was told to stop by a signal, and the workers have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def start(topology: Topology, env: Mapping[str, str], config: Path, resume: bool) -> None:
    """Run the workers until they end.

    Raises:
        WorkerError: a worker failed; carries the message of the first one.
        Interrupted: SIGINT or SIGTERM arrived and was passed on.
        ConfigError: the hostfile cannot be used here.
    """
    if topology.hostfile is not None:
        _deepspeed(topology, env, config, resume)
    else:
        _torchrun(topology, env, config, resume)


def _torchrun(topology: Topology, env: Mapping[str, str], config: Path, resume: bool) -> None:
    os.environ.update(env)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _quiet_elastic()
    try:
        torchrun.run(torchrun.parse_args(command.torchrun_arguments(topology, config, resume)))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise failures.summarize(config.parent, codes) from None
    except SignalException as error:
        raise Interrupted(error.sigval) from None
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


def _quiet_elastic() -> None:
    """Silence torchrun's own account of failures, which would bury the message. Each logger has its own level."""
    if os.environ.get("QPIPE_TRACEBACK") == "1":
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def hosts(hostfile: Path) -> dict[str, int]:
    """Slots by host name, read by DeepSpeed's own parser.

    Raises:
        ConfigError: the file holds no host, or a line that is not `HOST slots=N`.
    """
    from deepspeed.launcher.runner import fetch_hostfile

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the whole file as an error before it raises
    try:
        return dict(fetch_hostfile(str(hostfile)))
    except ValueError as error:
        raise ConfigError(f"hostfile {hostfile}: {error}; write one line `HOST slots=N` per machine") from error
    finally:
        logger.setLevel(level)


def _deepspeed(topology: Topology, env: Mapping[str, str], config: Path, resume: bool) -> None:
    assert topology.hostfile is not None
    several = len(hosts(topology.hostfile)) > 1
    if several and shutil.which("pdsh") is None:
        raise ConfigError(
            "a hostfile with several machines needs `pdsh` and ssh without a password; install pdsh, or run "
            "`qpipe launch --nodes M --node-rank R --rendezvous HOST:PORT` on each machine"
        )
    received: list[int] = []
    words = [*command.command(topology, config, resume), "--held"]
    # DeepSpeed's launcher passes signals on to other machines, but not to what it starts on this one alone.
    process = subprocess.Popen(words, env={**os.environ, **env}, process_group=None if several else 0)

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if several:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)

    previous: dict[int, Any] = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if not several:
            _end_group(process.pid)
    if received:
        raise Interrupted(received[0])
    if code or not (config.parent / "results.json").is_file():  # its launcher ends with 0 where a signal killed workers
        raise failures.summarize(config.parent, {})


GRACE = 30.0
"""Seconds that workers have to end once their launcher has, before they are killed."""


def _end_group(group: int) -> None:
    """Wait until every process of a group has ended, and see to it: none may go on in a run directory that is free."""
    deadline = time.monotonic() + GRACE
    while _exists(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _exists(group):
        os.killpg(group, signal.SIGKILL)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
