"""Taps: ordered functions from tensor to tensor at a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qpipe.quant.quantizer import QuantContext
from qpipe.types import TapStage


def always() -> bool:
    """The default condition of a tap."""
    return True


@dataclass(frozen=True)
class Tap:
    """A function at a site, with its place in the order and a condition asked on every call.

    A `capture` keeps a signal: there is one at every site that has one, and it acts only while its signal is wanted.
    """

    stage: TapStage
    fn: Callable[[Tensor], Tensor]
    active: Callable[[], bool] = always
    in_evaluation: bool = False
    capture: bool = False

    def acts(self, context: QuantContext) -> bool:
        """Whether it acts in the forward pass under way."""
        return (context.taps_active or (self.in_evaluation and context.evaluation_taps)) and self.active()

    def may_act(self) -> bool:
        """Whether it will act in some step, as far as it can be told: other taps than captures are there to act."""
        return not self.capture or self.active()


def run_taps(taps: Sequence[Tap], x: Tensor, context: QuantContext) -> Tensor:
    """Apply the active taps in order. Outside a training step none is active, but for those of evaluations."""
    if not taps or not (context.taps_active or context.evaluation_taps):
        return x
    for tap in taps:
        if tap.acts(context):
            x = tap.fn(x)
    return x


def add_sorted(taps: list[Tap], tap: Tap) -> None:
    """Insert in stage order, keeping the order of addition within a stage."""
    taps.append(tap)
    taps.sort(key=lambda t: t.stage)
