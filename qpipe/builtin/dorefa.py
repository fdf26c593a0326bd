"""DoReFa: weights on a uniform grid over `tanh(w)`, activations on one over [0, 1].

Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients" (2016),
sections 2.3 and 2.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qpipe.builtin.binary import Sign
from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.compiled import over_rows
from qpipe.quant.grid import Grid, GridKernel, GridOptions, GridQuantizer
from qpipe.quant.learned import GridActivation, GridActivationOptions
from qpipe.quant.quantizer import Quantizer, straight_through
from qpipe.quant.rounding import tanh
from qpipe.quant.tensor import code_range
from qpipe.types import ACTIVATION_SLOTS, QuantizerKind

Output = Literal["max-abs", "unit"]
TINY = 1e-30


class DorefaOptions(GridOptions):
    """Options of `dorefa`."""

    bits: int = Field(4, ge=1, le=8)
    granularity: Literal["tensor", "channel", "group"] = Field("tensor", description="what shares a scale")
    output: Output = Field(
        "max-abs",
        description="largest level: max-abs: the largest |w|, for models without normalisation after every layer; "
        "unit: 1, as published, for convolutions followed by batch normalisation",
    )


@dataclass(frozen=True)
class Squashed(GridKernel):
    """`2 q - 1` times the largest level, with `q = round(u n) / n`, `u = tanh(w) / (2 max|tanh(w)|) + 1/2`."""

    unit: bool = False

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """Mid-rise levels up to 1 or to the largest magnitude; the limit is `max|tanh(w)|`.

        With other steps than these it is the second limit where the largest level was.
        """
        largest = rows.abs().amax(axes, keepdim=True).float()
        top = torch.ones_like(largest) if self.unit else largest
        limits = (tanh(largest),) if self.rescale is None else (tanh(largest), top)
        return Grid(self.snap_above_zero(2 * top / (self.high - self.low)), -0.5, limits)

    def codes(self, rows: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """The nearest level to `tanh(w) / max|tanh(w)|`."""
        if len(grid.limits) > 1:
            return super().codes(self.positions(rows, grid), grid, out)
        codes = (self._share(rows, grid) * (self.high - self.low)).round_().add_(self.low)
        return codes if out is None else out.copy_(codes)

    def positions(self, rows: Tensor, grid: Grid) -> Tensor:
        """`tanh(w) / max|tanh(w)|` times the largest level."""
        top = grid.limits[1] if len(grid.limits) > 1 else grid.scale * ((self.high - self.low) / 2)
        return (2 * self._share(rows, grid) - 1) * top

    def _share(self, rows: Tensor, grid: Grid) -> Tensor:
        return tanh(rows.float()) / (2 * grid.limits[0].clamp_min(TINY)) + 0.5


class DorefaWeight(GridQuantizer):
    """`(2 round(u n) / n - 1) * top` with `u = tanh(w) / (2 max|tanh(w)|) + 1/2` and `n = 2**bits - 1`.

    The gradient passes rounding unchanged and goes through `tanh`, through the maximum, and through `top` where that is
    `max|w|`. One bit: `sign(w) * mean|w|`, with the gradient passed unchanged (equations 7 to 9).
    """

    def __init__(self, options: DorefaOptions) -> None:
        super().__init__(options, options.bits)

    def kernel(self) -> GridKernel:
        """`Squashed`; `Sign` for one bit."""
        low, high = code_range(self.bits)
        if self.bits == 1:
            return Sign(low, high, self.context.scale_dtype, self.context.rescale)
        return Squashed(low, high, self.context.scale_dtype, self.context.rescale, self.options.output == "unit")

    def surrogate(self, value: Tensor) -> Tensor:
        """The value, with the gradient of `tanh(w) / max|tanh(w)| * top`."""
        return value if self.bits == 1 else self.with_gradient(value, self._gradient)

    def full_precision(self, value: Tensor) -> Tensor:
        """`tanh(w) / max|tanh(w)| * top`, which are the levels without rounding; the value itself for one bit."""
        if self.bits == 1:
            return value
        with torch.no_grad():
            rows = self.rows_of(value.detach())
            largest = rows.abs().amax(self.axes, keepdim=True).float()
            squashed = tanh(rows.float()) * _steepness(largest, self.options.output == "unit")
        return straight_through(self.surrogate(value), squashed.to(value.dtype).view(value.shape))

    def _gradient(self, rows: Tensor, grad: Tensor, out: Tensor) -> tuple[()]:
        unit = self.options.output == "unit"
        if not self.per_tensor:
            over_rows(self.context, row_gradient, out, (rows, grad), (unit,))
            return ()
        peaks = over_rows(self.context, row_peaks, rows, (rows,))
        largest = peaks.max().view(1, 1)
        at = (peaks == largest).flatten().nonzero().flatten()  # the few rows that hold the largest magnitude
        value, before = rows[at].float(), grad[at].float()
        dot = over_rows(self.context, squash_gradient, out, (rows, grad, largest), (unit,)).sum(0, keepdim=True)
        out[at] = _with_largest(value, before, largest, dot, (value.abs() == largest).sum(), unit).to(out.dtype)
        return ()


def _with_largest(value: Tensor, grad: Tensor, largest: Tensor, dot: Tensor, ties: Tensor, unit: bool) -> Tensor:
    """Gradient of rows with that of the largest magnitude, which its `ties` elements share.

    Args:
        value: the weight, float32, `[rows, width]`.
        grad: gradient of the quantized weight, float32.
        largest: largest magnitude, `[rows, 1]` or `[1, 1]`.
        dot: `sum(grad * tanh(w))` over what shares it, of the same shape.
        ties: how many elements have it.
        unit: True if the largest level is 1.
    """
    at_largest = _slope_at_largest(largest, unit) * dot / ties
    squashed = tanh(value)
    extra = torch.where(value.abs() == largest, value.sign() * at_largest, 0.0)
    return grad * (_steepness(largest, unit) * (1 - squashed * squashed)) + extra


def _slope_at_largest(largest: Tensor, unit: bool) -> Tensor:
    """Derivative of `top / max|tanh(w)|` by the largest `|w|`."""
    m = tanh(largest)
    inner = -(1 - m.square()) / m.square()
    slope = inner if unit else 1 / m + largest * inner
    return torch.where(largest > 0, slope, 0.0)


def _steepness(largest: Tensor, unit: bool) -> Tensor:
    """`top / max|tanh(w)|`; 0 where all weights are 0, so that nothing is learned."""
    top = torch.ones_like(largest) if unit else largest
    return torch.where(largest > 0, top / tanh(largest), 0.0)


def row_peaks(out: Tensor, rows: Tensor) -> Tensor:
    """Largest magnitude of each row, `[rows, 1]`, float32; `out` is left alone."""
    return rows.abs().amax(1, keepdim=True).float()


def squash_gradient(out: Tensor, rows: Tensor, grad: Tensor, largest: Tensor, unit: bool) -> Tensor:
    """Gradient of rows into `out`, without that of the largest magnitude; returns `sum(grad * tanh(w))` of each row.

    Args:
        out: `[rows, width]`, overwritten; may be `grad`.
        rows: the weight, `[rows, width]`.
        grad: gradient of the quantized weight.
        largest: largest magnitude of all rows, `[1, 1]`.
        unit: True if the largest level is 1.

    Returns `[rows, 1]`, float32.
    """
    value, slope = rows.float(), grad.float()
    squashed = tanh(value)
    dots = (slope * squashed).sum(1, keepdim=True)
    out.copy_(slope * (_steepness(largest, unit) * (1 - squashed * squashed)))  # last: it may be the memory of grad
    return dots


def row_gradient(out: Tensor, rows: Tensor, grad: Tensor, unit: bool) -> None:
    """Gradient of rows that each have a scale of their own, into `out`; arguments as in `squash_gradient`."""
    value, slope = rows.float(), grad.float()
    largest = value.abs().amax(1, keepdim=True)
    dots = (slope * tanh(value)).sum(1, keepdim=True)
    ties = (value.abs() == largest).float().sum(1, keepdim=True)
    out.copy_(_with_largest(value, slope, largest, dots, ties, unit))


class DorefaActivation(GridActivation):
    """`round(clamp(x, 0, 1) * n) / n` with `n = 2**bits - 1`; the gradient passes where `0 <= x <= 1` (equation 6).

    It has no parameters: the layer before has to keep its output between 0 and 1, as the paper's bounded activation
    functions and batch normalisations do.
    """

    needs_data = False
    top: Tensor

    def __init__(self, options: GridActivationOptions) -> None:
        super().__init__(options.bits, signed=False)
        self.register_buffer("top", torch.ones(1), persistent=False)

    def step(self) -> Tensor:
        """`1 / n`."""
        return self.top / self.levels[1]

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Nothing was learned."""

    def gradient(
        self, rows: Tensor, grad: Tensor, out: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """As the class says."""
        out.copy_(torch.where((rows >= 0) & (rows <= 1), grad, 0.0))
        return ()


class Dorefa(Plugin):
    """Offers `dorefa` and `dorefa-activation`."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """Both."""
        yield QuantizerKind(
            "dorefa", DorefaWeight, DorefaOptions, frozenset({"weight"}), "uniform levels over tanh(w), 1 to 8 bits"
        )
        yield QuantizerKind(
            "dorefa-activation",
            DorefaActivation,
            GridActivationOptions,
            ACTIVATION_SLOTS,
            "activations clipped to [0, 1], 2 to 16 bits",
        )
