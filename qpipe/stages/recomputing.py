"""Activation checkpointing: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial

from torch import nn

from qpipe.errors import ConfigError, ModelError
from qpipe.run import Run
from qpipe.stages.teaching import wanted_signals


def recompute(run: Run) -> None:
    """Turn activation checkpointing on if `train.activation_checkpointing` says so.

    Raises:
        ConfigError: the model cannot.
        ModelError: the model has turned on the reentrant kind itself, and a part of this training would be lost.
    """
    if run.config.train.activation_checkpointing:
        _enable(run.student)
    reentrant = reentrant_module(run.student)
    lost = lost_without_graph(run) if reentrant is not None else []
    if lost:
        raise ModelError(
            f"{type(run.student).__name__} checkpoints activations of {reentrant} with use_reentrant=True, which gives "
            f"{' and '.join(lost)}; turn that off in the model and set train.activation_checkpointing: true, which "
            "uses the other kind"
        )


def _enable(model: nn.Module) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)
    advice = f"{type(model).__name__} cannot checkpoint activations; leave train.activation_checkpointing out"
    if enable is None:
        raise ConfigError(advice)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:  # transformers' classes have the method whether or not they support it
        raise ConfigError(advice) from error


def lost_without_graph(run: Run) -> list[str]:
    """What would be lost, silently, because the reentrant kind runs blocks without a graph first."""
    lost = []
    if run.total_steps and wanted_signals(run).student - {"logits"}:
        lost.append("no gradient to attention maps and other captured tensors")
    if run.weight_losses:
        names = ", ".join(term.name for term in run.weight_losses)
        lost.append(f"no gradient to penalties on weights ({names})")
    if run.instruments.context.noise < 1 and any(entry.site.slot == "weight" for entry in run.plan.sites.values()):
        lost.append("other weights in the forward pass than quantization.noise in the backward pass")
    return lost


def reentrant_module(model: nn.Module) -> str | None:
    """Path of the first module with transformers' activation checkpointing of the reentrant kind, None without one."""
    for name, module in model.named_modules():
        call = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) is True and isinstance(call, partial):
            if call.keywords.get("use_reentrant", True):
                return name or "all blocks"
    return None
