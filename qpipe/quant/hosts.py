"""Hosts of other modules than linear maps: normalisations, activation functions, and whole blocks.

Their classes are made from the module's own class, whose forward pass they call: there are many kinds of each, and new
ones need no code here.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2CLS

from qpipe.model.taps import Tap
from qpipe.quant.modules import QuantModule
from qpipe.quant.quantizer import Quantizer
from qpipe.types import Slot

ACTIVATIONS = frozenset(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()) | {nn.GELU}
"""Classes of the activation functions that transformers' configurations can name."""


class QuantNorm(QuantModule):
    """A normalisation over the last axis that hosts quantizers, also at the residual `stream` that enters it."""

    by_name: ClassVar[bool] = True
    _watches_stream = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the quantized weight. Any shape `[..., features]`."""
        x = self.before(x)
        return self.after(self.apply_weight(lambda weight: self._normalized(x, weight)))

    def _normalized(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is self.weight:
            return super().forward(x)
        # The class's own forward reads `self.weight`: an entry of the instance comes before its parameters.
        self.__dict__["weight"] = weight
        try:
            return super().forward(x)
        finally:
            del self.__dict__["weight"]

    def host(self, slot: str, quantizer: Quantizer) -> None:
        """Put a quantizer at a slot."""
        super().host(slot, quantizer)
        self._watch(slot)

    def taps_at(self, slot: str) -> list[Tap]:
        """The taps at a slot of an activation, in stage order; the list itself."""
        self._watch(slot)
        return super().taps_at(slot)

    def _watch(self, slot: str) -> None:
        if slot == "stream" and not self._watches_stream:
            # In a hook, since engines that wrap the model later hand `forward` another tensor object.
            self.register_forward_pre_hook(_change_stream)
            self._watches_stream = True


def _change_stream(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Change the stream in place: the block's residual connection holds the same tensor, and nothing else does."""
    stream = args[0]
    given = stream.clone()  # what a quantizer keeps for backward must not change
    changed = module.at("stream", given)  # type: ignore[operator]
    if changed is not given:
        stream.copy_(changed)


class QuantActivation(QuantModule):
    """An activation function that hosts quantizers at its output."""

    slots: ClassVar[tuple[Slot, ...]] = ("output",)
    by_name: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The function's value, quantized. Any shape."""
        return self.after(super().forward(*args, **kwargs))


class QuantPart(QuantModule):
    """A larger part of a model, such as a block, that hosts quantizers at its output."""

    slots: ClassVar[tuple[Slot, ...]] = ("output",)
    by_name: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the part returns, its first tensor quantized."""
        output = super().forward(*args, **kwargs)
        return self.after(output) if isinstance(output, Tensor) else (self.after(output[0]), *output[1:])


def host_class(host: type[QuantModule], own: type[nn.Module]) -> type[QuantModule]:
    """The subclass of `host` and of a module's own class; the same class for the same arguments."""
    if (host, own) not in _MADE:
        doc = f"`{own.__name__}` that hosts quantizers."
        _MADE[host, own] = type(f"Quant{own.__name__}", (host, own), {"__doc__": doc})
    return _MADE[host, own]


_MADE: dict[tuple[type[QuantModule], type[nn.Module]], type[QuantModule]] = {}


def is_norm(module: nn.Module) -> bool:
    """True for LayerNorm, and for RMSNorm of torch or of a model family, if it takes one tensor."""
    cls = type(module)
    if cls in (nn.LayerNorm, nn.RMSNorm):
        return True
    weight = module._parameters.get("weight")
    named = cls.__name__.endswith("RMSNorm") and weight is not None and weight.ndim == 1
    return named and len(inspect.signature(cls.forward).parameters) == 2  # with self
