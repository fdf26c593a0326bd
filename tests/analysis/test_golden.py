"""Ranking, Hessian and landscape against reference implementations, as recorded in `golden/`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpipe.analysis.hessian import hessian_product, norms, top_eigenvalues
from qpipe.analysis.landscape import normalized
from qpipe.analysis.ranking import cover_length, ranking_loss

FOLDER = Path(__file__).parent / "golden"
WEIGHTS = ("w.a.weight", "w.a.bias", "w.b.weight", "w.b.bias")


def cases(family):
    tensors = load_file(FOLDER / f"{family}.safetensors")
    for case in json.loads((FOLDER / f"{family}.json").read_text())["cases"]:
        prefix = f"c{case['case']:02d}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        yield pytest.param(case["params"], own, id=f"case{case['case']}")


@pytest.mark.parametrize(("params", "given"), cases("ranking"))
def test_ranking(params, given):
    pairs = [(given[f"s_prob{layer}"][0], given[f"t_prob{layer}"][0]) for layer in range(params["layers"])]
    found = torch.cat([ranking_loss(*pair) for pair in pairs])
    torch.testing.assert_close(found, given["ranking_per_head"], rtol=1e-6, atol=1e-7)
    cover = torch.cat([cover_length(*pair, params["top_k"]) for pair in pairs])
    torch.testing.assert_close(cover, given["cover_ratio_per_head"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("params", "given"), cases("landscape"))
def test_directions(params, given):
    for name in params["shapes"]:
        weight, direction = given[f"w.{name}"], given[f"dir.{name}"]
        assert torch.equal(normalized(direction, weight, "rows"), given[f"ll.{name}"])
        assert torch.equal(normalized(direction, weight, "columns"), given[f"hdvw.{name}"])


def product_of(params, given):
    weights = [given[name].clone().requires_grad_() for name in WEIGHTS]
    hidden = torch.tanh(given["X"] @ weights[0].T + weights[1])
    loss = torch.nn.functional.cross_entropy(hidden @ weights[2].T + weights[3], given["Y"])
    return hessian_product(loss + params["l2"] * norms(weights), weights), weights


@pytest.mark.parametrize(("params", "given"), cases("hessian"))
def test_products_make_the_whole_spectrum(params, given):
    product, weights = product_of(params, given)
    sizes = [weight.numel() for weight in weights]
    rows = []
    for unit in torch.eye(sum(sizes)):
        parts = [part.view_as(weight) for part, weight in zip(unit.split(sizes), weights, strict=True)]
        rows.append(torch.cat([part.flatten() for part in product(parts)]))
    spectrum = torch.linalg.eigvalsh(torch.stack(rows)).sort().values
    torch.testing.assert_close(spectrum, given["exact_spectrum"].sort().values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("params", "given"), cases("hessian"))
def test_power_iteration_finds_the_largest_magnitudes(params, given):
    product, weights = product_of(params, given)
    exact = given["exact_spectrum"].double()
    first, second = exact[exact.abs().argsort(descending=True)][:2].tolist()
    generator = torch.Generator().manual_seed(0)
    found = top_eigenvalues(product, weights, 2, generator, iterations=2000, tolerance=1e-7)
    assert [value.value for value in found] == pytest.approx([first, second], rel=1e-4)
    # Where the reference stops, two values of nearly one magnitude are not told apart; the residual says how far it is.
    (usual,) = top_eigenvalues(product, weights, 1, generator)
    assert (exact - usual.value).abs().min() <= usual.residual * abs(usual.value) + 1e-6
    assert abs(usual.value) == pytest.approx(abs(first), rel=0.05)
    if abs(second) < 0.95 * abs(first):
        assert usual.value == pytest.approx(first, rel=1e-2)


def test_most_cases_of_the_hessian_tell_their_largest_eigenvalues_apart():
    """So that the last line above is met."""
    spectra = [
        given["exact_spectrum"].abs().sort(descending=True).values
        for _, given in (case.values for case in cases("hessian"))
    ]
    apart = [bool(values[1] < 0.95 * values[0]) for values in spectra]
    assert sum(apart) > len(apart) / 2


def test_the_order_of_equal_entries_does_not_count():
    """The first rows of a causal map have fewer entries above 0 than are looked for."""
    scores = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    map_ = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    rows = torch.arange(15)
    expected = torch.where(rows < 4, rows + 1, 4).double().sum() / 16**2
    torch.testing.assert_close(cover_length(map_, map_), expected.expand(2))
