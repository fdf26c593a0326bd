from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qpipe.builtin.tasks import TASKS, Tasks
from qpipe.data import metrics
from qpipe.errors import TrainingError
from qpipe.stages.evaluate import predict

REFERENCES = np.array([1, 1, 1, 0, 0, 1])
PREDICTIONS = np.array([1, 0, 1, 0, 1, 1])  # 3 true positives, 1 true negative, 1 false each


def test_classification() -> None:
    assert metrics.accuracy(PREDICTIONS, REFERENCES) == pytest.approx(4 / 6)
    assert metrics.f1(PREDICTIONS, REFERENCES) == pytest.approx(3 / 4)
    assert metrics.macro_f1(PREDICTIONS, REFERENCES) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert metrics.matthews(PREDICTIONS, REFERENCES) == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_logits_count_as_their_largest_class() -> None:
    logits = np.eye(2)[PREDICTIONS] * 3 - 1
    for metric in (metrics.accuracy, metrics.f1, metrics.macro_f1, metrics.matthews):
        assert metric(logits, REFERENCES) == metric(PREDICTIONS, REFERENCES)


def test_regression() -> None:
    x = np.array([[0.0], [1.0], [2.0], [10.0]])
    y = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.spearman(x, y) == pytest.approx(1)
    assert metrics.pearson(x, y) == pytest.approx(np.corrcoef(x[:, 0], y)[0, 1])
    assert metrics.mean_squared_error(x, y) == pytest.approx((1 + 1 + 1 + 36) / 4)
    assert metrics.pearson(np.ones(4), y) == 0
    assert metrics.spearman(np.ones(4), y) == 0


def test_perplexity_of_uniform_predictions_is_the_vocabulary() -> None:
    labels = torch.tensor([[1, 2, 3, 0], [4, 5, -100, -100]])
    losses, counts = metrics.token_losses(torch.zeros(2, 4, 7), labels)
    assert counts.tolist() == [3, 1]
    assert metrics.perplexity(losses.numpy(), counts.numpy()) == pytest.approx(7, rel=1e-6)


def test_token_losses_predict_the_next_token() -> None:
    labels = torch.tensor([[3, 1, 2]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = logits[0, 1, 2] = 50
    losses, counts = metrics.token_losses(logits, labels)
    assert metrics.perplexity(losses.numpy(), counts.numpy()) == pytest.approx(1)


def test_diverged_predictions_are_refused() -> None:
    with pytest.raises(TrainingError, match="NaN"):
        metrics.accuracy(np.array([[np.nan, 0.0]]), np.array([0]))
    with pytest.raises(TrainingError, match="at least one"):
        metrics.pearson(np.array([]), np.array([]))


def test_tasks_offered() -> None:
    tasks = {task.name: task for task in Tasks().qpipe_tasks()}
    assert len(tasks) == len(TASKS)
    official = {
        "cola": ["matthews"],
        "sst2": ["accuracy"],
        "mrpc": ["accuracy", "f1"],
        "stsb": ["pearson", "spearman"],
        "qqp": ["accuracy", "f1"],
        "mnli": ["accuracy"],
        "qnli": ["accuracy"],
        "rte": ["accuracy"],
    }
    assert {name: [m.name for m in tasks[name].metrics] for name in official} == official
    assert tasks["mnli"].splits == ("train", "validation_matched")
    assert tasks["mnli"].num_labels == 3
    assert tasks["stsb"].kind == "regression"
    assert not tasks["causal-lm"].metrics[0].higher_is_better


@pytest.mark.parametrize("kind", ["classification", "image-classification", "regression"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_no_class(kind, bad):
    """The largest of them would be one like any other, and the model would seem as good as chance."""
    logits = torch.tensor([[1.0, 0.0], [bad, 0.0]]) if kind != "regression" else torch.tensor([[1.0], [bad]])
    with pytest.raises(TrainingError, match="predictions contain NaN or infinity"):
        predict(kind, logits, torch.tensor([0, 1]))
