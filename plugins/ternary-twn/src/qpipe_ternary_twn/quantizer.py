"""Ternary weight networks: every weight is -scale, 0 or +scale.

Li, Zhang and Liu, "Ternary Weight Networks" (2016), section 2.3, as TernaryBERT (Zhang et al., EMNLP 2020) uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qpipe import Grid, GridKernel, GridOptions, GridQuantizer, float64_mean, float64_sum, visible_nan


class TernaryOptions(GridOptions):
    """Options of the quantizer `ternary-twn`."""

    granularity: Literal["tensor", "channel", "group"] = Field("tensor", description="what shares a scale")
    threshold: float = Field(0.7, ge=0, lt=1, description="weights up to this part of the mean magnitude become 0")
    clip: float | None = Field(
        None, gt=0, description="clip weights here first, and stop the gradient of those clipped; 2.5 in TernaryBERT"
    )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 2


@dataclass(frozen=True)
class Ternary(GridKernel):
    """Codes -1, 0 and 1: those above a part of the mean magnitude, times their mean magnitude."""

    threshold: float = 0.7
    clip: float | None = None

    def magnitude(self, rows: Tensor) -> Tensor:
        """`|clamp(w, -clip, clip)|`, float32."""
        magnitude = rows.abs().float()
        return magnitude if self.clip is None else magnitude.clamp_max(self.clip)

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """The mean of the magnitudes above the limit, and the limit: infinite where the scale's type rounds it to 0."""
        limit = (float64_mean(self.magnitude, rows, axes) * self.threshold).float()

        def kept(part: Tensor) -> Tensor:
            magnitude = self.magnitude(part)
            return torch.where(magnitude > limit, magnitude, 0.0)

        total = float64_sum(kept, rows, axes)
        number = float64_sum(lambda part: (self.magnitude(part) > limit).float(), rows, axes)
        scale = (total / number.clamp_min(1)).float()
        usable = torch.where(scale.to(self.scale_dtype) > 0, limit, torch.inf)
        # An infinite weight makes the limit infinite, which nothing exceeds.
        return Grid(visible_nan(limit - limit, self.snap(scale)), limits=(usable,))

    def codes(self, rows: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """1 above the limit, -1 below its negative, else 0 (never -0)."""
        (limit,) = grid.limits
        codes = (rows > limit).float().sub_((rows < -limit).float())
        return codes if out is None else out.copy_(codes)


class TernaryWeight(GridQuantizer):
    """Codes -1, 0 and 1 times one scale per tensor, per channel (axis 0), or per group of `group_size` within one.

    With `w' = clamp(w, -clip, clip)`, the weights with `|w'| > threshold * mean|w'|` are kept, and the scale is their
    mean magnitude. The gradient passes unchanged, except that clipped weights get none; scale and threshold have none.
    Codes are 0 where nothing exceeds the threshold (weights all zero), or the export type rounds the scale to zero.
    """

    def __init__(self, options: TernaryOptions) -> None:
        super().__init__(options, options.bits)

    def kernel(self) -> Ternary:
        """`Ternary` with the options' threshold and clip."""
        context = self.context
        return Ternary(-1, 1, context.scale_dtype, context.rescale, self.options.threshold, self.options.clip)

    def surrogate(self, value: Tensor) -> Tensor:
        """The value; its gradient is 0 where it is clipped."""
        clip = self.options.clip
        if clip is None:
            return value

        def gradient(rows: Tensor, grad: Tensor, out: Tensor) -> tuple[()]:
            torch.mul(grad, rows.abs() < clip, out=out)
            return ()

        return self.with_gradient(value, gradient)
