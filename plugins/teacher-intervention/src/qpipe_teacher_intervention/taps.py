"""The taps of each intervention: what is replaced, where gradients stop, and what is kept to be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from qpipe import Inject, Run, SignalKind, StopGradient, TapStage
from qpipe_teacher_intervention.schedule import Kind

REPLACED: dict[Kind, SignalKind] = {"output": "attention_output", "context": "context", "map": "probs"}
"""The signal of the teacher that stands in for the student's."""

FFN_INPUT = "ffn_input"
"""Role of what enters the feed-forward network, and the key under which a step keeps it."""


def add_taps(
    run: Run,
    current: Callable[[], Kind | None],
    layers: Sequence[int],
    kinds: Collection[Kind],
    in_evaluation: bool = False,
) -> None:
    """Put the replacements and gradient stops at their sites.

    Args:
        run: with both models.
        current: says which intervention acts now.
        layers: the teacher's layer for each layer of the student, from 0.
        kinds: interventions that will act. Others get no tap: one at an attention map says that maps are needed, which
            not all models can build.
        in_evaluation: whether the replacements act in evaluations during training too.
    """
    model_map, add = run.instruments.map, run.instruments.add_tap

    def replace(site: str, kind: Kind, layer: int) -> None:
        if kind in kinds:
            add(site, TapStage.REPLACE, _replacement(run, REPLACED[kind], layer), acting(kind), in_evaluation)

    def acting(*those: Kind) -> Callable[[], bool]:
        return lambda: current() in those

    for layer, attention in enumerate(model_map.attention):
        theirs = layers[layer]
        replace(f"{attention}:probs", "map", theirs)
        replace(f"{attention}:context", "context", theirs)
        replace(f"{model_map.attention_output[layer]}:output", "output", theirs)
        query, key, value = model_map.attention_inputs[layer]
        for path in dict.fromkeys((query, key)):
            add(f"{path}:input", TapStage.REPLACE, _stop, acting("output", "context", "map"))
        if value not in (query, key):
            add(f"{value}:input", TapStage.REPLACE, _stop, acting("output", "context"))


def keep_ffn_inputs(run: Run) -> None:
    """Let each step keep what enters the feed-forward networks of both models, under `("ffn_input", layer)`."""
    for instruments, side in ((run.instruments, "student"), (run.teacher_instruments, "teacher")):
        assert instruments is not None
        for layer, site in enumerate(instruments.map.sites[FFN_INPUT]):
            instruments.add_tap(site, TapStage.OBSERVE, _keeper(run, side, layer))


def _keeper(run: Run, side: str, layer: int) -> Callable[[Tensor], Tensor]:
    def keep(x: Tensor) -> Tensor:
        if run.step is None:
            raise RuntimeError(f"the input of feed-forward network {layer} was seen outside a training step")
        kept = run.step.student if side == "student" else run.step.teacher
        kept[FFN_INPUT, layer] = x
        return x

    return keep


def _stop(x: Tensor) -> Tensor:
    result: Tensor = StopGradient.apply(x)
    return result


def _replacement(run: Run, kind: SignalKind, layer: int) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        if run.step is None:
            raise RuntimeError(f"the replacement by {kind} of the teacher's layer {layer} ran outside a step")
        result: Tensor = Inject.apply(x, run.step.teacher[kind, layer])
        return result

    return replace
