"""Activations on one grid for all batches, which parameters of the quantizer give or options fix."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qpipe.plugin import Options
from qpipe.quant.affine import ActivationRange
from qpipe.quant.calibrated import CalibratedActivation
from qpipe.quant.observed import Observed
from qpipe.quant.rounding import snap_scale, visible_nan
from qpipe.quant.tensor import code_range

logger = logging.getLogger("qpipe.quant")

SMALLEST_STEP = 1e-8
"""A learned step below this counts as this, so that it stays positive; its gradient can lift it again."""

MANY = 0.01
"""Share of negative values in calibration from which a grid without negative levels is worth a warning."""


class GridActivationOptions(Options):
    """Options of activations on one grid."""

    bits: int = Field(8, ge=2, le=16, description="more than 8 need export.format: native")

    @property
    def granularity(self) -> str:
        """What shares a scale: the whole tensor."""
        return "tensor"


class FirstRange(GridActivationOptions):
    """Options of activations on one grid that begins with what a range estimator finds."""

    init: str = Field("min-max", description="range estimator of the first range; see `range` of `uniform-activation`")
    init_options: dict[str, Any] = Field(default_factory=dict, description="its options")

    @property
    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the range estimator."""
        return self.init, self.init_options


class _WithGradient(torch.autograd.Function):
    """The value itself; in the backward pass the quantizer says what it and the parameters get."""

    @staticmethod
    def forward(
        ctx: Any, quantizer: GridActivation, value: Tensor, scale: Tensor, zero: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(value, scale, zero)
        ctx.quantizer, ctx.dtypes = quantizer, [parameter.dtype for parameter in parameters]
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, scale, zero = ctx.saved_tensors
        width = max(1, value.shape[-1]) if value.ndim else 1
        rows, grad = value.reshape(-1, width), grads[0].reshape(-1, width)
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        rest = ctx.quantizer.gradient(rows, grad, result, scale.view(1, -1), zero.view(1, -1), value.shape)
        gradients = (g.to(dtype) for g, dtype in zip(rest, ctx.dtypes, strict=True))
        return None, result.view(value.shape), None, None, *gradients


class GridActivation(CalibratedActivation):
    """An activation of any shape on one grid, whose levels are `(code - zero_point) * scale` with codes of `bits`.

    Subclasses implement `step` and `gradient`, and `set_range` where the grid begins with what calibration has seen.
    Parameters are made in the constructor and are NaN until then; usually of one element each. With a scale for each
    feature, `step` and `zero_point` give one value for each, and `gradient` gets and returns what fits the parameters.

    Attributes:
        base: code of the level that is 0 steps above the offset: 0 for signed levels, the smallest code for unsigned
            ones, so that these are `0 .. 2**bits - 1` steps.
    """

    has_offset = False
    """True if the lowest level can be anywhere."""

    def __init__(self, bits: int, signed: bool, symmetric: bool | None = None) -> None:
        super().__init__(bits, signed if symmetric is None else symmetric)
        self.low, self.high = code_range(bits)
        self.base = 0 if signed else self.low

    def new_parameter(self, count: int = 1) -> nn.Parameter:
        """A parameter of `count` elements that calibration will set."""
        return nn.Parameter(torch.full((count,), torch.nan))

    @property
    def levels(self) -> tuple[int, int]:
        """Lowest and highest level, in steps above the offset."""
        return self.low - self.base, self.high - self.base

    def step(self) -> Tensor:
        """Distance of two levels, float32 `[1]` or `[features]`, before it is rounded to its export type."""
        raise NotImplementedError(f"{type(self).__name__} must implement step")

    def zero_point(self, scale: Tensor) -> Tensor:
        """Where 0 is, in codes, float32 `[1]`; for grids with an offset, which override it, not an integer."""
        return torch.full_like(scale, float(self.base))

    def gradient(
        self, rows: Tensor, grad: Tensor, out: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """Gradients of the value, written into `out`, and of the parameters, `[1]`, returned in their order.

        Parameters may be partitioned again by now: what their values were is in `scale` and `zero`.

        Args:
            rows: the activation, `[rows, features]`.
            grad: gradient of the quantized activation.
            out: of the same shape.
            scale: in use, float32 `[1, 1]`; `[1, features]` with a scale for each.
            zero: zero point in use, of the same shape.
            shape: of the activation.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement gradient")

    def set_range(self, seen: Observed) -> None:
        """Set parameters and buffers from calibration; called once, before the engine takes over.

        Raises:
            TrainingError: what was seen makes no range.
        """

    def calibrated(self, seen: Observed) -> None:
        """`set_range`, and a warning where the grid cannot hold what was seen.

        Raises:
            TrainingError: nothing was seen, nothing but one value, or what was seen makes no range.
        """
        seen.require_range(self.site)
        share = seen.negative / seen.count
        if self.base and not self.has_offset and share > MANY:
            logger.warning(
                "%s: %.0f %% of the values in calibration are negative, and become 0 on a grid without negative levels",
                self.site,
                100 * share,
            )
        with torch.no_grad():
            self.set_range(seen)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, as exported and after `rescale`, and zero point; float32, shaped as `step`. NaN before calibration."""
        step = self.step().float()
        smallest = max(SMALLEST_STEP, torch.finfo(self.context.scale_dtype).smallest_normal)
        positive = step.clamp_min(smallest)
        plain = positive if self.bits > 8 else snap_scale(positive, self.context.scale_dtype)
        return visible_nan(step, self.exported(positive)), visible_nan(step, self.zero_point(plain))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid in the dtype of the input."""
        scale, zero = self.grid()
        return scale.to(x.dtype), zero.to(x.dtype)

    def describe(self) -> ActivationRange:
        """A static range."""
        scale, zero = self.grid()
        return ActivationRange(self.bits, False, "tensor", self.symmetric, float(scale), float(zero))

    def surrogate(self, value: Tensor) -> Tensor:
        """The value, with the gradients of `gradient`."""
        with torch.no_grad():
            scale, zero = self.grid()
        result: Tensor = _WithGradient.apply(self, value, scale, zero, *self.parameters())
        return result


def total(per_row: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Sums over rows as gradients of parameters of one element.

    Args:
        per_row: tensors `[rows]`.
    """
    return tuple(rows.sum().view(1) for rows in per_row)
