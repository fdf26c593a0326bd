"""Rounding to a uniform lattice, fused over blocks of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_ELEMENTS = 32 * 1024 - 1
"""Elements of one block: its float32 working set stays in a core's second-level cache through all passes, and operators
of fewer than 32768 elements run on the calling thread. Waking other threads for each of them costs as much as it saves
on idle cores, and several times the arithmetic on busy ones."""


def snap_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to `dtype`, and replace zeros (of all-zero rows) by 1. NaN stays, so that it reaches the loss.

    Args:
        scale: float tensor, non-negative. Returns float32 of the same shape.
        dtype: type that the scales are exported in.
    """
    snapped = scale.to(dtype).float()
    return torch.where(snapped <= 0, torch.ones_like(snapped), snapped)


def visible_nan(statistic: Tensor, scale: Tensor) -> Tensor:
    """The scale; NaN where the statistic is NaN, for grids whose codes come from comparisons, which hide it.

    A NaN among the weights must reach the loss, which stops the run.
    """
    return torch.where(statistic.isnan(), statistic, scale)


def tanh(value: Tensor) -> Tensor:
    """`tanh`, to a relative 2e-6, as `2 sigmoid(2 x) - 1`; by its series where that loses digits, below 1/8.

    On a CPU, compiled `torch.tanh` takes six times as long as this, and differs from the eager one in the last bit of
    one value in a hundred, which moves some across the border of two codes. Compiled and eager `sigmoid` hardly ever
    differ.

    Args:
        value: float32 or float64 tensor.
    """
    square = value * value
    series = value * (1 - square * (1 / 3 - square * (2 / 15)))
    return torch.where(value.abs() < 0.125, series, torch.sigmoid(value * 2) * 2 - 1)


def min_max_grid(
    rows: Tensor,
    axes: tuple[int, ...],
    low: int,
    high: int,
    symmetric: bool,
    snap: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | float]:
    """Scale and zero point of the smallest grid over the values (asymmetric: over the values and 0).

    Args:
        rows: float tensor.
        axes: reduced axes; they are kept with size 1.
        low: smallest code.
        high: largest code.
        symmetric: zero point 0, and `scale = max|w| / high`; else `scale = (max - min) / (high - low)`.
        snap: rounds scales to the type that they are exported in.
    """
    top, bottom = rows.amax(axes, keepdim=True).float(), rows.amin(axes, keepdim=True).float()
    if not symmetric:
        top, bottom = top.clamp_min(0), bottom.clamp_max(0)
    return grid_over(bottom, top, low, high, symmetric, snap)


def grid_over(
    bottom: Tensor, top: Tensor, low: int, high: int, symmetric: bool, snap: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | float]:
    """Scale and zero point of the grid over `[bottom, top]`; see `min_max_grid`.

    Args:
        bottom: float32; not above 0 if the grid is asymmetric.
        top: of the same shape; not below 0 likewise.
        low: smallest code.
        high: largest code.
        symmetric: as there.
        snap: as there.
    """
    if symmetric:
        return snap(torch.maximum(top, -bottom) / high), 0.0
    scale = snap((top - bottom) / (high - low))
    return scale, (low - bottom / scale).round().clamp(low, high)


def round_to_codes(
    value: Tensor, scale: Tensor, zero_point: Tensor | float, low: int, high: int, out: Tensor | None = None
) -> Tensor:
    """`clamp(round(value / scale + zero_point), low, high)`, ties to even, as float32.

    Args:
        value: float tensor; computed in float32 whatever its dtype.
        scale: float32, positive, broadcastable.
        zero_point: float or float32 tensor, broadcastable.
        low: smallest code.
        high: largest code.
        out: float32 tensor for the result; may be `value` itself.
    """
    codes = torch.div(value.float(), scale, out=out)
    if isinstance(zero_point, Tensor) or zero_point != 0:
        codes.add_(zero_point)
    return codes.round_().clamp_(low, high)


def block_rows(value: Tensor) -> int:
    """Rows of a 2-D tensor per block: all of them where there is no cache to fit into."""
    if value.device.type != "cpu":
        return max(1, value.shape[0])
    return max(1, min(value.shape[0], BLOCK_ELEMENTS // max(1, value.shape[1])))
