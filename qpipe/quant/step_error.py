"""Other step sizes: functions of a scale, for `QuantContext.rescale`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def times(ratio: float) -> Callable[[Tensor], Tensor]:
    """Steps that are `ratio` times as large, on a grid through the same zero and with the same codes.

    What lies beyond the new grid is clamped. Shkolnik et al., "Robust Quantization: One Model to Rule Them All"
    (NeurIPS 2020), sections 5.1 and A.2, vary the step of every layer like this.

    Raises:
        ValueError: the ratio is not positive.
    """
    if not ratio > 0:
        raise ValueError(f"a step size cannot be {ratio:g} times as large; give a positive ratio")
    return lambda scale: scale * ratio


def power_of_two(scale: Tensor) -> Tensor:
    """The power of two that is nearest on a logarithmic scale, `2**round(log2(scale))`, so that a shift can divide.

    Args:
        scale: float tensor, non-negative. 0 stays 0.
    """
    return torch.exp2(torch.log2(scale).round_())


def open_ended(value: Tensor, lowest: Tensor | float, step: Tensor | float) -> Tensor:
    """The nearest of the levels `lowest`, `lowest + step`, `lowest + 2 step` and so on, however many it takes.

    The code published with the paper above varies steps like this: the grid starts at the smallest weight instead of
    0, so that a wrong step shifts the mean, and a weight can get levels beyond the trained ones, or miss the largest of
    them. (Its ratio multiplies the number of steps; it is the inverse of that of `times`.)

    Args:
        value: float tensor, not below `lowest`.
        lowest: the first level; broadcastable.
        step: positive; broadcastable.
    """
    return torch.round((value - lowest) / step) * step + lowest
