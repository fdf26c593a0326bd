"""Options of `ti-o`, `ti-m` and `ti-g`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qpipe import LossWeight, Options
from qpipe_teacher_intervention.schedule import SCHEDULES, Part, ScheduleName

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"schedule": "paper", "two_step": True, "steps": 60},
    "reference": {"schedule": "reference", "two_step": True, "steps": 60, "output_loss_on": "norm"},
}
"""Options that a preset sets, where the user does not; `schedule` in `ti-g` only.

`paper`: its text, with the length of the authors' scripts, since it says no more than "a fraction of an epoch".
`reference`: their code.
"""


class InterventionOptions(Options):
    """Schedule and losses. The plugins differ in `schedule` only."""

    fixed_schedule: ClassVar[bool] = False

    preset: Literal["none", "paper", "reference"] = Field(
        "none", description="a published recipe, which gives the defaults of the other options"
    )
    schedule: ScheduleName | tuple[Part, ...] = Field(
        "reference", description="a named schedule, or a list of {kind: output|context|map, fraction: ...} summing to 1"
    )
    steps: int | None = Field(None, gt=0, description="optimizer steps with intervention; overrides `fraction`")
    fraction: float = Field(0.25, gt=0, le=1, description="part of the training with intervention")
    two_step: bool = Field(
        False,
        description="the intervention is a training of its own, with its own learning-rate schedule; the rest starts "
        "from its last weights with a fresh optimizer",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="of the intervention, with `two_step`; null: `train.learning_rate`"
    )
    warmup: float | None = Field(None, ge=0, lt=1, description="part of it, likewise; null: `train.warmup`")
    in_evaluation: bool = Field(
        False,
        description="the teacher's attention stands in at evaluations during the intervention too; they are logged, "
        "and never count as the best or as the run's result",
    )
    layer_map: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(
        None,
        min_length=1,
        description="the teacher's layer, from 1, for each layer of the student; null: both have the same number",
    )
    logits_loss: LossWeight = Field(
        1.0, description="weight of the loss on logits: a number, or {schedule, initial, final, start, stop}"
    )
    hidden_loss: LossWeight = Field(1.0, description="likewise, on hidden states")
    score_loss: LossWeight = Field(1.0, description="likewise, on attention scores; needs attention maps")
    output_loss: LossWeight = Field(1.0, description="likewise, on attention outputs")
    output_loss_on: Literal["projection", "norm"] = Field(
        "projection",
        description="what it compares: the student's own output projection, or what enters the feed-forward network, "
        "after the replacement, the residual and the LayerNorm",
    )
    task_loss: bool = Field(False, description="keep the task's own loss beside these")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The schedule as a list of parts."""
        return SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """A preset's options, under those that are given."""
        if not isinstance(given, dict):
            return given
        found = dict(PRESETS.get(str(given.get("preset")), {}))
        if cls.fixed_schedule:
            found.pop("schedule", None)
        if "fraction" in given:  # it says the length too
            found.pop("steps", None)
        return {**found, **given}

    @model_validator(mode="after")
    def _is_a_schedule(self) -> InterventionOptions:
        total = sum(part.fraction for part in self.parts)
        if not self.parts or abs(total - 1) > 1e-3:
            raise ValueError(f"the fractions of `schedule` must sum to 1, not {total:.4g}")
        if not self.two_step and not (self.learning_rate is self.warmup is None):
            raise ValueError("learning_rate and warmup belong to two_step: true; set that, or leave them out")
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> InterventionOptions:
        if not self.task_loss and self.logits_loss == 0:
            raise ValueError("nothing trains the head: set logits_loss above 0, or task_loss: true")
        return self


class OutputOptions(InterventionOptions):
    """Options of `ti-o`."""

    fixed_schedule: ClassVar[bool] = True

    schedule: ScheduleName | tuple[Part, ...] = "output"


class MapOptions(InterventionOptions):
    """Options of `ti-m`."""

    fixed_schedule: ClassVar[bool] = True

    schedule: ScheduleName | tuple[Part, ...] = "map"
