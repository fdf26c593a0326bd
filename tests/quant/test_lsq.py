"""Learned step sizes against the reference implementations, autograd and their contract."""

import math
from typing import get_args

import pytest
import torch
from golden_cases import Golden, case_name
from pydantic import ValidationError
from torch import nn

from qpipe.builtin.lsq import LsqOptions, LsqPlusOptions, LsqWeight
from qpipe.quant import compiled
from qpipe.quant.quantizer import QuantContext
from qpipe.quant.ranges import RangeMethod
from qpipe.quant.static import StaticOptions, StaticWeight
from qpipe.testing import check_quantizer

GOLDEN = Golden("lsq")
GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}]


def make(weight=None, step=None, context=None, **options):
    quantizer = LsqWeight(LsqOptions(**options))
    quantizer.attach(context or QuantContext(), "m:weight")
    if weight is not None:
        quantizer.initialize(weight)
    if step is not None:
        quantizer.step = nn.Parameter(step.reshape(quantizer.step.shape).clone())
    return quantizer


def gradients(quantizer, weight, grad):
    weight = weight.clone().requires_grad_()
    out = quantizer(weight)
    return out.detach(), *torch.autograd.grad(out, (weight, quantizer.step), grad)


def weights(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def close(found, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=rtol, atol=atol)


SIGNED = [case for case in GOLDEN.of("LsqQuan") if not case["params"]["all_positive"]]


@pytest.mark.parametrize("case", SIGNED, ids=case_name)
def test_reference(case):
    params, weight = case["params"], GOLDEN.tensor(case, "x")
    granularity = "channel" if params["per_channel"] else "tensor"
    options = {"bits": params["bit"], "narrow": params["symmetric"], "granularity": granularity}
    close(make(weight, **options).step.detach(), GOLDEN.tensor(case, "s_init"))
    quantizer = make(weight, GOLDEN.tensor(case, "s"), **options)
    assert quantizer.gradient_scale(weight) == pytest.approx(params["grad_scale"])
    out, grad, grad_step = gradients(quantizer, weight, GOLDEN.tensor(case, "g"))
    close(out, GOLDEN.tensor(case, "out"))
    close(grad, GOLDEN.tensor(case, "grad_x"))
    close(grad_step, GOLDEN.tensor(case, "grad_s"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN.of("SymLsqQuantizer"), ids=case_name)
def test_reference_that_rounds_before_clamping(case):
    weight = GOLDEN.tensor(case, "x")
    options = {"bits": case["params"]["num_bits"], "granularity": "tensor"}
    close(make(weight, **options).step.detach(), GOLDEN.tensor(case, "alpha"))
    quantizer = make(weight, GOLDEN.tensor(case, "alpha"), **options)
    out, grad, grad_step = gradients(quantizer, weight, GOLDEN.tensor(case, "g"))
    close(out, GOLDEN.tensor(case, "out"))
    close(grad, GOLDEN.tensor(case, "grad_x"))
    close(grad_step, GOLDEN.tensor(case, "grad_alpha"), rtol=1e-4, atol=1e-6)


MID_RISE = [case for case in GOLDEN.of("LearnedStepSizeQuantization") if case["params"]["symmetric"]]


@pytest.mark.parametrize("case", MID_RISE, ids=case_name)
def test_reference_with_a_learned_clip(case):
    """Its parameter is the clip alpha = step * (2**bits - 1) / 2, trained by plain autograd."""
    weight, bits = GOLDEN.tensor(case, "x"), case["params"]["num_bits"]
    options = {"bits": bits, "levels": "mid-rise", "init": "min-max", "grad_scale": "none", "granularity": "tensor"}
    per_step = (2**bits - 1) / 2
    close(make(weight, **options).step.detach() * per_step, GOLDEN.tensor(case, "alpha_init"))
    quantizer = make(weight, GOLDEN.tensor(case, "alpha") / per_step, **options)
    out, grad, grad_step = gradients(quantizer, weight, GOLDEN.tensor(case, "g"))
    close(out, GOLDEN.tensor(case, "out"), atol=1e-6)
    close(grad, GOLDEN.tensor(case, "grad_x"))
    close(grad_step / per_step, GOLDEN.tensor(case, "grad_alpha"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN.of("LSQPlusWeightQuantizer"), ids=case_name)
def test_reference_of_lsq_plus(case):
    """Its gradient scale counts the rows' elements, and its initial step is the public code's."""
    params, weight = case["params"], GOLDEN.tensor(case, "w")
    granularity = "channel" if params["per_channel"] else "tensor"
    options = {"bits": params["bits"], "init": "lsq+reference", "granularity": granularity}
    quantizer = make(weight, **options)
    close(quantizer.step.detach(), GOLDEN.tensor(case, "s_init"))
    assert quantizer.gradient_scale(weight) == pytest.approx(params["grad_scale"])
    out, grad, grad_step = gradients(quantizer, weight, GOLDEN.tensor(case, "g"))
    close(out, GOLDEN.tensor(case, "out"))
    close(grad, GOLDEN.tensor(case, "grad_w"))
    close(grad_step, GOLDEN.tensor(case, "grad_s"), rtol=1e-4, atol=1e-6)


def test_first_steps_of_lsq_plus():
    weight = weights(4, 50)
    reach = torch.maximum((weight.mean(1) - 3 * weight.std(1)).abs(), (weight.mean(1) + 3 * weight.std(1)).abs())
    assert LsqPlusOptions().init == "lsq+"
    paper = LsqWeight(LsqPlusOptions(bits=4))
    close(paper.first_step(weight), reach / 8)
    code = LsqWeight(LsqPlusOptions(bits=4, init="lsq+reference"))
    close(code.first_step(weight), reach / 15)


INITS = [{"init": init} for init in get_args(RangeMethod)] + [{"init": "percentile", "percentile": 90.0}]


@pytest.mark.parametrize("options", [*INITS, {"init": "lp", "p": 4.0}], ids=str)
@pytest.mark.parametrize("levels", ["mid-tread", "mid-rise"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
def test_first_steps_of_range_searches(granularity, levels, options):
    """Those of `uniform-static`; the gradients of lsq are unchanged by them."""
    weight, form = weights(6, 64), {"bits": 3, **granularity}
    searched = {{"init": "range"}.get(key, key): value for key, value in options.items()}
    static = StaticWeight(StaticOptions(**form, **searched, mid_rise=levels == "mid-rise"))
    static.attach(QuantContext(), "m:weight")
    static.initialize(weight)
    for kind in (LsqOptions, LsqPlusOptions):
        quantizer = LsqWeight(kind(**form, **options, levels=levels))
        quantizer.initialize(weight)
        assert torch.equal(quantizer.step.detach(), static.scale)
        assert torch.equal(quantizer.quantize(weight), static.quantize(weight))


def test_a_searched_first_step_knows_the_levels():
    """The narrow grid has no lowest code, one bit has two levels."""
    weight = weights(1, 4000)
    for options in ({"bits": 3, "narrow": True}, {"bits": 1, "levels": "mid-rise"}):
        quantizer = make(weight, init="mse-golden", **options)
        low, high = quantizer.bounds
        codes = torch.arange(low, high + 1)

        def error(step, codes=codes):
            return float((weight.reshape(-1, 1) - codes * step).abs().amin(1).square().mean())

        step = float(quantizer.step.detach())
        grid = [step * factor for factor in torch.linspace(0.2, 3, 800).tolist()]
        assert error(step) <= 1.001 * min(map(error, grid))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
@pytest.mark.parametrize("options", [{"bits": b} for b in range(2, 9)] + [{"bits": 1, "levels": "mid-rise"}], ids=str)
def test_contract(options, granularity):
    check_quantizer(lambda: LsqWeight(LsqOptions(**options, **granularity)))


@pytest.mark.parametrize("levels", ["mid-tread", "mid-rise"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g["granularity"])
def test_gradients_are_those_of_autograd(granularity, levels):
    """Written with straight-through rounding and ordinary clamps, in float64."""
    weight, grad = weights(8, 32), torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    quantizer = make(weight, bits=3, levels=levels, **granularity)
    with torch.no_grad():
        quantizer.step.mul_(0.6)  # so that some weights are clipped
    _, found, found_step = gradients(quantizer, weight, grad)

    x = weight.double().requires_grad_()
    step = quantizer.step.detach().double().requires_grad_()
    low, high = quantizer.bounds
    v = (quantizer.rows_of(x) / step).clamp(low, high)
    level = (v + quantizer.zero_point).round() - quantizer.zero_point
    q = (v + (level - v).detach()) * step
    factor = 1 / math.sqrt(weight.numel() * high)
    expected, expected_step = torch.autograd.grad(q.view(8, 32), (x, step), grad.double())
    close(found, expected.float())
    close(found_step, (expected_step * factor).float(), rtol=1e-4)
    assert bool((found == 0).any()) and bool((found != 0).any())


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_gives_the_same(dtype):
    weight, grad = weights(65, 48, dtype=dtype), weights(65, 48, seed=1, dtype=dtype)
    eager = make(weight, context=QuantContext(scale_dtype=dtype), bits=3)
    fast = make(weight, context=QuantContext(scale_dtype=dtype, compiled=True), bits=3)
    expected, found = gradients(eager, weight, grad), gradients(fast, weight, grad)
    assert fast.context.compiled, "fell back to eager mode"
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    close(found[2], expected[2], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_outer_levels_count_as_inside(dtype):
    """Where learned rounding has put them, though their type may round them to beyond; they keep their gradient."""
    codes = torch.arange(-4, 4).repeat(64, 1)
    steps = (1 + torch.arange(64) / 2**7)[:, None]  # exact in bfloat16; their multiples by 3 are not
    weight = (codes * steps).to(dtype)
    assert dtype == torch.float32 or (weight[:, -1].float() > 3 * steps[:, 0]).any()
    quantizer = make(weight, step=steps, bits=3, granularity="channel", grad_scale="none")
    _, gradient, step_gradient = gradients(quantizer, weight, torch.ones_like(weight))
    assert torch.equal(gradient, torch.ones_like(weight))
    assert step_gradient.abs().max() < 0.1, "rounding errors alone, where a clipped weight counts 3 or 4"


def test_a_step_never_becomes_negative_and_recovers():
    weight = weights(4, 8)
    quantizer = make(weight, bits=4)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    assert bool((quantizer.encode(weight).scale > 0).all())
    _, _, grad_step = gradients(quantizer, weight, -weight.sign())  # larger magnitudes would lower the loss
    assert bool((grad_step < 0).all()), "the gradient must lift the step"


def test_options():
    with pytest.raises(ValidationError, match="no positive level"):
        LsqOptions(bits=1)
    with pytest.raises(ValidationError, match="narrow belongs to levels: mid-tread"):
        LsqOptions(bits=3, levels="mid-rise", narrow=True)
    with pytest.raises(ValidationError):
        LsqOptions(bits=9)
    for options in ({"percentile": 99}, {"init": "percentile", "p": 3}):
        with pytest.raises(ValidationError, match="give (percentile|p) with init: (percentile|lp), and only there"):
            LsqOptions(**options)


@pytest.mark.parametrize("levels", ["mid-tread", "mid-rise"])
def test_a_step_that_is_nan_reaches_the_output(levels):
    quantizer = make(weights(3, 8), torch.tensor([0.1, torch.nan, 0.1]), bits=4, levels=levels)
    assert quantizer.quantize(weights(3, 8)).isnan().all(1).tolist() == [False, True, False]
