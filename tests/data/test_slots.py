"""Slot metrics: spans by the CoNLL-2000 rules, corpus-wide F1 and the semantic error rate, counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qpipe.data.slots import exact_match, intent_accuracy, semer, slot_f1, spans
from qpipe.errors import TrainingError


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-a I-a O B-b", {("a", 0, 2), ("b", 3, 4)}),
        ("B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
        ("I-a I-a", {("a", 0, 2)}),  # an I- after nothing starts a slot
        ("B-a I-b I-b", {("a", 0, 1), ("b", 1, 3)}),  # so does one of another name
        ("O I-a B-a I-a", {("a", 1, 2), ("a", 2, 4)}),
        ("B-from.city-name I-from.city-name", {("from.city-name", 0, 2)}),
    ],
)
def test_spans(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert spans(tags.split()) == expected


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """The script's two tables, `endOfChunk` and `startOfChunk`, word for word."""
    found, start = set(), 0
    split = [(t[0], t[2:]) for t in ["O", *tags, "O"]]
    for i in range(1, len(split)):
        (before, old), (now, new) = split[i - 1], split[i]
        end = before != "O" and (now in ("B", "O") or old != new)
        begin = now == "B" or (now == "I" and (before == "O" or old != new))
        if end:
            found.add((old, start, i - 1))
        if begin:
            start = i - 1
    return found


def test_spans_are_those_of_the_conll_script() -> None:
    for tags in itertools.product(("O", "B-x", "I-x", "B-y", "I-y"), repeat=5):
        assert spans(tags) == conlleval(list(tags)), tags


def rows(*lines: str) -> np.ndarray:
    """Intent and tags of each example, filled up with empty texts."""
    split = [line.split() for line in lines]
    width = max(map(len, split))
    return np.array([[*line, *[""] * (width - len(line))] for line in split])


TRUE = rows("intent:go B-from O B-to I-to", "intent:ask B-day", "intent:go O")


def test_everything_right() -> None:
    assert (slot_f1(TRUE, TRUE), intent_accuracy(TRUE, TRUE), exact_match(TRUE, TRUE), semer(TRUE, TRUE)) == (
        1,
        1,
        1,
        0,
    )


def test_counted_by_hand() -> None:
    """True: 3 slots, 3 intents. Predicted: 4 slots, of which `from` is right; `to` is cut short, `day` is missed for a
    `time`, a `from` is invented; one intent is wrong."""
    predicted = rows("intent:go B-from O B-to O", "intent:go B-time", "intent:go B-from")
    assert slot_f1(predicted, TRUE) == pytest.approx(2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3))
    assert intent_accuracy(predicted, TRUE) == pytest.approx(2 / 3)
    assert exact_match(predicted, TRUE) == 0
    # substitutions: to, intent; deletions: day; insertions: time, from
    assert semer(predicted, TRUE) == pytest.approx(5 / 6)


def test_substitutions_pair_slots_of_one_name() -> None:
    true = rows("intent:go B-city B-city O B-city")
    predicted = rows("intent:go O O B-city B-city")
    # One city of three is right, one is elsewhere (S), one is missing (D).
    assert semer(predicted, true) == pytest.approx(2 / 4)
    assert semer(true, predicted) == pytest.approx(2 / 3)  # and the other way round one is inserted


def test_no_right_slot_is_zero_and_no_prediction_an_error() -> None:
    nothing = rows("intent:go O O O O", "intent:ask O", "intent:go O")
    assert slot_f1(nothing, TRUE) == 0
    assert slot_f1(nothing, nothing) == 0
    assert exact_match(nothing, TRUE) == pytest.approx(1 / 3)
    for metric in (slot_f1, intent_accuracy, exact_match, semer):
        with pytest.raises(TrainingError, match="at least one"):
            metric(np.empty((0, 3), dtype=str), np.empty((0, 3), dtype=str))


def test_labels_in_the_middle_that_count_for_nothing() -> None:
    """Later pieces of a word have no label; the words on both sides are neighbours."""
    true, predicted = rows("intent:go B-to I-to"), rows("intent:go B-to I-to")
    gap = np.array([["intent:go", "B-to", "", "", "I-to"]])
    assert slot_f1(gap, gap) == slot_f1(predicted, true) == 1
    assert semer(gap, np.array([["intent:go", "B-to", "", "", "B-to"]])) == pytest.approx(2 / 3)
