"""Kurtosis of a tensor and a penalty on it.

Shkolnik et al., "Robust Quantization: One Model to Rule Them All" (NeurIPS 2020), equations 14 and 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import Moments, moments

CONSTANT = 8 * torch.finfo(torch.float32).eps
"""Standard deviations below this part of the mean are rounding errors of a constant tensor."""

SMALLEST_VARIANCE = 1e-18
"""Below this variance fourth powers leave the range of float32; such a tensor counts as constant."""


def _is_constant(m: Moments) -> Tensor:
    return m.second <= torch.clamp_min((CONSTANT * m.mean).square(), SMALLEST_VARIANCE)


def _kurtosis(m: Moments) -> Tensor:
    """Of constant tensors a number without a meaning."""
    bessel = ((m.number - 1) / m.number).square()  # by which the unbiased deviation lowers the kurtosis
    return m.fourth / torch.where(_is_constant(m), 1.0, m.second).square() * bessel


def kurtosis(weight: Tensor) -> float:
    """`mean(((w - mean) / std)**4)` with the unbiased standard deviation, as the reference code computes it.

    It is `((N - 1) / N)**2` times the population kurtosis: 1.8 for a uniform distribution, 3 for a normal one.

    Args:
        weight: float tensor of any shape. Returns NaN for a constant tensor, whose kurtosis is not defined.

    Raises:
        ValueError: the tensor is empty.
    """
    m = moments([weight.detach()])
    return float("nan") if bool(_is_constant(m)) else float(_kurtosis(m))


def kurtosis_penalty(m: Moments, target: float, squared: bool) -> Tensor:
    """`(K - target)**2`, or K itself, of the kurtosis K of each weight; 0 with gradient 0 for constant ones.

    With `z = w - mean` and population moments about the mean, the gradient that follows is

        dK/dw = 4 / (N * m2**2) * (z**3 - (m4 / m2) * z - m3) * ((N - 1) / N)**2.

    Args:
        m: moments of the weights.
        target: the kurtosis aimed at.
        squared: which of the two penalties.

    Returns float64, `[weights]`.
    """
    value = _kurtosis(m)
    return torch.where(_is_constant(m), 0.0, (value - target).square() if squared else value)
