"""The report's section on where quantization acts: figures and numbers of results that were made by hand."""

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch

from qpipe.analysis.attention import attention_maps
from qpipe.analysis.outliers import outliers, token_ranges
from qpipe.report import analysis_plots as plots
from qpipe.report.analysis import HEADS, analysis

SUM, INPUT, QUIET = "layer.0.output.LayerNorm:input", "layer.0.dense:input", "layer.1.dense:input"
TOKENS = [["[CLS]", "a", "film", "[SEP]"], ["[CLS]", "fun", "[SEP]"]]
ABLATION = {
    "metric": "accuracy",
    "higher_is_better": True,
    "examples": 32,
    "quantized": 0.6875,
    "full_precision": 0.9062,
    "groups": [
        {"group": "all weights", "sites": 13, "without": 0.7188, "alone": 0.8438},
        {"group": "ffn_sum", "sites": 2, "without": 0.8125, "alone": 0.7812},
    ],
    "suggestion": {
        "within": 0.05,
        "bits": 16,
        "chosen": [{"group": "ffn_sum", "metric": 0.8125}, {"group": "query", "metric": 0.875}],
        "reached": True,
        "rules": [],
    },
}
NOISE = {"sites": {"layer.0.dense:weight": 21.25, SUM: 7.5, INPUT: 38.0, "layer.1.dense:weight": None}}
HEAD = {"to [SEP]": [0.0, 0.1, 0.1, 0.8], "even": [0.25, 0.25, 0.25, 0.25]}


def planted():
    """Values of 30 features, all .5 but one -.5: 40 in dimension 7 at [SEP], 30 in dimension 11 at one [CLS]."""
    values = [torch.full((len(row), 30), 0.5) for row in TOKENS]
    for value in values:
        value[:, 0] = -0.5
        value[-1, 7] = 40.0
    values[1][0, 11] = 30.0
    return values


def attention():
    first = torch.tensor([[HEAD["to [SEP]"]] * 4, [HEAD["even"]] * 4])
    second = torch.tensor([[[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 1.0]]] * 2)
    layers = [[first, second], [first.flip(0), second]]
    return {"tokens": TOKENS[0], "layers": ["0", "1"], **attention_maps(layers, [[3], [2]])}


def parts():
    quiet = [torch.full((len(row), 30), 0.5).index_fill_(1, torch.tensor([0]), -0.5) for row in TOKENS]
    sites = {
        SUM: planted(),
        "layer.0.output.LayerNorm:same": planted(),
        INPUT: [2 * v for v in planted()],
        QUIET: quiet,
    }
    return {
        "ablation": ABLATION,
        "outliers": {
            "settings": {"sequences": 2},
            "sites": {name: outliers(values, TOKENS) for name, values in sites.items()},
        },
        "ranges": {"tokens": TOKENS, "sites": {name: token_ranges(values) for name, values in sites.items()}},
        "attention": attention(),
        "noise": NOISE,
    }


def written(folder, **changes):
    """The section, from a run directory that has these parts."""
    (folder / "analysis").mkdir(exist_ok=True)
    for part, value in {**parts(), **changes}.items():
        if value is not None:
            (folder / "analysis" / f"{part}.json").write_text(json.dumps(value))
    return analysis(folder)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return written(tmp_path_factory.mktemp("analyzed"))


def rows(html):
    """The cells of every row of every table, as text."""
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]
    return [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in cells]


def text(html):
    return re.sub(r"\s+", " ", re.sub(r"<svg.*?</svg>|<[^>]*>", "", html, flags=re.S))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by their names, as matplotlib has them."""
    figures = {}
    monkeypatch.setattr(plots, "inline_svg", lambda figure, name, label: figures.setdefault(name, figure) and "<svg/>")
    return figures


def test_each_part_has_its_figures(html):
    figures = re.findall(r"<figure>(.*?)</figure>", html, re.S)
    labels = [re.match(r'<svg role="img" aria-label="([^"]*)"', figure)[1] for figure in figures]
    assert labels == [
        "Metric without each group of sites, and with each alone",
        f"Outliers of {SUM} by token and dimension",
        f"Outliers of {INPUT} by token and dimension",
        f"Range of every token at {SUM}",
        f"Range of every token at {INPUT}",
        f"Range of every token at {QUIET}",
        "Attention of the first example, mean over heads, by layer",
        "Attention of the first example in layer 0, by head",
        "Attention of the first example in layer 1, by head",
        "SQNR of every quantized site",
    ]
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert not [name for name, count in Counter(ids).items() if count > 1], "figures on one page share no name"
    assert not re.search(r'(src|href)="(?!#|data:image/png)', html), "nothing is loaded from elsewhere"


def test_each_part_has_its_numbers(html):
    table = rows(html)
    assert ["ffn_sum", "2", "0.8125", "0.7812"] in table
    assert [SUM, "3", "1.4286 %", "7 (2), 11 (1)", "[SEP] (2), [CLS] (1)"] in table
    assert [SUM, "-0.5", "40", "[SEP]", "40.5", "1"] in table
    assert [INPUT, "-1", "80", "[SEP]", "81", "2"] in table
    assert [QUIET, "-0.5", "0.5", "[CLS]", "1", "1"] in table
    head = table.index(["layer", "head 0", "head 1"])
    assert table[head + 1 : head + 3] == [["0", "0.65", "0.38"], ["1", "0.38", "0.65"]], "means of .8 and .25 with .5"
    assert ["2", SUM, "7.5"] in table
    assert ["4", "layer.1.dense:weight", "exact"] in table
    said = text(html)
    assert "accuracy on 32 validation examples: 0.6875 with every quantizer, 0.9062 with none" in said
    assert "a loss of at most 0.05: 16 bits at ffn_sum (0.8125), query (0.8750)." in said


def test_a_tensor_that_several_sites_receive_is_named_once(html):
    assert "LayerNorm:same" not in html


@pytest.mark.usefixtures("drawn")
def test_a_suggestion_that_does_not_reach_its_goal_says_so(tmp_path):
    short = {**ABLATION["suggestion"], "chosen": [], "reached": False}
    said = text(written(tmp_path, ablation={**ABLATION, "suggestion": short}))
    assert "16 bits at no group; the loss stays larger than that." in said
    assert "Suggested" not in text(written(tmp_path, ablation={**ABLATION, "suggestion": None}))


@pytest.mark.usefixtures("drawn")
def test_parts_of_other_weights_are_not_shown_beside_the_newest(tmp_path):
    marks = {part: {**value, "models": {"student": {"digest": "old"}}} for part, value in parts().items()}
    assert "Not shown" not in written(tmp_path, **marks)
    path = tmp_path / "analysis" / "noise.json"
    path.write_text(json.dumps({**NOISE, "models": {"student": {"digest": "new"}}}))
    os.utime(path, (2e9, 2e9))
    found = analysis(tmp_path)
    assert re.findall(r"<h3>(.*?)</h3>", found) == ["Quantization noise"]
    assert "than the newest part: ablation, outliers, ranges, attention." in text(found)


@pytest.mark.usefixtures("drawn")
def test_parts_that_were_not_measured_are_left_out(tmp_path):
    found = written(tmp_path, ablation=None, outliers=None, ranges=None, attention=None)
    assert re.findall(r"<h3>(.*?)</h3>", found) == ["Quantization noise"]
    assert found.count("<figure>") == 1


def test_the_ablation_is_drawn(drawn):
    plots.ablation_bars(ABLATION)
    (panel,) = drawn["ablation"].axes
    without, alone, everything, nothing = panel.lines
    assert list(without.get_xdata()) == [0.7188, 0.8125] and list(alone.get_xdata()) == [0.8438, 0.7812]
    assert set(everything.get_xdata()) == {0.6875} and set(nothing.get_xdata()) == {0.9062}
    assert [label.get_text() for label in panel.get_yticklabels()] == ["all weights", "ffn_sum"]


def test_outliers_are_drawn_where_they_are(drawn):
    plots.outlier_map(SUM, outliers(planted(), TOKENS))
    (panel,) = drawn["outliers-layer-0-output-LayerNorm-input"].axes
    points, boundary = panel.lines
    assert set(zip(points.get_xdata(), points.get_ydata(), strict=True)) == {(3, 7), (4, 11), (6, 7)}
    assert set(boundary.get_xdata()) == {3.5}, "the second example begins at token 4"
    assert panel.get_ylim() == (-1, 30)


def test_ranges_of_tokens_are_drawn_with_their_names(drawn):
    plots.token_ranges(SUM, token_ranges(planted()), TOKENS)
    (panel,) = drawn["ranges-layer-0-output-LayerNorm-input"].axes
    (bars,) = panel.collections
    spans = [segment.tolist() for segment in bars.get_segments()]
    assert spans == [[[n, -0.5], [n, 40.0 if n == 3 else 0.5]] for n in range(4)]
    assert [label.get_text() for label in panel.get_xticklabels()] == TOKENS[0]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_attention_is_drawn_by_layer_and_by_head_with_tokens(drawn):
    found = attention()
    plots.attention_maps(found)
    plots.attention_heads(found, 1)
    even, to_separator = (np.array([HEAD[name]] * 4) for name in ("even", "to [SEP]"))
    layers = drawn["attention"].axes[:2]
    np.testing.assert_allclose(layers[0].images[0].get_array(), (even + to_separator) / 2)
    heads = drawn["attention-1"].axes[:2]
    np.testing.assert_allclose([head.images[0].get_array() for head in heads], [even, to_separator])
    for panels, name in ((layers, "layer"), (heads, "head")):
        assert [panel.get_title(loc="left") for panel in panels] == [f"{name} 0", f"{name} 1"]
        assert [labels(panel.xaxis) for panel in panels] == [TOKENS[0]] * 2
        assert labels(panels[0].yaxis) == TOKENS[0] and labels(panels[1].yaxis) == [], "outer axes alone"
        assert len({panel.images[0].get_clim() for panel in panels}) == 1, "the same colours"


@pytest.mark.parametrize(("tokens", "columns"), [(9, 4), (24, 3), (40, 2), (41, 4)])
def test_maps_of_more_tokens_are_larger_until_tokens_have_numbers(drawn, tokens, columns):
    even = [[1 / tokens] * tokens] * tokens
    names = [f"token{n}" for n in range(tokens)]
    plots.attention_heads({"tokens": names, "maps": [[even] * 4]}, 0)
    first, *others = drawn["attention-0"].axes[:4]
    places = [round(panel.get_position().y0, 3) for panel in (first, *others)]
    assert places.count(places[0]) == columns
    assert (labels(first.yaxis) == names) == (tokens <= 40)


def test_too_many_heads_are_not_drawn_one_by_one(drawn, tmp_path):
    maps = [[[[1.0]]] * (HEADS + 1)]
    found = written(tmp_path, attention={"tokens": ["a"], "layers": ["0"], "maps": maps, "separators": None})
    assert "attention" in drawn and "attention-0" not in drawn
    assert f"{HEADS + 1} heads a layer are too many" in text(found)


def test_noise_is_drawn_by_number_of_the_site(drawn):
    plots.noise_points(NOISE["sites"])
    (panel,) = drawn["noise"].axes
    weights, activations = panel.lines[:2]
    assert (list(weights.get_xdata()), list(weights.get_ydata())) == ([1], [21.25])
    assert (list(activations.get_xdata()), list(activations.get_ydata())) == ([2, 3], [7.5, 38.0])
