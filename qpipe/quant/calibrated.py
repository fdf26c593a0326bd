"""Activations whose range is set, or begins, with what calibration sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from qpipe.errors import TrainingError
from qpipe.plugin import Options
from qpipe.quant.affine import AffineActivation
from qpipe.quant.estimators import RangeGrid, find_estimator
from qpipe.quant.observed import Observed


class RangeChoice(Options):
    """How calibration finds a range that does not change afterwards."""

    range: str = Field(
        "min-max",
        description="range estimator of a calibrated range: `min-max` (of all batches), `current` (of the last one), "
        "`running`, `percentile`, `mse`, `mse-golden`, `cross-entropy` (logits), or one that a plugin offers",
    )
    range_options: dict[str, Any] = Field(
        default_factory=dict, description="its options, such as `{momentum: 0.9}` or `{percentile: 99.99}`"
    )

    @property
    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the range estimator."""
        return self.range, self.range_options


class CalibratedActivation(AffineActivation):
    """An activation that observes while calibration runs, and then sets its range.

    Subclasses implement `calibrated`, and `estimator` with `range_grid` where a range estimator finds the range.

    Attributes:
        observing: while calibration runs, what it has seen; values pass unchanged meanwhile.
    """

    needs_data = True
    """False if calibration has nothing to set."""

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__(bits, symmetric)
        self.observing: Observed | None = None

    @property
    def estimator(self) -> tuple[str, Mapping[str, Any]] | None:
        """Name and options of the range estimator; None if what `Observed` counts is enough."""
        return None

    def range_grid(self) -> RangeGrid:
        """The grids that the quantizer can have, for estimators that try them."""
        raise NotImplementedError(f"{type(self).__name__} must implement range_grid, as it has an estimator")

    def observer(self) -> Observed:
        """What is to keep count of the values in calibration; more than `Observed` where `calibrated` needs more."""
        if self.estimator is None:
            return Observed()
        return Observed(estimator=find_estimator(*self.estimator, self.context.estimators))

    def range_of(self, seen: Observed) -> tuple[float, float]:
        """Both ends of the range that the estimator chooses; of all values if there is none.

        Raises:
            TrainingError: these are no range, also if it includes 0.
        """
        if seen.estimator is None or self.estimator is None:
            return seen.low, seen.high
        low, high = seen.estimator.range(self.range_grid())
        if not (math.isfinite(high - low) and low <= high and (low or high)):
            raise TrainingError(
                f"{self.site}: range estimator {self.estimator[0]!r} found [{low:g}, {high:g}], which is no range; "
                "choose another, or leave the site out with quantizer: none"
            )
        return low, high

    def calibrated(self, seen: Observed) -> None:
        """Set the range.

        Raises:
            TrainingError: what was seen makes no range.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement calibrated")

    def forward(self, value: Tensor) -> Tensor:
        """Quantize, or only observe while calibrating."""
        if self.observing is not None:
            self.observing.batch = self.context.calibration_batch
            self.observing.add(self.counted(value), self.site)
            return value
        return super().forward(value)
