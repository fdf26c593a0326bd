"""Ternary weight networks: every weight is -scale, 0 or +scale.

Li, Zhang and Liu, "Ternary Weight Networks" (2016), section 2.3, as TernaryBERT (Zhang et al., EMNLP 2020) uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qpipe import Options, QTensor, Quantizer

BLOCK = 256 * 1024
"""Elements per block on a CPU: few enough blocks that calling operators costs little, and each stays in cache."""


class TernaryOptions(Options):
    """Options of the quantizer `ternary-twn`."""

    granularity: Literal["tensor", "channel"] = Field("tensor", description="what shares a scale")
    threshold: float = Field(0.7, ge=0, lt=1, description="weights up to this part of the mean magnitude become 0")
    clip: float | None = Field(
        None, gt=0, description="clip weights here first, and stop the gradient of those clipped; 2.5 in TernaryBERT"
    )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 2


class _InsideOnly(torch.autograd.Function):
    """The value itself; gradient 0 where its magnitude reaches `clip`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(value.abs() < clip)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class TernaryWeight(Quantizer):
    """Codes -1, 0 and 1 times one scale per tensor or per channel (axis 0).

    With `w' = clamp(w, -clip, clip)`, the weights with `|w'| > threshold * mean|w'|` are kept, and the scale is their
    mean magnitude. The gradient passes unchanged, except that clipped weights get none; scale and threshold have none.
    """

    def __init__(self, options: TernaryOptions) -> None:
        super().__init__()
        self.options = options
        self.row_wise = options.granularity == "channel"

    def _magnitude(self, block: Tensor, out: Tensor) -> Tensor:
        magnitude = out[: block.shape[0]].copy_(block).abs_()
        return magnitude if self.options.clip is None else magnitude.clamp_(max=self.options.clip)

    def _kept(self, magnitude: Tensor, limit: Tensor, axes: tuple[int, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of the magnitudes above the limit; overwrites `magnitude`."""
        # A comparison into a float32 buffer is several times faster on a CPU than a boolean and its later uses.
        above = torch.gt(magnitude, limit, out=mask[: magnitude.shape[0]])
        return magnitude.mul_(above).sum(axes, keepdim=True), above.sum(axes, keepdim=True)

    def _grid(self, kept: Tensor, count: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The scale in its export type; the limit, infinite where that type rounds the scale to zero."""
        scale = kept / count.clamp_min(1)
        usable = scale.to(self.context.scale_dtype) > 0
        # A NaN among the weights must reach the loss, which stops the run, and not become a zero.
        snapped = torch.where(scale.isnan(), scale, self.snap(scale))
        return snapped, torch.where(usable, limit, torch.inf)

    def _codes(self, value: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """`(rows, float32 codes, scale)` block by block; the codes are overwritten by the next block.

        Both `encode` and `quantize` are made of this, so that they agree in every bit.
        """
        rows, size = as_rows(value)
        blocks = [slice(start, min(start + size, rows.shape[0])) for start in range(0, rows.shape[0], size)]
        # Buffers are made once: memory fresh from the system costs more than the arithmetic.
        buffers = [torch.empty((min(size, rows.shape[0]), rows.shape[1]), device=rows.device) for _ in range(2)]
        shared = self._grid_of_tensor(rows, blocks, buffers) if self.options.granularity == "tensor" else None
        for block in blocks:
            if shared is None:
                magnitude = self._magnitude(rows[block], buffers[0])
                limit = magnitude.sum(1, keepdim=True) * (self.options.threshold / rows.shape[1])
                scale, limit = self._grid(*self._kept(magnitude, limit, (1,), buffers[1]), limit)
            else:
                scale, limit = shared
            yield block, ternary(rows[block], limit, buffers), scale

    def _grid_of_tensor(self, rows: Tensor, blocks: list[slice], buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Scale and limit `[1, 1]` of a whole tensor, in two reads."""
        totals = torch.stack([self._magnitude(rows[block], buffers[0]).sum() for block in blocks])
        limit = (totals.sum() * (self.options.threshold / rows.numel())).reshape(1, 1)
        parts = [self._kept(self._magnitude(rows[b], buffers[0]), limit, (0, 1), buffers[1]) for b in blocks]
        kept, count = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return self._grid(kept, count, limit)

    def encode(self, value: Tensor) -> QTensor:
        """Codes of a weight `[channels, ...]`, with one scale `[1, ..]` or one per channel `[channels, 1, ..]`.

        Codes are 0 where nothing exceeds the threshold (weights all zero), or the export type rounds the scale to zero.
        """
        codes = torch.empty(as_rows(value)[0].shape, device=value.device)
        scales = []
        for block, part, scale in self._codes(value):
            codes[block] = part
            scales.append(scale)
        ones = (1,) * (value.ndim - 1)
        if self.options.granularity == "tensor":
            scale = scales[0].reshape(1, *ones)
        else:
            scale = torch.cat(scales).reshape(value.shape[0], *ones)
        return QTensor(codes.view(value.shape), scale, torch.zeros(1, device=value.device), self.options.bits)

    def surrogate(self, value: Tensor) -> Tensor:
        """The value; its gradient is 0 where it is clipped."""
        if self.options.clip is None:
            return value
        result: Tensor = _InsideOnly.apply(value, self.options.clip)
        return result

    def quantize(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Bitwise `encode(value).decode()`, with no temporaries of the weight's size on a CPU."""
        result = torch.empty_like(value, memory_format=torch.contiguous_format) if out is None else out
        target = result.view(as_rows(value)[0].shape)
        for block, codes, scale in self._codes(value):
            if target.dtype == torch.float32:
                torch.mul(codes, scale, out=target[block])
            else:
                target[block] = codes.mul_(scale)
        return result


def as_rows(value: Tensor) -> tuple[Tensor, int]:
    """The value as `[channels, elements]`, and the number of rows per block: all of them on an accelerator."""
    rows = value.reshape(value.shape[0], -1) if value.ndim > 1 else value.reshape(-1, 1)
    if value.device.type != "cpu":
        return rows, max(1, rows.shape[0])
    return rows, max(1, BLOCK // max(1, rows.shape[1]))


def ternary(rows: Tensor, limit: Tensor, buffers: list[Tensor]) -> Tensor:
    """Float32 codes: 1 above `limit`, -1 below `-limit`, else 0 (never -0).

    Args:
        rows: float tensor `[rows, elements]`.
        limit: float32, non-negative, broadcastable.
        buffers: two float32 tensors of at least as many rows, overwritten; the result lies in the first.
    """
    positive = torch.gt(rows, limit, out=buffers[0][: rows.shape[0]])
    return positive.sub_(torch.lt(rows, -limit, out=buffers[1][: rows.shape[0]]))
