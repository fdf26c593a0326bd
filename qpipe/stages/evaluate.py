"""Evaluate: metrics of the quantized model, in the arithmetic it is deployed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpipe.data.joint import predict_joint
from qpipe.data.loader import eval_loader
from qpipe.data.metrics import IGNORED, masked_losses, token_losses
from qpipe.errors import TrainingError
from qpipe.run import Run, Step
from qpipe.stages.calibrate import inference, inputs_of, to_device
from qpipe.stages.gather import share_buffers
from qpipe.stages.teaching import capture


def evaluate(run: Run, after: Step | None = None) -> dict[str, float]:
    """The task's metrics over the validation split, the same on every process.

    Taps that observe or replace are inactive; every quantizer acts.

    Args:
        run: prepared.
        after: the training step before; where plugins wanted signals for evaluations in it, the taps act that were
            added for evaluations.
    """
    rows: list[tuple[int, Any, Any]] = []
    share_buffers(run)
    with inference(run):
        for batch, indices in eval_loader(
            run.data,
            batch_size=run.config.train.eval_batch_size,
            rank=run.engine.rank,
            world_size=run.engine.world_size,
        ):
            moved = to_device(batch, run)
            with evaluation_taps(run, moved, after):
                output = run.engine.forward(**inputs_of(moved))
            predictions, references = predict(run.task.kind, output.logits, moved["labels"], run.data.label_names)
            rows += [(int(i), p, r) for i, p, r in zip(indices, predictions, references, strict=True) if int(i) >= 0]
    merged = sorted((row for part in run.engine.gather_objects(rows) for row in part), key=lambda row: row[0])
    predicted, expected = stack([row[1] for row in merged]), stack([row[2] for row in merged])
    if run.data.decode is not None:
        predicted, expected = run.data.decode(predicted, expected)
    return {metric.name: float(metric.fn(predicted, expected)) for metric in run.task.metrics}


@contextmanager
def evaluation_taps(run: Run, batch: dict[str, Tensor], after: Step | None) -> Iterator[None]:
    """Within, taps added for evaluations act on a batch, if any plugin wanted signals of the teacher for them."""
    if after is None or not after.signals.evaluation:
        yield
        return
    run.step = Step(after.index, True, batch, signals=after.signals)
    capture(run, inputs_of(batch), after.signals.evaluation, run.step.teacher)
    run.instruments.context.evaluation_taps = True
    try:
        yield
    finally:
        run.instruments.context.evaluation_taps = False
        run.step = None


def stack(rows: Sequence[Any]) -> Any:
    """Rows as one array; those of batches of another length are filled up with -100 at their end."""
    width = max((row.shape[0] for row in rows if row.ndim), default=0)
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=IGNORED) if row.ndim else row for row in rows])


def predict(kind: str, logits: Tensor, labels: Tensor, names: Sequence[str] = ()) -> tuple[Any, Any]:
    """Predictions and references of one batch as the task's metrics take them.

    Args:
        kind: kind of the task.
        logits: `[batch, labels]`, or `[batch, tokens, labels]` where tokens are predicted.
        labels: `[batch]`, or `[batch, tokens]`.
        names: of the classes.

    Raises:
        TrainingError: logits of classes are NaN or infinite, of which the largest would be a class like any other.
    """
    if kind == "masked-lm":
        values, counts = masked_losses(logits, labels)
        return values.cpu().numpy(), counts.cpu().numpy()
    if kind != "causal-lm" and not bool(torch.isfinite(logits).all()):
        raise TrainingError(
            "the model's predictions contain NaN or infinity: training has diverged, or its numbers do not fit its "
            "type; lower train.learning_rate, or set engine.precision: float32"
        )
    if kind == "intent-slot":
        predicted, expected = predict_joint(logits, labels, names)
        return predicted.cpu().numpy(), expected.cpu().numpy()
    if kind == "causal-lm":
        losses, counts = token_losses(logits, labels)
        return losses.cpu().numpy(), counts.cpu().numpy()
    values = logits.float().cpu().numpy()
    return (values.squeeze(-1) if kind == "regression" else values.argmax(-1)), labels.cpu().numpy()


def is_better(run: Run, metrics: dict[str, float], best: float | None) -> bool:
    """True if the first metric improves on `best`; NaN never does."""
    first = run.task.metrics[0]
    value = metrics[first.name]
    if not torch.isfinite(torch.tensor(value)):
        return False
    if best is None:
        return True
    return value > best if first.higher_is_better else value < best
