"""Uniform quantization of activations, bit for bit as compressed-tensors simulates it after export."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qpipe.errors import TrainingError
from qpipe.plugin import Options
from qpipe.quant.affine import ActivationRange, AffineActivation
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.tensor import code_range


class ActivationOptions(Options):
    """Options of `uniform-activation`."""

    bits: int = Field(8, ge=2, le=8)
    granularity: Literal["token", "tensor"] = "token"
    dynamic: bool = Field(True, description="take the range of each batch; else calibrate one before training")
    symmetric: bool = True

    @model_validator(mode="after")
    def _static_is_per_tensor(self) -> ActivationOptions:
        if not self.dynamic and self.granularity == "token":
            raise ValueError("static ranges are per tensor: set granularity: tensor, or dynamic: true")
        return self


class _ClippedStraightThrough(torch.autograd.Function):
    """Quantized value; gradient passed where the input was inside the range, 0 where it was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


class UniformActivation(AffineActivation):
    """Affine quantization of an activation `[batch, tokens, features]` (or any shape, per tensor).

    Scales are those of compressed-tensors 0.20 (`calculate_qparams`): symmetric `max|x| / 127.5` for 8 bits, asymmetric
    `(max - min) / 255`. Dynamic ranges clip nothing, so their gradient passes unchanged; static ranges block it
    outside.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, options: ActivationOptions) -> None:
        super().__init__(options.bits, options.symmetric)
        self.options = options
        self.observing = False
        if not options.dynamic:
            self.register_buffer("low", torch.full((1,), torch.inf))
            self.register_buffer("high", torch.full((1,), -torch.inf))
            self.register_buffer("scale", torch.full((1,), torch.nan))
            self.register_buffer("zero_point", torch.zeros(1))

    def observe(self, x: Tensor) -> None:
        """Widen the calibrated range to include `x`, without its padding.

        Raises:
            TrainingError: `x` holds NaN or infinity.
        """
        low, high = torch.aminmax(self.counted(x.detach()).float())
        if not torch.isfinite(high - low):
            raise TrainingError(f"calibration met a non-finite value at {self.site}")
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def freeze_range(self) -> None:
        """Turn the observed range into scale and zero point.

        Raises:
            TrainingError: nothing was observed.
        """
        if not bool(torch.isfinite(self.high - self.low)):
            raise TrainingError(f"{self.site} saw no data in calibration; does the forward pass run this module?")
        scale, zero = self._affine(self.low, self.high)
        self.scale.copy_(self.snap(scale))
        self.zero_point.copy_(zero)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep the calibrated range of a static quantizer, and divide it anew."""
        if not self.options.dynamic:
            assert isinstance(trained, UniformActivation)
            self.low.copy_(trained.low)
            self.high.copy_(trained.high)
            self.freeze_range()

    def _affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        bottom, top = code_range(self.options.bits)
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
        """Scale and zero point for this input, in its dtype; `[batch, tokens, 1]` per token, else `[1]`.

        Raises:
            TrainingError: per-token ranges asked of an input without a token axis, or static ranges not calibrated.
        """
        if not self.options.dynamic:
            if bool(torch.isnan(self.scale).any()):
                raise TrainingError(f"{self.site} has static ranges that were never calibrated")
            return self.rescaled(self.scale).to(x.dtype), self.zero_point.to(x.dtype)
        if self.options.granularity == "tensor":
            low, high = torch.aminmax(x)
            return self._dynamic(low.reshape(1), high.reshape(1))
        if x.ndim < 3:
            raise TrainingError(
                f"{self.site}: per-token ranges need [batch, tokens, features], got shape {tuple(x.shape)}; "
                "set granularity: tensor there, or leave the site out with quantizer: none"
            )
        axes = tuple(range(2, x.ndim))
        return self._dynamic(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))

    def _dynamic(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self._affine(low, high)
        return self.rescaled(scale), zero

    def describe(self) -> ActivationRange:
        """The options, with the calibrated scale and zero point of a static range."""
        options = self.options
        settings = (options.bits, options.dynamic, options.granularity, options.symmetric)
        if options.dynamic:
            return ActivationRange(*settings)
        return ActivationRange(*settings, float(self.scale), float(self.zero_point))

    def forward(self, value: Tensor) -> Tensor:
        """Quantize, or only observe while calibrating."""
        if self.observing:
            self.observe(value)
            return value
        if self.options.dynamic or not torch.is_grad_enabled() or not self.context.enabled:
            return super().forward(value)
        quantized = super().forward(value.detach())
        bottom, top = code_range(self.options.bits)
        low, high = (bottom - self.zero_point) * self.scale, (top - self.zero_point) * self.scale
        inside = (value >= low.to(value.dtype)) & (value <= high.to(value.dtype))
        return _ClippedStraightThrough.apply(value, quantized, inside)
