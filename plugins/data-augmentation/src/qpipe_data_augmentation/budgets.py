"""Budgets: how long a quantized model trains, and on what.

Kim et al., "Teacher Intervention" (EACL 2023), tables 2, 6 and 7; A and C are those of XTC (Wu et al., 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qpipe import DataError


@dataclass(frozen=True)
class Budget:
    """A length of training.

    Attributes:
        augmented: True if it is spent on augmented data.
        factor: passes over the data, in units of `train.epochs`.
        passes: passes over the data, whatever `train.epochs` is; 0 where `factor` says it.
    """

    augmented: bool
    factor: int = 0
    passes: int = 0

    def steps(self, examples: int, epochs: float, batch_size: int) -> int:
        """Optimizer steps: `floor(examples * passes / batch_size)`, at least one.

        Args:
            examples: rows that are trained on.
            epochs: `train.epochs`; 3 in the paper.
            batch_size: examples per optimizer step.
        """
        seen = round(examples * (self.passes or self.factor * epochs), 6)  # 100 * 2.3 is 229.99999999999997
        return max(1, math.floor(seen / batch_size))


BUDGETS = {
    "O": Budget(augmented=False, factor=1),
    "O2": Budget(augmented=False, factor=2),
    "O4": Budget(augmented=False, factor=4),
    "A": Budget(augmented=True, passes=1),
    "C": Budget(augmented=True, factor=4),
}
"""By name. With `train.epochs: 3` their passes are the paper's: 3, 6, 12, 1 and 12."""

TRIALS = {"cola": 30, "mrpc": 30, "rte": 30, "stsb": 30, "sst2": 20, "qnli": 20, "mnli": 10, "qqp": 10}
"""New sentences per sentence and task in TinyBERT."""

DEFAULT_TRIALS = 30


def trials_of(task: str, chosen: int | None) -> int:
    """How many new sentences to try for each sentence of a task."""
    return chosen if chosen is not None else TRIALS.get(task, DEFAULT_TRIALS)


def require_task(task: str) -> None:
    """Refuse a task that TinyBERT has no number of trials for.

    Raises:
        DataError: it has none.
    """
    if task not in TRIALS:
        raise DataError(
            f"--task {task!r} is none of {', '.join(TRIALS)}; for other data leave it out, which tries "
            f"{DEFAULT_TRIALS} sentences, or set trials"
        )
