"""Ranking: how far the order within a row of an attention map has moved from the teacher's.

Kim et al. (EACL 2023), section 5.4 and figure 6a, after Liu et al., "Post-Training Quantization for Vision Transformer"
(NeurIPS 2021). The index ranges and divisors are those of the first authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ELEMENTS = 2**24
"""Differences that are held at a time."""


def ranking_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`sum over rows, i, j of max(0, -(s_i - s_j) sign(t_i - t_j))`, with `i` from 0 to T - 2, `j` from 1 to T - 1.

    The two ranges are independent, so that most pairs count twice. 0 where every row has the teacher's order.

    Args:
        student: attention probabilities, `[heads, T, T]`.
        teacher: the same of the teacher.

    Returns:
        `[heads]`, float64.
    """
    heads, tokens = student.shape[:2]
    s, t = student.reshape(-1, tokens).double(), teacher.reshape(-1, tokens).double()
    at_once = max(1, ELEMENTS // tokens**2)
    rows = [_disorder(a, b) for a, b in zip(s.split(at_once), t.split(at_once), strict=True)]
    return torch.cat(rows).view(heads, tokens).sum(1)


def _disorder(student: Tensor, teacher: Tensor) -> Tensor:
    """Of each row, `[n]`."""
    moved = student[:, :-1, None] - student[:, None, 1:]
    order = (teacher[:, :-1, None] - teacher[:, None, 1:]).sign()
    return (-moved * order).clamp_min(0).sum((1, 2))


def cover_length(student: Tensor, teacher: Tensor, top: int = 5) -> Tensor:
    """How many entries the student ranks above the last of the teacher's `top` entries: part of T, mean over rows.

    As in the authors' code the last row is left out of the sum and counted in the mean.

    Args:
        student: attention probabilities, `[heads, T, T]`.
        teacher: the same of the teacher.
        top: entries of a row; all if it has fewer.

    Returns:
        `[heads]`, float64, below 1.
    """
    tokens = student.shape[-1]
    wanted = student.gather(-1, teacher.topk(min(top, tokens), -1).indices)
    # Counted by value, so that the order of equal entries, such as those that a causal mask leaves 0, is no matter.
    depth = tokens - torch.searchsorted(student.sort(-1).values, wanted, right=True).amin(-1).double()
    return depth[:, :-1].sum(1) / tokens**2


def mean_over_examples(values: Sequence[Tensor]) -> list[float]:
    """Mean of `[heads]` over examples, as numbers."""
    return [float(value) for value in torch.stack(list(values)).mean(0)]
