"""`qpipe analyze` from the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qpipe
from qpipe.cli import app
from qpipe.cli.analyze import _inputs, _outcome, _print_sites
from qpipe.config import resolve
from qpipe.report.convergence import read_runs
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config, tiny_model

pytestmark = pytest.mark.xdist_group("analyze")  # the fixture takes most of the time


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = qpipe.execute(tiny_config(tmp_path_factory.mktemp("run"), train__max_steps=2))
    return run.out


def call(*words):
    return CliRunner().invoke(app, ["analyze", *map(str, words)], catch_exceptions=True)


def test_a_run_is_analyzed_and_a_plan_written_that_loads(finished, tmp_path):
    plan = tmp_path / "plan.yaml"
    words = (finished, "--examples", "16", "--sequences", "2", "--suggest", plan, "--within", "0")
    done = call(*words)
    assert done.exit_code == 0, done.output
    assert "all quantized" in done.output
    assert {p.stem for p in (finished / "analysis").iterdir()} == {
        "ablation", "outliers", "ranges", "attention", "noise",
    }  # fmt: skip
    assert yaml.safe_load(plan.read_text()) == {"quantization": {"rules": []}}, "the run has learned nothing to lose"
    assert resolve({"model": {"name": "m"}, "quantization": {"plan": str(plan)}}).quantization.rules == ()
    first, second = plan.read_text().splitlines()[:2]
    assert (
        first.endswith("--suggest: no group needs more bits") and "suggested: no group needs more bits" in done.output
    )
    assert second.startswith("# accuracy on 16 validation examples of the run as it was trained;")
    assert "no activation has fewer than 8 bits" in str(call(*words, "--bits", "8", "--again").exception)


def test_ranges_of_tokens_are_printed_where_one_for_all_fits_worst(capsys):
    even = {"low": [[-1.0, -1.0, -1.0]], "high": [[1.0, 1.0, 1.0]]}
    uneven = {"low": [[-2.0, -1.0, -1.0]], "high": [[192.42, 3.0, 1.0]]}
    sites = {"even": even, "also even": even, "uneven": uneven}
    _print_sites({"ranges": {"tokens": [["[CLS]", "a", "[SEP]"]], "sites": sites}})
    _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["uneven", "-2", "192", "[CLS]", "194", "4"], ["even", "-1", "1", "[CLS]", "2", "2"]]


def test_what_a_suggestion_came_to_is_said():
    steps = [{"group": "ffn_sum", "metric": 0.8}, {"group": "ffn_input", "metric": 0.85}]
    made = {"bits": 16, "within": 0.01, "chosen": steps, "reached": True}
    assert _outcome(made) == "16 bits at ffn_sum 0.8000; ffn_input 0.8500"
    assert _outcome({**made, "reached": False}).endswith("no other group helps, and the loss is still more than 0.01")
    assert _outcome({**made, "chosen": []}) == "no group needs more bits"
    assert _outcome({**made, "chosen": [], "reached": False}).startswith("no group; no other group helps")


def test_runs_that_cannot_be_measured_are_refused_before_the_first_is(finished, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished / name, begun)
    before = set((finished / "analysis").glob("*")) if (finished / "analysis").is_dir() else set()
    done = call(finished, begun, "--parts", "hessian")
    assert "begun has no trained model yet; finish the training" in str(done.exception)
    done = call(finished, "--parts", "hessian,layers")
    assert "was trained without a teacher; name the full-precision model to compare with" in str(done.exception)
    teacher = tiny_model(tmp_path / "deep", num_hidden_layers=4)
    done = call(finished, "--parts", "hessian,layers", "--teacher", teacher, "--layer-map", "2,9")
    assert "--layer-map 2,9 must have 2 rising numbers" in str(done.exception)
    assert (set((finished / "analysis").glob("*")) if (finished / "analysis").is_dir() else set()) == before
    assert call(finished, begun, "--parts", "curves").exit_code == 0, "curves may still grow"


def test_a_model_is_analyzed_as_it_would_be_quantized(finished, tmp_path):
    out = tmp_path / "out"
    words = (finished / "model", "--parts", "noise", "--sequences", "1", "--out", out, "--json")
    done = call(*words, "--set", "quantization.preset=w3")
    assert done.exit_code == 0, done.output
    sites = json.loads(done.stdout)["noise"]["sites"]
    assert "bert.encoder.layer.0.output.dense:weight" in sites
    other = call(*words, "--set", "quantization.preset=w4")
    assert "holds results of another configuration" in str(other.exception)


def shift(folder):
    """Other weights in the same files."""
    state = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    state[name] = state[name] + torch.linspace(-1, 1, state[name].numel()).view_as(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def measured(part, *words):
    """A part's result, and what was told."""
    done = call(*words, "--parts", part, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)[part], done.stderr


def test_a_model_trained_anew_in_place_is_measured_anew(finished, tmp_path):
    model = shutil.copytree(finished / "model", tmp_path / "model")
    words = ("noise", model, "--sequences", "1", "--out", tmp_path / "out", "--set", "quantization.preset=w3")
    first, _ = measured(*words)
    again, told = measured(*words)
    assert again == first and "noise: measured before\n" in told
    shift(model)
    second, told = measured(*words)
    assert "noise: measured before with another student" in told
    site = "bert.encoder.layer.0.output.dense:weight"
    assert abs(second["sites"][site] - first["sites"][site]) > 0.1
    third, told = measured(*words)
    assert third == second and "noise: measured before\n" in told


def test_other_weights_of_a_teacher_are_compared_anew(finished, tmp_path, monkeypatch):
    teacher = shutil.copytree(finished.parent / "teacher", tmp_path / "teacher")
    words = ("layers", finished, "--examples", "2", "--teacher", teacher)
    first, _ = measured(*words)
    shift(teacher)
    second, told = measured(*words)
    assert "layers: measured before with another teacher" in told
    assert second["hidden_states"]["mse"][0] == first["hidden_states"]["mse"][0], "what the blocks receive is the same"
    assert abs(second["hidden_states"]["mse"][1] - first["hidden_states"]["mse"][1]) > 0.02
    # Written again, byte for byte: read once, then known by its files; and so where it is gone.
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
    loaded = []
    monkeypatch.setattr("qpipe.analysis.load.restore", lambda out: loaded.append(out) or restore(out))
    for gone in (False, False, True):
        if gone:
            shutil.rmtree(teacher)
        found, told = measured(*words)
        assert found["hidden_states"] == second["hidden_states"] and "layers: measured before\n" in told
        assert len(loaded) == 1


def test_results_that_do_not_say_on_which_weights_are_measured_anew(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("analysis", "export"))
    words = ("noise", run, "--sequences", "1")
    found, _ = measured(*words)
    path = run / "analysis" / "noise.json"
    path.write_text(json.dumps({"settings": found["settings"], "sites": {}}))
    again, told = measured(*words)
    assert again == found and "measured before and not noted on which weights" in told


def test_runs_are_compared(finished, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for copy in (first, second):
        shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("analysis", "export"))
    words = (first, second, "--teacher", finished.parent / "teacher", "--sequences", "1", "--examples", "2")
    done = call(*words)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith(str(tmp_path))]
    assert [row[0] for row in rows if len(row) > 1] == [str(first), str(second)]
    assert {p.stem for p in (second / "analysis").iterdir()} == {"curves", "layers", "ranking", "compared"}
    compared = json.loads((second / "analysis" / "compared.json").read_text())
    assert compared == {part: [str(first.resolve())] for part in ("curves", "layers", "ranking")}
    assert call(*words, "--json").stdout.count('"hidden_states"') == 2
    for words, message in (
        ((first, first), "named twice"),
        ((first, second / "model"), "is no run directory"),
        ((first / "model", second), "name runs only, or one model"),
    ):
        assert message in str(call(*words).exception)
    assert "--suggest makes a plan for one run" in call(first, second, "--suggest", tmp_path / "plan.yaml").output


def test_parts_measured_later_leave_the_comparison_of_others(finished, tmp_path):
    """As the two commands for figures 5 and 6 of Kim et al. do."""
    runs = [tmp_path / name for name in ("plain", "distilled", "taught")]
    for copy in runs:
        shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("analysis", "export"))
    for chosen, parts, option in ((runs, "curves,layers", "--examples"), (runs[1:], "ranking", "--sequences")):
        done = call(*chosen, "--teacher", finished.parent / "teacher", option, "2", "--parts", parts)
        assert done.exit_code == 0, done.output
    shown, left_out = read_runs(runs[1])
    assert {name: set(found) for name, found in shown.items()} == {
        "distilled": {"curves", "layers", "ranking"},
        "plain": {"curves", "layers"},
        "taught": {"curves", "layers", "ranking"},
    }
    assert left_out == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "seed=1"), "leave out configuration, --set and --plugins"),
        (("--parts", "outlier"), "did you mean 'outliers'"),
        (("--parts", "outliers", "--sites", "bert.nothing*"), "matches no site"),
        (("--parts", "landscape", "--points", "4"), "an odd number of points"),
        (("--parts", "layers"), "was trained without a teacher"),
        (("--parts", "layers", "--layer-map", "2,x"), "--layer-map '2,x' is no list of layers"),
        (("--parts", "noise", "--suggest", "plan.yaml"), "name the part `ablation` too"),
        (("--parts", "noise", "--layer-map", "1,2"), "--layer-map is for layers and ranking, not for noise"),
        (("--parts", "layers", "--text", "good fun"), "--text is for ranking, not for layers: add --parts ranking"),
        (("--parts", "outliers", "--eigenvalues", "7"), "--eigenvalues is for hessian, not for outliers: add --parts"),
        (("--parts", "outliers", "--examples", "4"), "--examples is for ablation and layers and hessian and landscape"),
        (("--parts", "layers", "--by", "role"), "--by is for ablation, not for layers"),
        (("--parts", "noise", "--filters", "rows"), "--filters is for landscape"),
        (("--suggest", "."), "--suggest . is a folder; name a file"),
        (("--teacher", "runs/x"), "--teacher is for layers and ranking, not for ablation, outliers"),
    ],
)
def test_bad_requests_are_named(finished, words, message):
    assert message in str(call(finished, *words).exception)


def test_a_part_named_twice(finished):
    done = call(finished, "--parts", "layers,layers")
    assert done.exit_code == 2 and "--parts names 'layers' twice" in done.output


def test_results_about_a_model_go_where_an_override_says():
    assert _inputs(["some/model"], ["out=runs/set"], [], None)[0].out == "runs/set"
    assert _inputs(["some/model"], ["out=runs/set"], [], Path("given"))[0].out == "given"
    assert _inputs(["some/model"], [], [], None)[0].out == "runs/analysis"


@pytest.mark.parametrize("option", [("--bits", "8"), ("--within", "0")])
def test_what_only_a_suggestion_uses_is_refused_without_one(finished, option):
    done = call(finished, *option)
    assert done.exit_code == 2 and "--within and --bits belong to --suggest" in done.output
