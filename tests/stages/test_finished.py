"""What a run leaves behind, and what can be done with it afterwards."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import qpipe
from qpipe import CheckpointError, ConfigError, FormatError
from qpipe.config import resolve
from qpipe.export import _fresh
from qpipe.export.inspect import describe, sizes
from qpipe.export.metric import prepare
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


def test_a_resumed_run_does_not_replace_an_export_that_has_more_in_it(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "run")
    (out / "export" / "my_evaluation.csv").write_text("years of work")
    config = finished.config.model_copy(update={"out": str(out)})
    with pytest.raises(ConfigError, match=r"beside it 1 other files, such as my_evaluation.csv"):
        qpipe.execute(config, resume=True)
    assert (out / "export" / "my_evaluation.csv").read_text() == "years of work"


def test_a_run_directory_whose_model_is_a_link(tmp_path, fast):
    """To a disk with more room."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "large")
    config = tiny_config(tmp_path, train__max_steps=1)
    run = qpipe.execute(config)
    assert (run.out / "model").is_symlink() and (tmp_path / "large" / "config.json").is_file()


def test_a_disk_that_fills_up_while_the_model_is_written(tmp_path, fast, monkeypatch):
    def full(*words, **more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("qpipe.stages.trained.save_file", full)
    learned = [{"site": "{block}.*:weight", "quantizer": "lsq"}]  # whose steps are saved too
    with pytest.raises(CheckpointError, match=r"cannot write to .*run: .* MiB are free there"):
        qpipe.execute(tiny_config(tmp_path, train__max_steps=1, quantization__rules=learned))
    assert not (tmp_path / "run" / ".model.tmp").exists()


def test_what_was_measured_is_kept_where_verification_has_no_room(tmp_path, monkeypatch):
    def full(*words, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EXECUTE, "verify", full)
    with pytest.raises(CheckpointError, match=r"could not be verified: .*No space left.*kept in .*results-unverified"):
        qpipe.execute(tiny_config(tmp_path, train__max_steps=1))
    kept = json.loads((tmp_path / "run" / "results-unverified.json").read_text())
    assert kept["evaluation"] and not (tmp_path / "run" / "results.json").exists()


def test_a_finished_run_keeps_the_order_of_its_classes(tmp_path):
    """A run of before texts had the order of the task's names, which its configuration does not say."""
    path = tmp_path / "pairs.csv"
    rows = "the movie was good,the film,equivalent\nthe movie was bad,the film,not_equivalent\n"
    path.write_text("sentence1,sentence2,label\n" + rows * 30)
    labels = ["equivalent", "not_equivalent"]
    data = {"data__train": str(path), "data__labels": labels}
    run = qpipe.execute(tiny_config(tmp_path, task="mrpc", train__max_steps=2, **data))
    text = (run.out / "config.yaml").read_text()
    (run.out / "config.yaml").write_text(text.replace("labels:\n  - equivalent\n  - not_equivalent", "labels: null"))
    assert resolve(run.out / "config.yaml").data.labels is None
    assert restore(run.out).data.label_names == tuple(labels)
    assert evaluate_run(run.out) == run.results["evaluation"]
    about = json.loads((run.out / "export" / "qpipe.json").read_text())
    about["config"]["data"]["labels"] = None
    prepared = prepare(about, tmp_path / "batches", labels=labels)
    first = next(iter(_fresh.prepared(str(prepared.batches))))["labels"]
    original = [row["labels"] for row in run.data.validation]
    assert first.tolist() == original[: len(first)]


def test_a_licence_is_a_file(tmp_path, fast):
    """REUSE has a folder of that name; a link may lead nowhere."""
    config = tiny_config(tmp_path, train__max_steps=1)
    (tmp_path / "model" / "LICENSES").mkdir()
    (tmp_path / "model" / "LICENCE").symlink_to(tmp_path / "nowhere")
    assert not (qpipe.execute(config).out / "export" / "LICENSE").exists()
    (tmp_path / "model" / "license.txt").write_text("MIT")
    again = qpipe.execute(config.model_copy(update={"out": str(tmp_path / "again")}))
    assert (again.out / "export" / "LICENSE").read_text() == "MIT"


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
