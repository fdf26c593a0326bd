"""Ranges of each batch beside public code: the quantizers of TernaryBERT and TI, of BinaryBERT, and of DeepSpeed.

The first two have the grids of `uniform-activation` with `narrow` and `clip`. By default its grid is that of
compressed-tensors: symmetric levels of theirs end at `max|x|`, ours half a step before; asymmetric ones of theirs begin
at the smallest value, ours have 0 among them. Exported activations hold any scale and zero point, so those of DeepSpeed
too.
"""

import pytest
import torch
from golden_cases import Golden, case_name

from qpipe import ActivationRange, FixedActivation
from qpipe.quant.activation import ActivationOptions, UniformActivation

GOLDEN = Golden("uniform_act")
CASES = GOLDEN.of("SymQuantizer", "AsymQuantizer")
CLIPPED = [case for case in CASES if "clip_val" in case["params"]]
"""Of TernaryBERT, TI and BinaryBERT, which clip at fixed (or learned) values first."""


def is_symmetric(case):
    return case["function"] == "SymQuantizer"


def by_range(case, name):
    """A tensor as `[ranges, values]`: those that share a range are a row."""
    x, params = GOLDEN.tensor(case, name).reshape(GOLDEN.tensor(case, "x").shape), case["params"]
    if params.get("layerwise", True):
        return x.reshape(params.get("num_groups", 1), -1)
    return x.flatten(0, 1).flatten(1) if x.ndim == 4 else x.reshape(-1, x.shape[-1])


def clipped(case):
    low, high = case["params"].get("clip_val", (-torch.inf, torch.inf))
    return by_range(case, "x").clamp(low, high)


def reference_range(case, row):
    """Scale and zero point, among signed codes, by the formulas of the reference."""
    bits = case["params"]["num_bits"]
    low, high = case["params"].get("min_value", row.min()), case["params"].get("max_value", row.max())
    low, high = torch.as_tensor(low), torch.as_tensor(high)
    largest = torch.maximum(low.abs(), high.abs())
    lowest_code = -(2 ** (bits - 1))
    if "clip_val" not in case["params"]:
        scale = 2 * largest / 2**bits if is_symmetric(case) else (high - low) / 2**bits
        return scale, torch.zeros(()) if is_symmetric(case) else lowest_code - (low / scale).round()
    if is_symmetric(case):
        return largest / (2 ** (bits - 1) - 1), torch.zeros(())
    scale = (high - low + 1e-8) / (2**bits - 1)
    return scale, lowest_code - low / scale


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_exported_ranges_hold_the_reference_s_levels(case):
    expected = by_range(case, "out")
    for row, out in zip(clipped(case), expected, strict=True):
        scale, zero = reference_range(case, row)
        settings = (case["params"]["num_bits"], False, "tensor", is_symmetric(case))
        found = FixedActivation(ActivationRange(*settings, float(scale), float(zero)))(row)
        torch.testing.assert_close(found, out, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CLIPPED, ids=case_name)
def test_narrow_ranges_with_a_clip_are_those_of_the_reference(case):
    bits, (low, high) = case["params"]["num_bits"], case["params"]["clip_val"]
    assert low == -high, "one number is enough for the clips of all cases"
    options = ActivationOptions(bits=bits, granularity="tensor", symmetric=is_symmetric(case), narrow=True, clip=high)
    rows = by_range(case, "x").clone().requires_grad_()
    found = torch.stack([UniformActivation(options)(row) for row in rows])
    torch.testing.assert_close(found, by_range(case, "out"), rtol=2e-6, atol=2e-6)
    (grad,) = torch.autograd.grad(found, rows, by_range(case, "g"))
    assert torch.equal(grad, by_range(case, "grad_x"))


@pytest.mark.parametrize("case", [c for c in CASES if "min_value" not in c["params"]], ids=case_name)
def test_our_levels_lie_within_the_steps_of_both(case):
    """Half a step of each apart. DeepSpeed's lack a code for the upper end, and asymmetric ones round the lower one."""
    bits, symmetric = case["params"]["num_bits"], is_symmetric(case)
    quantizer = UniformActivation(ActivationOptions(bits=bits, granularity="tensor", symmetric=symmetric))
    theirs = 0.5 if "clip_val" in case["params"] else 1.0 if symmetric else 1.5
    for row, out in zip(clipped(case), by_range(case, "out"), strict=True):
        step, _ = quantizer.parameters_of(row)
        # Of symmetric levels ours have none at the end itself, so that the largest value moves by one step at most.
        allowed = float(step) * (1.0 if symmetric else 0.5) + theirs * float(reference_range(case, row)[0])
        assert float((quantizer(row) - out).abs().max()) <= allowed * (1 + 1e-5)


@pytest.mark.parametrize("case", CLIPPED, ids=case_name)
def test_gradients_stop_where_the_reference_clips(case):
    low, high = case["params"]["clip_val"]
    quantizer = UniformActivation(
        ActivationOptions(bits=16, granularity="tensor", dynamic=False, symmetric=is_symmetric(case))
    )
    quantizer.low.fill_(low)
    quantizer.high.fill_(high)
    quantizer.freeze_range()
    x = GOLDEN.tensor(case, "x").requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(x), x, GOLDEN.tensor(case, "g"))
    assert torch.equal(grad, GOLDEN.tensor(case, "grad_x"))
    if "learnable_clip" in case["params"]:
        # BinaryBERT learns both ends so. No quantizer of qpipe does (`pact`, `lsq+-activation` and `affine-activation`
        # have rules of their own), so the sums are formed here, from what x does not get.
        ends = GOLDEN.tensor(case, "grad_clip")
        g = GOLDEN.tensor(case, "g") - grad  # what x does not get, the ends do
        torch.testing.assert_close(torch.stack([g[x <= low].sum(), g[x >= high].sum()]), ends.flatten())


def test_gradients_pass_the_range_of_a_batch():
    for case in CASES:
        if case in CLIPPED:
            continue
        quantizer = UniformActivation(ActivationOptions(granularity="tensor", symmetric=is_symmetric(case)))
        x = GOLDEN.tensor(case, "x").requires_grad_()
        (grad,) = torch.autograd.grad(quantizer(x), x, GOLDEN.tensor(case, "g"))
        assert torch.equal(grad, GOLDEN.tensor(case, "grad_x"))


def test_every_case_is_used_and_some_are_clipped():
    assert len(CASES) == len(GOLDEN.cases) == 26
    assert all((GOLDEN.tensor(c, "grad_x") == 0).any() for c in CLIPPED if c["params"]["clip_val"][1] < 2)
