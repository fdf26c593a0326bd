"""Choosing the range of a uniform grid: all values, a percentile, a formula, or the clip with the smallest error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from qpipe.plugin import Options
from qpipe.quant.clips import aciq_range, unlikeliness
from qpipe.quant.rounding import block_rows, grid_over, min_max_grid, round_to_codes

RangeMethod = Literal["min-max", "mse", "mse-golden", "percentile", "lp", "aciq-normal", "aciq-laplace", "likelihood"]

CANDIDATES = 100
"""Clips that are tried, in equal steps up to `BEYOND` times the largest value."""
BEYOND = 1.25
"""A grid that ends a little outside the values can have levels that suit them better."""
GOLDEN_STEPS = 20
"""Each narrows the interval by 0.618: the last one is 1e-4 of a candidate's step."""
ROUNDS = 3
"""Turns of the search for ranges with two ends."""
DEFAULT_PERCENTILE = 99.9
DEFAULT_P = 2.5


class RangeOptions(Options):
    """How a grid that is set once gets its range."""

    range: RangeMethod = Field(
        "mse",
        description="`min-max`: all values; `mse`: least squared error of 100 clips; `mse-golden`: the same, then "
        "golden section; `percentile`; `lp`: least |error|^p, by golden section; `aciq-normal`, `aciq-laplace`: ACIQ's "
        "formulas for weights of these distributions; `likelihood`: most likely errors of Laplace weights",
    )
    percentile: float | None = Field(
        None,
        gt=50,
        le=100,
        description=f"part of the values within, for range `percentile`; default {DEFAULT_PERCENTILE}",
    )
    p: float | None = Field(None, ge=1, le=8, description=f"exponent for range `lp`; default {DEFAULT_P}")

    @model_validator(mode="after")
    def _belongs_to_its_method(self) -> RangeOptions:
        for name, method in (("percentile", "percentile"), ("p", "lp")):
            if getattr(self, name) is not None and self.range != method:
                raise ValueError(f"give {name} with range: {method}, and only there")
        return self


@dataclass(frozen=True)
class Levels:
    """A family of uniform grids with the same codes, one for each range.

    Attributes:
        low: smallest code.
        high: largest code.
        symmetric: zero point 0, and `scale = clip / high`; else the range includes 0, with an integer zero point.
        snap: rounds scales to the type that they are exported in.
        mid_rise: codes lie around 0 with none at it: from `-clip` to `clip` with zero point -1/2.
    """

    low: int
    high: int
    symmetric: bool
    snap: Callable[[Tensor], Tensor]
    mid_rise: bool = False

    def over(self, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point of the grid over `[bottom, top]`; float32 tensors of one shape, `bottom <= 0 <= top`."""
        if self.mid_rise:
            clip = torch.maximum(top, -bottom)
            return self.snap(2 * clip / (self.high - self.low)), torch.full_like(clip, -0.5)
        return grid_over(bottom, top, self.low, self.high, self.symmetric, self.snap)

    @property
    def count(self) -> int:
        """How many levels lie in the range; the lowest of a symmetric grid with zero point 0 lies outside it."""
        return 2 * self.high + 1 if self.symmetric and not self.mid_rise else self.high - self.low + 1

    def unlikeliness(self, rows: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
        """See `qpipe.quant.clips.unlikeliness`; `[n, 1]`."""
        return unlikeliness(rows, self.over(bottom, top)[0], bottom, top)

    def error(self, p: float, rows: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
        """`mean |Q(x) - x|^p` of each row, `[n, 1]`, in units of its largest magnitude."""
        scale, zero = self.over(bottom, top)
        difference = round_to_codes(rows, scale, zero, self.low, self.high)
        if isinstance(zero, Tensor):
            difference.sub_(zero)
        difference.mul_(scale).sub_(rows)
        if p == 2:
            return difference.square_().mean(1, keepdim=True)
        # High powers of small weights would underflow.
        peak = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return difference.div_(peak).abs_().pow_(p).mean(1, keepdim=True)


def search_grid(
    rows: Tensor,
    axes: tuple[int, ...],
    low: int,
    high: int,
    symmetric: bool,
    method: RangeMethod,
    snap: Callable[[Tensor], Tensor],
    percentile: float | None = None,
    p: float | None = None,
    mid_rise: bool = False,
) -> tuple[Tensor, Tensor | float]:
    """Scale and zero point of the grid that `method` chooses; conventions of `min_max_grid`.

    Args:
        rows: float tensor.
        axes: reduced axes; they are kept with size 1.
        low: smallest code.
        high: largest code.
        symmetric: zero point 0; else the range includes 0, with an integer zero point.
        method: see `RangeOptions`. Those that search are never worse than `min-max` in their own measure.
        snap: rounds scales to the type that they are exported in; candidates are compared as rounded.
        percentile: in percent, for `percentile`: of magnitudes if symmetric, else at both ends.
        p: exponent, for `lp`.
        mid_rise: a symmetric grid without a level at 0, zero point -1/2.
    """
    if method == "min-max" and not mid_rise:
        return min_max_grid(rows, axes, low, high, symmetric, snap)
    levels = Levels(low, high, symmetric, snap, mid_rise)
    flat, shape = _flat(rows, axes)
    found = [_range(block.float(), levels, method, percentile, p) for block in flat.split(block_rows(flat))]
    scale, zero = levels.over(torch.cat([b for b, _ in found]), torch.cat([t for _, t in found]))
    return scale.view(shape), zero.view(shape) if isinstance(zero, Tensor) else zero


def _flat(rows: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """`[n, width]` with one row for each scale, and the shape of the scales."""
    reduced = {axis % rows.ndim for axis in axes}
    kept = [axis for axis in range(rows.ndim) if axis not in reduced]
    width = 1
    for axis in reduced:
        width *= rows.shape[axis]
    shape = [1 if axis in reduced else rows.shape[axis] for axis in range(rows.ndim)]
    return rows.permute(*kept, *sorted(reduced)).reshape(-1, width), shape


def _range(
    rows: Tensor, levels: Levels, method: RangeMethod, percentile: float | None, p: float | None
) -> tuple[Tensor, Tensor]:
    """Both ends of the range of each row, `[n, 1]`."""
    bottom, top = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    if levels.symmetric:
        top = torch.maximum(top, -bottom)
        bottom = -top
    if method == "min-max":
        return bottom, top
    if method == "percentile":
        return _percentiles(rows, levels.symmetric, DEFAULT_PERCENTILE if percentile is None else percentile)
    if method == "aciq-normal" or method == "aciq-laplace":
        return aciq_range(rows, method, levels.count, levels.symmetric)
    if method == "likelihood":
        measure: Measure = partial(levels.unlikeliness, rows)
    else:
        measure = partial(levels.error, 2.0 if method != "lp" else DEFAULT_P if p is None else p, rows)
    return _least(measure, levels.symmetric, bottom, top, refine=method != "mse")


def _percentiles(rows: Tensor, symmetric: bool, percentile: float) -> tuple[Tensor, Tensor]:
    values = (rows.abs() if symmetric else rows).cpu().numpy()
    # numpy, because torch.quantile refuses more than 2**24 elements.
    ends = np.percentile(values, [100 - percentile, percentile], axis=1)[..., None]
    bottom, top = (torch.from_numpy(end).to(rows) for end in ends)
    return (-top, top) if symmetric else (bottom.clamp_max(0), top.clamp_min(0))


Measure = Callable[[Tensor, Tensor], Tensor]
"""What is to be least, of each row, given both ends of its range; all `[n, 1]`."""


def _least(measure: Measure, symmetric: bool, bottom: Tensor, top: Tensor, refine: bool) -> tuple[Tensor, Tensor]:
    """Shrink both ends together; where they need not be equal, then each by itself, in turns."""
    one = torch.ones_like(top)
    best_bottom, best_top = bottom, top
    for _ in range(1 if symmetric else ROUNDS):
        b, t = best_bottom, best_top
        share = least(partial(_shrunk, measure, b, t), one, one, refine)
        best_bottom, best_top = b * share, t * share
        if not symmetric:
            best_top = least(partial(measure, best_bottom), top, best_top, refine)
            best_bottom = -least(partial(_negated, measure, best_top), -bottom, -best_bottom, refine)
    return best_bottom, best_top


def shrink(measure: Measure, symmetric: bool, bottom: float, top: float, refine: bool) -> tuple[float, float]:
    """Both ends of the range of values that start within `[bottom, top]`, by the search that weights have.

    Args:
        measure: what is to be least, float64 `[1, 1]`, given both ends, float32 `[1, 1]` on the CPU.
        symmetric: the range is `[-clip, clip]`; else it includes 0.
        bottom: smallest value.
        top: largest value.
        refine: golden section follows the search among candidates.
    """
    low, high = torch.tensor([[min(bottom, 0.0)]]), torch.tensor([[max(top, 0.0)]])
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    ends = _least(measure, symmetric, low, high, refine)
    return float(ends[0]), float(ends[1])


def _shrunk(measure: Measure, bottom: Tensor, top: Tensor, share: Tensor) -> Tensor:
    return measure(bottom * share, top * share)


def _negated(measure: Measure, top: Tensor, clip: Tensor) -> Tensor:
    return measure(-clip, top)


def least(error: Callable[[Tensor], Tensor], peak: Tensor, start: Tensor, refine: bool) -> Tensor:
    """The clip with the smallest error among `start` and `CANDIDATES` clips up to `BEYOND * peak`.

    The error has many local minima in the clip, so that a grid comes first even where golden section follows.

    Args:
        error: takes clips `[n, 1]` and returns errors `[n, 1]`, row by row.
        peak: the clip of the whole range, `[n, 1]`, non-negative.
        start: a clip that the result must not be worse than.
        refine: search on between the neighbours of the best candidate.
    """
    best, lowest = start, error(start)
    step = peak * (BEYOND / CANDIDATES)
    for index in range(1, CANDIDATES + 1):
        best, lowest = _better(best, lowest, step * index, error)
    if not refine:
        return best
    return golden_section(error, (best - step).clamp_min(0), best + step, best, lowest)


def _better(best: Tensor, lowest: Tensor, clip: Tensor, error: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    found = error(clip)
    better = found < lowest
    return torch.where(better, clip, best), torch.where(better, found, lowest)


def golden_section(
    error: Callable[[Tensor], Tensor], left: Tensor, right: Tensor, best: Tensor, lowest: Tensor
) -> Tensor:
    """The best clip that golden-section search meets in `[left, right]`, or `best`; for all rows at once.

    scipy's searches take one scalar function at a time, which is too slow for thousands of rows.
    Kiefer, "Sequential minimax search for a maximum" (1953).
    """
    ratio = (5**0.5 - 1) / 2
    inner, outer = right - ratio * (right - left), left + ratio * (right - left)
    at_inner, at_outer = error(inner), error(outer)
    for clip, found in ((inner, at_inner), (outer, at_outer)):
        better = found < lowest
        best, lowest = torch.where(better, clip, best), torch.where(better, found, lowest)
    for _ in range(GOLDEN_STEPS):
        leftwards = at_inner < at_outer
        left, right = torch.where(leftwards, left, inner), torch.where(leftwards, outer, right)
        new = torch.where(leftwards, right - ratio * (right - left), left + ratio * (right - left))
        found = error(new)
        better = found < lowest
        best, lowest = torch.where(better, new, best), torch.where(better, found, lowest)
        inner, outer = torch.where(leftwards, new, outer), torch.where(leftwards, inner, new)
        at_inner, at_outer = torch.where(leftwards, found, at_outer), torch.where(leftwards, at_inner, found)
    return best
