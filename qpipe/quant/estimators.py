"""Range estimators: what range an activation gets from the batches that calibration shows.

Bondarenko et al., "Understanding and Overcoming the Challenges of Efficient Transformer Quantization" (EMNLP 2021),
section 2 and appendix B.2; the MSE estimator is that of Choukroun et al. (2019) and Banner et al. (2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from qpipe.errors import SiteError, TrainingError, suggest
from qpipe.plugin import Options
from qpipe.quant.histogram import Histogram
from qpipe.quant.ranges import shrink
from qpipe.quant.rounding import round_to_codes
from qpipe.types import RangeEstimatorKind
from qpipe.validation import describe

DEFAULT_PERCENTILE = 99.99
ROWS = 2**22
"""Elements of logits that `cross-entropy` keeps at least; batches after that add nothing."""


@dataclass(frozen=True)
class RangeGrid:
    """The grids that a quantizer can have, one for each range, so that an estimator can try them.

    Attributes:
        low: smallest code.
        high: largest code.
        symmetric: only the larger end of the range counts, as a clip.
        over: takes both ends as float32 tensors of one shape, `bottom <= 0 <= top`, and returns scale and zero point.
    """

    low: int
    high: int
    symmetric: bool
    over: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def quantize(self, x: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
        """`x` on the grid over `[bottom, top]`, float32."""
        scale, zero = self.over(bottom, top)
        return round_to_codes(x, scale, zero, self.low, self.high).sub_(zero).mul_(scale)


class RangeEstimator:
    """Chooses the range of one activation. Subclasses implement `add` and `range`.

    Every process shows its estimators the same values and takes over what process 0 has found: there is nothing to
    communicate.
    """

    def add(self, x: Tensor, batch: int) -> None:
        """Take in values.

        Args:
            x: float32, finite, not empty, of any shape; without padding tokens unless these count.
            batch: number of the calibration batch. A large one comes in several parts with the same number.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement add")

    def range(self, grid: RangeGrid) -> tuple[float, float]:
        """Both ends of the range, called after the last batch. Levels that need a 0 extend it to 0.

        Args:
            grid: the grids that the quantizer can have.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement range")


class MinMax(RangeEstimator):
    """The smallest and largest value of all batches."""

    def __init__(self, options: Options) -> None:
        self.low, self.high = math.inf, -math.inf

    def add(self, x: Tensor, batch: int) -> None:
        """Widen the range."""
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, grid: RangeGrid) -> tuple[float, float]:
        """As it was seen."""
        return self.low, self.high


class Current(MinMax):
    """The smallest and largest value of the last batch."""

    batch = -1

    def add(self, x: Tensor, batch: int) -> None:
        """Forget what earlier batches had."""
        if batch != self.batch:
            self.finish_batch()
            self.batch, self.low, self.high = batch, math.inf, -math.inf
        super().add(x, batch)

    def finish_batch(self) -> None:
        """A batch, or nothing before the first one, is whole."""


class RunningOptions(Options):
    """Options of `running`."""

    momentum: float = Field(0.9, ge=0, lt=1, description="part of the range so far in the next one")


class Running(Current):
    """Ends that move towards those of each batch: `momentum * so far + (1 - momentum) * batch`, from the first on."""

    def __init__(self, options: RunningOptions) -> None:
        super().__init__(options)
        self.momentum = options.momentum
        self.ends: tuple[float, float] | None = None

    def finish_batch(self) -> None:
        """Move towards it."""
        if self.low > self.high:
            return
        new, old = (self.low, self.high), self.ends or (self.low, self.high)
        low, high = (self.momentum * o + (1 - self.momentum) * n for o, n in zip(old, new, strict=True))
        self.ends = low, high

    def range(self, grid: RangeGrid) -> tuple[float, float]:
        """After the last batch."""
        self.finish_batch()
        assert self.ends is not None
        self.low, self.high = math.inf, -math.inf
        return self.ends


class PercentileOptions(Options):
    """Options of `percentile`."""

    percentile: float = Field(
        DEFAULT_PERCENTILE,
        gt=50,
        le=100,
        description="of magnitudes if levels are symmetric, else at both ends",
    )


class Percentile(RangeEstimator):
    """The range without the outermost values: of magnitudes if levels are symmetric, else on both sides."""

    def __init__(self, options: PercentileOptions) -> None:
        self.share = options.percentile / 100
        self.seen = Histogram()

    def add(self, x: Tensor, batch: int) -> None:
        """Count the values."""
        self.seen.add(x.reshape(-1).cpu().numpy())

    def range(self, grid: RangeGrid) -> tuple[float, float]:
        """The quantiles."""
        if grid.symmetric:
            clip = self.seen.magnitudes().quantile(self.share)
            return -clip, clip
        return self.seen.quantile(1 - self.share), self.seen.quantile(self.share)


class LeastError(RangeEstimator):
    """The range with the least squared error over all batches.

    As for weights (`qpipe.quant.ranges`): 100 clips, for ranges with two ends also each end by itself in turns.

    Args:
        refine: golden section follows.
    """

    def __init__(self, options: Options, refine: bool) -> None:
        self.refine = refine
        self.seen = Histogram()

    def add(self, x: Tensor, batch: int) -> None:
        """Count the values."""
        self.seen.add(x.reshape(-1).cpu().numpy())

    def range(self, grid: RangeGrid) -> tuple[float, float]:
        """The best range that the search meets; never worse than the whole one."""
        values = torch.from_numpy(self.seen.values).float().view(1, -1)
        shares = torch.from_numpy(self.seen.counts / self.seen.counts.sum())

        def error(bottom: Tensor, top: Tensor) -> Tensor:
            difference = grid.quantize(values, bottom, top).sub_(values).double()
            return (difference.square_() @ shares).view(1, 1)

        return shrink(error, grid.symmetric, float(values.min()), float(values.max()), self.refine)


class CrossEntropy(RangeEstimator):
    """The range of logits that keeps their softmax: least cross-entropy of the quantized ones to the others.

    100 clips and golden section. Softmax is over the last axis.
    """

    def __init__(self, options: Options) -> None:
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, batch: int) -> None:
        """Keep the rows.

        Raises:
            TrainingError: these are no distributions over two or more classes.
        """
        if x.ndim < 2 or x.shape[-1] < 2:
            raise TrainingError(
                "range cross-entropy compares distributions over the last axis, and there is only one value in "
                f"{tuple(x.shape)}; use it at logits of two or more classes, or range: mse"
            )
        if sum(rows.numel() for rows in self.rows) < ROWS:
            self.rows.append(x.reshape(-1, x.shape[-1]).clone())

    def range(self, grid: RangeGrid) -> tuple[float, float]:
        """The best range that the search meets; never worse than the whole one."""
        rows = torch.cat(self.rows)
        target = rows.softmax(-1)

        def error(bottom: Tensor, top: Tensor) -> Tensor:
            guess = grid.quantize(rows, bottom.to(rows.device), top.to(rows.device)).log_softmax(-1)
            return -(target * guess).sum(-1).double().mean().view(1, 1).cpu()

        return shrink(error, grid.symmetric, float(rows.min()), float(rows.max()), refine=True)


ESTIMATORS = {
    kind.name: kind
    for kind in (
        RangeEstimatorKind("min-max", MinMax, Options, "smallest and largest value of all batches"),
        RangeEstimatorKind("current", Current, Options, "of the last batch"),
        RangeEstimatorKind("running", Running, RunningOptions, "moving average of the ends of batches"),
        RangeEstimatorKind("percentile", Percentile, PercentileOptions, "without the outermost values, on both sides"),
        RangeEstimatorKind("mse", partial(LeastError, refine=False), Options, "least squared error of 100 clips"),
        RangeEstimatorKind("mse-golden", partial(LeastError, refine=True), Options, "the same, then golden section"),
        RangeEstimatorKind("cross-entropy", CrossEntropy, Options, "logits: least cross-entropy of their softmax"),
    )
}
"""Those of the host."""


def find_estimator(name: str, options: Mapping[str, Any], offered: Mapping[str, RangeEstimatorKind]) -> RangeEstimator:
    """Make an estimator.

    Args:
        name: of an estimator.
        options: its options.
        offered: estimators on offer, by name.

    Raises:
        SiteError: there is none of that name, or an option is not allowed.
    """
    if name not in offered:
        raise SiteError(
            f"no range estimator is called {name!r}{suggest(name, offered)}; available: {', '.join(offered)}"
        )
    model = offered[name].options
    try:
        return offered[name].build(model(**options))
    except ValidationError as error:
        raise SiteError(f"range estimator {name!r}: {describe(error, model)}") from error
