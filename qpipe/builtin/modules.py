"""Which module classes host quantizers."""

from __future__ import annotations

from torch import nn

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.hosts import ACTIVATIONS, QuantActivation, QuantNorm, host_class, is_norm
from qpipe.quant.modules import QuantConv2d, QuantEmbedding, QuantLinear, QuantModule

HOSTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.Embedding: QuantEmbedding,
}
"""Exact classes only: a subclass may compute something else in its forward pass."""


class QuantModules(Plugin):
    """Linear, Conv2d and Embedding, normalisations and activation functions."""

    @hookimpl
    def qpipe_quantize_module(self, module: nn.Module) -> type[nn.Module] | None:
        """The hosting class of `module`, None if it cannot host quantizers."""
        if isinstance(module, QuantModule):
            return None
        if is_norm(module):
            return host_class(QuantNorm, type(module))
        if type(module) in ACTIVATIONS:
            return host_class(QuantActivation, type(module))
        return HOSTS.get(type(module))
