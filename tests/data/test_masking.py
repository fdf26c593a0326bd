"""Masking depends on seed, epoch and row; its shares are those of BERT."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qpipe.builtin.tasks import TASKS
from qpipe.config import resolve
from qpipe.data.loader import eval_loader, train_loader
from qpipe.data.loading import TaskData, find_task, load_data
from qpipe.data.masking import Masking
from qpipe.errors import ConfigError
from qpipe.testing import tiny_model
from qpipe.testing.tiny import OTHER, VOCABULARY

TASK = next(task for task in TASKS if task.name == "masked-lm")
MASK = VOCABULARY.index("[MASK]")


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    """Pieces of 16 tokens; every line is a document of its own."""
    source = random.Random(0)
    lines = [" ".join(source.choices(OTHER, k=12)) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n\n")
    section = {"train": str(tmp_path / "text.txt"), "max_length": 16, "validation_fraction": 0.2}
    config = resolve({"model": {"name": str(tiny_model(tmp_path / "model"))}, "task": "masked-lm", "data": section})
    return load_data(config, TASK)


def loaded(data: TaskData, world: int = 1, seed: int = 0, epoch: int = 0, skip: int = 0) -> dict[tuple[int, ...], str]:
    """Inputs and labels by the text that they hide, over all processes."""
    found = {}
    for rank in range(world):
        options = {"rank": rank, "world_size": world, "seed": seed, "epoch": epoch, "skip": skip}
        for batch in train_loader(data, TASK, batch_size=16 // world, **options):
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                text = torch.where(labels == -100, ids, labels)
                found[tuple(text.tolist())] = json.dumps([ids.tolist(), labels.tolist()])
    return found


def test_pieces_and_batches(data: TaskData) -> None:
    assert set(data.train.column_names) == {"input_ids", "row"}
    batch = next(iter(train_loader(data, TASK, batch_size=4, rank=0, world_size=1, seed=0, epoch=0)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (4, 16)
    )
    assert (data.num_labels, data.label_names) == (0, ())


@pytest.mark.parametrize("world", [2, 4])
def test_masking_does_not_depend_on_the_number_of_processes(data: TaskData, world: int) -> None:
    assert len(loaded(data)) > 100
    assert loaded(data, world) == loaded(data)


def test_masking_depends_on_seed_and_epoch(data: TaskData) -> None:
    first = loaded(data)
    assert loaded(data) == first
    for other in (loaded(data, seed=1), loaded(data, epoch=1)):
        both = first.keys() & other.keys()
        assert len(both) > 100
        assert sum(first[text] == other[text] for text in both) < 0.05 * len(both)


def test_resuming_within_an_epoch_masks_the_same(data: TaskData) -> None:
    rest = loaded(data, skip=3)
    assert len(rest) == len(loaded(data)) - 48
    assert rest.items() <= loaded(data).items()


def test_evaluation_always_masks_the_same(data: TaskData) -> None:
    def batches(world: int) -> list[list[int]]:
        parts = [eval_loader(data, batch_size=8, rank=rank, world_size=world) for rank in range(world)]
        rows = [(int(i), [*b["input_ids"][k].tolist(), *b["labels"][k].tolist()])
                for part in parts for b, indices in part for k, i in enumerate(indices) if i >= 0]  # fmt: skip
        return [row for _, row in sorted(rows)]

    assert batches(1) == batches(1) == batches(2)
    assert any(label != -100 for row in batches(1) for label in row[16:])


def test_the_global_random_state_is_left_alone(data: TaskData) -> None:
    before = torch.get_rng_state()
    loaded(data)
    assert torch.equal(before, torch.get_rng_state())


def masked(ids: Tensor, model: Path, probability: float = 0.15) -> tuple[Tensor, Tensor]:
    from transformers import AutoTokenizer

    collate = Masking(AutoTokenizer.from_pretrained(model), probability).training(seed=0, epoch=0)
    batch = collate([{"input_ids": row, "row": number} for number, row in enumerate(ids.tolist())])
    return batch["input_ids"], batch["labels"]


def test_shares(tmp_path: Path) -> None:
    """15 % of 100,000 ordinary tokens, of which 80 % are hidden, 10 % replaced and 10 % left; special ones never."""
    ids = torch.randint(5, len(VOCABULARY), (500, 200), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")
    inputs, labels = masked(ids, tiny_model(tmp_path / "model"))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()
    count = chosen.sum().item()
    assert count / (500 * 198) == pytest.approx(0.15, abs=0.005)  # four standard deviations
    hidden, kept = (inputs[chosen] == MASK).sum().item(), (inputs[chosen] == ids[chosen]).sum().item()
    # A random token is the right one, or the mask token, once in the size of the vocabulary.
    chance = 0.1 / len(VOCABULARY)
    assert hidden / count == pytest.approx(0.8 + chance, abs=0.014)
    assert kept / count == pytest.approx(0.1 + chance, abs=0.01)
    assert masked(ids, tmp_path / "model", 0.5)[1].ne(-100).sum() / (500 * 198) == pytest.approx(0.5, abs=0.007)


def test_a_tokenizer_without_mask_token_is_refused(load: Callable[..., TaskData], csv: Callable[..., str]) -> None:
    path = csv("text", "a b c", "good bad")
    with pytest.raises(ConfigError, match="no mask token.*causal-lm"):
        load("masked-lm", train=path, validation=path, max_length=4)


def test_columns_are_those_of_the_task() -> None:
    assert find_task({TASK.name: TASK}, "masked-lm").metrics[0].name == "perplexity"
    assert not TASK.metrics[0].higher_is_better


def test_the_configured_share(tmp_path: Path, data: TaskData) -> None:
    section = {"train": str(tmp_path / "text.txt"), "max_length": 16, "mask_probability": 0.5}
    config = resolve({"model": {"name": str(tmp_path / "model")}, "task": "masked-lm", "data": section})
    options = {"batch_size": 16, "rank": 0, "world_size": 1, "seed": 0, "epoch": 0}
    labels = [batch["labels"] for batch in train_loader(load_data(config, TASK), TASK, **options)]
    assert 0.35 < float((torch.cat(labels) != -100).float().mean()) < 0.5, "of all, with special tokens"
