"""`qpipe evaluate --variants` and `qpipe inspect sensitivity` on a tiny run."""

import importlib
import json

import pytest
import typer
import yaml

from qpipe.cli.evaluate import parse_bits, parse_ratios
from qpipe.config import dump
from qpipe.testing import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that has trained two steps; nothing is verified."""
    from types import SimpleNamespace

    import qpipe

    patch = pytest.MonkeyPatch()
    execute = importlib.import_module("qpipe.stages.execute")
    patch.setattr(execute, "verify", lambda folder, **_: SimpleNamespace(passed=True, metrics={}, lines=list))
    done = qpipe.execute(tiny_config(tmp_path_factory.mktemp("cli") / "plain", train__max_steps=2))
    patch.undo()
    return done.out


@pytest.fixture
def pair(run, tmp_path):
    import shutil

    return [shutil.copytree(run, tmp_path / name) for name in ("one", "two")]


def test_curves_of_two_runs(cli, pair, tmp_path):
    one, two = pair
    result = cli("evaluate", one, two, "--variants", "bits,step,pow2", "--bits", "2,4", "--ratios", "0.9,1.1")
    assert result.code == 0, result.err
    head, *rows = result.out.splitlines()
    assert f"ACCURACY OF {one}".upper() in head.upper() and str(two).upper() in head
    assert [row.split()[0] for row in rows] == ["as", "bits", "bits", "bits", "step", "step", "steps", "figure:"]
    assert (one / "variants.svg").read_text().startswith("<?xml") and not (two / "variants.svg").exists()
    assert "#a1b2" not in (one / "variants.svg").read_text()
    documents = [json.loads((run / "variants.json").read_text()) for run in pair]
    assert [d["compared"] for d in documents] == [[str(two)], [str(one)]]
    assert cli("report", one).code == 0
    html = (one / "report.html").read_text()
    assert "Robustness" in html and ">two</th>" in html


def test_as_json_into_a_png(cli, pair, tmp_path):
    result = cli("evaluate", pair[0], "--variants", "pow2", "--figure", tmp_path / "f" / "x.png", "--json")
    assert [p["variant"] for p in json.loads(result.out)[str(pair[0])]["points"]] == ["trained", "pow2"]
    assert (tmp_path / "f" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plain_evaluation_of_several_runs(cli, pair):
    lines = cli("evaluate", *pair).out.splitlines()
    assert lines[0].split() == ["METRIC", *(str(run).upper() for run in pair)]
    accuracy = lines[1].split()
    assert accuracy[0] == "accuracy" and accuracy[1] == accuracy[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "x.png"], "belong to --variants"),
        (["--open-ended"], "belong to --variants"),
        (["--bits", "2,4"], "belong to --variants"),
        (["--ratios", "0.9"], "belong to --variants"),
        (["--variants", "step", "--bits", "4"], "--bits belongs to the variant `bits`"),
        (["--variants", "bits,pow2", "--ratios", "0.9,1.1"], "--ratios belongs to the variant `step`"),
        (["--variants", "bits", "--open-ended"], "belong to the variant `step`"),
        (["--variants", "bits", "--bits", "two"], "such as 2,3,4"),
        (["--variants", "step", "--ratios", "1:2"], "FIRST:LAST:COUNT"),
        (["--variants", "step", "--ratios", "0.7:1.3:1"], "make no curve"),
        (["--variants", "bits,bits"], "--variants names 'bits' twice"),
        (["--variants", "bits", "--figure", __file__ + "/x.svg"], "is a file, not a folder"),
        (["--variants", "stepp"], "did you mean 'step'"),
        (["--variants", "bits", "--figure", "x.gif"], "written as .svg, .png, .pdf, not '.gif'"),
    ],
)
def test_wrong_usage_of_evaluate(cli, run, arguments, message):
    result = cli("evaluate", run, *arguments)
    assert result.code in (1, 2) and message in result.err.replace("\n", " ")


def test_a_run_named_twice(cli, run):
    result = cli("evaluate", run, run)
    assert result.code == 2 and "named twice" in result.err


def test_every_run_is_checked_before_the_first_is_evaluated(cli, pair, monkeypatch):
    one, two = pair
    stages = importlib.import_module("qpipe.stages")
    evaluated = []
    monkeypatch.setattr(stages, "evaluate_run", lambda run: evaluated.append(run) or {"accuracy": 0.5})
    (two / "model" / "qpipe_model.json").unlink()
    for arguments in ([], ["--variants", "pow2"]):
        result = cli("evaluate", one, two, *arguments)
        assert result.code == 1 and f"{two} has no trained model yet" in result.err
    (two / "config.yaml").unlink()
    result = cli("evaluate", one, two)
    assert result.code == 1 and f"{two} has no config.yaml" in result.err
    assert not evaluated and not (one / "variants.json").exists()


def test_every_sweep_is_checked_before_the_first_evaluation(cli, pair):
    """The second run quantizes no activation, which shows when its plan is made."""
    one, two = pair
    config = yaml.safe_load((two / "config.yaml").read_text())
    config["quantization"]["preset"] = "w4"
    (two / "config.yaml").write_text(yaml.safe_dump(config))
    result = cli("evaluate", one, two, "--variants", "pow2", "--activations")
    assert result.code == 1 and f"{two} quantizes no activation" in result.err
    assert "as trained" not in result.err and not (one / "variants.json").exists()


def test_numbers():
    assert parse_bits("4, 2,4") == (2, 4)
    assert parse_ratios("0.7:1.3:4") == (0.7, 0.9, 1.1, 1.3) and parse_ratios("1,0.5") == (1.0, 0.5)
    with pytest.raises(typer.BadParameter):
        parse_bits("0")


def test_sensitivity_writes_a_plan_that_launch_takes(cli, run, tmp_path):
    plan = tmp_path / "plan.yaml"
    result = cli("inspect", "sensitivity", run, "--examples", "32", "--bits", "2,8", "--budget", "6bit", "--out", plan)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["SITE", "2", "BITS", "8", "BITS", "CHOSEN"] and len(lines) == 1 + 13 + 4
    assert "on 32 training examples" in result.out and "measured together" in result.out
    rules = yaml.safe_load(plan.read_text())["quantization"]["rules"]
    chosen = {line.split()[0]: int(line.split()[-1]) for line in lines[1:14]}
    assert {rule["site"]: rule["options"]["bits"] for rule in rules} == chosen
    config = tmp_path / "c.yaml"
    config.write_text(dump(tiny_config(tmp_path)))
    rows = json.loads(cli("inspect", "plan", config, "--set", f"quantization.plan={plan}", "--json").out)
    assert {r["site"]: r["bits"] for r in rows if r["site"].endswith(":weight")} == chosen


def test_sensitivity_of_a_configuration_as_json(cli, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(dump(tiny_config(tmp_path)))
    arguments = ["--examples", "16", "--bits", "3", "--sites", "*.query", "--set", "quantization.preset=w3", "--json"]
    found = json.loads(cli("inspect", "sensitivity", config, *arguments).out)
    assert found["examples"] == 16 and len(found["sites"]) == 2 and found["chosen"] == {}
    assert all([c["bits"] for c in row] == [3] for row in found["sites"].values())


def test_an_impossible_budget_fails_before_anything_is_measured(cli, run):
    result = cli("inspect", "sensitivity", run, "--bits", "4,8", "--budget", "2bit")
    assert result.code == 1 and "the smallest possible with these widths is" in result.err
    assert "bits: loss" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.yaml"], "give a --budget too"),
        (["--budget", "6bit", "--out", "."], "--out . is a folder; name a file"),
        (["--budget", "6bit", "--out", "/proc/x.yaml"], "--out /proc/x.yaml cannot be written"),
        (["--set", "seed=1"], "a run keeps its own"),
        (["--budget", "3"], "write bits per weight, such as 3.2bit"),
        (["--format", "nativ"], "export format 'nativ' is unknown; did you mean 'native'"),
        (["--sites", "nothing"], "'nothing' matches no quantized weight"),
    ],
)
def test_wrong_usage_of_sensitivity(cli, run, arguments, message):
    result = cli("inspect", "sensitivity", run, *arguments)
    assert result.code in (1, 2) and message in " ".join(result.err.replace("│", " ").split())
