"""Budget: the widths that cost least loss and fit.

One width per weight is chosen so that the sum of the loss increases is smallest and the file is not larger than asked:
the integer linear program of HAWQ-V3 (Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, section on
mixed precision) with measured loss increases in place of its Hessian-weighted errors. It is solved to optimality.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qpipe.errors import ConfigError
from qpipe.stages.sensitivity import Choice
from qpipe.stages.sizes import FixedSize

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
TIE = 1e-4
"""Share of the largest cost that all weights at all widths together are worth: more bits are taken where costs are
equal. It is far below the noise of any measurement."""
SCALE = 1e3
"""The largest cost as the solver sees it, which stops 1e-6 from the optimum."""


@dataclass(frozen=True)
class Budget:
    """A limit: bits per quantized weight, scales and zero points included, or bytes of the exported weight file."""

    value: float
    unit: str

    def room(self, fixed: FixedSize) -> float:
        """Bytes left for the weights whose width is chosen; negative if there is no room at all."""
        if self.unit == "bit":
            return self.value * fixed.weights / 8 - fixed.quantized
        return self.value * UNITS[self.unit] - fixed.total

    def describe(self, stored: int, fixed: FixedSize) -> str:
        """A size in the budget's unit, for weights that take `stored` bytes."""
        if self.unit == "bit":
            return f"{8 * (stored + fixed.quantized) / fixed.weights:.3f} bit"
        return f"{(stored + fixed.total) / UNITS[self.unit]:.3f} {self.unit}"


def parse_budget(text: str) -> Budget:
    """`3.2bit`, `12MB`, `900kB` or `1.5GB` (decimal units).

    Raises:
        ConfigError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(bits?|kB|MB|GB)\s*", text)
    if match is None:
        raise ConfigError(f"budget {text!r}: write bits per weight, such as 3.2bit, or a file size, such as 12MB")
    return Budget(float(match[1]), "bit" if match[2].startswith("bit") else match[2])


def costs(choices: Sequence[Choice]) -> list[float]:
    """Loss increases of one weight without the noise of the sample: none below 0, none above that of fewer bits."""
    return [max(0.0, *(c.increase for c in choices if c.bits >= choice.bits)) for choice in choices]


def require_possible(sizes: Iterable[Iterable[int]], budget: Budget, fixed: FixedSize) -> None:
    """Refuse a budget before anything is measured for it.

    Args:
        sizes: by weight, its bytes at every width.
        budget: the limit.
        fixed: what else is in the file.

    Raises:
        ConfigError: even the smallest widths do not fit; says what would.
    """
    smallest = sum(min(widths) for widths in sizes)
    if smallest > budget.room(fixed):
        raise ConfigError(
            f"a budget of {budget.value:g} {budget.unit} cannot be met: the smallest possible with these widths is "
            f"{budget.describe(smallest, fixed)}; allow fewer bits, quantize more weights, raise the budget, or export "
            "to a format that stores less (--format native packs embeddings below 8 bits)"
        )


def choose(found: Mapping[str, Sequence[Choice]], budget: Budget, fixed: FixedSize) -> list[Choice]:
    """One choice per site with the smallest sum of `costs` that fits; among equal costs the one with more bits.

    Raises:
        ConfigError: see `require_possible`.
    """
    sites = list(found.values())
    require_possible(([choice.stored for choice in choices] for choices in sites), budget, fixed)
    flat = [choice for choices in sites for choice in choices]
    owner = np.repeat(np.arange(len(sites)), [len(choices) for choices in sites])
    cost = np.array([value for choices in sites for value in costs(choices)])
    stored = np.array([choice.stored for choice in flat], dtype=float)
    picked = _solve(cost - _preference(cost, stored), stored, owner, budget.room(fixed))
    return [flat[index] for index in picked]


def _preference(cost: np.ndarray, stored: np.ndarray) -> np.ndarray:
    return TIE * (cost.max() or 1.0) * stored / stored.sum()


def _solve(cost: np.ndarray, stored: np.ndarray, owner: np.ndarray, room: float) -> list[int]:
    """Indices of one item per owner, in order, with the least total cost and a total size of at most `room`."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    one_each = (owner[None, :] == np.unique(owner)[:, None]).astype(float)
    limit = room
    while True:
        solved = milp(
            SCALE * cost / (np.abs(cost).max() or 1.0),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(stored[None, :] / room, -np.inf, limit / room),
            ],
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None:
            raise ConfigError(f"the solver found no plan: {solved.message}; raise the budget a little")
        picked = [int(index) for index in np.flatnonzero(solved.x > 0.5)]
        excess = stored[picked].sum() - room
        if excess <= 0:
            return picked
        limit -= excess  # the solver's constraints hold to one part in a million only
