"""Activation quantization of exported sites on a plain model, for checking logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qpipe.errors import FormatError
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.affine import ActivationRange, AffineActivation, FixedActivation


def quantizer_of(site: Mapping[str, Any]) -> AffineActivation:
    """The quantizer of an exported site, given as the fields of `ActivationSite`.

    Raises:
        FormatError: a static range is incomplete, or its groups do not fit its order of features.
    """
    if site["dynamic"]:
        keys = ("bits", "dynamic", "granularity", "symmetric")
        return UniformActivation(ActivationOptions(**{k: site[k] for k in keys}))
    return FixedActivation(ActivationRange(**{k: v for k, v in site.items() if k in ActivationRange._fields}))


def quantize_activations(model: nn.Module, sites: Iterable[Mapping[str, Any]]) -> None:
    """Quantize inputs and outputs of modules as recorded. The first positional argument is the input.

    Args:
        model: a plain model, such as `load_native` gives; it gets hooks.
        sites: the `activations` of `quantization.json`, or some of them; only `input` and `output`.

    Raises:
        FormatError: a site lies inside attention or a sum, which only a run can reach, or its range is incomplete.
    """

    def inputs(quantizer: AffineActivation) -> Any:
        return lambda module, args: (quantizer(args[0]), *args[1:])

    def outputs(quantizer: AffineActivation) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return quantizer(output) if isinstance(output, Tensor) else (quantizer(output[0]), *output[1:])

        return hook

    for site in sites:
        if site["slot"] not in ("input", "output"):
            raise FormatError(
                f"{site['module']}:{site['slot']} lies inside attention or a sum; evaluate the run itself instead "
                "(qpipe evaluate)"
            )
        module = model.get_submodule(site["module"])
        if site["slot"] == "input":
            module.register_forward_pre_hook(inputs(quantizer_of(site)))
        else:
            module.register_forward_hook(outputs(quantizer_of(site)))
