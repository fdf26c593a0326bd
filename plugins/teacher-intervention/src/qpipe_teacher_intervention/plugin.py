"""The plugins `ti-o`, `ti-m` and `ti-g`: one class, three schedules."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from qpipe import CheckpointError, Loss, Options, Plugin, Run, SignalKind, Signals, Step, TrainingError, hookimpl
from qpipe_teacher_intervention.losses import score_loss, soft_cross_entropy, summed_mse
from qpipe_teacher_intervention.options import InterventionOptions, MapOptions, OutputOptions
from qpipe_teacher_intervention.schedule import Kind, Schedule, intervention_steps, make_schedule
from qpipe_teacher_intervention.taps import REPLACED, add_taps, require_compatible

logger = logging.getLogger("qpipe.ti")

FILE = "teacher-intervention.json"
"""What a run leaves in its directory: the phases with their steps."""


class TeacherIntervention(Plugin):
    """Replaces the student's attention by the teacher's for the first part of training, and distils throughout."""

    Options: ClassVar[type[Options]] = InterventionOptions
    needs_teacher = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.schedule: Schedule | None = None
        self.kind: Kind | None = None
        self._causal = False
        self._depth = 0

    # --- prepare ------------------------------------------------------------------------------------------------------

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Check teacher against student, fix the schedule, and put the taps in place.

        Raises:
            ModelError: the models do not fit.
            ConfigError: the schedule does not fit into the training.
        """
        if run.total_steps == 0:  # A plan, or a finished run: nothing is trained, and there is no teacher.
            return
        parts = self.options.parts
        require_compatible(run, frozenset(part.kind for part in parts))
        steps = intervention_steps(self.options.steps, self.options.fraction, len(parts), run.total_steps)
        self.schedule = make_schedule(parts, steps)
        attention = run.instruments.map.attention
        self._depth = len(attention)
        self._causal = bool(getattr(run.student.get_submodule(attention[0]), "is_causal", False))
        add_taps(run, lambda: self.kind)

    # --- train --------------------------------------------------------------------------------------------------------

    @hookimpl
    def qpipe_run_start(self, run: Run) -> None:
        """Say what happens when, and leave it in the run directory."""
        if run.engine.rank == 0 and self.schedule is not None:
            phases = ", ".join(f"{p.kind} in steps {p.start}-{p.stop - 1}" for p in self.schedule.phases)
            logger.info("teacher intervention: %s; none from step %d on", phases, self.schedule.steps)
            (run.out / FILE).write_text(json.dumps(self.schedule.to_json(), indent=1), encoding="utf-8")

    @hookimpl
    def qpipe_step_start(self, step: Step) -> None:
        """Enter the phase that the step belongs to."""
        self.kind = None if self.schedule is None else self.schedule.kind_at(step.index)

    @hookimpl
    def qpipe_signals(self) -> Signals:
        """What the losses need, and from the teacher what is replaced in this phase."""
        options = self.options
        weights: dict[SignalKind, float] = {
            "logits": options.logits_loss,
            "hidden_states": options.hidden_loss,
            "scores": options.score_loss,
            "attention_output": options.output_loss,
        }
        compared = frozenset(kind for kind, weight in weights.items() if weight > 0)
        replaced = frozenset() if self.kind is None else frozenset({REPLACED[self.kind]})
        return Signals(teacher=compared | replaced, student=compared)

    @hookimpl
    def qpipe_losses(self, run: Run) -> Iterable[Loss]:
        """The distillation losses with a weight above 0; the first stands in for the task loss unless that is kept."""
        regression, per_token = run.task.kind == "regression", run.task.kind == "causal-lm"

        def logits(step: Step) -> Tensor:
            student, teacher = step.student["logits", 0], step.teacher["logits", 0]
            if regression:
                return F.mse_loss(student.float(), teacher.float())
            return soft_cross_entropy(student, teacher, step.batch.get("attention_mask") if per_token else None)

        def hidden(step: Step) -> Tensor:
            return summed_mse(*self._layers(step, "hidden_states", self._depth + 1))

        def scores(step: Step) -> Tensor:
            mask = step.batch.get("attention_mask")
            return score_loss(*self._layers(step, "scores", self._depth), mask, self._causal)

        def outputs(step: Step) -> Tensor:
            return summed_mse(*self._layers(step, "attention_output", self._depth))

        options = self.options
        terms = [
            ("ti/logits", logits, options.logits_loss),
            ("ti/hidden", hidden, options.hidden_loss),
            ("ti/scores", scores, options.score_loss),
            ("ti/output", outputs, options.output_loss),
        ]
        replaces: tuple[str, ...] = () if options.task_loss else ("task",)
        for name, fn, weight in terms:
            if weight > 0:
                yield Loss(name, fn, weight, replaces)
                replaces = ()

    @staticmethod
    def _layers(step: Step, kind: SignalKind, count: int) -> tuple[list[Tensor], list[Tensor]]:
        layers = range(count)
        return [step.student[kind, i] for i in layers], [step.teacher[kind, i] for i in layers]

    # --- checkpoint and export ----------------------------------------------------------------------------------------

    @hookimpl
    def qpipe_state(self) -> Mapping[str, Any]:
        """The phases; which of them is under way follows from the step."""
        return {"phases": [] if self.schedule is None else self.schedule.to_json()}

    @hookimpl
    def qpipe_restore(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with another schedule.

        Raises:
            TrainingError: the phases differ from those of the checkpoint.
        """
        now = [] if self.schedule is None else self.schedule.to_json()
        if list(state["phases"]) != now:
            raise TrainingError(
                f"teacher intervention: the checkpoint has phases {state['phases']} and this run has {now}; "
                "resume with the same schedule, steps and length of training"
            )

    @hookimpl
    def qpipe_export_metadata(self, run: Run) -> Mapping[str, Any]:
        """The phases with their steps, and the options.

        Raises:
            CheckpointError: the run directory's record of the phases is damaged.
        """
        phases = None if self.schedule is None else self.schedule.to_json()
        path = run.out / FILE
        if phases is None and path.is_file():
            try:
                phases = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{path} is not valid JSON ({error}); repeat the run") from error
        return {"phases": phases, "options": self.options.model_dump(mode="json")}


class OutputIntervention(TeacherIntervention):
    """`ti-o`: replaces the output of each attention block."""

    Options = OutputOptions


class MapIntervention(TeacherIntervention):
    """`ti-m`: replaces the attention maps."""

    Options = MapOptions


class GradualIntervention(TeacherIntervention):
    """`ti-g`: first the outputs, then the contexts, then the maps."""
