"""Calibration of static activation ranges."""

from __future__ import annotations

from collections.abc import Iterable

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.activation import UniformActivation
from qpipe.run import Run
from qpipe.types import CalibrationPass


class StaticRanges(Plugin):
    """One pass that observes the smallest and largest value at every static site, over all processes."""

    @hookimpl
    def qpipe_calibration(self, run: Run) -> Iterable[CalibrationPass]:
        """`static-ranges`, if the plan has any."""
        found = {
            site: quantizer
            for site, quantizer in run.instruments.quantizers().items()
            if isinstance(quantizer, UniformActivation) and not quantizer.options.dynamic
        }
        if not found:
            return

        def start() -> None:
            for quantizer in found.values():
                quantizer.observing = True

        def finish() -> None:
            lowest = run.engine.reduce({site: float(q.low) for site, q in found.items()}, "min")
            highest = run.engine.reduce({site: float(q.high) for site, q in found.items()}, "max")
            for site, quantizer in found.items():
                quantizer.low.fill_(lowest[site])
                quantizer.high.fill_(highest[site])
                quantizer.observing = False
                quantizer.freeze_range()

        yield CalibrationPass("static-ranges", run.config.quantization.calibration_batches, start, finish)
