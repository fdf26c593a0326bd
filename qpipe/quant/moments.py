"""Moments of weights, and the gradient of any function of them: one read of a weight each.

A function `f` of mean and central moments `m2, m3, m4` of `N` weights has, with `z = w - mean`, the gradient

    df/dw = (f1 - 3 f3 m2 - 4 f4 m3 + 2 f2 z + 3 f3 z**2 + 4 f4 z**3) / N,

where `f1` to `f4` are its derivatives by the mean and by `m2` to `m4`. Autograd finds these for all weights at once,
from four numbers of each; the weights themselves are read once in the forward and once in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpipe.model.gradients import is_owned
from qpipe.quant.compiled import over_rows
from qpipe.quant.quantizer import QuantContext

LONG_ROWS = 64
"""Rows in which compiled code sums a weight: adding up the lanes of a row costs as much as some of its elements."""

SUMS = 6
"""What is kept of a weight: its number of elements, a pilot, and four sums of powers of the difference to it."""


class Moments(NamedTuple):
    """Number of elements, mean, and population moments about the mean of several weights: float64, `[weights]` each."""

    number: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor


def moments(weights: Sequence[Tensor], context: QuantContext | None = None) -> Moments:
    """Moments of weights of any shapes on one device, differentiable once.

    Args:
        weights: float tensors with at least one element.
        context: says whether compiled code may be used; None: it may not.

    Raises:
        ValueError: a weight is empty.
    """
    return from_sums([WithMoments.apply(weight, context or QuantContext())[1] for weight in weights])


def from_sums(sums: Sequence[Tensor]) -> Moments:
    """Moments from what `WithMoments` says of each weight."""
    stacked = torch.stack(list(sums))
    return Moments(stacked[:, 0].detach(), *_Central.apply(stacked))


def power_sums(out: Tensor, rows: Tensor, pilot: Tensor) -> Tensor:
    """Sums of the first four powers of `rows - pilot`, for each row: `[rows, 4]`, float64; `out` is left alone.

    Args:
        out: not used.
        rows: float tensor `[rows, width]`.
        pilot: one of the values, float64, `[1, 1]`; powers about it lose no precision to a large mean.
    """
    z = rows.double() - pilot
    square = z * z
    return torch.cat([part.sum(1, keepdim=True) for part in (z, square, z * square, square * square)], dim=1)


def add_polynomial(out: Tensor, rows: Tensor, grad: Tensor, center: Tensor, factors: Tensor) -> None:
    """`grad + c0 + c1 z + c2 z**2 + c3 z**3` with `z = rows - center`, into `out`.

    Args:
        out: `[rows, width]`, overwritten; may be `grad`.
        rows: float tensor `[rows, width]`.
        grad: of the same shape.
        center: `[1, 1]`, in the type of the computation.
        factors: `[1, 4]`, in that type.
    """
    c0, c1, c2, c3 = factors.split(1, dim=1)
    z = rows.to(center.dtype) - center
    out.copy_(grad.to(center.dtype) + (c0 + z * (c1 + z * (c2 + z * c3))))


def _rows(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)


class WithMoments(torch.autograd.Function):
    """`same, sums = WithMoments.apply(weight, context)`: the weight unchanged, and what `from_sums` needs beside it.

    Autograd runs the node when both gradients have arrived: right after the backward pass of whatever used `same`,
    while ZeRO-3 has the weight gathered. It then adds the gradient of what was made of the moments, in place where
    nobody else holds the incoming gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, context: QuantContext) -> tuple[Tensor, Tensor]:
        """Return a view of the weight, and `[SUMS]`, float64."""
        if weight.numel() == 0:
            raise ValueError("moments of an empty tensor are not defined; leave the tensor out")
        rows = _rows(weight)
        if context.compiled and weight.is_contiguous() and weight.numel() % LONG_ROWS == 0:
            rows = weight.view(LONG_ROWS, -1)
        pilot = rows[:1, :1].double()
        sums = over_rows(context, power_sums, rows, (rows, pilot)).sum(0)
        count = torch.full((1,), float(weight.numel()), dtype=torch.float64, device=weight.device)
        result = torch.cat([count, pilot.view(1), sums])
        ctx.save_for_backward(weight, result)
        ctx.context = context
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        """The weight's gradient; the one for the sums holds the polynomial's factors."""
        incoming, message = grads
        if message is None:
            return incoming, None
        weight, sums = ctx.saved_tensors
        owned = incoming is not None and is_owned(incoming)
        grad = torch.zeros_like(weight) if incoming is None else incoming
        rows, given = _rows(weight), _rows(grad)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        center = (sums[1] + sums[2] / sums[0]).to(dtype).view(1, 1)
        out = given if owned or incoming is None else torch.empty_like(given)
        over_rows(ctx.context, add_polynomial, out, (rows, given, center, message[2:].to(dtype).view(1, 4)))
        return out.view(weight.shape), None


class _Central(torch.autograd.Function):
    """Central moments from sums of powers, `[weights, SUMS]`.

    Its gradient is not that of the sums but the factors of the polynomial about the mean, which is what `WithMoments`
    takes; both are linear in what comes in.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, pilot = sums[:, :1], sums[:, 1]
        first, second, third, fourth = (sums[:, 2:] / count).unbind(1)
        square = first.square()
        m2, m3 = second - square, third - 3 * first * second + 2 * first * square
        m4 = fourth - 4 * first * third + 6 * square * second - 3 * square.square()
        ctx.save_for_backward(count[:, 0], m2, m3)
        return pilot + first, m2, m3, m4

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        count, m2, m3 = ctx.saved_tensors
        f1, f2, f3, f4 = grads
        nothing = torch.zeros_like(f1)
        factors = (nothing, nothing, f1 - 3 * f3 * m2 - 4 * f4 * m3, 2 * f2, 3 * f3, 4 * f4)
        return torch.stack(factors, dim=1) / count.view(-1, 1)
