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
    # Outputs in steps 0 and 1, contexts in 2 and 3, maps in 4 to 11, none in 12 to 14, each with its own schedule.
    "reference": ("ti-g", {"preset": "reference", "learning_rate": 2e-3, "steps": 12}, (1, 2, 3, 4, 7, 12, 13)),
    # Outputs in steps 0 to 2, maps in 3 to 5, none in 6 to 8.
    "paper": ("ti-g", {"preset": "paper", "learning_rate": 2e-3}, (1, 3, 4, 6, 7)),
    "drawn": ("ti-g", {"schedule": "reference-stochastic", "two_step": True}, (3,)),
    "drawn-paper": ("ti-g", {"schedule": "paper-stochastic", "two_step": True}, (3,)),
    # Maps in steps 0 to 2, outputs in 3 to 5.
    "inverted": ("ti-g", {"schedule": "paper-inverted", "two_step": True}, (2, 3, 4)),
    # Maps in steps 0 to 7, contexts in 8 and 9, outputs in 10 and 11.
    "inverted-reference": (
        "ti-g",
        {"schedule": "reference-inverted", "two_step": True, "steps": 12},
        (5, 8, 9, 10, 11),
    ),
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
    steps = options.get("steps", 6)
    config = tiny_config(
        tmp_path,
        {plugin: {**options, "steps": steps}},
        teacher__name=str(tmp_path / "teacher"),
        train__max_steps=steps + 3,
        train__save_every=1,
        train__keep_checkpoints=steps + 3,
    )
    run = qpipe.execute(config)
    whole, straight = weights_hash(run.out), list(kinds)
    assert straight[steps:] == [None] * 3 and None not in straight[:steps]
    assert (len({*straight[:steps]}) > 1) == (plugin == "ti-g")
    assert [(p.name, p.stop) for p in run.phases] == [("teacher-intervention", steps), ("train", steps + 3)]
    metadata = json.loads((run.out / "export" / "qpipe.json").read_text())["plugins"][plugin]
    assert "phases" in json.dumps(metadata)
    for step in interrupted:
        kinds.clear()
        name, folder = f"checkpoints/step-{step:08d}", tmp_path / f"from-{step}"
        shutil.copytree(run.out / name, folder / name)
        qpipe.execute(config.model_copy(update={"out": str(folder)}), resume=True)
        assert kinds == straight[step:]
        assert weights_hash(folder) == whole, f"resumed after step {step}"
