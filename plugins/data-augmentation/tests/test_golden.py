"""The reference's own results: candidates, sentences and rows."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from qpipe_data_augmentation.sentences import augmented, variants
from qpipe_data_augmentation.words import stop_words

GOLDEN = json.loads((Path(__file__).parent / "golden" / "data_aug.json").read_text())
SENTENCES = [case for case in GOLDEN["cases"] if case["kind"] == "augment"]
(ROWS,) = [case for case in GOLDEN["cases"] if case["kind"] == "file"]


def test_there_are_cases():
    assert len(SENTENCES) == 16 and len(ROWS["output_rows"]) == 13


@pytest.mark.parametrize("case", SENTENCES, ids=lambda case: f"{case['seed']}-N{case['N']}")
@pytest.mark.parametrize("batch_size", [1, 64])
def test_candidates_and_sentences(reference, case, batch_size):
    found = reference(case["M"], batch_size).find([case["sentence"]])[case["sentence"]]
    assert found.words == case["basic_tokens"]
    assert {str(index): words for index, words in found.candidates.items()} == case["candidates"]
    assert variants(found, case["N"], case["p"], random.Random(case["seed"])) == case["result"]


def test_all_sentences_in_one_block_have_the_same_candidates(reference):
    cases = [case for case in SENTENCES if case["M"] == 15]
    candidates = reference(15)
    found = candidates.find([case["sentence"] for case in cases])
    for case in cases:
        assert {str(i): words for i, words in found[case["sentence"]].candidates.items()} == case["candidates"]
    words = sum(len(case["candidates"]) for case in cases)
    several = sum(not piece.startswith("##") and after.startswith("##") for case in cases
                  for piece, after in pairwise(case["wordpieces"]))  # fmt: skip
    masks = candidates.model.model.batches
    assert [len(batch) for batch in masks] == [words - several], "all masks go through the model at once"


def rows(reference, in_place):
    candidates, rng = reference(ROWS["M"]), random.Random(ROWS["seed"])
    result = []
    for number, one, two, label in ROWS["input_rows"][1:]:
        found = candidates.find([one, two])
        new = augmented((one, two), found, ROWS["N"], ROWS["p"], rng, in_place)
        result += [[number, *texts, label] for texts in new]
    return result


def test_rows_in_place_are_those_of_the_reference(reference):
    assert rows(reference, in_place=True) == ROWS["output_rows"][1:]


def test_by_default_sentence_1_is_itself_while_sentence_2_varies(reference):
    expected = [list(row) for row in ROWS["output_rows"][1:]]
    first = {number: one for number, one, _, _ in ROWS["input_rows"][1:]}
    seconds = {"0": range(3, 6), "1": range(9, 12)}  # rows of the reference's file that vary sentence 2
    for number, places in seconds.items():
        for place in places:
            expected[place][1] = first[number]
    assert rows(reference, in_place=False) == expected


def test_stop_words_are_those_of_the_reference():
    assert stop_words() == set(GOLDEN["stop_words"])
