"""Other step sizes: closed forms, the published step-size sweep, and how quantizers take them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpipe import SiteError
from qpipe.builtin.dorefa import DorefaOptions, DorefaWeight
from qpipe.builtin.lsq import LsqOptions, LsqWeight
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.quant.step_error import power_of_two, times

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "dorefa_steps.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['params']['num_bits']} bits x {c['params']['scale_ratio']}")
def test_published_step_sweep(case):
    """Its ratio multiplies the number of steps. A weight half way between two levels may fall to either."""
    tensors = load_file(GOLDEN / "dorefa_steps.safetensors")
    weight, expected = (tensors[f"c{case['case']:02d}.{name}"] for name in ("w", "out"))
    bits, ratio = case["params"]["num_bits"], case["params"]["scale_ratio"]
    quantizer = attached(DorefaWeight(DorefaOptions(bits=bits, output="unit")))
    quantizer.context.rescale, quantizer.context.open_ended = times(1 / ratio), True
    found, step = quantizer.quantize(weight), 2 / ((2**bits - 1) * ratio)
    squashed = weight.double().tanh() / weight.double().tanh().abs().max()
    half_way = (((squashed + 1) / step) % 1 - 0.5).abs() < 1e-4
    assert int(half_way.sum()) <= 1 and float((found - expected).abs().max()) < 1.001 * step
    torch.testing.assert_close(found[~half_way], expected[~half_way], rtol=0, atol=1e-6)


@pytest.mark.parametrize("output", ["unit", "max-abs"])
@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
def test_dorefa_rounds_to_the_other_steps(ratio, output):
    """The same squashed weights, on mid-rise levels around 0 that are clamped to the trained codes."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    quantizer = attached(DorefaWeight(DorefaOptions(bits=3, output=output)))
    top = 1.0 if output == "unit" else float(weight.abs().max())
    step = 2 * top / 7 * ratio
    value = weight.double().tanh() / weight.double().tanh().abs().max() * top
    expected = ((value / step - 0.5).round().clamp(-4, 3) + 0.5) * step
    quantizer.context.rescale = times(ratio)
    torch.testing.assert_close(quantizer.quantize(weight), expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(quantizer.encode(weight).decode(), expected.float(), rtol=0, atol=1e-5)


def test_open_ended_grids_of_uniform_weights():
    """Levels from the lowest trained one, over the trained range; beyond its end only by rounding."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    quantizer = attached(LsqWeight(LsqOptions(bits=3)))
    quantizer.initialize(weight)
    scale = quantizer.encode(weight).scale
    quantizer.context.rescale, quantizer.context.open_ended = times(1.1), True
    levels = -4 * scale + 1.1 * scale * torch.arange(9).reshape(1, -1)
    nearest = (weight.clamp(-4 * scale, 3 * scale).unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1)
    torch.testing.assert_close(quantizer.quantize(weight), levels.gather(1, nearest))


def test_times():
    assert torch.equal(times(0.5)(torch.tensor([0.25, 3.0])), torch.tensor([0.125, 1.5]))
    for ratio in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="give a positive ratio"):
            times(ratio)


def test_powers_of_two_are_exact_and_the_nearest_on_a_logarithmic_scale():
    exponents = range(-126, 128)
    powers = torch.tensor([math.ldexp(1.0, e) for e in exponents])
    assert torch.equal(power_of_two(powers), powers)
    # 2**0.5 = 1.41421... lies half way between 1 and 2.
    assert power_of_two(torch.tensor([1.4142, 1.4143, 3.0, 0.0])).tolist() == [1.0, 2.0, 4.0, 0.0]


def attached(quantizer, site="m:weight", dtype=torch.float32):
    quantizer.attach(QuantContext(scale_dtype=dtype), site)
    return quantizer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [{"granularity": "tensor"}, {"granularity": "channel"}])
def test_weights_are_rounded_and_clamped_on_the_other_grid(symmetric, granularity):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    quantizer = attached(UniformWeight(UniformOptions(bits=4, symmetric=symmetric, **granularity)))
    trained = quantizer.encode(weight)
    quantizer.context.rescale = times(0.75)
    scale, zero = trained.scale * 0.75, trained.zero_point
    expected = ((weight / scale + zero).round().clamp(-8, 7) - zero) * scale
    assert torch.equal(quantizer.quantize(weight), expected)
    assert torch.equal(quantizer.encode(weight).decode(), expected)
    assert (expected.abs().amax() < weight.abs().amax()) and not torch.equal(expected, trained.decode())


def test_rescaled_scales_are_rounded_to_the_exported_type():
    quantizer = attached(UniformWeight(UniformOptions(bits=4)), dtype=torch.bfloat16)
    quantizer.context.rescale = times(1.1)
    scale = quantizer.encode(torch.randn(4, 16)).scale
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"granularity": "tensor", "symmetric": False}])
def test_dynamic_activations(options):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    quantizer = attached(UniformActivation(ActivationOptions(bits=4, **options)), "m:input")
    scale, zero = quantizer.parameters_of(x)
    quantizer.context.rescale = times(1.2)
    expected = ((x / (scale * 1.2) + zero).round().clamp(-8, 7) - zero) * (scale * 1.2)
    assert torch.allclose(quantizer(x), expected, rtol=0, atol=1e-6)


def static(bits):
    return attached(UniformActivation(ActivationOptions(bits=bits, granularity="tensor", dynamic=False)), "m:input")


def test_static_activations_keep_their_range_at_another_width():
    trained, other = static(8), static(4)
    trained.observing = seen = trained.observer()
    trained(torch.tensor([-1.0, 3.0]))
    trained.observing = None
    trained.calibrated(seen)
    other.inherit(trained, None)
    assert float(trained.scale) == pytest.approx(3 / 127.5) and float(other.scale) == pytest.approx(3 / 7.5)
    other.context.rescale = times(2.0)
    assert float(other.parameters_of(torch.zeros(1))[0]) == pytest.approx(6 / 7.5)


class Reparameterised(Quantizer):
    def initialize(self, value):
        return value.atanh()


def test_a_weight_in_another_form_is_not_converted_twice():
    with pytest.raises(SiteError, match=r"m:weight: Reparameterised keeps its weight in a form of its own.*inherit"):
        attached(Reparameterised()).inherit(Reparameterised(), torch.zeros(2, 2))


@pytest.mark.parametrize(("levels", "factor"), [("mid-tread", 16 / 4), ("mid-rise", 15 / 3)])
def test_a_learned_range_is_kept_at_another_width(levels, factor):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    trained, other = (attached(LsqWeight(LsqOptions(bits=bits, levels=levels))) for bits in (4, 2))
    trained.initialize(weight)
    with torch.no_grad():
        trained.step.mul_(1.3)
    other.inherit(trained, weight)
    assert torch.allclose(other.encode(weight).scale, trained.encode(weight).scale * factor)
