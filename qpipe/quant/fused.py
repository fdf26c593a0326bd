"""Passes over an activation that compiled code makes one: quantizing, and stopping the gradient outside a range."""

from __future__ import annotations

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


def affine_rows(out: Tensor, rows: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> None:
    """`(round(clamp(rows / scale + zero, low, high)) - zero) * scale` into `out`, in the dtype of the rows."""
    out.copy_(((rows / scale + zero).clamp(low, high).round() - zero) * scale)


def clipped_rows(
    out: Tensor,
    inside: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero: Tensor,
    bottom: Tensor,
    top: Tensor,
    low: int,
    high: int,
) -> None:
    """The same, and 1 where `bottom <= rows <= top` into `inside`, else 0."""
    # The compiler writes numbers with vector instructions, and truth values one by one.
    inside.copy_(torch.where((rows >= bottom) & (rows <= top), 1.0, 0.0))
    affine_rows(out, rows, scale, zero, low, high)


def gated_rows(out: Tensor, grad: Tensor, inside: Tensor) -> None:
    """`grad` times `inside`, into `out`, which may be `grad`."""
    out.copy_(grad * inside)


def fused_quantize(
    context: QuantContext,
    value: Tensor,
    scale: Tensor,
    zero: Tensor,
    codes: tuple[int, int],
    ends: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Quantize and dequantize in one pass of compiled code; None where that is not possible.

    Args:
        context: says whether compiled code may be used.
        value: the activation, of any shape.
        scale: in its dtype; see `matching_rows`.
        zero: zero point, shaped as `scale`.
        codes: smallest and largest.
        ends: of a range, one element each, in its dtype.

    Returns the quantized value, and 1 where an element is between `ends`, uint8 (None without them).
    """
    if not context.compiled or value.device.type != "cpu" or zero.shape != scale.shape:
        return None
    found, result = matching_rows(value, scale), torch.empty_like(value)
    if found is None or result.stride() != value.stride():
        return None
    rows, shape = found
    out, grid = result.as_strided(rows.shape, rows.stride()), (scale.view(shape), zero.view(shape))
    if ends is None:
        over_rows(context, affine_rows, out, (rows, *grid), codes)
        return result, None
    inside = torch.empty_like(value, dtype=torch.uint8)
    mask = inside.as_strided(rows.shape, rows.stride())
    over_rows(context, clipped_rows, out, (mask, rows, *grid, *(end.view(1, 1) for end in ends)), codes)
    return result, inside


class Clipped(torch.autograd.Function):
    """`Clipped.apply(context, value, quantized, inside)`: `quantized`, whose gradient goes to `value` where `inside`.

    What is kept for the backward pass is one byte an element.
    """

    @staticmethod
    def forward(ctx: Any, context: QuantContext, value: Tensor, quantized: Tensor, inside: Tensor) -> Tensor:
        """`quantized` without its own graph."""
        ctx.save_for_backward(inside)
        ctx.context = context
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        """The gradient inside."""
        (inside,) = ctx.saved_tensors
        result = _gate_compiled(ctx.context, grads[0], inside)
        return None, grads[0] * inside if result is None else result, None, None


def _gate_compiled(context: QuantContext, grad: Tensor, inside: Tensor) -> Tensor | None:
    # Gradients are on in a backward pass that will be differentiated again, which compiled code leaves no trace for.
    usable = context.compiled and grad.device.type == "cpu" and not torch.is_grad_enabled()
    rows = memory_rows(grad) if usable else None
    if rows is None or grad.stride() != inside.stride():
        return None
    result = grad if is_owned(grad) else torch.empty_like(grad)
    # In place, both are the same view: compiled code for two views of one tensor cannot be used for other shapes.
    out = rows if result is grad else result.as_strided(rows.shape, rows.stride())
    over_rows(context, gated_rows, out, (rows, inside.as_strided(rows.shape, rows.stride())))
    return result
