"""Options of `distillation`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qpipe import Options
from qpipe_distillation.presets import STEPS, filled_in
from qpipe_distillation.schedule import Weight


class DistillationOptions(Options):
    """What of the teacher is learned. The defaults are Hinton's distillation beside the task's own loss."""

    preset: Literal["none", "ternarybert", "xtc", "tinybert"] = Field(
        "none", description="a published recipe, which gives the defaults of the other options"
    )
    logits: Literal["none", "kl", "soft-ce", "mse"] = Field(
        "kl", description="how logits are compared; regression needs `mse`"
    )
    classes: Literal["sum", "mean"] = Field(
        "sum", description="how `kl` and `soft-ce` combine classes; `mean` divides by their number"
    )
    hidden: Literal["none", "cosine", "mse"] = Field("none", description="how hidden states are compared")
    attention: Literal["none", "mse"] = Field(
        "none", description="how attention scores are compared; makes both models build attention maps"
    )
    output: Literal["none", "mse", "cosine"] = Field(
        "none", description="how the outputs of attention's output projections are compared"
    )
    temperature: float = Field(
        2.0, gt=0, description="divides both logits in `kl` and `soft-ce`, which are multiplied by its square"
    )
    layers: Literal["uniform", "last"] = Field(
        "uniform", description="layers whose states and attention are compared: all, or the last one"
    )
    layer_map: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="the teacher's layer, from 1, for each layer of the student; one number more, first, for what the "
        "embeddings' output is compared with (0: theirs); null: evenly spaced layers",
    )
    padding: Literal["exclude", "include"] = Field(
        "exclude",
        description="exclude: means over the real tokens of an example, then over examples; include: over all "
        "elements, padding too, as in published code",
    )
    masked_keys: Literal["equal", "compare"] = Field(
        "equal",
        description="with `padding: include`, whether scores at masked keys count as equal in student and teacher, or "
        "are compared like all others",
    )
    score_floor: float | None = Field(None, lt=0, description="with `padding: include`, scores down to it count as 0")
    logits_weight: Weight = Field(1.0, description="a number, or {schedule, initial, final, start, stop}")
    hidden_weight: Weight = Field(1.0, description="likewise")
    attention_weight: Weight = Field(1.0, description="likewise")
    output_weight: Weight = Field(1.0, description="likewise")
    task_loss: bool = Field(True, description="keep the task's own loss beside these")
    two_step: bool = Field(
        False,
        description="hidden states, attention and outputs are learned first, in a training of their own with its own "
        "learning-rate schedule; then logits alone, from its last weights with a fresh optimizer",
    )
    steps: int | None = Field(
        None, gt=0, description="optimizer steps of the first step, with `two_step`; overrides `fraction`"
    )
    fraction: float | None = Field(None, gt=0, lt=1, description="part of the training that it takes, likewise")
    learning_rate: float | None = Field(None, gt=0, description="of it, likewise; null: `train.learning_rate`")
    warmup: float | None = Field(None, ge=0, lt=1, description="part of it, likewise; null: `train.warmup`")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """A preset's options, under those that are given."""
        if not isinstance(given, dict):
            return given
        return filled_in(given)

    @model_validator(mode="after")
    def _learns_something(self) -> DistillationOptions:
        if self.logits == self.hidden == self.attention == self.output == "none":
            raise ValueError("nothing is distilled: set logits, hidden, attention or output to other than none")
        if self.layer_map is not None and self.hidden == self.attention == self.output == "none":
            raise ValueError(
                f"layer_map {list(self.layer_map)} is given and nothing of layers is compared: set hidden, attention "
                "or output to other than none, or leave layer_map out"
            )
        if self.score_floor is not None and self.padding == "exclude":
            raise ValueError("score_floor belongs to padding: include; set that, or leave score_floor out")
        if self.masked_keys == "compare" and self.padding == "exclude":
            raise ValueError("masked_keys: compare belongs to padding: include; set that, or leave masked_keys out")
        if self.logits == "none" and not self.task_loss:
            raise ValueError("nothing trains the head: set logits to kl or mse, or task_loss: true")
        return self

    @model_validator(mode="after")
    def _has_both_steps(self) -> DistillationOptions:
        if not self.two_step:
            given = [name for name in STEPS if getattr(self, name) is not None]
            if given:
                verb = "belong" if given[1:] else "belongs"
                raise ValueError(f"{', '.join(given)} {verb} to two_step: true; set that, or leave it out")
            return self
        if self.logits == "none" or self.hidden == self.attention == self.output == "none":
            raise ValueError(
                "two_step learns layers first and logits then: set logits, and hidden, attention or output, to other "
                "than none, or leave two_step out"
            )
        if self.task_loss:
            raise ValueError("two_step learns layers alone first: set task_loss: false, or leave two_step out")
        if self.steps is self.fraction is None:
            raise ValueError("two_step: say how long the first step is, by steps or fraction")
        return self
