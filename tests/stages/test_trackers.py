"""Experiment trackers get what `metrics.jsonl` gets."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate import tracking

import qpipe
from qpipe import ConfigError
from qpipe.stages import evaluate_run
from qpipe.testing import tiny_config


class Recording(tracking.GeneralTracker):
    """A tracker of the user's own, registered with Accelerate; keeps what it gets in order."""

    name = "recording"
    requires_logging_directory = True
    events = []

    def __init__(self, run_name, logging_dir):
        super().__init__(_blank=True)
        self.events.append(("init", run_name, Path(logging_dir).name))

    @property
    def tracker(self):
        return self.events

    def start(self):
        self.events.append(("start",))

    def store_init_configuration(self, values):
        self.events.append(("settings", values))

    def log(self, values, step=None):
        self.events.append(("log", step, values))

    def finish(self):
        self.events.append(("finish",))


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recording", Recording)
    monkeypatch.setattr(Recording, "events", [])
    return lambda: Recording.events


def recorded(tmp_path, **changes):
    return tiny_config(tmp_path, train__trackers=["recording"], quantization__preset="w4", **changes)


def test_a_tracker_gets_settings_and_every_row(tmp_path, events):
    run = qpipe.execute(recorded(tmp_path))
    init, start, (_, settings), *logs, finish = events()
    assert (init, start, finish) == (("init", "qpipe", "trackers"), ("start",), ("finish",))
    assert settings["train.max_steps"] == 6 and settings["train.trackers"] == '["recording"]'
    assert all(isinstance(value, int | float | str) for value in settings.values())
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(logs) == 7
    for row, (_, step, values) in zip(rows, logs, strict=True):
        kind = row.pop("kind")
        assert step == row.pop("step") and row.pop("time")
        assert values == {f"{kind}/{name}": value for name, value in row.items()}


def test_steps_go_on_after_a_resume_and_a_failure_closes_the_tracker(tmp_path, events, monkeypatch):
    config = recorded(tmp_path)

    def cut(self, values, step=None):
        if step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(Recording, "log", cut)
        qpipe.execute(config)
    assert events()[-1] == ("finish",)
    events().clear()
    qpipe.execute(config, resume=True)
    assert [event[1] for event in events() if event[0] == "log"] == [4, 5, 6, 6]


def test_others_than_those_asked_for_do_not_start(tmp_path, events):
    qpipe.execute(tiny_config(tmp_path, quantization__preset="w4"))
    assert events() == []


def test_a_tracker_that_nobody_knows(tmp_path):
    with pytest.raises(ConfigError, match=r"'wand' is no tracker; did you mean 'wandb'\?; it is one of aim, clearml, "):
        tiny_config(tmp_path, train__trackers=["wand"])


def test_trackers_are_looked_for_before_anything_starts(tmp_path, monkeypatch):
    """And only where something starts: a finished run is evaluated where its tracker is not installed."""
    monkeypatch.setattr(tracking, "_available_trackers", [])
    config = tiny_config(tmp_path, train__trackers=["wandb"])
    with pytest.raises(ConfigError, match="train.trackers: 'wandb' needs its own package: pip install wandb"):
        qpipe.execute(config)
    assert not Path(config.out).exists()
    run = qpipe.execute(tiny_config(tmp_path))
    written = yaml.safe_load((run.out / "config.yaml").read_text())
    written["train"]["trackers"] = ["wandb"]
    (run.out / "config.yaml").write_text(yaml.safe_dump(written))
    assert evaluate_run(run.out) == run.results["evaluation"]
