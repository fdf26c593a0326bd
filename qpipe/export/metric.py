"""The metric of a checkpoint, from the data that the run was evaluated on."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qpipe.config import resolve
from qpipe.errors import QpipeError
from qpipe.files import is_disk_problem

if TYPE_CHECKING:
    from qpipe.data.loading import TaskData
    from qpipe.types import Metric

RELATIVE_TOLERANCE = 0.005
"""Batches of another size or machine round otherwise; a wrong weight moves a metric further."""

PART = 2**28
"""Bytes of validation batches that are in memory at a time: pixels of a whole split can be tens of gigabytes."""

FLIPS = 3
"""Examples whose prediction may change where all of a model is computed with other rounding; else one."""


@dataclass(frozen=True)
class Prepared:
    """Validation batches on disk, or the reason why there are none.

    Attributes:
        batches: folder of safetensors files with `<batch>.<input>`, or None.
        kind: of the task.
        metrics: of the task.
        decode: `TaskData.decode`.
        reason: why there are no batches.
    """

    batches: Path | None = None
    kind: str = ""
    metrics: tuple[Metric, ...] = ()
    decode: Callable[[Any, Any], tuple[Any, Any]] | None = None
    reason: str = ""


def prepare(
    about: Mapping[str, Any], target: Path, trust_remote_code: bool = False, labels: Sequence[str] = ()
) -> Prepared:
    """Write the validation batches of the recorded run into the folder `target`.

    Args:
        about: contents of `qpipe.json`; needs `config` and `metrics`.
        target: folder to make.
        labels: names of the classes, as the checkpoint's configuration has them.
        trust_remote_code: let the tokenizer or configuration named in `about` run code of its own, if the run did.
    """
    if not isinstance(about.get("config"), Mapping) or not about.get("metrics"):
        return Prepared(reason="qpipe.json records no run configuration with metrics")
    from qpipe.data.loading import find_task, load_in_order
    from qpipe.host import load_plugins

    try:
        config = resolve(about["config"])
        trusted = trust_remote_code and config.model.trust_remote_code  # what a file says of itself is no permission
        config = config.model_copy(update={"model": config.model.model_copy(update={"trust_remote_code": trusted})})
        task = find_task(load_plugins(config.plugins).collect("qpipe_tasks"), config.task)
        data = load_in_order(config, task, labels)
    except (QpipeError, OSError, ImportError) as error:
        return Prepared(reason=f"the data of the run cannot be loaded here: {error}")
    try:
        write_batches(data, config.train.eval_batch_size, target)
    except (OSError, SafetensorError) as error:
        if not is_disk_problem(error):
            raise
        shutil.rmtree(target, ignore_errors=True)
        return Prepared(
            reason=f"the validation data cannot be written to {tempfile.gettempdir()} ({error}); set TMPDIR to a "
            "folder with more room"
        )
    return Prepared(target, task.kind, task.metrics, data.decode)


def write_batches(data: TaskData, size: int, folder: Path) -> None:
    """Write the validation split in batches, in files of about `PART` bytes.

    Args:
        data: of the run.
        size: examples in each batch.
        folder: to make.
    """
    folder.mkdir()
    rows: Any = data.validation
    part: dict[str, Tensor] = {}
    for number, start in enumerate(range(0, len(rows), size)):
        batch = data.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        part |= {f"{number:06d}.{key}": value.contiguous() for key, value in batch.items()}
        if start + size >= len(rows) or sum(value.nbytes for value in part.values()) >= PART:
            save_file(part, folder / f"part-{number:06d}.safetensors")
            part = {}


def compare_metrics(
    about: Mapping[str, Any], prepared: Prepared, predictions: Tensor, references: Tensor, rounded: bool = False
) -> tuple[bool, str, dict[str, float]]:
    """Compute the task's metrics and compare those that were recorded: `(agrees, detail, values)`.

    Args:
        about: contents of `qpipe.json`.
        prepared: what `prepare` returned.
        predictions: `[examples, ...]` from the fresh process.
        references: `[examples, ...]`.
        rounded: the model was computed with other rounding, such as on another device, so that examples whose logits
            nearly tie may flip.
    """
    recorded = about["metrics"]
    known: Sequence[Metric] = [m for m in prepared.metrics if m.name in recorded]
    if not known:
        return False, f"the recorded metrics {sorted(recorded)} are not those of task {about.get('task')}", {}
    arrays = predictions.numpy(), references.numpy()
    if prepared.decode is not None:
        arrays = prepared.decode(*arrays)
    parts, passed = [], True
    values: dict[str, float] = {}
    for metric in known:
        value = values[metric.name] = float(metric.fn(*arrays))
        expected = float(recorded[metric.name])
        flips = FLIPS if rounded else 1
        allowed = max(RELATIVE_TOLERANCE * max(1.0, abs(expected)), flips / len(references))
        passed &= math.isclose(value, expected, rel_tol=0.0, abs_tol=allowed)
        parts.append(f"{metric.name} {value:.6g}, recorded {expected:.6g}, allowed difference {allowed:.2g}")
    return passed, f"{len(references)} examples: {'; '.join(parts)}", values
