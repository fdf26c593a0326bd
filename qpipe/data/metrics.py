"""Metrics of tasks: numpy arrays in, one float out.

Predictions of classifiers are class ids `[examples]` or logits `[examples, labels]`; of regression `[examples]` or
`[examples, 1]`. For language models see `perplexity`, for slots `qpipe.data.slots`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qpipe.errors import TrainingError

IGNORED = -100
"""The label of tokens for which nothing is predicted."""


def _finite(values: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(values)
    if array.size == 0:
        raise TrainingError("a metric needs at least one prediction")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise TrainingError("predictions contain NaN or infinity: the model has diverged; lower train.learning_rate")
    return array


def _classes(predictions: Any) -> np.ndarray[Any, Any]:
    array = _finite(predictions)
    return array.argmax(-1) if array.ndim == 2 else array


def _pair(predictions: Any, references: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return _finite(predictions).reshape(-1).astype(np.float64), _finite(references).reshape(-1).astype(np.float64)


def accuracy(predictions: Any, references: Any) -> float:
    """Part of the examples whose class is right, 0..1."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(np.asarray(references), _classes(predictions)))


def f1(predictions: Any, references: Any) -> float:
    """F1 of class 1 of two, 0..1; 0 if class 1 is never predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(np.asarray(references), _classes(predictions), zero_division=0.0))


def macro_f1(predictions: Any, references: Any) -> float:
    """Mean of the F1 of each class, 0..1."""
    from sklearn.metrics import f1_score

    return float(f1_score(np.asarray(references), _classes(predictions), average="macro", zero_division=0.0))


def matthews(predictions: Any, references: Any) -> float:
    """Matthews correlation, -1..1; 0 where one class only is predicted."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(np.asarray(references), _classes(predictions)))


def pearson(predictions: Any, references: Any) -> float:
    """Pearson correlation, -1..1; 0 where either side is constant, as correlation is undefined there."""
    from scipy.stats import pearsonr

    left, right = _pair(predictions, references)
    return float(pearsonr(left, right).statistic) if np.ptp(left) > 0 and np.ptp(right) > 0 else 0.0


def spearman(predictions: Any, references: Any) -> float:
    """Spearman rank correlation, -1..1; 0 where either side is constant."""
    from scipy.stats import spearmanr

    left, right = _pair(predictions, references)
    return float(spearmanr(left, right).statistic) if np.ptp(left) > 0 and np.ptp(right) > 0 else 0.0


def mean_squared_error(predictions: Any, references: Any) -> float:
    """Mean squared difference, in squared units of the label."""
    left, right = _pair(predictions, references)
    return float(np.mean((left - right) ** 2))


def perplexity(predictions: Any, references: Any) -> float:
    """Exponential of the mean negative log-likelihood per predicted token, 1..infinity.

    Args:
        predictions: summed negative log-likelihood of each example in nats, `[examples]` (see `token_losses`), or the
            first column of what `masked_losses` gives.
        references: number of predicted tokens of each example, `[examples]`.
    """
    losses, counts = _pair(_column(predictions, 0), references)
    if counts.sum() <= 0:
        raise TrainingError("perplexity needs at least one predicted token")
    mean = float(losses.sum() / counts.sum())
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows a double above 709


def _column(values: Any, number: int) -> np.ndarray[Any, Any]:
    array = _finite(values)
    return array[:, number] if array.ndim == 2 else array


def masked_accuracy(predictions: Any, references: Any) -> float:
    """Part of the masked tokens that are predicted right, 0..1; takes what `masked_losses` gives."""
    right, counts = _pair(_column(predictions, 1), references)
    if counts.sum() <= 0:
        raise TrainingError(
            "no token of the validation split is masked: give more data, or raise data.mask_probability"
        )
    return float(right.sum() / counts.sum())


def masked_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """What `perplexity` and `masked_accuracy` take, from the logits of a masked language model.

    Args:
        logits: tensor `[examples, tokens, vocabulary]`.
        labels: tensor `[examples, tokens]` of token ids, -100 where nothing is predicted.

    Returns:
        `[examples, 2]` float64: summed negative log-likelihood, and number of tokens predicted right; and the number
        of predicted tokens `[examples]` in int64.
    """
    import torch
    import torch.nn.functional as F

    masked = labels != IGNORED
    chosen, targets = logits[masked].float(), labels[masked]
    values = torch.zeros(*labels.shape, 2, dtype=torch.float64, device=logits.device)
    values[masked] = torch.stack(
        [F.cross_entropy(chosen, targets, reduction="none").double(), (chosen.argmax(-1) == targets).double()], -1
    )
    return values.sum(1), masked.sum(1)


def token_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """What `perplexity` takes, from the logits of a causal language model.

    Args:
        logits: tensor `[examples, tokens, vocabulary]`.
        labels: tensor `[examples, tokens]` of token ids, -100 where nothing is predicted; not shifted.

    Returns:
        Summed negative log-likelihood `[examples]` in float64 and number of predicted tokens `[examples]` in int64.
    """
    import torch.nn.functional as F

    targets = labels[:, 1:]
    shifted = logits[:, :-1].float().transpose(1, 2)
    losses = F.cross_entropy(shifted, targets, ignore_index=-100, reduction="none")
    return losses.double().sum(1), (targets != -100).sum(1)
