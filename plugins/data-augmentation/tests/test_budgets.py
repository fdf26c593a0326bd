"""Table 2 of the Teacher Intervention paper, from tables 6 and 7: iterations by budget and task."""

import pytest
from qpipe_data_augmentation import AugmentationOptions
from qpipe_data_augmentation.budgets import BUDGETS, trials_of

PAPER = {
    # task: (examples, augmented examples, batch size, iterations at O, A, C)
    "cola": (8551, 213212, 16, 1603, 13325, 159909),
    "rte": (2490, 142991, 32, 233, 4468, 53621),
    "mrpc": (3668, 225630, 32, 343, 7050, 84611),
    "stsb": (5749, 322121, 32, 538, 10066, 120795),
}


@pytest.mark.parametrize("task", PAPER)
def test_iterations_of_table_2(task):
    examples, augmented, batch, *expected = PAPER[task]
    found = [
        BUDGETS[name].steps(augmented if BUDGETS[name].augmented else examples, 3.0, batch) for name in ("O", "A", "C")
    ]
    assert found == expected


@pytest.mark.parametrize(("name", "times"), [("O2", 2), ("O4", 4)])
def test_longer_budgets_on_the_original_data(name, times):
    assert BUDGETS[name].steps(32 * 700, 3.0, 32) == times * 3 * 700
    assert not BUDGETS[name].augmented


def test_other_epochs():
    """C is as many passes as O4; A is always one."""
    assert [BUDGETS[name].steps(320, 0.5, 32) for name in ("O", "O2", "O4", "A", "C")] == [5, 10, 20, 10, 20]
    assert BUDGETS["O"].steps(3, 0.5, 32) == 1
    assert [BUDGETS["O"].steps(*case) for case in ((100, 2.3, 10), (90, 0.7, 1), (100, 0.57, 1))] == [23, 63, 57]


def test_the_defaults_are_those_of_tinybert():
    """M, p, and N of every task of GLUE; Jiao et al. (2020), section 4.2 and the published code."""
    options = AugmentationOptions()
    assert (options.candidates, options.probability, options.trials) == (15, 0.4, None)
    few = {"sst2": 20, "qnli": 20, "mnli": 10, "qqp": 10}
    for task in ("cola", "mrpc", "rte", "stsb", *few):
        assert trials_of(task, None) == few.get(task, 30), task


def test_trials_of_the_tasks():
    assert [trials_of(task, None) for task in ("rte", "sst2", "mnli", "stsb", "classification")] == [30, 20, 10, 30, 30]
    assert trials_of("rte", 4) == 4
