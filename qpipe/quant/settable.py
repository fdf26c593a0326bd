"""Weights on a grid that is there before the weight is quantized, and that data may choose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qpipe.quant.grid import GridQuantizer


class SettableGrid(GridQuantizer):
    """A weight on a grid that it keeps, fixed or learned, and that what initialises a model from data may set.

    `code = clamp(round(w / scale + zero_point), low, high)`. LAPQ sets its scales (`set_grid`), AdaRound rounds the
    weight on the grid that it has (`grid_in_use`).

    Attributes:
        low: smallest code.
        high: largest code.
    """

    low: int
    high: int

    @property
    def moves_levels(self) -> bool:
        """True if levels are shifted against the grid as the weight's mean asks; such a weight cannot be rounded."""
        return False

    def grid_in_use(self) -> tuple[Tensor, Tensor]:
        """Scale, as exported, and zero point: float32, `[rows, 1]` (see `rows_of`), or `[1, 1]` per tensor."""
        raise NotImplementedError(f"{type(self).__name__} must implement grid_in_use")

    def search(self, value: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the options choose for a weight; `changes` (`method`, `p`) go to `search_grid`."""
        raise NotImplementedError(f"{type(self).__name__} must implement search")

    def set_grid(self, scale: Tensor, zero_point: Tensor, value: Tensor) -> None:
        """Use another grid from now on.

        Args:
            scale: float32, as exported (snapped), `[rows, 1]` or `[1, 1]`.
            zero_point: float32, of the same shape.
            value: the weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement set_grid")

    def changed(self) -> None:
        """Quantize again: this weight, or its grid, is another."""
        self._cached_version = -1
