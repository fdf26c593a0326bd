"""What calibration has seen of each feature of an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qpipe import Observed

Statistic = Literal["last", "max", "ema"]


@dataclass
class RunningRange:
    """Smallest and largest value of each feature, over batches.

    Attributes:
        statistic: `last`: of the last batch; `max`: of all batches; `ema`: an average that begins with the first batch
            and keeps `momentum` of its value with each further one.
        momentum: of `ema`.
        low: smallest values, float32 `[features]`; None before the first batch.
        high: largest values.
    """

    statistic: Statistic
    momentum: float = 0.9
    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, low: Tensor, high: Tensor) -> None:
        """Take in the smallest and largest values of a batch, float32 `[features]`."""
        if self.low is None or self.high is None or self.statistic == "last":
            self.low, self.high = low, high
        elif self.statistic == "max":
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = (1 - self.momentum) * low + self.momentum * self.low
            self.high = (1 - self.momentum) * high + self.momentum * self.high

    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest values, after at least one batch."""
        assert self.low is not None and self.high is not None
        return self.low, self.high


@dataclass
class ObservedFeatures(Observed):
    """The statistics of `Observed`, and ranges of features: those that order them, and those that grids are made of.

    One pass over the data gives both, since the range of a group is that of its features.
    """

    ordering: RunningRange | None = None
    gridding: RunningRange | None = None

    def add(self, x: Tensor, site: str) -> None:
        """Take in a batch, `[..., features]`; an empty one changes nothing.

        Raises:
            TrainingError: `x` holds NaN or infinity.
        """
        super().add(x, site)
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach().float().reshape(-1, x.shape[-1]), dim=0)
        for running in (self.ordering, self.gridding):
            assert running is not None
            running.add(low, high)
