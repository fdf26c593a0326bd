"""The report's section on variants, and the figure as a file."""

import json
import re
import shutil

import pytest

from qpipe import CheckpointError, ConfigError
from qpipe.report import write_report
from qpipe.report.curves import PRINTED, _draw, label, save_curves
from qpipe.report.inputs import VariantPoint, Variants, read_variants
from qpipe.report.robustness import robustness, shown_runs, table


def point(variant, value, accuracy, activations=False):
    metrics = {"accuracy": accuracy, "f1": 0.1}
    return {"variant": variant, "value": value, "activations": activations, "metrics": metrics}


def document(shift=0.0, **changes):
    points = [
        point("trained", None, 0.8125 + shift),
        point("bits", 2, 0.5125 + shift),
        point("bits", None, 0.8225 + shift),
        point("step", 0.94, 0.7925 + shift),
        point("pow2", None, 0.7825 + shift, True),
    ]
    found = {"metric": "accuracy", "examples": 872, "bits": 4, "sites": ["a:weight"], "points": points}
    return {**found, **changes}


@pytest.fixture
def swept(run_dir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "variants.json").write_text(json.dumps(document(0.001)))
    (run_dir / "variants.json").write_text(json.dumps(document(compared=[str(other)])))
    return run_dir


def test_no_sweep_is_no_section(run_dir):
    assert robustness(run_dir) is None


def test_both_runs_are_drawn_and_listed(swept):
    html = robustness(swept)
    assert html.count('role="img"') == 1 and "#a1b2" not in html and "var(--series-2)" in html
    assert {">other<", ">finished<"} <= set(re.findall(r">\w+<", html))
    for number in ("0.8125", "0.5125", "0.5135", "0.7925", "0.7835", "872"):
        assert number in html
    rows = table(shown_runs(swept, read_variants(swept))[0])
    assert [(r["variant"], r["value"], r["scope"]) for r in rows] == [
        ("", "as trained", ""),
        ("bits", "2", "weights"),
        ("bits", "full precision", "weights"),
        ("step size", "0.94", "weights"),
        ("steps", "power of two", "weights and activations"),
    ]
    assert rows[1]["metrics"] == {"finished": 0.5125, "other": 0.5135}


@pytest.mark.parametrize("change", ["gone", "metric", "examples", "open_ended"])
def test_a_compared_run_that_cannot_be_shown_is_named(swept, tmp_path, change):
    if change == "gone":
        shutil.rmtree(tmp_path / "other")
    elif change != "metric":
        (tmp_path / "other" / "variants.json").write_text(json.dumps(document(0.001, **{change: True})))
    else:
        points = [{"variant": "trained", "metrics": {"f2": 1.0}}]
        (tmp_path / "other" / "variants.json").write_text(json.dumps(document(metric="f2", points=points)))
    html = robustness(swept)
    assert "Not shown" in html and "other" in html and "0.5135" not in html


def test_full_precision_has_one_place_beyond_all_widths(swept, tmp_path):
    """The other run has more of them, one where full precision of the first would be."""
    more = document()
    more["points"].append(point("bits", 3, 0.6))
    (tmp_path / "other" / "variants.json").write_text(json.dumps(more))
    runs = shown_runs(swept, read_variants(swept))[0]
    (panel, *_) = _draw(runs, PRINTED).axes
    ticks = dict(zip(panel.get_xticks(), (text.get_text() for text in panel.get_xticklabels()), strict=True))
    assert ticks == {2: "2", 3: "3", 4: "full"}
    assert [list(line.get_xdata()) for line in panel.lines if len(line.get_xdata()) > 1] == [[2, 4], [2, 3, 4]]


def test_weights_whose_width_is_fixed_are_named(swept):
    (swept / "variants.json").write_text(json.dumps(document(fixed=["odd:weight"])))
    assert "odd:weight" in robustness(swept)


@pytest.mark.usefixtures("only_report", "no_plots")
def test_the_section_is_in_the_report(swept):
    html = write_report(swept).read_text()
    assert html.index("Quantization error</h2>") < html.index("Robustness</h2>") < html.index("Configuration</h2>")
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_a_damaged_file(swept):
    (swept / "variants.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"variants.json: metric: Field required"):
        read_variants(swept)


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_figures_in_files(tmp_path, ending):
    path = tmp_path / "new" / f"x.{ending}"
    save_curves({"a": Variants(**document())}, path)
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    if ending == "svg":
        text = path.read_text()
        assert "#2f6db3" in text and "#a1b2" not in text and "weights and activations" in text


def test_a_format_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match=r"written as .svg, .png, .pdf, not 'without an ending'"):
        save_curves({}, tmp_path / "x")


def test_labels():
    points = [VariantPoint(**p) for p in document()["points"]]
    assert [label(p) for p in points] == ["as trained", "2", "full precision", "0.94", "power of two"]
