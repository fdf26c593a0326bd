"""Calibrated ranges in compressed-tensors: stock transformers computes the logits of the run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qpipe
from qpipe.export.folder import write_sums
from qpipe.export.verify import verify
from qpipe.files import write_json
from qpipe.stages.quantize import quantize
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config

STATIC = {
    "site": "{block}.*:input",
    "quantizer": "uniform-activation",
    "options": {"granularity": "tensor", "dynamic": False, "symmetric": False, "range": "mse-golden"},
}
PTQ = {"weights": "adaround", "examples": 64, "batch_size": 16, "iterations": 20}
LOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
inputs = {k[7:]: v for k, v in load_file(sys.argv[1] + "/qpipe_reference.safetensors").items() if k[:7] == "inputs."}
torch.set_num_threads(int(sys.argv[3]))
with torch.no_grad():
    save_file({"logits": model(**inputs).logits}, sys.argv[2])
assert not [name for name in sys.modules if name.partition(".")[0] == "qpipe"]
"""
"""No line of it is qpipe's; that an environment without qpipe does the same is tests/end_to_end's to show."""


@pytest.fixture(scope="module", params=[None, PTQ], ids=["trained", "adaround"])
def run(request, tmp_path_factory):
    """W8A8 with a range for the input of every linear map in the blocks: trained, and rounded without training."""
    folder = tmp_path_factory.mktemp("static")
    changes = {"quantization__preset": "w8", "quantization__rules": [STATIC], "quantization__ptq": request.param}
    config = tiny_config(folder, train__max_steps=2, **changes)
    return qpipe.execute(config) if request.param is None else quantize(config)


def test_stock_transformers_has_the_same_logits(run, tmp_path):
    folder = run.out / "export"
    threads = json.loads((folder / "qpipe.json").read_text())["environment"]["num_threads"]
    words = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "found.safetensors"), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = load_file(folder / "qpipe_reference.safetensors")
    found = load_file(tmp_path / "found.safetensors")["logits"]
    assert torch.equal(found, reference["logits"])
    again = restore(run.out)
    inputs = {k.removeprefix("inputs."): v for k, v in reference.items() if k.startswith("inputs.")}
    again.student.eval()
    with torch.no_grad():
        logits = again.student(**inputs).logits
        torch.testing.assert_close(logits, found, rtol=0, atol=1e-6)
        again.instruments.context.enabled = False
        assert float((again.student(**inputs).logits - found).abs().max()) > 1e-5, "quantization changes them"


def test_the_file_has_the_calibrated_ranges(run):
    quantizers = {s: q for s, q in run.instruments.quantizers().items() if s.endswith(":input")}
    assert len(quantizers) == 12
    with safe_open(run.out / "export" / "model.safetensors", "pt") as file:
        for site, quantizer in quantizers.items():
            path = site.removesuffix(":input")
            assert torch.equal(file.get_tensor(f"{path}.input_scale").flatten(), quantizer.scale)
            zero = file.get_tensor(f"{path}.input_zero_point").flatten().float()
            assert torch.equal(zero, quantizer.zero_point)
    config = json.loads((run.out / "export" / "config.json").read_text())["quantization_config"]
    inputs = [group["input_activations"] for group in config["config_groups"].values()]
    assert any(entry and entry["dynamic"] is False for entry in inputs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_range_of_another_scale_is_found(device, run, tmp_path):
    """Where the environment changed, logits are compared within rounding, which one wrong range may stay below."""
    folder = tmp_path / "export"
    shutil.copytree(run.out / "export", folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("input_scale"))
    tensors[name] *= 1.01
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    save_file(tensors, folder / "model.safetensors", about)
    record = json.loads((folder / "qpipe.json").read_text())
    record["environment"]["device"] = device
    write_json(folder / "qpipe.json", record)
    write_sums(folder)
    checks = {check.name: check for check in verify(folder, check_metric=False).checks}
    assert checks["weights"].status == "pass" and checks["activations"].status == "fail"
    assert f"{name.removesuffix('_scale').replace('.input', ':input')} has scale" in checks["activations"].detail


def test_all_ranges_are_compared(run):
    checks = {check.name: check for check in verify(run.out / "export", check_metric=False).checks}
    assert checks["activations"].detail == "12 ranges, difference exactly 0"
