"""The protocol between the stages and whatever runs the processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qpipe.config import EngineConfig, TrainConfig

Placement = Literal["whole", "sharded", "cpu"]
"""Where a model without gradients has its weights: on every process, sharded, or sharded in CPU memory."""


class Engine(Protocol):
    """One process's view of all processes.

    Attributes:
        name: what the configuration calls it.
        rank: number of this process, from 0.
        world_size: how many there are.
        device: where this process computes.
        dtype: type of the model's parameters and of the exported float tensors.
        partitioned: True if weights exist only while their module runs.
    """

    name: str
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    partitioned: bool

    def wrap(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        train: TrainConfig,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        """Take over the model (already on `device`, in `dtype`) and its optimizer.

        `blocks` are modules that may be sharded one by one.
        """

    def hold(self, model: nn.Module, placement: Placement, blocks: Sequence[nn.Module] = ()) -> Callable[..., Any]:
        """Take over a second model, for forward passes without gradients, and return what calls it. Collective.

        Args:
            model: frozen, in its own type, in CPU memory or on `device`.
            placement: of its weights; sharded ones are whole only while their module runs, and then every process has
                to make the same calls.
            blocks: modules that may be sharded one by one.
        """

    def begin_micro_batch(self, last: bool) -> None:
        """Before each training forward pass; `last` marks the micro-batch that ends the optimizer step."""

    def forward(self, **inputs: Tensor | bool) -> Any:
        """Call the wrapped model."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss / accumulation`."""

    def step(self) -> None:
        """After every micro-batch; updates the weights after the last one."""

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last optimizer step, if known."""

    def gathered(self, parameters: Iterable[Tensor]) -> AbstractContextManager[list[Tensor]]:
        """The parameters, whole on every process, to be read within. Collective."""

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and schedule; called by all processes."""

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, at the same world size."""

    def close(self) -> None:
        """Release the wrapped model and optimizer."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def reduce(self, values: Mapping[str, float], op: str = "mean") -> dict[str, float]:
        """Mean, min or max over processes, by key."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes, in rank order."""

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0."""

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of process 0."""

    def any(self, flag: Tensor) -> bool:
        """Whether a boolean scalar is true on any process."""

    def leave(self) -> None:
        """Leave the other processes: nothing that involves them may follow."""


class Processes:
    """Communication that both engines share."""

    rank: int
    world_size: int
    device: torch.device

    def hold(self, model: nn.Module, placement: Placement, blocks: Sequence[nn.Module] = ()) -> Callable[..., Any]:
        """Move a whole model to the device; engines that can shard one extend this."""
        if placement != "whole":
            raise ValueError(f"{type(self).__name__} cannot hold a model that is {placement}")
        model.to(self.device)
        return model

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def reduce(self, values: Mapping[str, float], op: str = "mean") -> dict[str, float]:
        """Mean, min or max over processes, by key; every process passes the same keys."""
        if self.world_size == 1 or not values:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, {"mean": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        if op == "mean":
            tensor /= self.world_size
        return dict(zip(values, tensor.tolist(), strict=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        result: list[Any] = [None] * self.world_size
        dist.all_gather_object(result, value)
        return result

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of process 0."""
        if self.world_size > 1:
            dist.broadcast(tensor.detach(), src=0)

    def any(self, flag: Tensor) -> bool:
        """Whether a boolean scalar is true on any process."""
        if self.world_size > 1:
            count = flag.detach().to(torch.int32)
            dist.all_reduce(count, dist.ReduceOp.MAX)
            return bool(count)
        return bool(flag)

    def leave(self) -> None:
        """Wait for all processes, then leave them: nothing that involves them may follow."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def bf16_is_native(device: torch.device) -> bool:
    """True if the hardware multiplies matrices faster in bfloat16 than in float32.

    On CPUs that means AMX, or AVX512-BF16 of AMD: there a product of 1920 x 384 x 1536 took a fifth of the float32 time
    on one thread, and a training step of 6 x 384 a third. A product took twice the float32 time on a Xeon without AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    amd = "AMD" in str(features.get("cpu_name", ""))
    return bool(features.get("amx_bf16") or (amd and features.get("avx512_bf16")))


def resolve_precision(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The compute type that `engine.precision` stands for on this hardware."""
    if config.precision == "auto":
        return torch.bfloat16 if bf16_is_native(device) else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def choose_device(config: EngineConfig) -> torch.device:
    """The GPU of this process, or the CPU if there is none or the configuration says so."""
    if config.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: process 0 hashes checkpoints, which takes minutes where they are large."""


def join_processes(backend: str) -> None:
    """Start the default process group: the one a launcher describes in the environment, or this process alone.

    Alone, nothing is put into the environment, so that child processes do not take this process for their master.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; it misleads no child process
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch does not re-export it to type checkers
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
