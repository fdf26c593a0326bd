"""`make bench` runs: one small comparison, whose numbers mean nothing; and compares like with like."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import sides
from benchmarks.training_step import CASES


def test_a_comparison_runs_and_writes_its_ratio(tmp_path):
    out = tmp_path / "times.json"
    words = ["--dtypes", "float32", "--cases", "channel-eager", "--layers", "1", "--pairs", "2", "--warm-up", "1"]
    command = [sys.executable, "-m", "benchmarks.training_step", *words, "--threads", "1", "--json", str(out)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["results"]
    assert row["pairs"] == 2 and row["ratio"] > 0


@pytest.mark.parametrize("case", [case.key for case in CASES if case.side.kind == "train+teacher"])
def test_both_sides_of_a_case_with_a_teacher_run_it_once_in_every_step(case, monkeypatch, tmp_path):
    """And train a model of the same kind: forward passes of both models, by side."""
    calls = []

    def small(dtype, layers):
        sizes = {"hidden_size": 24, "intermediate_size": 48, "vocab_size": 30522}
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).to(dtype)
        model.register_forward_hook(lambda module, *_: calls.append((module.training, torch.is_grad_enabled())))
        return model

    monkeypatch.setattr(sides, "make_model", small)
    monkeypatch.setattr(sides, "TOKENS", 8)
    found = {case.key: case for case in CASES}[case]
    for spec in (found.side, found.against):
        step = sides.make_side(replace(spec, compile="off"), torch.float32, 2, tmp_path / str(spec.plain))
        calls.clear()
        step()
        step()
        assert sorted(calls) == [(False, False)] * 2 + [(True, True)] * 2
