from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qpipe.builtin.tasks import TASKS
from qpipe.data.loader import eval_loader, train_loader
from qpipe.data.loading import TaskData
from qpipe.errors import DataError

TASK = next(task for task in TASKS if task.name == "classification")


@pytest.fixture
def data(load: Callable[..., TaskData], numbered: Callable[..., str]) -> TaskData:
    """50 training and 11 validation rows; row i has i + 1 words, so that batches can be told apart."""
    return load("classification", train=numbered(50), validation=numbered(11, "validation.csv"), max_length=60)


def ids(batch: dict[str, torch.Tensor]) -> list[int]:
    return (batch["attention_mask"].sum(1) - 3).tolist()


def steps(
    data: TaskData, batch: int, world: int, accumulation: int = 1, epoch: int = 0, seed: int = 3
) -> list[set[int]]:
    """The set of examples of each optimizer step."""
    ranks = [
        [
            ids(b)
            for b in train_loader(
                data,
                TASK,
                batch_size=batch,
                rank=rank,
                world_size=world,
                seed=seed,
                epoch=epoch,
                accumulation=accumulation,
            )
        ]
        for rank in range(world)
    ]
    assert all(len(batches) == len(ranks[0]) and len(batches) % accumulation == 0 for batches in ranks)
    return [
        {i for batches in ranks for micro in batches[start : start + accumulation] for i in micro}
        for start in range(0, len(ranks[0]), accumulation)
    ]


def test_global_batches_do_not_depend_on_the_number_of_processes(data: TaskData) -> None:
    one = steps(data, 8, 1)
    assert len(one) == 6
    assert all(len(s) == 8 for s in one)
    assert len(set.union(*one)) == 48
    assert steps(data, 4, 2) == one
    assert steps(data, 2, 4) == one
    assert steps(data, 2, 2, accumulation=2) == one


def test_order_depends_on_seed_and_epoch(data: TaskData) -> None:
    assert steps(data, 8, 1) == steps(data, 8, 1)
    assert steps(data, 8, 1) != steps(data, 8, 1, epoch=1)
    assert steps(data, 8, 1) != steps(data, 8, 1, seed=4)


def test_skip_leaves_out_the_start_without_loading_it(data: TaskData) -> None:
    arguments = {"batch_size": 4, "rank": 1, "world_size": 2, "seed": 1, "epoch": 2}
    whole = [ids(b) for b in train_loader(data, TASK, **arguments)]
    rest = train_loader(data, TASK, **arguments, skip=2)
    assert len(rest) == len(whole) - 2
    assert [ids(b) for b in rest] == whole[2:]
    assert list(train_loader(data, TASK, **arguments, skip=len(whole))) == []


@pytest.mark.parametrize(("examples", "sizes"), [(20, [8, 8, 4]), (16, [8, 8]), (3, [3]), (50, [8] * 6 + [2])])
def test_the_first_examples_of_the_order(data: TaskData, examples: int, sizes: list[int]) -> None:
    options = {"batch_size": 8, "rank": 0, "world_size": 1, "seed": 3, "epoch": 0}
    batches = [ids(b) for b in train_loader(data, TASK, **options, examples=examples)]
    order = [i for b in train_loader(data, TASK, **{**options, "batch_size": 1}) for i in ids(b)]
    assert [len(b) for b in batches] == sizes and [i for b in batches for i in b] == order[:examples]


def test_global_random_state_is_untouched(data: TaskData) -> None:
    before = torch.get_rng_state()
    list(train_loader(data, TASK, batch_size=8, rank=0, world_size=1, seed=1, epoch=0))
    list(eval_loader(data, batch_size=8, rank=0, world_size=1))
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_examples_for_a_step(data: TaskData) -> None:
    with pytest.raises(DataError, match=r"50 examples.* 64 = 16 per process x 2 .* x 2 micro"):
        train_loader(data, TASK, batch_size=16, rank=0, world_size=2, seed=0, epoch=0, accumulation=2)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_evaluation_sees_each_row_once_in_equal_batches(data: TaskData, world: int, batch: int) -> None:
    loaders = [list(eval_loader(data, batch_size=batch, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(batches) for batches in loaders}) == 1
    assert len({len(indices) for batches in loaders for _, indices in batches}) == 1
    in_order = [int(i) for k in range(len(loaders[0])) for batches in loaders for i in batches[k][1]]
    assert [i for i in in_order if i >= 0] == list(range(11))
    for batches in loaders:
        for rows, indices in batches:
            assert ids(rows) == indices.clamp(min=0).tolist()
