"""Kurtosis of a tensor and a penalty on it with a closed-form gradient.

Shkolnik et al., "Robust Quantization: One Model to Rule Them All" (NeurIPS 2020), equations 14 and 15.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256 * 1024
"""Elements per block on a CPU: two float32 buffers of this size stay in cache, and few enough blocks that the cost of
calling an operator does not show. Longer blocks also lose precision: each block is one float32 sum."""

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


def _working(weight: Tensor) -> tuple[Tensor, int]:
    """The weight flattened in the dtype of the computation, and the block length."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat = weight.detach().reshape(-1).to(dtype)
    return flat, min(BLOCK, flat.numel()) if flat.device.type == "cpu" else flat.numel()


def moments(weight: Tensor) -> Moments:
    """Mean and second to fourth central moments in two reads of the tensor, without temporaries of its size on a CPU.

    Args:
        weight: float tensor of any shape with at least one element; computed in float32 (float64 if it is float64).

    Raises:
        ValueError: the tensor is empty.
    """
    if weight.numel() == 0:
        raise ValueError("moments of an empty tensor are not defined; leave the tensor out")
    flat, size = _working(weight)
    mean = flat.mean()
    deviation, square = flat.new_empty(size), flat.new_empty(size)
    sums: list[Tensor] = []
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        z, zz = deviation[: block.numel()], square[: block.numel()]
        torch.sub(block, mean, out=z)
        torch.mul(z, z, out=zz)
        sums += [torch.dot(z, z), torch.dot(z, zz), torch.dot(zz, zz)]
    second, third, fourth = torch.stack(sums).double().view(-1, 3).sum(0) / flat.numel()
    return Moments(mean.double(), second, third, fourth)


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
    """`KurtosisPenalty.apply(weight, target, squared)`: a scalar penalty on the kurtosis K of a weight.

    The value is `(K - target)**2`, or K itself where `squared` is False; 0 with gradient 0 for a constant tensor. With
    `z = w - mean` and population moments `m2, m3, m4` about the mean,

        dK/dw = 4 / (N * m2**2) * (z**3 - (m4 / m2) * z - m3) * ((N - 1) / N)**2,

    so that the backward pass is one read and one write of the tensor. It cannot be differentiated twice.

    Args of `apply`:
        weight: float tensor of any shape.
        target: the kurtosis aimed at.
        squared: which of the two penalties.

    Returns a float32 scalar (float64 for a float64 weight).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, target: float, squared: bool) -> Tensor:
        """The penalty; keeps the weight itself and five scalars."""
        m = moments(weight)
        constant = _is_constant(m)
        value = _kurtosis(m, weight.numel())
        slope = 2 * (value - target) if squared else torch.ones_like(value)
        slope = slope * 4 * _bessel(weight.numel()) / (weight.numel() * m.second.square())
        ctx.save_for_backward(weight, torch.where(constant, 0.0, slope), *m)
        penalty = (value - target).square() if squared else value
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.where(constant, 0.0, penalty).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the weight's shape and dtype."""
        weight, slope, mean, second, third, fourth = ctx.saved_tensors
        flat, size = _working(weight)
        # A constant tensor has slope 0; its ratio would be 0/0, and 0 * NaN is NaN.
        ratio = torch.where(slope == 0, 0.0, fourth / second).to(flat.dtype)
        factor = (slope * grad).to(flat.dtype)
        mean, third = mean.to(flat.dtype), third.to(flat.dtype)
        result = torch.empty_like(flat)
        deviation = flat.new_empty(size)
        for start in range(0, flat.numel(), size):
            block, out = flat[start : start + size], result[start : start + size]
            z = deviation[: block.numel()]
            torch.sub(block, mean, out=z)
            torch.addcmul(-ratio, z, z, out=out)
            torch.addcmul(-third, z, out, out=out).mul_(factor)
        return result.to(weight.dtype).view(weight.shape), None, None
