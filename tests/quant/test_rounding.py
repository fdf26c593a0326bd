"""The fast tanh of quantizers."""

import pytest
import torch

from qpipe.quant import compiled
from qpipe.quant.rounding import tanh

VALUES = torch.cat([torch.logspace(-30, 1.2, 20_000), -torch.logspace(-30, 1.2, 20_000), torch.zeros(1)])


def test_tanh_is_near_that_of_torch_at_every_magnitude():
    torch.testing.assert_close(tanh(VALUES).double(), VALUES.double().tanh(), rtol=2e-6, atol=0)
    assert bool((tanh(VALUES).abs() <= 1).all()) and bool(tanh(torch.tensor(torch.nan)).isnan())


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
def test_compiled_tanh_has_the_bits_of_the_eager_one():
    values = torch.randn(100, 4001, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compiled.compiled(tanh)(values), tanh(values))
