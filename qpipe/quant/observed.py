"""What calibration has seen of an activation."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qpipe.errors import TrainingError

if TYPE_CHECKING:
    from qpipe.quant.estimators import RangeEstimator

logger = logging.getLogger("qpipe.quant")


@dataclass
class Observed:
    """Statistics over everything that was added.

    Attributes:
        low: smallest value; infinity before there is any.
        high: largest value.
        magnitudes: sum of |x|, in float64.
        negative: number of values below 0.
        count: number of values.
        estimator: is shown all of them, and chooses the range; None if there is none.
        batch: number of the calibration batch under way, of which values may come in parts.
    """

    low: float = math.inf
    high: float = -math.inf
    magnitudes: float = 0.0
    negative: int = 0
    count: int = 0
    estimator: RangeEstimator | None = None
    batch: int = 0

    def add(self, x: Tensor, site: str) -> None:
        """Take in more values.

        Args:
            x: float tensor of any shape; empty ones change nothing.
            site: for the message.

        Raises:
            TrainingError: `x` holds NaN or infinity.
        """
        if x.numel() == 0:
            return
        x = x.detach().float()
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(high - low):
            met = "NaN" if math.isnan(low) else "infinity"  # aminmax passes NaN on
            raise TrainingError(
                f"calibration met {met} at {site} in batch {self.batch + 1}; ranges need finite values: check the "
                "model's weights and that batch, or leave the site out with quantizer: none"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.magnitudes += float(x.abs().sum(dtype=torch.float64))
        self.negative += int((x < 0).sum())
        self.count += x.numel()
        if self.estimator is not None:
            self.estimator.add(x, self.batch)

    @property
    def mean_magnitude(self) -> float:
        """Mean of |x|."""
        return self.magnitudes / self.count

    @property
    def largest(self) -> float:
        """Largest |x|."""
        return max(abs(self.low), abs(self.high))

    def require_range(self, site: str) -> None:
        """Refuse to make a range of nothing, or of values that are all the same.

        One value, such as the logit of one example, is all that a site can show; 0 to that value is its range.

        Raises:
            TrainingError: as said.
        """
        if self.count == 0:
            raise TrainingError(f"{site} saw no data in calibration; does the forward pass run this module?")
        if self.count == 1 and self.low != 0:
            logger.warning("%s: one value, %g, is all that calibration saw, and its range ends there", site, self.low)
        elif self.low == self.high:
            raise TrainingError(
                f"{site} saw nothing but the value {self.low:g} in calibration, which makes no range; leave it out "
                "with quantizer: none"
            )
