"""Autograd functions that replace values or stop gradients without breaking ZeRO-3.

DeepSpeed attaches its re-gathering of weights to the tensors that leave a module. Returning a foreign tensor, or a
detached one, cuts that graph, and backward then meets a partitioned weight. These functions keep the graph and send
zeros instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_owned(grad: Tensor) -> bool:
    """True if nobody but the calling backward pass holds this gradient, so that it may be overwritten.

    It asks what autograd itself asks before it adds into a gradient in place, and looks through the transposed view in
    which linear maps return theirs. Where torch does not say, nothing is owned. References from Python are not seen: a
    function that keeps the gradient it was given must copy it.
    """
    uses, storage_uses = getattr(grad, "_use_count", None), getattr(torch._C, "_storage_Use_Count", None)
    if uses is None or storage_uses is None or type(grad) is not Tensor or not grad.is_contiguous():
        return False
    base: Any = grad._base
    if base is not None and base._use_count() != 2:  # the view's own use, and the name here
        return False
    storage = grad.untyped_storage()  # a use as well
    return bool(uses() == 1 and storage_uses(storage._cdata) == (2 if base is None else 3))


class Inject(torch.autograd.Function):
    """`Inject.apply(student, teacher)`: the teacher's value in the student's dtype, zero gradient to the student.

    Both tensors have the same shape.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """Return a copy of `teacher` shaped and typed like `student`."""
        return teacher.to(student.dtype).view_as(student).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Zeros for the student."""
        return torch.zeros_like(grads[0]), None


class StopGradient(torch.autograd.Function):
    """`StopGradient.apply(x)`: `x` itself, with a zero gradient in place of none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return `x`."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(grads[0])


class WithWeightLoss(torch.autograd.Function):
    """`y, value = WithWeightLoss.apply(y, weight, fn)`: `y` unchanged, and the penalty `fn(weight)` beside it.

    Autograd runs the node when both gradients have arrived, that is in the backward pass of the module that owns the
    weight, while ZeRO-3 has it gathered. Factors such as loss scale and 1/accumulation come in through the scalar's
    gradient. The penalty's own graph is built again there, so nothing the size of a weight is kept in between.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return `y` and the float32 scalar."""
        ctx.fn = fn
        ctx.save_for_backward(weight)
        with torch.no_grad():
            value = fn(weight).float()
        return y.view_as(y), value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Pass on the first gradient; differentiate the penalty for the second."""
        (weight,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            value = ctx.fn(leaf)
            (grad,) = torch.autograd.grad(value, leaf, grads[1].to(value.dtype))
        return grads[0], grad.to(weight.dtype), None
