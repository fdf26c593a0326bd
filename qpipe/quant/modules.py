"""The base of all modules that host quantizers; linear maps, convolutions and embeddings.

They keep the names and Parameter objects of the modules they stand in for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from qpipe.model.gradients import WithWeightLoss
from qpipe.model.taps import Tap, run_taps
from qpipe.quant.moments import WithMoments
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.types import Slot, WeightLoss

if TYPE_CHECKING:
    from qpipe.quant.sums import EmbeddingSums


@dataclass
class ModuleState:
    """What qpipe knows about one hosting module.

    Attributes:
        path: qualified name in the model.
        context: shared by all quantizers of the model.
        taps: functions by slot of an activation, in stage order.
        weight_losses: penalties on this module's weight.
        sums: at an embedding whose output others are added to, what keeps the sum; else None.
    """

    path: str
    context: QuantContext
    taps: dict[str, list[Tap]] = field(default_factory=lambda: defaultdict(list))
    weight_losses: tuple[WeightLoss, ...] = ()
    sums: EmbeddingSums | None = None


class QuantModule(nn.Module):
    """Mixin for modules that host quantizers at their `weight`, `input` and `output`, or some of them.

    A module becomes one by a change of class (`adopt`), which keeps identity, parameter names, ties and hooks. A class
    for another module derives from this one and from the module's own, and its `forward` passes the input to `before`,
    uses the weight in `apply_weight` only, and passes the output to `after`; whatever does not go that way is neither
    quantized nor observed, and the check before training stops the run.

    Attributes:
        slots: what such a module hosts.
        by_name: True if patterns must spell the module's name to select its sites (`Site.by_name`).
        autocasts: True if autocast computes the module in its lower precision.
    """

    slots: ClassVar[tuple[Slot, ...]] = ("weight", "input", "output")
    by_name: ClassVar[bool] = False
    autocasts: ClassVar[bool] = False
    qpipe: ModuleState
    weight: Tensor  # a Parameter; annotated as in torch's own modules, which subclasses also derive from

    @classmethod
    def adopt(cls, module: nn.Module, path: str, context: QuantContext) -> None:
        """Turn `module` into an instance of this class."""
        module.__class__ = cls
        module.qpipe = ModuleState(path, context)  # type: ignore[assignment]

    def host(self, slot: str, quantizer: Quantizer) -> None:
        """Put a quantizer at a slot."""
        self.add_module(f"{slot}_quantizer", quantizer)

    def hosted(self, slot: str) -> Quantizer | None:
        """The quantizer at a slot, if any."""
        return self._modules.get(f"{slot}_quantizer")  # type: ignore[return-value]

    def taps_at(self, slot: str) -> list[Tap]:
        """The taps at a slot of an activation, in stage order; the list itself."""
        return self.qpipe.taps[slot]

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        quantizer, weight = self._modules.get("weight_quantizer"), self.trained_weight()
        return weight if quantizer is None else quantizer(weight)

    def trained_weight(self) -> Tensor:
        """The weight itself, along the node that adds the gradient of penalties on its moments where some are due."""
        names = [term.name for term in self.due_weight_losses() if term.moments]
        if not names:
            return self.weight
        weight, sums = WithMoments.apply(self.weight, self.qpipe.context)
        self.qpipe.context.weight_losses.update({(name, self.qpipe.path): sums for name in names})
        return weight

    def due_weight_losses(self) -> list[WeightLoss]:
        """Penalties on this module's weight that act in this forward pass."""
        due = self.qpipe.context.due_weight_losses
        if not (self.qpipe.weight_losses and due and torch.is_grad_enabled()):
            return []
        return [term for term in self.qpipe.weight_losses if term.name in due]

    def at(self, slot: str, x: Tensor) -> Tensor:
        """Taps and quantizer at a slot."""
        x = run_taps(self.qpipe.taps[slot], x, self.qpipe.context)
        quantizer = self._modules.get(f"{slot}_quantizer")
        return x if quantizer is None else quantizer(x)

    def before(self, x: Tensor) -> Tensor:
        """Taps and quantizer at the input."""
        return self.at("input", x)

    def after(self, y: Tensor) -> Tensor:
        """Weight penalties, then taps and quantizer at the output."""
        context = self.qpipe.context
        for term in self.due_weight_losses():
            if not term.moments:
                y, value = WithWeightLoss.apply(y, self.weight, term.fn)
                context.weight_losses[term.name, self.qpipe.path] = value
        return self.at("output", y)

    def apply_weight(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Call `fn` with the quantized weight, so that backward does not keep it where weights are partitioned."""
        if not (self.qpipe.context.partitioned and torch.is_grad_enabled()):
            return fn(self.quantized_weight())
        quantizer = self.hosted("weight")
        again: dict[int, Callable[[], Tensor]] = {}
        if any(term.moments for term in self.due_weight_losses()):
            again[self.weight.data_ptr()] = lambda: self.weight.detach()
        with made_again(again):
            weight = self.quantized_weight()
        if quantizer is not None and next(quantizer.parameters(), None) is None and not quantizer.is_noisy():
            if self.autocasts and torch.is_autocast_enabled(weight.device.type):
                weight = weight.to(torch.get_autocast_dtype(weight.device.type))  # autocast's own copy would be kept
            dtype = weight.dtype
            again[weight.data_ptr()] = lambda: quantizer.quantize(self.weight.detach()).to(dtype)
        with made_again(again):
            return fn(weight)


@contextmanager
def made_again(again: Mapping[int, Callable[[], Tensor]]) -> Iterator[None]:
    """Within, autograd saves a note in place of some tensors and makes them again when backward needs them.

    Under ZeRO-3 the module's weight is gathered at that time, so what is made of it costs time but no memory.

    Args:
        again: makes a whole tensor, by the address of its data.
    """
    if not again:
        yield
        return
    # Autograd calls the innermost hooks only: what is not ours goes to those around, such as those of checkpointing.
    outer: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    keep, give = (_itself, _itself) if outer is None else outer

    def pack(saved: Tensor) -> Any:
        make = again.get(saved.data_ptr())
        return (None, keep(saved)) if make is None else (make, (saved.size(), saved.stride()))

    def unpack(packed: Any) -> Tensor:
        make, kept = packed
        if make is None:
            found: Tensor = give(kept)
            return found
        with torch.no_grad():
            return make().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _itself(value: Any) -> Any:
    return value


class QuantLinear(QuantModule, nn.Linear):
    """`nn.Linear` that hosts quantizers. Input `[..., in_features]`, output `[..., out_features]`."""

    autocasts: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        """Quantized affine map."""
        x = self.before(x)
        return self.after(self.apply_weight(lambda w: nn.functional.linear(x, w, self.bias)))


class QuantConv2d(QuantModule, nn.Conv2d):
    """`nn.Conv2d` that hosts quantizers. Input `[batch, in_channels, height, width]`."""

    autocasts: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        """Quantized convolution."""
        x = self.before(x)
        return self.after(self.apply_weight(lambda w: self._conv_forward(x, w, self.bias)))


class QuantEmbedding(QuantModule, nn.Embedding):
    """`nn.Embedding` that hosts quantizers at its `weight`, `output` and `sum`. Input: integer ids of any shape."""

    slots: ClassVar[tuple[Slot, ...]] = ("weight", "output")

    def forward(self, ids: Tensor) -> Tensor:
        """Look up quantized rows."""

        def look_up(weight: Tensor) -> Tensor:
            return nn.functional.embedding(
                ids, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )

        if not self._few(ids):
            return self.after(self.apply_weight(look_up))
        rows = look_up(self.trained_weight())
        quantizer: Any = self.hosted("weight")
        return self.after(quantizer.forward_rows(rows.reshape(-1, rows.shape[-1])).view_as(rows))

    def after(self, y: Tensor) -> Tensor:
        """What every module does at its output; then the sum of embeddings, where it is taken over."""
        y = super().after(y)
        return y if self.qpipe.sums is None else self.qpipe.sums.add(self, y)

    def _few(self, ids: Tensor) -> bool:
        """True if quantizing the rows that are looked up saves quantizing the table: in training steps, mostly."""
        quantizer = self.hosted("weight")
        return (
            quantizer is not None
            and quantizer.row_wise
            and next(quantizer.parameters(), None) is None
            and torch.is_grad_enabled()
            and not quantizer.is_current()
            and not quantizer.is_noisy()
            and self.max_norm is None
            and ids.numel() < self.num_embeddings
        )
