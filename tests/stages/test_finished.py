"""What a run leaves behind, and what can be done with it afterwards."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import qpipe
from qpipe import CheckpointError, ConfigError, FormatError
from qpipe.config import resolve
from qpipe.export.inspect import describe, sizes
from qpipe.export.verify import verify
from qpipe.stages import evaluate_run, export_run
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config

EXECUTE = importlib.import_module("qpipe.stages.execute")


def test_run_directory(finished):
    names = {p.name for p in finished.out.iterdir()}
    expected = {"config.yaml", "plan.json", "metrics.jsonl", "results.json", "tensors.json"}
    assert names >= {*expected, "model", "export", "checkpoints"}
    assert resolve(finished.out / "config.yaml") == finished.config
    results = json.loads((finished.out / "results.json").read_text())
    assert results["steps"] == 6 and results["evaluation"] == finished.results["evaluation"]
    assert not list(finished.out.rglob("*.tmp")), "temporary files are left"


def test_evaluating_it_again_gives_its_results(finished):
    assert evaluate_run(finished.out) == finished.results["evaluation"]


def test_the_restored_model_is_the_trained_one(finished):
    again = restore(finished.out)
    assert again.plan.to_json() == finished.plan.to_json()
    batch = finished.data.collate([finished.data.validation[i] for i in range(8)])
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(again.student.eval()(**batch).logits, finished.student.eval()(**batch).logits)


def test_export_in_another_format_holds_the_same_codes(finished, tmp_path):
    before = (finished.out / "export" / "model.safetensors").read_bytes()
    folder = export_run(finished.out, "native", tmp_path / "native")
    assert folder == tmp_path / "native"
    assert (finished.out / "export" / "model.safetensors").read_bytes() == before
    rows = {row["module"]: row for row in describe(folder)}
    for entry in finished.plan.to_json():
        if entry["site"].endswith(":weight"):
            assert rows[entry["site"].removesuffix(":weight")]["bits"] == entry["bits"]
    result = verify(folder)
    assert result.passed, "\n".join(result.lines())
    for made in (finished.out / "export", folder):
        assert "by quantization-aware training" in (made / "README.md").read_text()


def test_another_export_in_its_place_takes_the_results_about_the_first_with_it(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "run")
    before = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps({**before, "verified": True, "reloaded": {"accuracy": 1.0}}))
    export_run(out, "native")
    after = json.loads((out / "results.json").read_text())
    assert "verified" not in after and "reloaded" not in after, "nobody has verified this one"
    assert after["size"] == sizes(out / "export") and after["size"] != before["size"]
    assert after["evaluation"] == before["evaluation"]


def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(finished, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    monkeypatch.setattr(importlib.import_module("qpipe.stages.execute"), "restore", lambda _: pytest.fail("loaded"))
    with pytest.raises(FormatError, match="holds files that are no qpipe export"):
        export_run(finished.out, None, tmp_path / "mine")


def test_unknown_format_suggests_the_nearest(finished, tmp_path):
    with pytest.raises(
        ConfigError, match="export format 'nativ' is unknown; did you mean 'native'.*compressed-tensors"
    ):
        export_run(finished.out, "nativ", tmp_path / "x")


def test_what_is_no_run_directory(tmp_path):
    with pytest.raises(ConfigError, match="has no config.yaml: it is not a run directory"):
        evaluate_run(tmp_path)


def test_a_run_that_has_not_ended(finished, tmp_path):
    (tmp_path / "config.yaml").write_text((finished.out / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="has no trained model yet; finish the training: qpipe launch --resume"):
        export_run(tmp_path)


def test_what_was_measured_survives_a_failed_verification(tmp_path, monkeypatch):
    """Only the run does not count as complete."""
    outcome = SimpleNamespace(passed=False, metrics={"accuracy": 0.5}, lines=lambda: ["logits: FAILED"])
    monkeypatch.setattr(EXECUTE, "verify", lambda *given, **options: outcome)
    config = tiny_config(tmp_path, train__max_steps=2)
    with pytest.raises(CheckpointError, match=r"(?s)does not verify.*logits: FAILED.*results-unverified.json"):
        qpipe.execute(config)
    out = tmp_path / "run"
    kept = json.loads((out / "results-unverified.json").read_text())
    assert kept["verified"] is False and kept["evaluation"] and kept["reloaded"] == {"accuracy": 0.5}
    assert not (out / "results.json").exists() and (out / "model" / "model.safetensors").is_file()
    outcome.passed = True
    qpipe.execute(config, resume=True)
    assert json.loads((out / "results.json").read_text())["verified"]
    assert not (out / "results-unverified.json").exists()
