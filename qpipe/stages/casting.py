"""Models in the run's type and on its device, without the buffers that have to stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qpipe.quant.quantizer import Quantizer
from qpipe.run import Run


def cast(model: nn.Module, run: Run) -> None:
    """Move a model to the run's device and type, as `from_pretrained` would load the export."""
    with float32_buffers(model):
        model.to(run.engine.device, run.engine.dtype)


@contextmanager
def float32_buffers(model: nn.Module) -> Iterator[None]:
    """Undo, at the end, what casts do to buffers that must stay in float32.

    These are buffers that are not saved (rotary frequencies, which `from_pretrained` keeps in float32 too) and the
    calibrated state of quantizers.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
        and (isinstance(module, Quantizer) or name in module._non_persistent_buffers_set)
    ]
    yield
    for module, name, buffer in kept:
        setattr(module, name, buffer.to(getattr(module, name).device))
