"""Activation quantization of exported sites on a plain model, for checking logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qpipe.quant.activation import ActivationOptions, UniformActivation


def quantizer_of(site: Mapping[str, Any]) -> UniformActivation:
    """The quantizer of an exported site, given as the fields of `ActivationSite`."""
    keys = ("bits", "dynamic", "granularity", "symmetric")
    quantizer = UniformActivation(ActivationOptions(**{k: site[k] for k in keys}))
    if not site["dynamic"]:
        quantizer.scale.fill_(site["scale"])
        quantizer.zero_point.fill_(site["zero_point"] or 0.0)
    return quantizer


def quantize_activations(model: nn.Module, sites: Iterable[Mapping[str, Any]]) -> None:
    """Quantize inputs and outputs of modules as recorded. The first positional argument is the input."""

    def inputs(quantizer: UniformActivation) -> Any:
        return lambda module, args: (quantizer(args[0]), *args[1:])

    def outputs(quantizer: UniformActivation) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return quantizer(output) if isinstance(output, Tensor) else (quantizer(output[0]), *output[1:])

        return hook

    for site in sites:
        module = model.get_submodule(site["module"])
        if site["slot"] == "input":
            module.register_forward_pre_hook(inputs(quantizer_of(site)))
        else:
            module.register_forward_hook(outputs(quantizer_of(site)))
