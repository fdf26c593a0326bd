"""One-bit weights, and loss-aware quantization to few levels.

Rastegari et al., "XNOR-Net" (ECCV 2016), section 3.1; Wu et al., "Extreme Compression for Pre-trained Transformers Made
Simple and Efficient" (NeurIPS 2022); Hou and Kwok, "Loss-aware Weight Quantization of Deep Networks" (ICLR 2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.grid import Grid, GridKernel, GridOptions, GridQuantizer, mean_magnitude
from qpipe.quant.rounding import visible_nan
from qpipe.quant.tensor import code_range
from qpipe.types import QuantizerKind

ALTERNATIONS = 11
LARGEST_EXACT = 7


class BinaryOptions(GridOptions):
    """Options of `binary`."""

    keep_zeros: bool = Field(
        False, description="weights that are exactly 0 stay 0, as in public code; takes 2 bits instead of 1"
    )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 2 if self.keep_zeros else 1


@dataclass(frozen=True)
class Sign(GridKernel):
    """`sign(w) * mean|w|`: codes -1 and 0 around the zero point -1/2; or -1, 0 and 1."""

    keep_zeros: bool = False

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """The mean magnitude over `axes`."""
        mean = mean_magnitude(rows, axes)
        if self.keep_zeros:
            return Grid(visible_nan(mean, self.snap(mean)))
        return Grid(visible_nan(mean, self.snap_above_zero(2 * mean)), -0.5)

    def codes(self, rows: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """The sign; of 0 it is plus, unless zeros are kept."""
        if self.keep_zeros:
            codes = rows.float().sign()
        else:
            codes = (rows >= 0).float() - 1
        return codes if out is None else out.copy_(codes)


class BinaryWeight(GridQuantizer):
    """`sign(w) * mean|w|` (XNOR-Net, equation 6; the 1-bit weights of XTC). The gradient passes unchanged.

    The sign of 0 is plus, so that a code takes one bit.
    """

    def __init__(self, options: BinaryOptions) -> None:
        super().__init__(options, options.bits)

    def kernel(self) -> Sign:
        """`Sign`."""
        low, high = code_range(self.bits)
        return Sign(low, high, self.context.scale_dtype, self.context.rescale, self.options.keep_zeros)


class LaqOptions(GridOptions):
    """Options of `laq`."""

    bits: int = Field(2, ge=2, le=8)
    divisor: Literal["squares", "magnitudes"] = Field(
        "squares",
        description="the scale is sum|q w| over sum q^2 (least squares), or over sum|q| as in public code; the same at "
        "2 bits, while magnitudes clips much from 3 bits on",
    )


@dataclass(frozen=True)
class Alternating(GridKernel):
    """The symmetric grid that alternates between the scale for given levels and the levels for a given scale."""

    squares: bool = True

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """Start with the signs as levels."""
        magnitude = rows.abs().float()
        codes = (magnitude > 0).float() * self.high
        for _ in range(ALTERNATIONS):
            # A product with the reciprocal, which is one number per row, takes less time than a quotient.
            codes = (magnitude * self.scale(magnitude, codes, axes).reciprocal()).round().clamp_max(self.high)
        return Grid(self.snap(self.scale(magnitude, codes, axes)))

    def scale(self, magnitude: Tensor, codes: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The scale for codes in [0, high]; 1 where all are 0.

        Sums are exact or in float64, so that their order does not show.
        """
        top = (codes * magnitude).sum(axes, keepdim=True, dtype=torch.float64)
        divisor = codes * codes if self.squares else codes * self.high
        # Sums of small integers are exact in float32 over 2**24 / 49 elements and more.
        wide = self.high > LARGEST_EXACT or len(axes) > 1
        bottom = divisor.sum(axes, keepdim=True, dtype=torch.float64 if wide else torch.float32)
        return torch.where(bottom == 0, 1.0, top / bottom).float()


class LaqWeight(GridQuantizer):
    """Levels `alpha * k / n`, `k = -n .. n`, `n = 2**(bits-1) - 1`, with alpha from alternating minimisation.

    Hou and Kwok's loss-aware quantization (section 3.2) with a constant curvature, in which form it is used for
    language models (Bai et al., "BinaryBERT", ACL 2021): each half-step lowers `sum (w - alpha q)^2`. The gradient
    passes unchanged. For one bit it is `binary`.
    """

    def __init__(self, options: LaqOptions) -> None:
        super().__init__(options, options.bits)

    def kernel(self) -> Alternating:
        """`Alternating` at the options' width."""
        high = code_range(self.bits)[1]
        squares = self.options.divisor == "squares"
        return Alternating(-high, high, self.context.scale_dtype, self.context.rescale, squares)


class FewLevels(Plugin):
    """Offers `binary` and `laq`."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`binary` and `laq`."""
        slots = frozenset({"weight"})
        yield QuantizerKind("binary", BinaryWeight, BinaryOptions, slots, "weights -scale and +scale, 1 bit")
        yield QuantizerKind("laq", LaqWeight, LaqOptions, slots, "least-squares scale, 2 to 8 bits")
