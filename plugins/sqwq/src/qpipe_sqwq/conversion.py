"""From a weight to P and the logarithm of its gain, and back by `tanh(P) * e**g`.

The paper trains from scratch; both conversions of pretrained weights are derived from its targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MARGIN = 1e-3
"""Squashed values keep this distance from -1 and 1, where the gradient of tanh vanishes."""

ITERATIONS = 40
SMALLEST = 1e-8


def _deviation(p: Tensor, axes: tuple[int, ...]) -> Tensor:
    return p.std(axes, keepdim=True, correction=0)


def _unsquashed(rows: Tensor, factor: Tensor) -> Tensor:
    return torch.atanh((rows / factor).clamp(-1 + MARGIN, 1 - MARGIN))


def lossless(rows: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """P and g that give the weight up to rounding; the gain is the largest magnitude over `1 - MARGIN`.

    Args:
        rows: float32 weight `[rows, width]`.
        axes: what shares a gain: `(1,)` a row, `(0, 1)` all.
    """
    factor = (rows.abs().amax(axes, keepdim=True) / (1 - MARGIN)).clamp_min(SMALLEST)
    return _unsquashed(rows, factor), factor.log()


def matched(rows: Tensor, axes: tuple[int, ...], sigma: float) -> tuple[Tensor, Tensor]:
    """P with standard deviation `sigma` (population) and g, by bisection over the gain; large weights are clipped.

    Where no gain was found that reaches it, they are those of `lossless`: rows of one value, or with few weights that
    are not 0, have the same deviation or a smaller one with a gain that clips them all.

    Args:
        rows: float32 weight `[rows, width]`.
        axes: what shares a gain.
        sigma: deviation aimed at.
    """
    low = (rows.abs().mean(axes, keepdim=True) / 4).clamp_min(SMALLEST).log()
    high = (rows.abs().amax(axes, keepdim=True) * 4).clamp_min(2 * SMALLEST).log()
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        wide = _deviation(_unsquashed(rows, middle.exp()), axes) > sigma
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    p = _unsquashed(rows, low.exp())
    missed = _deviation(p, axes) < sigma
    kept, gain = lossless(rows, axes)
    return torch.where(missed, kept, p), torch.where(missed, gain, low)


def fresh(rows: Tensor, axes: tuple[int, ...], sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """P drawn from `N(0, sigma**2)`, and the gain `1 / (sigma * sqrt(n))` for n inputs, as the paper initialises.

    Args:
        rows: `[rows, width]`; only its shape and device count.
        axes: what shares a gain.
        sigma: standard deviation of P.
        seed: of the draw.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    p = torch.randn(rows.shape, generator=generator, device=rows.device) * sigma
    shape = (1, 1) if 0 in axes else (rows.shape[0], 1)
    return p, torch.full(shape, -math.log(sigma * math.sqrt(rows.shape[1])), device=rows.device)
