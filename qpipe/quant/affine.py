"""Arithmetic of quantized activations, in the order and type of operations in which they are computed after export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qpipe.errors import FormatError
from qpipe.quant.compiled import turn_off
from qpipe.quant.fused import fused_quantize
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.tensor import QTensor, code_range
from qpipe.types import HEADS_FIRST_SLOTS, MAP_SLOTS


class ActivationRange(NamedTuple):
    """What a file format has to know of an activation quantizer.

    Attributes:
        bits: width of a code.
        dynamic: True if the range is taken from each batch.
        granularity: `token` (dynamic only), `tensor`, or `group` (not dynamic) of features, the last axis.
        symmetric: True if the zero point is 0.
        scale: of a range that is not dynamic, else None; of each group, where there are groups.
        zero_point: likewise.
        order: with groups, all features: as many neighbours in it as there are features to a group form a group.
        narrow: True if the outermost levels of a dynamic range are its ends; see `ActivationOptions`.
        clip: values beyond it are cut before a dynamic range is taken; None: none are.
    """

    bits: int
    dynamic: bool
    granularity: str
    symmetric: bool
    scale: float | Sequence[float] | None = None
    zero_point: float | Sequence[float] | None = None
    order: Sequence[int] | None = None
    narrow: bool = False
    clip: float | None = None


class AffineActivation(Quantizer):
    """An activation with affine codes: `code = round(clamp(x / scale + zero_point))`, `(code - zero_point) * scale`.

    The order of operations is that of compressed-tensors 0.20 (`_quantize_dequantize`), all in the activation's dtype,
    so that the exported model computes the same numbers. Codes of more than 8 bits, which only formats with arithmetic
    of their own hold, are formed in float32: bfloat16 cannot tell them apart. Subclasses implement `parameters_of` and
    `describe`.

    Attributes:
        bits: width of a code.
        symmetric: True if the zero point is 0.
    """

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self._proved: set[torch.dtype] = set()

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code; all of `bits` unless a subclass says otherwise."""
        return code_range(self.bits)

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for this input, in its dtype.

        Per token of the input's shape with 1 in place of every axis but batch and tokens; `[features]` in groups of
        features; else `[1]`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement parameters_of")

    def describe(self) -> ActivationRange:
        """The quantizer as it is now. Called where its parameters are whole."""
        raise NotImplementedError(f"{type(self).__name__} must implement describe")

    def encode(self, value: Tensor) -> QTensor:
        """Codes of an activation with the scale and zero point of `parameters_of`."""
        value = self.working(value)
        scale, zero = self.parameters_of(value)
        codes = torch.div(value, scale).add_(zero).clamp_(*self.codes).round_()
        return QTensor(codes, scale.float(), zero.float(), self.bits)

    def quantize(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Quantize and dequantize in the value's dtype."""
        return self.quantize_within(value)[0]

    def quantize_within(self, value: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """`quantize`, and 1 where an element is between `ends`, else 0, uint8; None without them.

        Args:
            value: the activation.
            ends: of a range, one element each.
        """
        working = self.working(value)
        scale, zero = self.parameters_of(working)
        ends = None if ends is None else (ends[0].to(working.dtype), ends[1].to(working.dtype))
        found = fused_quantize(self.context, working, scale, zero, self.codes, ends)
        if found is None or not self._agrees(found[0], working, scale, zero):
            inside = None if ends is None else ((working >= ends[0]) & (working <= ends[1])).to(torch.uint8)
            return self._eager(working, scale, zero).to(value.dtype), inside
        return found[0].to(value.dtype), found[1]

    def _agrees(self, found: Tensor, working: Tensor, scale: Tensor, zero: Tensor) -> bool:
        """True if compiled code computes what eager code does, which is tried once for every dtype."""
        if working.dtype not in self._proved:
            # NaN is not equal to itself; both sides hold it in the same places.
            if not torch.equal(found.nan_to_num(), self._eager(working, scale, zero).nan_to_num()):
                turn_off(self.context, f"compiled code differs from eager mode at {self.site}")
                return False
            self._proved.add(working.dtype)
        return True

    def _eager(self, working: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = torch.div(working, scale)
        if not self.symmetric:
            codes.add_(zero)
        codes.clamp_(*self.codes).round_()
        if not self.symmetric:
            codes.sub_(zero)
        return codes.mul_(scale)

    def working(self, value: Tensor) -> Tensor:
        """The value in the type in which its codes are formed."""
        return value.float() if self.bits > 8 else value

    def exported(self, scale: Tensor) -> Tensor:
        """A positive scale as files hold it: float32 where codes have more digits than the export's type."""
        return self.rescaled(scale.float()) if self.bits > 8 else self.snap(scale)

    @property
    def slot(self) -> str:
        """Of the site."""
        return self.site.rpartition(":")[2]

    def counted(self, x: Tensor) -> Tensor:
        """The values that calibration counts, of any shape: those of padding tokens are left out."""
        return without_padding(x, self.context.kept, self.slot)


class FixedActivation(AffineActivation):
    """An activation on a range that is given, such as one read from a file.

    Args:
        given: not dynamic; without a zero point it is 0.

    Raises:
        FormatError: the scale is missing, or groups do not fit the order of features.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, given: ActivationRange) -> None:
        super().__init__(given.bits, given.symmetric)
        if given.dynamic or given.scale is None:
            raise FormatError(f"a range that is not dynamic needs a scale, got {given}")
        self.given = given
        zero = [0.0] * np.size(given.scale) if given.zero_point is None else given.zero_point
        for name, value in (("scale", given.scale), ("zero_point", zero)):
            values = torch.tensor(value, dtype=torch.float32).reshape(-1)
            self.register_buffer(name, values if given.order is None else by_feature(values, _checked(given, values)))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As given, in the dtype of the input."""
        return self.scale.to(x.dtype), self.zero_point.to(x.dtype)

    def describe(self) -> ActivationRange:
        """As given."""
        return self.given


def _checked(given: ActivationRange, values: Tensor) -> Tensor:
    order = torch.tensor(given.order)
    if not len(values) or len(order) % len(values) or order.sort().values.tolist() != list(range(len(order))):
        raise FormatError(
            f"{len(values)} groups do not fit an order of {len(order)} features; it has to name each feature once, and "
            "the groups have to divide them"
        )
    return order


def by_feature(values: Tensor, order: Tensor) -> Tensor:
    """What each feature gets of values that are given by group.

    Args:
        values: `[groups]`.
        order: every feature's number once, `[features]`; neighbours form groups, all of one size.
    """
    result = values.new_empty(len(order))
    result[order] = values.repeat_interleave(len(order) // len(values))
    return result


def axes_of_token(slot: str, axes: int) -> tuple[int, ...]:
    """The axes over which the values of one token of one sequence lie: heads, features, and keys of a map.

    Args:
        slot: of the site.
        axes: number of axes of the activation, 3 or more.
    """
    token = 2 if slot in HEADS_FIRST_SLOTS and axes == 4 else 1
    return tuple(axis for axis in range(1, axes) if axis != token)


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
    if slot in MAP_SLOTS and x.ndim == 4:
        fits = x.shape[0] == len(kept) and x.shape[2:] == (kept.shape[1],) * 2
        return x.permute(0, 2, 3, 1)[kept[:, :, None] & kept[:, None, :]] if fits else x
    if x.ndim == 2 and len(x) == kept.numel():  # as in OPT, of all tokens one after another
        return x[kept.flatten()]
    by_token = x.transpose(1, 2) if slot in HEADS_FIRST_SLOTS and x.ndim == 4 else x
    return by_token[kept] if by_token.ndim >= 3 and by_token.shape[:2] == kept.shape else x
