"""Which layer of the teacher a layer of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from qpipe import ModelError

Pair = tuple[int, int]
"""Layer of the student, layer of the teacher, each from 0."""


def depth_ratio(student: int, teacher: int, what: str) -> int:
    """Layers of the teacher for each of the student.

    Raises:
        ModelError: the teacher's number of layers is no multiple of the student's, or one is not known.
    """
    if not student or not teacher:
        raise ModelError(
            f"the layers of {'the student' if not student else 'the teacher'} are not known, which distillation of "
            f"{what} needs; set it to none, or use a model family that qpipe knows"
        )
    if teacher % student:
        raise ModelError(
            f"the student has {student} layers and the teacher {teacher}: distillation of {what} pairs layers evenly, "
            f"so set distillation.layer_map to {student} of the teacher's layers, or give a teacher whose number of "
            "layers is a multiple of the student's"
        )
    return teacher // student


def require_one_map(kept: Sequence[int] | str | None, student: int, ratio: int) -> None:
    """Refuse to guess where the student started from other layers than those that it would learn from.

    Args:
        kept: `model.keep_layers` of the run.
        student: layers of the student.
        ratio: layers of the teacher for each of these.

    Raises:
        ModelError: `kept` has other layers than the evenly spaced ones.
    """
    every_other = list(range(1, 2 * student, 2))
    started = [layer + 1 for layer in (every_other if isinstance(kept, str) else kept or ())]
    even = [ratio * layer for layer in range(1, student + 1)]
    if len(started) == student and max(started) <= even[-1] and started != even:
        choices = f"{started}, or {even}, to say which" if started == sorted(started) else f"{even}, if these are what"
        raise ModelError(
            f"model.keep_layers starts the student from layers {started} of its model, and evenly spaced are {even} of "
            f"the teacher: set distillation.layer_map: {choices} it learns from"
        )


def hidden_pairs(depth: int, ratio: int, layers: Literal["uniform", "last"]) -> list[Pair]:
    """Pairs of hidden states: the embeddings' output (0) and every layer's, or the last one's."""
    first = 0 if layers == "uniform" else depth
    return [(layer, layer * ratio) for layer in range(first, depth + 1)]


def attention_pairs(depth: int, ratio: int, layers: Literal["uniform", "last"]) -> list[Pair]:
    """Pairs of attention layers; the student's last one always meets the teacher's last one."""
    first = 0 if layers == "uniform" else depth - 1
    return [(layer, (layer + 1) * ratio - 1) for layer in range(first, depth)]


def mapped_pairs(
    layer_map: Sequence[int], depth: int, teacher: int, layers: Literal["uniform", "last"]
) -> tuple[list[Pair], list[Pair]]:
    """Pairs of hidden states and of attention layers by an explicit map.

    Args:
        layer_map: the teacher's layer, from 1, for each layer of the student; with one number more, the first is the
            teacher's hidden state for the embeddings' output.
        depth: layers of the student.
        teacher: layers of the teacher.
        layers: all pairs, or the last ones.

    Raises:
        ModelError: the map has another length, names a layer that is not there, or names one twice or out of order.
    """
    if len(layer_map) not in (depth, depth + 1):
        raise ModelError(
            f"distillation.layer_map has {len(layer_map)} numbers; the student's {depth} layers need {depth}, or "
            f"{depth + 1} with one for the embeddings first"
        )
    states = [0, *layer_map] if len(layer_map) == depth else list(layer_map)
    rises = all(below < above for below, above in pairwise(states))
    if not rises or states[-1] > teacher:
        raise ModelError(
            f"distillation.layer_map {list(layer_map)} must rise from each number to the next and name layers 1 to "
            f"{teacher}, which the teacher has; give another layer to each of the student's"
        )
    hidden = list(enumerate(states))
    attention = [(layer - 1, theirs - 1) for layer, theirs in hidden[1:]]
    return (hidden, attention) if layers == "uniform" else (hidden[-1:], attention[-1:])


def require_equal(student: Any, teacher: Any, attribute: str, what: str) -> None:
    """Refuse models whose tensors have different shapes.

    Args:
        student: a model; one without a configuration is not checked.
        teacher: likewise.
        attribute: of the configuration.
        what: what it counts, for the message.

    Raises:
        ModelError: the numbers differ.
    """
    ours, theirs = (getattr(getattr(model, "config", None), attribute, None) for model in (student, teacher))
    if None not in (ours, theirs) and ours != theirs:
        raise ModelError(
            f"the student has {ours} {what} and the teacher {theirs}, which cannot be compared; give a teacher of "
            "equal size, or leave out what needs it (distillation.hidden, .attention, .output or .logits: none)"
        )
