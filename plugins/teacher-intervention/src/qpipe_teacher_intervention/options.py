"""Options of `ti-o`, `ti-m` and `ti-g`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qpipe import Options
from qpipe_teacher_intervention.schedule import PRESETS, Part


class InterventionOptions(Options):
    """Schedule and losses. The presets differ in `schedule` only."""

    schedule: Literal["paper", "reference", "output", "context", "map"] | tuple[Part, ...] = Field(
        "reference", description="a named schedule, or a list of {kind: output|context|map, fraction: ...} summing to 1"
    )
    steps: int | None = Field(None, gt=0, description="optimizer steps with intervention; overrides `fraction`")
    fraction: float = Field(0.25, gt=0, le=1, description="part of the training with intervention")
    logits_loss: float = Field(1.0, ge=0, description="weight of the loss on logits")
    hidden_loss: float = Field(1.0, ge=0, description="weight of the loss on hidden states")
    score_loss: float = Field(1.0, ge=0, description="weight of the loss on attention scores; needs attention maps")
    output_loss: float = Field(1.0, ge=0, description="weight of the loss on attention outputs")
    task_loss: bool = Field(False, description="keep the task's own loss beside these")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The schedule as a list of parts."""
        return PRESETS[self.schedule] if isinstance(self.schedule, str) else self.schedule

    @model_validator(mode="after")
    def _is_a_schedule(self) -> InterventionOptions:
        total = sum(part.fraction for part in self.parts)
        if not self.parts or abs(total - 1) > 1e-3:
            raise ValueError(f"the fractions of `schedule` must sum to 1, not {total:.4g}")
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> InterventionOptions:
        if not self.task_loss and self.logits_loss == 0:
            raise ValueError("nothing trains the head: set logits_loss above 0, or task_loss: true")
        return self


class OutputOptions(InterventionOptions):
    """Options of `ti-o`."""

    schedule: Literal["paper", "reference", "output", "context", "map"] | tuple[Part, ...] = "output"


class MapOptions(InterventionOptions):
    """Options of `ti-m`."""

    schedule: Literal["paper", "reference", "output", "context", "map"] | tuple[Part, ...] = "map"
