"""Joint intent and slot labelling: alignment of words and tokens, the label table, and errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from qpipe.builtin.tasks import TASKS
from qpipe.config import resolve
from qpipe.data.joint import decoder, first_intent, predict_joint
from qpipe.data.loading import TaskData, load_data
from qpipe.errors import ConfigError, DataError
from qpipe.testing import tiny_model

TASK = next(task for task in TASKS if task.name == "intent-slot")
Row = tuple[Any, Any, Any]
ROWS: list[Row] = [
    (["the", "good-fun", "film"], ["O", "B-praise", "O"], "like"),
    (["bad", "dull", "plot"], ["B-blame", "I-blame", "O"], "hate"),
]


@pytest.fixture
def joint(tmp_path: Path) -> Callable[..., TaskData]:
    """`joint(rows, validation=None, **data section)`."""
    model = tiny_model(tmp_path / "model")

    def write(rows: list[Row], name: str) -> str:
        path = tmp_path / name
        keys = ("tokens", "slot_tags", "intent")
        path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
        return str(path)

    def load(rows: list[Row], validation: list[Row] | None = None, **data: Any) -> TaskData:
        files = {"train": write(rows, "train.jsonl"), "validation": write(validation or rows, "dev.jsonl")}
        section = {"max_length": 16, **files, **data}
        return load_data(resolve({"model": {"name": str(model)}, "task": "intent-slot", "data": section}), TASK)

    return load


def test_labels_sit_at_the_first_piece_of_each_word(joint: Callable[..., TaskData]) -> None:
    data = joint(ROWS)
    assert data.label_names == ("O", "B-blame", "B-praise", "I-blame", "intent:hate", "intent:like")
    assert data.num_labels == 6 and first_intent(data.label_names) == 4
    # [CLS] the good - fun film [SEP]: the intent, and one label for each word
    assert list(data.train[0]["labels"]) == [5, 0, 2, -100, -100, 0, -100]
    assert list(data.train[1]["labels"]) == [4, 1, 3, 0, -100]
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 7)
    assert batch["labels"][1].tolist() == [4, 1, 3, 0, -100, -100, -100]
    assert batch["attention_mask"].sum(1).tolist() == [7, 5]


def test_padding_to_the_full_length(joint: Callable[..., TaskData]) -> None:
    data = joint(ROWS, pad_to_max_length=True)
    assert data.collate([data.train[0]])["labels"].shape == (1, 16)


def test_texts_with_blanks_are_lists(joint: Callable[..., TaskData]) -> None:
    texts: list[Row] = [(" ".join(words), " ".join(tags), intent) for words, tags, intent in ROWS]
    assert list(joint(texts).train["labels"]) == list(joint(ROWS).train["labels"])


def test_class_labels_are_read_by_name(joint: Callable[..., TaskData], tmp_path: Path) -> None:
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-praise", "B-blame", "I-blame"]))
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "slot_tags": tags, "intent": datasets.Value("string")}
    )
    columns = {"tokens": [r[0] for r in ROWS], "slot_tags": [[0, 1, 0], [2, 3, 0]], "intent": [r[2] for r in ROWS]}
    path = tmp_path / "named.parquet"
    datasets.Dataset.from_dict(columns, features).to_parquet(path)
    data = joint(ROWS, train=str(path))
    assert data.label_names == joint(ROWS).label_names
    assert list(data.train["labels"]) == list(joint(ROWS).train["labels"])


def test_what_only_the_validation_split_has_counts_as_an_error(joint: Callable[..., TaskData]) -> None:
    data = joint(ROWS, [(["the", "film"], ["O", "B-thing"], "other")])
    assert data.num_labels == 6 and "B-thing" not in data.label_names
    assert list(data.validation[0]["labels"]) == [7, 0, 6, -100]
    assert data.decode is not None
    labels = np.array([[7, 0, 6, -100]])
    _, names = data.decode(labels, labels)
    assert names.tolist() == [["intent:other", "O", "B-thing", ""]]
    assert np.array_equal(data.decode(labels, labels)[0], names)


def test_prediction_reads_intents_at_the_first_token_only() -> None:
    names = ("O", "B-x", "intent:a", "intent:b")
    logits = torch.tensor([[[9.0, 0, 1, 2], [0, 1, 9, 0], [3, 1, 0, 9], [0, 5, 0, 0]]])
    labels = torch.tensor([[2, 0, 1, -100]])
    predicted, expected = predict_joint(logits, labels, names)
    assert predicted.tolist() == [[3, 1, 0, -100]]
    ours, theirs = decoder(names)(predicted.numpy(), expected.numpy())
    assert ours.tolist() == [["intent:b", "B-x", "O", ""]]
    assert theirs.tolist() == [["intent:a", "O", "B-x", ""]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((["the", "film"], ["O"], "like"), r"row 2 \(from 0\).*2 words .* 1 tags"),
        (([], [], "like"), "0 words"),
        ((["the"], ["praise"], "like"), "tag 'praise' in column 'slot_tags' is not of the form O, B-NAME or I-NAME"),
        ((["the"], ["B-"], "like"), "tag 'B-'"),
        ((["the"], ["O"], None), "column 'intent' holds None"),
        ((["the", ""], ["O", "O"], "like"), "column 'tokens' holds ''"),
        ((["the"] * 15, ["O"] * 15, "like"), "17 tokens, more than data.max_length = 16.*raise"),
        ((["\u200b", "the"], ["O", "O"], "like"), "the tokenizer drops one of the words"),
    ],
)
def test_rows_that_cannot_be_used(row: Row, message: str, joint: Callable[..., TaskData]) -> None:
    with pytest.raises(DataError, match=message):
        joint([*ROWS, row])


def test_missing_columns_name_the_key(joint: Callable[..., TaskData]) -> None:
    with pytest.raises(DataError, match=r"no column 'tags'.*data.tag_column"):
        joint(ROWS, tag_column="tags")
    with pytest.raises(DataError, match=r"no column 'words'.*data.text_columns"):
        joint(ROWS, text_columns=["words"])
    with pytest.raises(DataError, match=r"no column 'act'.*data.label_column"):
        joint(ROWS, label_column="act")


def test_intents_can_be_dropped(joint: Callable[..., TaskData]) -> None:
    assert joint([*ROWS, *ROWS], keep_labels=["like"]).label_names == ("O", "B-praise", "intent:like")


def test_a_tokenizer_without_leading_special_token_is_refused(joint: Callable[..., TaskData], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "the": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    fast.save_pretrained(tmp_path / "plain")
    joint(ROWS)
    section = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "dev.jsonl"), "max_length": 16}
    config = resolve({"model": {"name": str(tmp_path / "plain")}, "task": "intent-slot", "data": section})
    with pytest.raises(ConfigError, match=r"special token such as \[CLS\] first"):
        load_data(config, TASK)
