"""Learning how to round: AdaRound, for one layer.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Relaxation = Literal["hard-sigmoid", "sigmoid"]
Decay = Literal["cosine", "linear", "power", "sigmoid", "exp", "log"]

TINY = 1e-16
"""Stands for a fraction of 0, whose logarithm is not finite."""
BETA = (20.0, 2.0)
"""Exponent of the rounding term, at first and in the end."""
WARM_UP = 0.2
"""Part of the iterations without rounding term."""


def stretch(relaxation: Relaxation) -> float:
    """How far the sigmoid reaches beyond 0 and 1 before it is clipped (section 3.2: 0.1)."""
    return 0.1 if relaxation == "hard-sigmoid" else 0.0


class Rounding(nn.Module):
    """Offsets `h` in [0, 1] for a weight on a grid: `code = floor(w / scale + zero_point) + h`, clamped.

    Args:
        weight: float weight, any shape.
        scale: float32, broadcastable to it.
        zero_point: float32, likewise.
        low: smallest code.
        high: largest code.
        relaxation: `h` is a sigmoid of what is learned: stretched to [-0.1, 1.1] and clipped, or as it is.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        low: int,
        high: int,
        relaxation: Relaxation = "hard-sigmoid",
    ) -> None:
        super().__init__()
        # Between levels at half-integers the halves are the floor.
        whole = zero_point.floor()
        steps = weight.detach().float() / scale + (zero_point - whole)
        self.floor, self.whole = steps.floor(), whole
        self.scale, self.zero_point, self.low, self.high = scale, zero_point, low, high
        self.margin = stretch(relaxation)
        rest = steps - self.floor
        # At first h is the fraction itself, so that the soft weight is the weight.
        self.alpha = nn.Parameter(-torch.log((1 + self.margin - rest) / (rest + self.margin).clamp_min(TINY)))

    def offsets(self) -> Tensor:
        """`h`, of the weight's shape."""
        return (torch.sigmoid(self.alpha) * (1 + 2 * self.margin) - self.margin).clamp(0, 1)

    def _value(self, offsets: Tensor) -> Tensor:
        codes = (self.floor + offsets + self.whole).clamp(self.low, self.high)
        return (codes - self.zero_point) * self.scale

    def soft(self) -> Tensor:
        """The weight with offsets as they are; differentiable in `alpha`."""
        return self._value(self.offsets())

    def hard(self) -> Tensor:
        """The weight with offsets of 0 or 1: values on the grid, float32."""
        return self._value((self.alpha.detach() >= 0).float())

    def undecided(self, beta: float) -> Tensor:
        """`sum 1 - |2h - 1|^beta`: 0 where every offset is 0 or 1 (equation 24)."""
        return (1 - (2 * self.offsets() - 1).abs().pow(beta)).sum()


def fall(x: float, decay: Decay, shape: float = 1.0) -> float:
    """From 1 at `x = 0` to 0 at `x = 1`.

    Args:
        x: part of the way, 0 to 1.
        decay: form of the curve.
        shape: its steepness; without effect on `cosine` and `linear`.
    """
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * x))
    if decay == "power":
        return 1 - float(x**shape)
    # In other forms than the reference has them: those overflow or divide by 0 where curves are very steep or flat.
    shape = max(shape, sys.float_info.min)  # half of it must not be 0
    if decay == "exp":
        # (e^(-s x) - e^-s) / (1 - e^-s)
        return math.exp(-shape * x) * math.expm1(-shape * (1 - x)) / math.expm1(-shape)
    if decay == "sigmoid":
        # (f(x) - f(1)) / (f(0) - f(1)) with f(p) = 1 / (1 + e^(s (p - 1/2)))
        top = math.exp(-shape * max(0.0, x - 0.5)) * math.expm1(-shape * (1 - x))
        return top / (1 + math.exp(-shape * abs(x - 0.5))) / math.expm1(-shape / 2)
    if decay == "log":
        # 1 + log(1 - x (1 - e^-a)) / a, which is 0 at the end also where e^-a is
        a = (BETA[0] - BETA[1]) / shape
        return 0.0 if x >= 1 else 1 + math.log1p(x * math.expm1(-a)) / a
    return 1 - x


def beta_at(
    iteration: float, iterations: int, decay: Decay = "cosine", shape: float = 1.0, start: float = WARM_UP
) -> float:
    """Exponent of the rounding term at an iteration (counted from 1): 20 up to `start * iterations`, then down to 2."""
    first = start * iterations
    x = max(0.0, (iteration - first) / (iterations - first))
    return BETA[1] + (BETA[0] - BETA[1]) * fall(x, decay, shape)


def reconstruction(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over axis 1, the output features, and averaged over everything else.

    Args:
        prediction: `[positions, features]`, or `[batch, channels, height, width]`.
        target: of the same shape.
    """
    return (prediction - target).square().sum(1).mean()


def learn_rounding(
    rounding: Rounding,
    output: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    iterations: int,
    learning_rate: float = 1e-3,
    weight: float = 0.01,
    decay: Decay = "cosine",
    decay_shape: float = 1.0,
) -> None:
    """Minimise reconstruction error plus `weight * undecided` over the offsets, with Adam.

    Args:
        rounding: the offsets; changed.
        output: the layer as a function of input and weight; axis 1 of its result holds the features.
        batches: `(input, target)`, at least `iterations` of them.
        iterations: steps in all; the rounding term is left out of the first fifth.
        learning_rate: of Adam.
        weight: factor of the rounding term.
        decay: how its exponent falls from 20 to 2.
        decay_shape: steepness of some of the forms.
    """
    optimizer = torch.optim.Adam([rounding.alpha], lr=learning_rate)
    for iteration, (inputs, target) in zip(range(1, iterations + 1), batches, strict=False):
        optimizer.zero_grad()
        loss = local_loss(
            rounding, output(inputs, rounding.soft()), target, iteration, iterations, weight, decay, decay_shape
        )
        loss.backward()
        optimizer.step()


def local_loss(
    rounding: Rounding,
    prediction: Tensor,
    target: Tensor,
    iteration: int,
    iterations: int,
    weight: float = 0.01,
    decay: Decay = "cosine",
    decay_shape: float = 1.0,
) -> Tensor:
    """What `learn_rounding` minimises at an iteration, counted from 1 (equations 21 and 25)."""
    loss = reconstruction(prediction, target)
    if iteration < WARM_UP * iterations:
        return loss
    return loss + weight * rounding.undecided(beta_at(iteration, iterations, decay, decay_shape))
