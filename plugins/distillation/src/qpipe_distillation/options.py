"""Options of `distillation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qpipe import Options


class DistillationOptions(Options):
    """What of the teacher is learned. The defaults are Hinton's distillation beside the task's own loss."""

    logits: Literal["none", "kl", "mse"] = Field("kl", description="how logits are compared; regression needs `mse`")
    hidden: Literal["none", "cosine", "mse"] = Field("none", description="how hidden states are compared")
    attention: Literal["none", "mse"] = Field(
        "none", description="how attention scores are compared; makes both models build attention maps"
    )
    temperature: float = Field(2.0, gt=0, description="divides both logits in `kl`, which is multiplied by its square")
    layers: Literal["uniform", "last"] = Field(
        "uniform", description="layers whose states and attention are compared: all, or the last one"
    )
    logits_weight: float = Field(1.0, gt=0)
    hidden_weight: float = Field(1.0, gt=0)
    attention_weight: float = Field(1.0, gt=0)
    task_loss: bool = Field(True, description="keep the task's own loss beside these")

    @model_validator(mode="after")
    def _learns_something(self) -> DistillationOptions:
        if self.logits == self.hidden == self.attention == "none":
            raise ValueError("nothing is distilled: set logits, hidden or attention to something other than none")
        if self.logits == "none" and not self.task_loss:
            raise ValueError("nothing trains the head: set logits to kl or mse, or task_loss: true")
        return self
