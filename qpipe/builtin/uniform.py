"""Uniform min-max quantizers for weights and activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pydantic import Field
from torch import Tensor

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.grid import Grid, GridKernel, GridOptions, GridQuantizer
from qpipe.quant.rounding import min_max_grid
from qpipe.quant.tensor import code_range
from qpipe.types import ACTIVATION_SLOTS, QuantizerKind


class UniformOptions(GridOptions):
    """Options of `uniform`."""

    bits: int = Field(8, ge=2, le=8)
    symmetric: bool = True


@dataclass(frozen=True)
class MinMax(GridKernel):
    """The smallest grid over the values (asymmetric: over the values and 0)."""

    symmetric: bool = True

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """Scale and zero point over `axes`; another step has the zero point of this one."""
        found = Grid(*min_max_grid(rows, axes, self.low, self.high, self.symmetric, self.snap))
        if self.rescale is None or self.symmetric:
            return found
        return found._replace(zero_point=replace(self, rescale=None).grid(rows, axes).zero_point)


class UniformWeight(GridQuantizer):
    """Affine min-max quantization of a weight.

    Symmetric: `scale = max|w| / (2**(bits-1) - 1)`, zero point 0. Asymmetric: `scale = (max - min) / (2**bits - 1)`
    over a range that includes 0, integer zero point. The range covers every weight, so the gradient passes unchanged.

    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section 2.
    """

    def __init__(self, options: UniformOptions) -> None:
        super().__init__(options, options.bits)

    def kernel(self) -> MinMax:
        """`MinMax` at the options' width."""
        low, high = code_range(self.bits)
        return MinMax(low, high, self.context.scale_dtype, self.context.rescale, self.options.symmetric)


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
            "activations of 2 to 16 bits, range per token, per tensor, or calibrated",
        )
