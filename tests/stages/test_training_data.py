"""The hook that changes the training data, and the training's length."""

from dataclasses import replace

import pytest

import qpipe
from qpipe import ConfigError, Plugin, QpipeError, TrainingPhase, hookimpl
from qpipe.testing import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("fast")


class Half(Plugin):
    """Trains on every other example, for three steps."""

    needs_teacher = True

    def __init__(self):
        super().__init__()
        self.seen = []

    @hookimpl
    def qpipe_training_data(self, data, engine):
        self.seen.append((len(data.train), engine.rank))
        rows = data.text.split.data.select(range(0, len(data.train), 2))
        return replace(data, train=data.text.encode(rows, data.text.labels[::2]), steps=3)


def test_rows_and_steps_are_the_plugins_and_the_teacher_keeps_the_original(tmp_path, use):
    half = Half()
    use(half)
    config = tiny_config(tmp_path, train__max_steps=None, train__epochs=2.0, train__batch_size=32, teacher__epochs=1.0)
    run = qpipe.execute(config)
    assert half.seen == [(128, 0)]
    assert len(run.data.train) == 64 and run.total_steps == run.results["steps"] == 3
    rows = run.data.text.split.data
    assert run.data.train["labels"] == [rows["label"][i] for i in range(0, 128, 2)]
    words = run.data.tokenizer(rows["sentence"][2])["input_ids"]
    assert run.data.train["input_ids"][1] == words
    logged = (tmp_path / "run" / "teacher" / "metrics.jsonl").read_text().splitlines()
    assert '"step": 4' in logged[-1], "the teacher takes one epoch of all 128 examples in batches of 32"


@pytest.mark.parametrize("wrong", ["missing", "deeper"])
def test_a_wrong_teacher_shows_before_the_plugin_begins(wrong, tmp_path, use):
    half = Half()
    use(half)
    tiny_config(tmp_path)
    if wrong == "deeper":
        tiny_model(tmp_path / "deeper", num_hidden_layers=4)
    message = "different architectures" if wrong == "deeper" else "missing"
    with pytest.raises(QpipeError, match=message):
        qpipe.execute(tiny_config(tmp_path, teacher__name=str(tmp_path / wrong)))
    assert half.seen == []


def test_a_named_teacher_of_another_size_is_what_the_plugins_are_checked_with(tmp_path, use):
    """Not the student's model, whose depth the map would not fit."""
    half = Half()
    use(half)
    tiny_config(tmp_path)
    deep = tiny_model(tmp_path / "deep", num_hidden_layers=4)
    named = {"teacher__name": str(deep), "teacher__init_student": False}
    seen = []

    class Depth(Plugin):
        @hookimpl
        def qpipe_model_prepared(self, run):
            seen.append(run.teacher.config.num_hidden_layers)

    use(half, Depth())
    qpipe.execute(tiny_config(tmp_path, **named))
    assert seen == [4, 4] and len(half.seen) == 1


def test_max_steps_of_the_configuration_comes_first(tmp_path, use, monkeypatch):
    monkeypatch.setattr(Half, "needs_teacher", False)
    use(Half())
    assert qpipe.execute(tiny_config(tmp_path, train__max_steps=2)).total_steps == 2


def test_what_is_wrong_elsewhere_shows_before_the_plugin_begins(tmp_path, use, monkeypatch):
    monkeypatch.setattr(Half, "needs_teacher", False)
    half = Half()
    use(half)
    with pytest.raises(ConfigError, match="format .nonsense. is unknown"):
        qpipe.execute(tiny_config(tmp_path, export__format="nonsense"))
    assert half.seen == []


class Changed(Plugin):
    """Trains on the first `rows` examples, over and over, for `steps` steps, in a phase of `phase` of them first."""

    needs_teacher = True

    def __init__(self, steps, phase, rows=128):
        super().__init__()
        self.steps, self.phase, self.rows, self.seen = steps, phase, rows, []

    @hookimpl
    def qpipe_training_data(self, data):
        self.seen.append(len(data.train))
        chosen = [row % len(data.train) for row in range(self.rows)]
        rows, labels = data.text.split.data.select(chosen), data.text.labels[chosen]
        return replace(data, train=data.text.encode(rows, labels), steps=self.steps)

    @hookimpl
    def qpipe_training_phases(self):
        return [TrainingPhase("first", self.phase)] if self.phase else []


SHORT = {"train__max_steps": None, "train__epochs": 1.0, "train__batch_size": 32, "teacher__epochs": 1.0}
"""On the 128 examples: 4 steps."""


def test_phases_are_measured_by_the_length_that_the_plugin_gives(tmp_path, use):
    use(Changed(steps=9, phase=6))
    run = qpipe.execute(tiny_config(tmp_path, **SHORT))
    assert [(phase.name, phase.stop) for phase in run.phases] == [("first", 6), ("train", 9)]
    assert run.results["steps"] == 9


def test_a_phase_longer_than_the_changed_training_shows_before_the_teacher_is_trained(tmp_path, use):
    changed = Changed(steps=3, phase=4)  # it would fit the four steps of the data as they were
    use(changed)
    with pytest.raises(ConfigError, match="'first' asks for 4 optimizer steps, and 3 of 3 are left"):
        qpipe.execute(tiny_config(tmp_path, **SHORT))
    assert changed.seen == [128], "only the changed data can tell"
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_phase_longer_than_max_steps_shows_before_the_plugin_begins(tmp_path, use):
    changed = Changed(steps=9, phase=6)
    use(changed)
    with pytest.raises(ConfigError, match="'first' asks for 6 optimizer steps, and 5 of 5 are left"):
        qpipe.execute(tiny_config(tmp_path, **{**SHORT, "train__max_steps": 5}))
    assert changed.seen == []


def test_changed_rows_may_fill_a_batch_that_the_original_ones_do_not(tmp_path, use):
    tiny_config(tmp_path)
    named = {"teacher__name": str(tmp_path / "teacher"), "data__max_train_examples": 20}
    use(Changed(steps=4, phase=0, rows=64))
    run = qpipe.execute(tiny_config(tmp_path, **SHORT, **named))
    assert run.results["steps"] == 4 and len(run.data.train) == 64


def test_a_teacher_needs_a_batch_of_original_rows_which_shows_before_the_plugin_begins(tmp_path, use):
    changed = Changed(steps=4, phase=0, rows=64)
    use(changed)
    with pytest.raises(ConfigError, match=r"20 training examples that the teacher is fine-tuned on.*teacher\.name"):
        qpipe.execute(tiny_config(tmp_path, **SHORT, data__max_train_examples=20))
    assert changed.seen == []


@pytest.mark.parametrize("steps", [None, 6])
def test_too_few_changed_rows_show_before_the_teacher_is_trained(steps, tmp_path, use):
    use(Changed(steps=4, phase=0, rows=20))
    with pytest.raises(ConfigError, match="train.batch_size 32 exceeds the 20 training examples; lower it"):
        qpipe.execute(tiny_config(tmp_path, **{**SHORT, "train__max_steps": steps}))
    assert not (tmp_path / "run" / "teacher").exists()
