"""Landscape: the loss over a plane through the trained weights, along two random directions scaled to the weights.

Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018), section 4. Kim et al. (EACL 2023), figure 2a,
follow Park and Kim, "How Do Vision Transformers Work?" (ICLR 2022), whose code takes the norms over the other axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Filters = Literal["rows", "columns"]
POSITIONS = ("pos_embed", "position_embedding", "relative_position")
"""Parts of the names of parameters that embed positions: the first and the last in Park and Kim's code, timm's and
Swin's; the other in transformers."""


def normalized(direction: Tensor, weight: Tensor, filters: Filters = "rows") -> Tensor:
    """A direction whose parts are as long as those of the weight; 0 for weights of one axis, such as biases and norms.

    Args:
        direction: of the shape of the weight.
        weight: any shape.
        filters: what is scaled by itself: `rows`, each index of axis 0 (Li et al.); or `columns`, the vector along axis
            0 at each place of the other axes (Park and Kim).
    """
    if weight.ndim <= 1:
        return torch.zeros_like(direction)
    if filters == "columns":
        return direction * (weight.norm(dim=0) / (direction.norm(dim=0) + 1e-7))
    ours, theirs = direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1)
    return direction * (theirs / (ours + 1e-10)).view(-1, *(1,) * (weight.ndim - 1))


def random_direction(
    parameters: Mapping[str, Tensor], filters: Filters, generator: torch.Generator
) -> dict[str, Tensor]:
    """A normal random direction, `normalized`, by name of the parameter.

    Along `columns` it is 0 for embeddings of positions and tables of relative positions, as in Park and Kim's code.
    """
    found = {}
    for name, weight in parameters.items():
        drawn = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
        still = filters == "columns" and any(part in name for part in POSITIONS)
        found[name] = torch.zeros_like(drawn) if still else normalized(drawn, weight.detach(), filters)
    return found


def offsets(points: int, reach: float = 1.0) -> list[float]:
    """Evenly spaced numbers from `-reach` to `reach`; 0 is one of them if `points` is odd."""
    return [reach * (2 * index / (points - 1) - 1) for index in range(points)]


@contextmanager
def moved(
    parameters: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]], by: Sequence[float]
) -> Iterator[None]:
    """Within, every parameter is at `w + sum of by * direction`; afterwards it has the bits it had."""
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    try:
        with torch.no_grad():
            for name, weight in parameters.items():
                for direction, step in zip(directions, by, strict=True):
                    weight.add_(direction[name], alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(before[name])
