"""Activations with a learned clip: PACT.

Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from qpipe.errors import TrainingError
from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.compiled import over_rows
from qpipe.quant.learned import GridActivation, GridActivationOptions, total
from qpipe.quant.observed import Observed
from qpipe.quant.quantizer import Quantizer
from qpipe.types import ACTIVATION_SLOTS, QuantizerKind


class PactOptions(GridActivationOptions):
    """Options of `pact`."""

    clip: float | None = Field(None, gt=0, description="first clip; null: the largest value in calibration")
    weight_decay: float | None = Field(
        None, ge=0, description="decay of the clip by the optimizer; null: that of the weights, `train.weight_decay`"
    )
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate of the clip")


class PactActivation(GridActivation):
    """`round(clamp(x, 0, alpha) * n / alpha) * alpha / n` with `n = 2**bits - 1` and a learned clip alpha.

    Takes the place of ReLU: what is negative becomes 0. The gradient passes to `x` where `0 < x < alpha`, and alpha
    gets that of the elements with `x >= alpha` (equations 1 and 3). The paper's L2 penalty on alpha (section 3), which
    keeps steps small, is the weight decay of its parameter group: with AdamW it is decoupled from the gradient, and
    shrinks alpha by `lr * weight_decay` of itself in every step.
    """

    def __init__(self, options: PactOptions) -> None:
        super().__init__(options.bits, signed=False)
        self.options = options
        self.lr_scale, self.weight_decay = options.lr_scale, options.weight_decay
        self.clip = self.new_parameter()

    def step(self) -> Tensor:
        """The clip over the number of steps."""
        return self.clip.detach().float() / self.levels[1]

    def set_range(self, seen: Observed) -> None:
        """The first clip.

        Raises:
            TrainingError: no value is positive.
        """
        if seen.high <= 0:
            raise TrainingError(
                f"{self.site} saw no positive value in calibration, and everything else becomes 0 here; use a "
                "quantizer with negative levels, or quantizer: none"
            )
        self.clip.fill_(seen.high if self.options.clip is None else self.options.clip)

    def inherit(self, trained: Quantizer, value: Tensor | None) -> None:
        """Keep the clip."""
        assert isinstance(trained, PactActivation)
        self.clip.copy_(trained.clip)

    def gradient(
        self, rows: Tensor, grad: Tensor, out: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """As the class says."""
        return total(over_rows(self.context, clip_gradient, out, (rows, grad, scale * self.levels[1])).unbind(1))


def clip_gradient(out: Tensor, rows: Tensor, grad: Tensor, clip: Tensor) -> Tensor:
    """Gradient of rows into `out`; returns that of the clip of each row, `[rows, 1]`, float32.

    Args:
        out: `[rows, width]`, overwritten.
        rows: the activation, `[rows, width]`.
        grad: gradient of the quantized activation.
        clip: float32, `[1, 1]`.
    """
    value, upstream = rows.float(), grad.float()
    above = upstream * (value >= clip)
    out.copy_((upstream - above).mul_(value > 0))
    return above.sum(1, keepdim=True)


class LearnedClips(Plugin):
    """Offers `pact`."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`pact`."""
        yield QuantizerKind(
            "pact",
            PactActivation,
            PactOptions,
            ACTIVATION_SLOTS,
            "non-negative activations up to a learned clip, 2 to 16 bits",
        )
