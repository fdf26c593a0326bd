"""A run sharded by FSDP2 on two processes trains, resumes to the same bits, exports and verifies."""

import json
import shutil
import subprocess
import sys

import pytest

from qpipe.config import dump
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash


def launch(config, out, *more):
    words = [sys.executable, "-m", "qpipe.cli", "launch", str(config), "--cpus", "2", "--out", str(out), *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.distributed
def test_sharded_run_resumes_and_verifies(tmp_path):
    config = tiny_config(
        tmp_path,
        {"kure": {"skip_above": None}, "ti-g": {}},
        teacher__name=str(tmp_path / "teacher"),
        train__dropout=0.1,
        engine__fsdp=True,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(config))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch(path, whole)
    results = json.loads((whole / "results.json").read_text())
    assert results["verified"]
    assert results["evaluation"] == results["reloaded"]
    for name in ("config.yaml", "checkpoints/step-00000003"):
        (shutil.copytree if "/" in name else shutil.copy)(whole / name, ensure(resumed / name))
    assert "resuming after step 3" in launch(path, resumed, "--resume")
    assert weights_hash(resumed) == weights_hash(whole)


def ensure(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
