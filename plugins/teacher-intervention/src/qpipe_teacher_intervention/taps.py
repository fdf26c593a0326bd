"""The taps of each intervention: what is replaced, and where gradients stop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qpipe import Inject, ModelError, Run, SignalKind, StopGradient, TapStage
from qpipe_teacher_intervention.schedule import Kind

REPLACED: dict[Kind, SignalKind] = {"output": "attention_output", "context": "context", "map": "probs"}
"""The signal of the teacher that stands in for the student's."""


def require_compatible(run: Run, kinds: frozenset[Kind]) -> None:
    """Refuse models whose attention cannot be replaced layer by layer.

    Raises:
        ModelError: attention is not known, its projections are fused, or teacher and student differ in depth or heads.
    """
    student = run.instruments.map
    name = _name(run.student)
    if run.teacher is None or run.teacher_instruments is None:
        raise ModelError(f"teacher intervention on {name} needs a teacher; name one with teacher.name")
    depth, teacher_depth = len(student.attention), len(run.teacher_instruments.map.attention)
    if not student.attention or len(student.attention_output) != depth or len(student.attention_inputs) != depth:
        raise ModelError(
            f"teacher intervention cannot find the attention of {name} and its projections; use a model family that "
            "qpipe knows (BERT, RoBERTa, DistilBERT, ViT, LLaMA, ...), or a plugin that implements qpipe_model_map"
        )
    if teacher_depth != depth:
        raise ModelError(
            f"student {name} has {depth} attention layers and teacher {_name(run.teacher)} has {teacher_depth}; "
            "teacher intervention replaces layer by layer, so name a teacher of the same depth"
        )
    for attribute, what in (("num_attention_heads", "attention heads"), ("hidden_size", "hidden units")):
        ours, theirs = (getattr(getattr(m, "config", None), attribute, None) for m in (run.student, run.teacher))
        if None not in (ours, theirs) and ours != theirs:
            raise ModelError(
                f"student {name} has {ours} {what} and teacher {_name(run.teacher)} has {theirs}; "
                "teacher intervention needs tensors of equal shape, so name a teacher of the same shape"
            )
    if "map" in kinds and any(len(set(paths)) != 3 for paths in student.attention_inputs):
        raise ModelError(
            f"{name} computes query, key and value in one projection; replacing the attention map stops gradients at "
            "query and key only, which needs separate ones: use ti-o, or a schedule without `map`"
        )


def _name(model: object) -> str:
    path = getattr(getattr(model, "config", None), "name_or_path", "")
    return f"{type(model).__name__} ({path})" if path else type(model).__name__


def add_taps(run: Run, current: Callable[[], Kind | None]) -> None:
    """Put the replacements and gradient stops at their sites; `current` says which intervention acts now."""
    model_map, add = run.instruments.map, run.instruments.add_tap

    def acting(*kinds: Kind) -> Callable[[], bool]:
        return lambda: current() in kinds

    for layer, attention in enumerate(model_map.attention):
        add(f"{attention}:probs", TapStage.REPLACE, _replacement(run, "probs", layer), acting("map"))
        add(f"{attention}:context", TapStage.REPLACE, _replacement(run, "context", layer), acting("context"))
        output = f"{model_map.attention_output[layer]}:output"
        add(output, TapStage.REPLACE, _replacement(run, "attention_output", layer), acting("output"))
        query, key, value = model_map.attention_inputs[layer]
        for path in dict.fromkeys((query, key)):
            add(f"{path}:input", TapStage.REPLACE, _stop, acting("output", "context", "map"))
        if value not in (query, key):
            add(f"{value}:input", TapStage.REPLACE, _stop, acting("output", "context"))


def _stop(x: Tensor) -> Tensor:
    result: Tensor = StopGradient.apply(x)
    return result


def _replacement(run: Run, kind: SignalKind, layer: int) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        if run.step is None:
            raise RuntimeError(f"the replacement of {kind} in layer {layer} ran outside a training step")
        result: Tensor = Inject.apply(x, run.step.teacher[kind, layer])
        return result

    return replace
