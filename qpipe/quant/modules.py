"""Modules that host quantizers. They keep the names and Parameter objects of the modules they stand in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qpipe.model.gradients import WithWeightLoss
from qpipe.model.taps import Tap, run_taps
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.types import Slot, WeightLoss


@dataclass
class ModuleState:
    """What qpipe knows about one hosting module.

    Attributes:
        path: qualified name in the model.
        context: shared by all quantizers of the model.
        taps: functions at `input` and `output`, in stage order.
        weight_losses: penalties on this module's weight.
    """

    path: str
    context: QuantContext
    taps: dict[str, list[Tap]] = field(default_factory=lambda: {"input": [], "output": []})
    weight_losses: tuple[WeightLoss, ...] = ()


class QuantModule(nn.Module):
    """Mixin for modules with a `weight` that host quantizers at their `weight`, `input` and `output`.

    A module becomes one by a change of class (`adopt`), which keeps identity, parameter names, ties and hooks.
    """

    slots: ClassVar[tuple[Slot, ...]] = ("weight", "input", "output")
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
        """The taps at `input` or `output`, in stage order; the list itself."""
        return self.qpipe.taps[slot]

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        quantizer = self._modules.get("weight_quantizer")
        return self.weight if quantizer is None else quantizer(self.weight)

    def before(self, x: Tensor) -> Tensor:
        """Taps and quantizer at the input."""
        x = run_taps(self.qpipe.taps["input"], x, self.qpipe.context)
        quantizer = self._modules.get("input_quantizer")
        return x if quantizer is None else quantizer(x)

    def after(self, y: Tensor) -> Tensor:
        """Weight penalties, then taps and quantizer at the output."""
        context = self.qpipe.context
        if self.qpipe.weight_losses and context.due_weight_losses and torch.is_grad_enabled():
            for term in (term for term in self.qpipe.weight_losses if term.name in context.due_weight_losses):
                y, value = WithWeightLoss.apply(y, self.weight, term.fn)
                context.weight_losses[term.name, self.qpipe.path] = value
        y = run_taps(self.qpipe.taps["output"], y, context)
        quantizer = self._modules.get("output_quantizer")
        return y if quantizer is None else quantizer(y)

    def apply_weight(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Call `fn` with the quantized weight, so that backward does not keep it where weights are partitioned."""
        weight = self.quantized_weight()
        quantizer = self.hosted("weight")
        recompute = (
            self.qpipe.context.partitioned
            and quantizer is not None
            and torch.is_grad_enabled()
            and next(quantizer.parameters(), None) is None
            and not quantizer.is_noisy()
        )
        if not recompute:
            return fn(weight)
        with quantized_again(weight, lambda: quantizer.quantize(self.weight.detach())):  # type: ignore[union-attr]
            return fn(weight)


@contextmanager
def quantized_again(quantized: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Within, autograd saves a note in place of `quantized` and calls `again` when backward needs it.

    Under ZeRO-3 the module's weight is gathered at that time, so its quantized form costs time but no memory.
    """
    storage = quantized.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            return again().as_strided(*saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class QuantLinear(QuantModule, nn.Linear):
    """`nn.Linear` that hosts quantizers. Input `[..., in_features]`, output `[..., out_features]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantized affine map."""
        x = self.before(x)
        return self.after(self.apply_weight(lambda w: nn.functional.linear(x, w, self.bias)))


class QuantConv2d(QuantModule, nn.Conv2d):
    """`nn.Conv2d` that hosts quantizers. Input `[batch, in_channels, height, width]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantized convolution."""
        x = self.before(x)
        return self.after(self.apply_weight(lambda w: self._conv_forward(x, w, self.bias)))


class QuantEmbedding(QuantModule, nn.Embedding):
    """`nn.Embedding` that hosts quantizers at its `weight` and `output`. Input: integer ids of any shape."""

    slots: ClassVar[tuple[Slot, ...]] = ("weight", "output")

    def forward(self, ids: Tensor) -> Tensor:
        """Look up quantized rows."""

        def look_up(weight: Tensor) -> Tensor:
            return nn.functional.embedding(
                ids, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )

        if not self._few(ids):
            return self.after(self.apply_weight(look_up))
        rows = look_up(self.weight)
        quantizer: Any = self.hosted("weight")
        return self.after(quantizer.forward_rows(rows.reshape(-1, rows.shape[-1])).view_as(rows))

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
