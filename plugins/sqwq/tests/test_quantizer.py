"""The quantizer against the derived reference values, autograd, and the file formats."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from qpipe_sqwq import Sqwq, SqwqOptions, SqwqPluginOptions, SqwqWeight
from qpipe_sqwq.conversion import MARGIN, fresh, lossless, matched
from qpipe_sqwq.penalty import distribution_penalty
from safetensors.torch import load_file
from torch import nn

from qpipe import QuantContext, moments
from qpipe.builtin.modules import HOSTS
from qpipe.testing import check_quantizer

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "sqwq_derived.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "sqwq_derived.safetensors")


def golden(case, name):
    return TENSORS[f"c{case['case']:02d}.{name}"].clone()


def make(p=None, gain=None, **options):
    quantizer = SqwqWeight(SqwqOptions(**options))
    quantizer.attach(QuantContext(), "m:weight")
    if gain is not None:
        quantizer.gain = nn.Parameter(gain.float().reshape(-1, 1))
    return quantizer


def weights(*shape, seed=0, scale=0.05):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(params=CASES, ids=lambda c: f"case{c['case']}")
def case(request):
    return request.param


def test_codes_and_folded_weight(case):
    record = make(gain=golden(case, "gain"), bits=case["params"]["bits"]).encode(golden(case, "P").float())
    assert torch.equal(record.integers() + 2 ** (record.bits - 1), golden(case, "codes").to(record.integers().dtype))
    torch.testing.assert_close(record.decode().double(), golden(case, "folded_weight"), rtol=1e-6, atol=1e-7)
    assert bool((record.zero_point == -0.5).all())


def test_full_precision_of_a_bfloat16_weight_is_rounded_once():
    p, gain = weights(8, 512, scale=0.8).bfloat16(), torch.linspace(-3, 1, 8).reshape(-1, 1).bfloat16()
    wanted = (p.double().tanh() * gain.double().exp()).to(torch.bfloat16)
    made = make(gain=gain).master(p)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
def test_other_steps_round_again(ratio, bits):
    """`tanh(P) * e**g` on half-integer multiples of another step, clamped to the trained codes."""
    p, gain = weights(6, 40, scale=0.8), torch.linspace(-1, 0.5, 6).reshape(-1, 1)
    quantizer, top = make(gain=gain, bits=bits), 2 ** (bits - 1)
    step = gain.double().exp() / top * ratio
    wanted = ((p.double().tanh() * gain.double().exp() / step - 0.5).round().clamp(-top, top - 1) + 0.5) * step
    trained = quantizer.quantize(p)
    quantizer.context.rescale = lambda scale: scale * ratio
    torch.testing.assert_close(quantizer.quantize(p), wanted.float(), rtol=0, atol=1e-5)
    assert (ratio == 1) == torch.allclose(quantizer.quantize(p), trained, atol=1e-5)
    quantizer.context.open_ended = True
    lowest = -(top - 0.5) / top * gain.double().exp()
    inside = (p.double().tanh() * gain.double().exp()).clamp(lowest, -lowest)
    counted = ((inside - lowest) / step).round() * step + lowest
    torch.testing.assert_close(quantizer.quantize(p), counted.float(), rtol=0, atol=1e-5)


def test_output_and_gradients(case):
    quantizer = make(gain=golden(case, "gain"), bits=case["params"]["bits"])
    p = golden(case, "P").float().requires_grad_()
    y = nn.functional.linear(golden(case, "X").float(), quantizer(p), golden(case, "bias").float())
    torch.testing.assert_close(y.double(), golden(case, "y"), rtol=1e-5, atol=1e-5)
    grad_p, grad_gain = torch.autograd.grad(y, (p, quantizer.gain), golden(case, "G").float())
    torch.testing.assert_close(grad_p.double(), golden(case, "grad_P"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_gain.double().flatten(), golden(case, "grad_gain"), rtol=1e-4, atol=1e-5)


def test_penalty_and_its_gradient(case):
    p = golden(case, "P").requires_grad_()
    value = distribution_penalty(moments([p]), case["params"]["sigma_t"])[0]
    torch.testing.assert_close(value, golden(case, "L_q"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, p)[0], golden(case, "grad_L"), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", [{"bits": b, "init": i} for b in (1, 2, 3, 4, 8) for i in ("matched", "lossless")])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_contract(options, granularity):
    check_quantizer(lambda: SqwqWeight(SqwqOptions(granularity=granularity, **options)))


@pytest.mark.parametrize("axes", [(1,), (0, 1)])
def test_lossless_gives_the_weight_back(axes):
    weight = weights(6, 40)
    p, gain = lossless(weight, axes)
    torch.testing.assert_close(p.tanh() * gain.exp(), weight, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gain.exp(), weight.abs().amax(axes, keepdim=True) / (1 - MARGIN))


@pytest.mark.parametrize("axes", [(1,), (0, 1)])
def test_matched_gives_p_the_deviation_and_clips_tails_only(axes):
    weight = weights(6, 4000)
    p, gain = matched(weight, axes, 0.8)
    deviation = p.std(axes, correction=0)
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.8), rtol=1e-4, atol=0)
    clipped = (weight / gain.exp()).abs() > 1 - MARGIN
    assert 0 < float(clipped.float().mean()) < 0.05
    torch.testing.assert_close((p.tanh() * gain.exp())[~clipped], weight[~clipped], rtol=1e-4, atol=1e-6)


def test_from_scratch_weights_have_the_variance_of_their_inputs():
    p, gain = fresh(torch.empty(50, 400), (1,), 0.8, 0)
    assert float(p.std()) == pytest.approx(0.8, rel=0.02) and gain.shape == (50, 1)
    assert float(gain[0].exp()) == pytest.approx(1 / (0.8 * math.sqrt(400)))
    assert torch.equal(fresh(torch.empty(5, 4), (1,), 0.8, 3)[0], fresh(torch.empty(5, 4), (1,), 0.8, 3)[0])


def test_rows_of_zeros_and_of_one_value():
    weight = weights(3, 16)
    weight[1], weight[2] = 0, 0.3
    for init in ("matched", "lossless"):
        quantizer = make(init=init)
        p = quantizer.initialize(weight)
        master = quantizer.master(p).detach()
        assert bool(torch.isfinite(p).all()) and float(master[1].abs().max()) < 1e-7
        torch.testing.assert_close(master[2], weight[2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("case", ["one value", "one input", "one that is not 0"])
def test_rows_that_cannot_reach_the_deviation_keep_their_values(case, granularity):
    """A gain small enough to clip them all gives P no larger deviation; the other rows are matched as ever."""
    weight = {
        "one value": torch.full((4, 16), 0.3),
        "one input": weights(4, 1),
        "one that is not 0": torch.zeros(4, 64),
    }
    hopeless = weight[case]
    hopeless[:, 0] += 0.01 * (case == "one that is not 0")
    if granularity == "tensor":
        hopeless = hopeless[:1]
    quantizer = make(granularity=granularity)
    p = quantizer.initialize(hopeless)
    torch.testing.assert_close(quantizer.master(p).detach(), hopeless, rtol=1e-4, atol=1e-8)
    if granularity == "channel" and case != "one input":
        mixed = torch.cat([hopeless, weights(4, hopeless.shape[1])])
        alone, together = make(), make()
        assert torch.equal(together.initialize(mixed)[4:], alone.initialize(mixed[4:]))
        torch.testing.assert_close(together.initialize(mixed)[4:].std(1, correction=0), torch.full((4,), 0.8))


def test_the_squashed_target_is_nearly_uniform():
    """The deviation 0.561 and kurtosis 1.78 of the method card, from the density by quadrature."""
    p = torch.linspace(-8, 8, 200_001, dtype=torch.float64) * 0.8
    density = torch.exp(-p.square() / (2 * 0.64)) / math.sqrt(2 * math.pi * 0.64)
    second = torch.trapezoid(density * p.tanh() ** 2, p)
    fourth = torch.trapezoid(density * p.tanh() ** 4, p)
    assert float(second.sqrt()) == pytest.approx(0.561, abs=1e-3)
    assert float(fourth / second**2) == pytest.approx(1.776, abs=1e-3)


def test_a_constant_p_has_a_finite_gradient():
    p = torch.full((3, 4), 0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(distribution_penalty(moments([p]), 0.8), p)
    torch.testing.assert_close(grad, torch.full_like(grad, 2 * 0.5 / 12))


@pytest.mark.parametrize("bits", [1, 4])
def test_a_part_of_the_weight_is_quantized_under_noise(bits):
    """The rest is `tanh(P) * e**g`, with its gradients."""
    p, gain = weights(40, 100, scale=0.8).requires_grad_(), torch.linspace(-1, 0.5, 40).reshape(-1, 1)
    quantizer, grad = make(gain=gain, bits=bits), torch.randn(40, 100)
    quantizer.context.noise = 0.5
    out = quantizer(p)
    drawn = out == quantizer.encode(p).decode()
    plain = p.detach().double().tanh() * gain.double().exp()
    torch.testing.assert_close(out[~drawn], plain[~drawn].float(), rtol=1e-5, atol=1e-6)
    assert 0.4 < float(drawn.float().mean()) < 0.6
    quantizer.context.noise = 0.0
    grad_p, grad_gain = torch.autograd.grad(quantizer(p), (p, quantizer.gain), grad)
    slope = gain.double().exp() * (1 - p.detach().double().tanh().square())
    torch.testing.assert_close(grad_p, (grad * slope).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_gain, (grad * plain).sum(1, keepdim=True).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(8, 8, 2, groups=8), nn.Linear(8, 6)], ids=str
)
def test_convolutions_are_squashed_as_matrices(module, bits, granularity):
    """Output and gradients are those of the plain module with the quantized matrix of the weight."""
    plain, hosting = copy.deepcopy(module), copy.deepcopy(module)
    x = torch.randn(2, 8) if isinstance(module, nn.Linear) else torch.randn(2, module.in_channels, 5, 5)
    quantizer, matrix = make(bits=bits, granularity=granularity), make(bits=bits, granularity=granularity)
    HOSTS[type(hosting)].adopt(hosting, "m", quantizer.context)
    rows = matrix.initialize(plain.weight.detach().flatten(1)).requires_grad_()
    with torch.no_grad():
        hosting.weight.copy_(quantizer.initialize(hosting.weight))
        quantized = matrix(rows)
        plain.weight.copy_(quantized.view_as(plain.weight))
    hosting.host("weight", quantizer)
    torch.testing.assert_close(hosting.weight, rows.view_as(hosting.weight))
    output, expected = hosting(x), plain(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(output.shape)
    output.backward(upstream)
    (grad,) = torch.autograd.grad(expected, plain.weight, upstream)
    wanted, wanted_gain = torch.autograd.grad(matrix(rows), (rows, matrix.gain), grad.flatten(1))
    torch.testing.assert_close(hosting.weight.grad, wanted.view_as(hosting.weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.gain.grad, wanted_gain, rtol=1e-4, atol=1e-5)


def test_another_width_keeps_gain_and_p():
    trained = make(bits=4)
    p = trained.initialize(weights(5, 30))
    other = make(bits=2)
    other.inherit(trained, p)
    assert torch.equal(other.gain, trained.gain) and other.gain is not trained.gain
    torch.testing.assert_close(other.master(p), trained.master(p))


def test_rules():
    blocks, embedding = Sqwq(SqwqPluginOptions(bits=2, embedding=True)).qpipe_quant_rules()
    assert (blocks.site, blocks.options["bits"]) == ("{block}.*:weight", 2)
    assert (embedding.site, embedding.options["granularity"]) == ("{embedding}:weight", "tensor")
    assert list(Sqwq(SqwqPluginOptions(rules=False)).qpipe_quant_rules()) == []


def test_a_gain_that_is_nan_reaches_the_output():
    quantizer = make(gain=torch.tensor([0.0, torch.nan, 0.0]), bits=4)
    assert quantizer.quantize(weights(3, 8)).isnan().all(1).tolist() == [False, True, False]
