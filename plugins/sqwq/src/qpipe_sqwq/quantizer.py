"""Weights `tanh(P) * e**g` on a mid-rise grid: P is trained, e**g is a gain per row.

Strom, Khan and Hamza, "Squashed Weight Distribution for Low Bit Quantization of Deep Models" (Interspeech 2022).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from qpipe import Grid, GridKernel, GridQuantizer, Options, Quantizer, over_rows, tanh
from qpipe_sqwq.conversion import fresh, lossless, matched


class SqwqOptions(Options):
    """Options of the quantizer `sqwq`."""

    bits: int = Field(4, ge=1, le=8)
    granularity: Literal["tensor", "channel"] = Field("channel", description="what shares a gain: all, or a row")
    init: Literal["matched", "lossless", "scratch", "stored"] = Field(
        "matched",
        description="matched: the pretrained weight, with gains that give P the deviation sigma and clip the tails; "
        "lossless: the pretrained weight, with its largest element as gain; scratch: P drawn from N(0, sigma^2); "
        "stored: P and gains as an earlier run left them in the folder that model.name names",
    )
    sigma: float = Field(0.8, gt=0, lt=3, description="standard deviation of P aimed at")
    lr_scale: float = Field(10.0, gt=0, description="factor on the learning rate of P and the gains")


@dataclass(frozen=True)
class Squashed(GridKernel):
    """`Q(tanh(P)) * e**g`, `Q` with the `2**bits` levels `(2k + 1) / 2**bits - 1` (paper, equation 1)."""

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """Half-integer levels; the scale is the gain over `2**(bits-1)`."""
        (gain,) = state
        factor = gain.float().exp()
        return Grid(self.snap_above_zero(factor / -self.low), -0.5, () if self.rescale is None else (factor,))

    def positions(self, rows: Tensor, grid: Grid) -> Tensor:
        """`tanh(P) * e**g`."""
        return tanh(rows.float()) * (grid.limits[0] if grid.limits else grid.scale * -self.low)

    def codes(self, rows: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """The level of `tanh(P)`; the gain plays no part, unless the steps are others than its own."""
        if grid.limits:
            return super().codes(self.positions(rows, grid), grid, out)
        codes = squashed_codes(tanh(rows.float()), self.low, self.high)
        return codes if out is None else out.copy_(codes)


def squashed_codes(squashed: Tensor, low: int, high: int) -> Tensor:
    """Signed codes of values in [-1, 1]: `round((w + 1) * 2**(bits-1) - 1/2)`, at most the last, minus `2**(bits-1)`.

    Args:
        squashed: float32 tensor.
        low: smallest code, `-2**(bits-1)`.
        high: largest code.
    """
    return ((squashed + 1) * -low - 0.5).round().clamp(0, high - low) + low


class SqwqWeight(GridQuantizer):
    """The stored weight is P; the model computes with `Q(tanh(P)) * e**g`.

    The gradient passes rounding unchanged and goes through `tanh`: `dL/dP = dL/dW e**g (1 - tanh(P)**2)`; the gain gets
    `dL/dg = sum over its row of dL/dW W_q`.
    """

    gain: nn.Parameter

    def __init__(self, options: SqwqOptions) -> None:
        super().__init__(options, options.bits)
        self.row_wise = False  # a row needs its own gain
        self.lr_scale = options.lr_scale
        self.low, self.high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def kernel(self) -> Squashed:
        """`Squashed` at the options' width."""
        return Squashed(self.low, self.high, self.context.scale_dtype, self.context.rescale)

    def state(self) -> tuple[Tensor, ...]:
        """Logarithm of the gain."""
        return (self.gain.detach(),)

    def initialize(self, value: Tensor) -> Tensor:
        """Make the gain, `[rows, 1]` or `[1, 1]`, and return P; for `stored`, until they are read, lossless ones."""
        rows, options = self.rows_of(value.float()), self.options
        if options.init == "scratch":
            p, gain = fresh(rows, self.axes, options.sigma, zlib.crc32(f"{self.context.seed}/{self.site}".encode()))
        elif options.init in ("lossless", "stored"):
            p, gain = lossless(rows, self.axes)
        else:
            p, gain = matched(rows, self.axes, options.sigma)
        self.gain = nn.Parameter(gain.to(value.dtype))
        return p.to(value.dtype).view(value.shape)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep the gain: another width puts other levels on the same `tanh(P)`."""
        assert isinstance(trained, SqwqWeight)
        self.gain = nn.Parameter(trained.gain.detach().clone())

    def master(self, value: Tensor) -> Tensor:
        """`tanh(P) * e**g`."""
        squashed = tanh(self.rows_of(value).float())  # in bfloat16 it would lose more than 8-bit rounding does
        return (squashed * self.gain.float().exp()).to(value.dtype).view(value.shape)

    def surrogate(self, value: Tensor) -> Tensor:
        """P, with the gradients of `Q(tanh(P)) * e**g` to it and to the gain."""
        factor, dtype = self.gain.detach().float().exp(), self.gain.dtype
        scale = self.kernel().grid(value, (), *self.state()).scale

        def gradient(rows: Tensor, grad: Tensor, out: Tensor) -> tuple[Tensor]:
            tensors, codes = (rows, grad, factor, scale), (self.low, self.high)
            slopes = over_rows(self.context, squash_gradient, out, tensors, codes)
            if self.per_tensor:
                slopes = slopes.sum(0, keepdim=True)
            return (slopes.to(dtype),)

        return self.with_gradient(value, gradient, self.gain)


def squash_gradient(
    out: Tensor, rows: Tensor, grad: Tensor, factor: Tensor, scale: Tensor, low: int, high: int
) -> Tensor:
    """Gradient of P into `out`; returns that of the gain for each row, `[rows, 1]`, float32.

    Args:
        out: `[rows, width]`, overwritten; may be `grad`.
        rows: P, `[rows, width]`.
        grad: gradient of the quantized weight.
        factor: `e**g`, float32, `[rows, 1]` or `[1, 1]`.
        scale: the scale in use, of the same shape.
        low: smallest code.
        high: largest code.
    """
    squashed = tanh(rows.float())
    quantized = (squashed_codes(squashed, low, high) + 0.5) * scale
    slope = grad.float()
    slopes = (slope * quantized).sum(1, keepdim=True)
    out.copy_(slope * factor * (1 - squashed * squashed))  # last: it may be the memory of grad
    return slopes
