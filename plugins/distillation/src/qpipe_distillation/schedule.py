"""Weights of loss terms that change over the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qpipe import ConfigError, Options


class WeightSchedule(Options):
    """A weight that goes from one value to another. `start` and `stop` are parts of the training, 0..1."""

    schedule: Literal["linear", "cosine", "step"] = Field(
        description="linear, half a cosine, or (step) `initial` before `start` and `final` from then on"
    )
    initial: float = Field(ge=0, description="the weight up to `start`")
    final: float = Field(ge=0, description="the weight from `stop` on")
    start: float = Field(0.0, ge=0, le=1)
    stop: float = Field(1.0, ge=0, le=1, description="without effect for step")

    @model_validator(mode="after")
    def _is_a_schedule(self) -> WeightSchedule:
        if self.initial == self.final == 0:
            raise ValueError("a weight that is always 0 trains nothing: set the term to none instead")
        if self.schedule != "step" and self.start >= self.stop:
            raise ValueError(f"start {self.start:g} must come before stop {self.stop:g}")
        return self

    def at(self, step: int, total: int) -> float:
        """The weight in optimizer step `step`, from 0, of `total`."""
        done = step / max(total, 1)
        if self.schedule == "step":
            return self.initial if done < self.start else self.final
        part = min(max((done - self.start) / (self.stop - self.start), 0.0), 1.0)
        if self.schedule == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.initial + (self.final - self.initial) * part


Weight = Annotated[float, Field(gt=0)] | WeightSchedule
"""A constant above 0, or a schedule."""


def weight_function(weight: float | WeightSchedule, total: int) -> float | Callable[[int], float]:
    """What `Loss.weight` takes: the constant, or a function of the optimizer step."""
    return (lambda step: weight.at(step, total)) if isinstance(weight, WeightSchedule) else weight


def within(weight: float | Callable[[int], float], border: int, first: bool) -> Callable[[int], float]:
    """A weight that is 0 from optimizer step `border` on, or (not `first`) before it."""

    def at(step: int) -> float:
        if (step < border) != first:
            return 0.0
        return weight(step) if callable(weight) else weight

    return at


def first_steps(steps: int | None, fraction: float | None, total: int) -> int:
    """Optimizer steps of the first of two steps; the second has at least one.

    Args:
        steps: the configured number, or None for a part of the training.
        fraction: that part; at least one step.
        total: optimizer steps of the training.

    Raises:
        ConfigError: nothing is left for the second.
    """
    found = min(max(1, round(total * (fraction or 0))), max(1, total - 1)) if steps is None else steps
    if found >= total:
        raise ConfigError(
            f"the first step of distillation takes {found} optimizer steps, which leaves none of {total} for the "
            "second; lower distillation.steps, or train longer"
        )
    return found
