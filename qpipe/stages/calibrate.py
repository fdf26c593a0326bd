"""Calibrate: passes over training data that set static ranges.

All processes see the same data in the same batches, whatever their number, and take over what process 0 has found; so
ranges are those of one process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qpipe.data.loader import train_loader
from qpipe.errors import DataError
from qpipe.quant.quantizer import QuantContext
from qpipe.run import Run

logger = logging.getLogger("qpipe.stages")


def to_device(batch: dict[str, Tensor], run: Run, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Move a batch; float inputs (images) also take the engine's type, or another one."""
    device, dtype = run.engine.device, dtype or run.engine.dtype
    return {
        k: v.to(device, dtype) if v.is_floating_point() and k != "labels" else v.to(device) for k, v in batch.items()
    }


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with: everything but the labels."""
    return {k: v for k, v in batch.items() if k != "labels"}


@contextmanager
def inference(run: Run) -> Iterator[None]:
    """Evaluation mode without gradients; training mode is restored."""
    was_training = run.student.training
    run.student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        run.student.train(was_training)


def calibrate(run: Run) -> None:
    """Run every calibration pass that plugins ask for, on the same training batches on every process.

    Raises:
        TrainingError: a pass met non-finite values or saw no data.
    """
    passes = run.host.collect("qpipe_calibration", run=run)
    for wanted in passes.values():
        wanted.start()
        with inference(run):
            show(run, run.instruments.context, run.engine.forward, wanted.batches)
        wanted.finish()


def show(run: Run, context: QuantContext, forward: Callable[..., Any], count: int) -> None:
    """Run calibration batches through the model.

    Args:
        run: prepared.
        context: of the quantizers that look on; is told which tokens count, and which batch is under way.
        forward: takes the model's inputs.
        count: of batches.
    """
    seen = 0
    try:
        for number, batch in observed_batches(run, count):
            context.kept = None if run.config.quantization.calibration_padding else batch.get("attention_mask")
            context.calibration_batch = number
            forward(**inputs_of(batch))
            seen = number + 1
    finally:
        context.kept = None
    if seen < count and run.engine.rank == 0:
        logger.warning(
            "calibration saw %d batches and not %d: there are no more training examples; give more, or lower "
            "quantization.calibration_batches or calibration_batch_size",
            seen,
            count,
        )


def require_batch(run: Run) -> None:
    """Refuse calibration batches that are larger than the training data.

    Raises:
        DataError: they are.
    """
    wanted = run.config.quantization.calibration_batch_size
    if wanted is not None and wanted > len(run.data.train):
        raise DataError(
            f"quantization.calibration_batch_size is {wanted}, and there are {len(run.data.train)} training examples; "
            "lower it, or give more data"
        )


def observed_batches(run: Run, count: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The first `count` calibration batches as one process takes them, numbered, cut into those of evaluation.

    Raises:
        DataError: the training data make no such batch.
    """
    require_batch(run)
    train, wanted = run.config.train, run.config.quantization.calibration_batch_size
    loader = train_loader(
        run.data,
        run.task,
        batch_size=wanted or train.micro_batch_size(1),
        rank=0,
        world_size=1,
        seed=run.config.seed,
        epoch=0,
        accumulation=1 if wanted else train.accumulation,
    )
    for number, batch in enumerate(islice(loader, count)):
        size = len(next(iter(batch.values())))
        for start in range(0, size, train.eval_batch_size):
            yield number, to_device({k: v[start : start + train.eval_batch_size] for k, v in batch.items()}, run)


def micro_batches(run: Run, epoch: int = 0, skip: int = 0) -> Iterable[dict[str, Tensor]]:
    """This process's micro-batches of an epoch, without the first `skip`."""
    train = run.config.train
    return train_loader(
        run.data,
        run.task,
        batch_size=train.micro_batch_size(run.engine.world_size),
        rank=run.engine.rank,
        world_size=run.engine.world_size,
        seed=run.config.seed,
        epoch=epoch,
        skip=skip,
        accumulation=train.accumulation,
    )


def calibration_batches(run: Run, count: int) -> Iterator[dict[str, Tensor]]:
    """The first `count` batches of a fixed shuffle of the training data."""
    for index, batch in enumerate(micro_batches(run)):
        if index >= count:
            return
        yield to_device(batch, run)
