"""Uniform weights on a grid that is set once, and stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qpipe.quant.compiled import over_rows
from qpipe.quant.grid import Grid, GridKernel, GridOptions
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.ranges import RangeOptions, search_grid
from qpipe.quant.rounding import round_to_codes
from qpipe.quant.settable import SettableGrid
from qpipe.quant.tensor import code_range


class StaticOptions(GridOptions, RangeOptions):
    """Options of `uniform-static`."""

    bits: int = Field(8, ge=2, le=8)
    symmetric: bool = True
    mid_rise: bool = Field(
        False, description="levels at odd multiples of half a step, from -clip to clip, none at 0; symmetric only"
    )
    keep_mean: bool = Field(
        False,
        description="shift the levels of every channel so that its mean stays as it was; makes zero points floats, "
        "which only the native export format holds; not with granularity `group`",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> StaticOptions:
        if self.mid_rise and not self.symmetric:
            raise ValueError("mid_rise levels are symmetric: leave out symmetric: false")
        if self.keep_mean and self.granularity == "group":
            raise ValueError("keep_mean works by channel: set granularity: channel, or tensor")
        return self


@dataclass(frozen=True)
class Fixed(GridKernel):
    """A grid that is given: scale, zero point, and how far the levels are shifted against it, in steps."""

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """The given grid. Values are rounded on the unshifted one."""
        scale, zero, *shift = state
        if shift:
            return Grid(self.snap(scale), zero + shift[0], (zero,))
        return Grid(self.snap(scale), zero)

    def codes(self, rows: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """The nearest codes."""
        zero = grid.limits[0] if grid.limits else grid.zero_point
        return round_to_codes(rows, grid.scale, zero, self.low, self.high, out=out)

    def positions(self, rows: Tensor, grid: Grid) -> Tensor:
        """Shifted as the levels are."""
        return rows.float() - (grid.zero_point - grid.limits[0]) * grid.scale if grid.limits else rows.float()


class StaticWeight(SettableGrid):
    """Affine quantization of a weight with a fixed grid; weights outside it are clipped, and get no gradient.

    `code = clamp(round(w / scale + zero_point), low, high)`. The grid is chosen from the full-precision weight by the
    option `range` (see `RangeOptions`), and what initialises a model from data may set another one with `set_grid`.

    A weight counts as clipped where its code before clamping lies outside the codes, as in
    `torch.fake_quantize_per_tensor_affine`; so the largest weight of a min-max range keeps its gradient.

    Attributes:
        scale: float32, snapped; `[rows, 1]` (see `rows_of`), or `[1, 1]` per tensor.
        zero_point: float32, of the same shape.
        shift: with `keep_mean`, how far the levels lie below the grid, in steps; of the same shape.
    """

    scale: Tensor
    zero_point: Tensor
    shift: Tensor

    def __init__(self, options: StaticOptions) -> None:
        super().__init__(options, options.bits)
        self.options: StaticOptions = options
        self.low, self.high = code_range(options.bits)
        # Per tensor every row is quantized alike, in whatever batch of rows; otherwise a row needs its own scale.
        self.per_tensor = self.per_tensor and not options.keep_mean
        self.row_wise = self.per_tensor

    @property
    def moves_levels(self) -> bool:
        """With `keep_mean`."""
        return self.options.keep_mean

    def grid_in_use(self) -> tuple[Tensor, Tensor]:
        """The buffers."""
        return self.scale, self.zero_point

    def kernel(self) -> Fixed:
        """`Fixed` at the options' width."""
        return Fixed(self.low, self.high, self.context.scale_dtype, self.context.rescale)

    def state(self) -> tuple[Tensor, ...]:
        """Scale, zero point and shift."""
        return (self.scale, self.zero_point, *((self.shift,) if self.options.keep_mean else ()))

    def initialize(self, value: Tensor) -> Tensor | None:
        """Choose the grid; the weight stays as it is."""
        self.set_grid(*self.search(value), value)
        return None

    def allocate(self, value: Tensor) -> None:
        """Buffers without a search."""
        one = torch.ones(1 if self.per_tensor else len(self.rows_of(value)), 1, device=value.device)
        for name in ("scale", "zero_point", *(("shift",) if self.options.keep_mean else ())):
            self.register_buffer(name, one.clone())

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """At the same width keep the grid, which data may have chosen; at another one find it as `range` says."""
        assert isinstance(trained, StaticWeight) and value is not None
        if trained.options != self.options:
            self.initialize(value)
            return
        for name, buffer in trained.named_buffers(recurse=False):
            self.register_buffer(name, buffer.detach().clone())
        self.changed()

    def search(self, value: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the options choose for a weight; `changes` (`method`, `p`) go to `search_grid`."""
        options = self.options
        axes = (0, 1) if options.granularity == "tensor" else (1,)
        settings: dict[str, Any] = {
            "method": options.range,
            "snap": self.kernel().snap_above_zero if options.mid_rise else self.snap,
            "percentile": options.percentile,
            "p": options.p,
            "mid_rise": options.mid_rise,
            **changes,
        }
        scale, zero = search_grid(self.rows_of(value), axes, self.low, self.high, options.symmetric, **settings)
        return scale, zero if isinstance(zero, Tensor) else torch.full_like(scale, zero)

    def set_grid(self, scale: Tensor, zero_point: Tensor, value: Tensor) -> None:
        """Use another grid from now on.

        Args:
            scale: float32, as exported (snapped), `[rows, 1]` or `[1, 1]`.
            zero_point: float32, of the same shape.
            value: the weight, whose means are kept if the options say so.
        """
        rows = self.rows_of(value).float()
        if self.options.keep_mean:
            scale, zero_point = (t.expand(len(rows), 1).contiguous() for t in (scale, zero_point))
            self.register_buffer("shift", mean_shift(rows, scale, zero_point, self.low, self.high))
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.changed()

    def surrogate(self, value: Tensor) -> Tensor:
        """The value, with no gradient where its code is clamped."""

        def gradient(rows: Tensor, grad: Tensor, out: Tensor) -> tuple[()]:
            tensors, codes = (rows, grad, *self.state()[:2]), (self.low, self.high)
            over_rows(self.context, clipped_gradient, out, tensors, codes)
            return ()

        return self.with_gradient(value, gradient)


def mean_shift(rows: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """By how many steps quantization raises the mean of each row, `[rows, 1]`.

    Nahshan et al., "Loss Aware Post-training Quantization" (2019), section 3.4, and Banner et al. (2018) before them:
    without this, low-bit weights have other means than the weights they stand for.
    """
    codes = round_to_codes(rows, scale, zero_point, low, high)
    return (codes - zero_point - rows / scale).mean(1, keepdim=True)


def clipped_gradient(
    out: Tensor, rows: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int
) -> Tensor:
    """Gradient of rows into `out`; returns the scale.

    Args:
        out: `[rows, width]`, overwritten.
        rows: the weight, `[rows, width]`.
        grad: gradient of the quantized weight.
        scale: float32, `[rows, 1]` or `[1, 1]`.
        zero_point: of the same shape.
        low: smallest code.
        high: largest code.
    """
    code = (rows.float() / scale + zero_point).round()
    out.copy_(torch.where((code >= low) & (code <= high), grad, 0.0))
    return scale
