"""Weights of loss terms that change over the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qpipe.plugin import Options


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
            raise ValueError("a weight that is always 0 trains nothing: leave the term out instead")
        if self.schedule == "step" and not 0 < self.start < 1:
            raise ValueError(
                f"start {self.start:g}: a step lies within the training; give a start above 0 and below 1, such as 0.5"
            )
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


LossWeight = Annotated[float, Field(ge=0)] | WeightSchedule
"""Type of an option that is the weight of a loss term: a number of at least 0, or a schedule (never 0 throughout)."""


def weight_function(weight: float | WeightSchedule, total: int) -> float | Callable[[int], float]:
    """What `Loss.weight` takes: the number, or a function of the optimizer step.

    Args:
        weight: as configured.
        total: optimizer steps of the training (`run.total_steps`).
    """
    return (lambda step: weight.at(step, total)) if isinstance(weight, WeightSchedule) else weight
