"""Activations with learned step sizes, and learned offsets: LSQ and LSQ+.

Sources: see `qpipe.builtin.lsq`, which does the same for weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qpipe.errors import TrainingError
from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.compiled import over_rows
from qpipe.quant.estimators import RangeGrid
from qpipe.quant.learned import SMALLEST_STEP, FirstRange, GridActivation, total
from qpipe.quant.observed import Observed
from qpipe.quant.quantizer import Quantizer
from qpipe.types import ACTIVATION_SLOTS, QuantizerKind


class LsqActivationOptions(FirstRange):
    """Options of `lsq-activation`."""

    signed: bool = Field(True, description="levels on both sides of 0; false: from 0 up, for ReLU and probabilities")
    init: str = Field(
        "lsq",
        description="first step, from calibration: `lsq`: 2 mean|x| / sqrt(high); else the highest level is at the end "
        "of the range of a range estimator; see `range` of `uniform-activation`",
    )
    grad_scale: Literal["layer", "batch", "none"] = Field(
        "layer",
        description="scale of the step's gradient, 1 / sqrt(n high): n elements of one example (layer), or of the "
        "micro-batch of a process (batch), as in public code; none: 1",
    )
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate of the step")

    @property
    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the range estimator; None for `lsq`."""
        return None if self.init == "lsq" else super().estimator

    @model_validator(mode="after")
    def _options_have_an_estimator(self) -> LsqActivationOptions:
        if self.init == "lsq" and self.init_options:
            raise ValueError("init: lsq has no init_options; leave them out, or name a range estimator")
        return self


class LsqPlusActivationOptions(FirstRange):
    """Options of `lsq+-activation`."""

    signed: bool = Field(True, description="levels -2^(bits-1) .. 2^(bits-1) - 1 above the offset; false: from 0 up")
    zero_point: Literal["float", "integer"] = Field(
        "float",
        description="float: the offset is any number, as published; integer: rounded to whole steps, so that 0 is a "
        "level, as integer kernels need it",
    )
    grad_scale: Literal["layer", "batch", "none"] = Field("layer", description="see `lsq-activation`")
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate of step and offset")


class LsqActivation(GridActivation):
    """`round(clamp(x / s, low, high)) * s` with a learned step s.

    The gradient passes to `x` where `v = x / s` lies within `[low, high]`, and

        dq/ds = round(v) - v inside, low below, high above,

    summed and multiplied by `1 / sqrt(n high)` (LSQ, equations 1, 3 and 5 and section 2.2). There n is the number of
    features of a layer: of one example, so that neither the size of a batch nor the number of processes matters.
    """

    def __init__(self, options: LsqActivationOptions | LsqPlusActivationOptions, symmetric: bool | None = None) -> None:
        super().__init__(options.bits, options.signed, symmetric)
        self.options = options
        self.lr_scale = options.lr_scale
        self.learned_step = self.new_parameter()

    def step(self) -> Tensor:
        """The parameter."""
        return self.learned_step.detach()

    @property
    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """Of the options."""
        return self.options.estimator

    def range_grid(self) -> RangeGrid:
        """Grids whose highest level is the clip."""

        def over(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
            scale = self.exported(torch.maximum(top, -bottom) / self.levels[1])
            return scale, torch.full_like(scale, float(self.base))

        return RangeGrid(self.low, self.high, True, over)

    def set_range(self, seen: Observed) -> None:
        """The first step."""
        high = self.levels[1]
        if self.estimator is None:
            self.learned_step.fill_(2 * seen.mean_magnitude / math.sqrt(high))
        else:
            self.learned_step.fill_(max(abs(end) for end in self.range_of(seen)) / high)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep the range, and divide it anew: signed levels keep their cells' edges, unsigned ones the highest level.

        At 2 bits the highest signed level is one step: kept where it was, it would leave nearly only zeros.
        """
        assert isinstance(trained, LsqActivation)
        edges = 1 if self.symmetric else 0
        ratio = (trained.high - trained.low + edges) / (self.high - self.low + edges)
        self.learned_step.copy_(trained.learned_step * ratio)

    def gradient_scale(self, shape: torch.Size) -> float:
        """The factor on the gradients of the parameters, for an activation of this shape."""
        if self.options.grad_scale == "none":
            return 1.0
        count = math.prod(shape) if self.options.grad_scale == "batch" else math.prod(shape[1:])
        return 1 / math.sqrt(count * self.levels[1])

    def gradient(
        self, rows: Tensor, grad: Tensor, out: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """As the class says; the same for the offset, where there is one."""
        constants = (self.low, self.high, self.base)
        slopes = over_rows(self.context, affine_gradient, out, (rows, grad, scale, zero), constants)
        step, offset = total((slopes * self.gradient_scale(shape)).unbind(1))
        return (step, offset) if self.has_offset else (step,)


class LsqPlusActivation(LsqActivation):
    """`round(clamp((x - offset) / s, low, high)) * s + offset` with learned step and offset.

    `dq/ds` is that of `lsq-activation` with `v = (x - offset) / s`; `dq/doffset` is 0 inside and 1 outside (LSQ+,
    equations 2 to 6). The first range is `[min, max]` of calibration (section 3.2's min-max), or a range estimator's.
    An offset rounded to whole steps has the same gradients.
    """

    has_offset = True

    def __init__(self, options: LsqPlusActivationOptions) -> None:
        super().__init__(options, symmetric=False)
        self.options: LsqPlusActivationOptions = options
        self.offset: nn.Parameter = self.new_parameter()

    def range_grid(self) -> RangeGrid:
        """Grids from end to end."""

        def over(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
            step = (top - bottom) / (self.high - self.low)
            scale = self.exported(step.clamp_min(SMALLEST_STEP))
            return scale, self._zero_at(bottom - step * self.levels[0], scale)

        return RangeGrid(self.low, self.high, False, over)

    def set_range(self, seen: Observed) -> None:
        """Lowest and highest level at the ends of the range.

        Raises:
            TrainingError: both ends are the same.
        """
        low, high = self.range_of(seen)
        if not low < high:
            raise TrainingError(f"{self.site}: init {self.options.init!r} found nothing but {low:g}, which is no range")
        step = (high - low) / (self.high - self.low)
        self.learned_step.fill_(step)
        self.offset.fill_(low - step * self.levels[0])

    def zero_point(self, scale: Tensor) -> Tensor:
        """`base - offset / scale`; rounded and within the codes if it is to be an integer."""
        return self._zero_at(self.offset.detach().float(), scale)

    def _zero_at(self, offset: Tensor, scale: Tensor) -> Tensor:
        zero = self.base - offset / scale
        return zero.round().clamp(self.low, self.high) if self.options.zero_point == "integer" else zero

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep lowest and highest level."""
        assert isinstance(trained, LsqPlusActivation)
        super().inherit(trained, value)
        bottom = trained.offset + trained.learned_step * trained.levels[0]
        self.offset.copy_(bottom - self.learned_step * self.levels[0])


def affine_gradient(
    out: Tensor, rows: Tensor, grad: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, base: int
) -> Tensor:
    """Gradient of rows into `out`; returns the unscaled gradients of step and offset of each row, `[rows, 2]`, float32.

    Args:
        out: `[rows, width]`, overwritten.
        rows: the activation, `[rows, width]`.
        grad: gradient of the quantized activation.
        scale: float32, `[1, 1]`.
        zero: zero point, float32, `[1, 1]`.
        low: smallest code.
        high: largest code.
        base: code of the level at the offset.
    """
    upstream = grad.float()
    v = (rows.float() / scale).add_(zero)
    clamped = v.clamp(low, high)
    outside = upstream * (v != clamped)
    out.copy_(upstream - outside)
    # Inside the clamped value is v itself, outside it is a level, so that the first term has only what is inside.
    slope = torch.linalg.vecdot(upstream, clamped.round() - clamped) + torch.linalg.vecdot(outside, clamped - base)
    return torch.stack([slope, outside.sum(1)], dim=1)


class LearnedActivationSteps(Plugin):
    """Offers `lsq-activation` and `lsq+-activation`."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """Both."""
        yield QuantizerKind(
            "lsq-activation",
            LsqActivation,
            LsqActivationOptions,
            ACTIVATION_SLOTS,
            "activations with a learned step size, one for the tensor, 2 to 16 bits",
        )
        yield QuantizerKind(
            "lsq+-activation",
            LsqPlusActivation,
            LsqPlusActivationOptions,
            ACTIVATION_SLOTS,
            "activations with learned step size and offset, 2 to 16 bits",
        )
