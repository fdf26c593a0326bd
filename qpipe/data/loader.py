"""Batches of one process out of several. Neither loader touches the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from qpipe.data.loading import TaskData
from qpipe.errors import DataError
from qpipe.types import Task


def train_loader(
    data: TaskData,
    task: Task,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    skip: int = 0,
    accumulation: int = 1,
    examples: int | None = None,
) -> DataLoader[Any]:
    """The micro-batches of one epoch on one process.

    For the same seed, epoch and examples per optimizer step (`batch_size * world_size * accumulation`), every step sees
    the same set of examples on any number of processes. Examples that do not fill a whole optimizer step are left out
    of the epoch; another epoch leaves out others.

    Args:
        data: the processed splits.
        task: names the task in messages.
        batch_size: examples per micro-batch and process.
        rank: number of this process, from 0.
        world_size: number of processes.
        seed: of the order; the same on every process.
        epoch: from 0.
        skip: micro-batches at the start of the epoch that are left out without being loaded, when a run resumes.
        accumulation: micro-batches per optimizer step.
        examples: on one process, just the first so many of the order, in whole batches and a last one of the rest.

    Raises:
        DataError: the split does not fill one optimizer step.
    """
    step = batch_size * world_size * accumulation
    if len(data.train) < step:
        raise DataError(
            f"task {task.name!r}: the training split has {len(data.train)} examples, fewer than one optimizer "
            f"step needs: {step} = {batch_size} per process x {world_size} processes x {accumulation} micro-batches. "
            "Lower train.batch_size, or give more data"
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.train, world_size, rank, shuffle=True, seed=seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    if examples is None:
        micro_batches = len(data.train) // step * accumulation
        batches = list(islice(BatchSampler(sampler, batch_size, drop_last=True), skip, micro_batches))
    else:
        batches = list(BatchSampler(list(islice(sampler, examples)), batch_size, drop_last=False))
    # DataLoader draws a seed for its workers when iteration starts: from this generator, not from the global one.
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        data.train,
        batch_sampler=batches,
        collate_fn=data.collate if data.train_collate is None else data.train_collate(seed, epoch),
        generator=generator,
    )


class EvalLoader:
    """`(batch, indices)` pairs that cover the validation split once over all processes.

    Every process gets the same number of batches of the same number of examples, as engines that gather parameters need
    equally many forward calls everywhere. Batch k of all processes holds consecutive rows, process 0 first. Where rows
    run out, row 0 is repeated.

    `indices` `[examples]` int64 holds the row numbers in the validation split, and -1 for a repeated row, whose
    prediction must be ignored.
    """

    def __init__(self, data: TaskData, batch_size: int, rank: int, world_size: int) -> None:
        rows = len(data.validation)
        if rows == 0:
            raise DataError("the validation split is empty")
        self._data = data
        self.batch_size = min(batch_size, -(-rows // world_size))
        step = self.batch_size * world_size
        first = rank * self.batch_size
        self._batches = [
            [row if row < rows else -1 for row in range(start, start + self.batch_size)]
            for start in range(first, first + -(-rows // step) * step, step)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for indices in self._batches:
            features = [self._data.validation[max(index, 0)] for index in indices]
            yield self._data.collate(features), torch.tensor(indices, dtype=torch.int64)


def eval_loader(data: TaskData, *, batch_size: int, rank: int, world_size: int) -> EvalLoader:
    """The evaluation batches of one process; see `EvalLoader`.

    Raises:
        DataError: the validation split is empty.
    """
    return EvalLoader(data, batch_size, rank, world_size)
