"""The task's own loss."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from qpipe.data.metrics import IGNORED
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


def masked_lm_loss(step: Step) -> Tensor:
    """Cross-entropy of the masked tokens, mean over those of an example and then over examples.

    Unlike a mean over the tokens of a batch this does not depend on how the batch is shared out to processes.
    """
    logits, labels = step.output.logits, step.batch["labels"]
    masked = labels != IGNORED
    losses = F.cross_entropy(logits[masked].float(), labels[masked], reduction="none")
    weights = masked / masked.sum(1, keepdim=True).clamp(min=1)
    return (losses * weights[masked]).sum() / len(labels)


def intent_slot_loss(step: Step) -> Tensor:
    """Cross-entropy of the intent plus that of the tags, mean over the words of an example; mean over examples.

    Chen, Zhuo & Wang, "BERT for joint intent classification and slot filling" (2019), with one softmax over the labels
    of both kinds: what the head says is then a distribution at every token, which other programs and losses on it need.
    """
    logits, labels = step.output.logits.float(), step.batch["labels"]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    words = (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)
    return (losses[:, 0] + losses[:, 1:].sum(1) / words).mean()


LOSSES = {
    "classification": classification_loss,
    "image-classification": classification_loss,
    "regression": regression_loss,
    "causal-lm": causal_lm_loss,
    "masked-lm": masked_lm_loss,
    "intent-slot": intent_slot_loss,
}


class TaskLoss(Plugin):
    """`task`: the supervised loss of the task."""

    @hookimpl
    def qpipe_losses(self, run: Run) -> Iterable[Loss]:
        """The loss for the task's kind."""
        yield Loss("task", LOSSES[run.task.kind])
