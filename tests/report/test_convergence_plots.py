"""Figures of several runs together: every run is drawn with its own numbers, the teacher beside them."""

import numpy as np
import pytest

from qpipe.report import convergence_plots as plots
from qpipe.report.convergence import most_different_heads

TOKENS = ["[CLS]", "good", "[SEP]"]
SHARP, EVEN = [[1.0, 0.0, 0.0]] * 3, [[1 / 3] * 3] * 3


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by their names, as matplotlib has them."""
    figures = {}
    monkeypatch.setattr(plots, "inline_svg", lambda figure, name, label: figures.setdefault(name, figure) and "<svg/>")
    return figures


def lines(panel):
    """x and y of a panel's lines by their label."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}


def titles(axes):
    return [panel.get_title(loc="left") for panel in axes]


def curve(*values):
    points = [[10 * (n + 1), value] for n, value in enumerate(values)]
    return {"evaluation": {"accuracy": points}, "training": {"loss": [[step, 1 - value] for step, value in points]}}


def test_curves_of_every_run_share_a_panel(drawn):
    plots.curves({"plain": curve(0.5, 0.6), "ti-g": curve(0.6, 0.8)})
    metric, loss = drawn["convergence"].axes
    assert titles((metric, loss)) == ["accuracy", "training loss"]
    assert lines(metric) == {"plain": ([10, 20], [0.5, 0.6]), "ti-g": ([10, 20], [0.6, 0.8])}
    assert lines(loss)["ti-g"][1] == pytest.approx([0.4, 0.2])
    assert len({line.get_color() for line in metric.lines}) == 2
    (legend,) = drawn["convergence"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "ti-g"]


def test_a_metric_that_one_run_lacks_is_drawn_of_the_others(drawn):
    other = {**curve(0.1), "evaluation": {"f1": [[5, 0.3]]}}
    plots.curves({"plain": curve(0.5), "other": other})
    first, second, _ = drawn["convergence"].axes
    assert lines(first) == {"plain": ([10], [0.5]), "other": ([], [])}
    assert lines(second) == {"plain": ([], []), "other": ([5], [0.3])}


def test_errors_of_layers(drawn):
    """Hidden states begin with what the embeddings give, layer 0; an older result lacks what it did not know."""
    old = {"hidden_states": {"mse": [0.1, 0.2]}, "attention_output": {"mse": [0.3]}}
    plots.layer_errors({"old": old, "new": {**old, "ffn_input": {"mse": [0.4]}}})
    hidden, attention, after = drawn["layer-errors"].axes
    assert titles((hidden, attention, after)) == ["hidden states", "attention outputs", "with residual and norm"]
    assert lines(hidden) == {"old": ([0, 1], [0.1, 0.2]), "new": ([0, 1], [0.1, 0.2])}
    assert lines(attention)["new"] == ([1], [0.3])
    assert lines(after) == {"old": ([], []), "new": ([1], [0.4])}


def test_ranking_losses_are_in_the_order_of_layers_and_heads(drawn):
    plots.ranking_losses({"a": {"loss": [[0.1, 0.2], [0.3, 0.4]]}, "b": {"loss": [[0.5, 0.6], [0.7, 0.8]]}})
    (panel,) = drawn["ranking"].axes
    values = lines(panel)
    assert values["a"] == ([0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4]) and values["b"][1] == [0.5, 0.6, 0.7, 0.8]
    assert {tick: text.get_text() for tick, text in zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)} == {
        0: "1",
        2: "2",
    }


def test_heat_maps_have_the_teacher_first_and_a_row_for_each_head(drawn):
    runs = {
        "ti-o": {"tokens": TOKENS, "teacher_maps": [[SHARP, EVEN]], "maps": [[EVEN, EVEN]]},
        "ti-g": {"tokens": TOKENS, "teacher_maps": [[SHARP, EVEN]], "maps": [[SHARP, SHARP]]},
    }
    plots.attention_beside_teacher(runs, [(0, 1), (0, 0)])
    axes = drawn["maps"].axes
    assert titles(axes) == ["teacher", "ti-o", "ti-g", "", "", ""]
    assert [panel.get_ylabel() for panel in axes[::3]] == ["layer 1, head 2", "layer 1, head 1"]
    found = [panel.collections[0].get_array().reshape(3, 3).tolist() for panel in axes]
    assert found == [EVEN, EVEN, SHARP, SHARP, EVEN, SHARP]
    assert [panel.collections[0].get_clim() for panel in axes] == [(0, 1 / 3)] * 3 + [(0, 1.0)] * 3
    assert [text.get_text() for text in axes[0].get_yticklabels()] == TOKENS


def test_the_heads_shown_are_those_where_runs_differ_most():
    one = {"loss": [[0.1, 0.9], [0.5, 0.2]]}
    other = {"loss": [[0.2, 0.8], [0.1, 0.2]]}
    assert most_different_heads({"one": one, "other": other})[0] == (1, 0)
    assert most_different_heads({"one": one})[:2] == [(0, 1), (1, 0)]


def test_eigenvalues_are_drawn_by_sign(drawn):
    batches = [[{"value": 4.0}, {"value": -1.0}], [{"value": 2.0}]]
    plots.eigenvalues({"a": {"batches": batches}, "b": {"batches": [[{"value": 8.0}]]}})
    negative, positive = drawn["eigenvalues"].axes
    assert titles((negative, positive)) == ["negative eigenvalues", "positive eigenvalues"]
    assert [line.get_xdata().tolist() for line in negative.lines[::2]] == [[-1.0], []]
    assert [line.get_xdata().tolist() for line in positive.lines[::2]] == [[4.0, 2.0], [8.0]]


def test_landscapes_have_one_scale(drawn):
    """Of the losses above the model's, over all runs; what is not finite is left out."""
    grid = np.add.outer([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    broken = (10 * grid + 3).tolist()
    broken[0][0] = None
    runs = {name: {"losses": losses, "offsets": [-1, 0, 1]} for name, losses in (("a", grid.tolist()), ("b", broken))}
    plots.landscapes(runs)
    first, second, bar = drawn["landscape"].axes
    assert titles((first, second)) == ["a", "b"]
    scales = {tuple(panel.collections[0].get_clim()) for panel in (first, second)}
    assert scales == {(0.0, 20.0)}
    assert bar.get_ylabel() == "loss above the model's"
