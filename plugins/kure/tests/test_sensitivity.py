"""The formulas against simulation, numerical differentiation and integration; the figures made of them."""

import itertools
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
from qpipe_kure import figures, report
from qpipe_kure import sensitivity as s
from qpipe_kure.report import bits_of_runs, extreme_weights, one_layer, sensitivity_section
from scipy import integrate, stats

WIDTHS = (2, 3, 4, 6)


def by_quadrature(density, step, bits, edge):
    """The mean squared error by integrating each cell of the quantizer; nothing of the code under test."""
    top = 2 ** (bits - 1)
    cuts = sorted({min(max(c, -edge), edge) for c in [-edge, *((k + 0.5) * step for k in range(-top, top)), edge]})

    def error(x):
        code = min(max(round(x / step), -top), top)
        return (x - code * step) ** 2 * density(x)

    return sum(integrate.quad(error, a + 1e-12, b - 1e-12)[0] for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("share", [0.3, 0.8, 1.0, 1.1, 1.7])
def test_uniform_error_is_exact(bits, share):
    a = 1.7
    step = share * a / 2 ** (bits - 1)
    expected = by_quadrature(lambda x: 1 / (2 * a), step, bits, a)
    assert float(s.mse_uniform(step, bits, a)) == pytest.approx(expected, rel=1e-7)
    # One bin of a histogram is a uniform distribution, whose error is equation 5 where that holds.
    assert float(s.mse_histogram((-a, a), (7,), step, bits)) == pytest.approx(expected, rel=1e-7)


def test_histogram_error_is_exact():
    edges, counts = [-1.0, -0.2, 0.1, 0.9], [3, 10, 1]

    def density(x):
        bin_ = np.searchsorted(edges, x) - 1
        return counts[bin_] / (14 * (edges[bin_ + 1] - edges[bin_]))

    steps = np.array([0.05, 0.2, 0.4])
    found = s.mse_histogram(edges, counts, steps, 3)
    grid = np.linspace(-1, 0.9, 1_900_001)[:-1] + 0.5e-6
    codes = np.clip(np.round(grid[None] / steps[:, None]), -4, 4) * steps[:, None]
    weights = (
        np.array(counts)[np.searchsorted(edges, grid) - 1] / (14 * np.diff(edges))[np.searchsorted(edges, grid) - 1]
    )
    assert found == pytest.approx((((grid - codes) ** 2) * weights).sum(1) * 1e-6, rel=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_simulation_agrees_with_both_formulas(bits):
    generator = np.random.default_rng(0)
    normal, flat = generator.normal(size=200_000), generator.uniform(-1, 1, 200_000)
    best = s.best_step(partial(s.mse_normal, bits=bits), 2.0 ** (4 - bits))
    steps = best * np.array([0.8, 1.0, 1.2])
    # Five standard errors of the sampled mean.
    for samples, formula, at in ((normal, s.mse_normal, steps), (flat, s.mse_uniform, steps / 3)):
        for step in at:
            quantized = np.clip(np.round(samples / step), -(2 ** (bits - 1)), 2 ** (bits - 1)) * step
            squared = (samples - quantized) ** 2
            assert float(s.simulate(samples, step, bits)) == pytest.approx(squared.mean(), rel=1e-12)
            error = 5 * squared.std() / len(samples) ** 0.5
            exact = formula is s.mse_uniform
            # Equation 9 counts the rounding error of clipped values too: at most step**2 / 12 times their probability.
            slack = 0 if exact else 2 * stats.norm.sf(2 ** (bits - 1) * step) * step**2 / 12
            assert float(formula(step, bits)) == pytest.approx(squared.mean(), abs=error + slack)


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_error_is_nearly_exact_at_its_best_step(bits):
    best = s.best_step(partial(s.mse_normal, bits=bits), 2.0 ** (4 - bits))
    expected = by_quadrature(stats.norm.pdf, best, bits, 9.0)
    clipped = 2 * stats.norm.sf(2 ** (bits - 1) * best) * best**2 / 12
    assert 0 <= float(s.mse_normal(best, bits)) - expected == pytest.approx(clipped, rel=0.5)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sd", [1.0, 0.3])
def test_second_derivatives(bits, sd):
    def numerical(error, step, h):
        return float(error(step + h) - 2 * error(step) + error(step - h)) / h**2

    for share in (0.4, 0.7, 0.95):
        step = share * 3 * sd / 2 ** (bits - 1)
        found = float(s.curvature_normal(step, bits, sd))
        assert found > 0 and found == pytest.approx(
            numerical(partial(s.mse_normal, bits=bits, sd=sd), step, 1e-3 * step), rel=1e-4
        )
        step = share * sd / 2 ** (bits - 1)
        found = float(s.curvature_uniform(step, bits, sd))
        assert found == pytest.approx(numerical(partial(s.mse_uniform, bits=bits, a=sd), step, 1e-3 * step), rel=1e-4)
    assert np.isnan(s.curvature_uniform(2.1 * sd / 2 ** (bits - 1), bits, sd))


@pytest.mark.parametrize(("bits", "normal"), [(2, 0.86), (3, 1.17), (4, 1.51), (8, 3.02)])
def test_curvatures_at_the_optima(bits, normal):
    best = s.best_step(partial(s.mse_normal, bits=bits), 2.0 ** (4 - bits))
    assert float(s.curvature_normal(best, bits)) == pytest.approx(normal, abs=0.005)
    assert float(s.curvature_uniform(2 / 2**bits, bits)) == pytest.approx(0.5, rel=1e-12)
    assert float(s.curvature_uniform(s.best_step_uniform(bits), bits)) == pytest.approx(2.0 ** (bits - 1), rel=1e-9)
    scanned = s.best_step(partial(s.mse_uniform, bits=bits), 4 / 2**bits)
    assert scanned == pytest.approx(s.best_step_uniform(bits), rel=1e-5)


def test_gamma_is_half_the_curvature_times_the_square_for_small_errors():
    error = partial(s.mse_normal, bits=4)
    best = s.best_step(error, 1.0)
    for epsilon in (1e-3, -1e-3):
        expected = float(s.curvature_normal(best, 4)) * epsilon**2 / 2
        assert float(s.gamma(error, best, epsilon)) == pytest.approx(expected, rel=0.02)


def test_what_the_report_says_about_both_distributions():
    """Large steps cost a uniform distribution less, small ones more; its least error is smaller at every width."""
    normal, uniform = partial(s.mse_normal, bits=4), partial(s.mse_uniform, bits=4, a=figures.SPREAD)
    best = [s.best_step(normal, 1.0), s.best_step_uniform(4, figures.SPREAD)]
    added = {
        r: [float(s.gamma(e, b, r * b)) for e, b in zip((normal, uniform), best, strict=True)] for r in (-0.2, 0.2)
    }
    assert added[-0.2][0] < added[-0.2][1] and added[0.2][0] > added[0.2][1]
    for bits in range(2, 9):
        error = partial(s.mse_normal, bits=bits)
        least = float(error(s.best_step(error, 2.0 ** (4 - bits))))
        assert float(s.mse_uniform(s.best_step_uniform(bits, figures.SPREAD), bits, figures.SPREAD)) < least


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    generator = np.random.default_rng(0)
    entries = []
    for name, values in (
        ("flat", generator.uniform(-1, 1, 5000)),
        ("middle", generator.normal(size=5000)),
        ("tails", generator.standard_t(5, 5000)),
        ("out", generator.standard_t(3, 5000)),
    ):
        counts, edges = np.histogram(values, 64)
        histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
        entries.append(
            {"name": f"{name}.weight", "kurtosis": float(stats.kurtosis(values) + 3), "histogram": histogram}
        )
    weights = [{"name": e["name"].removesuffix(".weight"), "left_out": "", "kurtosis": 3.0} for e in entries]
    weights[-1]["left_out"] = "kurtosis above 10"
    (folder / "tensors.json").write_text(json.dumps(entries))
    (folder / "kure.json").write_text(json.dumps({"options": {"target": 1.8}, "weights": weights}))
    return folder


def test_the_weights_shown_are_the_extremes_of_the_regularized(run_dir):
    assert [label.split(".weight")[0] for label in extreme_weights(run_dir)] == ["flat", "tails"]


def test_standardized_histograms_have_mean_0_and_variance_1():
    """By quadrature; one bin is the uniform distribution of variance 1."""
    density, edges = figures.standardized({"edges": [-1.0, 0.5, 2.0, 2.5], "counts": [3, 10, 1]})
    x = np.linspace(edges[0], edges[-1], 2_000_001)[:-1]
    x += (edges[-1] - edges[0]) / 4_000_000
    values = density[np.searchsorted(edges, x) - 1]
    moments = [float((values * x**k).mean() * (edges[-1] - edges[0])) for k in range(3)]
    assert moments == pytest.approx([1, 0, 1], abs=1e-5)
    assert (density[0] * np.diff(edges)[0], density[1] * np.diff(edges)[1]) == pytest.approx((3 / 14, 10 / 14))
    density, edges = figures.standardized({"edges": [4.0, 6.0], "counts": [5]})
    assert edges.tolist() == pytest.approx([-figures.SPREAD, figures.SPREAD]) and density[0] == pytest.approx(
        0.5 / figures.SPREAD
    )


@pytest.fixture
def compared(run_dir, tmp_path_factory):
    """The run after `qpipe evaluate run other --variants bits`; the other has no penalty."""
    other = tmp_path_factory.mktemp("others") / "plain"
    other.mkdir()
    entry = json.loads((run_dir / "tensors.json").read_text())[1] | {"name": "tails.weight", "kurtosis": 4.5}
    (other / "tensors.json").write_text(json.dumps([entry]))
    for folder, values, beside in ((run_dir, (0.7, 0.9), [other]), (other, (0.5, 0.8), [run_dir])):
        points = [("trained", None, False, 0.9), ("bits", 2, False, values[0]), ("bits", 4, False, values[1])]
        points += [("bits", None, False, 0.95), ("bits", 2, True, 0.1), ("step", 0.9, False, 0.6)]
        names = ("variant", "value", "activations", "metrics")
        entries = [dict(zip(names, (v, at, act, {"accuracy": m}), strict=True)) for v, at, act, m in points]
        document = {"metric": "accuracy", "points": entries, "compared": [str(path) for path in beside]}
        (folder / "variants.json").write_text(json.dumps(document))
    return run_dir


def test_one_layer_and_its_metric_over_bits_of_several_runs(compared):
    """The layer is the regularized one with the largest kurtosis before training; widths of weights alone."""
    record = json.loads((compared / "kure.json").read_text())
    record["weights"][2]["kurtosis"] = 9.0
    (compared / "kure.json").write_text(json.dumps(record))
    entries = {e["name"]: e for e in json.loads((compared / "tensors.json").read_text())}
    own, other = one_layer(compared).items()
    assert own == (
        f"own (target 1.8), kurtosis {entries['tails.weight']['kurtosis']:.2f}",
        entries["tails.weight"]["histogram"],
    )
    assert other == ("plain (without), kurtosis 4.50", entries["middle.weight"]["histogram"])
    assert bits_of_runs(compared) == (
        "accuracy",
        {"own (target 1.8)": {2: 0.7, 4: 0.9}, "plain (without)": {2: 0.5, 4: 0.8}},
    )
    html = sensitivity_section(compared).html
    assert html.count('role="img"') == 5 and "Figure 3 (b)." in html and "qpipe evaluate" not in html
    assert html.count("plain (without)") == 2, "in the legends of figures 3 (a) and (b)"


@pytest.mark.parametrize("name", ["{}/in/runs/of/a-long-name", "{}-with-one-and-the-same-end", "r{}"])
def test_every_run_has_a_label_of_its_own(compared, tmp_path_factory, name):
    """Equal names in several folders, other names of which labels show the same part, and short ones."""
    others = []
    for start in ("first", "second", "third"):
        folder = tmp_path_factory.mktemp("others") / name.format(start)
        shutil.copytree(compared, folder)
        others.append(folder)
    document = json.loads((compared / "variants.json").read_text())
    (compared / "variants.json").write_text(json.dumps({**document, "compared": [str(path) for path in others]}))
    labels = list(report.beside(compared))
    assert list(report.beside(compared).values()) == [compared.resolve(), *others]
    assert len(set(labels)) == len(bits_of_runs(compared)[1]) == len(one_layer(compared)) == 4
    assert all(len(label) <= len("… 9 (target 1.8)") + 24 for label in labels)


def test_the_section(run_dir):
    section = sensitivity_section(run_dir)
    assert section.title == "Sensitivity to the step size" and section.html.count('role="img"') == 4
    assert "qpipe evaluate own OTHER-RUN ... --variants bits" in section.html
    for figure in ("Figure 1", "Figure 2", "Figure 3 (a)", "Figure 3 (b)", "Figure 3 (c)"):
        assert section.html.count(figure) == 1
    assert "http" not in section.html and figures.INK not in section.html and "<script" not in section.html
    assert all(label in section.html for label in extreme_weights(run_dir))
    ids = re.findall(r'\bid="([^"]*)"', section.html)
    assert len(ids) == len(set(ids)) and all(i.startswith("kure-") for i in ids)
    (run_dir / "tensors.json").unlink()
    assert sensitivity_section(run_dir).html.count('role="img"') == 4
