"""Experiment trackers: those of Accelerate, which know TensorBoard, Weights & Biases, MLflow and others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qpipe.plugin import Plugin, hookimpl

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from qpipe.run import Run, Step

PROJECT = "qpipe"
FOLDER = "trackers"
"""In the run's folder, for trackers that write files."""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """`("train.epochs", 3)` for `{"train": {"epochs": 3}}`; lists as JSON, since not every tracker takes them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value if isinstance(value, int | float | str) else json.dumps(value)


class Trackers(Plugin):
    """Sends what `metrics.jsonl` gets to the trackers of `train.trackers`, from rank 0 alone."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._trackers: list[GeneralTracker] = []
        self._taken = 0

    @hookimpl
    def qpipe_run_start(self, run: Run) -> None:
        """Start them, with the configuration."""
        names = run.config.train.trackers
        if run.engine.rank != 0 or not names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._taken = run.results.get("resumed_step") or 0
        settings = dict(flat(run.config.model_dump(mode="json")))
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            folder = {"logging_dir": str(run.out / FOLDER)} if kind.requires_logging_directory else {}
            tracker = kind(PROJECT, **folder)
            tracker.start()
            self._trackers.append(tracker)
            tracker.store_init_configuration(settings)

    @hookimpl
    def qpipe_step_end(self, run: Run, step: Step, metrics: Mapping[str, float]) -> None:
        """`train/...` of a step that comes with metrics."""
        self._taken = step.index + 1
        self._log("train", metrics)

    @hookimpl
    def qpipe_evaluated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """`eval/...`."""
        self._log("eval", metrics)

    @hookimpl
    def qpipe_run_end(self, run: Run) -> None:
        """Finish them."""
        self._finish()

    @hookimpl
    def qpipe_run_error(self, run: Run, error: BaseException) -> None:
        """Finish them, so that nothing stays in a buffer."""
        self._finish()

    def _log(self, kind: str, metrics: Mapping[str, float]) -> None:
        values = {f"{kind}/{name}": float(value) for name, value in metrics.items() if math.isfinite(float(value))}
        for tracker in self._trackers if values else ():
            tracker.log(values, step=self._taken)

    def _finish(self) -> None:
        while self._trackers:
            self._trackers.pop().finish()
