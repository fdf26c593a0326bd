"""Derivatives of second order through quantizers.

Their straight-through gradient is differentiated as it stands: a quantizer counts as a map with the slope that training
uses, 1 or 0 for most, held constant. That is what differentiating the backward pass of Kim et al. (EACL 2023) gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qpipe.errors import ConfigError
from qpipe.quant.quantizer import Quantizer
from qpipe.run import Run
from qpipe.stages.calibrate import inference
from qpipe.stages.casting import cast

CLOSE = 1e-5


@contextmanager
def in_float32(run: Run) -> Iterator[None]:
    """Within, the model computes in float32, whatever it was trained in."""
    before = run.engine.dtype
    run.engine.dtype = torch.float32
    cast(run.student, run)
    run.instruments.context.weights_changed()
    try:
        yield
    finally:
        run.engine.dtype = before
        cast(run.student, run)
        run.instruments.context.weights_changed()


@contextmanager
def twice_differentiable(run: Run) -> Iterator[None]:
    """Within, the model is in evaluation mode and float32, and gradients of gradients can be taken.

    Fused attention kernels have no second derivative, so the plain one takes their place; compiled gradients of
    quantizers leave no trace in the graph, so eager ones take theirs.

    Args:
        run: on one process, with its quantizers in place.
    """
    own = [q for q in run.instruments.quantizers().values() if type(q).surrogate is not Quantizer.surrogate]
    context = run.instruments.context
    compiled, context.compiled = context.compiled, False
    for quantizer in own:
        quantizer.surrogate = frozen(quantizer)  # type: ignore[assignment, method-assign]
    try:
        with in_float32(run), inference(run), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        context.compiled = compiled
        for quantizer in own:
            del quantizer.surrogate


def frozen(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
    """A surrogate with the gradient of the quantizer's own, whose slopes are constants.

    Raises (when it is called):
        ConfigError: the gradient of one element depends on those of others, so that there is no slope to each.
    """
    surrogate = quantizer.surrogate
    proved = False

    def gradient(value: Tensor, incoming: Tensor) -> Tensor:
        leaf = value.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(surrogate(leaf), leaf, incoming)
        return found

    def replaced(value: Tensor) -> Tensor:
        nonlocal proved
        slope = gradient(value, torch.ones_like(value))
        if not proved:
            probe = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
            expected = probe * slope
            error = (gradient(value, probe.clone()) - expected).abs().amax()
            if bool(error > CLOSE * expected.abs().amax()):
                raise ConfigError(
                    f"{quantizer.site}: the gradient of {type(quantizer).__name__} goes from one element to others, as "
                    "through their maximum, so its second derivative is not known; leave the part `hessian` out"
                )
            proved = True
        return value * slope

    return replaced
