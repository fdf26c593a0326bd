"""Sweep: a trained model's metrics over bit widths, step-size errors and power-of-two steps.

Shkolnik et al., "Robust Quantization: One Model to Rule Them All" (NeurIPS 2020), section 5, figures 4 and 5, tables 1
and A.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from qpipe.errors import ConfigError, suggest
from qpipe.files import write_json
from qpipe.quant.step_error import power_of_two, times
from qpipe.report.inputs import VARIANTS_FILE
from qpipe.run import Run
from qpipe.stages.evaluate import evaluate
from qpipe.stages.trained import restore
from qpipe.stages.variants import (
    activation_sites,
    rebuilt,
    require_master_copies,
    require_rounding,
    rescaled,
    switched_off,
    weight_sites,
    with_bits,
)
from qpipe.types import Json

KINDS = ("bits", "step", "pow2")


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Attributes:
        kinds: any of `bits`, `step`, `pow2`.
        bits: widths; full precision is added to them.
        ratios: step sizes relative to the trained ones.
        sites: patterns over weights; none: every quantized weight except those of embeddings.
        activations: vary weights alone, and then weights and activations together.
        open_ended: count wrong steps from the lowest level, without end, as `qpipe.quant.step_error.open_ended` does.
    """

    kinds: tuple[str, ...] = KINDS
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    ratios: tuple[float, ...] = (0.7, 0.76, 0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18, 1.24, 1.3)
    sites: tuple[str, ...] = ()
    activations: bool = False
    open_ended: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"variant {kind!r} is unknown{suggest(kind, KINDS)}; there are {', '.join(KINDS)}")
        if not self.kinds:
            raise ConfigError(f"name at least one variant of {', '.join(KINDS)}")
        if any(not 0 < ratio < float("inf") for ratio in self.ratios):
            raise ConfigError(f"step-size ratios must be positive, not {min(self.ratios):g}")
        if self.open_ended and "step" not in self.kinds:
            raise ConfigError("open-ended grids belong to the variant `step`")


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        variant: `trained`, or the kind of variant.
        value: bits (None for full precision) or ratio of the step size; None for the others.
        activations: True if activations are varied with the weights.
        metrics: the task's metrics over the validation split.
    """

    variant: Literal["trained", "bits", "step", "pow2"]
    value: float | None
    activations: bool
    metrics: dict[str, float] = field(default_factory=dict)


Change = Callable[[], AbstractContextManager[None]]


def points(run: Run, sweep: Sweep, weights: Sequence[str]) -> Iterator[tuple[Point, Change]]:
    """The points of a sweep, without metrics, each with what makes a context for it.

    Raises:
        ConfigError: activations are to be varied and the run quantizes none, no site has a width to vary, or there is
            no full-precision copy of a weight.
        SiteError: a width is not allowed.
    """
    require_master_copies(run, weights)
    for together in (False, True) if sweep.activations else (False,):
        names = [*weights, *(activation_sites(run) if together else ())]
        if "bits" in sweep.kinds:
            for bits in sweep.bits:
                able = with_bits(run, names, bits)
                if not able:
                    raise ConfigError(
                        f"no quantizer of {run.out} has an option `bits` ({run.plan.sites[names[0]].quantizer!r} at "
                        f"{names[0]}), so there is no width to vary; leave the variant `bits` out"
                    )
                yield Point("bits", bits, together), partial(rebuilt, run, able, bits)
            yield Point("bits", None, together), partial(switched_off, run, names)
        if sweep.open_ended:
            require_rounding({name: run.instruments.quantizers()[name] for name in names})
        for ratio in sweep.ratios if "step" in sweep.kinds else ():
            yield Point("step", ratio, together), partial(rescaled, run, names, times(ratio), sweep.open_ended)
        if "pow2" in sweep.kinds:
            yield Point("pow2", None, together), partial(rescaled, run, names, power_of_two)


def check_sweep(run_dir: Path, sweep: Sweep) -> None:
    """Load a finished run, and refuse what `evaluate_points` would refuse before its first evaluation.

    Args:
        run_dir: run directory.
        sweep: what to vary.

    Raises:
        ConfigError: the folder is no run directory, or see `points`.
        CheckpointError: training has not ended there.
        SiteError: see `points`.
    """
    run = restore(run_dir)
    list(points(run, sweep, weight_sites(run, sweep.sites)))


def evaluate_points(run: Run, sweep: Sweep, told: Callable[[Point], None] = lambda point: None) -> dict[str, Json]:
    """Evaluate a trained run as it is and at every point of a sweep.

    Args:
        run: as `restore` gives it.
        sweep: what to vary.
        told: called with every point that has been evaluated.

    Returns:
        What `variants.json` holds: `metric` (the task's first), `higher_is_better`, `examples`, `bits` of the varied
        weights as trained (None if they differ), `sites`, `fixed` (varied sites whose width is fixed), `open_ended` and
        `points`.

    Raises:
        ConfigError: see `points`; all of it is checked before the first evaluation.
        SiteError: likewise, or a quantizer's step size cannot be varied.
    """
    weights = weight_sites(run, sweep.sites)
    planned = list(points(run, sweep, weights))
    # Rows of a data set are decoded on every access; the points of a sweep all see the same ones.
    run.data = replace(run.data, validation=cast(Any, list(run.data.validation)))
    found = [Point("trained", None, False, evaluate(run))]
    told(found[0])
    for point, change in planned:
        with change():
            found.append(replace(point, metrics=evaluate(run)))
        told(found[-1])
    widths = {run.plan.sites[name].bits for name in weights}
    adjustable = with_bits(run, weights, sweep.bits[0]) if sweep.bits else weights
    metric = run.task.metrics[0]
    return {
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "examples": len(run.data.validation),
        "bits": widths.pop() if len(widths) == 1 else None,
        "sites": weights,
        "fixed": [name for name in weights if name not in adjustable],
        "open_ended": sweep.open_ended,
        "points": [asdict(point) for point in found],
    }


def sweep_run(
    run_dir: Path,
    sweep: Sweep,
    compared: Sequence[Path] = (),
    told: Callable[[Point], None] = lambda point: None,
) -> dict[str, Json]:
    """Load a finished run, evaluate a sweep, and write `variants.json` into its directory; returns its content.

    Args:
        run_dir: run directory.
        sweep: what to vary.
        compared: other run directories, whose sweeps the report shows in the same figure.
        told: called with every point that has been evaluated.

    Raises:
        ConfigError: the folder is no run directory, or the sweep does not fit the run.
        CheckpointError: training has not ended there.
        SiteError: a width is not allowed, or a step size cannot be varied.
    """
    document = evaluate_points(restore(run_dir), sweep, told)
    document["compared"] = [str(other.resolve()) for other in compared]
    write_json(run_dir / VARIANTS_FILE, document)
    return document
