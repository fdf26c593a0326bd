"""Prepare: the plan is made, quantizers and weight penalties are put in place, the engine takes over."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpipe.config import PtqConfig
from qpipe.errors import ConfigError, FormatError, ModelError, SiteError, suggest
from qpipe.export import record as export_record
from qpipe.export.companions import auto_class
from qpipe.export.record import zero_point_kind
from qpipe.model.instrument import OUTPUTS
from qpipe.quant.affine import AffineActivation
from qpipe.quant.compiled import use_compiled
from qpipe.quant.estimators import find_estimator
from qpipe.quant.modules import QuantModule
from qpipe.quant.plan import Plan, PlannedSite, make_plan
from qpipe.quant.presets import FIXED_GRID, preset_rules, with_fixed_grid
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.tensor import QTensor
from qpipe.run import Run
from qpipe.stages.build import instrument
from qpipe.stages.casting import cast, own_buffers
from qpipe.stages.gather import STORED, own_state
from qpipe.stages.param_groups import parameter_groups
from qpipe.stages.phases import make_phases
from qpipe.stages.recomputing import recompute
from qpipe.stages.teaching import hold_teacher, wanted_signals
from qpipe.types import Exporter, ModelMap, Rule, Site

logger = logging.getLogger("qpipe.stages")

SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan(run: Run) -> None:
    """Make the plan from preset, plugin and user rules, and check that the export format can hold it.

    Raises:
        SiteError: a rule is wrong, or names a range estimator that nobody offers.
        ConfigError: a range was chosen for `uniform` weights, and there are none.
        FormatError: the configured export format cannot hold what is planned.
    """
    quantization = run.config.quantization
    sites = tuple(run.instruments.sites.values())
    rules: list[tuple[str, Rule]] = [("preset", rule) for rule in preset_rules(quantization.preset, _mapped(run))]
    rules += run.host.collect_list("qpipe_quant_rules", run=run, sites=sites)
    rules += [("configuration", Rule(r.site, r.quantizer, r.options)) for r in quantization.rules]
    if quantization.ptq is not None:
        fixed = quantization.ptq.model_dump(include={"range", "percentile", "p"})
        rules = [(source, with_fixed_grid(rule, fixed)) for source, rule in rules]
    kinds = run.host.collect("qpipe_quantizers")
    run.plan = without_repeats(run.student, make_plan(sites, rules, kinds, run.instruments.map))
    _require_range_used(run)
    for lost in run.plan.lost if run.engine.rank == 0 else ():
        logger.warning(lost)
    _warn_of_left_out(run)
    run.instruments.context.estimators = run.host.collect("qpipe_range_estimators")
    for name, entry in run.plan.sites.items():
        wanted: tuple[str, dict[str, object]] | None = getattr(entry.options, "estimator", None)
        if wanted is not None:
            with at_site(name, entry.source):
                find_estimator(wanted[0], wanted[1], run.instruments.context.estimators)


def _mapped(run: Run) -> ModelMap:
    """The model's map, without an input embedding that cannot host quantizers; says so where presets would name it."""
    found = run.instruments.map
    if found.embedding is None or f"{found.embedding}:weight" in run.instruments.sites:
        return found
    changed = replace(found, embedding=None)
    preset = run.config.quantization.preset
    if run.engine.rank == 0 and preset_rules(preset, found) != preset_rules(preset, changed):
        kind = type(run.student.get_submodule(found.embedding)).__name__
        logger.warning("%s is a %s, which cannot be quantized; preset %s leaves it out", found.embedding, kind, preset)
    return changed


def _warn_of_left_out(run: Run) -> None:
    """Say which weights of quantized blocks no rule can name: those that lie in no module that qpipe can quantize."""
    planned = [entry.site.path for entry in run.plan.sites.values() if entry.site.slot == "weight"]
    blocks = [block for block in run.instruments.map.blocks if any(path.startswith(f"{block}.") for path in planned)]
    known = {f"{site.path}.weight" for site in run.instruments.sites.values() if site.slot == "weight"}
    inside = {
        f"{block}.{name}": parameter.numel()
        for block in blocks
        for name, parameter in run.instruments.model.get_submodule(block).named_parameters()
        if parameter.ndim > 1
    }
    out = [name for name in inside if name not in known]
    if out and run.engine.rank == 0:
        share = sum(inside[name] for name in out) / sum(inside.values())
        logger.warning(
            "%.0f %% of the weights of the quantized blocks stay in full precision: %d parameters that qpipe cannot "
            "quantize, such as %s", 100 * share, len(out), out[0],
        )  # fmt: skip


def _require_range_used(run: Run) -> None:
    ptq = run.config.quantization.ptq
    weights = [entry.quantizer for entry in run.plan.sites.values() if entry.site.slot == "weight"]
    if ptq is not None and ptq.range != PtqConfig().range and weights and FIXED_GRID not in weights:
        raise ConfigError(
            f"quantization.ptq.range: {ptq.range} is for weights with quantizer `uniform`, and the plan has none; "
            "leave it out (`lsq` has `init` for this), or give rules with `uniform`"
        )


@contextmanager
def at_site(site: str, source: str) -> Iterator[None]:
    """Say, where what a rule asks for does not exist, which site it is for."""
    try:
        yield
    except SiteError as error:
        raise SiteError(f"{site} ({source}): {error}") from error


def without_repeats(model: nn.Module, made: Plan) -> Plan:
    """The plan with one site for each tied parameter: its quantizer serves the others too.

    Raises:
        SiteError: two planned weights are the same Parameter, and their plans differ.
    """
    owners: dict[int, str] = {}
    repeated: set[str] = set()
    for name, entry in made.sites.items():
        if entry.site.slot != "weight":
            continue
        parameter = model.get_parameter(f"{entry.site.path}.weight")
        other = owners.setdefault(id(parameter), name)
        if other == name:
            continue
        first = made.sites[other]
        if (first.quantizer, first.options) != (entry.quantizer, entry.options):
            raise SiteError(f"{name} and {other} are one tied parameter; exclude one of them with quantizer: none")
        repeated.add(name)
    return replace(made, sites={name: entry for name, entry in made.sites.items() if name not in repeated})


def insert_quantizers(run: Run, trained: Mapping[str, Tensor] | None = None) -> None:
    """Build every planned quantizer, put it at its site, and initialise it from the weight.

    Args:
        run: as `build` made it.
        trained: state of a finished run, as `quantizer_state` and `float_state` give it; taken over instead.
    """
    run.instruments.context.scale_dtype = scale_dtype(run)
    run.instruments.context.noise = run.config.quantization.noise
    run.instruments.context.seed = run.config.seed
    # `auto` waits for the self-check, which tells how much a step quantizes.
    run.instruments.context.compiled = use_compiled(run.config.quantization.compile, 0, run.engine.device)
    kinds = run.host.collect("qpipe_quantizers")
    for entry in run.plan.sites.values():
        quantizer = kinds[entry.quantizer].build(entry.options)
        run.instruments.put(entry.site, quantizer)
        own = None if trained is None else _own_state(entry.site.name, trained)
        if entry.site.slot == "weight":
            for site in tied_sites(run, entry.site):
                run.instruments.module(site).host("weight", quantizer)
            weight = run.student.get_parameter(f"{entry.site.path}.weight")
            with torch.no_grad(), at_site(entry.site.name, entry.source):
                set_state(quantizer, weight, own)
                lattice = checked_lattice(entry.site.name, quantizer, weight.detach())
            run.plan = run.plan.measured(entry.site.name, lattice, zero_point_kind(lattice.zero_point))
        elif own is not None:
            quantizer.load_state_dict(own)


def scale_dtype(run: Run) -> torch.dtype:
    """The type that scales are rounded to while training."""
    name = run.config.quantization.scale_dtype
    return run.engine.dtype if name == "auto" else SCALE_DTYPES[name]


def _own_state(site: str, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to a site of `site/name -> tensor`, by name."""
    return {key.partition("/")[2]: value for key, value in states.items() if key.partition("/")[0] == site}


def set_state(quantizer: Quantizer, weight: Tensor, trained: dict[str, Tensor] | None) -> None:
    """Initialise a quantizer from its weight, or give both what a finished run has saved of them."""
    if trained is None:
        stored = quantizer.initialize(weight.detach())
    else:
        stored = trained.pop(STORED, None)
        quantizer.allocate(weight.detach())
        quantizer.load_state_dict(trained)
    if stored is not None:
        weight.copy_(stored)


def checked_lattice(site: str, quantizer: Quantizer, weight: Tensor) -> QTensor:
    """The codes of a weight, after comparing them with what the forward pass uses.

    Raises:
        ModelError: the weight is not finite.
        FormatError: they decode to something else.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{site} holds NaN or infinity; load another checkpoint")
    lattice = quantizer.encode(weight)
    if not torch.equal(lattice.decode(weight.dtype), quantizer.quantize(weight)):
        raise FormatError(
            f"{site}: encode().decode() differs from the forward pass; {type(quantizer).__name__}.quantize must be "
            "bitwise equal to it (qpipe.testing.check_quantizer tests this)"
        )
    return lattice


def tied_sites(run: Run, site: Site) -> list[Site]:
    """The other sites of the Parameter at a weight site. One quantizer serves them all: it is one tensor in the file.

    Raises:
        SiteError: a module that shares the Parameter cannot host a quantizer.
    """
    weight = run.student.get_parameter(f"{site.path}.weight")
    names = [name for name, other in run.student.named_parameters(remove_duplicate=False) if other is weight]
    others = [name for name in names if name != f"{site.path}.weight"]
    found = [run.instruments.sites.get(f"{name.removesuffix('.weight')}:weight") for name in others]
    if None in found:
        raise SiteError(
            f"{site.name} is tied to {others[found.index(None)]}, which cannot be quantized with it; "
            "leave it out with quantizer: none"
        )
    return [other for other in found if other is not None]


def require_savable(run: Run) -> None:
    """Refuse a model that could not be saved once it is trained.

    Raises:
        ModelError: it is no transformers model.
    """
    if not hasattr(run.student, "save_pretrained") or not hasattr(run.student, "config"):
        raise ModelError(
            f"model {run.config.model.name!r} is a {type(run.student).__name__} without `save_pretrained` or `config`, "
            "so that it could not be saved as a Hugging Face folder; make it a transformers.PreTrainedModel "
            "(docs/own-model.md)"
        )


def refuse_unexportable(run: Run, name: str | None = None) -> None:
    """Ask an exporter, before anything long starts, whether it can hold the plan.

    Args:
        run: with a plan.
        name: of the exporter; default: the configured one.

    Raises:
        ConfigError: no exporter has that name.
        FormatError: it cannot; says why, for each kind of site. Or no exporter could, or what it would write could not
            be loaded.
    """
    exporter = find_exporter(run, name)
    if exporter.loads_with_transformers:
        auto_class(run.student)
    for site, quantizer in run.instruments.quantizers().items():
        if not site.endswith(":weight"):
            require_describable(site, quantizer)
    planned = [
        _planned(run, entry, site)
        for entry in run.plan.sites.values()
        for site in (entry.site, *(tied_sites(run, entry.site) if entry.site.slot == "weight" else ()))
    ]
    reasons = list(exporter.check(planned))
    if reasons:
        raise FormatError(f"export.format {exporter.name!r} cannot hold this plan: " + "; ".join(reasons[:5]))
    if exporter.loading_problem is not None:
        problem = exporter.loading_problem(run.student, planned, own_state(run.student))
        if problem:
            raise FormatError(f"export.format {exporter.name!r}: {problem}")


def require_describable(site: str, quantizer: Quantizer) -> AffineActivation:
    """A quantizer of activations, if an exporter can be told how it computes.

    Raises:
        FormatError: it is none of `AffineActivation`.
    """
    if not isinstance(quantizer, AffineActivation):
        raise FormatError(
            f"{site}: no exporter can describe activations of {type(quantizer).__name__}; derive it from "
            "qpipe.AffineActivation"
        )
    return quantizer


def _planned(run: Run, entry: PlannedSite, site: Site) -> export_record.PlannedSite:
    options = entry.options
    dynamic = bool(getattr(options, "dynamic", False))  # other quantizers' options may have the same names
    return export_record.PlannedSite(
        path=site.path,
        slot=site.slot,
        module_type=site.module_type,
        bits=entry.bits or 0,
        granularity=entry.granularity or "tensor",
        group_size=getattr(options, "group_size", None),
        dynamic=dynamic,
        zero_point=entry.zero_point,
        narrow=dynamic and bool(getattr(options, "narrow", False)),
        clip=getattr(options, "clip", None) if dynamic else None,
        scale_dtype=scale_dtype(run),
        dtype=run.engine.dtype,
    )


def find_exporter(run: Run, name: str | None = None) -> Exporter:
    """The exporter named in the configuration, or given.

    Raises:
        ConfigError: there is none of that name.
    """
    name = name or run.config.export.format
    exporters: dict[str, Exporter] = run.host.collect("qpipe_exporters")
    if name not in exporters:
        raise ConfigError(
            f"export format {name!r} is unknown{suggest(name, exporters)}; available: {', '.join(exporters)}"
        )
    return exporters[name]


def attach_weight_losses(run: Run) -> None:
    """Give every module the penalties that apply to its weight.

    Raises:
        SiteError: a penalty applies to no weight, or to one that is stored in a form which it is not meant for.
    """
    terms = run.host.collect("qpipe_weight_losses", run=run)
    weights = [s.path for s in run.instruments.sites.values() if s.slot == "weight" and not s.by_name]  # of maps
    for term in terms.values():
        paths = [path for path in weights if term.applies(path)]
        if not paths:
            raise SiteError(f"weight loss {term.name!r} applies to no weight of this model")
        # A tied weight has several paths, and counts once: at the first.
        paths = list({id(run.student.get_parameter(f"{path}.weight")): path for path in reversed(paths)}.values())
        for path in paths:
            module = run.instruments.module(run.instruments.sites[f"{path}:weight"])
            assert isinstance(module, QuantModule)
            quantizer = module.hosted("weight")
            if quantizer is not None and quantizer.reparameterizes and not term.stored:
                raise SiteError(
                    f"weight loss {term.name!r} is meant for ordinary weights, but {path} is trained in the form that "
                    f"{type(quantizer).__name__} stores it in; leave it out of the penalty, or quantize it otherwise"
                )
            module.qpipe.weight_losses += (term,)
    run.weight_losses = tuple(terms.values())


def prepare(run: Run, trained: Mapping[str, Tensor] | None = None) -> None:
    """Everything between loaded models and a model that can be wrapped.

    Args:
        run: as `build` made it.
        trained: what a finished run has saved of its quantizers, where the model's weights are those of one.

    Raises:
        QpipeError: rules, options or plugins do not fit the model.
    """
    plan(run)
    insert_quantizers(run, trained)
    if trained is None:
        require_savable(run)
    if run.plan.sites and trained is None:  # a finished run may be wanted in another format, and is asked for then
        refuse_unexportable(run)
    attach_weight_losses(run)
    if run.host.is_used("qpipe_signals") and run.teacher is not None:
        run.teacher_instruments = instrument(run.host, run.teacher)
    run.phases = make_phases(run)
    run.host.hook.qpipe_model_prepared(run=run)
    if run.total_steps:
        wanted = wanted_signals(run)
        if wanted.student - OUTPUTS:
            refuse_layerdrop(run.student, wanted.student)
            run.instruments.enable_capture()
        if run.teacher_instruments is not None and (wanted.teacher | wanted.evaluation) - OUTPUTS:
            run.teacher_instruments.enable_capture()


def refuse_layerdrop(model: nn.Module, kinds: Collection[str]) -> None:
    """Refuse signals of layers of a model that leaves out layers at random, and with them their signals.

    Raises:
        ModelError: it does so in training.
    """
    config = getattr(model, "config", None)
    for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        rate = getattr(config, key, 0)
        if isinstance(rate, float) and rate > 0 and set(kinds) - {"logits"}:
            raise ModelError(
                f"{type(model).__name__} leaves out layers at random in training ({key} {rate:g}), so that plugins "
                f"cannot have its {', '.join(sorted(set(kinds) - {'logits'}))}; set model.config: {{{key}: 0}}"
            )


def wrap(run: Run) -> None:
    """Move the models to the device, make optimizer and schedule, and hand everything to the engine."""
    train = run.config.train
    cast(run.student, run)
    recompute(run)
    hook = run.host.hook
    optimizer = hook.qpipe_optimizer(run=run, groups=parameter_groups(run))
    run.scheduler = hook.qpipe_scheduler(run=run, optimizer=optimizer)
    with own_buffers(run.student, run.engine.dtype):
        blocks = [run.student.get_submodule(path) for path in run.instruments.map.blocks]
        run.engine.wrap(run.student, optimizer, run.scheduler, train, blocks)
    run.instruments.context.partitioned = run.engine.partitioned
    run.instruments.context.weights_changed()
    if run.teacher is not None:
        hold_teacher(run)
