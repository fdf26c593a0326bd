"""Uniform min-max quantizers for weights and activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qpipe.plugin import Options, Plugin, hookimpl
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.compiled import compiled, turn_off
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.rounding import block_rows, min_max_grid, round_to_codes
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
        self.row_wise = options.granularity != "tensor"
        self._proved: set[tuple[int, torch.dtype]] = set()

    def grid(self, rows: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point over `axes` of a float tensor, with the reduced axes kept."""
        low, high = code_range(self.options.bits)
        return min_max_grid(rows, axes, low, high, self.options.symmetric, self.context.scale_dtype)

    def encode(self, value: Tensor) -> QTensor:
        """Codes, scale and zero point of a weight `[channels, ...]`."""
        low, high = code_range(self.options.bits)
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
        """Bitwise `encode(value).decode()`, in one pass over memory: a block stays in cache from range to product."""
        width = self.options.group_size or max(1, value[0].numel())
        if self.options.granularity == "tensor":
            rows = value.reshape(-1, width)
        else:
            rows = grouped(value, self.options.group_size).reshape(-1, width)
        result = torch.empty_like(value, memory_format=torch.contiguous_format) if out is None else out
        target = result.view(-1, width)
        if not (self.context.compiled and value.device.type == "cpu" and self._quantize_compiled(rows, target)):
            self._quantize_blocks(rows, target)
        return result

    def _quantize_blocks(self, rows: Tensor, target: Tensor) -> None:
        """Quantize rows `[n, width]` into `target` block by block."""
        low, high = code_range(self.options.bits)
        shared = self.grid(rows, (0, 1)) if self.options.granularity == "tensor" else None
        size = block_rows(rows)
        # Made once: memory fresh from the system costs more than the arithmetic.
        scratch = torch.empty((size, rows.shape[1]), dtype=torch.float32, device=rows.device)
        for start in range(0, rows.shape[0], size):
            block, goal = rows[start : start + size], target[start : start + size]
            codes = scratch[: block.shape[0]]
            if block.dtype != torch.float32:
                block = codes.copy_(block)
            scale, zero = shared if shared is not None else self.grid(block, (1,))
            round_to_codes(block, scale, zero, low, high, out=codes)
            if isinstance(zero, Tensor):
                codes.sub_(zero)
            if goal.dtype == torch.float32:
                torch.mul(codes, scale, out=goal)
            else:
                goal.copy_(codes.mul_(scale))

    def _quantize_compiled(self, rows: Tensor, target: Tensor) -> bool:
        """The same in compiled code; False where that fails, which is logged.

        The first result for every row length and dtype is compared with that of eager mode.
        """
        low, high = code_range(self.options.bits)
        axes = (0, 1) if self.options.granularity == "tensor" else (1,)
        try:
            compiled(quantize_rows)(rows, target, axes, low, high, self.options.symmetric, self.context.scale_dtype)
        except Exception as error:  # The compiler's errors have no common base; the eager path does the same work.
            turn_off(self.context, f"compiling for {self.site} failed ({type(error).__name__}: {str(error)[:200]})")
            return False
        key = rows.shape[1], rows.dtype
        if key not in self._proved:
            expected = torch.empty_like(target)
            self._quantize_blocks(rows, expected)
            if not torch.equal(expected.nan_to_num(), target.nan_to_num()):
                turn_off(self.context, f"compiled code differs from eager mode at {self.site}")
                return False
            self._proved.add(key)
        return True


def quantize_rows(
    rows: Tensor,
    out: Tensor,
    axes: tuple[int, ...],
    low: int,
    high: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    """Quantize and dequantize rows `[n, width]` into `out`, with ranges over `axes`; made of the eager functions."""
    scale, zero = min_max_grid(rows, axes, low, high, symmetric, scale_dtype)
    codes = round_to_codes(rows, scale, zero, low, high)
    out.copy_((codes - zero) * scale)


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
