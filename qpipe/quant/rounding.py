"""Rounding to a uniform lattice, fused over blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 256 * 1024
"""Working set of one block: small enough to stay in a core's second-level cache through all passes."""


def round_to_codes(value: Tensor, scale: Tensor, zero_point: Tensor | float, low: int, high: int) -> Tensor:
    """`clamp(round(value / scale + zero_point), low, high)`, ties to even, as float32.

    Args:
        value: float tensor; computed in float32 whatever its dtype.
        scale: float32, positive, broadcastable.
        zero_point: float or float32 tensor, broadcastable.
        low: smallest code.
        high: largest code.
    """
    codes = torch.div(value.float(), scale)
    if isinstance(zero_point, Tensor) or zero_point != 0:
        codes.add_(zero_point)
    return codes.round_().clamp_(low, high)


def block_rows(value: Tensor) -> int:
    """Rows of a 2-D tensor per block: all of them where there is no cache to fit into."""
    if value.device.type != "cpu":
        return max(1, value.shape[0])
    return max(1, BLOCK_BYTES // max(1, 4 * value.shape[1]))
