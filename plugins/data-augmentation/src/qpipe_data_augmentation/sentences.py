"""TinyBERT's augmentation: sentences with some words replaced (Jiao et al., "TinyBERT", 2020, algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qpipe_data_augmentation.masked import MaskedLM, Request
from qpipe_data_augmentation.words import Encoded, Splitter, encode, replaceable

Neighbours = Callable[[str, int], list[str]]
"""Takes a word and a number, and gives at most that many words to put in its place, the best first."""


@dataclass(frozen=True)
class Sentence:
    """A sentence and what its words may be replaced with.

    Attributes:
        text: as it was given.
        words: its words and signs.
        candidates: by index of a replaceable word, what may stand there; the word itself if nothing else.
    """

    text: str
    words: list[str]
    candidates: Mapping[int, list[str]]


@dataclass(frozen=True)
class Candidates:
    """Finds the candidates of sentences.

    Attributes:
        splitter: finds words.
        neighbours: for words of several tokens, or for all words without a model.
        model: for words of one token; None: there is none.
        count: M, candidates per word.
    """

    splitter: Splitter
    neighbours: Neighbours
    model: MaskedLM | None
    count: int

    def find(self, texts: Sequence[str]) -> dict[str, Sentence]:
        """Candidates for all sentences of a block at once; equal sentences are looked at once."""
        unique = dict.fromkeys(texts)
        words = {text: self.splitter.words(text) for text in unique}
        keys: list[tuple[str, int]] = []
        requests: list[Request] = []
        found: dict[str, dict[int, list[str]]] = {text: {} for text in unique}
        for text in unique:
            chosen = [i for i, word in enumerate(words[text]) if replaceable(word)]
            encoded = encode(self.model.tokenizer, words[text], self.model.limit) if self.model and chosen else None
            for index in chosen:
                word = words[text][index]
                found[text][index] = [word]
                place = self._place(encoded, index)
                if place is None:
                    found[text][index] = self.neighbours(word, self.count) or [word]
                elif encoded is not None and place < len(encoded.ids):
                    keys.append((text, index))
                    requests.append(Request(encoded, place))
        if self.model is not None:
            for (text, index), tokens in zip(keys, self.model.candidates(requests, self.count), strict=True):
                found[text][index] = tokens or found[text][index]
        return {text: Sentence(text, words[text], found[text]) for text in unique}

    @staticmethod
    def _place(encoded: Encoded | None, index: int) -> int | None:
        """The token of a word of one token; None for others, which have neighbours."""
        if encoded is None or len(encoded.places[index]) != 1:
            return None
        return encoded.places[index][0]


def variants(sentence: Sentence, trials: int, probability: float, rng: random.Random) -> list[str]:
    """The sentence itself, then at most `trials` others, in each of which words are replaced by chance.

    Every replaceable word draws its candidate first and then whether it is used, as in the reference, so that equal
    generators give equal sentences.
    """
    result = [sentence.text]
    for _ in range(trials):
        words = list(sentence.words)
        for index, candidates in sentence.candidates.items():
            candidate = rng.choice(candidates)
            if rng.random() < probability:
                words[index] = candidate
        text = " ".join(words)
        if text not in result:
            result.append(text)
    return result


def augmented(
    texts: Sequence[str],
    found: Mapping[str, Sentence],
    trials: int,
    probability: float,
    rng: random.Random,
    in_place: bool = False,
) -> Iterator[list[str]]:
    """Rows of one example: each of its sentences in turn takes all its variants, while the others stay as they are.

    Args:
        texts: the one or two sentences of the example.
        found: candidates, by sentence.
        trials: N, new sentences per sentence.
        probability: p, that a word is replaced.
        rng: of this example only.
        in_place: True leaves a sentence's last variant in place while the next is varied, as the reference does.
    """
    row = list(texts)
    for column, text in enumerate(texts):
        for variant in variants(found[text], trials, probability, rng):
            row[column] = variant
            yield list(row)
        if not in_place:
            row[column] = text
