"""Distances between student and teacher, for losses of any plugin. All compute in float32.

Except where a function says otherwise, tokens count once per example: each mean is over the real tokens of an example
first, and then over examples, so that it does not depend on padding, nor on how a batch is shared out to processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def example_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the elements of each example, and of that over examples; a scalar.

    Args:
        values: `[batch, ...]`.
        mask: non-zero where an element counts, broadcastable to `values`; None if all count.
    """
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype).expand_as(values).flatten(1)
    return ((values.flatten(1) * weights).sum(1) / weights.sum(1).clamp_min(1)).mean()


def token_mask(logits: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask `[batch, tokens]` if the logits are `[batch, tokens, classes]`, else None."""
    return mask if logits.dim() == 3 else None


def logits_kl(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None, entropy: bool = False
) -> Tensor:
    """`T^2 * sum_c p_T log(p_T / p_S)` with `p = softmax(logits / T)`.

    Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network" (2015), section 2; the factor keeps gradients
    comparable over temperatures. Its gradient is that of the cross-entropy with soft targets.

    Args:
        student: `[batch, classes]` or `[batch, tokens, classes]`.
        teacher: of the same shape.
        temperature: above 0.
        mask: `[batch, tokens]`, non-zero at real tokens; for logits of tokens only.
        entropy: True for that cross-entropy itself, `-T^2 * sum_c p_T log p_S`.
    """
    ours = (student.float() / temperature).log_softmax(-1)
    theirs = (teacher.float() / temperature).log_softmax(-1)
    terms = -theirs.exp() * ours if entropy else F.kl_div(ours, theirs, reduction="none", log_target=True)
    return temperature**2 * example_mean(terms.sum(-1), token_mask(student, mask))


def logits_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of logits; shapes as in `logits_kl`."""
    return example_mean((student.float() - teacher.float()).square().mean(-1), token_mask(student, mask))


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """`1 - cos` of states `[batch, tokens, hidden]`, 0..2; Sanh et al., "DistilBERT" (2019)."""
    return example_mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference of states `[batch, tokens, hidden]`; Jiao et al., "TinyBERT" (2020), eq. 8."""
    if mask is None:
        return F.mse_loss(student.float(), teacher.float())
    return example_mean((student.float() - teacher.float()).square().mean(-1), mask)


def attention_mse(student: Tensor, teacher: Tensor, visible: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention scores over heads and over pairs of real tokens; "TinyBERT", eq. 7.

    Args:
        student: scores before the softmax and the mask, `[batch, heads, queries, keys]`.
        teacher: of the same shape.
        visible: the pairs that the attention sees, boolean, `[batch, 1, queries, keys]`, as the signal `visible` has
            them; None: all.
        mask: `[batch, tokens]`, non-zero at real tokens: as queries, the others do not count; None: all do.
    """
    difference = (student.float() - teacher.float()).square().mean(1)
    counts = None if visible is None else visible[:, 0]
    if mask is not None:
        queries = mask[:, :, None].bool()
        counts = queries if counts is None else counts & queries
    return example_mean(difference, counts)


def all_scores_mse(
    student: Tensor, teacher: Tensor, visible: Tensor | None = None, floor: float | None = None
) -> Tensor:
    """Mean squared difference of attention scores over all elements, as published code has it.

    Masked keys count as equal, and padded queries take part.

    Args:
        student: scores `[batch, heads, queries, keys]`.
        teacher: of the same shape; gets no gradient.
        visible: the pairs that the attention sees, boolean, `[batch, 1 or heads, queries, keys]`: the signal `visible`;
            None: no pair counts as masked.
        floor: scores down to here count as 0, with no gradient; published code finds masked entries by -100.
    """
    value: Tensor = _MeanSquare.apply(student.float(), teacher.float(), None if visible is None else ~visible, floor)
    return value


class _MeanSquare(torch.autograd.Function):
    """`all_scores_mse` of float32 scores, in as few passes over them as there can be: maps are the largest tensors."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, hidden: Tensor | None, floor: float | None) -> Tensor:
        if floor is None:
            difference = student - teacher
        else:
            difference = F.threshold(student, floor, 0.0).sub_(F.threshold(teacher, floor, 0.0))
        if hidden is not None:
            difference.masked_fill_(hidden, 0.0)
        ctx.floor = floor
        ctx.save_for_backward(difference, None if floor is None else student)
        return torch.linalg.vector_norm(difference).square() / difference.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        difference, student = ctx.saved_tensors
        result = difference * (2 * grad / difference.numel())
        if student is not None:
            result.masked_fill_(student <= ctx.floor, 0.0)
        return result, None, None, None
