"""Other step sizes: closed forms, the published step-size sweep, and how quantizers take them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpipe import SiteError
from qpipe.builtin.lsq import LsqOptions, LsqWeight
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.quant.step_error import open_ended, power_of_two, times

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "dorefa_steps.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['params']['num_bits']} bits x {c['params']['scale_ratio']}")
def test_published_step_sweep(case):
    tensors = load_file(GOLDEN / "dorefa_steps.safetensors")
    weight, expected = (tensors[f"c{case['case']:02d}.{name}"] for name in ("w", "out"))
    squashed = torch.tanh(weight)
    unit = squashed / (2 * squashed.abs().max()) + 0.5
    steps = (2 ** case["params"]["num_bits"] - 1) * case["params"]["scale_ratio"]
    assert torch.equal(2 * open_ended(unit, steps) - 1, expected)


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
    if not symmetric:  # the grid starts at the smallest weight, whatever its step
        axes = 1 if granularity["granularity"] == "channel" else (0, 1)
        zero = (-8 - weight.amin(axes, keepdim=True) / scale).round().clamp(-8, 7)
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
    trained.observe(torch.tensor([-1.0, 3.0]))
    trained.freeze_range()
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
