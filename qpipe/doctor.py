"""What this machine offers to training, what is missing, and what to do about it."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from qpipe.launching.topology import nvidia_devices

PACKAGES = (
    "qpipe", "torch", "transformers", "deepspeed", "accelerate", "datasets", "compressed-tensors", "safetensors",
    "pluggy", "pydantic", "typer", "rich",
)  # fmt: skip

OFFLOAD_OPS = ("cpu_adam", "async_io")
"""DeepSpeed ops that `engine.offload` uses; the others only make GPUs faster."""

GIB = 2**30
LOW_MEMORY, LOW_DISK, LOW_SHARED = 4 * GIB, 5 * GIB, 1 * GIB

Status = Literal["ok", "note", "problem", "fatal"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        topic: what was looked at.
        found: what is there.
        status: `note` and `problem` come with advice; `fatal` makes training impossible.
        advice: what to do.
    """

    topic: str
    found: str
    status: Status = "ok"
    advice: str = ""


def examine(out: Path = Path(".")) -> list[Finding]:
    """Look at everything. `out` is where runs will be written.

    A check that fails unexpectedly is itself a finding, so that one broken package does not hide the rest.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _packages, _torch, _gpus, _cpu, _compilers, _deepspeed_ops, _memory, lambda: _disk(out),
        _shared_memory, _plugins,
    )  # fmt: skip
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = getattr(check, "__name__", "check").strip("_")
            findings.append(Finding(name, f"failed: {type(error).__name__}: {error}", "problem", "see the error"))
    return findings


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "fatal", f"pip install -c constraints.txt {name}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding(
            "torch build", f"does not import: {error}", "fatal", "reinstall torch: pip install --force-reinstall torch"
        )
        return
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU only"
    )
    hardware = nvidia_devices()
    if hardware and build == "CPU only":
        yield Finding(
            "torch build", f"{build}, but there is a GPU: {', '.join(hardware)}", "problem",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )  # fmt: skip
    elif hardware and not torch.cuda.is_available():
        yield Finding(
            "torch build", f"{build}, but torch cannot use the GPU", "problem",
            "compare the driver's CUDA version (nvidia-smi) with torch's, and look at CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    else:
        yield Finding("torch build", build)
    if not torch.distributed.is_available():
        yield Finding("torch.distributed", "not in this build", "fatal", "install an official build of torch")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPUs", "none", "note", "training runs on CPU processes: qpipe launch --cpus N")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "computes in bf16" if properties.major >= 8 else "no bf16"
        yield Finding(f"GPU {index}", f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {bf16}")


def _cpu() -> Iterator[Finding]:
    import torch

    from qpipe.engine.base import bf16_is_native
    from qpipe.launching.topology import cpu_cores

    cores = f"{cpu_cores()} cores of {os.cpu_count()} usable"
    if bf16_is_native(torch.device("cpu")):
        yield Finding("CPU", f"{cores}, fast bf16")
    else:
        advice = "on CPUs, leave engine.precision at auto or float32"
        yield Finding("CPU", f"{cores}, no fast bf16", "note", advice)


def _compilers() -> Iterator[Finding]:
    compiler = next(
        (path for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name and (path := shutil.which(name))),
        None,
    )
    if compiler is None:
        yield Finding(
            "C++ compiler", "none found", "problem",
            "install one (Debian: apt-get install g++); without it, weights are quantized by slower eager code "
            "and engine.offload does not work",
        )  # fmt: skip
    else:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30).stdout.partition(
            "\n"
        )[0]
        yield Finding("C++ compiler", version or compiler)
    if shutil.which("ninja") is None and _package("ninja") is None:
        yield Finding("ninja", "none found", "problem", "pip install ninja; DeepSpeed builds its ops with it")
    else:
        yield Finding("ninja", _package("ninja") or shutil.which("ninja") or "")


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _deepspeed_ops() -> Iterator[Finding]:
    usable: list[str] = []
    other: list[str] = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        for name, builder in ALL_OPS.items():
            (usable if builder is not None and builder.is_compatible(verbose=False) else other).append(name)
    missing = [name for name in OFFLOAD_OPS if name in other]
    found = f"can build: {', '.join(sorted(usable)) or 'none'}; cannot: {', '.join(sorted(other)) or 'none'}"
    if "cpu_adam" in missing:
        yield Finding(
            "DeepSpeed ops", found, "note", "cpu_adam is needed by engine.offload only; it needs a C++ compiler"
        )
    elif missing:
        yield Finding(
            "DeepSpeed ops", found, "note", "async_io is needed for offload to disk only (Debian: libaio-dev)"
        )
    else:
        yield Finding("DeepSpeed ops", found)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free, total = _within_cgroup(memory.available, memory.total)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LOW_MEMORY:
        yield Finding(
            "memory", text, "problem", "close other programs, or lower train.batch_size and raise train.accumulation"
        )
    else:
        yield Finding("memory", text)


def _within_cgroup(free: int, total: int) -> tuple[int, int]:
    """Bytes free and in all under a container's limit, which `/proc/meminfo` does not show."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.is_file() or not used.is_file() or not (text := limit.read_text().strip()).isdigit():
        return free, total
    return min(free, int(text) - int(used.read_text())), min(total, int(text))


def _disk(out: Path) -> Iterator[Finding]:
    folder = next(path for path in (out.resolve(), *out.resolve().parents) if path.is_dir())
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {folder}"
    if usage.free < LOW_DISK:
        yield Finding("disk", text, "problem", "free space, choose another --out, or lower train.keep_checkpoints")
    elif not os.access(folder, os.W_OK):
        yield Finding("disk", f"{folder} is not writable", "problem", "choose another --out")
    else:
        yield Finding("disk", text)


def _shared_memory() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding(
            "shared memory", "no /dev/shm", "note", "processes and data loaders share memory through files instead"
        )
        return
    usage = shutil.disk_usage(shared)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in /dev/shm"
    if usage.free < LOW_SHARED:
        yield Finding(
            "shared memory", text, "problem", "NCCL and data loaders need it; in Docker: --shm-size=8g or --ipc=host"
        )
    else:
        yield Finding("shared memory", text)


def _plugins() -> Iterator[Finding]:
    from qpipe.discovery import installed

    names = ", ".join(f"{info.name} {info.version}" for info in installed().values())
    yield Finding("plugins", names or "none installed")
