"""Outliers: activations beyond six standard deviations, and the dimensions and tokens that have them.

Bondarenko et al. (EMNLP 2021), section 3, figures 2b and 6 to 8; Kovaleva et al., "BERT Busters" (Findings of ACL
2021), for the factor 6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qpipe.types import Json

LISTED = 10
"""Dimensions and tokens that are named."""


def outliers(values: Sequence[Tensor], tokens: Sequence[Sequence[str]], deviations: float = 6.0) -> dict[str, Json]:
    """Where one site has outliers.

    Args:
        values: `[tokens, features]` per example.
        tokens: of each example as text; empty where there are none.
        deviations: how many standard deviations from the mean, both over all values of the site, an outlier is away.

    Returns:
        `mean`, `deviation`, `count`, `share` of all values; `dimensions` and `tokens`, those with most outliers as
        `[name, outliers, examples that have one]`; `points`, a `[token position, dimension]` for each outlier, with
        positions counted through all examples; `boundaries`, the first position of each example; `width`.
    """
    joined = torch.cat(list(values))
    mean, deviation = joined.double().mean(), joined.double().std(correction=0)
    marked = (joined.double() - mean).abs() > deviations * deviation
    points = marked.nonzero()
    starts = _starts(values)
    example = torch.bucketize(points[:, 0], torch.tensor(starts), right=True) - 1
    names = [token for row in tokens for token in row]
    return {
        "mean": float(mean),
        "deviation": float(deviation),
        "count": len(points),
        "share": len(points) / joined.numel(),
        "dimensions": _most([str(int(d)) for d in points[:, 1]], example.tolist()),
        "tokens": _most([names[int(t)] for t in points[:, 0]], example.tolist()) if names else [],
        "points": points.tolist(),
        "boundaries": starts,
        "width": joined.shape[1],
    }


def _starts(values: Sequence[Tensor]) -> list[int]:
    lengths = [len(value) for value in values]
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _most(names: Sequence[str], examples: Sequence[int]) -> list[list[Json]]:
    counts = Counter(names)
    where: dict[str, set[int]] = {}
    for name, example in zip(names, examples, strict=True):
        where.setdefault(name, set()).add(example)
    return [[name, count, len(where[name])] for name, count in counts.most_common(LISTED)]


def token_ranges(values: Sequence[Tensor]) -> dict[str, list[list[float]]]:
    """Least and largest value of each token, per example (figures 2a and 9 to 13 of the paper).

    Args:
        values: `[tokens, features]` per example.

    Returns:
        `low` and `high`, a list over tokens per example.
    """
    return {"low": [value.amin(1).tolist() for value in values], "high": [value.amax(1).tolist() for value in values]}
