"""An environment with torch, transformers and compressed-tensors alone loads an export and computes the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qpipe
from qpipe.testing import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib.util, json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
assert importlib.util.find_spec("qpipe") is None
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
reference = load_file(sys.argv[1] + "/qpipe_reference.safetensors")
inputs = {k.removeprefix("inputs."): v for k, v in reference.items() if k.startswith("inputs.")}
torch.set_num_threads(int(sys.argv[2]))
with torch.no_grad():
    logits = model(**inputs).logits
print(json.dumps({"difference": float((logits - reference["logits"]).abs().max()), "rows": len(logits)}))
"""


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, "transformers", "compressed-tensors"], check=True)
    return python


STATIC = {
    "site": "{block}.*:input",
    "quantizer": "uniform-activation",
    "options": {"granularity": "tensor", "dynamic": False, "symmetric": False},
}
"""Calibrated ranges, one for each input of a linear map."""


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "rules"), [("w4a8", []), ("w3a8", []), ("w2", []), ("w8", [STATIC])])
def test_same_logits_without_qpipe(plain_python, tmp_path, preset, rules):
    run = qpipe.execute(tiny_config(tmp_path, quantization__preset=preset, quantization__rules=rules))
    about = json.loads((run.out / "export" / "qpipe.json").read_text())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    threads = str(about["environment"]["num_threads"])
    done = subprocess.run(
        [plain_python, "-c", SCRIPT, str(run.out / "export"), threads],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"difference": 0.0, "rows": 16}
