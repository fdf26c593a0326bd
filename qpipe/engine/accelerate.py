"""Accelerate: one process, DDP or FSDP2. Parameters stay in float32; bfloat16 is used by autocast in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qpipe.config import EngineConfig, TrainConfig
from qpipe.engine.base import PATIENCE, Placement, Processes, choose_device, resolve_precision
from qpipe.engine.clipping import clip_each, plain_fragments
from qpipe.engine.sharding import Shards, shard_frozen, whole_tensor
from qpipe.errors import ConfigError, TrainingError


class AccelerateEngine(Processes):
    """See `Engine`."""

    name = "accelerate"

    def __init__(self, config: EngineConfig) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        # `accelerate launch` may set a mixed precision of its own; `engine.precision` decides.
        self._accelerator = Accelerator(
            cpu=choose_device(config).type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        found = self._accelerator.device
        # Accelerate calls the CPU `cpu:0`, which torch.load does not know.
        self.device = torch.device("cpu") if found.type == "cpu" else found
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.dtype = torch.float32
        self._autocast = resolve_precision(config, self.device) == torch.bfloat16
        self.partitioned = False
        self._fsdp = config.fsdp
        if self._accelerator.state.distributed_type == "FSDP" and not config.fsdp:
            raise ConfigError("`accelerate launch` is set to FSDP; set engine.fsdp: true, or give it DDP settings")
        self._shards: Shards | None = None
        self._model: Any = None
        self._module: Any = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._train: TrainConfig | None = None
        self._norm: float | None = None
        self._stepping = False

    def wrap(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        train: TrainConfig,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        """Shard the model, or hand it to Accelerate; the schedule is stepped here, once per optimizer step."""
        train.micro_batch_size(self.world_size)
        self._module = self._model = model
        if self._fsdp and self.world_size > 1:
            self._shards = Shards(model, blocks, optimizer, self.device)
            self.partitioned = True
        else:
            self._model = self._accelerator.prepare_model(model)
        self._optimizer, self._scheduler, self._train = optimizer, scheduler, train

    def hold(self, model: nn.Module, placement: Placement, blocks: Sequence[nn.Module] = ()) -> Callable[..., Any]:
        """Shard with FSDP2, where there are several processes."""
        if placement == "whole" or self.world_size == 1:
            return super().hold(model, "whole")
        shard_frozen(model, blocks, self.device, offload=placement == "cpu")
        return model

    def serve(self, model: nn.Module) -> None:
        """Take a model for evaluation only, as it is."""
        self._module = self._model = model

    def begin_micro_batch(self, last: bool) -> None:
        """Exchange gradients in the last micro-batch only."""
        self._stepping = last
        if self._shards is not None:
            self._shards.synchronize(last)
        if hasattr(self._model, "require_backward_grad_sync"):
            self._model.require_backward_grad_sync = last

    def forward(self, **inputs: Tensor | bool) -> Any:
        """Call the wrapped model; autocast in training only, so that evaluation computes as the export does."""
        if not self._module.training:
            return self._module(**inputs)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                return self._model(**inputs)
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            raise TrainingError(
                "parameters of the model take no part in the loss, which DDP does not allow; use engine.name: "
                "deepspeed, or engine.fsdp: true"
            ) from error

    def backward(self, loss: Tensor) -> None:
        """Accumulate."""
        assert self._train is not None
        (loss / self._train.accumulation).backward()

    def step(self) -> None:
        """Clip and update, after the last micro-batch."""
        if not self._stepping:
            return
        assert self._train is not None
        if self._train.clips_tensors:
            sharded = self._shards is not None
            self._norm = clip_each(plain_fragments(self._module, sharded), self._train.clip, sharded)
        else:
            limit = self._train.clip or float("inf")
            self._norm = float(whole_tensor(nn.utils.clip_grad_norm_(self._module.parameters(), limit)))
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()

    def grad_norm(self) -> float | None:
        """Norm before clipping."""
        return self._norm

    def gathered(self, parameters: Iterable[Tensor]) -> AbstractContextManager[list[Tensor]]:
        """Sharded parameters are gathered; others are whole on every process anyway."""
        return nullcontext(list(parameters)) if self._shards is None else self._shards.gathered(parameters)

    def save(self, folder: Path) -> None:
        """One file, written by process 0; where the model is sharded, the shards of all processes beside it."""
        state = {"scheduler": self._scheduler.state_dict()}
        if self._shards is not None:
            self._shards.save(folder / "engine")
        else:
            state |= {"model": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}
        if self.rank == 0:
            (folder / "engine").mkdir(exist_ok=True)
            torch.save(state, folder / "engine" / "state.pt")

    def load(self, folder: Path) -> None:
        """Read it back on every process."""
        state = torch.load(folder / "engine" / "state.pt", map_location=self.device, weights_only=True)
        if self._shards is not None:
            self._shards.load(folder / "engine")
        else:
            self._module.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Forget the wrapped model."""
        self.partitioned, self._shards = False, None
        self._model = self._module = self._optimizer = self._scheduler = None
