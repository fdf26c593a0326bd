"""LAPQ: clips that minimise the task loss, searched together.

Nahshan et al., "Loss Aware Post-training Quantization" (2019): layer by layer the clip of least |error|^p, the p of
least loss, and from there Powell's method over all clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qpipe.errors import TrainingError

EXPONENTS = tuple(np.linspace(2, 4, 10).tolist())
BOUNDS = (0.1, 3.0)
"""Of each clip, relative to its start: unbounded, the search can leave for negative clips and never come back."""


class Clip(Protocol):
    """Something with a clip, such as a weight on a fixed grid."""

    def start(self, p: float) -> None:
        """Set the clip with the smallest `mean |error|^p`; later factors are relative to it."""

    def scale(self, factor: float) -> None:
        """Set the clip to this multiple of the start."""


@dataclass(frozen=True)
class LapqResult:
    """How the search went.

    Attributes:
        exponents: the p tried.
        losses: the loss at each.
        p: the exponent that the joint search started from.
        start_loss: the loss there.
        loss: the loss in the end, never above `start_loss`.
        evaluations: how often the loss was measured.
    """

    exponents: tuple[float, ...]
    losses: tuple[float, ...]
    p: float
    start_loss: float
    loss: float
    evaluations: int


class _Spent(Exception):
    """The budget of evaluations is used up."""


def lapq(
    clips: Sequence[Clip],
    loss: Callable[[], float],
    evaluations: int = 300,
    exponents: Sequence[float] = EXPONENTS,
) -> LapqResult:
    """Choose all clips; they are set to the result.

    Args:
        clips: what to choose.
        loss: measures the loss with the clips as they are set, on calibration data.
        evaluations: how often the joint search may measure it.
        exponents: the p to try, ascending, at least three.

    Raises:
        TrainingError: the loss is finite at none of them.
    """
    losses = [_at(clips, p, loss) for p in exponents]
    if not np.isfinite(losses).any():
        raise TrainingError(
            f"lapq: the loss on the calibration examples is {losses[0]} with the clips of least |error|^p, for every p "
            f"of {len(losses)} from {exponents[0]:g} to {exponents[-1]:g}, so there is nothing to minimise; check the "
            "model and its labels (`qpipe quantize` with quantization.ptq.weights=none evaluates them), or give the "
            "weights more bits"
        )
    best = exponents[int(np.nanargmin(losses))]
    p, start_loss = best, float(np.nanmin(losses))
    vertex = parabola_minimum(exponents, losses)
    if vertex is not None:
        at_vertex = _at(clips, vertex, loss)
        if at_vertex <= start_loss:
            p, start_loss = vertex, at_vertex
    for clip in clips:
        clip.start(p)
    final, used = _powell(clips, loss, start_loss, evaluations)
    return LapqResult(
        tuple(exponents), tuple(losses), p, start_loss, final, used + len(exponents) + (vertex is not None)
    )


def _at(clips: Sequence[Clip], p: float, loss: Callable[[], float]) -> float:
    for clip in clips:
        clip.start(p)
    return loss()


def parabola_minimum(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where the least-squares parabola through the points is smallest; None if that is not within the points.

    The published code takes the vertex whatever it is: a maximum, too, and outside the points.
    """
    if not np.isfinite(y).all():
        return None
    a, b, _ = np.polyfit(x, y, 2)
    if a <= 0:
        return None
    vertex = float(-b / (2 * a))
    return vertex if min(x) <= vertex <= max(x) else None


def _powell(clips: Sequence[Clip], loss: Callable[[], float], start_loss: float, evaluations: int) -> tuple[float, int]:
    """Loss and number of evaluations; the clips are left at the best point met."""
    from scipy.optimize import minimize

    best, lowest, used = np.ones(len(clips)), start_loss, 0
    current = best.copy()

    def move(factors: np.ndarray[Any, Any]) -> None:
        for index in np.flatnonzero(factors != current).tolist():
            clips[index].scale(float(factors[index]))
        current[:] = factors

    def measure(factors: np.ndarray[Any, Any]) -> float:
        nonlocal best, lowest, used
        if used == evaluations:
            raise _Spent
        used += 1
        move(factors)
        value = loss()
        if value < lowest:
            best, lowest = factors.copy(), value
        return value if np.isfinite(value) else 1e30

    try:
        minimize(
            measure,
            best.copy(),
            method="Powell",
            bounds=[BOUNDS] * len(clips),
            options={"xtol": 1e-2, "ftol": 1e-3},
        )
    except _Spent:
        pass
    move(best)
    return lowest, used
