"""Which weights are regularized, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from qpipe import ConfigError, SiteError


@dataclass(frozen=True)
class Candidate:
    """A weight of the model that could be regularized.

    Attributes:
        name: path of the module that owns the weight.
        kurtosis: before training; None for a constant weight.
        left_out: why it is not regularized; empty if it is.
    """

    name: str
    kurtosis: float | None
    left_out: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain mapping."""
        return asdict(self)


def matching(names: Iterable[str], patterns: Sequence[str], option: str) -> list[str]:
    """The names that match any of the `fnmatch` patterns, in order.

    Raises:
        SiteError: a pattern matches none.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise SiteError(
                f"kure.{option}: {pattern!r} matches no module with a weight to regularize; patterns are over module "
                f"paths such as {shown or '(there are none: no weight is quantized)'}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def select(
    weights: Mapping[str, str],
    exclude: Sequence[str],
    skip_above: float | None,
    measure: Callable[[str], float],
) -> list[Candidate]:
    """Measure every weight and decide which are regularized.

    Args:
        weights: by module path, why a weight is left out already; empty for those to choose from.
        exclude: `fnmatch` patterns of modules to leave out, over those to choose from.
        skip_above: leave out weights whose kurtosis is larger; None leaves none out.
        measure: kurtosis of a module's weight, NaN for a constant one.

    Raises:
        SiteError: an exclude pattern matches nothing.
        ConfigError: nothing is left.
    """
    excluded = set(matching([name for name, reason in weights.items() if not reason], exclude, "exclude"))
    result = []
    for name, left_out in weights.items():
        value = measure(name)
        constant = math.isnan(value)
        reason = left_out or ("excluded by pattern" if name in excluded else "constant" if constant else "")
        if not reason and skip_above is not None and value > skip_above:
            reason = f"kurtosis above {skip_above:g}"
        result.append(Candidate(name, None if constant else value, reason))
    if all(c.left_out for c in result):
        raise ConfigError(
            f"kure: nothing to regularize: of {len(result)} weights every one is left out"
            f" ({', '.join(dict.fromkeys(c.left_out for c in result)) or 'the model has none'}); "
            "quantize weights, or relax kure.include, kure.exclude and kure.skip_above"
        )
    return result


def table(candidates: Sequence[Candidate]) -> str:
    """One line per weight, for the log: its kurtosis, and why it is left out."""
    width = max(len(c.name) for c in candidates)
    lines = [
        f"{c.name:<{width}}  {'-' if c.kurtosis is None else format(c.kurtosis, '10.4g'):>10}  {c.left_out}".rstrip()
        for c in candidates
    ]
    used = sum(not c.left_out for c in candidates)
    return "\n".join([f"kurtosis before training; {used} of {len(candidates)} weights are regularized", *lines])
