"""Tokenization and collation of text, for classification, regression and language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from qpipe.config import ModelConfig
from qpipe.data.locate import locate_model
from qpipe.data.sources import Split, quiet
from qpipe.errors import ConfigError, DataError

IN_MEMORY_ROWS = 200_000
"""Larger splits are tokenized into the cache folder of `datasets`, where processes share them."""

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def load_tokenizer(model: ModelConfig, max_length: int, **options: Any) -> Any:
    """The tokenizer that `model.tokenizer`, or else `model.name`, holds; `options` are its own.

    Raises:
        ConfigError: there is none, or one that knows no words, or `max_length` is more than it is made for.
    """
    name = model.tokenizer or model.name
    key = "model.tokenizer" if model.tokenizer else "model.name"
    revision = model.revision if name == model.name else None  # of another repository it says nothing
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            locate_model(name, key), revision=revision, trust_remote_code=model.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {name!r} ({type(error).__name__}: {error}); check {key}, or set "
            "model.tokenizer to a folder, package: path or hub name that has one"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up where there are no files
        raise ConfigError(
            f"{name!r} has no tokenizer; save the one that the model was trained with beside it, or set "
            "model.tokenizer to a folder, package: path or hub name that has it"
        )
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"data.max_length is {max_length}, but {name!r} takes at most {tokenizer.model_max_length} tokens"
        )
    return tokenizer


def require_padding(tokenizer: Any) -> None:
    """Make sure that batches can be padded: decoders without a padding token pad with their end-of-text token.

    Raises:
        ConfigError: there is neither.
    """
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has neither a padding nor an end-of-text token; set model.tokenizer to another"
        )
    tokenizer.pad_token = tokenizer.eos_token


def _texts(split: Split, column: str) -> None:
    """Raise `DataError` unless every value of the column is text."""
    for position, value in enumerate(split.data[column]):
        if not isinstance(value, str):
            what = "is missing" if value is None else f"is {value!r}, not text"
            raise DataError(
                f"{split.source}, row {int(split.rows[position])} (from 0): column {column!r} {what}; correct or "
                "remove the row, or name other columns with data.text_columns"
            )


def map_rows(data: datasets.Dataset, function: Callable[..., Any]) -> datasets.Dataset:
    """Apply a function of batches that replaces every column."""
    small = len(data) <= IN_MEMORY_ROWS
    with quiet():
        return data.map(
            function,
            batched=True,
            remove_columns=data.column_names,
            keep_in_memory=small,
            load_from_cache_file=not small,
        )


def tokenize(
    split: Split, columns: Sequence[str], tokenizer: Any, max_length: int, labels: np.ndarray[Any, Any]
) -> datasets.Dataset:
    """Token ids (and masks) of one or two text columns, truncated to `max_length`, beside `labels` `[rows]`.

    Raises:
        DataError: a text is missing or is no text.
    """
    for column in columns:
        _texts(split, column)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length))

    return _with_labels(map_rows(split.data.select_columns(list(columns)), encode), labels)


@dataclass(frozen=True)
class Texts:
    """Labelled training examples before tokenization.

    Attributes:
        split: the rows, with every column of their source.
        columns: names of the one or two columns of text.
        labels: class ids, or numbers, `[rows]`.
        tokenizer: of the model.
        max_length: tokens to which an example is truncated.
    """

    split: Split
    columns: tuple[str, ...]
    labels: np.ndarray[Any, Any]
    tokenizer: Any
    max_length: int

    def encode(self, rows: datasets.Dataset, labels: np.ndarray[Any, Any]) -> datasets.Dataset:
        """Other rows with the same columns of text, as model inputs beside `labels` `[rows]`.

        Raises:
            DataError: a text is missing or is no text.
        """
        split = Split(rows, self.split.source, np.arange(len(rows)))
        split = self.split if rows is self.split.data else split
        return tokenize(split, self.columns, self.tokenizer, self.max_length, labels)


def _with_labels(data: datasets.Dataset, labels: np.ndarray[Any, Any]) -> datasets.Dataset:
    return data.add_column("labels", labels)


def padding_collate(tokenizer: Any, max_length: int | None) -> Collate:
    """Pads each batch to its longest example, or to `max_length` if given; labels become a tensor `[batch]`."""
    collator = DataCollatorWithPadding(
        tokenizer, padding="max_length" if max_length is not None else True, max_length=max_length
    )

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(collator(features))

    return collate


def chunk(split: Split, column: str, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Consecutive pieces of `max_length` tokens, for language models; an incomplete last piece is dropped.

    Each row is a document: it keeps the tokenizer's special tokens and is followed by the end-of-text token, if there
    is one. Rows of white space are skipped. `labels` equal `input_ids`, as transformers shifts them itself.

    Raises:
        DataError: a text is missing or is no text, all are white space, or there are fewer than `max_length` tokens in
            all.
    """
    _texts(split, column)
    if not any(text.strip() for text in split.data[column]):
        raise DataError(f"{split.source} is empty: every text in column {column!r} is white space")
    end = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = [text for text in batch[column] if text.strip()]
        rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]}

    rows = map_rows(split.data.select_columns([column]), encode)["input_ids"]
    tokens = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows] or [np.empty(0, dtype=np.int32)])
    pieces = len(tokens) // max_length
    if pieces == 0:
        raise DataError(
            f"{split.source} is empty: its {len(tokens)} tokens do not fill one piece of data.max_length = {max_length}"
        )
    table = tokens[: pieces * max_length].reshape(pieces, max_length)
    return datasets.Dataset.from_dict({"input_ids": table, "labels": table})


def chunk_collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks pieces of equal length: `input_ids`, `attention_mask` and `labels`, each `[batch, tokens]` int64."""
    ids = torch.tensor([feature["input_ids"] for feature in features], dtype=torch.int64)
    labels = torch.tensor([feature["labels"] for feature in features], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
