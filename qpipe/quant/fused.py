"""Passes over an activation that compiled code makes one: quantizing, and stopping the gradient outside a range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qpipe.model.gradients import is_owned
from qpipe.quant.compiled import over_rows
from qpipe.quant.quantizer import QuantContext


def memory_rows(value: Tensor) -> Tensor | None:
    """A view `[rows, width]` of all elements in the order in which they lie in memory; None if they leave gaps there.

    Args:
        value: of any shape, such as a transposed view of what a layer returned.
    """
    strides = value.stride()
    axes = sorted(range(value.ndim), key=lambda axis: -strides[axis])
    ordered = value.permute(axes)
    return ordered.reshape(-1, ordered.shape[-1]) if value.ndim and ordered.is_contiguous() else None


def matching_rows(value: Tensor, parameter: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
    """Rows of a value, and the shape that its scale or zero point has beside them; None if none fits.

    Args:
        value: the activation.
        parameter: `[1]`, `[features]`, or `[batch, tokens, 1, ...]`.
    """
    if parameter.numel() == 1:
        rows = memory_rows(value)
        return None if rows is None else (rows, (1, 1))
    if not value.is_contiguous():
        return None
    if parameter.ndim == 1:
        return (value.view(-1, len(parameter)), (1, -1)) if parameter.shape == value.shape[-1:] else None
    tokens = parameter.shape[:2]
    if parameter.ndim == value.ndim and tokens == value.shape[:2] and parameter.numel() == tokens.numel():
        return value.view(tokens.numel(), -1), (-1, 1)
    return None


def over_elements(context: QuantContext, fn: Any, result: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Call `fn(out, *rows)` in compiled code on tensors that lie in memory as `result` does; False if they cannot be.

    Args:
        context: says whether compiled code may be used.
        fn: an elementwise function at module level that fills `out`.
        result: overwritten.
        tensors: of the shape of `result`, or of one element.
    """
    out = memory_rows(result) if context.compiled and result.device.type == "cpu" else None
    if out is None or any(t.numel() != 1 and t.stride() != result.stride() for t in tensors):
        return False
    # The same tensor as the same view: compiled code for two views of one tensor cannot be used for other shapes.
    given = [out if t is result else t.view(1, 1) if t.numel() == 1 else memory_rows(t) for t in tensors]
    over_rows(context, fn, out, [rows for rows in given if rows is not None])
    return True


def affine_rows(out: Tensor, rows: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> None:
    """`(round(clamp(rows / scale + zero, low, high)) - zero) * scale` into `out`, in the dtype of the rows."""
    out.copy_(((rows / scale + zero).clamp(low, high).round() - zero) * scale)


def symmetric_rows(out: Tensor, rows: Tensor, scale: Tensor, low: int, high: int) -> None:
    """`round(clamp(rows / scale, low, high)) * scale` into `out`, in the dtype of the rows."""
    out.copy_((rows / scale).clamp(low, high).round() * scale)


def inside_rows(out: Tensor, rows: Tensor, low: Tensor, high: Tensor) -> None:
    """Whether `low <= rows <= high`, into `out`, bool."""
    out.copy_((rows >= low) & (rows <= high))


def gated_rows(out: Tensor, grad: Tensor, inside: Tensor) -> None:
    """`grad` where `inside`, else 0, into `out`, which may be `grad`."""
    out.copy_(torch.where(inside, grad, 0.0))


def fused_quantize(
    context: QuantContext, value: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int
) -> Tensor | None:
    """Quantize and dequantize in one pass of compiled code; None where that is not possible.

    Args:
        context: says whether compiled code may be used.
        value: the activation, of any shape.
        scale: in its dtype; see `matching_rows`.
        zero: zero point, shaped as `scale`; None: 0.
        low: smallest code.
        high: largest code.
    """
    if not context.compiled or value.device.type != "cpu":
        return None
    found = matching_rows(value, scale)
    if found is None or (zero is not None and zero.shape != scale.shape):
        return None
    rows, shape = found
    result = torch.empty_like(value)
    if result.stride() != value.stride():
        return None
    out = matching_rows(result, scale)
    assert out is not None
    if zero is None:
        over_rows(context, symmetric_rows, out[0], (rows, scale.view(shape)), (low, high))
    else:
        over_rows(context, affine_rows, out[0], (rows, scale.view(shape), zero.view(shape)), (low, high))
    return result


class Clipped(torch.autograd.Function):
    """`Clipped.apply(context, value, quantized, low, high)`: `quantized`, with the gradient going to `value`.

    The gradient is 0 where the value is outside `[low, high]`, one-element tensors. What is kept for the backward pass
    is one byte an element.
    """

    @staticmethod
    def forward(ctx: Any, context: QuantContext, value: Tensor, quantized: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """`quantized` without its own graph."""
        inside = torch.empty_like(value, dtype=torch.bool)
        if not over_elements(context, inside_rows, inside, (value, low, high)):
            inside = (value >= low) & (value <= high)
        ctx.save_for_backward(inside)
        ctx.context = context
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        """The gradient inside."""
        (inside,) = ctx.saved_tensors
        result = grads[0] if is_owned(grads[0]) else torch.empty_like(grads[0])
        if not over_elements(ctx.context, gated_rows, result, (grads[0], inside)):
            result = grads[0] * inside
        return None, result, None, None, None
