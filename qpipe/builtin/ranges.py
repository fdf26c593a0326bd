"""Range estimators of the host, and the calibration of static ranges with them."""

from __future__ import annotations

from collections.abc import Iterable

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.calibrated import CalibratedActivation
from qpipe.quant.estimators import ESTIMATORS
from qpipe.quant.learned import GridActivation
from qpipe.run import Run
from qpipe.types import CalibrationPass, RangeEstimatorKind


class StaticRanges(Plugin):
    """One pass in which every static site observes, on every process alike."""

    @hookimpl
    def qpipe_range_estimators(self) -> Iterable[RangeEstimatorKind]:
        """All that the host has."""
        return ESTIMATORS.values()

    @hookimpl(tryfirst=True)
    def qpipe_calibration(self, run: Run) -> Iterable[CalibrationPass]:
        """`static-ranges`, if the plan has any."""
        found = {
            site: quantizer
            for site, quantizer in run.instruments.quantizers().items()
            if isinstance(quantizer, CalibratedActivation) and not isinstance(quantizer, GridActivation)
        }
        found = {site: quantizer for site, quantizer in found.items() if quantizer.needs_data}
        if not found:
            return

        def start() -> None:
            for quantizer in found.values():
                quantizer.observing = quantizer.observer()

        def finish() -> None:
            for quantizer in found.values():
                seen, quantizer.observing = quantizer.observing, None
                assert seen is not None
                quantizer.calibrated(seen)
                for buffer in quantizer.buffers():
                    run.engine.broadcast_tensor(buffer)

        yield CalibrationPass("static-ranges", run.config.quantization.calibration_batches, start, finish)
