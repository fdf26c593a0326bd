"""Attention: maps of one example, and how much of the attention goes to separators.

Bondarenko et al. (EMNLP 2021), section 3 and figure 5: heads that look at separators to do nothing make the outliers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpipe.types import Json

DIGITS = 4


def attention_maps(
    probs: Sequence[Sequence[Tensor]], separators: Sequence[Sequence[int]], longest: int = 64
) -> dict[str, Json]:
    """Maps and attention to separators of every layer.

    Args:
        probs: by layer and example, `[heads, tokens, tokens]`.
        separators: positions of separator tokens per example.
        longest: tokens of the shown map.

    Returns:
        `maps`: of the first example, by layer and head, rounded; `separators`: by layer, for each head the mean part of
        a token's attention that goes to separators; None where examples have none.
    """
    shown = [layer[0][:, :longest, :longest] for layer in probs]
    return {
        "maps": [[_rounded(head) for head in layer] for layer in shown],
        "separators": [_to(layer, separators) for layer in probs] if any(separators) else None,
    }


def _rounded(head: Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in head.tolist()]


def _to(layer: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> list[float]:
    parts = [probs[:, :, list(spots)].sum(2).mean(1) for probs, spots in zip(layer, positions, strict=True) if spots]
    return [round(value, DIGITS) for value in torch.stack(parts).mean(0).tolist()]
