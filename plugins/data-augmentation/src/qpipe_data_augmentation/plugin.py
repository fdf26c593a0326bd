"""The plugin `data-augmentation`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qpipe import CheckpointError, ConfigError, Engine, Options, Plugin, Run, RunConfig, Task, TaskData, hookimpl
from qpipe_data_augmentation.augment import Source, augment
from qpipe_data_augmentation.blocks import EXAMPLE
from qpipe_data_augmentation.budgets import BUDGETS, trials_of
from qpipe_data_augmentation.options import DataAugmentationOptions

FILE = "data-augmentation.json"
"""What a run leaves in its directory: examples and optimizer steps of its budget."""

logger = logging.getLogger("qpipe.data-augmentation")


class DataAugmentation(Plugin):
    """Trains for a named budget: longer on the original data, or on sentences with some words replaced."""

    Options: ClassVar[type[Options]] = DataAugmentationOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._spent: dict[str, Any] = {}
        self._rows: str | None = None

    @hookimpl
    def qpipe_training_data(self, config: RunConfig, task: Task, data: TaskData, engine: Engine) -> TaskData:
        """Augment where the budget says so, and set the length of the training.

        Raises:
            ConfigError: the task has no texts to augment, or no source of candidates is named.
            ModelError: the masked language model is none.
            DataError: the file of neighbours is missing or damaged, or the disk is full.
        """
        budget = BUDGETS[self.options.budget]
        if budget.augmented:
            data = self._augmented(config, task, data, engine)
        steps = budget.steps(len(data.train), config.train.epochs, config.train.batch_size)
        taken = config.train.max_steps or steps
        self._spent = {"examples": len(data.train), "steps": taken}
        if engine.rank == 0:
            Path(config.out).mkdir(parents=True, exist_ok=True)
            Path(config.out, FILE).write_text(json.dumps(self._spent) + "\n", encoding="utf-8")
            unit = "augmented examples" if budget.augmented else "examples"
            reason = f", since train.max_steps comes before the budget's {steps}" if config.train.max_steps else ""
            logger.info("budget %s: %d steps on %d %s%s", self.options.budget, taken, len(data.train), unit, reason)
        return replace(data, steps=steps)

    def _augmented(self, config: RunConfig, task: Task, data: TaskData, engine: Engine) -> TaskData:
        text = data.text
        if text is None:
            raise ConfigError(
                f"task {task.name!r} has no labelled texts to augment: choose data-augmentation.budget O, O2 or O4"
            )
        rows = text.split.data.select_columns(list(text.columns))
        model, hub = self._model(config)
        source = Source(
            columns=text.columns,
            texts=lambda examples: list(zip(*(rows[examples].values()), strict=True)),
            examples=len(rows),
            options=self.options,
            trials=trials_of(task.name, self.options.trials),
            model=model,
            hub=hub,
        )
        folder = Path(self.options.folder or Path(config.out) / "augmented").expanduser()
        blocks = augment(source, folder, engine)
        self._rows, new = blocks.folder.name, blocks.read()
        labels = text.labels[np.asarray(new[EXAMPLE])]
        return replace(data, train=text.encode(new, labels))

    def _model(self, config: RunConfig) -> tuple[str, dict[str, Any]]:
        """The model that predicts words, or whose tokenizer finds them, and how to get it from the hub."""
        if self.options.model is not None:
            return self.options.model, {}
        own = config.model
        hub = {"revision": own.revision, "trust_remote_code": own.trust_remote_code}
        return (own.tokenizer or own.name) if self.options.one_piece == "neighbours" else own.name, hub

    @hookimpl
    def qpipe_state(self) -> Mapping[str, Any]:
        """Which rows the training has: their folder is named by all that decides them."""
        return {"rows": self._rows}

    @hookimpl
    def qpipe_restore(self, run: Run, state: Mapping[str, Any]) -> None:
        """Go on with the same rows only.

        Raises:
            ConfigError: the masked language model or the file of neighbours has changed under its name.
        """
        if state["rows"] != self._rows:
            raise ConfigError(
                f"data-augmentation: the checkpoint in {run.out} was trained on augmented rows {state['rows']}, and "
                f"options, model and neighbours now give {self._rows}; put back what data-augmentation.model (default: "
                "model.name) and data-augmentation.neighbours_from named, or start anew with another --out"
            )

    @hookimpl
    def qpipe_export_metadata(self, run: Run) -> Mapping[str, Any]:
        """The options, and what the budget came to.

        Raises:
            CheckpointError: the run directory's record of that is damaged.
        """
        path = run.out / FILE
        if not self._spent and path.is_file():  # a run that is exported again
            try:
                self._spent = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{path} is not valid JSON ({error}); repeat the run") from error
        return {"options": self.options.model_dump(mode="json"), **self._spent}
