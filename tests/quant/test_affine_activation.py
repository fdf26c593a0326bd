"""Learned scale and zero point with plain gradients against the code of their paper; where learned ranges begin."""

import math

import pytest
import torch
from golden_cases import Golden, case_name
from pydantic import ValidationError

from qpipe import TrainingError
from qpipe.builtin.affine_activation import LearnedAffineActivation, LearnedAffineOptions
from qpipe.builtin.lsq import LsqOptions, LsqWeight
from qpipe.builtin.lsq_activation import LsqActivation, LsqActivationOptions
from qpipe.quant.quantizer import QuantContext

UNIFORM = Golden("qct_uniform")
TRAINED = [c for c in UNIFORM.cases if c["tensors"].get("g") and c["params"]["axis"] is None]
BY_CHANNEL = [c for c in UNIFORM.cases if c["params"].get("axis") == "pc"]
BY_FEATURE = [c for c in UNIFORM.cases if c["params"].get("axis") == 2]
EDGES = [c for c in UNIFORM.cases if "EDGE" in c.get("note", "")]
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


def test_one_logit_of_one_example_is_a_range_from_0(caplog):
    quantizer = calibrated(make(), torch.tensor([[3.0]]))
    assert "m:output: one value, 3, is all that calibration saw" in caplog.text
    assert quantizer.step().item() == pytest.approx(3 / 255) and quantizer(torch.tensor([3.0])).item() == 3


def compare(case, found, name):
    expected = UNIFORM.tensor(case, name)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ASYMMETRIC, ids=case_name)
def test_learned_affine_is_the_reference_s(case):
    bits = case["params"]["n_bits"]
    quantizer = calibrated(make(bits=bits, scale_domain=case["params"]["scale_domain"]), ends(case))
    low = -(2 ** (bits - 1))
    torch.testing.assert_close(quantizer.learned_scale.detach()[0], UNIFORM.tensor(case, "delta"))
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
    domain = case["params"]["scale_domain"]
    quantizer = calibrated(make(bits=case["params"]["n_bits"], symmetric=True, scale_domain=domain), ends(case))
    torch.testing.assert_close(quantizer.learned_scale.detach()[0], UNIFORM.tensor(case, "delta"))
    out, grad, step = gradients(quantizer, case)
    assert torch.equal(quantizer.encode(UNIFORM.tensor(case, "x")).codes, UNIFORM.tensor(case, "x_int"))
    compare(case, out, "out")
    compare(case, grad, "grad_x")
    compare(case, step, "grad_delta")


@pytest.mark.parametrize("case", BY_CHANNEL, ids=case_name)
def test_weights_by_channel(case):
    """As `lsq` without its gradient scale computes them, but that values count as clipped beyond the last level there,
    and half a step later here."""
    x, steps = UNIFORM.tensor(case, "x"), UNIFORM.tensor(case, "delta")
    quantizer = LsqWeight(LsqOptions(bits=case["params"]["n_bits"], granularity="channel", grad_scale="none"))
    quantizer.attach(QuantContext(), "m:weight")
    quantizer.initialize(x)
    with torch.no_grad():
        (step,) = quantizer.parameters()
        step.copy_(steps.view_as(step))
    out, *found = gradients(quantizer, case)
    assert torch.equal(quantizer.encode(x).codes.view_as(x), UNIFORM.tensor(case, "x_int"))
    compare(case, out, "out")
    steps_of_x, params = x / steps.view(-1, 1), case["params"]
    same = (steps_of_x <= params["int_max"]) & (steps_of_x >= params["int_min"]) | (
        steps_of_x.round() != steps_of_x.round().clamp(params["int_min"], params["int_max"])
    )
    assert 0.9 < same.double().mean() < 1
    for value, name, where in zip(found, ("grad_x", "grad_delta"), (same, same.all(1)), strict=True):
        expected = UNIFORM.tensor(case, name)
        torch.testing.assert_close(value.view(expected.shape)[where], expected[where], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", EDGES, ids=case_name)
def test_edges(case):
    """A tensor of zeros is refused, where the reference takes 1e-8 for its range."""
    symmetric = case["function"].startswith("Sym")
    quantizer = make(bits=case["params"]["n_bits"], symmetric=symmetric)
    if "zero tensor" in case["note"]:
        with pytest.raises(TrainingError, match="saw nothing but the value 0"):
            calibrated(quantizer, UNIFORM.tensor(case, "x"))
        return
    found = calibrated(quantizer, ends(case))(UNIFORM.tensor(case, "x")).detach()
    torch.testing.assert_close(found, UNIFORM.tensor(case, "out"))


def test_every_case_is_used():
    """Those with a range for each feature in the tests of plugin `peg`."""
    used = [*ASYMMETRIC, *SYMMETRIC, *BY_CHANNEL, *BY_FEATURE, *EDGES]
    assert sorted(c["case"] for c in used) == sorted(c["case"] for c in UNIFORM.cases)
    assert len(BY_CHANNEL) == 2 and len(BY_FEATURE) == 2 and len(EDGES) == 4
    assert {c["params"]["scale_domain"] for c in (*ASYMMETRIC, *SYMMETRIC)} == {"linear", "log"}


def test_a_step_of_the_logarithm_is_a_factor():
    """Twice the range takes the same gradient of the parameter, and as many steps to change as much."""
    narrow, wide = (calibrated(make(scale_domain="log"), activation() * factor) for factor in (1.0, 4.0))
    for quantizer, factor in ((narrow, 1.0), (wide, 4.0)):
        (quantizer(activation() * factor) / factor).sum().backward()
    torch.testing.assert_close(narrow.learned_scale.grad, wide.learned_scale.grad, rtol=1e-3, atol=1e-3)
    before = wide.step().clone()
    with torch.no_grad():
        wide.learned_scale -= 0.1
    torch.testing.assert_close(wide.step(), before * math.exp(-0.1))


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
