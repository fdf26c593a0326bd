"""Kurtosis of a tensor and a penalty on it with a closed-form gradient.

Shkolnik et al., "Robust Quantization: One Model to Rule Them All" (NeurIPS 2020), equations 14 and 15.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpipe import QuantContext, over_rows

CONSTANT = 8 * torch.finfo(torch.float32).eps
"""Standard deviations below this part of the mean are rounding errors of a constant tensor."""

SMALLEST_VARIANCE = 1e-18
"""Below this variance fourth powers leave the range of float32; such a tensor counts as constant."""


class Moments(NamedTuple):
    """Mean and population moments about the mean, each a float64 scalar tensor on the tensor's device."""

    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor


def _rows(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)


def power_sums(out: Tensor, rows: Tensor, pilot: Tensor) -> Tensor:
    """Sums of the first four powers of `rows - pilot`, for each row: `[rows, 4]`, float64; `out` is left alone.

    Args:
        out: not used.
        rows: float tensor `[rows, width]`.
        pilot: a value near the mean, `[1, 1]`; powers about it lose no precision to a large mean.
    """
    z = rows.double() - pilot.double()
    square = z * z
    return torch.cat([part.sum(1, keepdim=True) for part in (z, square, z * square, square * square)], dim=1)


def moments(weight: Tensor, context: QuantContext | None = None) -> Moments:
    """Mean and second to fourth central moments in one read of the tensor, with sums in float64.

    Args:
        weight: float tensor of any shape with at least one element.
        context: says whether compiled code may be used; None: it may not.

    Raises:
        ValueError: the tensor is empty.
    """
    if weight.numel() == 0:
        raise ValueError("moments of an empty tensor are not defined; leave the tensor out")
    rows = _rows(weight.detach())
    pilot = rows[:1, :1].clone()
    sums = over_rows(context or QuantContext(), power_sums, rows, (rows, pilot)).sum(0) / weight.numel()
    first, second, third, fourth = sums.unbind()
    square = first.square()
    return Moments(
        pilot.view(()).double() + first,
        second - square,
        third - 3 * first * second + 2 * first * square,
        fourth - 4 * first * third + 6 * square * second - 3 * square.square(),
    )


def _is_constant(m: Moments) -> Tensor:
    return m.second <= torch.clamp_min((CONSTANT * m.mean).square(), SMALLEST_VARIANCE)


def _bessel(numel: int) -> float:
    """The factor by which the unbiased standard deviation lowers the kurtosis."""
    return ((numel - 1) / numel) ** 2


def _kurtosis(m: Moments, numel: int) -> Tensor:
    return m.fourth / m.second.square() * _bessel(numel)


def kurtosis(weight: Tensor) -> float:
    """`mean(((w - mean) / std)**4)` with the unbiased standard deviation, as the reference code computes it.

    It is `((N - 1) / N)**2` times the population kurtosis: 1.8 for a uniform distribution, 3 for a normal one.

    Args:
        weight: float tensor of any shape. Returns NaN for a constant tensor, whose kurtosis is not defined.

    Raises:
        ValueError: the tensor is empty.
    """
    m = moments(weight)
    return float("nan") if bool(_is_constant(m)) else float(_kurtosis(m, weight.numel()))


class KurtosisPenalty(torch.autograd.Function):
    """`KurtosisPenalty.apply(weight, target, squared, context)`: a scalar penalty on the kurtosis K of a weight.

    The value is `(K - target)**2`, or K itself where `squared` is False; 0 with gradient 0 for a constant tensor. With
    `z = w - mean` and population moments `m2, m3, m4` about the mean,

        dK/dw = 4 / (N * m2**2) * (z**3 - (m4 / m2) * z - m3) * ((N - 1) / N)**2,

    so that the forward pass is one read of the tensor, and the backward pass one read and one write. It cannot be
    differentiated twice.

    Args of `apply`:
        weight: float tensor of any shape.
        target: the kurtosis aimed at.
        squared: which of the two penalties.
        context: says whether compiled code may be used; None: it may not.

    Returns a float32 scalar (float64 for a float64 weight).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, target: float, squared: bool, context: QuantContext | None = None) -> Tensor:
        """The penalty; keeps the weight itself and four scalars."""
        m = moments(weight, context)
        constant = _is_constant(m)
        value = _kurtosis(m, weight.numel())
        slope = 2 * (value - target) if squared else torch.ones_like(value)
        slope = slope * 4 * _bessel(weight.numel()) / (weight.numel() * m.second.square())
        # A constant tensor has slope 0; its ratio would be 0/0, and 0 * NaN is NaN.
        slope, ratio = torch.where(constant, 0.0, slope), torch.where(constant, 0.0, m.fourth / m.second)
        ctx.save_for_backward(weight, slope, m.mean, ratio, m.third)
        ctx.context = context or QuantContext()
        penalty = (value - target).square() if squared else value
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.where(constant, 0.0, penalty).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the weight's shape and dtype."""
        weight, slope, *rest = ctx.saved_tensors
        rows = _rows(weight)
        result = torch.empty_like(rows)
        scalars = [scalar.to(grad.dtype).view(1, 1) for scalar in (slope * grad, *rest)]
        over_rows(ctx.context, kurtosis_gradient, result, (rows, *scalars))
        return result.view(weight.shape), None, None, None


def kurtosis_gradient(out: Tensor, rows: Tensor, slope: Tensor, mean: Tensor, ratio: Tensor, third: Tensor) -> Tensor:
    """`slope * (z**3 - ratio * z - third)` with `z = rows - mean`, into `out`; returns one number per row, of no use.

    Args:
        out: `[rows, width]`, overwritten.
        rows: float tensor `[rows, width]`.
        slope, mean, ratio, third: `[1, 1]`, in the type of the computation.
    """
    z = rows.to(mean.dtype) - mean
    out.copy_(slope * (z * (z * z - ratio) - third))
    return out[:, :1]
