"""Distillation losses of teacher intervention, as functions of tensors. All compute in float32.

Kim et al., "Teacher Intervention: Improving Convergence of Quantization Aware Training for Ultra-Low Precision
Transformers" (EACL 2023), section 3, with the normalisation of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST = -100.0
"""Scores down to here count as 0; the reference code finds masked entries this way, and meets extreme ones too."""


def soft_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`-sum_c softmax(teacher)_c log softmax(student)_c`, summed over classes and averaged over everything else.

    Args:
        student: logits `[batch, classes]` or `[batch, tokens, classes]`.
        teacher: logits of the same shape.
        mask: `[batch, tokens]`, non-zero where a token counts; for logits per token only.
    """
    losses = -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1)
    if mask is None:
        return losses.mean()
    weights = mask.to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp_min(1)


def summed_mse(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Mean squared error of each pair of tensors, summed over pairs.

    The mean is over all elements, padded tokens included, as in the reference code.
    """
    pairs = zip(students, teachers, strict=True)
    return torch.stack([F.mse_loss(student.float(), teacher.float()) for student, teacher in pairs]).sum()


def visible_keys(scores: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which entries of `[batch, heads, queries, keys]` the softmax sees, broadcastable; None if all.

    Args:
        scores: for shape and device.
        attention_mask: `[batch, keys]`, non-zero at real tokens, or None.
        causal: True if a query sees no later key.
    """
    visible = None if attention_mask is None else attention_mask[:, None, None, :].bool()
    if not causal:
        return visible
    queries, keys = scores.shape[-2:]
    lower = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    return lower if visible is None else visible & lower


def score_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], attention_mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Mean squared error of attention scores, summed over layers; masked entries count as equal.

    As in the reference code the mean is over all entries, masked ones included; padded queries take part; and a score
    of -100 or less counts as 0, with no gradient.

    Args:
        students: scores per layer `[batch, heads, queries, keys]`, before the mask.
        teachers: likewise.
        attention_mask: `[batch, keys]`, non-zero at real tokens, or None.
        causal: True if a query sees no later key.
    """
    losses = []
    for student, teacher in zip(students, teachers, strict=True):
        difference = F.threshold(student.float(), LOWEST, 0.0) - F.threshold(teacher.float(), LOWEST, 0.0)
        visible = visible_keys(student, attention_mask, causal)
        if visible is not None:
            difference = difference.masked_fill(~visible, 0.0)
        losses.append(difference.square().mean())
    return torch.stack(losses).sum()
