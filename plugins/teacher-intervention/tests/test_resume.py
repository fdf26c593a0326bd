"""A run that was interrupted in any phase, or between two, ends in the weights of one that was not."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest

import qpipe
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash

EXECUTE = importlib.import_module("qpipe.stages.execute")
CASES = {
    # Outputs in step 0, contexts in step 1, maps in steps 2 to 5, none in 6 to 8, each with its own schedule.
    "reference": ("ti-g", {"preset": "reference", "learning_rate": 2e-3}, (1, 2, 4, 6, 7)),
    # Outputs in steps 0 to 2, maps in 3 to 5, none in 6 to 8.
    "paper": ("ti-g", {"preset": "paper", "learning_rate": 2e-3}, (1, 4, 7)),
    "drawn": ("ti-g", {"schedule": "reference-stochastic", "two_step": True}, (3,)),
    "inverted": ("ti-g", {"schedule": "paper-inverted", "two_step": True}, (2, 4)),
    # One kind of intervention in steps 0 to 5.
    "ti-o": ("ti-o", {"preset": "paper"}, (3, 7)),
    "ti-m": ("ti-m", {"preset": "paper"}, (3, 7)),
    "ti-o-reference": ("ti-o", {"preset": "reference", "learning_rate": 2e-3}, (3, 7)),
    "ti-m-reference": ("ti-m", {"preset": "reference", "learning_rate": 2e-3}, (3, 7)),
}


@pytest.fixture
def kinds(monkeypatch):
    """`(step, intervention)` of every step; exports are not verified."""
    seen = []
    plugin = importlib.import_module("qpipe_teacher_intervention.plugin").TeacherIntervention
    original = plugin.qpipe_signals

    def watch(self, run):
        if run.step is not None:
            seen.append(self.kind)
        return original(self, run)

    monkeypatch.setattr(plugin, "qpipe_signals", qpipe.hookimpl(watch))
    monkeypatch.setattr(EXECUTE, "verify", lambda *_, **__: SimpleNamespace(passed=True, metrics={}, lines=list))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_resume(case, kinds, tmp_path):
    plugin, options, interrupted = CASES[case]
    config = tiny_config(
        tmp_path,
        {plugin: {**options, "steps": 6}},
        teacher__name=str(tmp_path / "teacher"),
        train__max_steps=9,
        train__save_every=1,
    )
    run = qpipe.execute(config)
    whole, straight = weights_hash(run.out), list(kinds)
    assert straight[6:] == [None] * 3 and None not in straight[:6]
    assert (len({*straight[:6]}) > 1) == (plugin == "ti-g")
    assert [(p.name, p.stop) for p in run.phases] == [("teacher-intervention", 6), ("train", 9)]
    metadata = json.loads((run.out / "export" / "qpipe.json").read_text())["plugins"][plugin]
    assert "phases" in json.dumps(metadata)
    for step in interrupted:
        kinds.clear()
        name, folder = f"checkpoints/step-{step:08d}", tmp_path / f"from-{step}"
        shutil.copytree(run.out / name, folder / name)
        qpipe.execute(config.model_copy(update={"out": str(folder)}), resume=True)
        assert kinds == straight[step:]
        assert weights_hash(folder) == whole, f"resumed after step {step}"
