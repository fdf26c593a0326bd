"""From sentences to words, and from words to places of a masked language model's input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from qpipe import ModelError

LETTERS = re.compile(r"[a-zA-Z]+")


@cache
def stop_words() -> frozenset[str]:
    """Words that are never replaced: the English list of NLTK, with `'s` and `'re`."""
    return frozenset(files(__package__).joinpath("stop_words.txt").read_text().split())


def replaceable(word: str) -> bool:
    """True for words of the letters a to z (or A to Z) only that are no stop words."""
    return LETTERS.fullmatch(word) is not None and word.lower() not in stop_words()


@dataclass(frozen=True)
class Splitter:
    """Splits sentences into words and signs, as BERT's basic tokenizer does.

    Attributes:
        lowercase: make words lower-case.
        strip_accents: drop accents.
    """

    lowercase: bool
    strip_accents: bool

    @classmethod
    def like(cls, tokenizer: Any) -> Splitter:
        """One that changes case and accents as a tokenizer does.

        Raises:
            ModelError: it is no fast tokenizer.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast one, so words cannot be found in its tokens; "
                "set data-augmentation.model to a model with a tokenizer.json"
            )
        normalizer = backend.normalizer
        if normalizer is None:
            return cls(False, False)
        return cls(normalizer.normalize_str("A") == "a", normalizer.normalize_str("é") == "e")

    def words(self, sentence: str) -> list[str]:
        """The words and signs of a sentence, in order."""
        normal = BertNormalizer(lowercase=self.lowercase, strip_accents=self.strip_accents).normalize_str(sentence)
        return [word for word, _ in BertPreTokenizer().pre_tokenize_str(normal)]


@dataclass(frozen=True)
class Encoded:
    """A sentence as the model sees it: `[CLS] sentence [SEP] sentence [SEP]`, of which one word of the first is masked.

    Attributes:
        ids: token ids `[tokens]`.
        types: token type ids `[tokens]`; None if the model has none.
        places: positions of each word's tokens in the first half, by word.
    """

    ids: list[int]
    types: list[int] | None
    places: list[list[int]]


def encode(tokenizer: Any, words: Sequence[str], limit: int) -> Encoded:
    """A sentence twice, cut off after `limit` tokens; words beyond that keep their places, which no token fills."""
    found = tokenizer(list(words), list(words), is_split_into_words=True, truncation=False, verbose=False)
    places: list[list[int]] = [[] for _ in words]
    for position, (word, sequence) in enumerate(zip(found.word_ids(), found.sequence_ids(), strict=True)):
        if sequence == 0:
            places[word].append(position)
    types = found.get("token_type_ids")
    return Encoded(found["input_ids"][:limit], types and types[:limit], places)
