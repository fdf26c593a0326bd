"""Activation checkpointing: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial

from torch import nn

from qpipe.errors import ConfigError, ModelError
from qpipe.run import Run


def recompute(run: Run) -> None:
    """Turn activation checkpointing on if `train.activation_checkpointing` says so.

    Raises:
        ConfigError: the model cannot.
        ModelError: the model has turned on the reentrant kind itself, and tensors are captured in it.
    """
    if run.config.train.activation_checkpointing:
        enable = getattr(run.student, "activation_checkpointing_enable", None)
        if enable is None:
            raise ConfigError(f"{type(run.student).__name__} cannot checkpoint activations")
        enable({"use_reentrant": False})
    reentrant = reentrant_module(run.student)
    # It runs blocks without a graph first: captured tensors would get no gradient, silently.
    if reentrant is not None and run.teacher_instruments is not None:
        raise ModelError(
            f"{type(run.student).__name__} checkpoints activations of {reentrant} with use_reentrant=True, which gives "
            "no gradient to attention maps and other captured tensors; turn that off in the model and set "
            "train.activation_checkpointing: true, which uses the other kind"
        )


def reentrant_module(model: nn.Module) -> str | None:
    """Path of the first module with transformers' activation checkpointing of the reentrant kind, None without one."""
    for name, module in model.named_modules():
        call = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) is True and isinstance(call, partial):
            if call.keywords.get("use_reentrant", True):
                return name or "all blocks"
    return None
