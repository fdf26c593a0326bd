"""Arithmetic of quantized activations, in the order and type of operations in which they are computed after export."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qpipe.quant.quantizer import Quantizer
from qpipe.quant.tensor import QTensor, code_range

HEADS_FIRST = ("query", "key", "value")
"""Slots whose tensors are `[batch, heads, tokens, ...]`; all others have tokens at axis 1."""
MAPS = ("scores", "probs")
"""Slots with `[batch, heads, tokens, tokens]`."""


class ActivationRange(NamedTuple):
    """What a file format has to know of an activation quantizer.

    Attributes:
        bits: width of a code.
        dynamic: True if the range is taken from each batch.
        granularity: `token` (dynamic only) or `tensor`.
        symmetric: True if the zero point is 0.
        scale: of a range that is not dynamic, else None.
        zero_point: likewise.
    """

    bits: int
    dynamic: bool
    granularity: str
    symmetric: bool
    scale: float | None = None
    zero_point: float | None = None


class AffineActivation(Quantizer):
    """An activation with affine codes: `code = round(clamp(x / scale + zero_point))`, `(code - zero_point) * scale`.

    The order of operations is that of compressed-tensors 0.20 (`_quantize_dequantize`), all in the activation's dtype,
    so that the exported model computes the same numbers. Subclasses implement `parameters_of` and `describe`.

    Attributes:
        bits: width of a code.
        symmetric: True if the zero point is 0.
    """

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for this input, in its dtype; `[batch, tokens, 1]` per token, else `[1]`."""
        raise NotImplementedError(f"{type(self).__name__} must implement parameters_of")

    def describe(self) -> ActivationRange:
        """The quantizer as it is now. Called where its parameters are whole."""
        raise NotImplementedError(f"{type(self).__name__} must implement describe")

    def encode(self, value: Tensor) -> QTensor:
        """Codes of an activation with the scale and zero point of `parameters_of`."""
        scale, zero = self.parameters_of(value)
        codes = torch.div(value, scale).add_(zero).clamp_(*code_range(self.bits)).round_()
        return QTensor(codes, scale.float(), zero.float(), self.bits)

    def quantize(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Quantize and dequantize in the value's dtype."""
        scale, zero = self.parameters_of(value)
        codes = torch.div(value, scale)
        if not self.symmetric:
            codes.add_(zero)
        codes.clamp_(*code_range(self.bits)).round_()
        if not self.symmetric:
            codes.sub_(zero)
        return codes.mul_(scale)

    def counted(self, x: Tensor) -> Tensor:
        """The values that calibration counts, of any shape: those of padding tokens are left out."""
        return without_padding(x, self.context.kept, self.site.rpartition(":")[2])


def without_padding(x: Tensor, kept: Tensor | None, slot: str) -> Tensor:
    """The values of an activation that belong to real tokens.

    Args:
        x: the activation; of another layout than its slot promises, such as one vector per sequence, all of it counts.
        kept: mask of the batch, `[batch, tokens]`, true for real tokens; None if there is no padding.
        slot: of the site.
    """
    if kept is None:
        return x
    kept = kept.bool()
    if slot in MAPS and x.ndim == 4 and x.shape[0] == len(kept) and x.shape[2:] == (kept.shape[1],) * 2:
        return x.permute(0, 2, 3, 1)[kept[:, :, None] & kept[:, None, :]]
    by_token = x.transpose(1, 2) if slot in HEADS_FIRST and x.ndim == 4 else x
    return by_token[kept] if by_token.ndim >= 3 and by_token.shape[:2] == kept.shape else x
