"""How the error of a quantizer depends on its step size: the formulas behind kurtosis regularization.

Shkolnik et al., "Robust Quantization: One Model to Rule Them All" (NeurIPS 2020), section 3. `Q` is their quantizer of
equation 1: the nearest multiple of the step, clipped to `tau = 2**(bits - 1) * step` on both sides (so it has one level
more than `bits` can count). All errors are means of `(x - Q(x))**2`; steps may be numbers or arrays.

Two things differ from the paper:

* Equation 10, the second derivative for a normal distribution, has wrong signs there. `curvature_normal` is the
  derivative of equation 9.
* Lemma 3 approximates the best step of a uniform distribution, `2 a / (2**bits + 1)`, by `2 a / 2**bits`, where nothing
  is clipped any more, and equation 8 takes the second derivative there: 1/2. At the best step itself, where clipping
  still acts, it is `2**(bits - 1)`. So the inequality of theorem 4 holds at the approximate optimum, and towards larger
  steps; towards smaller steps a uniform distribution is the more sensitive one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Error = Callable[[Any], Any]
"""Mean squared error as a function of the step."""


def _limit(step: ArrayLike, bits: int) -> Array:
    return np.asarray(2.0 ** (bits - 1) * np.asarray(step, dtype=np.float64))


def mse_uniform(step: ArrayLike, bits: int, a: float = 1.0) -> Array:
    """Error for a uniform distribution on `[-a, a]`, exact.

    Equation 5, `(a - tau)**3 / (3 a) + 2**bits * step**3 / (24 a)`, up to `tau = a`. Beyond, where nothing is clipped,
    it does not hold and the integral is taken.
    """
    step, tau = np.asarray(step, dtype=np.float64), _limit(step, bits)
    clipped = (a - tau) ** 3 / (3 * a) + 2.0**bits * step**3 / (24 * a)
    return np.where(tau <= a, clipped, mse_histogram((-a, a), (1,), step, bits))


def curvature_uniform(step: ArrayLike, bits: int, a: float = 1.0) -> Array:
    """Second derivative of equation 5 in the step, `(2**(2 bits - 1) (a - tau) + 2**(bits - 2) step) / a`.

    NaN beyond `tau = a`, where equation 5 does not hold.
    """
    step, tau = np.asarray(step, dtype=np.float64), _limit(step, bits)
    return np.where(tau <= a, (2.0 ** (2 * bits - 1) * (a - tau) + 2.0 ** (bits - 2) * step) / a, np.nan)


def best_step_uniform(bits: int, a: float = 1.0) -> float:
    """The step with the smallest error: `2 a / (2**bits + 1)`, of the two roots of lemma 3 that within `tau <= a`."""
    return 2 * a / (2**bits + 1)


def mse_normal(step: ArrayLike, bits: int, sd: float = 1.0) -> Array:
    """Error for a normal distribution with mean 0, equation 9 (Banner et al. 2019).

    An approximation: rounding errors count as uniform, and as `step**2 / 12` for clipped values too.
    """
    from scipy.special import erfc

    tau = _limit(step, bits)
    outside = erfc(tau / (np.sqrt(2) * sd))
    density = np.sqrt(2 / np.pi) * tau * sd * np.exp(-(tau**2) / (2 * sd**2))
    return np.asarray((tau**2 + sd**2) * outside + tau**2 / (3 * 4.0**bits) - density)


def curvature_normal(step: ArrayLike, bits: int, sd: float = 1.0) -> Array:
    """Second derivative of equation 9 in the step, `4**(bits - 1) * (2 erfc(tau / (sqrt(2) sd)) + 2 / (3 * 4**bits))`.

    Equation 10 of the paper, with the signs that the derivative has.
    """
    from scipy.special import erfc

    return np.asarray(4.0 ** (bits - 1) * (2 * erfc(_limit(step, bits) / (np.sqrt(2) * sd)) + 2 / (3 * 4.0**bits)))


def best_step(error: Error, largest: float) -> float:
    """The step in `(0, largest]` with the smallest error: the best of a grid, refined between its neighbours."""
    from scipy.optimize import minimize_scalar

    grid = np.linspace(largest / 400, largest, 400)
    index = int(np.argmin(error(grid)))
    low, high = grid[max(index - 1, 0)], grid[min(index + 1, len(grid) - 1)]
    found = minimize_scalar(lambda step: float(error(step)), bounds=(low, high), method="bounded", options={"xatol": 0})
    return float(found.x)


def gamma(error: Error, step: float, epsilon: ArrayLike) -> Array:
    """Sensitivity, equation 3: `|error(step + epsilon) - error(step)|`; negative `epsilon` for smaller steps."""
    return np.abs(error(step + np.asarray(epsilon, dtype=np.float64)) - error(step))


def mse_histogram(edges: ArrayLike, counts: Sequence[float] | ArrayLike, step: ArrayLike, bits: int) -> Array:
    """Error for a density that is constant within the bins of a histogram, exact; shape of `step`.

    Args:
        edges: increasing, one more than counts.
        counts: elements by bin.
        step: positive.
        bits: width of a code.
    """
    edge, count = np.asarray(edges, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    density = count / (count.sum() * np.diff(edge))
    return np.asarray((np.diff(_integral(edge, np.asarray(step, dtype=np.float64)[..., None], bits)) * density).sum(-1))


def _integral(x: Array, step: Array, bits: int) -> Array:
    """Integral of `(t - Q(t))**2` over t from 0 to x: whole cells of `step**3 / 12`, half of them at both ends."""
    size = np.abs(x)
    code = np.minimum(np.round(size / step), 2.0 ** (bits - 1))
    whole = (2 * code - 1) * step**3 / 24
    return np.asarray(np.sign(x) * (whole + ((size - code * step) ** 3 + step**3 / 8) / 3))


def simulate(samples: Array, step: ArrayLike, bits: int) -> Array:
    """Error over samples, by quantizing them; shape of `step`."""
    width = np.asarray(step, dtype=np.float64)[..., None]
    quantized = np.clip(np.round(samples / width), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) * width
    return np.asarray(((samples - quantized) ** 2).mean(-1))
