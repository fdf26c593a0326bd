"""Ternary weight splitting: recorded halves, and that both the weights and their binary forms add up."""

import pytest
import torch
from golden_cases import Golden, case_name

from qpipe import QTensor, QuantContext, split_to_binary
from qpipe.builtin.binary import BinaryOptions, BinaryWeight

GOLDEN = Golden("binary")
CASES = GOLDEN.of("tws_split")
GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 8}]


def ternarise(weight, granularity="tensor", group_size=None, dtype=torch.float32):
    """`scale = mean of |w| above 0.7 mean|w|`, in float64."""
    rows = weight.double().reshape({"tensor": (1, -1)}.get(granularity, (-1, group_size or weight[0].numel())))
    kept = rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True)
    scale = (rows.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
    scale = torch.where(scale > 0, scale, 1.0).to(dtype).float()
    shape = (weight.shape[0], -1, 1) if group_size else (-1, *(1,) * (weight.ndim - 1))
    codes = (rows.sign() * kept).view(weight.shape).float()
    return QTensor(codes, scale.reshape(shape), torch.zeros(1), 2, group_size)


def binarise(weight, dtype=torch.float32, **granularity):
    quantizer = BinaryWeight(BinaryOptions(**granularity))
    quantizer.attach(QuantContext(scale_dtype=dtype), "m:weight")
    return quantizer.quantize(weight)


def weights(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05 + mean


def check_sums(weight, halves, ternary, tolerance=1e-6, **options):
    torch.testing.assert_close(halves[0] + halves[1], weight, rtol=0, atol=tolerance * float(weight.abs().max()))
    total = sum(binarise(half, **options) for half in halves)
    torch.testing.assert_close(total, ternary.decode(), rtol=0, atol=tolerance * float(ternary.scale.max()))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize(("name", "granularity"), [("w", "tensor"), ("emb", "channel")])
def test_halves_of_the_reference(case, name, granularity):
    """Its code takes the largest ternary value for the scale: 0 in rows whose values are 0 or negative."""
    weight = GOLDEN.tensor(case, name)
    ternary = ternarise(weight, granularity)
    halves, recorded = split_to_binary(weight, ternary), [GOLDEN.tensor(case, f"{name}{number}") for number in (1, 2)]
    check_sums(weight, halves, ternary, granularity=granularity)
    none = torch.zeros(len(weight), dtype=torch.bool)
    wrong = (ternary.codes.amax(1) <= 0) & (ternary.codes == 0).any(1) if granularity == "channel" else none
    for half, expected in zip(halves, recorded, strict=True):
        torch.testing.assert_close(half[~wrong], expected[~wrong], rtol=1e-6, atol=1e-7)
    missed = (sum(binarise(half, granularity=granularity) for half in recorded) - ternary.decode()).abs().amax(1)
    # With a scale of 0 the sum of both means comes out as 2 scale k / n for k values that are not 0, of n.
    half_kept = 2 * (ternary.codes != 0).sum(1) == weight.shape[1]
    assert torch.equal(missed > 0.01, wrong & ~half_kept), "just there its own halves do not add up"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_two_layers_of_half_the_bias_add_up_to_the_ternary_layer(case):
    weight, bias = GOLDEN.tensor(case, "w"), GOLDEN.tensor(case, "b")
    ternary, x = ternarise(weight), weights(5, weight.shape[1])
    first, second = (
        torch.nn.functional.linear(x, binarise(half, granularity="tensor"), bias / 2)
        for half in split_to_binary(weight, ternary)
    )
    torch.testing.assert_close(first + second, torch.nn.functional.linear(x, ternary.decode(), bias))
    for half in ("b1", "b2"):
        torch.testing.assert_close(bias / 2, GOLDEN.tensor(case, half).float())


@pytest.mark.parametrize("options", GRANULARITIES, ids=lambda o: o["granularity"])
@pytest.mark.parametrize("shape", [(6, 32), (6, 8, 2, 2)], ids=["linear", "convolution"])
def test_sums(shape, options):
    weight = weights(*shape)
    ternary = ternarise(weight, **options)
    halves = split_to_binary(weight, ternary)
    assert 0.2 < float((ternary.codes == 0).float().mean()) < 0.7, "both kinds of codes occur"
    assert all(half.shape == weight.shape and half.dtype == weight.dtype for half in halves)
    check_sums(weight, halves, ternary, **options)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_sums_are_exact_where_scales_are_rounded(granularity):
    """Both binary scales round to the same bfloat16 number, which is the ternary scale."""
    weight = weights(16, 64)
    ternary = ternarise(weight, granularity, dtype=torch.bfloat16)
    halves = split_to_binary(weight, ternary)
    total = sum(binarise(half, torch.bfloat16, granularity=granularity) for half in halves)
    assert torch.equal(total, ternary.decode())


def test_zeros_of_one_sign_that_outweigh_the_rest():
    """The published halves would need a ratio below 0: the first one carries far more than the second."""
    weight = torch.full((1, 40), 0.6)
    weight[0, :3] = torch.tensor([5.0, -5.0, 4.0])
    ternary = ternarise(weight)
    assert float(weight[ternary.codes == 0].sum()) > float(weight[ternary.codes != 0].abs().sum())
    check_sums(weight, split_to_binary(weight, ternary), ternary, granularity="tensor")


def test_rows_without_zeros_and_rows_of_zeros():
    weight = torch.tensor([[0.5, -0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 3.0, -1.0, 0.1]])
    ternary = ternarise(weight, "channel")
    first, second = split_to_binary(weight, ternary)
    assert torch.equal(first[0], weight[0] / 2) and torch.equal(second[0], weight[0] / 2)
    assert not first[1].any() and not second[1].any()
    total = binarise(first) + binarise(second)
    torch.testing.assert_close(total[[0, 2]], ternary.decode()[[0, 2]])
    assert float(total[1].abs().max()) < 1e-20, "a binary weight has no zero, but may be next to it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, t: (w[:2], t), "the weight has shape .2, 8. and the codes .4, 8."),
        (lambda w, t: (w, QTensor(t.codes * 2, t.scale, t.zero_point, 3)), "only codes -1, 0 and 1 with zero point 0"),
        (lambda w, t: (w, QTensor(t.codes, t.scale, t.zero_point + 1, 2)), "only codes -1, 0 and 1 with zero point 0"),
        (lambda w, t: (-w, t), "a code has another sign than its weight"),
        (lambda w, t: (w / 0, t), "NaN or infinity"),
        (
            lambda w, t: (w, QTensor(t.codes, t.scale / 9, t.zero_point, 2)),
            "4 of 4 scales, such as .* no sum of two 1-bit",
        ),
    ],
)
def test_what_cannot_be_split(change, message):
    weight = weights(4, 8)
    with pytest.raises(ValueError, match=message):
        split_to_binary(*change(weight, ternarise(weight, "channel")))
