"""`make bench` runs: one small comparison, whose numbers mean nothing."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_comparison_runs_and_writes_its_ratio(tmp_path):
    out = tmp_path / "times.json"
    words = ["--dtypes", "float32", "--cases", "channel-eager", "--layers", "1", "--pairs", "2", "--warm-up", "1"]
    command = [sys.executable, "-m", "benchmarks.training_step", *words, "--threads", "1", "--json", str(out)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["results"]
    assert row["pairs"] == 2 and row["ratio"] > 0
