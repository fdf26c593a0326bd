"""The command line of the launcher that starts the workers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from qpipe.launching.topology import Topology

WORKER_MODULE = "qpipe.cli"


def worker_arguments(config: Path, resume: bool) -> list[str]:
    """What each worker gets: `train CONFIG [--resume]`."""
    return ["train", str(config), *(["--resume"] if resume else [])]


def torchrun_arguments(topology: Topology, config: Path, resume: bool) -> list[str]:
    """Arguments of `torch.distributed.run` for this machine."""
    return [
        f"--nnodes={topology.nodes}",
        f"--nproc-per-node={topology.processes}",
        f"--node-rank={topology.node_rank}",
        f"--master-addr={topology.address}",
        f"--master-port={topology.port}",
        "--module",
        WORKER_MODULE,
        *worker_arguments(config, resume),
    ]


def deepspeed_arguments(topology: Topology, config: Path, resume: bool) -> list[str]:
    """Arguments of DeepSpeed's launcher, which reaches the machines of a hostfile by ssh."""
    return [
        f"--hostfile={topology.hostfile}",
        *([f"--num_gpus={topology.processes}"] if topology.processes else []),
        *([f"--master_addr={topology.address}"] if topology.address else []),
        f"--master_port={topology.port}",
        "--no_local_rank",
        "--module",
        WORKER_MODULE,
        *worker_arguments(config, resume),
    ]


def command(topology: Topology, config: Path, resume: bool) -> list[str]:
    """The whole command, starting with the Python interpreter."""
    if topology.hostfile is not None:
        return [sys.executable, "-m", "deepspeed.launcher.runner", *deepspeed_arguments(topology, config, resume)]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(topology, config, resume)]


def shell_script(argv: list[str], env: Mapping[str, str], config: Path, text: str) -> str:
    """A shell script that does what `launch` would: write the configuration and start the workers."""
    assignments = [f"{key}={shlex.quote(value)}" for key, value in env.items()]
    return "\n".join(
        [
            f"mkdir -p {shlex.quote(str(config.parent))}",
            f"cat > {shlex.quote(str(config))} <<'QPIPE_CONFIG'",
            text.rstrip("\n"),
            "QPIPE_CONFIG",
            " ".join([*assignments, shlex.join(argv)]),
        ]
    )
