"""Which intervention acts at which optimizer step: a pure function of the step."""

from __future__ import annotations

import math
import random
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
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{value!r} is no fraction; write a number, or text like `1/6`") from error
    return value


def _several(value: Any) -> Any:
    """Accept one kind without brackets."""
    return (value,) if isinstance(value, str) else value


class Part(Options):
    """One intervention, or several of which each step draws one, and its share of the whole intervention."""

    kind: Annotated[tuple[Kind, ...], BeforeValidator(_several)] = Field(
        min_length=1, description="`output`, `context` or `map`; of a list, each step draws one, all equally likely"
    )
    fraction: Annotated[float, BeforeValidator(_number)] = Field(gt=0, le=1, description="a number, or text like `1/6`")


def _parts(*parts: tuple[Kind | tuple[Kind, ...], float]) -> tuple[Part, ...]:
    return tuple(Part(kind=_several(kind), fraction=fraction) for kind, fraction in parts)


ScheduleName = Literal[
    "paper",
    "paper-inverted",
    "paper-stochastic",
    "reference",
    "reference-inverted",
    "reference-stochastic",
    "output",
    "context",
    "map",
]

SCHEDULES: Mapping[ScheduleName, tuple[Part, ...]] = {
    "paper": _parts(("output", 1 / 2), ("map", 1 / 2)),
    "paper-inverted": _parts(("map", 1 / 2), ("output", 1 / 2)),
    "paper-stochastic": _parts((("output", "map"), 1)),
    "reference": _parts(("output", 1 / 6), ("context", 1 / 6), ("map", 2 / 3)),
    "reference-inverted": _parts(("map", 1 / 3), ("context", 1 / 3), ("output", 1 / 3)),
    "reference-stochastic": _parts((("output", "context", "map"), 1)),
    "output": _parts(("output", 1)),
    "context": _parts(("context", 1)),
    "map": _parts(("map", 1)),
}
"""`paper`: table 1 and section A.3, which do not say where one part ends; `reference`: the published code."""


@dataclass(frozen=True)
class Phase:
    """An intervention from step `start` up to, not including, step `stop`; one of `kinds` in each step."""

    kinds: tuple[Kind, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """Phases in order, without gaps; after the last there is no intervention.

    Attributes:
        phases: at least one.
        seed: of what steps draw.
    """

    phases: tuple[Phase, ...]
    seed: int = 0

    @property
    def stop(self) -> int:
        """The first optimizer step without an intervention."""
        return self.phases[-1].stop

    def kind_at(self, step: int) -> Kind | None:
        """The intervention at an optimizer step (from 0), None where there is none; the same on every process."""
        phase = next((phase for phase in self.phases if phase.start <= step < phase.stop), None)
        if phase is None:
            return None
        # Seeded by text, which Python hashes the same everywhere: a resumed run draws what the interrupted one did.
        return random.Random(f"{self.seed}/{step}").choice(phase.kinds)

    def to_json(self) -> list[dict[str, Any]]:
        """The phases as plain mappings; `kind` is a list where steps draw."""
        kinds = [phase.kinds[0] if len(phase.kinds) == 1 else list(phase.kinds) for phase in self.phases]
        return [{"kind": k, "start": p.start, "stop": p.stop} for k, p in zip(kinds, self.phases, strict=True)]


def make_schedule(parts: Sequence[Part], steps: int, start: int = 0, seed: int = 0) -> Schedule:
    """Divide `steps` optimizer steps, from `start` on, among the parts.

    Step `start + k` belongs to the first part whose cumulative share exceeds `k / steps`, as in the reference code.
    Every part gets at least one step.

    Raises:
        ConfigError: there are fewer steps than parts.
    """
    if steps < len(parts):
        raise ConfigError(
            f"teacher intervention of {steps} optimizer steps cannot hold {len(parts)} phases "
            f"({', '.join(' or '.join(p.kind) for p in parts)}); the training needs at least that many steps"
        )
    total = sum(part.fraction for part in parts)
    phases: list[Phase] = []
    cumulative, done = 0.0, 0
    for number, part in enumerate(parts):
        cumulative += part.fraction / total
        # Rounding first keeps 60 * (1/6) at 10 where floating point gives 10.000000000000002.
        stop = math.ceil(round(cumulative * steps, 9))
        stop = min(max(stop, done + 1), steps - (len(parts) - 1 - number))
        phases.append(Phase(part.kind, start + done, start + stop))
        done = stop
    return Schedule(tuple(phases), seed)


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
