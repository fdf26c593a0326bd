"""The plugins `ti-o`, `ti-m` and `ti-g`: one class, three schedules."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from qpipe import (
    CheckpointError,
    Loss,
    LossWeight,
    Options,
    Plugin,
    Run,
    SignalKind,
    Signals,
    Step,
    TrainingError,
    TrainingPhase,
    hookimpl,
)
from qpipe_teacher_intervention.losses import distillation_losses
from qpipe_teacher_intervention.models import VOCABULARY, require_compatible, require_equal, teacher_layers
from qpipe_teacher_intervention.options import InterventionOptions, MapOptions, OutputOptions
from qpipe_teacher_intervention.schedule import Kind, Schedule, intervention_steps, make_schedule
from qpipe_teacher_intervention.taps import REPLACED, add_taps, keep_ffn_inputs

logger = logging.getLogger("qpipe.ti")

FILE = "teacher-intervention.json"
"""What a run leaves in its directory: the phases with their steps."""

PHASE = "teacher-intervention"
"""Name of the training phase that the intervention is, with `two_step`."""


class TeacherIntervention(Plugin):
    """Replaces the student's attention by the teacher's for the first part of training, and distils throughout."""

    Options: ClassVar[type[Options]] = InterventionOptions
    needs_teacher = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.layer_map = self.options.layer_map
        self.schedule: Schedule | None = None
        self.kind: Kind | None = None
        self._layers: list[int] = []

    # --- prepare ------------------------------------------------------------------------------------------------------

    @hookimpl
    def qpipe_training_phases(self, run: Run) -> Iterable[TrainingPhase]:
        """The intervention, with `two_step`.

        Raises:
            ConfigError: it does not fit into the training.
        """
        if self.options.two_step:
            yield TrainingPhase(PHASE, self._steps(run), self.options.learning_rate, self.options.warmup)

    def _steps(self, run: Run) -> int:
        return intervention_steps(self.options.steps, self.options.fraction, len(self.options.parts), run.total_steps)

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Check teacher against student, fix the schedule, and put the taps in place.

        Raises:
            ModelError: the models do not fit.
            ConfigError: the schedule does not fit into the training, or the map of layers to the models.
        """
        if run.total_steps == 0:  # A plan, or a finished run: nothing is trained, and there is no teacher.
            return
        parts, norm = self.options.parts, self._compares_norms()
        self._layers = teacher_layers(run, self.options.layer_map)
        kinds = frozenset(kind for part in parts for kind in part.kind)
        require_compatible(run, kinds, norm)
        if self.options.logits_loss != 0 and run.task.kind in ("causal-lm", "masked-lm"):
            require_equal(run, VOCABULARY)
        start = next((phase.start for phase in run.phases if phase.name == PHASE), 0)
        self.schedule = make_schedule(parts, self._steps(run), start, run.config.seed)
        add_taps(run, lambda: self.kind, self._layers, kinds, self.options.in_evaluation)
        if norm:
            keep_ffn_inputs(run)

    def _compares_norms(self) -> bool:
        return bool(self.options.output_loss != 0 and self.options.output_loss_on == "norm")

    # --- train --------------------------------------------------------------------------------------------------------

    @hookimpl
    def qpipe_run_start(self, run: Run) -> None:
        """Say what happens when, and leave it in the run directory."""
        if run.engine.rank == 0 and self.schedule is not None:
            phases = ", ".join(f"{' or '.join(p.kinds)} in steps {p.start}-{p.stop - 1}" for p in self.schedule.phases)
            logger.info("teacher intervention: %s; none from step %d on", phases, self.schedule.stop)
            (run.out / FILE).write_text(json.dumps(self.schedule.to_json(), indent=1), encoding="utf-8")

    @hookimpl
    def qpipe_step_start(self, step: Step) -> None:
        """Enter the phase that the step belongs to."""
        self.kind = None if self.schedule is None else self.schedule.kind_at(step.index)

    @hookimpl
    def qpipe_signals(self, run: Run) -> Signals:
        """What the losses need, and from the teacher what is replaced in this phase; before any step, in all phases."""
        options = self.options
        weights: dict[SignalKind, LossWeight] = {
            "logits": options.logits_loss,
            "hidden_states": options.hidden_loss,
            "scores": options.score_loss,
            "attention_output": 0 if self._compares_norms() else options.output_loss,
        }
        compared = frozenset(kind for kind, weight in weights.items() if weight != 0)
        now = (self.kind,) if self.kind is not None else ()
        kinds = now if run.step is not None else (kind for part in options.parts for kind in part.kind)
        replaced: frozenset[SignalKind] = frozenset(REPLACED[kind] for kind in kinds)
        # The teacher's taps need its forward pass, which a signal of its attention asks for.
        seen: frozenset[SignalKind] = frozenset({"attention_output"}) if self._compares_norms() else frozenset()
        evaluation = replaced if self.options.in_evaluation else frozenset()
        masks: frozenset[SignalKind] = frozenset({"visible"}) if "scores" in compared else frozenset()
        return Signals(teacher=compared | replaced | seen, student=compared | masks, evaluation=evaluation)

    @hookimpl
    def qpipe_losses(self, run: Run) -> Iterable[Loss]:
        """The distillation losses whose weight is not 0."""
        return distillation_losses(run, self.options, self._layers)

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
