"""The log of a run: `metrics.jsonl`, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import CheckpointError
from qpipe.plugin import Plugin, hookimpl
from qpipe.report import format as fmt
from qpipe.report.inputs import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from qpipe.run import Run, Step


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and hand it to the operating system at once.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free some space or choose another --out") from error


def keep_rows(path: Path, last_step: int | None) -> int:
    """Drop the rows beyond a step (every row if it is None), and return how many that were.

    Raises:
        CheckpointError: the file is damaged other than by a cut-off last line.
    """
    rows = read_metrics(path)
    if rows is None:
        return 0
    kept = [row for row in rows if last_step is not None and row["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)
    return len(rows) - len(kept)


def describe_metrics(metrics: Mapping[str, float | None]) -> str:
    """`loss 0.5123  task 0.4011  lr 3.2e-05  212 samples/s`."""
    parts = []
    for name, value in metrics.items():
        if name == "samples_per_second":
            continue
        parts.append(f"{name} {'not finite' if value is None else f'{value:.4g}'}")
    speed = metrics.get("samples_per_second")
    if speed is not None:
        parts.append(f"{speed:.4g} samples/s")
    return "  ".join(parts)


class Log(Plugin):
    """Writes `metrics.jsonl` and shows progress, both on rank 0 only.

    A row is `{"time": seconds since 1970, "step": optimizer steps taken, "kind": "train" or "eval", ...}` with the
    metrics after it; a value that is not finite is null. When a run resumes, rows beyond the step it resumes from
    are dropped first, so that every step is in the file once.
    """

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._taken = 0
        self._first = 0
        self._started = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @hookimpl
    def qpipe_run_start(self, run: Run) -> None:
        """Drop rows that will be written again, and show the bar if someone is looking."""
        if run.engine.rank != 0:
            return
        resumed = run.results.get("resumed_step")
        keep_rows(run.out / METRICS_FILE, resumed)
        self._taken = self._first = resumed or 0
        self._started = time.monotonic()
        if sys.stderr.isatty():
            self._start_bar(run)
        elif resumed:
            self._say(f"resuming after step {resumed} of {run.total_steps}")

    @hookimpl
    def qpipe_step_end(self, run: Run, step: Step, metrics: Mapping[str, float]) -> None:
        """Advance; write a row if the step came with metrics, which it does every `train.log_every` steps."""
        if run.engine.rank != 0:
            return
        self._taken = step.index + 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._taken)
        if not metrics:
            return
        values = self._write(run, "train", metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, status=describe_metrics(values))
        else:
            self._say(f"step {self._position(run)}  {describe_metrics(values)}{self._time_left(run)}")

    @hookimpl
    def qpipe_evaluated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Write a row and a line."""
        if run.engine.rank == 0:
            values = self._write(run, "eval", metrics)
            self._say(f"eval at step {self._position(run)}  {describe_metrics(values)}")

    @hookimpl
    def qpipe_run_end(self, run: Run) -> None:
        """Remove the bar."""
        self._stop_bar()

    @hookimpl
    def qpipe_run_error(self, run: Run, error: BaseException) -> None:
        """Remove the bar, so that the message is readable, and say how far the run came."""
        self._stop_bar()
        if run.engine.rank == 0:
            self._say(f"stopped at step {self._position(run)}: {type(error).__name__}")

    def _write(self, run: Run, kind: str, metrics: Mapping[str, float]) -> dict[str, float | None]:
        values = {name: _number(value) for name, value in metrics.items()}
        append_row(run.out / METRICS_FILE, {"time": time.time(), "step": self._taken, "kind": kind, **values})
        return values

    def _position(self, run: Run) -> str:
        total = str(run.total_steps)
        return f"{self._taken:>{len(total)}}/{total}"

    def _time_left(self, run: Run) -> str:
        done = self._taken - self._first
        if done <= 0 or run.total_steps <= self._taken:
            return ""
        seconds = (time.monotonic() - self._started) / done * (run.total_steps - self._taken)
        return f"  {fmt.duration(seconds)} left"

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def _start_bar(self, run: Run) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._stop_bar()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("train", total=run.total_steps, completed=self._taken, status="")
        self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
