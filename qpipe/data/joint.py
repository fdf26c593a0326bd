"""Joint intent classification and slot labelling, as token classification with one head.

The labels of the head are the slot tags and, behind them, the intents, whose names start with `intent:`. The label of
the first token, a special one such as [CLS], is the intent; that of the first piece of a word is its tag; other tokens
have none. Any program that can classify tokens can therefore run the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification

from qpipe.data.metrics import IGNORED
from qpipe.data.sources import Split
from qpipe.data.text import Collate, map_rows
from qpipe.errors import ConfigError, DataError

INTENT = "intent:"
"""What the name of an intent starts with, so that it can be told from a tag of the same name."""


def first_intent(names: Iterable[str]) -> int:
    """The id of the first intent, which is the number of tags."""
    return sum(not name.startswith(INTENT) for name in names)


def predict_joint(logits: Tensor, labels: Tensor, names: Iterable[str]) -> tuple[Tensor, Tensor]:
    """The most likely intent at the first token, and the most likely tag at every other.

    Args:
        logits: `[batch, tokens, labels]`.
        labels: `[batch, tokens]`, -100 where there is no label, which is then predicted there too.
        names: of the labels of the head.

    Returns:
        Predictions and references, both `[batch, tokens]` int64.
    """
    tags = first_intent(names)
    predicted = logits[..., :tags].argmax(-1)
    predicted[:, 0] = tags + logits[:, 0, tags:].argmax(-1)
    return predicted.masked_fill(labels == IGNORED, IGNORED), labels


@dataclass(frozen=True)
class JointRows:
    """Words, tags and intent of every row of a split, as text.

    Attributes:
        split: where they come from.
        words: of each row.
        tags: one for each word, `O`, `B-...` or `I-...`.
        intents: of each row, with the prefix `intent:`.
    """

    split: Split
    words: list[list[str]]
    tags: list[list[str]]
    intents: list[str]

    def names(self) -> tuple[str, ...]:
        """The tags in alphabetical order, `O` first, and behind them the intents."""
        tags = {tag for row in self.tags for tag in row}
        return ("O", *sorted(tags - {"O"}), *sorted(set(self.intents)))


def read_rows(split: Split, words: str, tags: str, intent: str) -> JointRows:
    """Read the three columns; lists of words and tags may also be texts with blanks in between.

    Raises:
        DataError: a row has no words, not one tag for each word, a tag that is not BIO, or no intent; names the row.
    """
    tag_names, intent_names = _class_names(split, tags), _class_names(split, intent)
    rows = JointRows(split, [], [], [])
    columns = zip(*(split.data[column] for column in (words, tags, intent)), strict=True)
    for position, (text, marks, meaning) in enumerate(columns):
        try:
            rows.words.append(_sequence(text, words, ()))
            rows.tags.append(_sequence(marks, tags, tag_names))
            rows.intents.append(INTENT + _text(meaning, intent, intent_names))
            _check(rows.words[-1], rows.tags[-1], words, tags)
        except DataError as error:
            raise DataError(f"{_where(split, position)}: {error}; correct or remove the row") from None
    return rows


def _where(split: Split, position: int) -> str:
    return f"{split.source}, row {int(split.rows[position])} (from 0)"


def _class_names(split: Split, column: str) -> Sequence[str]:
    feature: Any = split.data.features[column]
    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _text(value: Any, column: str, names: Sequence[str]) -> str:
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column!r} holds {value!r}, where a text is needed")
    return value.strip()


def _sequence(value: Any, column: str, names: Sequence[str]) -> list[str]:
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, Sequence | np.ndarray):
        raise DataError(f"column {column!r} holds {value!r}, where a list of texts is needed")
    return [_text(item, column, names) for item in found]


def _check(words: list[str], tags: list[str], word_column: str, tag_column: str) -> None:
    if not words or len(words) != len(tags):
        raise DataError(
            f"column {word_column!r} has {len(words)} words and column {tag_column!r} {len(tags)} tags; every row "
            "needs one tag for each word, and one word at least"
        )
    wrong = next((tag for tag in tags if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) < 3)), None)
    if wrong is not None:
        raise DataError(f"tag {wrong!r} in column {tag_column!r} is not of the form O, B-NAME or I-NAME")


def require_leading_special(tokenizer: Any) -> None:
    """Make sure that words can be told from pieces, and that a special token comes first.

    Raises:
        ConfigError: this tokenizer cannot.
    """
    tokenizer.padding_side = "right"
    if not tokenizer.is_fast or tokenizer([["a"]], is_split_into_words=True).word_ids(0)[0] is not None:
        raise ConfigError(
            "joint intent and slot labelling needs a fast tokenizer that puts a special token such as [CLS] first, "
            "where the intent is read; set model.name to an encoder such as BERT or RoBERTa"
        )


def tokenize_words(rows: JointRows, names: Sequence[str], tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Token ids and masks, and `labels` for each token.

    Args:
        rows: what is read.
        names: of all labels that occur in `rows`; their positions are their ids.
        tokenizer: see `require_leading_special`.
        max_length: most tokens in a row.

    Raises:
        DataError: a row is longer, or one of its words has no tokens: words without a prediction would not count.
    """
    ids = {name: number for number, name in enumerate(names)}
    words = datasets.Dataset.from_dict({"words": rows.words, "position": range(len(rows.words))})

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        found = tokenizer(batch["words"], is_split_into_words=True, verbose=False)
        labels = []
        for number, position in enumerate(batch["position"]):
            row = _labels(
                found.word_ids(number), [ids[tag] for tag in rows.tags[position]], ids[rows.intents[position]]
            )
            _require_complete(rows, position, row, max_length)
            labels.append(row)
        return {**found, "labels": labels}

    return map_rows(words, encode)


def _labels(words: list[int | None], tags: list[int], intent: int) -> list[int]:
    before = [None, *words[:-1]]
    tagged = (IGNORED if word is None or word == last else tags[word] for word, last in zip(words, before, strict=True))
    return [intent, *list(tagged)[1:]]


def _require_complete(rows: JointRows, position: int, labels: list[int], max_length: int) -> None:
    if len(labels) > max_length:
        raise DataError(
            f"{_where(rows.split, position)} has {len(labels)} tokens, more than data.max_length = {max_length}: the "
            "words that are cut off would count as right; raise data.max_length or remove the row"
        )
    if sum(label != IGNORED for label in labels) != len(rows.words[position]) + 1:
        raise DataError(
            f"{_where(rows.split, position)}: the tokenizer drops one of the words {rows.words[position]}; remove it "
            "with its tag, or choose another tokenizer"
        )


def joint_collate(tokenizer: Any, max_length: int | None) -> Collate:
    """Pads each batch to its longest example, or to `max_length` if given; labels `[batch, tokens]` with -100."""
    padding = "max_length" if max_length is not None else True
    collator = DataCollatorForTokenClassification(tokenizer, padding=padding, max_length=max_length)

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(collator(features))

    return collate


def decoder(names: Sequence[str]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Turns arrays of label ids into arrays of their names, with an empty text where there is no label."""
    table = np.array([*names, ""])

    def decode(predictions: Any, references: Any) -> tuple[Any, Any]:
        first, second = (np.where(ids == IGNORED, len(names), ids) for ids in (predictions, references))
        return table[first], table[second]

    return decode
