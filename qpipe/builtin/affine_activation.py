"""Activations with learned scale and zero point, and plain gradients.

Bondarenko et al., "Understanding and Overcoming the Challenges of Efficient Transformer Quantization" (EMNLP 2021),
section 4, whose code learns ranges like this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.compiled import over_rows
from qpipe.quant.estimators import RangeGrid
from qpipe.quant.learned import SMALLEST_STEP, FirstRange, GridActivation, total
from qpipe.quant.observed import Observed
from qpipe.quant.quantizer import Quantizer
from qpipe.types import ACTIVATION_SLOTS, QuantizerKind


class LearnedAffineOptions(FirstRange):
    """Options of `affine-activation`."""

    symmetric: bool = Field(False, description="zero point 0; else it is learned")
    scale_domain: Literal["linear", "log"] = Field(
        "linear",
        description="what is learned: the scale, or its natural logarithm, so that a step of the optimizer changes the "
        "scale by a factor, however large it is",
    )
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate of scale and zero point")


class LearnedAffineActivation(GridActivation):
    """`(clamp(round(x / s) + round(z), low, high) - round(z)) * s` with learned scale s, or log s, and zero point z.

    Rounding is passed through. The gradient reaches `x` inside, where the rounded value is within the codes, and

        dq/ds = round(x / s) - x / s inside, bound - round(z) outside,
        dq/dz = 0 inside, -s outside,

    summed without LSQ's gradient scale; log s gets s times the gradient of s. Where z itself is clamped to the codes,
    its gradient still passes, so that it can come back (in the authors' code it cannot).
    """

    def __init__(self, options: LearnedAffineOptions) -> None:
        super().__init__(options.bits, signed=True, symmetric=options.symmetric)
        self.options = options
        self.has_offset = not options.symmetric
        self.lr_scale = options.lr_scale
        self.learned_scale = self.new_parameter()
        if self.has_offset:
            self.learned_zero = self.new_parameter()

    @property
    def estimator(self) -> tuple[str, dict[str, object]]:
        """Of the options."""
        return self.options.init, self.options.init_options

    def step(self) -> Tensor:
        """The scale."""
        learned = self.learned_scale.detach()
        return learned if self.options.scale_domain == "linear" else learned.float().exp()

    def _set_step(self, scale: float) -> None:
        self.learned_scale.fill_(
            scale if self.options.scale_domain == "linear" else math.log(max(scale, SMALLEST_STEP))
        )

    def zero_point(self, scale: Tensor) -> Tensor:
        """The parameter as an integer within the codes; 0 if levels are symmetric."""
        if not self.has_offset:
            return torch.zeros_like(scale)
        return self.learned_zero.detach().float().round().clamp(self.low, self.high)

    def range_grid(self) -> RangeGrid:
        """Grids that include 0."""

        def over(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
            if not self.has_offset:
                clip = self.exported(torch.maximum(top, -bottom) / self.high)
                return clip, torch.zeros_like(clip)
            scale = self.exported(((top - bottom) / (self.high - self.low)).clamp_min(torch.finfo(torch.float32).tiny))
            return scale, (self.low - bottom / scale).round().clamp(self.low, self.high)

        return RangeGrid(self.low, self.high, self.symmetric, over)

    def set_range(self, seen: Observed) -> None:
        """Lowest and highest level at the ends of a range that includes 0; the zero point stays a float.

        With symmetric levels the highest one is at the end that is farther from 0.
        """
        low, high = self.range_of(seen)
        self._cover(min(low, 0.0), max(high, 0.0))

    def _cover(self, low: float, high: float) -> None:
        if not self.has_offset:
            self._set_step(max(high, -low) / self.high)
            return
        scale = (high - low) / (self.high - self.low)
        self._set_step(scale)
        self.learned_zero.fill_(self.low - low / scale)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep lowest and highest level; only the highest of symmetric ones."""
        assert isinstance(trained, LearnedAffineActivation)
        scale = float(trained.step())
        zero = float(trained.learned_zero.detach()) if self.has_offset else 0.0
        with torch.no_grad():
            self._cover((trained.low - zero) * scale if self.has_offset else 0.0, (trained.high - zero) * scale)

    def gradient(
        self, rows: Tensor, grad: Tensor, out: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """As the class says."""
        slopes = over_rows(self.context, plain_gradient, out, (rows, grad, scale, zero), (self.low, self.high))
        step, outside = total(slopes.unbind(1))
        step = step if self.options.scale_domain == "linear" else step * scale.view(1)
        return (step, -scale.view(1) * outside) if self.has_offset else (step,)


def plain_gradient(out: Tensor, rows: Tensor, grad: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Gradient of rows into `out`; returns that of the scale, and what is clipped, of each row, `[rows, 2]`, float32.

    Args:
        out: `[rows, width]`, overwritten.
        rows: the activation, `[rows, width]`.
        grad: gradient of the quantized activation.
        scale: float32, `[1, 1]`.
        zero: zero point, an integer, float32, `[1, 1]`.
        low: smallest code.
        high: largest code.
    """
    upstream = grad.float()
    steps = rows.float() / scale
    rounded = steps.round()
    clamped = rounded.clamp(low - zero, high - zero)
    clips = rounded != clamped
    outside = upstream * clips
    out.copy_(upstream - outside)
    slope = torch.linalg.vecdot(upstream, torch.where(clips, clamped, rounded - steps))
    return torch.stack([slope, outside.sum(1)], dim=1)


class LearnedAffine(Plugin):
    """Offers `affine-activation`."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`affine-activation`."""
        yield QuantizerKind(
            "affine-activation",
            LearnedAffineActivation,
            LearnedAffineOptions,
            ACTIVATION_SLOTS,
            "activations with learned scale and integer zero point, plain gradients, 2 to 16 bits",
        )
