"""Calibrate: passes over training data that set static ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qpipe.data.loader import train_loader
from qpipe.run import Run


def to_device(batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Move a batch; float inputs (images) also take the model's type."""
    device, dtype = run.engine.device, run.engine.dtype
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
    """Run every calibration pass that plugins ask for, on training batches that all processes share out.

    Raises:
        TrainingError: a pass met non-finite values or saw no data.
    """
    passes = run.host.collect("qpipe_calibration", run=run)
    context = run.instruments.context
    for wanted in passes.values():
        wanted.start()
        with inference(run):
            for batch in calibration_batches(run, wanted.batches):
                context.kept = batch.get("attention_mask")
                run.engine.forward(**inputs_of(batch))
        context.kept = None
        wanted.finish()


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
