"""The recipe of `examples/cifar10` from launch to a verified export, with a network that transformers does not have."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import qpipe
from qpipe import SiteError
from qpipe.config import resolve
from qpipe.errors import FormatError
from qpipe.export.native import load_native
from qpipe.export.verify import verify_all
from qpipe.quant.step_error import times
from qpipe.stages import checkpoint as checkpoints
from qpipe.stages import evaluate_run, plan_run
from qpipe.stages.evaluate import evaluate
from qpipe.stages.trained import restore
from qpipe.stages.variants import rebuilt, rescaled, weight_sites
from qpipe.testing.contract import weights_hash

from .conftest import EXAMPLE, LABELS, ROOT

CODE = {"configuration_cifar_resnet.py", "modeling_cifar_resnet.py"}
SHARED = ROOT.parent / "shared"
EXECUTE = importlib.import_module("qpipe.stages.execute")
"""The module; the package's attribute of that name is the function."""
ALONE = {"engine.name": "accelerate", "engine.cpu": "true"}


def overrides(*parts):
    return [f"{key}={value}" for part in parts for key, value in part.items()]


@pytest.fixture(scope="module")
def config(recipe, tmp_path_factory):
    """Six optimizer steps of two micro-batches, with the rule of the recipe at 3 bits; ends with the last weights."""
    changes = {
        "quantization.rules.0.options.bits": 3,
        "train.max_steps": 6,
        "train.save_every": 3,
        "train.eval_every": 3,
        "train.accumulation": 2,
        "train.keep_checkpoints": 9,
        "train.keep_best": "false",
        "train.schedule": "constant",
        "out": tmp_path_factory.mktemp("run") / "run",
    }
    return resolve(EXAMPLE / "base.yaml", overrides(recipe, ALONE, changes), ["kure"])


def no_verification(folder, trust_remote_code, run_program):
    assert trust_remote_code, "the recipe says so"
    return SimpleNamespace(passed=True, metrics={}, lines=list)


@pytest.fixture
def fast(monkeypatch):
    """Runs are not verified."""
    monkeypatch.setattr(EXECUTE, "verify", no_verification)


@pytest.fixture(scope="module")
def run(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXECUTE, "verify", no_verification)
        return qpipe.execute(config)


def test_launch_on_two_processes(recipe, tmp_path):
    out = tmp_path / "run"
    sets = [item for text in overrides(recipe, {"train.max_steps": 4}) for item in ("--set", text)]
    command = [sys.executable, "-m", "qpipe.cli", "launch", str(EXAMPLE / "base.yaml"), "--cpus", "2", *sets]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads((out / "results.json").read_text())
    assert results["verified"] and results["reloaded"] == results["evaluation"]
    assert len(json.loads((out / "plan.json").read_text())) == 6, "both convolutions of each block"


def test_the_first_and_the_last_layer_stay_in_full_precision(run):
    found = {f"resnet.layer{stage}.0.conv{number}:weight" for stage in (1, 2, 3) for number in (1, 2)}
    assert set(run.plan.sites) == found
    assert not torch.equal(start(run, "resnet.layer2.0.conv1.weight"), end(run, "resnet.layer2.0.conv1.weight"))


def start(run, name):
    return load_file(Path(run.config.model.name) / "model.safetensors")[name]


def end(run, name):
    return load_file(run.out / "model" / "model.safetensors")[name]


def test_the_export_brings_its_code_and_loads_where_that_is_trusted(run):
    folder = run.out / "export"
    assert {path.name for path in folder.glob("*.py")} == CODE
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": LABELS[0], "1": LABELS[1]}
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    reference = load_file(folder / "qpipe_reference.safetensors")
    with torch.inference_mode():
        logits = load_native(folder, trust_remote_code=True)(reference["inputs.pixel_values"]).logits
    torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=0)


def test_code_runs_only_where_it_is_trusted(run):
    folder = run.out / "export"
    (refused,) = verify_all([folder])
    assert not refused.passed
    assert any("qpipe verify --trust-remote-code" in check.detail for check in refused.checks)
    with pytest.raises(FormatError, match="trust_remote_code"):
        load_native(folder)


def test_code_that_was_changed_afterwards_does_not_run(run, tmp_path):
    folder = Path(shutil.copytree(run.out / "export", tmp_path / "export"))
    (folder / "modeling_cifar_resnet.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (result,) = verify_all([folder], trust_remote_code=True)
    assert not result.passed and not (tmp_path / "ran").exists()


def test_a_linear_map_exports_to_the_default_format(config, tmp_path, fast):
    changes = ["quantization.rules.0.site='{head}:weight'", "export.format=compressed-tensors", "train.max_steps=1"]
    other = config.model_dump(mode="json") | {"plugins": {}, "out": str(tmp_path / "run")}
    made = qpipe.execute(resolve(other, [*changes, "quantization.rules.0.quantizer=uniform"]))
    assert list(made.plan.sites) == ["classifier:weight"]
    folder = made.out / "export"
    stock = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    reference = load_file(folder / "qpipe_reference.safetensors")
    with torch.inference_mode():
        assert torch.equal(stock(reference["inputs.pixel_values"]).logits, reference["logits"])


def test_batch_statistics_train_and_resume_bit_for_bit(config, run, tmp_path, fast):
    name = "resnet.layer1.0.bn1.running_mean"
    assert not torch.equal(start(run, name), end(run, name))
    assert end(run, "resnet.bn1.num_batches_tracked") == 12, "6 steps of 2 micro-batches"
    out = tmp_path / "resumed"
    shutil.copytree(checkpoints.folder(run.out, 3), out / "checkpoints" / "step-00000003")
    qpipe.execute(config.model_copy(update={"out": str(out)}), resume=True)
    assert weights_hash(out) == weights_hash(run.out)


def test_the_best_weights_come_with_their_batch_statistics(config, tmp_path, monkeypatch, fast):
    """The second evaluation counts as worse, so that training ends with the checkpoint of the first."""
    monkeypatch.setattr(
        importlib.import_module("qpipe.stages.train"), "is_better", lambda run, metrics, best: best is None
    )
    best = ["train.keep_best=true", f"out={tmp_path / 'run'}"]
    made = qpipe.execute(resolve(config.model_dump(mode="json"), best))
    assert made.results["best_step"] == 3
    saved = torch.load(checkpoints.folder(made.out, 3) / "engine" / "state.pt", weights_only=True)["model"]
    buffers = [name for name in saved if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(buffers) == 3 * 7
    assert all(torch.equal(saved[name], end(made, name)) for name in buffers)
    assert end(made, "resnet.bn1.num_batches_tracked") == 6
    assert evaluate_run(made.out) == made.results["evaluation"]


def test_variants_leave_weights_and_batch_statistics_alone(run):
    again = restore(run.out)
    before = {name: tensor.clone() for name, tensor in again.student.state_dict().items()}
    trained = evaluate(again)
    assert trained == run.results["evaluation"]
    names = weight_sites(again)
    for variant in (rebuilt(again, names, 2), rescaled(again, names, times(0.7))):
        with variant:
            evaluate(again)
    assert evaluate(again) == trained
    assert all(torch.equal(before[name], tensor) for name, tensor in again.student.state_dict().items())


def test_presets_quantize_the_blocks_of_a_model_without_embedding(config):
    preset = resolve(config.model_dump(mode="json"), ["quantization.preset=w4", "quantization.rules=[]"])
    assert {entry.bits for entry in plan_run(preset).plan.sites.values()} == {4}
    assert len(plan_run(preset).plan.sites) == 6
    rule = '[{site: "{embedding}:weight"}]'
    with pytest.raises(SiteError, match="no embedding"):
        plan_run(resolve(config.model_dump(mode="json"), [f"quantization.rules={rule}"]))


def shared(path: str) -> Path:
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"real input absent: {found}")
    return found


def test_published_weights_keep_their_accuracy(prepare, tmp_path, fast):
    """91.25 % of these 2,000 test images in full precision; at 8 bits per channel two images more or less."""
    weights, data = shared("models/resnet_cifar10/resnet20.safetensors"), shared("data/cifar10")
    folder = prepare.prepare(weights, tmp_path / "model")
    where = {"model.name": folder, "data.train": data / "train.parquet", "data.validation": data / "test.parquet"}
    plan = {"quantization.preset": "w8", "quantization.rules": "[]", "out": tmp_path / "run"}
    made = qpipe.stages.quantize(resolve(EXAMPLE / "base.yaml", overrides(where, plan)))
    assert made.results["teacher"]["accuracy"] == 0.9125
    assert made.results["evaluation"]["accuracy"] == pytest.approx(0.9125, abs=0.002)
    assert len(made.plan.sites) == 18
