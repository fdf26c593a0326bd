"""Which models an intervention can work with, and which layers of the teacher it takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from qpipe import ConfigError, ModelError, Run
from qpipe_teacher_intervention.schedule import Kind

SHAPE = (
    ("hidden_size", "hidden units"),
    ("num_attention_heads", "attention heads"),
    ("head_dim", "units in each attention head"),
)
"""What must be equal, by the names of transformers' configurations, for tensors of the teacher to fit."""

VOCABULARY = (("vocab_size", "tokens in its vocabulary"),)
"""Likewise for the logits of language models."""


def teacher_layers(run: Run, layer_map: Sequence[int] | None) -> list[int]:
    """The teacher's layer, from 0, for each layer of the student.

    Args:
        run: with both models.
        layer_map: the same counted from 1; None where both have the same number of layers.

    Raises:
        ModelError: there is no teacher, the attention of a model is not known, or the numbers of layers differ.
        ConfigError: the map has another length than the student, does not rise, or names a layer that is not there.
    """
    name, student = _name(run.student), run.instruments.map
    if run.teacher is None or run.teacher_instruments is None:
        raise ModelError(f"teacher intervention on {name} needs a teacher; name one with teacher.name")
    depth = require_attention(run, student_side=True)
    theirs = require_attention(run, student_side=False)
    assert len(student.attention) == depth
    if layer_map is None:
        if theirs != depth:
            raise ModelError(
                f"student {name} has {depth} attention layers and teacher {_name(run.teacher)} has {theirs}; teacher "
                f"intervention replaces layer by layer: set layer_map to {depth} of the teacher's layers, or name a "
                "teacher of the same depth"
            )
        return list(range(depth))
    rises = all(below < above for below, above in pairwise(layer_map))
    if len(layer_map) != depth or not rises or layer_map[-1] > theirs:
        raise ConfigError(
            f"layer_map {list(layer_map)} of teacher intervention must have {depth} rising numbers, one for each layer "
            f"of the student, from 1 to the teacher's {theirs}"
        )
    return [layer - 1 for layer in layer_map]


def require_attention(run: Run, student_side: bool) -> int:
    """The number of attention layers of a model.

    Raises:
        ModelError: its attention cannot be found.
    """
    instruments = run.instruments if student_side else run.teacher_instruments
    model = run.student if student_side else run.teacher
    found = None if instruments is None else instruments.map
    if found is None or not len(found.attention) == len(found.attention_output) == len(found.attention_inputs) > 0:
        raise ModelError(
            f"teacher intervention cannot find the attention of {_name(model)} and its projections; use a model family "
            "that qpipe knows (BERT, RoBERTa, DistilBERT, ViT, LLaMA, ...), or a plugin that implements qpipe_model_map"
        )
    return len(found.attention)


def require_equal(run: Run, numbers: Sequence[tuple[str, str]]) -> None:
    """Refuse models of which the configurations give different numbers.

    Args:
        run: with both models.
        numbers: name in the configuration, and what it counts.

    Raises:
        ModelError: one differs.
    """
    for attribute, what in numbers:
        ours, theirs = (getattr(getattr(m, "config", None), attribute, None) for m in (run.student, run.teacher))
        if None not in (ours, theirs) and ours != theirs:
            raise ModelError(
                f"student {_name(run.student)} has {ours} {what} and teacher {_name(run.teacher)} has {theirs}; "
                "teacher intervention needs tensors of equal shape, so name a teacher of the same shape"
            )


def require_compatible(run: Run, kinds: frozenset[Kind], norm: bool) -> None:
    """Refuse models whose tensors do not fit each other, or that lack what the intervention needs.

    Args:
        run: with both models.
        kinds: interventions that will act.
        norm: True if what enters the feed-forward networks is compared.

    Raises:
        ModelError: teacher and student differ in width or heads, projections are fused or made of several modules, or a
            site is not known.
    """
    name, student = _name(run.student), run.instruments.map
    require_equal(run, SHAPE)
    if "map" in kinds and any(len(set(paths)) != 3 for paths in student.attention_inputs):
        raise ModelError(
            f"{name} computes query, key and value in one projection; replacing the attention map stops gradients at "
            "query and key only, which needs separate ones: use ti-o, or a schedule without `map`"
        )
    inputs = [f"{path}:input" for paths in student.attention_inputs for path in paths]
    lacking = [site for site in inputs if site not in run.instruments.sites]
    if kinds and lacking:
        raise ModelError(
            f"{name} has no site {lacking[0]}, where teacher intervention stops gradients, as its projections are "
            "parts made of several modules; leave teacher intervention out, or distil with the plugin distillation"
        )
    for found, model in ((run.instruments, run.student), (run.teacher_instruments, run.teacher)):
        if norm and (found is None or len(found.map.sites.get("ffn_input", ())) != len(found.map.attention)):
            raise ModelError(
                f"qpipe does not know what enters the feed-forward networks of {_name(model)}, which "
                "output_loss_on: norm compares; use output_loss_on: projection, or a plugin that implements "
                "qpipe_model_map with sites `ffn_input`"
            )


def _name(model: object) -> str:
    path = getattr(getattr(model, "config", None), "name_or_path", "")
    return f"{type(model).__name__} ({path})" if path else type(model).__name__
