"""Learned scale and zero point with plain gradients against the code of their paper; where learned ranges begin."""

import pytest
import torch
from golden_cases import Golden, case_name
from pydantic import ValidationError

from qpipe import TrainingError
from qpipe.builtin.affine_activation import LearnedAffineActivation, LearnedAffineOptions
from qpipe.builtin.lsq_activation import LsqActivation, LsqActivationOptions
from qpipe.quant.quantizer import QuantContext

UNIFORM = Golden("qct_uniform")
TRAINED = [
    c for c in UNIFORM.cases if c["tensors"].get("g") and c["params"]["axis"] is None and "linear" in str(c["params"])
]
ASYMMETRIC = [c for c in TRAINED if c["function"].startswith("Asym")]
SYMMETRIC = [c for c in TRAINED if c["function"].startswith("Sym")]


def attached(quantizer, dtype=torch.float32):
    quantizer.attach(QuantContext(scale_dtype=dtype), "m:output")
    return quantizer


def make(**options):
    return attached(LearnedAffineActivation(LearnedAffineOptions(**options)))


def calibrated(quantizer, *batches):
    quantizer.observing = seen = quantizer.observer()
    for number, batch in enumerate(batches):
        quantizer.context.calibration_batch = number
        assert quantizer(batch) is batch
    quantizer.observing = None
    quantizer.calibrated(seen)
    return quantizer


def ends(case):
    """What the reference took as the range, for calibration to see."""
    return torch.stack([UNIFORM.tensor(case, "x_min"), UNIFORM.tensor(case, "x_max")])


def gradients(quantizer, case):
    x = UNIFORM.tensor(case, "x").requires_grad_()
    out = quantizer(x)
    return out.detach(), *torch.autograd.grad(out, (x, *quantizer.parameters()), UNIFORM.tensor(case, "g"))


def compare(case, found, name):
    expected = UNIFORM.tensor(case, name)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ASYMMETRIC, ids=case_name)
def test_learned_affine_is_the_reference_s(case):
    bits = case["params"]["n_bits"]
    quantizer = calibrated(make(bits=bits), ends(case))
    low = -(2 ** (bits - 1))
    torch.testing.assert_close(quantizer.step()[0], UNIFORM.tensor(case, "delta"))
    torch.testing.assert_close(quantizer.learned_zero.detach()[0] - low, UNIFORM.tensor(case, "zero_float"))
    out, grad, scale, zero = gradients(quantizer, case)
    codes = quantizer.encode(UNIFORM.tensor(case, "x")).codes - low
    assert torch.equal(codes, UNIFORM.tensor(case, "x_int"))
    compare(case, out, "out")
    compare(case, grad, "grad_x")
    if bits < 16:
        compare(case, scale, "grad_delta")
    else:  # the reference takes the difference of sums of codes in float32, which leaves two digits; so the closed form
        x, g = (UNIFORM.tensor(case, name).double() for name in ("x", "g"))
        steps, zero_point = (
            x / UNIFORM.tensor(case, "delta").double(),
            UNIFORM.tensor(case, "zero_float").round().double(),
        )
        clamped = steps.round().clamp(-zero_point, 65535 - zero_point)
        slope = torch.where(clamped == steps.round(), clamped - steps, clamped)
        assert float(scale) == pytest.approx(float((g * slope).sum()), rel=1e-2)
        assert float(scale) == pytest.approx(float(UNIFORM.tensor(case, "grad_delta")), rel=1e-2)
    compare(case, zero, "grad_zero_float")


def test_the_vectors_clip():
    assert any(bool((UNIFORM.tensor(c, "grad_zero_float") != 0).any()) for c in ASYMMETRIC)
    assert {c["params"]["n_bits"] for c in ASYMMETRIC} >= {2, 4, 8, 16} and len(SYMMETRIC) >= 5


@pytest.mark.parametrize("case", SYMMETRIC, ids=case_name)
def test_learned_scale_of_symmetric_levels_is_the_reference_s(case):
    quantizer = calibrated(make(bits=case["params"]["n_bits"], symmetric=True), ends(case))
    torch.testing.assert_close(quantizer.step()[0], UNIFORM.tensor(case, "delta"))
    out, grad, step = gradients(quantizer, case)
    assert torch.equal(quantizer.encode(UNIFORM.tensor(case, "x")).codes, UNIFORM.tensor(case, "x_int"))
    compare(case, out, "out")
    compare(case, grad, "grad_x")
    compare(case, step, "grad_delta")


def activation(seed=0):
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) * 2 + 0.7


def test_the_range_covers_zero_and_is_kept_at_another_width():
    quantizer, other = calibrated(make(), activation().abs() + 1), make(bits=4)
    assert float(quantizer(torch.zeros(1)).detach()) == 0
    other.inherit(quantizer, None)
    top = [(q.high - float(q.learned_zero.detach())) * float(q.learned_scale.detach()) for q in (quantizer, other)]
    assert top[0] == pytest.approx(float((activation().abs() + 1).max()), rel=1e-5) and top[1] == pytest.approx(top[0])


def test_a_zero_point_that_left_the_codes_can_come_back():
    quantizer = calibrated(make(bits=4), activation())
    with torch.no_grad():
        quantizer.learned_zero.fill_(-20.0)
    x = torch.full((2, 2), -5.0)
    assert float(quantizer.grid()[1]) == -8
    quantizer(x).sum().backward()
    assert float(quantizer.learned_zero.grad) == pytest.approx(-4 * float(quantizer.learned_scale.detach()))


@pytest.mark.parametrize("kind", ["affine", "lsq", "lsq+"])
@pytest.mark.parametrize("name", ["min-max", "current", "running", "percentile", "mse", "mse-golden"])
def test_learned_ranges_begin_with_any_estimator(kind, name):
    """As the calibrated quantizer with that estimator, where both have the same grids."""
    from qpipe.builtin.lsq_activation import LsqPlusActivation, LsqPlusActivationOptions
    from qpipe.quant.activation import ActivationOptions, UniformActivation

    batches = [activation(seed) for seed in range(3)]
    cls, model = {
        "affine": (LearnedAffineActivation, LearnedAffineOptions),
        "lsq": (LsqActivation, LsqActivationOptions),
        "lsq+": (LsqPlusActivation, LsqPlusActivationOptions),
    }[kind]
    found = calibrated(attached(cls(model(bits=4, init=name))), *batches)
    options = {"bits": 4, "dynamic": False, "granularity": "tensor", "symmetric": kind == "lsq", "range": name}
    static = calibrated(attached(UniformActivation(ActivationOptions(**options))), *batches)
    if kind == "affine":
        torch.testing.assert_close(found.grid()[0], static.scale)
        torch.testing.assert_close(found.grid()[1], static.zero_point)
        return
    step, low, high = (float(v) for v in (found.step(), static.low, static.high))
    if "mse" in name:  # of other grids: lsq+ has a float zero point, lsq its highest level at the clip
        x = torch.cat(batches)
        worse = calibrated(attached(cls(model(bits=4, init="min-max"))), *batches)
        assert (found(x) - x).square().mean() < 0.97 * (worse(x) - x).square().mean()
    elif kind == "lsq+":
        assert step == pytest.approx((high - low) / 15, rel=1e-6)
        assert float(found.offset.detach()) == pytest.approx(low + 8 * step, rel=1e-5)
    else:
        assert step * 7 == pytest.approx(max(high, -low), rel=1e-6)


def test_a_last_batch_without_a_range_is_refused():
    with pytest.raises(TrainingError, match=r"m:output: range estimator 'current' found \[0, 0\], which is no range"):
        calibrated(make(init="current"), activation(), torch.zeros(2, 2))


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 17}, {"lr_scale": 0}, {"grad_scale": "layer"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        LearnedAffineOptions(**options)
