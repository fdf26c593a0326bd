"""Activation quantization of exported sites on a plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qpipe.errors import FormatError, ModelError
from qpipe.host import Host, load_plugins
from qpipe.model.attention import SLOTS, AttentionSites, install
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.affine import ActivationRange, AffineActivation, FixedActivation
from qpipe.quant.modules import QuantEmbedding
from qpipe.quant.quantizer import QuantContext
from qpipe.quant.sums import EmbeddingSums

Record = Mapping[str, Any]
Placed = list[tuple[str, AffineActivation]]
Place = Callable[[nn.Module, Placed, QuantContext, Host], None]


def quantizer_of(site: Record) -> AffineActivation:
    """The quantizer of an exported site, given as `ActivationSite.record` has it.

    Raises:
        FormatError: a static range is incomplete, or its groups do not fit its order of features.
    """
    if site["dynamic"]:
        keys = ("bits", "dynamic", "granularity", "symmetric", "narrow", "clip")
        return UniformActivation(ActivationOptions(**{k: site[k] for k in keys if k in site}))
    return FixedActivation(ActivationRange(**{k: v for k, v in site.items() if k in ActivationRange._fields}))


def quantize_activations(model: nn.Module, sites: Iterable[Record], host: Host | None = None) -> None:
    """Quantize activations as recorded: the model then computes what the run computed, bit for bit.

    Args:
        model: a plain model, such as `load_native` gives. It gets hooks; sites inside attention also make it use
            qpipe's attention function, as the run did, and sums of embeddings change the class of these.
        sites: the `activations` of `quantization.json`, or some of them.
        host: plugins that know the model, which sums of embeddings need; None: qpipe itself knows it.

    Raises:
        FormatError: the model has no such module or no such place there, or a range is incomplete.
        ModelError: a site lies inside attention, and the model does not follow transformers' attention interface.
    """
    context, host = QuantContext(), load_plugins({}) if host is None else host
    placed: dict[str, Placed] = {}
    modules = dict(model.named_modules())
    for site in sites:
        quantizer = quantizer_of(site)
        quantizer.attach(context, f"{site['module']}:{site['slot']}")
        place = "attention" if site["slot"] in SLOTS else site["slot"]
        if place not in _PLACES:
            raise FormatError(f"{quantizer.site}: there is no such slot; it is one of {', '.join((*_PLACES, *SLOTS))}")
        if site["module"] not in modules:
            raise FormatError(f"{type(model).__name__} has no module {site['module']!r} to quantize activations of")
        placed.setdefault(place, []).append((site["module"], quantizer))
    for place, put in _PLACES.items():
        if place in placed:
            put(model, placed[place], context, host)


def _inputs(model: nn.Module, placed: Placed, context: QuantContext, host: Host) -> None:
    """The first positional argument is the input."""

    def change(quantizer: AffineActivation) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, args: (quantizer(args[0]), *args[1:])

    for path, quantizer in placed:
        model.get_submodule(path).register_forward_pre_hook(change(quantizer))


def _outputs(model: nn.Module, placed: Placed, context: QuantContext, host: Host) -> None:
    def change(quantizer: AffineActivation) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        return lambda _, args, output: (
            quantizer(output) if isinstance(output, Tensor) else (quantizer(output[0]), *output[1:])
        )

    for path, quantizer in placed:
        module = model.get_submodule(path)
        if isinstance(module, QuantEmbedding):  # a hook would come after what it does for sums
            module.host("output", quantizer)
        else:
            module.register_forward_hook(change(quantizer))


def _streams(model: nn.Module, placed: Placed, context: QuantContext, host: Host) -> None:
    """Changed in place: the residual connection holds the same tensor."""

    def change(quantizer: AffineActivation) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            args[0].copy_(quantizer(args[0].clone()))

        return hook

    for path, quantizer in placed:
        model.get_submodule(path).register_forward_pre_hook(change(quantizer))


def _inside_attention(model: nn.Module, placed: Placed, context: QuantContext, host: Host) -> None:
    sites: dict[str, AttentionSites] = install(model, tuple(dict.fromkeys(path for path, _ in placed)), context)
    for path, quantizer in placed:
        sites[path].host(quantizer.slot, quantizer)


def _sums(model: nn.Module, placed: Placed, context: QuantContext, host: Host) -> None:
    unmapped = ModelError(f"no plugin maps {type(model).__name__}")
    tables = host.first("qpipe_model_map", unmapped, model=model).embeddings
    unknown = [quantizer.site for path, quantizer in placed if path not in tables[1:-1]]
    if unknown:
        raise FormatError(
            f"{unknown[0]} is no sum of embeddings that is known: {type(model).__name__} adds {list(tables) or 'none'}"
        )
    for path in tables:
        QuantEmbedding.adopt(model.get_submodule(path), path, context)
    hosts: list[Any] = [model.get_submodule(path) for path in tables]
    sums = EmbeddingSums(model.get_submodule(tables[0].rpartition(".")[0]), hosts)
    for path, quantizer in placed:
        table = hosts[tables.index(path)]
        table.host("sum", quantizer)
        sums.use(table)


_PLACES: Mapping[str, Place] = {
    "sum": _sums,
    "stream": _streams,
    "input": _inputs,
    "output": _outputs,
    "attention": _inside_attention,
}
"""Functions by where an activation lies, in the order in which they have to come.

Hooks run in the order in which they are put: a normalisation's input is made of the stream as it was changed, and what
takes its place must not be changed for the residual connection.
"""
