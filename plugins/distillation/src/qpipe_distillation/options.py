"""Options of `distillation`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qpipe import Options
from qpipe_distillation.presets import PRESETS
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
    score_floor: float | None = Field(None, lt=0, description="with `padding: include`, scores down to it count as 0")
    logits_weight: Weight = Field(1.0, description="a number, or {schedule, initial, final, start, stop}")
    hidden_weight: Weight = Field(1.0, description="likewise")
    attention_weight: Weight = Field(1.0, description="likewise")
    output_weight: Weight = Field(1.0, description="likewise")
    task_loss: bool = Field(True, description="keep the task's own loss beside these")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """A preset's options, under those that are given."""
        if not isinstance(given, dict):
            return given
        return {**PRESETS.get(str(given.get("preset")), {}), **given}

    @model_validator(mode="after")
    def _learns_something(self) -> DistillationOptions:
        if self.logits == self.hidden == self.attention == self.output == "none":
            raise ValueError("nothing is distilled: set logits, hidden, attention or output to other than none")
        if self.score_floor is not None and self.padding == "exclude":
            raise ValueError("score_floor belongs to padding: include; set that, or leave score_floor out")
        if self.logits == "none" and not self.task_loss:
            raise ValueError("nothing trains the head: set logits to kl or mse, or task_loss: true")
        return self
