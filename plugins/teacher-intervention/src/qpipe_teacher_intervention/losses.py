"""The distillation losses of teacher intervention.

Kim et al., "Teacher Intervention: Improving Convergence of Quantization Aware Training for Ultra-Low Precision
Transformers" (EACL 2023), section 3, with the normalisation of the authors' code: sums over layers of means over all
elements, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qpipe import Loss, Run, Step, all_scores_mse, hidden_mse, logits_kl, logits_mse, weight_function
from qpipe_teacher_intervention.options import InterventionOptions
from qpipe_teacher_intervention.taps import FFN_INPUT

LOWEST = -100.0
"""Scores down to here count as 0; the authors' code finds masked entries this way, and meets extreme ones too."""


def distillation_losses(run: Run, options: InterventionOptions, layers: Sequence[int]) -> Iterable[Loss]:
    """The losses whose weight is not 0; the first stands in for the task loss unless that is kept.

    Args:
        run: with both models.
        options: the weights.
        layers: the teacher's layer for each layer of the student, from 0.
    """
    output = FFN_INPUT if options.output_loss_on == "norm" else "attention_output"

    def logits(step: Step) -> Tensor:
        student, teacher = step.student["logits", 0], step.teacher["logits", 0]
        mask = step.batch.get("attention_mask")
        if run.task.kind == "regression":
            return logits_mse(student, teacher, mask)
        return logits_kl(student, teacher, 1.0, mask, entropy=True)

    def hidden(step: Step) -> Tensor:
        states = [0, *(layer + 1 for layer in layers)]
        return total(hidden_mse(*pair, None) for pair in pairs(step, "hidden_states", states))

    def scores(step: Step) -> Tensor:
        return total(
            all_scores_mse(*pair, step.student["visible", ours], LOWEST)
            for ours, pair in enumerate(pairs(step, "scores", layers))
        )

    def outputs(step: Step) -> Tensor:
        return total(hidden_mse(*pair, None) for pair in pairs(step, output, layers))

    terms = [
        ("ti/logits", logits, options.logits_loss),
        ("ti/hidden", hidden, options.hidden_loss),
        ("ti/scores", scores, options.score_loss),
        ("ti/output", outputs, options.output_loss),
    ]
    replaces: tuple[str, ...] = () if options.task_loss else ("task",)
    for name, fn, weight in terms:
        if weight != 0:
            yield Loss(name, fn, weight_function(weight, run.total_steps), replaces)
            replaces = ()


def pairs(step: Step, kind: str, layers: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
    """The student's tensor of each layer, with that of the teacher's layer for it."""
    return ((step.student[kind, ours], step.teacher[kind, theirs]) for ours, theirs in enumerate(layers))


def total(values: Iterable[Tensor]) -> Tensor:
    """Sum of scalars."""
    return torch.stack(list(values)).sum()
