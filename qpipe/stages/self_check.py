"""Self-check: before training, prove on every rank that quantization takes part in the forward pass.

What that pass quantizes also tells whether compiling is worth its time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qpipe.errors import TrainingError
from qpipe.quant.compiled import use_compiled
from qpipe.quant.modules import QuantModule
from qpipe.quant.quantizer import Visit
from qpipe.run import Run
from qpipe.stages.bypass import bypasses_noted
from qpipe.stages.calibrate import calibration_batches, inference, inputs_of

logger = logging.getLogger("qpipe.stages")


def self_check(run: Run) -> None:
    """Run one batch with and without quantizers, and decide `quantization.compile: auto`.

    Raises:
        TrainingError: a planned site, a module with a penalty on its weight or an output head with a quantized one
            never ran, a quantized weight is used outside its module too, or quantization changes no output on some rank
            (unless the weights were rounded before).
    """
    penalized = [m for m in run.student.modules() if isinstance(m, QuantModule) and m.qpipe.weight_losses]
    if not run.plan.sites and not penalized:
        return
    context = run.instruments.context
    batch = next(calibration_batches(run, 1))
    with inference(run):
        context.visited = {}
        head = quantized_head(run)
        with calls_noted([*penalized, *([head] if head else [])]) as called:
            quantized = _logits(run, batch)
        refuse_unused([module for module in penalized if module not in called])
        if head is not None and head not in called:
            raise TrainingError(f"{_uses_weight_of(run, head.qpipe.path)} without calling it{OTHER_MODEL}")
        visited, context.visited = context.visited, None
        if not run.plan.sites:
            return
        context.enabled = False
        try:
            with bypasses_noted(run.student) as bypassed:
                plain = _logits(run, batch)
        finally:
            context.enabled = True
    refuse_bypassed(run, bypassed)
    idle = sorted(set(run.plan.sites) - visited.keys())
    changed = float((quantized.float() - plain.float()).abs().max())
    found = run.engine.gather_objects((changed, idle, quantized_elements(run, visited)))
    for rank, (difference, unused, _) in enumerate(found):
        if unused:
            raise TrainingError(
                f"rank {rank}: {len(unused)} planned sites never ran in the forward pass, such as {unused[0]}; "
                "exclude them with quantizer: none"
            )
        if not difference > 0 and not rounded_before(run):
            raise TrainingError(
                f"rank {rank}: quantization does not change the model's output, so training would quantize nothing; "
                "check that rules reach weights that matter (`qpipe inspect plan`)"
            )
    unchanged = sorted(site for site, visit in visited.items() if not visit.changed)
    if unchanged and not rounded_before(run):
        logger.warning(
            "%d of %d quantizers leave their values as they are, such as %s: values on the lattice already, or a "
            "quantizer that does nothing",
            len(unchanged),
            len(visited),
            unchanged[0],
        )
    run.results["self_check"] = {"max_logit_change": [difference for difference, _, _ in found]}
    if run.config.quantization.compile == "auto" and not context.compiled:
        elements = max(count for _, _, count in found)  # the same decision on all ranks
        context.compiled = use_compiled(run.config.quantization.compile, elements, run.engine.device)


@contextmanager
def calls_noted(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """The modules, out of these, that are called within."""
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def quantized_head(run: Run) -> QuantModule | None:
    """The model's output embedding, where its weight is quantized, or tied to one that is."""
    find = getattr(run.student, "get_output_embeddings", lambda: None)
    head = find()
    return head if isinstance(head, QuantModule) and head.hosted("weight") is not None else None


def refuse_bypassed(run: Run, bypassed: Mapping[str, str]) -> None:
    """Refuse weights that the model also computes with outside the modules that quantize them.

    Args:
        run: with the student.
        bypassed: path of the module and name of the function, of each.

    Raises:
        TrainingError: there are any.
    """
    if bypassed:
        path, function = next(iter(bypassed.items()))
        raise TrainingError(f"{_uses_weight_of(run, path)} outside that module too (in {function}){OTHER_MODEL}")


OTHER_MODEL = (
    ", so that it would not be quantized there, and the export would hold another model; leave that weight, or the one "
    "that it is tied to, in full precision (quantizer: none)"
)


def _uses_weight_of(run: Run, path: str) -> str:
    return f"{type(run.student).__name__} computes with the weight of {path}"


def refuse_unused(modules: Sequence[QuantModule]) -> None:
    """Refuse penalties on weights that the model does not compute with: they would never be added.

    Raises:
        TrainingError: there are such modules.
    """
    if modules:
        state = modules[0].qpipe
        raise TrainingError(
            f"{len(modules)} weights with a penalty ({state.weight_losses[0].name}) are not used in the forward pass, "
            f"such as {state.path}; leave them out of the penalty"
        )


def quantized_elements(run: Run, visited: Mapping[str, Visit]) -> int:
    """How many elements this process quantizes in the whole training: weights in each step, activations in each pass.

    Args:
        run: with its engine.
        visited: what quantizers met in the forward pass of one micro-batch.
    """
    passes = dict.fromkeys(run.plan.sites, run.config.train.accumulation)
    passes |= {name: 1 for name, entry in run.plan.sites.items() if entry.site.slot == "weight"}
    return run.total_steps * sum(passes[name] * visit.elements for name, visit in visited.items())


def rounded_before(run: Run) -> bool:
    """True if weights were stored as values of their lattice, which quantization leaves as they are."""
    ptq = run.config.quantization.ptq
    return ptq is not None and ptq.weights == "adaround"


def _logits(run: Run, batch: dict[str, Tensor]) -> Tensor:
    output = run.engine.forward(**inputs_of(batch))
    logits: Tensor = output.logits
    if not bool(torch.isfinite(logits).all()):
        raise TrainingError("the model's output is not finite before training has begun; check the weights it loads")
    return logits
