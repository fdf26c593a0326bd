"""The regulariser that keeps P at the distribution whose squashed values are nearly uniform (paper, equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import Moments


def distribution_penalty(m: Moments, sigma: float) -> Tensor:
    """`(std(P) - sigma)**2 + mean(P)**2` of each P, population deviation.

    The gradient that follows has the closed form of the paper (equations 7 and 8, with the factor 1/N that they leave
    to the weight): with `rho = (std - sigma) / std` and `mu = 2 mean (1 - rho)`,

        dL/dp = (2 rho p + mu) / N.

    A constant P has no such gradient; it gets that of the mean alone.

    Args:
        m: moments of the P.
        sigma: standard deviation aimed at.

    Returns float64, `[weights]`.
    """
    spread = m.second > 0
    deviation = torch.where(spread, torch.where(spread, m.second, 1.0).sqrt(), 0.0)
    return (deviation - sigma).square() + m.mean.square()
