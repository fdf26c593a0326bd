"""DeepSpeed, called directly: ZeRO 0 to 3 and offload, on GPUs over NCCL or CPUs over gloo."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qpipe.config import EngineConfig, TrainConfig
from qpipe.engine.base import Placement, Processes, choose_device, join_processes, resolve_precision
from qpipe.engine.clipping import clip_each, zero_fragments
from qpipe.engine.operators import build_cpu_operators
from qpipe.errors import ConfigError

MANAGED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)
"""DeepSpeed keys that qpipe's own configuration decides."""


class DeepSpeedEngine(Processes):
    """See `Engine`."""

    name = "deepspeed"

    def __init__(self, config: EngineConfig) -> None:
        merge_config_file({"zero_optimization": {}}, config)  # what is wrong in it shows before anything long begins
        self.device = choose_device(config)
        if self.device.type == "cpu":
            # DeepSpeed picks its accelerator when it is imported.
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._deepspeed = deepspeed
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.device.type == "cpu":
            build_cpu_operators()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        join_processes(backend)
        with redirect_stdout(io.StringIO()):  # it reports every operator it builds, from every process
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.config = config
        self.dtype = resolve_precision(config, self.device)
        self.partitioned = False
        self._engine: Any = None
        self._held: list[Any] = []
        self._clip = 0.0
        self._norm: float | None = None

    def settings(self, train: TrainConfig) -> dict[str, Any]:
        """The DeepSpeed configuration.

        Raises:
            ConfigError: `engine.config_file` sets a key that qpipe manages.
        """
        zero: dict[str, Any] = {"stage": self.config.zero}
        if self.config.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.config.offload == "all":
            zero["offload_param"] = {"device": "cpu"}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": train.micro_batch_size(self.world_size),
            "gradient_accumulation_steps": train.accumulation,
            "gradient_clipping": 0.0 if train.clips_tensors else train.clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        return merge_config_file(settings, self.config)

    def wrap(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        train: TrainConfig,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        """Hand model and optimizer to DeepSpeed, which partitions parameter by parameter and needs no `blocks`."""
        settings = self.settings(train)
        with _unmoved(optimizer) if self.config.zero == 0 else nullcontext():
            self._engine, *_ = self._deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
            )
        self.partitioned = settings["zero_optimization"]["stage"] == 3
        self._clip = train.clip if train.clips_tensors else 0.0
        if self._clip:
            refuse_separate_gradients(self._engine.optimizer)

    def hold(self, model: nn.Module, placement: Placement, blocks: Sequence[nn.Module] = ()) -> Callable[..., Any]:
        """Shard with ZeRO stage 3 whatever the stage of the trained model: an engine of its own, without optimizer."""
        if placement == "whole":
            return super().hold(model, placement)
        settings = frozen_settings(self.config, model, placement)
        # Partitioned one by one, so that the device never holds all of them.
        remote = "cpu" if placement == "cpu" else None
        self._deepspeed.zero.Init(module=model, config_dict_or_path=settings, remote_device=remote)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.device)
        held, *_ = self._deepspeed.initialize(model=model, config=settings, dist_init_required=False)
        self._held.append(held.eval())
        call: Callable[..., Any] = held
        return call

    def begin_micro_batch(self, last: bool) -> None:
        """Nothing to do: DeepSpeed counts micro-batches itself."""

    def forward(self, **inputs: Tensor | bool) -> Any:
        """Call the DeepSpeed engine."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed divides by the accumulation steps."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Count the micro-batch; update at the end of the step."""
        stage = self.config.zero
        untold = stage == 0 and self.dtype == torch.float32  # DeepSpeed keeps no norm there
        if (self._clip or untold) and self._engine.is_gradient_accumulation_boundary():
            fragments = zero_fragments(self._engine.module, stage)
            self._norm = clip_each(fragments, self._clip, shared=stage > 0, device=self.device)
        self._engine.step()

    def grad_norm(self) -> float | None:
        """Norm before clipping."""
        norm = self._engine.get_global_grad_norm() if self._norm is None else self._norm
        if norm is None:
            return None
        return float(norm) if float(norm) >= 0 else math.inf  # -1 is DeepSpeed's word for inf and NaN

    @contextmanager
    def gathered(self, parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """The parameters themselves; partitioned ones are gathered in place meanwhile."""
        found = list(parameters)
        with self._deepspeed.zero.GatheredParameters(found) if self.partitioned else nullcontext():
            yield found

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint, in `folder/engine`."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read `folder/engine`.

        Raises:
            RuntimeError: DeepSpeed finds nothing there.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks."""
        for engine in (self._engine, *self._held):
            if engine is not None:
                engine.destroy()
        self._engine, self._held = None, []


@contextmanager
def _unmoved(optimizer: Optimizer) -> Iterator[None]:
    """Within, steps of an optimizer change nothing; afterwards it has taken none.

    For bfloat16 without ZeRO, DeepSpeed takes a step with zero gradients to have the optimizer allocate its state. It
    decays weights, and counts as the first one in bias corrections.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.state.clear()


def frozen_settings(config: EngineConfig, model: nn.Module, placement: Placement) -> dict[str, Any]:
    """The DeepSpeed configuration of a model without gradients, sharded.

    What `engine.config_file` says of stage 3 holds here too, where the trained model has that stage.
    """
    zero: dict[str, Any] = {"stage": 3}
    if config.zero == 3:
        extra = merge_config_file({"zero_optimization": zero}, config)["zero_optimization"]
        zero |= {key: value for key, value in extra.items() if key.startswith("stage3_")}
    if placement == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    bfloat16 = all(p.dtype == torch.bfloat16 for p in model.parameters())
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and without meaning here
        "bf16": {"enabled": bfloat16},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }


def refuse_separate_gradients(optimizer: Any) -> None:
    """Refuse clipping tensor by tensor where DeepSpeed keeps a second, whole copy of each gradient for its update.

    Raises:
        ConfigError: it does.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(optimizer, BF16_Optimizer):
        raise ConfigError(
            "engine.config_file accumulates bfloat16 gradients in float32 under ZeRO stage 1, where they cannot be "
            "clipped tensor by tensor; set engine.zero: 2 or 3, train.clip_by: model, or remove data_types"
        )


def merge_config_file(settings: dict[str, Any], config: EngineConfig) -> dict[str, Any]:
    """Add the keys of `engine.config_file`.

    Raises:
        ConfigError: the file is missing, holds no JSON object, or sets a managed key or another ZeRO stage.
    """
    if config.config_file is None:
        return settings
    extra = _read(Path(config.config_file))
    clash = [key for key in MANAGED if key in extra and extra[key] != "auto"]
    if clash:
        raise ConfigError(
            f"engine.config_file sets {', '.join(clash)}, which qpipe decides; remove them and use train.batch_size, "
            "train.accumulation, train.clip, train.learning_rate, engine.precision"
        )
    zero = {**extra.pop("zero_optimization", {})}
    stage = zero.pop("stage", config.zero)
    if stage != config.zero:
        raise ConfigError(
            f"engine.config_file asks for ZeRO stage {stage}, engine.zero is {config.zero}; set both equal"
        )
    merged = {**{k: v for k, v in extra.items() if k not in MANAGED}, **settings}
    merged["zero_optimization"] = {**settings["zero_optimization"], **zero}
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"engine.config_file {str(path)!r}: {error.strerror}; give a DeepSpeed JSON file") from error
    except ValueError as error:
        raise ConfigError(f"engine.config_file {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"engine.config_file {str(path)!r} must hold an object, not a {type(value).__name__}")
    return value
