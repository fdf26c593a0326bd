"""What the processes of test_processes.py run."""

import os
import signal
import time

import torch
import torch.distributed as dist

RANK = int(os.environ["RANK"])


def total(of: list[int]) -> int:
    dist.init_process_group("gloo")
    value = torch.tensor(of[RANK])
    dist.all_reduce(value)
    return int(value)


def variable(name: str) -> str:
    return os.environ[name]


def fail_on_rank_1(seconds: float) -> None:
    if RANK == 1:
        raise ValueError("rank 1 has had enough")
    time.sleep(seconds)


def end_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def wait(seconds: float) -> None:
    time.sleep(seconds)
