"""Uniform quantization of activations, bit for bit as compressed-tensors simulates it after export."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qpipe.errors import TrainingError
from qpipe.quant.affine import ActivationRange, axes_of_token
from qpipe.quant.calibrated import CalibratedActivation, RangeChoice
from qpipe.quant.estimators import RangeGrid
from qpipe.quant.fused import Clipped
from qpipe.quant.observed import Observed
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.tensor import code_range

NO_ZERO = 1e-8
"""Added to narrow asymmetric ranges by the reference, so that those of one value have a scale."""


class ActivationOptions(RangeChoice):
    """Options of `uniform-activation`."""

    bits: int = Field(8, ge=2, le=16, description="more than 8 need export.format: native")
    granularity: Literal["token", "tensor"] = Field(
        "token", description="what has a range of its own; all heads of a token share it"
    )
    dynamic: bool = Field(True, description="take the range of each batch; else calibrate one before training")
    symmetric: bool = True
    narrow: bool = Field(
        False,
        description="outermost levels of a dynamic range at its ends, as in Zhang et al. (2020): symmetric codes of "
        "-(2**(bits-1) - 1) to 2**(bits-1) - 1, asymmetric ones over a range without 0; needs export.format: native",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="cut values at +-clip before a dynamic range is taken, and give those there no gradient "
        "(Zhang et al.: 2.5); needs export.format: native",
    )

    @model_validator(mode="after")
    def _static_is_per_tensor(self) -> ActivationOptions:
        if not self.dynamic and self.granularity == "token":
            raise ValueError("static ranges are per tensor: set granularity: tensor, or dynamic: true")
        if not self.dynamic and (self.narrow or self.clip is not None):
            raise ValueError("narrow and clip are of dynamic ranges; set dynamic: true, or leave them out")
        if self.dynamic and (self.range != "min-max" or self.range_options):
            raise ValueError(
                "range and range_options are of calibrated ranges; set dynamic: false and granularity: tensor, or "
                "leave them out: a dynamic range is the whole one of each batch"
            )
        return self

    @property
    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the range estimator; None for dynamic ranges."""
        return None if self.dynamic else (self.range, self.range_options)


class UniformActivation(CalibratedActivation):
    """Affine quantization of an activation, `[batch, tokens, features]` or as its slot has it (any shape, per tensor).

    Per token, all heads share the range, and in attention maps that of a query holds for all keys.

    Scales are those of compressed-tensors 0.20 (`calculate_qparams`): symmetric `max|x| / 127.5` for 8 bits, asymmetric
    `(max - min) / 255`, over a range that includes 0. Dynamic ranges clip nothing, so their gradient passes unchanged;
    static ranges, which a range estimator finds, block it outside.

    With `narrow` and `clip` they are those that Zhang et al. (EMNLP 2020) publish as code: symmetric
    `max|x| / 127`, asymmetric `(max - min + 1e-8) / 255` with a zero point between codes, of values that are cut at the
    clip; elements at the clip or beyond get no gradient.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, options: ActivationOptions) -> None:
        super().__init__(options.bits, options.symmetric)
        self.options = options
        self.needs_data = not options.dynamic
        self._ready = options.dynamic
        if not options.dynamic:
            self.register_buffer("low", torch.full((1,), torch.inf))
            self.register_buffer("high", torch.full((1,), -torch.inf))
            self.register_buffer("scale", torch.full((1,), torch.nan))
            self.register_buffer("zero_point", torch.zeros(1))

    @property
    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """Of the options."""
        return self.options.estimator

    @property
    def codes(self) -> tuple[int, int]:
        """As many below 0 as above it if `narrow` and symmetric."""
        bottom, top = code_range(self.bits)
        return (-top if self.options.narrow and self.symmetric else bottom), top

    def range_grid(self) -> RangeGrid:
        """Grids with scales as they will be exported."""

        def over(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero = self._affine(bottom, top)
            return self.exported(scale), zero

        return RangeGrid(*self.codes, self.symmetric, over)

    def calibrated(self, seen: Observed) -> None:
        """Set the range.

        Raises:
            TrainingError: nothing was seen, or nothing but one value, or the estimator found no range.
        """
        seen.require_range(self.site)
        low, high = self.range_of(seen)
        self.low.fill_(low)
        self.high.fill_(high)
        self.freeze_range()

    def freeze_range(self) -> None:
        """Turn the range into scale and zero point."""
        scale, zero = self._affine(self.low, self.high)
        self.scale.copy_(self.exported(scale))
        self.zero_point.copy_(zero)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep the calibrated range of a static quantizer, and divide it anew."""
        if not self.options.dynamic:
            assert isinstance(trained, UniformActivation)
            self.low.copy_(trained.low)
            self.high.copy_(trained.high)
            self.freeze_range()

    def _affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        bottom, top = self.codes
        if self.options.narrow and not self.symmetric:
            scale = (high - low + NO_ZERO) / (top - bottom)
            return scale, bottom - low / scale
        low, high = torch.minimum(low, torch.zeros_like(low)), torch.maximum(high, torch.zeros_like(high))
        span = torch.tensor(float(top - bottom), dtype=low.dtype, device=low.device)
        if self.options.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / (span / 2)
            zero = torch.zeros_like(scale)
        else:
            scale = (high - low) / span
            zero = (bottom - low / scale).clamp(bottom, top).round()
        eps = torch.full_like(scale, torch.finfo(scale.dtype).eps)
        return torch.where(scale == 0, eps, scale), torch.nan_to_num(zero)

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for this input, in its dtype, as `AffineActivation` has them.

        Raises:
            TrainingError: per-token ranges asked of an input without a token axis, or static ranges not calibrated.
        """
        if not self.options.dynamic:
            if not self._ready:  # asked until it is: on a GPU every question waits for all that was launched
                if bool(torch.isnan(self.scale).any()):
                    raise TrainingError(f"{self.site} has static ranges that were never calibrated")
                self._ready = True
            return self.rescaled(self.scale).to(x.dtype), self.zero_point.to(x.dtype)
        if self.options.granularity == "tensor":
            low, high = torch.aminmax(x)
            return self._dynamic(low.reshape(1), high.reshape(1))
        if x.ndim < 3:
            raise TrainingError(
                f"{self.site}: per-token ranges need [batch, tokens, features], got shape {tuple(x.shape)}; "
                "set granularity: tensor there, or leave the site out with quantizer: none"
            )
        axes = axes_of_token(self.slot, x.ndim)
        return self._dynamic(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))

    def _dynamic(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        clip = self.options.clip
        if clip is not None:
            low, high = low.clamp(-clip, clip), high.clamp(-clip, clip)
        scale, zero = self._affine(low, high)
        return self.rescaled(scale), zero

    def describe(self) -> ActivationRange:
        """The options, with the calibrated scale and zero point of a static range."""
        options = self.options
        settings = (options.bits, options.dynamic, options.granularity, options.symmetric)
        if options.dynamic:
            return ActivationRange(*settings, narrow=options.narrow, clip=options.clip)
        return ActivationRange(*settings, float(self.scale), float(self.zero_point))

    def forward(self, value: Tensor) -> Tensor:
        """Quantize, or only observe while calibrating."""
        if self.observing is not None:
            return super().forward(value)
        clips = not self.options.dynamic or self.options.clip is not None
        acts = torch.is_grad_enabled() and self.context.enabled and self.context.rounding
        ends = self._ends(value) if clips and acts else None
        masks: list[Tensor | None] = []

        def noting(x: Tensor) -> Tensor:
            quantized, inside = self._made(x, ends)
            masks.append(inside)
            return quantized

        if ends is None:
            return self._applied(value, noting)
        quantized = self._applied(value.detach(), noting)
        result: Tensor = Clipped.apply(self.context, value, quantized, masks[0])
        return result

    def _made(self, x: Tensor, ends: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """`quantize_within`, once for all that share a dynamic range: nothing of it belongs to this site."""
        options = self.options
        # What a subclass adds may belong to its site.
        if not options.dynamic or self.context.rescale is not None or type(self) is not UniformActivation:
            return self.quantize_within(x, ends)
        axes = axes_of_token(self.slot, x.ndim) if options.granularity == "token" and x.ndim > 2 else ()
        scheme = (options.bits, options.granularity, options.symmetric, options.narrow, options.clip, axes)
        what = (*scheme, ends is None)
        return self.context.shared.made(x, what, lambda: self.quantize_within(x, ends))

    def _ends(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of what gets a gradient."""
        clip = self.options.clip
        if clip is not None:  # at the clip itself there is none
            end = torch.nextafter(value.new_full((1,), clip), value.new_zeros(1))
            return -end, end
        bottom, top = self.codes
        return (bottom - self.zero_point) * self.scale, (top - self.zero_point) * self.scale
