"""Running a function in several CPU processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any


def run_distributed(function: str, world_size: int = 2, timeout: float = 600, **arguments: Any) -> Any:
    """Call `module:function(**arguments)` in `world_size` gloo processes and return what rank 0 returned.

    Args:
        function: importable as `package.module:name`.
        world_size: number of processes, one thread each.
        timeout: seconds.
        arguments: JSON-able; so must the result be.

    Raises:
        RuntimeError: a process failed; holds the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="qpipe-distributed-") as scratch:
        call, result = Path(scratch, "call.json"), Path(scratch, "result.json")
        call.write_text(json.dumps({"function": function, "arguments": arguments, "path": sys.path}))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "qpipe.testing.distributed"]
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        done = subprocess.run(
            [*command, str(call), str(result)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0 or not result.is_file():
            raise RuntimeError(
                f"{function} failed in {world_size} processes:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
            )
        return json.loads(result.read_text())


def _worker(call_file: str, result_file: str) -> None:
    import torch.distributed as dist

    from qpipe.launching.worker import end_rank, end_with_launcher

    end_with_launcher(os.getppid())  # after a time limit the launcher is killed and could not end its processes
    call = json.loads(Path(call_file).read_text())
    sys.path[:] = [*sys.path, *(p for p in call["path"] if p not in sys.path)]
    module, _, name = call["function"].partition(":")
    result = getattr(import_module(module), name)(**call["arguments"])
    if int(os.environ["RANK"]) == 0:
        Path(result_file).write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
    end_rank()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
