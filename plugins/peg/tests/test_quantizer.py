import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from qpipe_peg import ObservedFeatures, PegActivation, PegOptions, RunningRange
from safetensors.torch import load_file

from qpipe import FixedActivation, SiteError, TrainingError, by_feature

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "qct_peg.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "qct_peg.safetensors")
UNIFORM = load_file(GOLDEN / "qct_uniform.safetensors")
BY_FEATURE = [c for c in json.loads((GOLDEN / "qct_uniform.json").read_text())["cases"] if c["params"].get("axis") == 2]
FEATURES = [c for c in CASES if c["params"]["axis"] == 2]
POSITIONS = [c for c in CASES if c["params"]["axis"] == 1]
"""A static range for each position of a token (`--per-token`), which no run can have (docs/decisions/019)."""


def golden(case, name):
    return TENSORS[f"c{case['case']:02d}.{name}"].clone()


def make(site="checked:output", **options):
    quantizer = PegActivation(PegOptions(**options))
    quantizer.site = site
    return quantizer


def calibrated(*batches, **options):
    quantizer = make(**options)
    seen = quantizer.observer()
    for seen.batch, batch in enumerate(batches):
        seen.add(batch, quantizer.site)
    quantizer.calibrated(seen)
    return quantizer


def values(*shape, seed=0):
    """Features of very different ranges, none of them in order."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randperm(shape[-1], generator=generator) + 0.5
    return torch.randn(*shape, generator=generator) * spread + 0.3 * spread


def of_golden(case, learned=False):
    """Order from the batches of the case's first pass, ranges from its x."""
    params = case["params"]
    options = {"bits": params["n_bits"], "groups": params["n_groups"], "permute": params["permute"]}
    quantizer = make(statistics="last", range="last", learned=learned, **options)
    seen = quantizer.observer()
    for seen.batch, name in enumerate(n for n in ("p0", "p1") if n in case["tensors"]):
        seen.add(golden(case, name), quantizer.site)
    ordering = replace(seen.ordering)
    seen.batch = 2
    seen.add(golden(case, "x"), quantizer.site)
    if params["permute"]:
        seen.ordering = ordering
    quantizer.calibrated(seen)
    return quantizer


@pytest.mark.parametrize("case", FEATURES, ids=lambda c: f"case{c['case']}")
def test_reference(case):
    quantizer = of_golden(case)
    if case["params"]["permute"]:
        low, high = quantizer.seen.ordering.ends()
        torch.testing.assert_close(high - low, golden(case, "ranges"), rtol=1e-6, atol=0)  # averaged with itself there
        assert torch.equal(quantizer.order, golden(case, "perm"))
    assert torch.equal(by_feature(quantizer.steps, quantizer.order), golden(case, "delta"))
    assert torch.equal(by_feature(quantizer.zeros, quantizer.order), golden(case, "zero_float"))
    x = golden(case, "x").requires_grad_()
    codes = quantizer.encode(x.detach()).integers()
    assert torch.equal(codes + 2.0 ** (case["params"]["n_bits"] - 1), golden(case, "x_int"))
    out = quantizer(x)
    assert torch.equal(out.detach(), golden(case, "out"))
    (grad,) = torch.autograd.grad(out, x, golden(case, "g"))
    torch.testing.assert_close(grad, golden(case, "grad_x"), rtol=1e-6, atol=0)  # multiplied and divided by s there


@pytest.mark.parametrize("case", POSITIONS, ids=lambda c: f"case{c['case']}")
def test_reference_with_a_range_for_each_position(case):
    """The same arithmetic along another axis, so positions stand where features do."""
    params = case["params"]
    assert (params["n_groups"], params["permute"]) == (None, False)
    x = golden(case, "x").transpose(1, 2)
    quantizer = calibrated(x, bits=params["n_bits"], groups=None, permute=False, range="last")
    low, high = quantizer.seen.gridding.ends()
    assert torch.equal(low, golden(case, "emb_min")) and torch.equal(high, golden(case, "emb_max"))
    assert torch.equal(quantizer(x).transpose(1, 2), golden(case, "out"))


def test_no_case_of_the_reference_is_left_out():
    tested = [case["case"] for case in (*FEATURES, *POSITIONS)]
    assert sorted(tested) == [0, 1, 3, 4, 6, 7, 9, 10] == [case["case"] for case in CASES]


@pytest.mark.parametrize("case", BY_FEATURE, ids=lambda c: f"case{c['case']}")
def test_learned_ranges_of_each_feature_are_the_reference_s(case):
    """The reference's class for one axis, with the gradients that it has outside of its groups."""
    compared = ("delta", "zero_float", "x_int", "out", "grad_x", "grad_delta", "grad_zero_float")
    names = ("x", "g", "x_min", "x_max", *compared)
    x, g, low, high, *expected = (UNIFORM[f"c{case['case']:02d}.{name}"].clone() for name in names)
    bits = case["params"]["n_bits"]
    ends = torch.stack([low, high]).flatten(1)
    quantizer = calibrated(ends, bits=bits, groups=None, permute=False, learned=True)
    out = quantizer(x.requires_grad_())
    grads = torch.autograd.grad(out, (x, quantizer.steps, quantizer.zeros), g)
    codes = quantizer.encode(x.detach()).integers() + 2.0 ** (bits - 1)
    found = (quantizer.steps, quantizer.zeros, codes, out, *grads)
    for value, wanted, name in zip(found, expected, compared, strict=True):
        torch.testing.assert_close(value.detach().view(wanted.shape), wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3, None])
def test_learned_gradients_are_those_of_the_rounded_formula(bits, groups):
    """The same by autograd in float64: rounding has the gradient 1, clamping its own; values lie inside and outside."""
    x = values(3, 5, 12).requires_grad_()
    quantizer = calibrated(0.6 * x, bits=bits, groups=groups, learned=True)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(quantizer(x), (x, quantizer.steps, quantizer.zeros), upstream)

    inputs = [t.detach().double().requires_grad_() for t in (x, quantizer.steps, quantizer.zeros)]
    size = 12 // len(quantizer.steps)
    place = quantizer.order.argsort()
    s, zero = (t.repeat_interleave(size)[place] for t in inputs[1:])

    def rounded(v):
        return v + (v.round() - v).detach()

    top = 2**bits - 1
    z = rounded(zero).clamp(0, top)
    out = s * ((rounded(inputs[0] / s) + z).clamp(0, top) - z)
    torch.testing.assert_close(quantizer(x).double(), out, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(out, inputs, upstream.double())
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert bool((grads[2] != 0).all()), "every group has values outside"


@pytest.mark.parametrize(("outside", "far"), [(-20.3, 1), (40.3, -1)])
def test_a_zero_point_that_left_the_codes_can_come_back(outside, far):
    """The outermost code stands for it, so that all levels lie on one side of 0; its gradient is that of any other."""
    quantizer = calibrated(values(2, 3, 12), bits=4, groups=3, learned=True)
    with torch.no_grad():
        quantizer.zeros[1] = outside
    group, step = quantizer.order[4:8], float(quantizer.steps.detach()[1])
    x, upstream = torch.zeros(2, 3, 12), values(2, 3, 12, seed=1)
    x[0, :, group] = 100 * far * step  # outside; zeros are levels
    out = quantizer(x)
    torch.testing.assert_close(out.detach(), 15 * x / 100)
    out.backward(upstream)
    total = float(upstream[0, :, group].sum())
    assert quantizer.zeros.grad.tolist() == [0, pytest.approx(-step * total, rel=1e-5), 0]
    assert quantizer.steps.grad.tolist() == [0, pytest.approx(15 * far * total, rel=1e-5), 0]


def test_fixed_ranges_have_no_parameters():
    x = values(2, 4, 12)
    assert not list(calibrated(x).parameters())
    assert [n for n, _ in calibrated(x, learned=True).named_parameters()] == ["steps", "zeros"]


def test_groups_hold_neighbours_in_range_and_a_scale_each():
    x = values(4, 6, 12)
    quantizer = calibrated(x, groups=3)
    ranges = x.amax((0, 1)) - x.amin((0, 1))
    assert torch.equal(quantizer.order, ranges.argsort())
    described = quantizer.describe()
    assert described.scale == sorted(described.scale) and len(described.scale) == 3
    for number, members in enumerate(quantizer.order.view(3, 4)):
        alone = calibrated(x[..., members], groups=1)
        assert alone.describe().granularity == "tensor"
        assert alone.describe().scale == described.scale[number]
        assert torch.equal(alone(x[..., members]), quantizer(x)[..., members])


def test_order_without_permutation():
    described = calibrated(values(2, 3, 12), groups=4, permute=False).describe()
    assert list(described.order) == list(range(12)) and described.granularity == "group"


def test_the_described_range_quantizes_alike():
    x = values(2, 3, 12)
    quantizer = calibrated(x, groups=4)
    for dtype in (torch.float32, torch.bfloat16):
        value = values(2, 3, 12, seed=5).to(dtype)
        assert torch.equal(FixedActivation(quantizer.describe())(value), quantizer(value))


@pytest.mark.parametrize(
    ("statistic", "low", "high"),
    [("last", [-1.0, 0.0], [0.0, 8.0]), ("max", [-4.0, 0.0], [2.0, 8.0]), ("ema", [-3.25, 0.0], [1.5, 3.5])],
)
def test_statistics(statistic, low, high):
    """The average of two batches with momentum 0.75: three quarters of the first, one of the second.

    Shown whole, in parts of one token, or with parts that are empty.
    """
    batches = torch.tensor([[[-4.0, 0.0], [2.0, 2.0]], [[-1.0, 8.0], [0.0, 0.0]]])
    for size in (2, 1):
        seen = ObservedFeatures(ordering=RunningRange(statistic, 0.75), gridding=RunningRange("max"))
        for seen.batch, batch in enumerate(batches):
            for part in batch.split(size):
                seen.add(part, "site")
                seen.add(torch.empty(0, 2), "site")
        found = seen.ordering.ends()
        assert (found[0].tolist(), found[1].tolist()) == (low, high)
        assert (seen.low, seen.high, seen.count) == (-4.0, 8.0, 8)


@pytest.mark.parametrize(
    ("statistic", "low", "high"),
    [("last", 7.0, 8.0), ("max", 0.0, 8.0), ("ema", 0.5625 * 0 + 0.1875 * 3 + 0.25 * 7, 0.5625 * 2 + 0.1875 * 5 + 2.0)],
)
def test_three_batches(statistic, low, high):
    """The average keeps .75 of itself twice: .5625 of the first batch, .1875 of the second, .25 of the third."""
    running = RunningRange(statistic, 0.75)
    for batch, ends in enumerate(((0.0, 1.0), (1.0, 2.0), (3.0, 5.0), (7.0, 7.5), (8.0, 8.0))):
        running.add(torch.tensor([ends[0]]), torch.tensor([ends[1]]), (0, 0, 1, 2, 2)[batch])
    assert tuple(float(end) for end in running.ends()) == (low, high)


def test_a_shared_order_is_that_of_the_other():
    x, h = values(2, 4, 12), values(2, 4, 12, seed=3)
    one, other = make(groups=3), make(groups=6)
    one.shared_with = (other,)
    seen = one.observer(), other.observer()
    seen[0].add(x, "x")
    seen[1].add(h, "h")
    one.calibrated(seen[0])
    other.calibrated(seen[1])
    assert torch.equal(one.order, other.order)
    assert torch.equal(other.order, (h.amax((0, 1)) - h.amin((0, 1))).argsort())
    assert one.describe().scale == pytest.approx(
        [float(x[..., m].amax() - x[..., m].amin()) / 255 for m in one.order.view(3, 4)], rel=1e-5
    )


def test_another_width_keeps_order_and_ranges():
    trained = calibrated(values(2, 4, 12), groups=3)
    changed = make(groups=3, bits=4)
    changed.inherit(trained, None)
    before, after = trained.describe(), changed.describe()
    assert before.order == after.order
    for s, t in zip(before.scale, after.scale, strict=True):
        assert t == pytest.approx(s * 255 / 15)


def test_groups_that_do_not_divide():
    quantizer = make("block.dense:output")
    with pytest.raises(SiteError, match=r"block.dense:output: 6 groups do not divide its 32 .* 1, 2, 4, 8, 16, 32, or"):
        quantizer.set_width(32)
    with pytest.raises(SiteError, match="5 groups do not divide"):
        calibrated(values(2, 12), groups=5)


@pytest.mark.parametrize(("bad", "name"), [(torch.nan, "NaN"), (-torch.inf, "infinity")])
def test_calibration_that_is_not_finite(bad, name):
    x = values(2, 3, 12)
    x[0, 1, 2] = bad
    with pytest.raises(TrainingError, match=f"calibration met {name} at checked:output in batch 1; ranges need finite"):
        calibrated(x)


def test_calibration_of_a_constant():
    with pytest.raises(TrainingError, match="checked:output saw nothing but the value 2 .* quantizer: none"):
        calibrated(torch.full((2, 3, 12), 2.0))


def test_no_calibration():
    with pytest.raises(TrainingError, match="checked:output saw no data"):
        calibrated()
    quantizer = make(groups=3)
    quantizer.set_width(12)
    with pytest.raises(TrainingError, match="no finite range; was it calibrated"):
        quantizer.describe()
    assert bool(quantizer(torch.ones(2, 12)).isnan().all()), "a range that was forgotten shows in the loss"


def test_a_group_of_zeros_stays_zero():
    x = values(2, 3, 12)
    x[..., :4] = 0
    quantizer = calibrated(x, groups=3)
    assert bool((quantizer(x)[..., :4] == 0).all()) and bool(quantizer(x).isfinite().all())


@pytest.mark.parametrize("wrong", [{"groups": 0}, {"bits": 17}, {"statistics": "mean"}, {"momentum": 1.0}])
def test_options(wrong):
    with pytest.raises(ValidationError):
        PegOptions(**wrong)
