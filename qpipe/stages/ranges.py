"""Ranges that are parameters, or come with some: set from training data before the engine may partition them.

All processes see the same data in the same batches, whatever their number, and take over what process 0 has found; so
ranges are those of one process, bit for bit.
"""

from __future__ import annotations

import logging

from qpipe.quant.learned import GridActivation
from qpipe.quant.quantizer import QuantContext
from qpipe.run import Run
from qpipe.stages.calibrate import inference, show
from qpipe.stages.casting import cast

logger = logging.getLogger("qpipe.stages")


def initialize_ranges(run: Run) -> None:
    """Show calibration data to every `GridActivation` that needs them, and let it set its grid. Collective.

    Weights are quantized meanwhile, activations are not: some have no range yet.

    Args:
        run: prepared; the engine has not wrapped the student yet.

    Raises:
        TrainingError: a site saw no data, a non-finite value, or values that make no range.
    """
    activations = {s: q for s, q in run.instruments.quantizers().items() if not s.endswith(":weight")}
    learned = {s: q for s, q in activations.items() if isinstance(q, GridActivation) and q.needs_data}
    if not learned:
        return
    cast(run.student, run)
    off, contexts = QuantContext(enabled=False), {site: q.context for site, q in activations.items()}
    seen = {site: quantizer.observer() for site, quantizer in learned.items()}
    try:
        for quantizer in activations.values():
            quantizer.context = off
        for site, quantizer in learned.items():
            quantizer.observing = seen[site]
        with inference(run):
            show(run, off, run.student, run.config.quantization.calibration_batches)
    finally:
        for quantizer in learned.values():
            quantizer.observing = None
        for site, other in activations.items():
            other.context = contexts[site]
    for site, quantizer in learned.items():
        quantizer.calibrated(seen[site])
        for tensor in (*quantizer.parameters(), *quantizer.buffers()):
            run.engine.broadcast_tensor(tensor.data)
    logger.info("%d ranges begin with what calibration has seen", len(learned))
