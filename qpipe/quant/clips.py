"""Clips from a formula or a likelihood, for weights that are taken to follow a distribution.

Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment" (NeurIPS 2019): "ACIQ".
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["aciq-normal", "aciq-laplace"]


@cache
def aciq_clip(distribution: Distribution, levels: int) -> float:
    """The clip of least expected squared error, in units of the distribution's spread (sigma, or the mean magnitude b).

    A step is `2 clip / levels` and costs `step^2 / 12`; what lies beyond the clip costs its squared distance. For a
    Laplace distribution the sum is `2 b^2 exp(-clip / b) + clip^2 / (3 levels^2)`, and least at `W(3 levels^2) b` with
    Lambert's W (in the paper `levels = 2**bits`). For a normal one its derivative is solved.

    Args:
        distribution: of the weights.
        levels: in `[-clip, clip]`, at least 2.
    """
    from scipy.optimize import brentq
    from scipy.special import erfc, lambertw

    if distribution == "aciq-laplace":
        return float(lambertw(3 * levels**2).real)

    def slope(clip: float) -> float:
        tail = clip * erfc(clip / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-clip * clip / 2)
        return float(2 * tail + 2 * clip / (3 * levels**2))

    return float(brentq(slope, 1e-3, 2 * math.sqrt(math.log(levels) + 20)))


def aciq_range(rows: Tensor, distribution: Distribution, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Both ends of the range of each row, `[n, 1]`, float32; 0 lies within.

    Args:
        rows: float32, `[n, width]`.
        distribution: fitted to each row: around 0 if `symmetric`, else around its mean. A row without negative (or
            positive) values counts as a half of a distribution around 0, without its zeros, as after a ReLU.
        levels: of the grid; twice as many are taken where half a distribution has all of them.
        symmetric: the range is `[-clip, clip]`.
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if symmetric:
        clip = aciq_clip(distribution, levels) * _spread(rows, distribution)
        return -clip, clip
    center = rows.mean(1, keepdim=True)
    clip = aciq_clip(distribution, levels) * _spread(rows - center, distribution)
    one_sided = (low >= 0) | (high <= 0)
    share = (rows != 0).float().mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    half = aciq_clip(distribution, 2 * levels) * _spread(rows, distribution, share)
    bottom = torch.where(one_sided, torch.where(low < 0, -half, 0), center - clip)
    top = torch.where(one_sided, torch.where(high > 0, half, 0), center + clip)
    return bottom.clamp_max(0), top.clamp_min(0)


def _spread(rows: Tensor, distribution: Distribution, share: Tensor | float = 1.0) -> Tensor:
    """Sigma or b of each row, `[n, 1]`, of a `share` of its elements: the others are 0."""
    if distribution == "aciq-laplace":
        return rows.abs().mean(1, keepdim=True) / share
    return (rows.square().mean(1, keepdim=True) / share).sqrt()


def unlikeliness(rows: Tensor, scale: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's quantization errors, `[n, 1]`.

    Within the range an error is taken to be uniform over a step, with density `1 / scale`. Beyond it weights of a
    Laplace distribution with mean magnitude `b` have the density `exp(-distance / b) / b`.

    Args:
        rows: float32, `[n, width]`.
        scale: the step, `[n, 1]`.
        bottom: lower end of the range, `[n, 1]`.
        top: upper end.
    """
    spread = rows.abs().mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    distance = torch.maximum(rows - top, bottom - rows)
    return torch.where(distance > 0, distance / spread + spread.log(), scale.log()).mean(1, keepdim=True)
