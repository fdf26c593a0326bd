"""Ablation: what the metric gains with one group of sites in full precision, and loses with only that group quantized.

Bondarenko et al., "Understanding and Overcoming the Challenges of Efficient Transformer Quantization" (EMNLP 2021),
section 3, table 2: leave one out. Leave one in is its counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from qpipe.run import Run
from qpipe.stages.evaluate import evaluate
from qpipe.stages.variants import switched_off
from qpipe.types import Json

WEIGHTS = "all weights"


@dataclass(frozen=True)
class Effect:
    """One group.

    Attributes:
        group: its name.
        sites: how many sites it has.
        without: the metric with the group in full precision and all else quantized.
        alone: the metric with only the group quantized.
    """

    group: str
    sites: int
    without: float
    alone: float


def limited(run: Run, examples: int | None) -> None:
    """Evaluate on the first `examples` of the validation split; None: all. Rows are decoded once for all passes."""
    rows = cast(Any, list(run.data.validation))
    run.data = replace(run.data, validation=rows[:examples])


def first_metric(run: Run) -> float:
    """The task's first metric as the model is now."""
    return evaluate(run)[run.task.metrics[0].name]


def all_but(run: Run, kept: Iterable[str]) -> list[str]:
    """Quantized sites that are not kept."""
    chosen = set(kept)
    return [name for name in run.plan.sites if name not in chosen]


def ablate(
    run: Run, groups: Mapping[str, Sequence[str]], told: Callable[[Effect], None] = lambda effect: None
) -> dict[str, Json]:
    """Evaluate the model without each group, and with it alone.

    Args:
        run: a run on one process with its quantizers in place.
        groups: sites by name of the group.
        told: called with every result.

    Returns:
        `metric`, `higher_is_better`, `examples`, `quantized` and `full_precision` (the metric with all and with no
        quantizer), and `groups`, a list of `Effect`.
    """
    with switched_off(run, run.plan.sites):
        full = first_metric(run)
    everything = first_metric(run)
    found = []
    for name, sites in groups.items():
        with switched_off(run, sites):
            without = first_metric(run)
        with switched_off(run, all_but(run, sites)):
            alone = first_metric(run)
        found.append(Effect(name, len(sites), without, alone))
        told(found[-1])
    metric = run.task.metrics[0]
    return {
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "examples": len(run.data.validation),
        "quantized": everything,
        "full_precision": full,
        "groups": [asdict(effect) for effect in found],
    }
