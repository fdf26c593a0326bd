"""DoReFa weights against the reference implementation, autograd and their contract."""

import pytest
import torch
from golden_cases import Golden, case_name

from qpipe.builtin.dorefa import DorefaOptions, DorefaWeight
from qpipe.quant import compiled
from qpipe.quant.quantizer import QuantContext
from qpipe.testing import check_quantizer

GOLDEN = Golden("dorefa")
FULL_PRECISION = [c for c in GOLDEN.of("dorefa_quantize_param_ptq") if c["params"]["num_bits"] == "fp32"]
GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}]


def make(context=None, **options):
    quantizer = DorefaWeight(DorefaOptions(**options))
    quantizer.attach(context or QuantContext(), "m:weight")
    return quantizer


def gradient(quantizer, weight, grad):
    weight = weight.clone().requires_grad_()
    out = quantizer(weight)
    return out.detach(), torch.autograd.grad(out, weight, grad)[0]


def weights(*shape, seed=0, scale=0.5, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("case", GOLDEN.of("dorefa_quantize_param"), ids=case_name)
def test_reference(case):
    quantizer = make(bits=case["params"]["num_bits"], output="unit")
    out, grad = gradient(quantizer, GOLDEN.tensor(case, "w"), GOLDEN.tensor(case, "g"))
    torch.testing.assert_close(out, GOLDEN.tensor(case, "out"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, GOLDEN.tensor(case, "grad_w"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", FULL_PRECISION, ids=case_name)
def test_full_precision_of_the_reference(case, bits):
    """Its step-size sweep at `fp32`: squashed, not rounded, whatever the width."""
    weight, expected = GOLDEN.tensor(case, "w"), GOLDEN.tensor(case, "out")
    torch.testing.assert_close(make(bits=bits, output="unit").full_precision(weight), expected, rtol=1e-5, atol=1e-6)
    scaled = make(bits=bits, output="max-abs").full_precision(weight)
    torch.testing.assert_close(scaled, expected * weight.abs().max(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output", ["unit", "max-abs"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
def test_without_rounding_the_gradient_is_that_of_the_levels(granularity, output):
    weight, grad = weights(6, 32), weights(6, 32, seed=1)
    quantizer = make(bits=4, output=output, **granularity)
    _, expected = gradient(quantizer, weight, grad)
    x = weight.clone().requires_grad_()
    (found,) = torch.autograd.grad(quantizer.full_precision(x), x, grad)
    assert torch.equal(found, expected)


def test_one_bit_without_rounding_is_the_weight():
    weight = weights(3, 8)
    assert torch.equal(make(bits=1).full_precision(weight), weight)


@pytest.mark.parametrize("output", ["unit", "max-abs"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
def test_gradients_are_those_of_autograd(granularity, output):
    """Of the same map without rounding, in float64; with two equal largest elements in a row."""
    weight, grad = weights(6, 32), weights(6, 32, seed=1)
    weight[0, 3] = weight[0, 5] = 3.0
    quantizer = make(bits=4, output=output, **granularity)
    _, found = gradient(quantizer, weight, grad)
    x = weight.double().requires_grad_()
    rows = quantizer.rows_of(x)
    squashed = rows.tanh()
    top = rows.abs().amax(quantizer.axes, keepdim=True) if output == "max-abs" else 1.0
    smooth = squashed / squashed.abs().amax(quantizer.axes, keepdim=True) * top
    (expected,) = torch.autograd.grad(smooth.view(6, 32), x, grad.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_levels():
    weight = torch.tensor([[0.1, -0.2, 0.4, -0.4]])
    for output, top in (("unit", 1.0), ("max-abs", 0.4)):
        out = make(bits=2, output=output).quantize(weight)
        squashed = weight.tanh() / weight.tanh().abs().max()
        levels = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
        nearest = levels[(squashed.flatten()[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(out.flatten(), nearest * top)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("output", ["unit", "max-abs"])
def test_contract(bits, output, granularity):
    check_quantizer(lambda: DorefaWeight(DorefaOptions(bits=bits, output=output, **granularity)))


def test_zeros_stay_next_to_zero_without_nan():
    out, grad = gradient(make(bits=4), torch.zeros(3, 8), torch.ones(3, 8))
    assert float(out.abs().max()) < 1e-20 and bool(torch.isfinite(grad).all())


def test_a_nan_is_not_hidden():
    weight = weights(3, 16)
    weight[1, 2] = torch.nan
    out = make(bits=4, granularity="channel").quantize(weight)
    assert bool(out[1].isnan().any()) and not bool(out[0].isnan().any())


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
def test_compiled_code_gives_the_same(granularity):
    weight, grad = weights(65, 48), weights(65, 48, seed=1)
    expected, expected_grad = gradient(make(bits=3, **granularity), weight, grad)
    fast = make(QuantContext(compiled=True), bits=3, **granularity)
    found, found_grad = gradient(fast, weight, grad)
    assert fast.context.compiled, "fell back to eager mode"
    # A tanh in another last bit may fall on the other side of a border between two levels.
    assert float((found != expected).float().mean()) < 1e-3
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast.encode(weight).decode(), found)
