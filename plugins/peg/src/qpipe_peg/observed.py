"""What calibration has seen of each feature of an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qpipe import Observed

Statistic = Literal["last", "max", "ema"]
Ends = tuple[Tensor, Tensor]


@dataclass
class RunningRange:
    """Smallest and largest value of each feature, over batches.

    Attributes:
        statistic: `last`: of the last batch; `max`: of all batches; `ema`: an average that begins with the first batch
            and keeps `momentum` of its value with each further one.
        momentum: of `ema`.
        before: ends over the batches before the one under way, float32 `[features]` each; None in the first one.
        current: ends of the batch under way; None before there is any.
        batch: number of the batch under way.
    """

    statistic: Statistic
    momentum: float = 0.9
    before: Ends | None = None
    current: Ends | None = None
    batch: int = 0

    def add(self, low: Tensor, high: Tensor, batch: int) -> None:
        """Take in values of a batch.

        Args:
            low: smallest ones, float32 `[features]`.
            high: largest ones.
            batch: its number. A large batch comes in several parts with the same number, which count as one.
        """
        if self.current is None:
            self.current = low, high
        elif batch == self.batch:
            self.current = _wider(self.current, (low, high))
        else:
            self.before, self.current = self.ends(), (low, high)
        self.batch = batch

    def ends(self) -> Ends:
        """Smallest and largest values, after at least one batch."""
        assert self.current is not None
        if self.before is None or self.statistic == "last":
            return self.current
        if self.statistic == "max":
            return _wider(self.before, self.current)
        low, high = (
            (1 - self.momentum) * new + self.momentum * old for old, new in zip(self.before, self.current, strict=True)
        )
        return low, high


def _wider(one: Ends, other: Ends) -> Ends:
    return torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])


@dataclass
class ObservedFeatures(Observed):
    """The statistics of `Observed`, and ranges of features: those that order them, and those that grids are made of.

    One pass over the data gives both, since the range of a group is that of its features.
    """

    ordering: RunningRange | None = None
    gridding: RunningRange | None = None

    def add(self, x: Tensor, site: str) -> None:
        """Take in values of the batch `self.batch`, `[..., features]`; none at all change nothing.

        Raises:
            TrainingError: `x` holds NaN or infinity.
        """
        super().add(x, site)
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach().float().reshape(-1, x.shape[-1]), dim=0)
        for running in (self.ordering, self.gridding):
            assert running is not None
            running.add(low, high, self.batch)
