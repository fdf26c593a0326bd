"""`QTensor`: a tensor on its lattice. Training, evaluation, export and reload all decode the same record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qpipe.errors import SiteError

Granularity = Literal["tensor", "channel", "group"]


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of a width: `(-2**(bits-1), 2**(bits-1) - 1)`."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class QTensor:
    """Signed integer codes with the scale and zero point that turn them into values.

    `value = (codes - zero_point) * scale`. The zero point is a float: integers for affine grids, half-integers for
    mid-rise grids. One subtraction that is exact in float32 and one rounded product make the value the same in every
    reader, whatever its order of operations (see docs/decisions/001).

    Attributes:
        codes: integral values in `code_range(bits)`, of any dtype; shape of the value.
        scale: float32, positive; `[1, ..]` per tensor, `[channels, 1, ..]` per channel (axis 0), or
            `[channels, groups, 1]` per group of the flattened remaining axes.
        zero_point: float32, shape of `scale`, or a single element.
        bits: width of a code, 1 to 16.
        group_size: elements per group, None unless per group.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int | None = None

    @property
    def granularity(self) -> Granularity:
        """How many elements share a scale."""
        if self.group_size is not None:
            return "group"
        return "tensor" if self.scale.numel() == 1 else "channel"

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in `dtype` and of the shape of `codes`. The product is formed in float32 and rounded once."""
        codes = grouped(self.codes, self.group_size).float()
        value = (codes - self.zero_point) * self.scale
        return value.to(dtype).view(self.codes.shape)

    def integers(self) -> Tensor:
        """The codes as int8 (int16 beyond 8 bits).

        Raises:
            ValueError: a code is not integral or lies outside its range.
        """
        low, high = code_range(self.bits)
        if not bool(torch.all((self.codes >= low) & (self.codes <= high) & (self.codes == self.codes.round()))):
            raise ValueError(f"codes must be integers in [{low}, {high}] for {self.bits} bits")
        return self.codes.to(torch.int8 if self.bits <= 8 else torch.int16)

    def bits_per_weight(self, scale_bits: int = 32) -> float:
        """Storage per element: codes, scales and (where they vary) zero points, without padding."""
        overhead = self.scale.numel() + (self.zero_point.numel() if self.zero_point.numel() > 1 else 0)
        return self.bits + scale_bits * overhead / max(1, self.codes.numel())


def grouped(value: Tensor, group_size: int | None) -> Tensor:
    """View `[channels, ...]` as `[channels, groups, group_size]`; without a group size the value itself.

    Raises:
        SiteError: the group size does not divide the elements of a channel.
    """
    if group_size is None:
        return value
    per_channel = math.prod(value.shape[1:])
    if per_channel % group_size:
        raise SiteError(
            f"group size {group_size} does not divide the {per_channel} elements of a channel of a weight "
            f"{tuple(value.shape)}; choose a divisor, or another granularity for that site"
        )
    return value.reshape(value.shape[0], per_channel // group_size, group_size)
