"""Gradients clipped tensor by tensor, also where a process holds a part of each only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EPSILON = 1e-6
"""Added to each norm, as torch's `clip_grad_norm_` does."""


@dataclass(frozen=True)
class Fragment:
    """This process's part of one gradient.

    Attributes:
        values: the part, any shape; empty if other processes hold all of it.
        write: puts the scaled part where the optimizer finds it; None if `values` is that place.
    """

    values: Tensor
    write: Callable[[Tensor], None] | None = None


def clip_each(fragments: Iterable[Fragment], limit: float, shared: bool, device: torch.device | None = None) -> float:
    """Scale every gradient, in place, to a norm of at most `limit` of its own; returns the norm of all before that.

    Norms are summed in float64, so that they do not depend on how tensors are shared out. A gradient is scaled in its
    own type.

    Args:
        fragments: one for each parameter, in the same order on every process.
        limit: largest norm of one gradient; 0 leaves them as they are.
        shared: True if every process holds a part of each, False if each holds all. Collective if True.
        device: where processes can sum, which is theirs, also where an offloaded optimizer keeps gradients in CPU
            memory. None: where the gradients are.
    """
    found = list(fragments)
    if not found:
        return 0.0
    places = {fragment.values.device for fragment in found}
    device = found[0].values.device if device is None else device
    if device.type != "cpu" and any(place.type == "cpu" for place in places):
        torch.accelerator.synchronize(device)  # gradients are copied there without waiting
    norms = [torch.linalg.vector_norm(f.values.detach(), dtype=torch.float32).double().to(device) for f in found]
    squares = torch.stack(norms).square()
    if shared:
        dist.all_reduce(squares)
    if limit:
        factors = (limit / (squares.sqrt() + EPSILON)).clamp(max=1.0)
        there = {place: factors.to(place) for place in places}
        for number, fragment in enumerate(found):
            fragment.values.mul_(there[fragment.values.device][number])
            if fragment.write is not None:
                fragment.write(fragment.values)
    return float(squares.sum().sqrt())


def plain_fragments(model: nn.Module, sharded: bool) -> list[Fragment]:
    """The gradients of a model that torch trains: whole ones, or this process's shards."""
    found = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            found.append(Fragment(gradient.to_local() if isinstance(gradient, DTensor) else gradient))
        elif sharded and parameter.requires_grad:  # keeps the order equal on all processes
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            found.append(Fragment(local.detach().new_zeros(0)))
    return found


def zero_fragments(model: nn.Module, stage: int) -> list[Fragment]:
    """The gradients of a model that DeepSpeed trains, after the last backward pass of a step and before the update."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    def write(parameter: nn.Parameter) -> Callable[[Tensor], None]:
        return lambda values: safe_set_local_grad(parameter, values)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if stage == 3:
        return [Fragment(safe_get_local_grad(parameter), write(parameter)) for parameter in parameters]
    if stage == 0:
        return plain_fragments(model, sharded=False)
    # Stages 1 and 2 cut the flattened gradients of a group into one piece for each process.
    found = []
    for parameter in parameters:
        part = parameter._hp_mapping  # type: ignore[attr-defined]
        if part is None:  # this process holds nothing of it
            found.append(Fragment(torch.zeros(0, device=parameter.device)))
        else:
            index = parameter._index_in_param_group  # type: ignore[attr-defined]
            found.append(Fragment(part.get_lp_grad_fragment(index)))
    return found
