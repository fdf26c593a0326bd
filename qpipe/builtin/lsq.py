"""Weights with learned step sizes: LSQ and LSQ+.

Esser et al., "Learned Step Size Quantization" (ICLR 2020); Bhalgat et al., "LSQ+: Improving low-bit quantization
through learnable offsets and better initialization" (CVPR Workshops 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.compiled import over_rows
from qpipe.quant.grid import Grid, GridKernel, GridOptions, mean_magnitude
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.ranges import RangeMethod, search_grid
from qpipe.quant.settable import SettableGrid
from qpipe.quant.tensor import code_range
from qpipe.types import QuantizerKind

SMALLEST_STEP = 1e-8
"""A learned step below this counts as this, so that it stays positive; its gradient can lift it again."""


Init = Literal["lsq", "lsq+", "lsq+reference", RangeMethod]


class LsqOptions(GridOptions):
    """Options of `lsq`."""

    bits: int = Field(4, ge=1, le=8, description="1 only with levels: mid-rise")
    levels: Literal["mid-tread", "mid-rise"] = Field(
        "mid-tread", description="mid-tread: integers times the step, as published; mid-rise: half-integers, no zero"
    )
    narrow: bool = Field(False, description="leave out the lowest code, so that the levels are symmetric around 0")
    init: Init = Field(
        "lsq",
        description="first step: lsq: 2 mean|w| / sqrt(high); lsq+: max|mean +- 3 std| / 2^(bits-1), "
        "lsq+reference: over 2^bits - 1 instead, as its public code; the others: as `range` of `uniform-static`",
    )
    percentile: float | None = Field(None, gt=50, le=100, description="for init `percentile`; see `uniform-static`")
    p: float | None = Field(None, ge=1, le=8, description="for init `lp`; see `uniform-static`")
    grad_scale: Literal["layer", "step", "none"] = Field(
        "layer",
        description="scale of the step's gradient, 1 / sqrt(n high): n elements of the weight (layer), or of those "
        "that share the step (step)",
    )
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate of the steps")

    @model_validator(mode="after")
    def _levels_exist(self) -> LsqOptions:
        if self.levels == "mid-rise" and self.narrow:
            raise ValueError("narrow belongs to levels: mid-tread; mid-rise levels are symmetric already")
        if self.bits == 1 and self.levels == "mid-tread":
            raise ValueError("1 bit has no positive level with levels: mid-tread; set levels: mid-rise, or bits: 2")
        for name, method in (("percentile", "percentile"), ("p", "lp")):
            if getattr(self, name) is not None and self.init != method:
                raise ValueError(f"give {name} with init: {method}, and only there")
        return self


class LsqPlusOptions(LsqOptions):
    """Options of `lsq+`: those of `lsq` with the other first step."""

    init: Init = Field("lsq+", description="first step; see `lsq`")


@dataclass(frozen=True)
class Learned(GridKernel):
    """A grid whose step is given; `zero_point` is 0, or -1/2 for mid-rise levels."""

    zero_point: float = 0.0

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """The learned step, kept positive."""
        (step,) = state
        smallest = max(SMALLEST_STEP, torch.finfo(self.scale_dtype).smallest_normal)
        return Grid(self.snap(step.float().clamp_min(smallest)), self.zero_point)


class LsqWeight(SettableGrid):
    """A weight on a grid whose step is a parameter.

    `q = clamp(round(w / s), low, high) * s`. With `v = w / s`, the gradient passes to `w` where `low <= v <= high`, and

        dq/ds = round(v) - v inside, low below, high above,

    summed over the elements that share `s` and multiplied by `1 / sqrt(n high)` (LSQ, equations 1, 3 and 5 and section
    2.2). Levels `mid-rise` are `(k + 1/2) s` for the same codes, with the bounds `+-(2**bits - 1) / 2` on `v`.
    """

    step: nn.Parameter

    def __init__(self, options: LsqOptions) -> None:
        super().__init__(options, options.bits)
        self.row_wise = False  # a row needs its own step
        self.lr_scale = options.lr_scale
        low, high = code_range(options.bits)
        self.low, self.high = (-high if options.narrow else low), high
        self.zero_point = -0.5 if options.levels == "mid-rise" else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest level in units of the step."""
        return self.low - self.zero_point, self.high - self.zero_point

    def kernel(self) -> Learned:
        """`Learned` at the options' width."""
        return Learned(self.low, self.high, self.context.scale_dtype, self.context.rescale, self.zero_point)

    def state(self) -> tuple[Tensor, ...]:
        """The step."""
        return (self.step.detach(),)

    def initialize(self, value: Tensor) -> Tensor | None:
        """Make the step, `[rows, 1]` or `[1, 1]`, as `init` says."""
        self.step = nn.Parameter(self.first_step(self.rows_of(value.float())).to(value.dtype))
        return None

    def allocate(self, value: Tensor) -> None:
        """A step, without a search for it."""
        self.step = nn.Parameter(value.new_ones(1 if self.per_tensor else len(self.rows_of(value)), 1))

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep the learned range at another width: its outer levels (mid-rise), or their cells' edges (mid-tread).

        At 2 bits the highest mid-tread level is one step: kept where it was, it would leave nearly only zeros.
        """
        assert isinstance(trained, LsqWeight)
        self.step = nn.Parameter(trained.step.detach() * (trained.steps / self.steps))

    @property
    def steps(self) -> float:
        """Steps that the range is wide; see `inherit`."""
        low, high = self.bounds
        return high - low + (1 if self.zero_point == 0 else 0)

    def first_step(self, rows: Tensor) -> Tensor:
        """The first step of rows `[rows, width]`."""
        init, axes, top = self.options.init, self.axes, self.bounds[1]
        if init == "lsq":
            return 2 * mean_magnitude(rows, axes) / math.sqrt(top)
        if init in get_args(RangeMethod):
            return self._search(rows, method=init)
        mean, deviation = rows.mean(axes, keepdim=True), rows.std(axes, keepdim=True, correction=1)
        reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
        return reach / (2 ** (self.bits - 1) if init == "lsq+" else 2**self.bits - 1)

    def _search(self, rows: Tensor, **changes: Any) -> Tensor:
        """The step of the symmetric grid that a range search finds best for these levels."""
        options, mid_rise = self.options, self.zero_point != 0
        snap = self.kernel().snap_above_zero if mid_rise else self.snap
        settings = {"percentile": options.percentile, "p": options.p, "mid_rise": mid_rise, **changes}
        return search_grid(rows, self.axes, self.low, self.high, True, snap=snap, **settings)[0]

    def grid_in_use(self) -> tuple[Tensor, Tensor]:
        """The learned step, and 0 or -1/2."""
        scale = self.kernel().grid(self.step, self.axes, *self.state()).scale
        return scale, torch.full_like(scale, self.zero_point)

    def search(self, value: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
        """By the `method` that `changes` names: `init` need not be a range search."""
        scale = self._search(self.rows_of(value.float()), **changes)
        return scale, torch.full_like(scale, self.zero_point)

    def set_grid(self, scale: Tensor, zero_point: Tensor, value: Tensor) -> None:
        """The scale is what the step learns from; the zero point is that of the levels."""
        with torch.no_grad():
            self.step.copy_(scale)
        self.changed()

    def gradient_scale(self, value: Tensor) -> float:
        """The factor on the step's gradient, for a weight of this shape."""
        if self.options.grad_scale == "none":
            return 1.0
        count = value.numel() if self.options.grad_scale == "layer" else value.numel() / self.step.numel()
        return 1 / math.sqrt(count * self.bounds[1])

    def surrogate(self, value: Tensor) -> Tensor:
        """The value, with LSQ's gradients to it and to the step."""
        scale = self.kernel().grid(value, (), *self.state()).scale
        factor, dtype = self.gradient_scale(value), self.step.dtype

        def gradient(rows: Tensor, grad: Tensor, out: Tensor) -> tuple[Tensor]:
            slack = torch.finfo(rows.dtype).eps * self.bounds[1]
            constants = (*self.bounds, self.zero_point, slack)
            slopes = over_rows(self.context, step_gradient, out, (rows, grad, scale), constants)
            if self.per_tensor:
                slopes = slopes.sum(0, keepdim=True)
            return ((slopes * factor).to(dtype),)

        return self.with_gradient(value, gradient, self.step)


def step_gradient(
    out: Tensor, rows: Tensor, grad: Tensor, scale: Tensor, low: float, high: float, zero_point: float, slack: float
) -> Tensor:
    """Gradient of rows into `out`; returns the unscaled gradient of the step of each row, `[rows, 1]`, float32.

    Args:
        out: `[rows, width]`, overwritten; may be `grad`.
        rows: the weight, `[rows, width]`.
        grad: gradient of the quantized weight.
        scale: the step in use, float32, `[rows, 1]` or `[1, 1]`.
        low: smallest level in units of the step.
        high: largest level.
        zero_point: 0, or -1/2 for mid-rise levels.
        slack: how far beyond its outer levels a weight that was put on them can lie by the rounding of its type.
    """
    v = rows.float() / scale
    clipped = v.clamp(low, high)
    inside = (v - clipped).abs() <= slack
    level = v.round() if zero_point == 0 else (v + zero_point).round() - zero_point
    slope = torch.where(inside, level - v, clipped)
    slopes = (slope * grad.float()).sum(1, keepdim=True)
    out.copy_(torch.where(inside, grad, 0.0))  # last: it may be the memory of grad
    return slopes


class LearnedSteps(Plugin):
    """Offers `lsq` and `lsq+`."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`lsq` and `lsq+`."""
        slots = frozenset({"weight"})
        yield QuantizerKind("lsq", LsqWeight, LsqOptions, slots, "weights with learned step sizes, 1 to 8 bits")
        yield QuantizerKind("lsq+", LsqWeight, LsqPlusOptions, slots, "lsq, with a first step from mean and deviation")
