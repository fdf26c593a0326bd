"""Range searches against reference implementations, dense grids and closed forms."""

import pytest
import torch
from golden_cases import Golden, case_name
from pydantic import ValidationError

from qpipe.quant.ranges import RangeOptions, golden_section, search_grid
from qpipe.quant.rounding import min_max_grid, round_to_codes, snap_scale
from qpipe.quant.tensor import code_range

LAPQ, RANGES = Golden("lapq"), Golden("qct_ranges")
SEARCHES = ("mse", "mse-golden", "lp")


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


def test_golden_section_finds_the_minima_of_parabolas():
    places = torch.tensor([[0.2], [1.0], [1.7]])
    left, right = torch.zeros(3, 1), torch.full((3, 1), 2.0)
    found = golden_section(lambda x: (x - places).square(), left, right, left, places.square())
    torch.testing.assert_close(found, places, rtol=0, atol=2 * 0.618**20)


@pytest.mark.parametrize("method", ["min-max", *SEARCHES, "percentile"])
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
@pytest.mark.parametrize("method", ["min-max", *SEARCHES, "percentile"])
def test_zeros_and_tiny_values(method, mid_rise):
    scale, _ = search(torch.zeros(2, 8), 4, method, (1,), mid_rise=mid_rise)
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    tiny, usual = (search(weights(2, 64) * f, 4, method, (1,), mid_rise=mid_rise)[0] for f in (1e-12, 1.0))
    torch.testing.assert_close(tiny, usual * 1e-12, rtol=1e-2, atol=0)


@pytest.mark.parametrize("given", [{"percentile": 99}, {"p": 2}, {"range": "percentile", "p": 3}])
def test_options_belong_to_their_method(given):
    with pytest.raises(ValidationError, match="give (percentile|p) with range: (percentile|lp), and only there"):
        RangeOptions(**given)
