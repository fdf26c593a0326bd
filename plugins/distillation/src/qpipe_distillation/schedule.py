"""When which term of `distillation` counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from qpipe import ConfigError, WeightSchedule

Weight = Annotated[float, Field(gt=0)] | WeightSchedule
"""A constant above 0, or a schedule."""


def within(weight: float | Callable[[int], float], border: int, first: bool) -> Callable[[int], float]:
    """A weight that is 0 from optimizer step `border` on, or (not `first`) before it."""

    def at(step: int) -> float:
        if (step < border) != first:
            return 0.0
        return weight(step) if callable(weight) else weight

    return at


def first_steps(steps: int | None, fraction: float | None, total: int) -> int:
    """Optimizer steps of the first of two steps; the second has at least one.

    Args:
        steps: the configured number, or None for a part of the training.
        fraction: that part; at least one step.
        total: optimizer steps of the training.

    Raises:
        ConfigError: nothing is left for the second.
    """
    found = min(max(1, round(total * (fraction or 0))), max(1, total - 1)) if steps is None else steps
    if found >= total:
        raise ConfigError(
            f"the first step of distillation takes {found} optimizer steps, which leaves none of {total} for the "
            "second; lower distillation.steps, or train longer"
        )
    return found
