"""Weight splitting: a weight on the levels -s, 0 and s becomes two weights of one bit that add up to it."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe.quant.tensor import QTensor, grouped

SCALE_ERROR = 2**-7
"""Largest relative error of a scale against the mean magnitude that is put down to rounding it to bfloat16."""


def split_to_binary(master: Tensor, lattice: QTensor) -> tuple[Tensor, Tensor]:
    """Two weights that add up to `master`, and whose 1-bit forms `sign(w) * mean|w|` add up to `lattice`.

    Means are taken over what shares a scale in `lattice`. Both halves get the mean `scale / 2`. Where the code is not 0
    they have the sign of the weight, in the ratio `m : 1 - m`; where it is 0 they have opposite signs: one half carries
    the weight, away from 0 by `shift`, and the other is `shift` on the other side. A layer of weight `master` and bias
    `b` so becomes two layers, each with a half of the weight and `b / 2`, whose outputs are added.

    Bai et al., "BinaryBERT: Pushing the Limit of BERT Quantization" (ACL 2021), section 3.2. There the first half
    carries the positive weights of code 0, and the second the others. If these are so unlike that no `m` between 0 and
    1 makes the means equal, which the paper leaves open, the halves take turns instead, in the order of magnitude; then
    the means can always be made equal. The public code reads the scale off the largest quantized value, which is 0 for
    a row without positive ones; its halves of such a row do not add up.

    Args:
        master: float tensor of any shape `[channels, ...]`: the full-precision weight. Computed in float64.
        lattice: codes -1, 0 and 1 of that weight with zero point 0, as its quantizer encodes it.

    Returns:
        Both halves, of the shape and dtype of `master`; sums hold up to the rounding of that dtype.

    Raises:
        ValueError: these are no such codes of this weight, or their scale is so small that no two 1-bit weights add up
            to them.
    """
    _require_three_levels(master, lattice)
    weight, codes = (_rows(t, lattice).double() for t in (master, lattice.codes))
    if bool((codes * weight < 0).any()):
        raise ValueError("a code has another sign than its weight: give the codes of this very weight")
    one, two = _halves(weight, codes == 0, lattice.scale.reshape(-1, 1).double())
    return one.view(master.shape).to(master.dtype), two.view(master.shape).to(master.dtype)


def _require_three_levels(master: Tensor, lattice: QTensor) -> None:
    if master.shape != lattice.codes.shape:
        raise ValueError(f"the weight has shape {tuple(master.shape)} and the codes {tuple(lattice.codes.shape)}")
    if bool((lattice.codes.abs() > 1).any()) or bool((lattice.zero_point != 0).any()):
        raise ValueError("only codes -1, 0 and 1 with zero point 0 can be split; quantize the weight to these first")
    if not bool(torch.isfinite(master).all()):
        raise ValueError("the weight holds NaN or infinity")


def _rows(value: Tensor, lattice: QTensor) -> Tensor:
    """`[n, width]`, a row for each scale."""
    return grouped(value, lattice.group_size).reshape(lattice.scale.numel(), -1)


def _halves(weight: Tensor, zero: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of rows `[n, width]` with scales `[n, 1]`; float64.

    With sums over a row, `inner` of the magnitudes whose code is 0 and `outer` of the others, the means are equal to
    `scale / 2` if `inner + outer + 2 count shift = width scale` and `m outer + surplus = (1 - m) outer`.
    """
    magnitude = weight.abs()
    inner, outer = (torch.where(part, magnitude, 0).sum(1, keepdim=True) for part in (zero, ~zero))
    count = zero.sum(1, keepdim=True)
    missing = scale * weight.shape[1] - inner - outer
    shift = torch.where(count > 0, missing / (2 * count.clamp_min(1)), 0)
    first = _first_carries(weight, zero, outer)
    surplus = torch.where(zero, torch.where(first, magnitude, -magnitude), 0).sum(1, keepdim=True)
    ratio = torch.where(outer > 0, (outer - surplus) / (2 * outer), 0.5)
    empty = inner + outer == 0
    exact = torch.where(count > 0, shift > 0, missing.abs() <= SCALE_ERROR * outer)
    wrong = ~(empty | (exact & (outer > 0) & (ratio > 0) & (ratio < 1)))
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of {len(wrong)} scales, such as {float(scale[wrong][0]):g}, are not above the mean "
            "magnitude of their weights, or have no codes but 0: such a weight is no sum of two 1-bit weights"
        )
    side = torch.where(weight > 0, shift, -shift)
    carrier, other = weight + side, -side
    one = torch.where(zero, torch.where(first, carrier, other), ratio * weight)
    two = torch.where(zero, torch.where(first, other, carrier), (1 - ratio) * weight)
    return torch.where(empty, weight, one), torch.where(empty, weight, two)


def _first_carries(weight: Tensor, zero: Tensor, outer: Tensor) -> Tensor:
    """True where the first half carries a weight whose code is 0."""
    published = weight > 0
    unlike = torch.where(zero, weight, 0).sum(1, keepdim=True).abs() >= outer
    if not bool(unlike.any()):
        return published
    order = torch.where(zero, weight.abs(), torch.inf).argsort(1).argsort(1)
    return torch.where(unlike, order % 2 == 0, published)
