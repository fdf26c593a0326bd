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
from qpipe.builtin.uniform import ACTIVATION_SLOTS
from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.compiled import over_rows
from qpipe.quant.grid import Grid, GridKernel, GridOptions, GridQuantizer
from qpipe.quant.learned import GridActivation, GridActivationOptions
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.rounding import tanh
from qpipe.quant.tensor import code_range
from qpipe.types import QuantizerKind

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

    def _gradient(self, rows: Tensor, grad: Tensor, out: Tensor) -> tuple[()]:
        statistics = over_rows(self.context, squash_statistics, out, (rows, grad))
        largest, dots, ties = statistics.split(1, dim=1)
        if self.per_tensor:
            ties = torch.where(largest == largest.max(), ties, 0.0)
            largest, dots, ties = largest.max().view(1, 1), dots.sum(0, keepdim=True), ties.sum(0, keepdim=True)
        unit = self.options.output == "unit"
        at_largest = _slope_at_largest(largest, unit) * dots / ties
        over_rows(self.context, squash_gradient, out, (rows, grad, largest, at_largest), (unit,))
        return ()


def _slope_at_largest(largest: Tensor, unit: bool) -> Tensor:
    """Derivative of `top / max|tanh(w)|` by the largest `|w|`."""
    m = tanh(largest)
    inner = -(1 - m.square()) / m.square()
    slope = inner if unit else 1 / m + largest * inner
    return torch.where(largest > 0, slope, 0.0)


def squash_statistics(out: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """Of each row: largest magnitude, `sum(grad * tanh(w))`, and how many elements have that magnitude.

    `[rows, 3]`, float32; `out` is left alone.
    """
    value = rows.float()
    largest = value.abs().amax(1, keepdim=True)
    dots = (grad.float() * tanh(value)).sum(1, keepdim=True)
    ties = (value.abs() == largest).float().sum(1, keepdim=True)
    return torch.cat([largest, dots, ties], dim=1)


def squash_gradient(out: Tensor, rows: Tensor, grad: Tensor, largest: Tensor, at_largest: Tensor, unit: bool) -> Tensor:
    """Gradient of rows into `out`; returns `largest`.

    Args:
        out: `[rows, width]`, overwritten.
        rows: the weight, `[rows, width]`.
        grad: gradient of the quantized weight.
        largest: largest magnitude, `[rows, 1]` or `[1, 1]`.
        at_largest: what the largest elements get on top, of the same shape.
        unit: True if the largest level is 1.
    """
    value = rows.float()
    squashed = tanh(value)
    top = torch.ones_like(largest) if unit else largest
    steepness = torch.where(largest > 0, top / tanh(largest), 0.0)  # nothing is learned where all weights are 0
    extra = torch.where(value.abs() == largest, value.sign() * at_largest, 0.0)
    out.copy_(grad.float() * (steepness * (1 - squashed * squashed)) + extra)
    return largest


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
            "activations clipped to [0, 1], 2 to 8 bits",
        )
