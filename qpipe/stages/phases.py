"""Phases: parts of the training with a schedule and an optimizer of their own."""

from __future__ import annotations

from dataclasses import replace

from qpipe.errors import ConfigError
from qpipe.run import Run
from qpipe.types import TrainingPhase

REST = "train"
"""Name of the last phase, which no plugin asked for."""


def make_phases(run: Run) -> tuple[TrainingPhase, ...]:
    """The phases that plugins put before the training, and the rest of it; none where nothing will be trained.

    Raises:
        ConfigError: a phase has no steps, or they have more than the training.
    """
    if run.total_steps == 0:
        return ()
    train = run.config.train
    rest = TrainingPhase(REST, run.total_steps, train.learning_rate, train.warmup)
    found: list[TrainingPhase] = []
    for phase in run.host.collect("qpipe_training_phases", run=run).values():
        if not 0 < phase.steps <= rest.steps:
            raise ConfigError(
                f"training phase {phase.name!r} asks for {phase.steps} optimizer steps, and {rest.steps} of "
                f"{run.total_steps} are left; give it at least 1 and at most as many, or train longer"
            )
        rate = train.learning_rate if phase.learning_rate is None else phase.learning_rate
        warmup = train.warmup if phase.warmup is None else phase.warmup
        found.append(replace(phase, learning_rate=rate, warmup=warmup, start=rest.start))
        rest = replace(rest, steps=rest.steps - phase.steps, start=rest.start + phase.steps)
    return (*found, rest) if rest.steps else tuple(found)


def enter_phase(run: Run, index: int) -> None:
    """Forget the optimizer's state where a phase begins; called before each optimizer step `index`.

    It depends on the step alone, so a run that resumes at the border does so too.
    """
    if index > 0 and index in {phase.start for phase in run.phases}:
        # torch makes the state of an optimizer in its first step, and the engines keep it in this same mapping.
        run.scheduler.optimizer.state.clear()
