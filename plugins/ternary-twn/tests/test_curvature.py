"""The Hessian of a loss, and its largest eigenvalues, through ternary weights: what `qpipe analyze` measures."""

import pytest
import torch
from qpipe_ternary_twn import TernaryOptions, TernaryWeight

from qpipe import QuantContext
from qpipe.analysis.hessian import hessian_product, top_eigenvalues
from qpipe.analysis.slopes import frozen


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_curvature_passes_where_weights_are_not_clipped(granularity):
    """As in training: limit and scale have no slope, clipped weights none either."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=generator)
    weight = (3 * torch.randn(1, 6, generator=generator)).requires_grad_()
    quantizer = TernaryWeight(TernaryOptions(granularity=granularity, clip=2.5))
    quantizer.attach(QuantContext(), "m:weight")
    free = (weight.detach().abs() < 2.5).float()
    assert 0 < free.sum() < 6
    expected = torch.linalg.eigvalsh((x * free).T @ (x * free)).sort(descending=True).values[:2]
    quantizer.surrogate = frozen(quantizer)
    loss = 0.5 * (x @ quantizer(weight).T).square().sum()
    found = top_eigenvalues(hessian_product(loss, [weight]), [weight], 2, generator, tolerance=1e-7)
    assert [value.value for value in found] == pytest.approx(expected.tolist(), rel=1e-3)
