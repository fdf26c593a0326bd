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


def open_ended(unit: Tensor, steps: float) -> Tensor:
    """The nearest multiples of `1 / steps`, however many there are: `round(unit * steps) / steps`.

    The code published with the paper above sweeps the DoReFa lattice with it: `unit = tanh(w) / (2 max|tanh(w)|) + 1/2`
    in [0, 1], `steps = (2**bits - 1) * ratio`, and `2 q - 1` is the weight. So its grid starts at the smallest weight
    instead of 0, its ratio is the inverse of that of `times`, and a weight can get levels beyond the trained ones, or
    miss the largest of them.

    Args:
        unit: float tensor, computed in its dtype.
        steps: steps per unit, positive.
    """
    return torch.round(unit * steps) / steps
