"""The distribution of many values in little memory: values with counts, merged into bins once there are too many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS = 2**15
"""Bins that values are merged into: 128 of them for each step of an 8-bit grid over the whole range."""

LIMIT = 2**17
"""Distinct values that are kept as they are."""

CHUNK = 2**20

Array = npt.NDArray[np.float64]


class Histogram:
    """Values and how often they came: exact up to `LIMIT` values, then means of the values in each of `BINS` bins.

    Bins divide the range that was seen by then, so that it need not be known before, and a bin that is merged again
    stands for its mean. A clip that is chosen from bins is off by less than a bin.

    Attributes:
        values: distinct or not, in no order, float64 `[n]`.
        counts: how often each came, float64 `[n]`.
    """

    def __init__(self) -> None:
        self.values: Array = np.empty(0)
        self.counts: Array = np.empty(0)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Take in more values, `[n]`, finite."""
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK].astype(np.float64)
            self.values = np.concatenate([self.values, part])
            self.counts = np.concatenate([self.counts, np.ones(len(part))])
            if len(self.values) > LIMIT:
                self._merge()

    def _merge(self) -> None:
        low, high = self.values.min(), self.values.max()
        width = max(float(high - low) / BINS, np.finfo(np.float64).tiny)
        bins = np.minimum((self.values - low) / width, BINS - 1).astype(np.int64)
        counts: Array = np.bincount(bins, self.counts, BINS).astype(np.float64)
        sums: Array = np.bincount(bins, self.counts * self.values, BINS).astype(np.float64)
        used = counts > 0
        self.values, self.counts = sums[used] / counts[used], counts[used]

    def magnitudes(self) -> Histogram:
        """The distribution of |x|."""
        found = Histogram()
        found.values, found.counts = np.abs(self.values), self.counts
        return found

    def quantile(self, share: float) -> float:
        """The value below which a share of all values lies, between two of them by linear interpolation.

        The same as `numpy.quantile` of all values, as long as none were merged.

        Args:
            share: 0 to 1.
        """
        order = np.argsort(self.values, kind="stable")
        ends = np.cumsum(self.counts[order])
        place = share * (ends[-1] - 1)
        # The value in place k is the first whose running count exceeds k.
        below, above = np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right")
        bottom, top = (float(self.values[order[min(i, len(order) - 1)]]) for i in (below, above))
        return bottom + (top - bottom) * float(place - np.floor(place))
