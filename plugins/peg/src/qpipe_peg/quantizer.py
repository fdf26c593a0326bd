"""Activations with a scale and a zero point for each group of features.

Bondarenko, Nagel and Blankevoort, "Understanding and Overcoming the Challenges of Efficient Transformer Quantization"
(EMNLP 2021), section 4 and figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qpipe import (
    ActivationRange,
    GridActivation,
    GridActivationOptions,
    Observed,
    Quantizer,
    SiteError,
    TrainingError,
    by_feature,
)
from qpipe_peg.observed import ObservedFeatures, RunningRange, Statistic

SMALLEST_TOP = 1e-8
"""The largest value of a group counts as at least this, so that a group of zeros has a range."""


class PegOptions(GridActivationOptions):
    """Options of `peg`."""

    groups: int | None = Field(
        6, ge=1, description="groups of features, K; it has to divide their number. null: each feature by itself"
    )
    permute: bool = Field(True, description="order features by their range first, so that outliers share a group")
    shared: bool = Field(
        True,
        description="one order for what the feed-forward network of a block receives (x), returns (h), and its sum "
        "with the residual (y): that of h, else of y; false: each has its own",
    )
    statistics: Statistic = Field(
        "max",
        description="range that features are ordered by: of all calibration batches (max), a moving average (ema), or "
        "of the last one (last), as in public code; `quantization.calibration_batch_size` is what a batch has",
    )
    range: Statistic = Field("max", description="range that a group's levels cover; the same choices")
    momentum: float = Field(0.9, ge=0, lt=1, description="part that `ema` keeps of its value with each batch")
    learned: bool = Field(False, description="train scales and zero points; false: they stay as calibrated")
    lr_scale: float = Field(
        1.0,
        gt=0,
        description="factor on their learning rate; Adam moves a scale by about the learning rate in each step, so "
        "lower it where that is much beside the scales",
    )

    @property
    def granularity(self) -> str:
        """What shares a scale."""
        return "tensor" if self.groups == 1 else "group"


class PegActivation(GridActivation):
    """`(clamp(round(x / s_g) + z_g) - z_g) * s_g` with scale s_g and integer zero point z_g of the feature's group g.

    Features, the last axis, are put into order by their range `max - min` (ascending), and cut into K groups of equal
    size: the last one holds the outliers. Values themselves stay where they are. The levels of a group run from
    `min(low, 0)` to `max(high, 1e-8)` of its features.

    Learned ranges have the paper's plain gradients, with `v = x / s`, which pass the rounding of z unchanged:

        dq/ds = round(v) - v inside, bound - z outside;  dq/dz = 0 inside, -s outside,

    summed over a group. There is no gradient scale. The gradient to x is 1 inside and 0 outside. Inside is what rounds
    to a code, up to half a step beyond the outermost levels.

    Attributes:
        steps: s of each group, float32 `[groups]`: a parameter if learned, else a buffer.
        zeros: where 0 is, in steps above the lowest level, before it is rounded; likewise.
        order: all features, ordered, int64 `[features]`; empty until the width is known.
        seen: what calibration has counted.
        shared_with: the quantizer whose statistics give the order; none: its own do.
    """

    has_offset = True
    steps: Tensor
    zeros: Tensor
    order: Tensor

    def __init__(self, options: PegOptions) -> None:
        super().__init__(options.bits, signed=True, symmetric=False)
        self.options = options
        self.lr_scale = options.lr_scale
        self.seen: ObservedFeatures | None = None
        self.shared_with: tuple[PegActivation, ...] = ()  # in a tuple, which does not make it a submodule
        self._make_room(options.groups or 0, 0)

    def _make_room(self, groups: int, features: int) -> None:
        for name in ("steps", "zeros"):
            parameter = self.new_parameter(groups)
            if self.options.learned:
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, parameter.detach())
        self.register_buffer("order", torch.arange(features))

    def set_width(self, features: int) -> None:
        """Say how many features there are; a quantizer that knows already keeps its state.

        Raises:
            SiteError: the groups do not divide them.
        """
        if len(self.order) == features:
            return
        groups = self.options.groups or features
        if features % groups:
            allowed = ", ".join(str(k) for k in range(1, features + 1) if features % k == 0)
            raise SiteError(
                f"{self.site}: {groups} groups do not divide its {features} features; set groups to one of {allowed}, "
                "or to null for a scale for each feature"
            )
        self._make_room(groups, features)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the width of what is loaded, if it is not known yet."""
        order = state_dict.get(f"{prefix}order")
        if order is not None and not len(self.order):
            self._make_room(len(state_dict[f"{prefix}steps"]), len(order))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def observer(self) -> ObservedFeatures:
        """Counts what each feature is."""
        options = self.options
        self.seen = ObservedFeatures(
            ordering=RunningRange(options.statistics, options.momentum),
            gridding=RunningRange(options.range, options.momentum),
        )
        return self.seen

    def set_range(self, seen: Observed) -> None:
        """Order of the features, then range of each group."""
        assert isinstance(seen, ObservedFeatures) and seen.gridding is not None
        low, high = seen.gridding.ends()
        self.set_width(len(low))
        if self.options.permute:
            self.order.copy_(self._ordered_by(seen))
        low, high = (ends[self.order].view(len(self.steps), -1) for ends in (low, high))
        bottom, top = low.amin(1).clamp_max(0), high.amax(1).clamp_min(SMALLEST_TOP)
        step = (top - bottom) / (self.high - self.low)
        self.steps.copy_(step)
        self.zeros.copy_(-bottom / step)

    def _ordered_by(self, seen: ObservedFeatures) -> Tensor:
        for other in self.shared_with:
            assert other.seen is not None
            other.seen.require_range(other.site)
            seen = other.seen
        assert seen.ordering is not None
        low, high = seen.ordering.ends()
        return (high - low).argsort(stable=True)

    def step(self) -> Tensor:
        """Of each feature."""
        return by_feature(self.steps.detach().float(), self.order)

    def zero_point(self, scale: Tensor) -> Tensor:
        """Of each feature, rounded, among the codes."""
        zeros = by_feature(self.zeros.detach().float(), self.order)
        return (zeros.round() + self.low).clamp(self.low, self.high)

    def describe(self) -> ActivationRange:
        """A static range by group; of the tensor where there is one group.

        Raises:
            TrainingError: it was never calibrated, or training has diverged.
        """
        grid = torch.stack(self.grid())
        if not len(self.order) or not bool(grid.isfinite().all()):
            raise TrainingError(f"{self.site} has no finite range; was it calibrated, and did training converge?")
        one_of_each = self.order.view(len(self.steps), -1)[:, 0]
        scale, zero = grid[:, one_of_each].tolist()
        if len(scale) == 1:
            return ActivationRange(self.bits, False, "tensor", False, scale[0], zero[0])
        return ActivationRange(self.bits, False, "group", False, scale, zero, self.order.tolist())

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep order and ranges, and divide them anew; calibrated again, share the same quantizer's order."""
        assert isinstance(trained, PegActivation)
        self.shared_with = trained.shared_with
        self._make_room(len(trained.steps), len(trained.order))
        self.to(trained.order.device)
        ratio = (trained.high - trained.low) / (self.high - self.low)
        with torch.no_grad():
            self.order.copy_(trained.order)
            self.steps.copy_(trained.steps * ratio)
            self.zeros.copy_(trained.zeros / ratio)

    def gradient(
        self, rows: Tensor, grad: Tensor, out: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """As the class says."""
        v = (rows.float() / scale).add_(zero)
        code = v.round()
        inside = (code >= self.low) & (code <= self.high)
        torch.mul(grad, inside, out=out)
        if not self.options.learned:
            return ()
        code.clamp_(self.low, self.high).sub_(torch.where(inside, v, zero))
        slope = code.mul_(grad).sum(0)
        outside = grad.float().mul(inside.logical_not_()).sum(0)
        return self._by_group(slope), self._by_group(-outside * scale[0])

    def _by_group(self, values: Tensor) -> Tensor:
        groups = self.options.groups or len(values)
        return values[self.order].view(groups, -1).sum(1)
