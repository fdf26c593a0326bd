"""A budget decides how long other plugins' parts of the training may be."""

import importlib
from types import SimpleNamespace

import pytest

import qpipe
from qpipe import ConfigError
from qpipe.testing import tiny_config

EXECUTE = importlib.import_module("qpipe.stages.execute")


@pytest.fixture
def config(tmp_path, masked_lm, monkeypatch):
    """`config(budget, steps)`: 4 steps by `train.epochs`, an intervention of `steps`, and a teacher to fine-tune."""
    monkeypatch.setattr(EXECUTE, "verify", lambda *_, **__: SimpleNamespace(passed=True, metrics={}, lines=list))

    def make(budget, steps):
        augmentation = {"budget": budget, "model": str(masked_lm), "neighbours": "none", "trials": 2}
        plugins = {"kure": {}, "ti-g": {"preset": "paper", "steps": steps}, "data-augmentation": augmentation}
        return tiny_config(
            tmp_path, plugins, train__max_steps=None, train__epochs=0.5, train__save_every=99, teacher__epochs=0.5
        )

    return make


@pytest.mark.parametrize(("budget", "steps"), [("O4", 9), ("A", 9)])
def test_an_intervention_longer_than_the_epochs_fits_into_the_budget(budget, steps, config):
    run = qpipe.execute(config(budget, steps))
    rows = len(run.data.train)
    assert rows == 128 if budget == "O4" else 2 * 128 < rows <= 3 * 128
    passes = {"O4": 2, "A": 1}[budget]
    assert run.results["steps"] == rows * passes // 16
    first, rest = run.phases
    assert (first.steps, rest.stop) == (steps, run.results["steps"])
    logged = (run.out / "teacher" / "metrics.jsonl").read_text().splitlines()
    assert '"step": 4' in logged[-1], "the teacher takes half an epoch of the original data"


def test_an_intervention_longer_than_the_budget_shows_before_the_teacher_is_trained(config, tmp_path):
    with pytest.raises(ConfigError, match="of 5 steps does not fit into a training of 4 optimizer steps"):
        qpipe.execute(config("O", 5))
    with pytest.raises(ConfigError, match=r"of 99 steps does not fit into a training of \d+ optimizer steps"):
        qpipe.execute(config("A", 99))
    assert not (tmp_path / "run" / "teacher").exists()
