"""`Quantizer`: the module at a site. Its forward is `encode(value).decode()` with a straight-through gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qpipe.errors import SiteError
from qpipe.quant.estimators import ESTIMATORS
from qpipe.quant.rounding import snap_scale
from qpipe.quant.sharing import Shared
from qpipe.quant.tensor import QTensor
from qpipe.types import RangeEstimatorKind


class Visit(NamedTuple):
    """What a quantizer met while `QuantContext.visited` was there.

    Attributes:
        changed: True if it changed a value.
        elements: in all values together.
    """

    changed: bool = False
    elements: int = 0


@dataclass
class QuantContext:
    """What the quantizers of one model share.

    Attributes:
        enabled: False makes every quantizer the identity (`Quantizer.master`).
        rounding: False makes of weights what their quantizers compute without rounding (`Quantizer.full_precision`).
        version: counts changes of the weights; quantized weights are reused while it stands still.
        partitioned: True where weights exist only while their module runs (ZeRO-3, FSDP2); then nothing full-size is
            kept.
        scale_dtype: scales are rounded to this type, so that the exported file holds them exactly.
        rescale: a change of every scale before it is rounded, for experiments with wrong step sizes; or None.
        open_ended: True in such an experiment where changed steps are counted from the lowest level, without end.
        noise: part of a weight's elements, drawn anew in every forward pass of training, that is quantized.
        seed: of those draws.
        micro_batch: number of the micro-batch under way, counted from the start of training.
        compiled: True where quantizers may use compiled code; the result is the same bit for bit.
        taps_active: True within a training step; observing and replacing taps do nothing otherwise.
        evaluation_taps: True within an evaluation in which the taps act that were added for it.
        weight_losses: values of weight penalties met in this forward pass, by `(penalty, module path)`; of penalties on
            moments, what these are formed from.
        due_weight_losses: names of the weight penalties that act in this micro-batch.
        estimators: range estimators on offer, by name.
        calibration_batch: number of the calibration batch under way.
        kept: tokens that calibration counts, `[batch, tokens]`, true where there is no padding; None counts all.
        visited: by name of the sites whose quantizer has run, what it met; None while nobody asks.
        shared: the last quantized activation, for quantizers that would make the same.
    """

    enabled: bool = True
    rounding: bool = True
    version: int = 0
    partitioned: bool = False
    scale_dtype: torch.dtype = torch.float32
    rescale: Callable[[Tensor], Tensor] | None = None
    open_ended: bool = False
    noise: float = 1.0
    seed: int = 0
    micro_batch: int = 0
    compiled: bool = False
    taps_active: bool = False
    evaluation_taps: bool = False
    weight_losses: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    due_weight_losses: frozenset[str] = frozenset()
    estimators: Mapping[str, RangeEstimatorKind] = field(default_factory=lambda: ESTIMATORS)
    calibration_batch: int = 0
    kept: Tensor | None = None
    visited: dict[str, Visit] | None = None
    shared: Shared = field(default_factory=Shared)

    def weights_changed(self) -> None:
        """Forget the quantized weights: call after every change of a parameter."""
        self.version += 1
        self.shared.forget()


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first: exact, where `x + (q - x).detach()` is not."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, quantized: Tensor) -> Tensor:
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(surrogate: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in the forward pass; in the backward pass the gradient goes to `surrogate` unchanged.

    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013), section 4.

    Args:
        surrogate: any float tensor.
        quantized: tensor of the same shape and dtype.
    """
    return _StraightThrough.apply(surrogate, quantized)


class Quantizer(nn.Module):
    """Base of all quantizers; one instance serves one site.

    Subclasses implement `encode`, and override `surrogate` where the gradient is not simply passed on. Call the
    instance, never its methods, in forward passes: ZeRO-3 gathers a quantizer's own parameters around the call.
    """

    row_wise = False
    """True if each row (axis 0) of a weight is quantized from that row alone, so that a part of the rows can be."""

    lr_scale = 1.0
    """Factor on the learning rate of the quantizer's own parameters."""

    weight_decay: float | None = 0.0
    """Weight decay of the quantizer's own parameters; None: that of the weights, `train.weight_decay`."""

    def __init__(self) -> None:
        super().__init__()
        self.context = QuantContext()
        self.site = ""
        self.caches = False
        self._cached: Tensor | None = None
        self._cached_version = -1

    def attach(self, context: QuantContext, site: str) -> None:
        """Called once by the host: join the model's shared context, at a site `path:slot`."""
        self.context = context
        self.site = site
        self.caches = site.endswith(":weight")

    def initialize(self, value: Tensor) -> Tensor | None:
        """Set the quantizer's state from a full-precision value before training; make parameters and buffers.

        Returns:
            A value to store in place of the weight (for reparameterisations), or None to keep it.
        """
        return None

    def allocate(self, value: Tensor) -> None:
        """Make the parameters and buffers that `initialize` would make, for the state of a finished run.

        It is loaded next, so that their values do not matter. By default `initialize` is called; override it where that
        takes time, such as for a search.

        Args:
            value: the full-precision weight at the site.
        """
        self.initialize(value)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Take over from a trained quantizer of the same kind that has other options, such as another width.

        Called once, after `attach`. By default the state is set afresh, as before training; override it where training
        has learned something that still holds.

        Args:
            trained: the quantizer that served this site until now.
            value: the full-precision weight at the site; None for an activation.

        Raises:
            SiteError: `initialize` would replace the weight, which is in its trained form already.
        """
        if value is not None and self.initialize(value) is not None:
            raise SiteError(
                f"{self.site}: {type(self).__name__} keeps its weight in a form of its own, so it cannot be set up "
                "from a trained weight by default; its author must override Quantizer.inherit"
            )

    def encode(self, value: Tensor) -> QTensor:
        """Put a value on the lattice. Called without gradients.

        Args:
            value: float tensor of any dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement encode")

    def surrogate(self, value: Tensor) -> Tensor:
        """The differentiable stand-in whose gradient training uses; by default the value itself."""
        return value

    def master(self, value: Tensor) -> Tensor:
        """The full-precision tensor that a stored value stands for; differentiable. The value itself by default.

        Override it together with an `initialize` that returns a replacement.
        """
        return value

    def full_precision(self, value: Tensor) -> Tensor:
        """What the model computes with where this weight is not rounded; differentiable. `master(value)` by default.

        It is used for the elements that QuantNoise leaves alone, and for the full precision of a trained model.
        Override it where the levels are not near the weight itself, such as levels over a function of it: a network
        that was trained with them knows that function.

        Args:
            value: the stored weight. Returns a tensor of the same shape and dtype.
        """
        return self.master(value)

    @property
    def reparameterizes(self) -> bool:
        """True if the stored tensor is another one than the weight."""
        return type(self).master is not Quantizer.master

    def snap(self, scale: Tensor) -> Tensor:
        """Round scales to the type they are exported in, and replace zeros (of all-zero rows) by 1.

        Args:
            scale: float tensor, non-negative. Returns float32 of the same shape.
        """
        return snap_scale(self.rescaled(scale), self.context.scale_dtype)

    def rescaled(self, scale: Tensor) -> Tensor:
        """The scale after the context's `rescale`, which asks what another step size would do; usually as it is.

        Quantizers whose scales do not pass through `snap` call this themselves.

        Args:
            scale: float tensor. Returns a tensor of the same shape and dtype; `rescale` itself is given float32.
        """
        rescale = self.context.rescale
        return scale if rescale is None else rescale(scale.float()).to(scale.dtype)

    def quantize(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """`encode(value).decode()` in the value's dtype. Override only with something bitwise equal and faster."""
        result = self.encode(value).decode(value.dtype)
        return result if out is None else out.copy_(result)

    def forward(self, value: Tensor) -> Tensor:
        """Quantize; reuse the last result while the weights have not changed.

        Args:
            value: the weight or activation at the site. Returns a tensor of the same shape and dtype.
        """
        return self._applied(value, self._current)

    def forward_rows(self, rows: Tensor) -> Tensor:
        """`forward` for some rows of the weight; only where `row_wise`, and the quantizer has no parameters.

        Args:
            rows: `[n, ...]`, any rows in any order. Returns a tensor of the same shape and dtype.
        """
        return self._applied(rows, self.quantize)

    def is_current(self) -> bool:
        """True if the whole quantized weight is at hand."""
        return self._cached is not None and self._cached_version == self.context.version

    def _applied(self, value: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.context.enabled:
            return self.master(value)
        if not self.context.rounding:
            return self.full_precision(value)
        with torch.no_grad():
            quantized = quantize(value.detach())
        if self.context.visited is not None:
            before = self.context.visited.get(self.site, Visit())
            changed = before.changed or not torch.equal(quantized, self.master(value))
            self.context.visited[self.site] = Visit(changed, before.elements + value.numel())
        if not torch.is_grad_enabled():
            return quantized
        result = straight_through(self.surrogate(value), quantized)
        return torch.where(self._drawn(value), result, self.full_precision(value)) if self.is_noisy() else result

    def is_noisy(self) -> bool:
        """True if only a part of the weight's elements is quantized now: in training steps, by `quantization.noise`.

        Stock et al., "Training with Quantization Noise for Extreme Model Compression" (ICLR 2021), section 4.
        """
        return self.caches and self.training and self.context.noise < 1 and torch.is_grad_enabled()

    def _drawn(self, value: Tensor) -> Tensor:
        """Which elements are quantized in this forward pass.

        The same on every process, when recomputed, and when resumed: one process and many train the same.
        """
        text = f"{self.context.seed}/{self.context.micro_batch}/{self.site}"
        generator = torch.Generator(value.device).manual_seed(zlib.crc32(text.encode()))
        return torch.rand(value.shape, generator=generator, device=value.device) < self.context.noise

    def _current(self, value: Tensor) -> Tensor:
        if not self.caches or self.context.partitioned:
            self._cached = None  # of passes before the weights were partitioned
            return self.quantize(value)
        stale = self._cached is None or self._cached.shape != value.shape or self._cached.dtype != value.dtype
        if stale or self._cached.device != value.device:  # type: ignore[union-attr]
            self._cached, self._cached_version = self.quantize(value), self.context.version
        elif self._cached_version != self.context.version:
            self.quantize(value, out=self._cached)
            self._cached_version = self.context.version
        return self._cached  # type: ignore[return-value]
