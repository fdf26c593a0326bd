"""Diagnose: find the module where a forward pass stopped being finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpipe.run import Run, Step
from qpipe.stages.calibrate import inputs_of


def first_non_finite(run: Run, step: Step) -> str | None:
    """Run the batch again without gradients; the path of the first module whose output has NaN or infinity.

    Children report before their parents, so the name is the innermost one. Collective: the forward pass may gather
    weights or exchange buffers.
    """
    found: list[str] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not bool(torch.isfinite(t).all()) for t in _tensors(output)):
                found.append(f"{path} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(path)) for path, m in run.student.named_modules() if path]
    try:
        with torch.no_grad():
            run.engine.forward(**inputs_of(step.batch))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return [t for item in output for t in _tensors(item)]
    return []
