"""Activations on learned and fixed grids against the reference implementations, autograd and compressed-tensors."""

import logging
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from golden_cases import Golden, case_name
from pydantic import ValidationError

from qpipe import TrainingError
from qpipe.builtin.dorefa import DorefaActivation
from qpipe.builtin.lsq_activation import (
    LsqActivation,
    LsqActivationOptions,
    LsqPlusActivation,
    LsqPlusActivationOptions,
)
from qpipe.builtin.pact import PactActivation, PactOptions
from qpipe.quant import compiled
from qpipe.quant.learned import GridActivationOptions
from qpipe.quant.observed import Observed
from qpipe.quant.quantizer import QuantContext

LSQ, DOREFA = Golden("lsq"), Golden("dorefa")
MAKERS = {
    "lsq": (LsqActivation, LsqActivationOptions),
    "lsq+": (LsqPlusActivation, LsqPlusActivationOptions),
    "pact": (PactActivation, PactOptions),
    "dorefa": (DorefaActivation, GridActivationOptions),
}
ALL = [
    ("lsq", {}),
    ("lsq", {"signed": False, "init": "min-max"}),
    ("lsq+", {}),
    ("lsq+", {"signed": False, "zero_point": "integer"}),
    ("pact", {}),
    ("dorefa", {}),
]
EACH = pytest.mark.parametrize(("kind", "options"), ALL, ids=lambda v: v if isinstance(v, str) else str(v or "default"))


def make(kind, data=None, context=None, site="m:input", **options):
    cls, model = MAKERS[kind]
    quantizer = cls(model(**options))
    quantizer.attach(context or QuantContext(), site)
    if data is not None:
        calibrate(quantizer, data)
    return quantizer


def calibrate(quantizer, *batches):
    quantizer.observing = quantizer.observer()
    for batch in batches:
        assert quantizer(batch) is batch
    seen, quantizer.observing = quantizer.observing, None
    quantizer.calibrated(seen)


def put(parameter, value):
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value).reshape(parameter.shape))


def gradients(quantizer, x, grad):
    x = x.clone().requires_grad_()
    out = quantizer(x)
    return out.detach(), *torch.autograd.grad(out, (x, *quantizer.parameters()), grad)


def activation(seed=0, shape=(3, 5, 16), dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.4).to(dtype)


def close(found, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=rtol, atol=atol)


# --- the reference implementations ------------------------------------------------------------------------------------

UNSIGNED = [case for case in LSQ.of("LsqQuan") if case["params"]["all_positive"]]


@pytest.mark.parametrize("case", UNSIGNED, ids=case_name)
def test_lsq_reference(case):
    params, x = case["params"], LSQ.tensor(case, "x")
    options = {"bits": params["bit"], "signed": False, "grad_scale": "batch"}
    quantizer = make("lsq", x, **options)
    close(quantizer.learned_step.detach(), LSQ.tensor(case, "s_init"))
    put(quantizer.learned_step, LSQ.tensor(case, "s"))
    assert quantizer.gradient_scale(x.shape) == pytest.approx(params["grad_scale"])
    out, grad, grad_step = gradients(quantizer, x, LSQ.tensor(case, "g"))
    close(out, LSQ.tensor(case, "out"))
    close(grad, LSQ.tensor(case, "grad_x"))
    close(grad_step, LSQ.tensor(case, "grad_s"), rtol=1e-4)


CLIPS = [case for case in LSQ.of("LearnedStepSizeQuantization") if not case["params"]["symmetric"]]


@pytest.mark.parametrize("case", CLIPS, ids=case_name)
def test_reference_with_a_learned_unsigned_clip(case):
    """Its parameter is the clip alpha = step * (2**bits - 1), trained by plain autograd."""
    x, bits = LSQ.tensor(case, "x"), case["params"]["num_bits"]
    levels = 2**bits - 1
    quantizer = make("lsq", x, bits=bits, signed=False, init="min-max", grad_scale="none")
    close(quantizer.learned_step.detach() * levels, LSQ.tensor(case, "alpha_init"))
    put(quantizer.learned_step, LSQ.tensor(case, "alpha") / levels)
    out, grad, grad_step = gradients(quantizer, x, LSQ.tensor(case, "g"))
    close(out, LSQ.tensor(case, "out"))
    close(grad, LSQ.tensor(case, "grad_x"))
    close(grad_step / levels, LSQ.tensor(case, "grad_alpha"), rtol=1e-4)


@pytest.mark.parametrize("case", LSQ.of("AsymLsqQuantizer"), ids=case_name)
def test_reference_that_shifts_by_the_smallest_value(case):
    """It shifts by the minimum of each batch, which no file holds: here that is where the offset stands."""
    x, bits = LSQ.tensor(case, "x"), case["params"]["num_bits"]
    first = make("lsq", x, bits=bits, signed=False).learned_step.detach()
    close(2 * first, LSQ.tensor(case, "alpha"))
    quantizer = make("lsq+", bits=bits, signed=False, grad_scale="batch")
    put(quantizer.learned_step, LSQ.tensor(case, "alpha"))
    put(quantizer.offset, x.min())
    assert quantizer.gradient_scale(x.shape) == pytest.approx(case["params"]["grad_scale"])
    out, grad, grad_step, _ = gradients(quantizer, x, LSQ.tensor(case, "g"))
    close(out, LSQ.tensor(case, "out"))
    close(grad, LSQ.tensor(case, "grad_x"))
    close(grad_step, LSQ.tensor(case, "grad_alpha"), rtol=1e-4)


@pytest.mark.parametrize("case", LSQ.of("ALSQPlus"), ids=case_name)
def test_lsq_plus_reference(case):
    params, x = case["params"], LSQ.tensor(case, "x")
    quantizer = make("lsq+", bits=params["bits"], signed=params["Qn"] < 0, grad_scale="batch")
    assert quantizer.levels == (params["Qn"], params["Qp"])
    put(quantizer.learned_step, LSQ.tensor(case, "s"))
    put(quantizer.offset, LSQ.tensor(case, "beta"))
    assert quantizer.gradient_scale(x.shape) == pytest.approx(params["grad_scale"])
    out, grad, grad_step, grad_offset = gradients(quantizer, x, LSQ.tensor(case, "g"))
    close(out, LSQ.tensor(case, "out"))
    close(grad, LSQ.tensor(case, "grad_x"))
    close(grad_step, LSQ.tensor(case, "grad_s"), rtol=1e-4)
    close(grad_offset, LSQ.tensor(case, "grad_beta"), rtol=1e-4)


@pytest.mark.parametrize("case", DOREFA.of("LearnedClippedLinearQuantization"), ids=case_name)
def test_pact_reference(case):
    quantizer, x = make("pact", bits=case["params"]["num_bits"]), DOREFA.tensor(case, "x")
    put(quantizer.clip, DOREFA.tensor(case, "clip_val"))
    out, grad, grad_clip = gradients(quantizer, x, DOREFA.tensor(case, "g"))
    close(out, DOREFA.tensor(case, "out"))
    close(grad, DOREFA.tensor(case, "grad_x"))
    close(grad_clip, DOREFA.tensor(case, "grad_clip"))


@pytest.mark.parametrize("case", DOREFA.of("ClippedLinearQuantization"), ids=case_name)
def test_dorefa_reference(case):
    quantizer = make("dorefa", bits=case["params"]["num_bits"])
    out, grad = gradients(quantizer, DOREFA.tensor(case, "x"), DOREFA.tensor(case, "g"))
    close(out, DOREFA.tensor(case, "out"))
    close(grad, DOREFA.tensor(case, "grad_x"))


def test_every_reference_case_of_an_activation_is_used():
    """Together with those of weights in test_lsq.py and test_dorefa.py."""
    weights = {"SymLsqQuantizer", "LSQPlusWeightQuantizer", "dorefa_quantize_param", "dorefa_quantize_param_ptq"}
    used = {"AsymLsqQuantizer", "ALSQPlus", "LearnedClippedLinearQuantization", "ClippedLinearQuantization"}
    both = {"LsqQuan", "LearnedStepSizeQuantization"}
    assert {case["function"].split(" ")[0] for case in LSQ.cases + DOREFA.cases} == weights | used | both
    assert UNSIGNED and CLIPS


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("offset", [True, False])
def test_gradients_are_those_of_autograd(signed, offset):
    """Written with straight-through rounding and ordinary clamps, in float64."""
    x, grad = activation(), activation(1)
    quantizer = make("lsq+" if offset else "lsq", x, bits=3, signed=signed)
    with torch.no_grad():
        quantizer.learned_step.mul_(0.6)  # so that some values are clipped
    _, found, *slopes = gradients(quantizer, x, grad)

    value = x.double().requires_grad_()
    step = quantizer.learned_step.detach().double().requires_grad_()
    beta = (quantizer.offset.detach().double() if offset else torch.zeros(1).double()).requires_grad_()
    low, high = (-4, 3) if signed else (0, 7)
    v = ((value - beta) / step).clamp(low, high)
    out = (v + (v.round() - v).detach()) * step + beta
    expected, *expected_slopes = torch.autograd.grad(out, (value, step, beta), grad.double())
    factor = 1 / math.sqrt(5 * 16 * high)  # the elements of one example
    close(found, expected.float())
    assert len(slopes) == (2 if offset else 1)
    for ours, theirs in zip(slopes, expected_slopes, strict=False):
        close(ours, (theirs * factor).float(), rtol=1e-4)
    assert bool((found == 0).any()) and bool((found != 0).any())


def test_the_gradient_scale_does_not_depend_on_the_batch():
    x, grad = activation(shape=(4, 5, 16)), activation(1, shape=(4, 5, 16))
    quantizer = make("lsq", x, bits=4)
    whole = gradients(quantizer, x, grad)[2]
    halves = [gradients(quantizer, part, g)[2] for part, g in zip(x.split(2), grad.split(2), strict=True)]
    close(sum(halves), whole, rtol=1e-5)


def test_an_integer_zero_point_keeps_the_gradients_of_the_offset_in_use():
    x, grad = activation(), activation(1)
    rounded = make("lsq+", x, bits=4, zero_point="integer")
    scale, zero = rounded.grid()
    exact = make("lsq+", bits=4)
    put(exact.learned_step, scale)
    put(exact.offset, -zero * scale)
    for found, expected in zip(gradients(rounded, x, grad), gradients(exact, x, grad), strict=True):
        close(found, expected, rtol=1e-4)
    assert float(zero) == round(float(zero))
    put(rounded.offset, 1e6)
    assert float(rounded.grid()[1]) == -8, "the zero point stays within the codes"


@EACH
def test_a_step_never_becomes_negative_and_recovers(kind, options):
    x = activation().abs()
    quantizer = make(kind, x, bits=4, **options)
    parameter = next(quantizer.parameters(), None)
    if parameter is None:
        assert kind == "dorefa"
        return
    put(parameter, -1.0)
    scale, _ = quantizer.grid()
    assert float(scale) > 0
    centre = quantizer.offset.detach() if kind == "lsq+" else 0.0
    _, _, slope, *_ = gradients(quantizer, x, -(x - centre).sign())  # a wider range would lower the loss
    assert float(slope) < 0, "the gradient must lift the step"


@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
@EACH
def test_compiled_code_gives_the_same(kind, options):
    x, grad = activation(), activation(1)
    eager = make(kind, x, bits=4, **options)
    fast = make(kind, x, context=QuantContext(compiled=True), bits=4, **options)
    expected, found = gradients(eager, x, grad), gradients(fast, x, grad)
    assert fast.context.compiled, "fell back to eager mode"
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        close(ours, theirs, rtol=1e-4)


def test_parameters_keep_their_type_where_activations_have_another():
    quantizer = make("lsq+", activation(), bits=4)
    _, grad, *slopes = gradients(quantizer, activation(dtype=torch.bfloat16), activation(1, dtype=torch.bfloat16))
    assert grad.dtype == torch.bfloat16 and {g.dtype for g in slopes} == {torch.float32}


# --- the grid ---------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_equals_compressed_tensors_with_the_range_that_is_exported(kind, options, dtype):
    x = activation(seed=2, dtype=dtype) * 1.5
    quantizer = make(kind, activation(), context=QuantContext(scale_dtype=dtype), bits=4, **options)
    found = quantizer.describe()
    assert found[:3] == (4, False, "tensor")
    assert torch.tensor(found.scale).to(dtype).float() == torch.tensor(found.scale), "the scale is snapped"
    extra = {} if found.zero_point == round(found.zero_point) else {"zp_dtype": torch.float32}
    args = QuantizationArgs(num_bits=4, type="int", symmetric=found.symmetric, strategy="tensor", **extra)
    scale, zero = torch.tensor([found.scale]).to(dtype), torch.tensor([found.zero_point])
    assert torch.equal(quantizer(x), fake_quantize(x, scale, None if found.symmetric else zero, args))
    lattice = quantizer.encode(x)
    lattice.integers()
    with torch.no_grad():
        assert torch.equal(quantizer(x), quantizer(x.clone().requires_grad_()))


def test_levels():
    x = torch.tensor([[-0.3, -0.05, 0.05, 0.34, 0.99, 1.7]])
    third = 1 / 3
    close(make("dorefa", bits=2)(x), torch.tensor([[0, 0, 0, third, 1, 1]]))
    close(make("pact", bits=2, data=x, clip=1.0)(x), torch.tensor([[0, 0, 0, third, 1, 1]]))
    signed = make("lsq", bits=2)
    put(signed.learned_step, 0.5)
    close(signed(x), torch.tensor([[-0.5, 0, 0, 0.5, 0.5, 0.5]]))
    shifted = make("lsq+", bits=2, data=x)  # from the smallest to the largest value
    levels = torch.linspace(-0.3, 1.7, 4)
    close(shifted(x).flatten(), levels[(x.flatten()[:, None] - levels).abs().argmin(1)])


def test_first_ranges():
    x, y = activation(0), activation(1) * 2
    both = torch.cat([x, y])
    quantizer = make("lsq", bits=4)
    calibrate(quantizer, x, y)
    close(quantizer.learned_step.detach(), 2 * both.abs().mean() / math.sqrt(7))
    close(make("lsq", both, bits=4, init="min-max").learned_step.detach(), both.abs().max() / 7)
    shifted = make("lsq+", both, bits=4)
    close(shifted.learned_step.detach(), (both.max() - both.min()) / 15)
    close(shifted.offset.detach(), both.min() + 8 * (both.max() - both.min()) / 15)
    close(make("pact", both).clip.detach(), both.max())
    close(make("pact", both, clip=8.0).clip.detach(), torch.tensor(8.0))


@EACH
def test_another_width_keeps_the_range(kind, options):
    x = activation()
    trained = make(kind, x, bits=8, **options)
    other = make(kind, bits=3, **options)
    with torch.no_grad():
        other.inherit(trained, None)
        wide, narrow = trained(x * 9), other(x * 9)
    step = float(other.grid()[0])
    # Signed levels share the edges of their cells, and an integer zero point rounds the offset by up to half a step.
    allowed = step if options == {} and kind == "lsq" else 0.6 * step if "zero_point" in options else 1e-4
    assert abs(float(wide.max() - narrow.max())) < allowed
    assert abs(float(wide.min() - narrow.min())) < allowed


def test_rescaled_steps_keep_the_zero_point():
    x = activation()
    plain = make("lsq+", x, bits=4)
    wrong = make("lsq+", x, bits=4, context=QuantContext(rescale=lambda s: s * 1.3))
    close(wrong.grid()[0], plain.grid()[0] * 1.3)
    assert torch.equal(wrong.grid()[1], plain.grid()[1])


def test_disabled_is_the_identity():
    quantizer = make("lsq", activation(), context=QuantContext(enabled=False))
    x = activation().requires_grad_()
    assert quantizer(x) is x


# --- calibration ------------------------------------------------------------------------------------------------------


def test_an_uncalibrated_range_shows():
    assert bool(make("lsq")(activation()).isnan().all())
    assert bool(make("pact")(activation()).isnan().all())


@pytest.mark.parametrize("heads", [3, 5], ids="{} heads of 5 tokens".format)
@pytest.mark.parametrize("slot", ["input", "query", "context", "raw_scores", "scores", "probs"])
def test_padding_does_not_count(slot, heads):
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    pairs = kept[:, None, :, None] * kept[:, None, None, :]
    tokens = {
        "input": lambda m: m[:, :, None].expand(2, 5, 8),
        "query": lambda m: m[:, None, :, None].expand(2, heads, 5, 4),
        "context": lambda m: m[:, :, None, None].expand(2, 5, heads, 4),
    }.get(slot, lambda m: pairs.float().expand(2, heads, 5, 5))(kept.float())
    real = activation(shape=tokens.shape)
    x = torch.where(tokens > 0, real, 1e3)
    quantizer = make("lsq+", context=QuantContext(kept=kept), site=f"m:{slot}")
    quantizer.observing = seen = Observed()
    quantizer(x)
    counted = real[tokens > 0]
    assert seen.count == counted.numel()
    assert (seen.low, seen.high) == (float(counted.min()), float(counted.max()))
    assert seen.mean_magnitude == pytest.approx(float(counted.double().abs().mean()))
    assert seen.negative == int((counted < 0).sum())


def test_one_vector_per_sequence_counts_whole():
    quantizer = make("lsq", context=QuantContext(kept=torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0]])))
    quantizer.observing = seen = Observed()
    quantizer(torch.ones(3, 3))
    assert seen.count == 9


@pytest.mark.parametrize(("value", "name"), [(torch.nan, "NaN"), (-torch.inf, "infinity")])
def test_calibration_refuses_non_finite_values(value, name):
    with pytest.raises(TrainingError, match=f"calibration met {name} at m:input in batch 1; ranges need finite"):
        make("lsq", torch.tensor([1.0, value]))


def test_calibration_refuses_what_makes_no_range():
    with pytest.raises(TrainingError, match="m:input saw no data in calibration"):
        make("lsq").calibrated(Observed())
    with pytest.raises(TrainingError, match="m:input saw nothing but the value 3 in calibration.*quantizer: none"):
        make("lsq+", torch.full((2, 3), 3.0))
    with pytest.raises(TrainingError, match="m:input: init 'min-max' found nothing but 3, which is no range"):
        make("lsq+", torch.tensor([[3.0]]))
    with pytest.raises(TrainingError, match="m:input saw no positive value in calibration"):
        make("pact", -activation().abs())


@pytest.mark.parametrize("kind", ["lsq", "pact"])
def test_one_logit_of_one_example_is_a_range_from_0(caplog, kind):
    with caplog.at_level(logging.WARNING):
        quantizer = make(kind, torch.tensor([[3.0]]), **({} if kind == "pact" else {"init": "min-max"}))
    assert "m:input: one value, 3, is all that calibration saw" in caplog.text
    assert quantizer(torch.tensor([3.0])).item() == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(("kind", "options"), [("lsq", {"signed": False}), ("pact", {})])
def test_values_without_a_level_are_warned_of(caplog, kind, options):
    with caplog.at_level(logging.WARNING):
        make(kind, torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), **options)
    assert "m:input: 25 % of the values in calibration are negative, and become 0" in caplog.text
    caplog.clear()
    for quiet, settings in (("lsq", {}), ("lsq+", {"signed": False}), (kind, options)):
        make(quiet, activation().abs() if quiet == kind and settings == options else activation(), **settings)
    assert not caplog.text


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (LsqActivationOptions, {"bits": 1}),
        (LsqActivationOptions, {"granularity": "token"}),
        (LsqActivationOptions, {"init_options": {"momentum": 0.5}}),
        (PactOptions, {"clip": 0}),
        (PactOptions, {"weight_decay": -1}),
        (GridActivationOptions, {"bits": 17}),
    ],
)
def test_wrong_options_are_refused(model, options):
    with pytest.raises(ValidationError):
        model(**options)
