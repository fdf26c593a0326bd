"""Quantization noise: the ratio of signal to quantization noise at every site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qpipe.analysis.observe import Example
from qpipe.run import Run
from qpipe.stages.calibrate import inference


@contextmanager
def _listening(run: Run, sums: dict[str, list[float]]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def heard(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            value = module.full_precision(inputs[0]).double()
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(value.square().sum())
            total[1] += float((output.double() - value).square().sum())

        return heard

    handles = [q.register_forward_hook(hook(name)) for name, q in run.instruments.quantizers().items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def signal_to_noise(run: Run, sample: Sequence[Example]) -> dict[str, float | None]:
    """SQNR in dB of every quantized site, over a few examples: `10 log10(sum x^2 / sum (Q(x) - x)^2)`.

    Every site sees what the quantized model gives it; x is what the site computes without rounding. None where
    quantization changes nothing.
    """
    sums: dict[str, list[float]] = {}
    run.instruments.context.weights_changed()
    with torch.no_grad(), inference(run), _listening(run, sums):
        for example in sample:
            run.engine.forward(**example.batch)
    return {
        name: 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
        for name, (signal, noise) in sums.items()
    }
