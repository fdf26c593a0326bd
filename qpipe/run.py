"""The state that stages pass on: `Run`, and `Step` within training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.types import Signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler

    from qpipe.config import RunConfig
    from qpipe.data.loading import TaskData
    from qpipe.engine.base import Engine
    from qpipe.host import Host
    from qpipe.model.instrument import Instruments
    from qpipe.quant.plan import Plan
    from qpipe.stages.signal_cache import SignalCache
    from qpipe.types import Task, TrainingPhase, WeightLoss


@dataclass
class Step:
    """One micro-batch on its way through training.

    Attributes:
        index: optimizer step, from 0.
        is_last_micro_batch: True on the micro-batch that ends the optimizer step.
        batch: what the model is called with.
        output: the student's output.
        student: captured student signals by `(kind, layer)`; `("logits", 0)` for signals without layers.
        teacher: captured teacher signals, likewise; no gradients.
        number: of the micro-batch within the optimizer step, from 0.
        signals: what plugins wanted in it.
    """

    index: int
    is_last_micro_batch: bool
    batch: dict[str, Tensor]
    output: Any = None
    student: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    teacher: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    number: int = 0
    signals: Signals = field(default_factory=Signals)


@dataclass
class Run:
    """Everything the stages share. Holds state, has no logic.

    Attributes:
        config: the resolved configuration.
        host: the plugins.
        engine: how processes work together.
        task: what is learned.
        data: the processed splits and the tokenizer.
        student: the model being quantized.
        teacher: the full-precision model, or None.
        instruments: access to sites, taps and signals of the student.
        teacher_instruments: the same of the teacher, where a plugin asks for signals.
        teacher_forward: what calls the teacher, once the engine holds it.
        teacher_cache: what is kept on disk of its signals, where the configuration says so.
        plan: which quantizer sits at which site.
        weight_losses: penalties on weights that are in place.
        scheduler: the learning-rate schedule.
        total_steps: optimizer steps of the whole training; 0 where nothing will be trained, and so no teacher is there:
            a plan that is only looked at, a finished run, quantization without training. A run that is only prepared to
            find errors, before a plugin has changed its data, has a number that no training reaches.
        phases: the parts of the training, in order and without gaps; empty where nothing will be trained.
        trained: True for a finished run that was loaded to evaluate or export it.
        step: the micro-batch under way, None outside training.
        results: what has been measured so far, by stage.
        input_files: what is read besides the model (`stages.input_files`), once a checkpoint has been written.
    """

    config: RunConfig
    host: Host
    engine: Engine
    task: Task
    data: TaskData
    student: nn.Module
    teacher: nn.Module | None = None
    instruments: Instruments = None  # type: ignore[assignment]
    teacher_instruments: Instruments | None = None
    teacher_forward: Callable[..., Any] | None = None
    teacher_cache: SignalCache | None = None
    plan: Plan = None  # type: ignore[assignment]
    weight_losses: tuple[WeightLoss, ...] = ()
    scheduler: LRScheduler = None  # type: ignore[assignment]
    total_steps: int = 0
    phases: tuple[TrainingPhase, ...] = ()
    trained: bool = False
    step: Step | None = None
    results: dict[str, Any] = field(default_factory=dict)
    input_files: dict[str, Any] | None = None

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.config.out)
