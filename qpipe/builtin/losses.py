"""The task's own loss."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from qpipe.plugin import Plugin, hookimpl
from qpipe.run import Run, Step
from qpipe.types import Loss


def classification_loss(step: Step) -> Tensor:
    """Cross-entropy of logits `[batch, classes]` in float32, mean over the batch."""
    return F.cross_entropy(step.output.logits.float(), step.batch["labels"])


def regression_loss(step: Step) -> Tensor:
    """Mean squared error of logits `[batch, 1]` in float32."""
    return F.mse_loss(step.output.logits.float().squeeze(-1), step.batch["labels"].float())


def causal_lm_loss(step: Step) -> Tensor:
    """Cross-entropy of each next token, mean over the tokens whose label is not -100."""
    logits, labels = step.output.logits.float(), step.batch["labels"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


LOSSES = {
    "classification": classification_loss,
    "image-classification": classification_loss,
    "regression": regression_loss,
    "causal-lm": causal_lm_loss,
}


class TaskLoss(Plugin):
    """`task`: the supervised loss of the task."""

    @hookimpl
    def qpipe_losses(self, run: Run) -> Iterable[Loss]:
        """The loss for the task's kind."""
        yield Loss("task", LOSSES[run.task.kind])
