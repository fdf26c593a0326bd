"""Metrics of joint intent and slot labelling: numpy arrays of texts in, one float out.

Predictions and references are `[examples, tokens]`: first the intent, then the BIO tags of the words, and an empty text
where there is no label. A slot is a span of words with a name; it is right if name and span are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qpipe.errors import TrainingError

Span = tuple[str, int, int]
"""Name, first word, and the word after the last."""


def spans(tags: Sequence[str]) -> set[Span]:
    """The slots of a row of tags, by the rules of the CoNLL-2000 evaluation script, which seqeval follows too.

    A slot starts at `B-x`, and at an `I-x` that continues no `x`; it ends where the next tag does not continue it.
    """
    found, name, start = set(), "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if name and (prefix != "I" or kind != name):
            found.add((name, start, position))
            name = ""
        if prefix != "O" and not name:
            name, start = kind, position
    return found


def _rows(predictions: Any, references: Any) -> Iterator[tuple[bool, set[Span], set[Span]]]:
    """Of each example: is the intent right, the predicted slots, and the true ones."""
    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.size == 0:
        raise TrainingError("a metric needs at least one prediction")
    for ours, theirs in zip(predicted, expected, strict=True):
        labelled = theirs[1:] != ""
        yield ours[0] == theirs[0], spans(ours[1:][labelled]), spans(theirs[1:][labelled])


def slot_f1(predictions: Any, references: Any) -> float:
    """F1 of all slots of the corpus together, 0..1; 0 if no slot is right."""
    right = proposed = true = 0
    for _, ours, theirs in _rows(predictions, references):
        right, proposed, true = right + len(ours & theirs), proposed + len(ours), true + len(theirs)
    return 2 * right / (proposed + true) if right else 0.0


def intent_accuracy(predictions: Any, references: Any) -> float:
    """Part of the examples whose intent is right, 0..1."""
    return float(np.mean([intent for intent, _, _ in _rows(predictions, references)]))


def exact_match(predictions: Any, references: Any) -> float:
    """Part of the examples whose intent and slots are all right, 0..1; "sentence accuracy" in the literature."""
    return float(np.mean([intent and ours == theirs for intent, ours, theirs in _rows(predictions, references)]))


def semer(predictions: Any, references: Any) -> float:
    """Semantic error rate (D + I + S) / (slots + intents of the references) over the corpus; 0 is best, no upper limit.

    A wrong intent is a substitution. A slot with the right name on the wrong words is one too; other slots that are
    missing are deletions (D), and other slots that are predicted insertions (I). Su et al., "A re-ranker scheme for
    integrating large scale NLU models" (2018), section 4; the intent counts as a slot of its own.
    """
    errors = total = 0
    for intent, ours, theirs in _rows(predictions, references):
        missing = Counter(name for name, _, _ in theirs - ours)
        extra = Counter(name for name, _, _ in ours - theirs)
        # Of each name min(missing, extra) are substitutions, and the rest deletions or insertions.
        errors += (not intent) + (missing | extra).total()
        total += 1 + len(theirs)
    return errors / total
