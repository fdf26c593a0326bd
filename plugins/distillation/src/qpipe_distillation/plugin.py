"""The plugin `distillation`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qpipe import (
    ConfigError,
    Loss,
    ModelError,
    Options,
    Plugin,
    Run,
    SignalKind,
    Signals,
    Step,
    TrainingPhase,
    all_scores_mse,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    hookimpl,
    logits_kl,
    logits_mse,
    weight_function,
)
from qpipe_distillation.layers import (
    Pair,
    attention_pairs,
    depth_ratio,
    hidden_pairs,
    mapped_pairs,
    require_equal,
    require_one_map,
)
from qpipe_distillation.options import DistillationOptions
from qpipe_distillation.schedule import first_steps, within

PHASE = "distillation-layers"
"""Name of the training phase in which layers are learned, with `two_step`."""

STATES = {"cosine": hidden_cosine, "mse": hidden_mse}


class Distillation(Plugin):
    """Learns the teacher's logits, hidden states and attention scores, beside the task or in its place."""

    Options: ClassVar[type[Options]] = DistillationOptions
    needs_teacher = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.layer_map = self.options.layer_map
        self._hidden: list[Pair] = []
        self._attention: list[Pair] = []
        self._output: list[Pair] = []

    @hookimpl
    def qpipe_training_phases(self, run: Run) -> Iterable[TrainingPhase]:
        """With `two_step`, the training in which layers are learned.

        Raises:
            ConfigError: it leaves no room for the second.
        """
        options = self.options
        if options.two_step:
            steps = first_steps(options.steps, options.fraction, run.total_steps)
            yield TrainingPhase(PHASE, steps, options.learning_rate, options.warmup)

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Check teacher against student, and pair their layers.

        Raises:
            ModelError: the models do not fit.
            ConfigError: the task does not fit the options.
        """
        options = self.options
        if options.logits in ("kl", "soft-ce") and run.task.kind == "regression":
            raise ConfigError("regression predicts one number, which has no distribution: set distillation.logits: mse")
        if run.total_steps == 0:  # A plan, or a finished run: nothing is trained, and there is no teacher.
            return
        if run.teacher is None or run.teacher_instruments is None:
            raise ModelError("distillation needs a teacher; name one with teacher.name")
        ours, theirs = run.instruments.map, run.teacher_instruments.map
        if options.logits != "none" and run.task.kind in ("causal-lm", "masked-lm"):
            require_equal(run.student, run.teacher, "vocab_size", "tokens in its vocabulary")
        if options.hidden != "none":
            require_equal(run.student, run.teacher, "hidden_size", "hidden units")
            self._hidden, _ = self._pairs(run, ours.blocks, theirs.blocks, "hidden states")
        if options.attention != "none":
            require_equal(run.student, run.teacher, "num_attention_heads", "attention heads")
            _, self._attention = self._pairs(run, ours.attention, theirs.attention, "attention")
        if options.output != "none":
            require_equal(run.student, run.teacher, "hidden_size", "hidden units")
            _, self._output = self._pairs(run, ours.attention_output, theirs.attention_output, "output")

    def _pairs(self, run: Run, ours: Sequence[Any], theirs: Sequence[Any], what: str) -> tuple[list[Pair], list[Pair]]:
        """Pairs of hidden states and of attention layers."""
        options, depth = self.options, len(ours)
        if options.layer_map is not None and ours and theirs:
            return mapped_pairs(options.layer_map, depth, len(theirs), options.layers)
        ratio = depth_ratio(depth, len(theirs), what)
        require_one_map(run.config.model.keep_layers, depth, ratio)
        return hidden_pairs(depth, ratio, options.layers), attention_pairs(depth, ratio, options.layers)

    @hookimpl
    def qpipe_signals(self) -> Signals:
        """What the losses compare."""
        kinds: dict[SignalKind, str] = {
            "logits": self.options.logits,
            "hidden_states": self.options.hidden,
            "scores": self.options.attention,
            "attention_output": self.options.output,
        }
        wanted = frozenset(kind for kind, how in kinds.items() if how != "none")
        masks: frozenset[SignalKind] = frozenset({"visible"}) if "scores" in wanted else frozenset()
        return Signals(teacher=wanted, student=wanted | masks)

    @hookimpl
    def qpipe_losses(self, run: Run) -> Iterable[Loss]:
        """The terms that are on; the first stands in for the task loss unless that is kept."""
        options = self.options
        terms: list[tuple[str, str, Callable[[Step], Tensor], Any]] = [
            ("logits", options.logits, self._logits_loss, options.logits_weight),
            ("hidden", options.hidden, self._hidden_loss, options.hidden_weight),
            ("attention", options.attention, self._attention_loss, options.attention_weight),
            ("output", options.output, self._output_loss, options.output_weight),
        ]
        replaces: tuple[str, ...] = () if options.task_loss else ("task",)
        for name, how, fn, weight in terms:
            if how != "none":
                factor = weight_function(weight, run.total_steps)
                if options.two_step:
                    border = next((phase.stop for phase in run.phases if phase.name == PHASE), 0)
                    factor = within(factor, border, first=name != "logits")
                yield Loss(f"distillation/{name}", fn, factor, replaces)
                replaces = ()

    def _mask(self, step: Step) -> Tensor | None:
        """Non-zero at tokens that count; None if all do."""
        return step.batch.get("attention_mask") if self.options.padding == "exclude" else None

    def _logits_loss(self, step: Step) -> Tensor:
        student, teacher, options = step.student["logits", 0], step.teacher["logits", 0], self.options
        # Padded tokens have no logits worth learning, whatever else counts.
        mask = step.batch.get("attention_mask")
        if options.logits == "mse":
            return logits_mse(student, teacher, mask)
        loss = logits_kl(student, teacher, options.temperature, mask, entropy=options.logits == "soft-ce")
        return loss / student.shape[-1] if options.classes == "mean" else loss

    def _hidden_loss(self, step: Step) -> Tensor:
        options, mask = self.options, self._mask(step)
        distance = STATES[options.hidden]
        pairs = [(step.student["hidden_states", i], step.teacher["hidden_states", j]) for i, j in self._hidden]
        shape = tuple(pairs[0][0].shape)
        if options.hidden == "cosine" and len(shape) != 3:
            raise ModelError(
                "distillation.hidden: cosine compares features of tokens, [batch, tokens, hidden], and the states of "
                f"this model are {list(shape)}; set distillation.hidden: mse"
            )
        return torch.stack([distance(student, teacher, mask) for student, teacher in pairs]).sum()

    def _output_loss(self, step: Step) -> Tensor:
        distance, mask = STATES[self.options.output], self._mask(step)
        pairs = [(step.student["attention_output", i], step.teacher["attention_output", j]) for i, j in self._output]
        return torch.stack([distance(student, teacher, mask) for student, teacher in pairs]).sum()

    def _attention_loss(self, step: Step) -> Tensor:
        options, student = self.options, step.student
        triples = [(student["scores", i], step.teacher["scores", j], student["visible", i]) for i, j in self._attention]
        if options.padding == "include":
            hides, floor = options.masked_keys == "equal", options.score_floor
            found = [all_scores_mse(ours, theirs, seen if hides else None, floor) for ours, theirs, seen in triples]
        else:
            mask = step.batch.get("attention_mask")
            found = [attention_mse(ours, theirs, seen, mask) for ours, theirs, seen in triples]
        return torch.stack(found).sum()

    @hookimpl
    def qpipe_export_metadata(self) -> Mapping[str, Any]:
        """The options."""
        return {"options": self.options.model_dump(mode="json")}
