"""The plugin `distillation`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qpipe import ConfigError, Loss, ModelError, Options, Plugin, Run, SignalKind, Signals, Step, hookimpl
from qpipe_distillation import losses
from qpipe_distillation.layers import Pair, attention_pairs, depth_ratio, hidden_pairs, require_equal
from qpipe_distillation.options import DistillationOptions

HIDDEN = {"cosine": losses.hidden_cosine, "mse": losses.hidden_mse}


class Distillation(Plugin):
    """Learns the teacher's logits, hidden states and attention scores, beside the task or in its place."""

    Options: ClassVar[type[Options]] = DistillationOptions
    needs_teacher = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._hidden: list[Pair] = []
        self._attention: list[Pair] = []
        self._causal = False

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Check teacher against student, and pair their layers.

        Raises:
            ModelError: the models do not fit.
            ConfigError: the task does not fit the options.
        """
        options = self.options
        if options.logits == "kl" and run.task.kind == "regression":
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
            depth = len(ours.blocks)
            ratio = depth_ratio(depth, len(theirs.blocks), "hidden states")
            self._hidden = hidden_pairs(depth, ratio, options.layers)
        if options.attention != "none":
            require_equal(run.student, run.teacher, "num_attention_heads", "attention heads")
            depth = len(ours.attention)
            ratio = depth_ratio(depth, len(theirs.attention), "attention")
            self._attention = attention_pairs(depth, ratio, options.layers)
            self._causal = bool(getattr(run.student.get_submodule(ours.attention[0]), "is_causal", False))

    @hookimpl
    def qpipe_signals(self) -> Signals:
        """What the losses compare."""
        kinds: dict[SignalKind, str] = {
            "logits": self.options.logits,
            "hidden_states": self.options.hidden,
            "scores": self.options.attention,
        }
        wanted = frozenset(kind for kind, how in kinds.items() if how != "none")
        return Signals(teacher=wanted, student=wanted)

    @hookimpl
    def qpipe_losses(self) -> Iterable[Loss]:
        """The terms that are on; the first stands in for the task loss unless that is kept."""
        options = self.options
        terms: list[tuple[str, str, Callable[[Step], Tensor], float]] = [
            ("logits", options.logits, self._logits_loss, options.logits_weight),
            ("hidden", options.hidden, self._hidden_loss, options.hidden_weight),
            ("attention", options.attention, self._attention_loss, options.attention_weight),
        ]
        replaces: tuple[str, ...] = () if options.task_loss else ("task",)
        for name, how, fn, weight in terms:
            if how != "none":
                yield Loss(f"distillation/{name}", fn, weight, replaces)
                replaces = ()

    def _logits_loss(self, step: Step) -> Tensor:
        student, teacher, mask = step.student["logits", 0], step.teacher["logits", 0], step.batch.get("attention_mask")
        if self.options.logits == "mse":
            return losses.logits_mse(student, teacher, mask)
        return losses.logits_kl(student, teacher, self.options.temperature, mask)

    def _hidden_loss(self, step: Step) -> Tensor:
        distance, mask = HIDDEN[self.options.hidden], step.batch.get("attention_mask")
        pairs = [(step.student["hidden_states", i], step.teacher["hidden_states", j]) for i, j in self._hidden]
        return torch.stack([distance(student, teacher, mask) for student, teacher in pairs]).sum()

    def _attention_loss(self, step: Step) -> Tensor:
        mask = step.batch.get("attention_mask")
        pairs = [(step.student["scores", i], step.teacher["scores", j]) for i, j in self._attention]
        return torch.stack([losses.attention_mse(ours, theirs, mask, self._causal) for ours, theirs in pairs]).sum()

    @hookimpl
    def qpipe_export_metadata(self) -> Mapping[str, Any]:
        """The options."""
        return {"options": self.options.model_dump(mode="json")}
