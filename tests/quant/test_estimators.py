"""Range estimators of activations, against the reference, numpy and closed forms."""

import math

import numpy as np
import pytest
import torch
from golden_cases import Golden, case_name

from qpipe import Options, RangeEstimator, RangeEstimatorKind, SiteError, TrainingError
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.estimators import ESTIMATORS, RangeGrid, find_estimator
from qpipe.quant.histogram import BINS, LIMIT, Histogram
from qpipe.quant.quantizer import QuantContext
from qpipe.quant.ranges import search_grid
from qpipe.quant.rounding import grid_over, round_to_codes
from qpipe.quant.tensor import code_range

RANGES = Golden("qct_ranges")
NAMES = {"CurrentMinMaxEstimator": "current", "AllMinMaxEstimator": "min-max", "RunningMinMaxEstimator": "running"}
MIN_MAX = [c for c in RANGES.of(*NAMES) if not c["params"].get("per_channel") and "percentile" not in c["params"]]


def batches(case):
    return [RANGES.tensor(case, name) for name in sorted(case["tensors"]) if name[0] == "b"]


def reference_grid(bits, symmetric):
    """Scale and zero point as in the public code: symmetric `max / (2**(bits-1) - 1)`."""

    def over(bottom, top):
        scale, zero = grid_over(bottom, top, *code_range(bits), symmetric, lambda s: s.clamp_min(1e-8))
        return scale, zero if isinstance(zero, torch.Tensor) else torch.full_like(scale, zero)

    return RangeGrid(*code_range(bits), symmetric, over)


def found(name, parts, grid, **options):
    estimator = find_estimator(name, options, ESTIMATORS)
    for number, part in enumerate(parts):
        estimator.add(part, number)
    return estimator.range(grid)


def quantized(x, grid, ends):
    low, high = (torch.tensor([[end]]) for end in (min(ends[0], 0.0), max(ends[1], 0.0)))
    return grid.quantize(x.reshape(1, -1), low, high).view_as(x)


def activation(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.7


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MIN_MAX, ids=case_name)
def test_min_max_of_the_reference(case):
    name, momentum = NAMES[case["function"]], case["params"]["momentum"]
    options = {"range_options": {"momentum": momentum}} if name == "running" else {}
    bits = case["params"]["n_bits"]
    quantizer = UniformActivation(
        ActivationOptions(bits=bits, granularity="tensor", dynamic=False, symmetric=False, range=name, **options)
    )
    quantizer.attach(QuantContext(), "m:output")
    quantizer.observing = seen = quantizer.observer()
    for number, batch in enumerate(batches(case)):
        quantizer.context.calibration_batch = number
        quantizer(batch)
    quantizer.observing = None
    quantizer.calibrated(seen)
    assert float(quantizer.low) == pytest.approx(float(RANGES.tensor(case, "x_min")), rel=1e-6)
    assert float(quantizer.high) == pytest.approx(float(RANGES.tensor(case, "x_max")), rel=1e-6)
    torch.testing.assert_close(quantizer.scale, RANGES.tensor(case, "delta").reshape(1))
    zero = -(2 ** (bits - 1)) + RANGES.tensor(case, "zero_float").round()
    assert float(quantizer.zero_point) == float(zero)
    torch.testing.assert_close(quantizer(batches(case)[-1]), RANGES.tensor(case, "out"), rtol=0, atol=1e-6)


def test_the_default_momentum_is_the_reference_s():
    (default,) = [f.default for n, f in ESTIMATORS["running"].options.model_fields.items() if n == "momentum"]
    assert default == 0.9


@pytest.mark.parametrize(
    "case", [c for c in RANGES.of("CurrentMinMaxEstimator") if "percentile" in c["params"]], ids=case_name
)
def test_percentile_of_the_reference(case):
    """Its lower end; its upper end is not clipped, by an error."""
    share = case["params"]["percentile"]
    low, high = found("percentile", batches(case), reference_grid(8, False), percentile=100 - share)
    assert low == pytest.approx(float(RANGES.tensor(case, "x_min")), rel=1e-5)
    assert high == pytest.approx(np.percentile(RANGES.tensor(case, "b0").double().numpy(), 100 - share), rel=1e-5)
    assert high < float(RANGES.tensor(case, "x_max"))


@pytest.mark.parametrize(
    "case", [c for c in RANGES.of("MSE_Estimator") if not c["params"].get("per_channel")], ids=case_name
)
def test_least_squared_error_of_the_reference(case):
    """Over all batches; the reference's candidates depend on the first one, and reach 0.5 beyond its largest value."""
    symmetric = case["params"]["kind"] == "symmetric"
    grid, parts = reference_grid(case["params"]["n_bits"], symmetric), batches(case)
    together = torch.cat(parts)
    theirs = tuple(float(RANGES.tensor(case, end).reshape(-1)[0]) for end in ("x_min", "x_max"))
    expected = (quantized(together, grid, theirs) - together).double().square().mean()
    if len(parts) == 1:  # the vectors mean the same grid
        torch.testing.assert_close(quantized(together, grid, theirs), RANGES.tensor(case, "out"), rtol=0, atol=1e-5)
    allowed = {"mse-golden": 1.0001, **({"mse": 1.015} if case["params"]["opt_method"] == "grid" else {})}
    for name, slack in allowed.items():
        error = (quantized(together, grid, found(name, parts, grid)) - together).double().square().mean()
        assert error <= slack * expected, name


@pytest.mark.parametrize("case", RANGES.of("CrossEntropyEstimator"), ids=case_name)
def test_cross_entropy_of_the_reference(case):
    grid, logits = reference_grid(case["params"]["n_bits"], True), RANGES.tensor(case, "b0")

    def loss(x):
        """Above the least possible one."""
        return (logits.softmax(-1) * (logits.log_softmax(-1) - x.log_softmax(-1))).sum(-1).double().mean()

    ends = found("cross-entropy", [logits], grid)
    # It has many minima, of which two searches over a hundred clips may meet different ones.
    assert loss(quantized(logits, grid, ends)) <= 1.01 * loss(RANGES.tensor(case, "out"))
    assert loss(quantized(logits, grid, ends)) < loss(quantized(logits, grid, found("min-max", [logits], grid)))


# --- what holds of all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in ("current", "running")])
def test_parts_of_batches_make_no_difference(name, symmetric):
    x, grid = activation(12, 30), reference_grid(4, symmetric)
    whole, parts = found(name, [x], grid), found(name, x.split(5), grid)
    assert parts == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", ["current", "running"])
def test_a_batch_in_parts_is_one_batch(name):
    x, grid = [activation(8, 6, seed=s) for s in (1, 2)], reference_grid(8, False)
    estimator = find_estimator(name, {}, ESTIMATORS)
    for number, batch in enumerate(x):
        for part in batch.split(3):
            estimator.add(part, number)
    assert estimator.range(grid) == found(name, x, grid)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["mse", "mse-golden"])
def test_never_worse_than_all_values(name, bits, symmetric):
    x, grid = activation(40, 50), reference_grid(bits, symmetric)
    error, whole = ((quantized(x, grid, found(n, [x], grid)) - x).double().square().mean() for n in (name, "min-max"))
    assert error <= whole * (1 + 1e-6)
    assert bits > 4 or error < 0.95 * whole


def test_many_values_are_merged_into_bins_that_change_little():
    x = activation(LIMIT * 3)
    x[:5] = 60.0  # outliers
    seen = Histogram()
    for part in x.split(50_000):
        seen.add(part.numpy())
    assert len(seen.values) <= LIMIT + 50_000 and seen.counts.sum() == len(x)
    assert float(seen.values @ seen.counts) == pytest.approx(float(x.double().sum()), rel=1e-9)
    width = float(x.max() - x.min()) / BINS
    for share in (0.001, 0.5, 0.999):
        assert seen.quantile(share) == pytest.approx(float(np.quantile(x.double().numpy(), share)), abs=2 * width)
    grid = reference_grid(8, False)
    error = (quantized(x, grid, found("mse-golden", x.split(50_000), grid)) - x).double().square().mean()
    scale, zero = search_grid(x, (0,), *code_range(8), False, "mse-golden", lambda s: s)  # of all values
    best = ((round_to_codes(x, scale, zero, *code_range(8)) - zero) * scale - x).double().square().mean()
    assert error == pytest.approx(float(best), rel=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.37, 0.5, 1.0])
def test_quantiles_are_numpy_s(share):
    values = activation(101).numpy()
    seen = Histogram()
    seen.add(values)
    seen.add(values[:7])
    everything = np.concatenate([values, values[:7]]).astype(np.float64)
    assert seen.quantile(share) == pytest.approx(np.quantile(everything, share), rel=1e-12)


# --- bad input, and other people's estimators -------------------------------------------------------------------------


def test_unknown_names_and_options_are_refused():
    with pytest.raises(SiteError, match="no range estimator is called 'runing'; did you mean 'running'.*cross-entropy"):
        find_estimator("runing", {}, ESTIMATORS)
    with pytest.raises(SiteError, match="estimator 'running': momentun is not an option; did you mean 'momentum'"):
        find_estimator("running", {"momentun": 0.5}, ESTIMATORS)
    with pytest.raises(SiteError, match="range estimator 'percentile': percentile = 30"):
        find_estimator("percentile", {"percentile": 30}, ESTIMATORS)


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_cross_entropy_needs_classes(shape):
    with pytest.raises(TrainingError, match="logits of two or more classes, or range: mse"):
        found("cross-entropy", [torch.ones(shape)], reference_grid(8, False))


class Fixed(RangeEstimator):
    def __init__(self, options):
        self.options = options

    def add(self, x, batch):
        pass

    def range(self, grid):
        return self.options.low, self.options.high


class FixedOptions(Options):
    low: float = -1.0
    high: float = 3.0


@pytest.mark.parametrize("ends", [(math.nan, 1.0), (-math.inf, 0.0), (2.0, 1.0), (0.0, 0.0)])
def test_another_estimator_and_what_is_no_range(ends):
    kinds = {"fixed": RangeEstimatorKind("fixed", Fixed, FixedOptions)}

    def calibrated(low, high):
        options = {"range": "fixed", "range_options": {"low": low, "high": high}}
        quantizer = UniformActivation(
            ActivationOptions(granularity="tensor", dynamic=False, symmetric=False, **options)
        )
        quantizer.attach(QuantContext(estimators=kinds), "m:output")
        quantizer.observing = seen = quantizer.observer()
        quantizer(activation(4, 4))
        quantizer.calibrated(seen)
        return quantizer

    assert float(calibrated(-1.0, 3.0).scale) == pytest.approx(4 / 255)
    with pytest.raises(TrainingError, match="m:output: range estimator 'fixed' found .* which is no range"):
        calibrated(*ends)
