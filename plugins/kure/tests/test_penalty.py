import json
from pathlib import Path

import pytest
import torch
from qpipe_kure import kurtosis, kurtosis_penalty
from safetensors.torch import load_file

from qpipe import moments

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "kure.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "kure.safetensors")
SINGLE = [c for c in CASES if c["function"] == "KurtosisWeight"]
TOTAL = [c for c in CASES if c["function"].startswith("KURE total")]


def golden(case, name):
    return TENSORS[f"c{case['case']:02d}.{name}"]


def value_and_grad(weight, target=1.8, squared=True):
    weight = weight.clone().requires_grad_()
    (value,) = kurtosis_penalty(moments([weight]), target, squared)
    (grad,) = torch.autograd.grad(value, weight)
    return value.detach().to(torch.promote_types(weight.dtype, torch.float32)), grad


def by_definition(weight, target, squared):
    z = (weight - weight.mean()) / weight.std()
    k = z.pow(4).mean()
    return (k - target).square() if squared else k


@pytest.mark.parametrize("case", SINGLE, ids=lambda c: f"case{c['case']}")
def test_reference_values_and_gradients(case):
    value, grad = value_and_grad(golden(case, "w"), case["params"]["kurtosis_target"])
    assert kurtosis(golden(case, "w")) == pytest.approx(float(golden(case, "kurtosis")), rel=2e-6)
    torch.testing.assert_close(value, golden(case, "loss"), rtol=2e-5, atol=1e-6)
    expected = golden(case, "grad_w")
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("case", TOTAL, ids=lambda c: f"case{c['case']}")
def test_reference_totals_over_several_weights(case):
    weights = [golden(case, f"w{i}").clone().requires_grad_() for i in range(4)]
    losses = kurtosis_penalty(moments(weights), case["params"]["kurtosis_target"], True)
    torch.testing.assert_close(losses.detach().float(), golden(case, "losses"), rtol=2e-5, atol=1e-6)
    factor, mode = case["params"]["w_lambda_kurtosis"], case["params"]["kurtosis_mode"]
    total = factor * (losses.sum() if mode == "sum" else losses.mean())
    torch.testing.assert_close(total.detach().float(), golden(case, "regulariser"), rtol=2e-5, atol=1e-6)
    grads = torch.autograd.grad(total, weights)
    for i, grad in enumerate(grads):
        expected = golden(case, f"grad_w{i}")
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,)])
def test_closed_form_equals_autograd(shape, squared):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3
    value, grad = value_and_grad(weight, 1.8, squared)
    leaf = weight.clone().requires_grad_()
    expected = by_definition(leaf, 1.8, squared)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0], rtol=1e-9, atol=1e-12)


def test_several_blocks_equal_one_float64_computation():
    weight = torch.randn(524_295, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.01
    value, grad = value_and_grad(weight)
    exact_value, exact_grad = value_and_grad(weight.double())
    assert kurtosis(weight) == pytest.approx(kurtosis(weight.double()), rel=1e-5)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-4, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-3, atol=1e-4 * float(exact_grad.abs().max()))


def test_known_distributions():
    generator = torch.Generator().manual_seed(0)
    assert kurtosis(torch.rand(400_000, generator=generator)) == pytest.approx(1.8, abs=0.01)
    assert kurtosis(torch.randn(400_000, generator=generator) * 1e-3 + 5e-3) == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3e4, 1e-30])
def test_constant_weights_cost_nothing(constant):
    weight = torch.full((300, 301), constant)
    value, grad = value_and_grad(weight)
    assert float(value) == 0.0
    assert torch.equal(grad, torch.zeros_like(weight))
    assert kurtosis(weight) != kurtosis(weight), "the kurtosis of a constant is NaN"


def test_value_and_gradient_stay_finite_with_an_outlier():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, 0] = 1e3
    value, grad = value_and_grad(weight)
    assert float(value) > 1e9
    assert torch.isfinite(grad).all()


def test_bfloat16_gradient_keeps_dtype_and_shape():
    weight = torch.randn(8, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    value, grad = value_and_grad(weight)
    exact, exact_grad = value_and_grad(weight.double())
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16 and grad.shape == weight.shape
    assert float(value) == pytest.approx(float(exact), rel=1e-4)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2, atol=1e-3 * float(exact_grad.abs().max()))


def test_non_contiguous_weights():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    value, grad = value_and_grad(weight)
    value_t, grad_t = value_and_grad(weight.t())
    torch.testing.assert_close(value, value_t)
    torch.testing.assert_close(grad, grad_t.t())


def test_scalar_gradient_scales_the_result():
    weight = torch.randn(5, 5).requires_grad_()
    (grad,) = torch.autograd.grad(kurtosis_penalty(moments([weight]), 1.8, True) * 0.25, weight)
    torch.testing.assert_close(grad, 0.25 * value_and_grad(weight.detach())[1])


def test_empty_weights_are_refused():
    with pytest.raises(ValueError, match="empty"):
        kurtosis(torch.empty(0, 3))


def test_descending_the_penalty_reaches_the_target():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        kurtosis_penalty(moments([weight]), 1.8, True).backward()
        optimizer.step()
    assert kurtosis(weight.detach()) == pytest.approx(1.8, abs=0.02)
