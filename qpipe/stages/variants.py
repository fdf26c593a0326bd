"""Variants: a trained model with other bits or step sizes than it was trained for, for as long as a context lasts.

Nothing here knows a method: every quantizer rounds its scales through `Quantizer.snap`, and is built again from its
kind and options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from qpipe.errors import ConfigError, SiteError, suggest
from qpipe.quant.grid import GridQuantizer
from qpipe.quant.plan import PlannedSite, expand, selects
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.settable import SettableGrid
from qpipe.run import Run
from qpipe.stages.prepare import tied_sites
from qpipe.stages.trained import has_learned
from qpipe.types import Json
from qpipe.validation import describe


def weight_sites(run: Run, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the quantized weights that patterns select.

    Args:
        run: a run with its quantizers in place.
        patterns: as in rules, with or without the slot. None: every quantized weight except those of embeddings, unless
            only embeddings are quantized.

    Raises:
        ConfigError: the run quantizes no weight.
        SiteError: a pattern matches no quantized weight.
    """
    names = planned_weights(run)
    if not patterns:
        maps = [n for n in names if not isinstance(run.student.get_submodule(n.rpartition(":")[0]), nn.Embedding)]
        return maps or names
    found: list[str] = []
    for pattern in patterns:
        full = pattern if ":" in pattern else f"{pattern}:weight"
        expanded = expand(full, run.instruments.map)
        matching = [n for n in names if any(selects(p, run.plan.sites[n].site) for p in expanded)]
        if not matching:
            raise SiteError(
                f"{pattern!r} matches no quantized weight{suggest(full, names)}; `qpipe inspect plan` lists them"
            )
        found += [name for name in matching if name not in found]
    return found


def planned_weights(run: Run) -> list[str]:
    """Names of all quantized weights.

    Raises:
        ConfigError: there is none.
    """
    names = [name for name, entry in run.plan.sites.items() if entry.site.slot == "weight"]
    if not names:
        raise ConfigError(f"the plan of {run.out} quantizes no weight; give it rules or a quantization.preset")
    return names


def activation_sites(run: Run) -> list[str]:
    """Names of the quantized activations.

    Raises:
        ConfigError: there is none.
    """
    names = [name for name, entry in run.plan.sites.items() if entry.site.slot != "weight"]
    if not names:
        raise ConfigError(f"{run.out} quantizes no activation, so only its weights can be varied")
    return names


def options_with_bits(entry: PlannedSite, bits: int) -> BaseModel | None:
    """The options of a planned site with another width; None if its quantizer has no option `bits`.

    Raises:
        SiteError: the quantizer does not allow that width.
    """
    model = type(entry.options)
    if "bits" not in model.model_fields:
        return None
    try:
        return model(**{**entry.options.model_dump(), "bits": bits})
    except ValidationError as error:
        raise SiteError(f"{entry.site.name}, quantizer {entry.quantizer!r}: {describe(error, model)}") from error


def rule_with_bits(entry: PlannedSite, bits: int) -> dict[str, Json]:
    """A rule of a plan that gives a planned site another width and keeps all its other options.

    Raises:
        SiteError: its quantizer has no option `bits`, or does not allow that width.
    """
    options = options_with_bits(entry, bits)
    if options is None:
        raise SiteError(f"{entry.site.name}: quantizer {entry.quantizer!r} has no option `bits`; leave it out")
    fields = type(options).model_fields
    # A null that is not the default says something, such as a scale for each feature.
    values = {
        k: v for k, v in options.model_dump(mode="json").items() if v is not None or fields[k].default is not None
    }
    return {"site": entry.site.name, "quantizer": entry.quantizer, "options": values}


def with_bits(run: Run, names: Iterable[str], bits: int) -> list[str]:
    """Those of the sites that can be quantized to `bits`: the others' quantizers have no option for it.

    Raises:
        SiteError: a quantizer does not allow that width.
    """
    return [name for name in names if options_with_bits(run.plan.sites[name], bits) is not None]


def require_master_copies(run: Run, names: Iterable[str]) -> None:
    """Refuse weights that a run keeps as rounded only, so that other levels would be found for the levels it had.

    Args:
        run: a run with its quantizers in place.
        names: sites.

    Raises:
        ConfigError: learned rounding has put a weight on its grid, and no training has moved it since.
    """
    ptq, quantizers = run.config.quantization.ptq, run.instruments.quantizers()
    if ptq is None or ptq.weights != "adaround":
        return
    for name in names:
        quantizer = quantizers[name]
        if not isinstance(quantizer, SettableGrid):
            continue
        weight = run.student.get_parameter(f"{run.plan.sites[name].site.path}.weight").detach()
        if torch.equal(quantizer.quantize(weight), weight):
            raise ConfigError(
                f"{name} was rounded by quantization.ptq.weights: adaround, and {run.out} has no full-precision copy "
                f"of it to quantize otherwise; use the model that was quantized ({run.config.model.name}), or a run "
                "without adaround"
            )


def place(run: Run, name: str, quantizer: Quantizer) -> None:
    """Put a quantizer, attached already, at a planned site and at those that share its Parameter."""
    site = run.plan.sites[name].site
    for place in (site, *(tied_sites(run, site) if site.slot == "weight" else ())):
        run.instruments.module(place).host(site.slot, quantizer)


@contextmanager
def rebuilt(run: Run, names: Iterable[str], bits: int) -> Iterator[None]:
    """Within, sites are quantized to `bits`, weights from their full-precision master copy.

    What training has learned of their grids is kept, divided anew. Before any training a width has the grid that
    training would begin with.

    Args:
        run: a run on one process, not partitioned.
        names: sites whose quantizers have an option `bits`; see `with_bits`.
        bits: width of a code.

    Raises:
        ConfigError: there is no master copy of a weight; see `require_master_copies`.
        SiteError: a quantizer has no such option, or does not allow that width.
    """
    names = list(names)
    require_master_copies(run, names)
    kinds = run.host.collect("qpipe_quantizers")
    trained = {name: run.instruments.quantizers()[name] for name in names}
    learned = has_learned(run.out, run.trained)
    try:
        for name, before in trained.items():
            entry = run.plan.sites[name]
            options = options_with_bits(entry, bits)
            if options is None:
                raise SiteError(f"{name}: quantizer {entry.quantizer!r} has no option `bits`; leave it out")
            quantizer = kinds[entry.quantizer].build(options).to(run.engine.device)
            quantizer.attach(run.instruments.context, name)
            place(run, name, quantizer)
            is_weight = entry.site.slot == "weight"
            weight = run.student.get_parameter(f"{entry.site.path}.weight").detach() if is_weight else None
            first = options != entry.options and not learned and not quantizer.reparameterizes
            with torch.no_grad():
                if weight is not None and first:
                    quantizer.initialize(weight)
                else:
                    quantizer.inherit(before, weight)
        run.instruments.context.weights_changed()
        yield
    finally:
        for name, before in trained.items():
            place(run, name, before)
        run.instruments.context.weights_changed()


@contextmanager
def rescaled(
    run: Run, names: Iterable[str], change: Callable[[Tensor], Tensor], open_ended: bool = False
) -> Iterator[None]:
    """Within, sites quantize with changed scales; a forward pass has to run there. Compiled code is not used.

    Args:
        run: a run on one process.
        names: sites.
        change: takes scales in float32 and returns others; see `qpipe.quant.step_error`.
        open_ended: count the changed steps from the lowest level, without end; see there.

    Raises:
        SiteError: a quantizer did not pass its scales through `Quantizer.snap`, so that nothing was varied; or it does
            not round to the nearest level, which `open_ended` needs.
    """
    shared = run.instruments.context
    quantizers = {name: run.instruments.quantizers()[name] for name in names}
    if open_ended:
        require_rounding(quantizers)
    reached: set[str] = set()
    shared.weights_changed()
    for name, quantizer in quantizers.items():
        noted = _noted(change, name, reached)
        quantizer.context = replace(shared, rescale=noted, open_ended=open_ended, compiled=False)
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.context = shared
        shared.weights_changed()
    missed = sorted(quantizers.keys() - reached)
    if missed:
        raise SiteError(
            f"{missed[0]} and {len(missed) - 1} more kept their scales: {type(quantizers[missed[0]]).__name__} does "
            "not pass them through Quantizer.snap, so its step size cannot be varied; choose other sites"
        )


def require_rounding(quantizers: Mapping[str, Quantizer]) -> None:
    """Refuse sites, by name, that open-ended grids are not made for.

    Raises:
        SiteError: an activation, or a quantizer that finds its codes otherwise than by rounding.
    """
    for name, quantizer in quantizers.items():
        if not isinstance(quantizer, GridQuantizer) or not quantizer.kernel().rounds:
            raise SiteError(
                f"{name}: {type(quantizer).__name__} does not round weights to the nearest level of a grid, so steps "
                "cannot be counted from the lowest one; choose other sites, or leave out --open-ended or --activations"
            )


def _noted(change: Callable[[Tensor], Tensor], name: str, reached: set[str]) -> Callable[[Tensor], Tensor]:
    def changed(scale: Tensor) -> Tensor:
        reached.add(name)
        return change(scale)

    return changed


@contextmanager
def switched_off(run: Run, names: Iterable[str]) -> Iterator[None]:
    """Within, sites are in full precision.

    Weights of a finished run are what it was trained to compute, without rounding (`Quantizer.full_precision`); those
    of a model that was only loaded are as they were loaded.
    """
    shared = run.instruments.context
    quantizers = {name: run.instruments.quantizers()[name] for name in names}
    for name, quantizer in quantizers.items():
        unrounded = run.trained and name.endswith(":weight")
        quantizer.context = replace(shared, rounding=False) if unrounded else replace(shared, enabled=False)
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.context = shared
