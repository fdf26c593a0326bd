"""Recalibrate: the ranges that calibration gives the quantizers which are in place now, for as long as a context lasts.

A static range that suits few bits may clip what many bits could hold, so another width calls for another range.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from qpipe.quant.calibrated import CalibratedActivation
from qpipe.quant.learned import GridActivation
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.run import Run
from qpipe.stages.calibrate import calibrate
from qpipe.stages.ranges import initialize_ranges


@contextmanager
def recalibrated(run: Run, changed: Collection[str]) -> Iterator[None]:
    """Within, activations have the ranges that a plan with other quantizers at some sites gives them.

    Of a model that was quantized without training these are the ranges that `quantize` would find by that plan. A
    trained run keeps the ranges of all other sites, with which its weights were trained, and those that began with what
    calibration saw (`GridActivation`), since training may have moved them; other static ranges of the changed sites are
    found anew.

    Args:
        run: on one process, calibrated; at the changed sites are other quantizers already, or they are switched off.
        changed: names of these sites.

    Raises:
        TrainingError: calibration finds no range.
    """
    found = {site: q for site, q in run.instruments.quantizers().items() if not site.endswith(":weight")}
    before = {site: {key: value.clone() for key, value in q.state_dict().items()} for site, q in found.items()}
    static = {site for site, quantizer in found.items() if _is_static(quantizer)}
    # Static sites only look on while calibration runs, so that what one of them sees depends on all others alone.
    alike = run.trained or static.issuperset(changed)
    try:
        if not run.trained:
            with _resting(q for site, q in found.items() if site not in changed and site not in static):
                initialize_ranges(run)
        with _resting(found[site] for site in static if alike and site not in changed):
            calibrate(run)
        yield
    finally:
        for site, state in before.items():
            found[site].load_state_dict(state)


def _is_static(quantizer: Quantizer) -> bool:
    """True if the range is fixed, and found after those of the other activations."""
    if isinstance(quantizer, GridActivation) or not isinstance(quantizer, CalibratedActivation):
        return False
    return quantizer.needs_data


@contextmanager
def _resting(quantizers: Iterator[Quantizer]) -> Iterator[None]:
    """Within, calibration has nothing to find for them, and they let values pass as those do that it shows data to."""
    resting = [q for q in quantizers if isinstance(q, CalibratedActivation) and q.needs_data]
    contexts, off = [quantizer.context for quantizer in resting], QuantContext(enabled=False)
    try:
        for quantizer in resting:
            quantizer.needs_data, quantizer.context = False, off
        yield
    finally:
        for quantizer, context in zip(resting, contexts, strict=True):
            quantizer.needs_data, quantizer.context = True, context
