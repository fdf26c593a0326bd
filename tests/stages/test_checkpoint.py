"""Checkpoints: a failed save harms nothing, a damaged one is not read, a good one goes on bit for bit."""

import errno
import importlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import qpipe
from qpipe import CheckpointError, ConfigError, Plugin, PluginError, hookimpl, rundir
from qpipe.config import dump, resolve
from qpipe.engine.accelerate import AccelerateEngine
from qpipe.files import sha256, write_json
from qpipe.stages import checkpoint
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash

TRAIN = importlib.import_module("qpipe.stages.train")
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file data/0"),
]


@pytest.fixture
def fails_second_time(monkeypatch):
    def plant(error):
        original, calls = AccelerateEngine.save, []

        def save(self, folder):
            calls.append(folder)
            original(self, folder)
            if len(calls) == 2:
                raise error

        monkeypatch.setattr(AccelerateEngine, "save", save)

    return plant


@pytest.mark.parametrize("error", FULL, ids=["os", "torch"])
def test_a_full_disk_leaves_the_earlier_checkpoint(error, tmp_path, fails_second_time, fast):
    fails_second_time(error)
    with pytest.raises(CheckpointError, match=r"cannot write to .*run: .*MiB are free there; make room.*untouched"):
        qpipe.execute(tiny_config(tmp_path))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000003"], "something is left of the failed save"
    checkpoint.verify_files(checkpoints / "step-00000003")


def test_an_error_that_is_not_the_disks_is_not_called_one(tmp_path, fails_second_time, fast):
    fails_second_time(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="^something else$"):
        qpipe.execute(tiny_config(tmp_path))
    assert checkpoint.steps(tmp_path / "run") == [3]


def test_an_unfinished_save_is_no_checkpoint_and_is_overwritten(finished, tmp_path, fast):
    out = tmp_path / "run"
    copy_checkpoint(finished, 3, out)
    left = out / "checkpoints" / ".step-00000006.tmp"
    left.mkdir()
    (left / "junk").write_text("half")
    assert checkpoint.steps(out) == [3]
    run = resume(finished, out)
    assert checkpoint.steps(run.out) == [3, 6] and not left.exists()
    assert not (out / "checkpoints" / "step-00000006" / "junk").exists()


def copy_checkpoint(run, step, out):
    target = checkpoint.folder(out, step)
    return shutil.copytree(checkpoint.folder(run.out, step), target)


def resume(run, out):
    return qpipe.execute(run.config.model_copy(update={"out": str(out)}), resume=True)


def test_resume_ends_in_the_same_bits(finished, tmp_path, fast):
    out = tmp_path / "again"
    copy_checkpoint(finished, 3, out)
    run = resume(finished, out)
    assert run.results["resumed_step"] == 3
    assert weights_hash(out) == weights_hash(finished.out)
    assert run.results["evaluation"] == finished.results["evaluation"]


def test_resume_after_the_last_checkpoint_evaluates_and_exports(finished, tmp_path, fast):
    """Killed while exporting or verifying: no step is left, and the results are those of an uninterrupted run."""
    out = tmp_path / "again"
    copy_checkpoint(finished, 6, out)
    run = resume(finished, out)
    assert weights_hash(out) == weights_hash(finished.out)
    again = json.loads((out / "results.json").read_text())
    assert again["evaluation"] == finished.results["evaluation"]
    assert run.results["self_check"]["max_logit_change"][0] > 0, "the check is made at every start"


def truncate(path):
    file = path / "engine" / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path):
    file = path / "engine" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(path):
    (path / "rank-00000.pt").unlink()


def forge(path):
    progress = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**progress, "best_step": 1}, indent=1))


def no_manifest(path):
    (path / "manifest.json").unlink()


def half_a_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


DAMAGE = {
    truncate: r"state\.pt has \d+ bytes, \d+ were written",
    flip: r"state\.pt was changed after it was written",
    remove: r"lacks rank-00000\.pt",
    forge: r"progress\.json (has \d+ bytes|was changed)",
    no_manifest: "has no readable manifest",
    half_a_manifest: "has no readable manifest",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_not_read(damage, finished, tmp_path):
    path = copy_checkpoint(finished, 6, tmp_path)
    checkpoint.verify_files(path)
    damage(path)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        checkpoint.verify_files(path)
    assert f"remove {path} to go on from an earlier checkpoint" in str(caught.value)


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(finished, tmp_path, fast):
    copy_checkpoint(finished, 3, tmp_path)
    path = copy_checkpoint(finished, 6, tmp_path)
    truncate(path)
    with pytest.raises(CheckpointError, match="were written; remove"):
        resume(finished, tmp_path)
    shutil.rmtree(path)
    assert resume(finished, tmp_path).results["resumed_step"] == 3, "the advice of the message does not work"


def test_another_number_of_processes(finished, tmp_path, fast):
    path = copy_checkpoint(finished, 3, tmp_path)
    progress = json.loads((path / "progress.json").read_text())
    write_json(path / "progress.json", {**progress, "world_size": 4})
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / "progress.json"
    manifest["progress.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(path / "manifest.json", manifest)
    with pytest.raises(
        CheckpointError, match="was written by 4 processes, this run has 1; resume with the same number"
    ):
        resume(finished, tmp_path)


class Counter(Plugin):
    """Has a state that must survive, random numbers of every generator among it."""

    def __init__(self):
        super().__init__()
        self.seen, self.drawn, self.restored = [], [], None

    @hookimpl
    def qpipe_step_start(self, step):
        import random

        import numpy as np

        self.seen.append(step.index)
        self.drawn.append((random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(1))))

    @hookimpl
    def qpipe_state(self):
        return {"seen": list(self.seen)}

    @hookimpl
    def qpipe_restore(self, state):
        self.restored = state
        self.seen = list(state["seen"])


def test_plugin_state_and_random_generators_go_on(tmp_path, use, fast):
    whole, again = Counter(), Counter()
    use(whole)
    run = qpipe.execute(tiny_config(tmp_path))
    out = tmp_path / "again"
    copy_checkpoint(run, 3, out)
    use(again)
    resume(run, out)
    assert again.restored == {"seen": [0, 1, 2]}
    assert again.seen == whole.seen == list(range(6))
    assert again.drawn == whole.drawn[3:]


STATIC = [
    {"site": "{block}.*:weight", "options": {"bits": 4}},
    {
        "site": "{block}.*:input",
        "quantizer": "uniform-activation",
        "options": {"dynamic": False, "granularity": "tensor", "symmetric": False},
    },
]


def test_calibrated_ranges_survive_resume_restore_and_export(tmp_path, monkeypatch, fast):
    config = tiny_config(tmp_path, quantization__preset=None, quantization__rules=STATIC)
    run = qpipe.execute(config)
    ranges = {s: float(q.scale) for s, q in run.instruments.quantizers().items() if s.endswith(":input")}
    assert len(set(ranges.values())) > 3
    out = tmp_path / "again"
    copy_checkpoint(run, 3, out)
    module = importlib.import_module("qpipe.stages.execute")
    monkeypatch.setattr(module, "calibrate", lambda run: pytest.fail("a resumed run must not calibrate again"))
    again = resume(run, out)
    assert {s: float(q.scale) for s, q in again.instruments.quantizers().items() if s.endswith(":input")} == ranges
    assert weights_hash(out) == weights_hash(run.out)
    assert qpipe.stages.evaluate_run(out) == run.results["evaluation"]


def test_old_checkpoints_are_removed(tmp_path, fast):
    run = qpipe.execute(tiny_config(tmp_path, train__save_every=1, train__keep_checkpoints=2))
    assert checkpoint.steps(run.out) == [5, 6]


def test_training_can_end_from_every_checkpoint_that_is_kept(tmp_path, monkeypatch, fast):
    """The best of each is kept with it: here the newest was damaged and removed, as its message advises."""
    script = iter([0.5, 0.9, 0.7, 0.6, 0.95, 0.8, 0.8, 0.1, 0.2, 0.3])
    monkeypatch.setattr(TRAIN, "evaluate", lambda run, last=None: {"accuracy": next(script)})
    changes = {"eval_every": 1, "save_every": 1, "keep_best": True, "keep_checkpoints": 2}
    config = tiny_config(tmp_path, **{f"train__{key}": value for key, value in changes.items()}, train__max_steps=5)
    qpipe.execute(config)
    assert checkpoint.steps(tmp_path / "run") == [2, 4, 5]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")
    run = qpipe.execute(config, resume=True)
    assert run.results["best_step"] == 2


def test_a_best_checkpoint_that_was_removed_leaves_the_last_weights(tmp_path, monkeypatch, caplog, fast):
    """It was damaged, and the message says to remove it."""
    script = iter([0.9, 0.7, 0.6, 0.9, 0.5])
    monkeypatch.setattr(TRAIN, "evaluate", lambda run, last=None: {"accuracy": next(script)})
    monkeypatch.setattr(logging.getLogger("qpipe"), "propagate", True)
    changes = {"eval_every": 1, "save_every": 1, "keep_best": True, "keep_checkpoints": 1, "max_steps": 3}
    config = tiny_config(tmp_path, **{f"train__{key}": value for key, value in changes.items()})
    assert qpipe.execute(config).results["best_step"] == 1
    assert checkpoint.steps(tmp_path / "run") == [1, 3]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000001")
    run = qpipe.execute(config, resume=True)
    assert run.results["best_step"] is None and run.results["evaluation"] == {"accuracy": 0.5}
    assert "the checkpoint of step 1, the best, is gone: the run ends with its last weights" in caplog.text


class Lost(Plugin):
    """Wants an object kept that checkpoints are not read with."""

    @hookimpl
    def qpipe_state(self):
        return {"where": Path("somewhere")}


def test_state_that_could_not_be_read_back_is_refused_with_the_first_checkpoint(tmp_path, use, fast):
    use(Lost())
    with pytest.raises(
        PluginError, match=r"plugin 'test-0': what .* cannot be read back .* a pathlib.PosixPath; return"
    ):
        qpipe.execute(tiny_config(tmp_path))
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_directory_with_a_run_is_not_started_over(finished):
    with pytest.raises(ConfigError, match="is already in use: it holds checkpoints; continue that run with --resume"):
        qpipe.execute(finished.config)


def with_train(config, out, **changes):
    return config.model_copy(update={"out": str(out), "train": config.train.model_copy(update=changes)})


def test_a_run_does_not_go_on_as_another(finished, tmp_path, fast):
    """Also under launchers that compare nothing, such as torchrun, and where the saved configuration was edited."""
    out = tmp_path / "again"
    copy_checkpoint(finished, 3, out)
    slower = with_train(finished.config, out, learning_rate=1e-7)
    (out / "config.yaml").write_text(dump(slower))
    with pytest.raises(
        ConfigError, match=r"cannot change what was started: train.learning_rate: [\d.e-]+ -> 1e-07. .*another --out"
    ):
        qpipe.execute(slower, resume=True)
    assert not (out / "results.json").exists()
    quieter = with_train(finished.config, out, log_every=100)
    run = qpipe.execute(quieter, resume=True)
    assert run.results["resumed_step"] == 3
    assert resolve(out / "config.yaml") == quieter, "what the next one goes on with"


def test_a_configuration_that_trained_nothing_is_replaced(finished, tmp_path, fast):
    """Such as one that ran out of memory in its first step."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(dump(with_train(finished.config, out, batch_size=64)))
    config = with_train(finished.config, out, max_steps=1)
    qpipe.execute(config)
    assert resolve(out / "config.yaml") == config


def test_a_missing_gpu_is_no_change(finished, tmp_path, fast):
    """`launch` writes `engine.cpu: true` where there is none, and torchrun does not."""
    out = tmp_path / "again"
    copy_checkpoint(finished, 6, out)
    engine = finished.config.engine.model_copy(update={"cpu": False})
    config = finished.config.model_copy(update={"out": str(out), "engine": engine})
    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match="engine.cpu: true -> false"):
            qpipe.execute(config, resume=True)
    else:
        assert qpipe.execute(config, resume=True).results["resumed_step"] == 6


def test_a_finished_run_without_checkpoints_is_not_trained_anew(finished, tmp_path, fast):
    """Nor one that was quantized: it would take the place of the model that is there."""
    out = tmp_path / "again"
    shutil.copytree(finished.out, out)
    shutil.rmtree(out / "checkpoints")
    (out / "results.json").unlink()
    before = (out / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"nothing to resume in .*again: it holds model and no checkpoint"):
        qpipe.execute(with_train(finished.config, out), resume=True)
    with pytest.raises(ConfigError, match="it holds model and no checkpoint"):
        rundir.require_resumable(out)
    assert (out / "model" / "model.safetensors").read_bytes() == before and (out / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize("large", [False, True])
def test_a_run_does_not_go_on_with_other_data(large, tmp_path, monkeypatch, fast):
    """The order of the examples, the length and the best metric would be others. Large files are only measured."""
    monkeypatch.setattr("qpipe.stages.input_files.LARGE", 0 if large else 2**28)
    config = tiny_config(tmp_path)
    qpipe.execute(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    data = Path(config.data.train)
    whole = data.read_text()
    changed = whole.replace("0", "1", 1) if not large else whole + whole.splitlines()[0] + "\n"
    data.write_text(changed)
    assert changed != whole
    with pytest.raises(ConfigError, match=r"data.train \(.*train.jsonl\) has changed since the checkpoint in .*run"):
        qpipe.execute(config, resume=True)
    data.write_text(whole)
    assert qpipe.execute(config, resume=True).results["resumed_step"] == 3


@pytest.mark.parametrize("key", ["data.validation", "teacher.name", "model.tokenizer"])
def test_a_run_does_not_go_on_with_another(key, tmp_path, fast):
    """Validation data, by which the best weights are chosen; teacher; or words of the texts."""
    config = tiny_config(tmp_path, teacher__name=str(tmp_path / "teacher"))
    validation = Path(shutil.copy(config.data.train, tmp_path / "validation.jsonl"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation": str(validation)})})
    qpipe.execute(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    path, old, new = {
        "data.validation": (validation, b"0", b"1"),
        "teacher.name": (tmp_path / "teacher" / "config.json", b"{", b"{ "),
        "model.tokenizer": (Path(config.model.name) / "tokenizer.json", b'"lowercase": true', b'"lowercase": false'),
    }[key]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(old, new, 1))
    assert path.read_bytes() != whole
    with pytest.raises(ConfigError, match=rf"{key} \(.*has changed since the checkpoint in .*run"):
        qpipe.execute(config, resume=True)
    path.write_bytes(whole)
    assert qpipe.execute(config, resume=True).results["resumed_step"] == 3


def test_the_time_of_earlier_sessions_counts(finished, tmp_path, fast):
    out = tmp_path / "again"
    copy_checkpoint(finished, 3, out)
    path = out / "checkpoints" / "step-00000003"
    progress = json.loads((path / "progress.json").read_text())
    assert 0 < progress["seconds"]["train"] < finished.results["seconds"]["train"]
    write_json(path / "progress.json", {**progress, "seconds": {**progress["seconds"], "train": 1000.0}})
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / "progress.json"
    write_json(path / "manifest.json", {**manifest, file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}})
    seconds = resume(finished, out).results["seconds"]
    assert 1000 < seconds["train"] < 1100 and seconds["build"] > progress["seconds"]["build"]
