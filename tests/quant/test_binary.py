"""One-bit weights and least-squares levels against the reference implementations and closed forms."""

import pytest
import torch
from golden_cases import Golden, case_name

from qpipe.builtin.binary import BinaryOptions, BinaryWeight, LaqOptions, LaqWeight
from qpipe.quant import compiled
from qpipe.quant.quantizer import QuantContext
from qpipe.testing import check_quantizer

GOLDEN = Golden("binary")
GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}]
KINDS = [
    lambda **options: BinaryWeight(BinaryOptions(**options)),
    lambda **options: BinaryWeight(BinaryOptions(keep_zeros=True, **options)),
    lambda **options: LaqWeight(LaqOptions(bits=2, **options)),
    lambda **options: LaqWeight(LaqOptions(bits=4, **options)),
]


def weights(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def check_reference(quantizer, case, groups=None):
    """Compare values and gradient; `groups` views the weight as that many rows, as the reference groups it."""
    weight, grad, out, grad_weight = (GOLDEN.tensor(case, name) for name in ("w", "g", "out", "grad_w"))
    if groups is not None:
        weight, grad, out, grad_weight = (part.reshape(groups, -1) for part in (weight, grad, out, grad_weight))
    weight.requires_grad_()
    found = quantizer(weight)
    torch.testing.assert_close(found.detach(), out, rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.autograd.grad(found, weight, grad)[0], grad_weight)


@pytest.mark.parametrize("case", GOLDEN.of("BwnQuantizer"), ids=case_name)
def test_reference_per_tensor_and_per_row(case):
    granularity = "tensor" if case["params"]["layerwise"] else "channel"
    check_reference(BinaryWeight(BinaryOptions(granularity=granularity, keep_zeros=True)), case)


@pytest.mark.parametrize("case", GOLDEN.of("BinaryQuantizer"), ids=case_name)
def test_reference_in_groups_across_rows(case):
    check_reference(BinaryWeight(BinaryOptions(keep_zeros=True)), case, groups=case["params"]["num_groups"])


@pytest.mark.parametrize("case", GOLDEN.of("LaqQuantizer"), ids=case_name)
def test_reference_laq(case):
    granularity = "tensor" if case["params"]["layerwise"] else "channel"
    bits = case["params"]["num_bits"]
    if bits == 1:
        quantizer = BinaryWeight(BinaryOptions(granularity=granularity, keep_zeros=True))
    else:
        quantizer = LaqWeight(LaqOptions(bits=bits, granularity=granularity, divisor="magnitudes"))
    check_reference(quantizer, case)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_contract(kind, granularity):
    check_quantizer(lambda: KINDS[kind](**granularity))


def test_the_sign_of_zero_is_plus_and_takes_one_bit():
    weight = torch.tensor([[0.0, -0.5, 1.0, 0.5]])
    one_bit = BinaryWeight(BinaryOptions()).encode(weight)
    assert one_bit.bits == 1 and one_bit.integers().tolist() == [[0, -1, 0, 0]]
    assert one_bit.decode().tolist() == [[0.5, -0.5, 0.5, 0.5]]
    kept = BinaryWeight(BinaryOptions(keep_zeros=True)).encode(weight)
    assert kept.bits == 2 and kept.decode().tolist() == [[0.0, -0.5, 0.5, 0.5]]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_rows_of_zeros_stay_next_to_zero(kind):
    weight = weights(3, 16)
    weight[1] = 0
    out = KINDS[kind]().quantize(weight)
    assert float(out[1].abs().max()) < 1e-20 and bool((out[0] != 0).any())


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_nan_is_not_hidden(kind):
    weight = weights(3, 16)
    weight[1, 2] = torch.nan
    out = KINDS[kind]().quantize(weight)
    assert bool(out[1].isnan().any()) and not bool(out[0].isnan().any())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_laq_is_near_least_squares_and_errs_less_than_min_max(bits):
    weight = weights(6, 200)
    quantizer = LaqWeight(LaqOptions(bits=bits))
    record, n = quantizer.encode(weight), 2 ** (bits - 1) - 1
    levels = record.codes.double()
    scale = (levels * weight).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
    torch.testing.assert_close(record.scale.double(), scale, rtol=0.05, atol=0)  # eleven alternations come near it
    step = weight.abs().amax(1, keepdim=True) / n
    min_max = (weight / step).round() * step
    assert float((record.decode() - weight).square().sum()) < float((min_max - weight).square().sum())


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_compiled_code_gives_the_same(kind, granularity):
    weight = weights(65, 48)
    weight[3] = 0
    expected = KINDS[kind](**granularity).quantize(weight)
    fast = KINDS[kind](**granularity)
    fast.attach(QuantContext(compiled=True), "m:weight")
    assert torch.equal(fast.quantize(weight), expected)
    assert fast.context.compiled, "fell back to eager mode"
    assert torch.equal(fast.encode(weight).decode(), expected)
