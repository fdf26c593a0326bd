"""Which intervention acts at which optimizer step: a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qpipe import ConfigError, Options

Kind = Literal["output", "context", "map"]
"""What of the student is replaced: the attention output, the context, or the attention map."""


def _number(value: Any) -> Any:
    """Accept `1/6`, which decimals cannot say exactly."""
    if isinstance(value, str) and "/" in value:
        return float(Fraction(value))
    return value


class Part(Options):
    """One intervention and its share of the whole intervention."""

    kind: Kind
    fraction: Annotated[float, BeforeValidator(_number)] = Field(gt=0, le=1, description="a number, or text like `1/6`")


PRESETS: Mapping[str, tuple[Part, ...]] = {
    "paper": (Part(kind="output", fraction=1 / 2), Part(kind="map", fraction=1 / 2)),
    "reference": (
        Part(kind="output", fraction=1 / 6),
        Part(kind="context", fraction=1 / 6),
        Part(kind="map", fraction=2 / 3),
    ),
    "output": (Part(kind="output", fraction=1),),
    "context": (Part(kind="context", fraction=1),),
    "map": (Part(kind="map", fraction=1),),
}
"""`paper`: table 1 of the paper, which does not say where one phase ends; `reference`: the published code."""


@dataclass(frozen=True)
class Phase:
    """An intervention from step `start` up to, not including, step `stop`."""

    kind: Kind
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """Phases in order, without gaps, from step 0; after the last there is no intervention."""

    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps with an intervention."""
        return self.phases[-1].stop

    def kind_at(self, step: int) -> Kind | None:
        """The intervention at an optimizer step (from 0), None where there is none."""
        return next((phase.kind for phase in self.phases if phase.start <= step < phase.stop), None)

    def to_json(self) -> list[dict[str, Any]]:
        """The phases as plain mappings."""
        return [{"kind": p.kind, "start": p.start, "stop": p.stop} for p in self.phases]


def make_schedule(parts: Sequence[Part], steps: int) -> Schedule:
    """Divide `steps` optimizer steps among the parts.

    Step `k` belongs to the first part whose cumulative share exceeds `k / steps`, as in the reference code. Every part
    gets at least one step.

    Raises:
        ConfigError: there are fewer steps than parts.
    """
    if steps < len(parts):
        raise ConfigError(
            f"teacher intervention of {steps} optimizer steps cannot hold {len(parts)} phases "
            f"({', '.join(p.kind for p in parts)}); the training needs at least that many steps"
        )
    total = sum(part.fraction for part in parts)
    phases: list[Phase] = []
    cumulative, start = 0.0, 0
    for number, part in enumerate(parts):
        cumulative += part.fraction / total
        # Rounding first keeps 60 * (1/6) at 10 where floating point gives 10.000000000000002.
        stop = math.ceil(round(cumulative * steps, 9))
        stop = min(max(stop, start + 1), steps - (len(parts) - 1 - number))
        phases.append(Phase(part.kind, start, stop))
        start = stop
    return Schedule(tuple(phases))


def intervention_steps(steps: int | None, fraction: float, phases: int, total_steps: int) -> int:
    """Length of the intervention in optimizer steps.

    Args:
        steps: the configured length, or None for `fraction` of the training.
        fraction: part of the training, used without `steps`; it is stretched to one step per phase.
        phases: number of phases.
        total_steps: optimizer steps of the training.

    Raises:
        ConfigError: `steps` exceeds the training.
    """
    if steps is None:
        return min(total_steps, max(phases, round(total_steps * fraction)))
    if steps > total_steps:
        raise ConfigError(
            f"teacher intervention of {steps} steps does not fit into a training of {total_steps} optimizer steps; "
            "lower `steps`, or train longer"
        )
    return steps
