"""The default optimizer, schedule and parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qpipe.plugin import Plugin, hookimpl
from qpipe.run import Run
from qpipe.types import ParamGroup


class Optim(Plugin):
    """AdamW; linear, cosine or constant schedule with warm-up; no decay of biases and normalisation weights."""

    @hookimpl
    def qpipe_param_groups(self, run: Run) -> Iterable[ParamGroup]:
        """`no_decay`: every parameter with one dimension."""

        def is_vector(name: str, parameter: nn.Parameter) -> bool:
            return parameter.ndim <= 1

        yield ParamGroup("no_decay", is_vector, weight_decay=0.0)

    @hookimpl(trylast=True)
    def qpipe_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer | None:
        """AdamW with betas 0.9, 0.999, fused: one pass over each parameter instead of a dozen."""
        return AdamW(groups, lr=run.config.train.learning_rate, fused=True)

    @hookimpl(trylast=True)
    def qpipe_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler | None:
        """The schedule of `train.schedule` over `run.total_steps`."""
        from transformers import get_scheduler

        names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
        return get_scheduler(
            names[run.config.train.schedule],
            optimizer,
            num_warmup_steps=round(run.config.train.warmup * run.total_steps),
            num_training_steps=run.total_steps,
        )
