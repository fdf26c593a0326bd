"""Range searches against reference implementations, dense grids and closed forms."""

import math

import pytest
import torch
from golden_cases import Golden, case_name
from pydantic import ValidationError
from scipy.optimize import minimize_scalar

from qpipe.quant.clips import aciq_clip, unlikeliness
from qpipe.quant.ranges import RangeOptions, golden_section, search_grid
from qpipe.quant.rounding import min_max_grid, round_to_codes, snap_scale
from qpipe.quant.tensor import code_range

LAPQ, RANGES = Golden("lapq"), Golden("qct_ranges")
SEARCHES = ("mse", "mse-golden", "lp")
METHODS = ("min-max", *SEARCHES, "percentile", "aciq-normal", "aciq-laplace", "likelihood")


def same(scale):
    return snap_scale(scale, torch.float32)


def error(x, scale, zero, bits, p=2.0, axes=None):
    low, high = code_range(bits)
    difference = (round_to_codes(x, scale, zero, low, high) - zero) * scale - x
    return difference.double().abs().pow(p).mean(axes if axes is not None else tuple(range(x.ndim)))


def search(x, bits, method="mse", axes=None, symmetric=True, **more):
    return search_grid(x, axes or tuple(range(x.ndim)), *code_range(bits), symmetric, method, same, **more)


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


# --- LAPQ's layer-wise clips: the README of the vectors allows 5 % on the error ------------------------------------

EXPONENTS = {"L2NormQuantization": 2.0, "L3NormQuantization": 3.0, "MseNoPriorQuantization": 2.0}


@pytest.mark.parametrize("case", LAPQ.of("LpNormQuantization", *EXPONENTS), ids=case_name)
def test_lp_clip_of_the_reference(case):
    params, x = case["params"], LAPQ.tensor(case, "x")
    p = params.get("p") or EXPONENTS[case["function"]]
    bits, signed = params["num_bits"], params["symmetric"]
    scale, zero = search(x, bits, "lp", symmetric=signed, p=p, mid_rise=signed)
    expected = (LAPQ.tensor(case, "out") - x).double().abs().pow(p).mean()
    assert error(x, scale, zero, bits, p) <= 1.05 * expected
    if case.get("scalars"):
        assert float(expected) == pytest.approx(case["scalars"]["error"], rel=1e-3), "the vectors mean the same error"


@pytest.mark.parametrize("case", LAPQ.of("MaxAbsStaticQuantization"), ids=case_name)
def test_largest_magnitude_of_the_reference(case):
    params, x = case["params"], LAPQ.tensor(case, "x")
    bits, signed = params["num_bits"], params["symmetric"]
    scale, zero = search(x, bits, "min-max", symmetric=signed, mid_rise=signed)
    clip = float(scale) * (2**bits - 1) / (2 if signed else 1)
    assert clip == pytest.approx(float(LAPQ.tensor(case, "alpha")), rel=1e-6)
    found = (round_to_codes(x, scale, zero, *code_range(bits)) - zero) * scale
    torch.testing.assert_close(found, LAPQ.tensor(case, "out"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", LAPQ.of("AciqGausQuantization", "AciqLaplaceQuantization"), ids=case_name)
def test_aciq_of_the_reference(case):
    """Its tables have three digits."""
    params, x, clip = case["params"], LAPQ.tensor(case, "x"), float(LAPQ.tensor(case, "alpha"))
    method = "aciq-normal" if "Gaus" in case["function"] else "aciq-laplace"
    bits, signed = params["num_bits"], params["symmetric"]
    scale, zero = search(x, bits, method, symmetric=signed, mid_rise=signed)
    assert float(scale) * (2**bits - 1) / (2 if signed else 1) == pytest.approx(clip, rel=4e-3)
    expected = float((LAPQ.tensor(case, "out") - x).double().square().mean())
    assert float(error(x, scale, zero, bits)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("case", LAPQ.of("LogLikeQuantization"), ids=case_name)
def test_likelihood_of_the_reference(case):
    """How it weighs errors is written nowhere; its clip is a local minimum of ours, next to the least one."""
    x, clip, bits = LAPQ.tensor(case, "x"), float(LAPQ.tensor(case, "alpha")), case["params"]["num_bits"]
    scale, zero = search(x, bits, "likelihood", mid_rise=True)
    found = float(scale) * (2**bits - 1) / 2

    def measure(clip):
        end = torch.full((1, 1), clip)
        return float(unlikeliness(x.reshape(1, -1), 2 * end / (2**bits - 1), -end, end))

    assert found == pytest.approx(clip, rel=0.05) and measure(found) <= measure(clip) < measure(1.005 * clip)
    assert measure(clip) < measure(0.995 * clip) and measure(clip) - measure(found) < 0.005
    expected = float((LAPQ.tensor(case, "out") - x).double().square().mean())
    assert float(error(x, scale, zero, bits)) <= 1.05 * expected


# --- the range estimators of paper 003 --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in RANGES.of("MSE_Estimator") if "b1" not in c["tensors"]], ids=case_name)
def test_least_squared_error_of_the_reference(case):
    """Its candidates reach 0.5 beyond the largest value, which leaves few of them for a small weight."""
    params, x = case["params"], RANGES.tensor(case, "b0")
    axes = (1,) if params.get("per_channel") else (0, 1)
    expected = (RANGES.tensor(case, "out") - x).double().square().mean(axes)
    symmetric = params["kind"] == "symmetric"
    allowed = {"mse-golden": 1.0001, **({"mse": 1.015} if params["opt_method"] == "grid" else {})}
    for method, slack in allowed.items():
        scale, zero = search(x, params["n_bits"], method, axes, symmetric)
        assert bool((error(x, scale, zero, params["n_bits"], axes=axes) <= slack * expected).all()), method


def test_min_max_of_the_reference():
    (case,) = [c for c in RANGES.of("CurrentMinMaxEstimator") if c["params"].get("per_channel")]
    scale, zero = search(RANGES.tensor(case, "b0"), case["params"]["n_bits"], "min-max", (1,))
    torch.testing.assert_close(scale, RANGES.tensor(case, "delta"))
    assert zero == 0.0


@pytest.mark.parametrize(
    "case", [c for c in RANGES.of("CurrentMinMaxEstimator") if "percentile" in c["params"]], ids=case_name
)
def test_percentile_of_the_reference(case):
    """Its lower end; its upper end is not clipped, by an error."""
    x, bits = RANGES.tensor(case, "b0"), case["params"]["n_bits"]
    scale, zero = search(x, bits, "percentile", symmetric=False, percentile=100 - case["params"]["percentile"])
    low = float((code_range(bits)[0] - zero) * scale)
    assert low == pytest.approx(float(RANGES.tensor(case, "x_min")), abs=float(scale) / 2)


# --- what holds of every search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", SEARCHES)
def test_never_worse_than_the_whole_range(method, bits, symmetric):
    x, p = weights(6, 300), 2.5 if method == "lp" else 2.0
    scale, zero = search(x, bits, method, (1,), symmetric)
    whole, at = min_max_grid(x, (1,), *code_range(bits), symmetric, same)
    found, before = (error(x, *grid, bits, p, (1,)) for grid in ((scale, zero), (whole, at)))
    assert bool((found <= before * (1 + 1e-6)).all())
    assert bits > 4 or bool((found < 0.95 * before).all()), "bell-shaped weights gain from a clip at few bits"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_best_of_ten_thousand_clips(bits):
    x = weights(1, 400, seed=bits)
    high, peak = code_range(bits)[1], float(x.abs().max())
    best = min(float(error(x, torch.tensor(peak * i / 8000 / high), 0.0, bits)) for i in range(1, 10001))
    assert float(error(x, *search(x, bits, "mse-golden"), bits)) <= 1.001 * best
    assert float(error(x, *search(x, bits, "mse"), bits)) <= 1.01 * best


def drawn(distribution, *shape):
    """Quantiles, in random order: a sample without chance."""
    number = math.prod(shape)
    p = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    p = p[torch.randperm(number, generator=torch.Generator().manual_seed(0))]
    normal = torch.special.ndtri(p)
    return (
        normal if distribution == "aciq-normal" else (p - 0.5).sign() * -(2 * torch.minimum(p, 1 - p)).log()
    ).float()


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("distribution", ["aciq-normal", "aciq-laplace"])
def test_aciq_is_least_for_its_distribution(distribution, bits):
    """The noise of a step counts in full for what is clipped too, so that its clip is a little too small to be best."""
    x = drawn(distribution, 40_000).reshape(1, -1)
    by_formula, by_search = (error(x, *search(x, bits, m, mid_rise=True), bits) for m in (distribution, "mse-golden"))
    assert by_search * 0.999 <= by_formula <= 1.03 * by_search
    other = next(name for name in ("aciq-normal", "aciq-laplace") if name != distribution)
    assert error(x, *search(x, bits, other, mid_rise=True), bits) > 1.03 * by_search, "the other formula does not fit"


def test_aciq_counts_the_levels_that_there_are():
    """At 2 bits a symmetric grid has three, two steps wide."""
    x = drawn("aciq-laplace", 4000).reshape(1, -1) * 0.1
    scale, zero = search(x, 2, "aciq-laplace")
    b = float(x.abs().mean())
    assert zero == 0.0 and float(scale) == pytest.approx(aciq_clip("aciq-laplace", 3) * b)
    assert 3 * 3**2 == pytest.approx(aciq_clip("aciq-laplace", 3) * math.exp(aciq_clip("aciq-laplace", 3)))


def test_aciq_of_one_sided_and_shifted_rows():
    x = drawn("aciq-laplace", 4000)
    rows = torch.stack([x.relu(), -x.relu(), x + 1])
    scale, zero = search(rows, 4, "aciq-laplace", (1,), symmetric=False)
    ends = [[float((end - zero[row]) * scale[row]) for end in (-8, 7)] for row in range(3)]
    half, whole = aciq_clip("aciq-laplace", 32), aciq_clip("aciq-laplace", 16)
    assert ends[0] == pytest.approx([0, half], rel=0.01) and ends[1] == pytest.approx([-half, 0], rel=0.01)
    assert ends[2] == pytest.approx([1 - whole, 1 + whole], abs=float(scale[2])), "the zero point is an integer"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_likelihood_of_a_laplace_distribution(bits):
    """`(1 - exp(-r)) log(2 r / n) + exp(-r)` is least, for a clip of r mean magnitudes and n steps."""
    x, steps = drawn("aciq-laplace", 40_000).reshape(1, -1), 2**bits - 1
    scale, _ = search(x, bits, "likelihood", mid_rise=True)
    found = float(scale) * steps / 2 / float(x.abs().mean())
    expected = minimize_scalar(
        lambda r: (1 - math.exp(-r)) * math.log(2 * r / steps) + math.exp(-r), bounds=(0.3, 10), method="bounded"
    ).x
    assert found == pytest.approx(expected, rel=0.02)


def test_golden_section_finds_the_minima_of_parabolas():
    places = torch.tensor([[0.2], [1.0], [1.7]])
    left, right = torch.zeros(3, 1), torch.full((3, 1), 2.0)
    found = golden_section(lambda x: (x - places).square(), left, right, left, places.square())
    torch.testing.assert_close(found, places, rtol=0, atol=2 * 0.618**20)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_searched_by_themselves(method):
    x = weights(5, 70_000)  # more than a block
    together, _ = search(x, 4, method, (1,))
    for row in range(5):
        alone, _ = search(x[row : row + 1], 4, method, (1,))
        torch.testing.assert_close(together[row], alone[0])


def test_any_axes():
    x = weights(4, 3, 5)
    scale, zero = search(x, 4, "mse", (0, 2), False)
    assert scale.shape == zero.shape == (1, 3, 1)
    for index in range(3):
        expected, _ = search(x[:, index].reshape(1, -1), 4, "mse", (1,), False)
        torch.testing.assert_close(scale[0, index, 0], expected[0, 0])


def test_percentile_is_the_quantile():
    x = torch.linspace(-1, 1, 2001).reshape(1, -1)
    scale, _ = search(x, 8, "percentile", percentile=75.0)
    assert float(scale * 127) == pytest.approx(0.75, rel=1e-3)


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_tiny_values(method, mid_rise):
    scale, _ = search(torch.zeros(2, 8), 4, method, (1,), mid_rise=mid_rise)
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    tiny, usual = (search(weights(2, 64) * f, 4, method, (1,), mid_rise=mid_rise)[0] for f in (1e-12, 1.0))
    torch.testing.assert_close(tiny, usual * 1e-12, rtol=1e-2, atol=0)


@pytest.mark.parametrize("given", [{"percentile": 99}, {"p": 2}, {"range": "percentile", "p": 3}])
def test_options_belong_to_their_method(given):
    with pytest.raises(ValidationError, match="give (percentile|p) with range: (percentile|lp), and only there"):
        RangeOptions(**given)
