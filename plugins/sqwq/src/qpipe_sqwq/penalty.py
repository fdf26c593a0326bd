"""The regulariser that keeps P at the distribution whose squashed values are nearly uniform (paper, equation 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpipe import QuantContext, over_rows


class DistributionPenalty(torch.autograd.Function):
    """`DistributionPenalty.apply(p, sigma, context)`: `(std(P) - sigma)**2 + mean(P)**2`, population deviation.

    Gradient in closed form (equations 7 and 8, with the factor 1/N that they leave to the weight): with
    `rho = (std - sigma) / std` and `mu = 2 mean (1 - rho)`,

        dL/dp = (2 rho p + mu) / N.

    A constant P has no such gradient; it gets that of the mean alone. It cannot be differentiated twice.

    Args of `apply`:
        p: float tensor of any shape.
        sigma: standard deviation aimed at.
        context: says whether compiled code may be used; None: it may not.

    Returns a float32 scalar (float64 for a float64 P).
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, sigma: float, context: QuantContext | None = None) -> Tensor:
        """The penalty; keeps P itself and two scalars."""
        context = context or QuantContext()
        rows = _rows(p)
        mean, square = (over_rows(context, sums, rows, (rows,)).sum(0) / p.numel()).unbind()
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        rho = torch.where(deviation > 0, (deviation - sigma) / deviation, 0.0)
        ctx.save_for_backward(p, 2 * rho / p.numel(), 2 * mean * (1 - rho) / p.numel())
        ctx.context = context
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        return ((deviation - sigma).square() + mean.square()).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the shape and dtype of P."""
        p, slope, offset = ctx.saved_tensors
        rows = _rows(p)
        result = torch.empty_like(rows)
        scalars = [(scalar * grad).to(grad.dtype).view(1, 1) for scalar in (slope, offset)]
        over_rows(ctx.context, affine, result, (rows, *scalars))
        return result.view(p.shape), None, None


def _rows(p: Tensor) -> Tensor:
    return p.reshape(p.shape[0], -1)


def sums(out: Tensor, rows: Tensor) -> Tensor:
    """Sum and sum of squares of each row, `[rows, 2]`, float64; `out` is left alone."""
    value = rows.double()
    return torch.cat([value.sum(1, keepdim=True), (value * value).sum(1, keepdim=True)], dim=1)


def affine(out: Tensor, rows: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """`slope * rows + offset` into `out`; returns one number per row, of no use."""
    out.copy_(slope * rows.to(slope.dtype) + offset)
    return out[:, :1]
