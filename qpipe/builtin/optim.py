"""The default optimizer, schedule and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from qpipe.builtin.bert_adam import BertAdam, warmup_linear
from qpipe.plugin import Plugin, hookimpl
from qpipe.run import Run
from qpipe.types import ParamGroup


class Optim(Plugin):
    """AdamW or BertAdam; schedules with warm-up; no decay of biases, normalisations and quantizers."""

    @hookimpl
    def qpipe_param_groups(self, run: Run) -> Iterable[ParamGroup]:
        """`no_decay`: every parameter with one dimension; `quantizers`: those of quantizers, by their settings."""
        settings = {
            id(parameter): (quantizer.lr_scale, quantizer.weight_decay)
            for quantizer in run.instruments.quantizers().values()
            for parameter in quantizer.parameters()
        }

        def is_vector(name: str, parameter: nn.Parameter) -> bool:
            return parameter.ndim <= 1 and id(parameter) not in settings

        yield ParamGroup("no_decay", is_vector, weight_decay=0.0)
        for scale, decay in sorted(set(settings.values()), key=str):
            members = {key for key, value in settings.items() if value == (scale, decay)}
            suffix = "" if decay == 0 else "-decay" if decay is None else f"-decay-{decay:g}"
            yield ParamGroup(f"quantizers-{scale:g}{suffix}", _among(members), lr_scale=scale, weight_decay=decay)

    @hookimpl(trylast=True)
    def qpipe_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer | None:
        """`train.optimizer`. AdamW has betas 0.9, 0.999, and is fused: one pass over each parameter, not a dozen."""
        if run.config.train.optimizer == "bert-adam":
            return BertAdam(groups, lr=run.config.train.learning_rate)
        return AdamW(groups, lr=run.config.train.learning_rate, fused=True)

    @hookimpl(trylast=True)
    def qpipe_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler | None:
        """The schedule of `train.schedule` over each phase of `run.phases`."""
        train = run.config.train
        parts = []
        for phase in run.phases:
            assert phase.learning_rate is not None and phase.warmup is not None  # the core has filled them in
            shape = schedule_shape(train.schedule, phase.steps, phase.warmup)
            parts.append((phase, phase.learning_rate / train.learning_rate, shape))

        def factor(step: int) -> float:
            phase, scale, shape = next((part for part in parts if step < part[0].stop), parts[-1])
            return scale * shape(step - phase.start)

        return LambdaLR(optimizer, factor)


def schedule_shape(name: str, steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on the learning rate, 0..1, in each step of a training.

    Args:
        name: of the schedule, as in `train.schedule`.
        steps: length of the training.
        warmup: part of it in which the rate rises, 0..1.
    """
    if name == "bert-linear":
        return partial(warmup_linear, total=steps, warmup=warmup)
    from transformers import get_scheduler

    names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    # transformers makes schedules for optimizers only, and each takes its optimizer over; this one trains nothing.
    unused = SGD([nn.Parameter(torch.zeros(()))])
    made = get_scheduler(names[name], unused, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    shape: Callable[[int], float] = made.lr_lambdas[0]
    return shape


def _among(members: set[int]) -> Callable[[str, nn.Parameter], bool]:
    """Whether a parameter is one of those with these ids."""
    return lambda name, parameter: id(parameter) in members
