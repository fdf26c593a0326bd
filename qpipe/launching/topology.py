"""How many processes, on what, on which machines."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qpipe.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """The processes of a run.

    Attributes:
        processes: processes on this machine (with a hostfile: per machine, 0 for as many as its slots).
        cpu: run on CPUs with gloo.
        nodes: machines in all.
        node_rank: number of this machine, from 0.
        address: host name where the processes meet.
        port: TCP port there; 0 lets the launcher choose.
        hostfile: file of hosts for DeepSpeed's launcher; None uses torchrun.
    """

    processes: int
    cpu: bool
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    hostfile: Path | None = None


def cpu_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_present() -> int:
    """GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def nvidia_devices() -> list[str]:
    """Names of the NVIDIA GPUs that the driver knows, whatever torch says; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    words = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # such as a driver that hangs
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def parse_rendezvous(text: str) -> tuple[str, int]:
    """Split `HOST:PORT`.

    Raises:
        ConfigError: there is no port between 1 and 65535.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rendezvous {text!r}: write HOST:PORT, such as node0:29500")
    return host.strip("[]"), int(port)


def choose(
    gpus: int | None,
    cpus: int | None,
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    hostfile: Path | None = None,
    prefer_cpu: bool = False,
    only_shown: bool = False,
) -> Topology:
    """Decide on the processes. With neither `gpus` nor `cpus`: all GPUs, else 2 CPU processes (1 on a single core).

    Args:
        gpus: GPUs asked for on each machine.
        cpus: CPU processes asked for on each machine.
        nodes: machines in all.
        node_rank: number of this machine.
        rendezvous: `HOST:PORT` where the machines meet.
        hostfile: hosts for DeepSpeed's launcher.
        prefer_cpu: the configuration says `engine.cpu`, which holds where neither number is given.
        only_shown: the command is for another machine, so the GPUs of this one do not matter.

    Raises:
        ConfigError: more GPUs are asked for than present, or the rendezvous or the hostfile is not usable.
    """
    address, port = parse_rendezvous(rendezvous) if rendezvous else ("127.0.0.1", free_port())
    if hostfile is not None:
        if not hostfile.is_file():
            raise ConfigError(f"--hostfile {hostfile} does not exist; write one line `HOST slots=N` per machine")
        cpu = cpus is not None or (prefer_cpu and gpus is None)
        count = cpus or gpus or 0
        return Topology(count, cpu, address=address if rendezvous else "", port=port, hostfile=hostfile)
    if gpus is not None and only_shown:
        return Topology(gpus, False, nodes, node_rank, address, port)
    count, cpu = _count(gpus, cpus, prefer_cpu)
    return Topology(count, cpu, nodes, node_rank, address, port)


def _count(gpus: int | None, cpus: int | None, prefer_cpu: bool) -> tuple[int, bool]:
    if cpus is not None:
        return cpus, True
    if gpus is not None:
        present = gpus_present()
        if gpus > present:
            raise ConfigError(
                f"--gpus {gpus}: asked for {gpus} GPU{'s' if gpus != 1 else ''}, {present} present on this machine; "
                f"ask for at most {present}, or run on CPUs with --cpus N (see `qpipe doctor` if a GPU should be there)"
                if present
                else f"--gpus {gpus}: asked for {gpus} GPU{'s' if gpus != 1 else ''}, 0 present on this machine; "
                "run on CPUs with --cpus N (see `qpipe doctor` if a GPU should be there)"
            )
        return gpus, False
    if not prefer_cpu and (present := gpus_present()):
        return present, False
    return min(2, cpu_cores()), True


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Settings of glibc's allocator: keep freed memory for the next step. By default every large tensor is mapped from the
system and given back, and zeroing its pages anew took a third of a training step (0.80 against 1.27 s of processor time
for 16 x 40 tokens on the default encoder, one thread). Other C libraries ignore them."""


def environment(topology: Topology) -> dict[str, str]:
    """The environment variables the workers need beside those that are set; what the user has set stays.

    `DS_ACCELERATOR` and `CUDA_VISIBLE_DEVICES` keep a CPU run away from GPUs. Threads are shared out, since every
    process would otherwise start as many as there are cores. Freed memory is kept (`KEEP_MEMORY`).
    """
    wanted: dict[str, str] = {}
    if topology.cpu:
        wanted |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        wanted |= {name: value for name, value in KEEP_MEMORY.items() if name not in os.environ}
    if topology.processes and "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(max(1, cpu_cores() // topology.processes))
    one_machine = topology.nodes == 1 and topology.hostfile is None
    if one_machine and "GLOO_SOCKET_IFNAME" not in os.environ and Path("/sys/class/net/lo").exists():
        # gloo otherwise looks up the machine's own host name, which many containers cannot resolve.
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    return wanted
