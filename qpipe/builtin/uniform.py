"""Uniform min-max quantizers for weights and activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qpipe.builtin.activation import ActivationOptions, UniformActivation
from qpipe.errors import SiteError
from qpipe.plugin import Options, Plugin, hookimpl
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.rounding import block_rows, round_to_codes
from qpipe.quant.tensor import QTensor, code_range, grouped
from qpipe.types import QuantizerKind

ACTIVATION_SLOTS = frozenset({"input", "output", "query", "key", "value", "scores", "probs", "context"})


class UniformOptions(Options):
    """Options of `uniform`."""

    bits: int = Field(8, ge=2, le=8)
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = Field(None, gt=0, description="elements per group; required for granularity `group`")
    symmetric: bool = True

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> UniformOptions:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("give group_size with granularity `group`, and only there")
        return self


class UniformWeight(Quantizer):
    """Affine min-max quantization of a weight.

    Symmetric: `scale = max|w| / (2**(bits-1) - 1)`, zero point 0. Asymmetric: `scale = (max - min) / (2**bits - 1)`
    over a range that includes 0, integer zero point. The range covers every weight, so the gradient passes unchanged.

    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section 2.
    """

    def __init__(self, options: UniformOptions) -> None:
        super().__init__()
        self.options = options

    def grid(self, rows: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point over `axes` of a float tensor, with the reduced axes kept."""
        low, high = code_range(self.options.bits)
        if self.options.symmetric:
            peak = torch.maximum(rows.amax(axes, keepdim=True), -rows.amin(axes, keepdim=True)).float()
            return self.snap(peak / high), 0.0
        top = rows.amax(axes, keepdim=True).float().clamp_min(0)
        bottom = rows.amin(axes, keepdim=True).float().clamp_max(0)
        scale = self.snap((top - bottom) / (high - low))
        return scale, (low - bottom / scale).round_().clamp_(low, high)

    def encode(self, value: Tensor) -> QTensor:
        """Codes, scale and zero point of a weight `[channels, ...]`.

        Raises:
            SiteError: the group size does not divide the elements of a channel.
        """
        low, high = code_range(self.options.bits)
        self._check_groups(value)
        view = grouped(value, self.options.group_size)
        per_tensor = self.options.granularity == "tensor"
        axes = tuple(range(view.ndim)) if per_tensor else tuple(range(1, view.ndim))
        if self.options.granularity == "group":
            axes = (2,)
        scale, zero = self.grid(view, axes)
        codes = round_to_codes(view, scale, zero, low, high).view(value.shape)
        zero_point = zero if isinstance(zero, Tensor) else torch.zeros(1, device=value.device)
        return QTensor(codes, scale, zero_point, self.options.bits, self.options.group_size)

    def quantize(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Bitwise `encode(value).decode()`, in one pass over memory: each block stays in cache from range to product."""
        low, high = code_range(self.options.bits)
        self._check_groups(value)
        width = self.options.group_size or max(1, value[0].numel())
        rows = value.reshape(-1, width)
        result = torch.empty_like(value, memory_format=torch.contiguous_format) if out is None else out
        target = result.view(-1, width)
        shared = self.grid(rows, (0, 1)) if self.options.granularity == "tensor" else None
        size = block_rows(rows)
        for start in range(0, rows.shape[0], size):
            block = rows[start : start + size]
            scale, zero = shared if shared is not None else self.grid(block, (1,))
            codes = round_to_codes(block, scale, zero, low, high)
            if isinstance(zero, Tensor):
                codes.sub_(zero)
            if target.dtype == torch.float32:
                torch.mul(codes, scale, out=target[start : start + size])
            else:
                target[start : start + size] = codes.mul_(scale)
        return result


    def _check_groups(self, value: Tensor) -> None:
        size, per_channel = self.options.group_size, math.prod(value.shape[1:])
        if size is not None and per_channel % size:
            raise SiteError(
                f"{self.site}: group_size {size} does not divide the {per_channel} elements of a channel; "
                "choose a divisor, or another granularity there"
            )


class UniformQuantizers(Plugin):
    """Offers `uniform` for weights and `uniform-activation` for everything else."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`uniform` and `uniform-activation`."""
        yield QuantizerKind(
            "uniform", UniformWeight, UniformOptions, frozenset({"weight"}), "min-max integer weights, 2 to 8 bits"
        )
        yield QuantizerKind(
            "uniform-activation",
            UniformActivation,
            ActivationOptions,
            ACTIVATION_SLOTS,
            "8-bit activations, range per token, per tensor, or calibrated",
        )
