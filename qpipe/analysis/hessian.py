"""Hessian: its eigenvalues of largest magnitude, by power iteration with products that are never written out.

Yao et al., "PyHessian: Neural Networks Through the Lens of the Hessian" (2020), algorithm 2; used on quantized
transformers by Kim et al. (EACL 2023), figure 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = list[Tensor]
SMALL = 1e-6


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue of a symmetric matrix, and how it was found.

    Attributes:
        value: with its sign: power iteration finds the largest magnitude.
        iterations: products it took.
        residual: `|H v - value v| / |value|`; the value is wrong by at most this, and usually by its square.
    """

    value: float
    iterations: int
    residual: float


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Vector], Vector]:
    """The map from `v` to `H v`, `H` being the second derivatives of a loss by parameters.

    Args:
        loss: a scalar; its graph is kept, and has to be differentiable twice.
        parameters: those that it does not depend on count with zeros.
    """
    slopes = torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, slopes, strict=True) if g is not None and g.requires_grad]

    def product(vector: Vector) -> Vector:
        if not used:
            return [torch.zeros_like(p) for p in parameters]
        by_id = {id(p): v for p, v in zip(parameters, vector, strict=True)}
        found = torch.autograd.grad(
            [g for _, g in used],
            list(parameters),
            [by_id[id(p)] for p, _ in used],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(parameters, found, strict=True)]

    return product


def norms(parameters: Sequence[Tensor]) -> Tensor:
    """Sum of the Euclidean norms (not squared); parameters that are all 0, where it has no second derivative, add 0."""
    return torch.stack([p.float().norm() for p in parameters if bool(p.detach().any())] or [torch.zeros(())]).sum()


def top_eigenvalues(
    product: Callable[[Vector], Vector],
    like: Sequence[Tensor],
    count: int,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> list[Eigenvalue]:
    """Eigenvalues of largest magnitude, largest first, of a symmetric matrix that is given by its product.

    Each is found by power iteration from a normal random start, kept orthogonal to the eigenvectors found before.

    Args:
        product: `v` to `H v`, both in the shapes of `like`.
        like: tensors that say shapes, types and device.
        count: how many; at most the number of elements.
        generator: of the start, on the CPU.
        iterations: at most, for each.
        tolerance: stop where the value changes by a smaller part of itself.
    """
    found: list[Eigenvalue] = []
    vectors: list[Vector] = []
    for _ in range(min(count, sum(p.numel() for p in like))):
        start = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in like]
        value, vector = _iterate(product, start, vectors, iterations, tolerance)
        found.append(value)
        vectors.append(vector)
    return found


def _iterate(
    product: Callable[[Vector], Vector], vector: Vector, before: Sequence[Vector], iterations: int, tolerance: float
) -> tuple[Eigenvalue, Vector]:
    vector, _ = _normal(vector)
    value: float | None = None
    residual = 0.0
    for number in range(1, iterations + 1):
        vector, _ = _normal(_orthogonal(vector, before))
        following = product(vector)
        previous, value = value, _dot(vector, following)
        residual = _length([f - value * v for f, v in zip(following, vector, strict=True)]) / (abs(value) + SMALL)
        done = previous is not None and abs(value - previous) / (abs(previous) + SMALL) < tolerance
        following, length = _normal(following)
        if done or number == iterations or length == 0:
            break
        vector = following
    assert value is not None
    return Eigenvalue(value, number, residual), vector


def _dot(a: Vector, b: Vector) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _length(vector: Vector) -> float:
    return _dot(vector, vector) ** 0.5


def _normal(vector: Vector) -> tuple[Vector, float]:
    """The vector at length 1, and what its length was."""
    length = _length(vector)
    return [part / (length or 1.0) for part in vector], length


def _orthogonal(vector: Vector, before: Sequence[Vector]) -> Vector:
    for other in before:
        share = _dot(vector, other)
        vector = [v - share * o for v, o in zip(vector, other, strict=True)]
    return vector
