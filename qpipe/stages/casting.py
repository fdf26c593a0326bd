"""Models in the run's type and on its device, without the buffers that have a type of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qpipe.errors import FormatError
from qpipe.export.companions import plain_class
from qpipe.quant.quantizer import Quantizer
from qpipe.run import Run


def cast(model: nn.Module, run: Run) -> None:
    """Move a model to the run's device and type, as `from_pretrained` would load the export."""
    with own_buffers(model, run.engine.dtype):
        model.to(run.engine.device, run.engine.dtype)


@contextmanager
def own_buffers(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Undo, at the end, what casts do to buffers that have a type of their own.

    These are buffers that are not saved (rotary frequencies, which `from_pretrained` keeps in float32 too), those that
    the model makes in a given type, and the calibrated state of quantizers.

    Args:
        model: as loaded, in float32.
        dtype: what it is cast to.
    """
    given = own_types(model, dtype)
    kept = [
        (module, name, buffer.to(given.get(f"{path}.{name}".removeprefix("."), buffer.dtype)))
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if f"{path}.{name}".removeprefix(".") in given
        or (
            buffer.dtype == torch.float32
            and (isinstance(module, Quantizer) or name in module._non_persistent_buffers_set)
        )
    ]
    yield
    for module, name, buffer in kept:
        setattr(module, name, buffer.to(getattr(module, name).device))


def own_types(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Types of the saved float buffers for which a model of type `dtype` does not take that, by name.

    `from_pretrained` leaves them so. They show in a model made without data.
    """
    if not any(buffer.is_floating_point() for _, buffer in saved_buffers(model)):
        return {}
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "base_model_prefix") or config is None:
        return {}
    try:
        cls = plain_class(model)
    except FormatError:  # no program loads its exports by the class
        return {}
    with torch.device("meta"):
        made: nn.Module = cls._from_config(copy.deepcopy(config), dtype=dtype)
    return {n: b.dtype for n, b in saved_buffers(made) if b.is_floating_point() and b.dtype != dtype}


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers of a model that checkpoints hold, by name, but for those of quantizers."""
    for path, module in model.named_modules():
        if not isinstance(module, Quantizer):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}".removeprefix("."), buffer
