from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from qpipe.builtin.tasks import TASKS
from qpipe.config import resolve
from qpipe.data.loading import TaskData, find_task, load_data

WORDS = ("a", "b", "c", "good", "bad", "film", "very")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )
    folder = tmp_path / "model"
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def load(model: str) -> Callable[..., TaskData]:
    """`load(task, model=..., seed=..., **data section)`."""
    tasks = {task.name: task for task in TASKS}

    def call(task: str, model: str = model, seed: int = 0, config: Any = None, **data: Any) -> TaskData:
        section = {"name": model, "config": config or {}}
        return load_data(resolve({"model": section, "task": task, "data": data, "seed": seed}), find_task(tasks, task))

    return call


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., str]:
    """Writes a CSV file of lines and returns its path."""

    def write(*lines: str, name: str = "train.csv") -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.fixture
def numbered(csv: Callable[..., str]) -> Callable[[int], str]:
    """A file of n classification rows; row i has i % 50 + 1 words, and class i % 2."""

    def write(rows: int, name: str = "train.csv") -> str:
        return csv("text,label", *(f"{'a ' * (i % 50 + 1)},{i % 2}" for i in range(rows)), name=name)

    return write
