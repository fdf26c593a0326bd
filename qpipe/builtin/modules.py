"""Which module classes host quantizers."""

from __future__ import annotations

from torch import nn

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.modules import QuantConv2d, QuantEmbedding, QuantLinear

HOSTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.Embedding: QuantEmbedding,
}
"""Exact classes only: a subclass may compute something else in its forward pass."""


class QuantModules(Plugin):
    """Linear, Conv2d and Embedding."""

    @hookimpl
    def qpipe_quantize_module(self, module: nn.Module) -> type[nn.Module] | None:
        """The hosting class of `module`, None if it cannot host quantizers."""
        return HOSTS.get(type(module))
